//! What this machine's CPU can do at most, measured: the ceilings that `benches/kernels.rs` compares ops with.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

/// Floating point operations per second of all threads together in independent f32 multiply-adds.
pub fn peak_flops() -> f64 {
    const STEPS: usize = 1_000_000;
    let threads = rayon::current_num_threads();
    let start = Instant::now();
    let flops: usize = (0..threads).into_par_iter().map(|_| multiply_adds(black_box(STEPS))).sum();
    flops as f64 / start.elapsed().as_secs_f64()
}

/// Bytes per second that all threads together read from `values`, which should be larger than every cache.
pub fn read_bandwidth(values: &[u64]) -> f64 {
    let start = Instant::now();
    let chunk = values.len().div_ceil(4 * rayon::current_num_threads());
    black_box(values.par_chunks(chunk).map(total).reduce(|| 0, u64::wrapping_add));
    size_of_val(values) as f64 / start.elapsed().as_secs_f64()
}

fn total(values: &[u64]) -> u64 {
    let (groups, rest) = values.as_chunks::<32>();
    let mut lanes = [0u64; 32];
    for group in groups {
        lanes.iter_mut().zip(group).for_each(|(lane, value)| *lane = lane.wrapping_add(*value));
    }
    lanes.iter().chain(rest).fold(0, |sum, value| sum.wrapping_add(*value))
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
