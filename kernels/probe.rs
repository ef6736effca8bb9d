//! What this machine's CPU can do at most, measured: the ceilings that `benches/kernels.rs` compares ops with.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::memory;
use crate::simd::{Kernel, LANES, Lanes, dispatch, prefetch};

/// Floating point operations per second of all threads together in independent f32 multiply-adds.
pub fn peak_flops() -> f64 {
    const STEPS: usize = 1_000_000;
    let threads = rayon::current_num_threads();
    let start = Instant::now();
    let flops: usize = (0..threads).into_par_iter().map(|_| multiply_adds(black_box(STEPS))).sum();
    flops as f64 / start.elapsed().as_secs_f64()
}

/// Memory to read, larger than every cache, on huge pages where the system grants them.
pub struct Memory(Vec<f32>);

impl Memory {
    #[expect(clippy::new_without_default, reason = "a quarter of a gibibyte is no default")]
    pub fn new() -> Self {
        const VALUES: usize = 64 << 20;
        let mut values = memory::with_capacity(VALUES);
        values.resize(VALUES, 1.0);
        Self(values)
    }

    /// Bytes per second that all threads together read, in the better of two ways: from end to end, asked for ahead of
    /// use, or in several places at once, left to the hardware.
    pub fn read_bandwidth(&self) -> f64 {
        self.read::<1, 4096>().max(self.read::<8, 0>())
    }

    /// In `STREAMS` places at once, each asked for `AHEAD` bytes early unless that is 0.
    fn read<const STREAMS: usize, const AHEAD: usize>(&self) -> f64 {
        let Self(values) = self;
        let chunk = values.len().div_ceil(4 * rayon::current_num_threads());
        let start = Instant::now();
        let sum = values.par_chunks(chunk).map(|values| dispatch(Total::<STREAMS, AHEAD> { values })).sum::<f32>();
        black_box(sum);
        size_of_val(&values[..]) as f64 / start.elapsed().as_secs_f64()
    }
}

struct Total<'a, const STREAMS: usize, const AHEAD: usize> {
    values: &'a [f32],
}

impl<const STREAMS: usize, const AHEAD: usize> Kernel for Total<'_, STREAMS, AHEAD> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Lanes>(self) -> f32 {
        const LINE: usize = 64 / size_of::<f32>();
        let streams: [&[[f32; LINE]]; STREAMS] = {
            let each = self.values.len() / STREAMS;
            std::array::from_fn(|i| self.values[i * each..][..each].as_chunks().0)
        };
        let mut sums = [[V::splat(0.0); LINE / LANES]; STREAMS];
        for line in 0..streams[0].len() {
            for (stream, sums) in streams.iter().zip(&mut sums) {
                if AHEAD > 0 {
                    prefetch(stream.get(line + AHEAD / size_of_val(&stream[0])).map_or(&[][..], |line| line));
                }
                for (sum, values) in sums.iter_mut().zip(stream[line].as_chunks::<LANES>().0) {
                    *sum = sum.add(V::load(values));
                }
            }
        }
        sums.into_iter().flatten().map(V::sum).sum()
    }
}

/// Runs `steps` rounds of multiply-adds and returns how many operations that were.
fn multiply_adds(steps: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the features were just detected.
        return unsafe { multiply_adds_avx2(steps) };
    }
    let mut lanes = black_box([1.0f32; 64]);
    let factor = black_box([0.5f32; 64]);
    for _ in 0..steps {
        lanes.iter_mut().zip(&factor).for_each(|(lane, factor)| *lane = *lane * factor + factor);
    }
    black_box(lanes);
    steps * lanes.len() * 2
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn multiply_adds_avx2(steps: usize) -> usize {
    use std::arch::x86_64::*;
    // Ten chains of latency four or five keep two units busy.
    let mut lanes = black_box([_mm256_set1_ps(1.0); 10]);
    let factor = black_box(_mm256_set1_ps(0.5));
    for _ in 0..steps {
        for lane in &mut lanes {
            *lane = _mm256_fmadd_ps(*lane, factor, factor);
        }
    }
    black_box(lanes);
    steps * lanes.len() * 8 * 2
}
