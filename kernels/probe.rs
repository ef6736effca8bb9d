//! What this machine's CPU can do at most, measured: the ceilings that `benches/kernels.rs` and `taper bench` compare
//! with.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use crate::memory;
use crate::quantized::{self, Quantization};
#[cfg(target_arch = "x86_64")]
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
#[cfg(target_arch = "x86_64")]
use crate::simd::{Instructions, Stored};
use crate::simd::{Kernel, LANES, Lanes, Vector, dispatch, instructions, prefetch};

/// What a product multiplies with `x` in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operands {
    /// Values in f32, or widened to it.
    F32,
    /// Weights in bf16.
    Bf16,
    /// Packed weights.
    Packed(Quantization),
}

/// Operations per second of all threads together, two for each product of two operands, on the instructions that the
/// kernels use for them, with everything in registers.
pub fn peak(operands: Operands) -> f64 {
    const STEPS: usize = 500_000;
    let run = |_| match (operands, black_box(STEPS)) {
        #[cfg(target_arch = "x86_64")]
        (Operands::Bf16 | Operands::Packed(_), steps) if amx::is_used() => tile_products(operands, steps),
        (Operands::F32 | Operands::Bf16, steps) => dispatch(MultiplyAdds { steps }),
        (Operands::Packed(format), steps) => quantized::probe::products(format, steps),
    };
    let threads = rayon::current_num_threads();
    let start = Instant::now();
    let operations: usize = (0..threads).into_par_iter().map(run).sum();
    operations as f64 / start.elapsed().as_secs_f64()
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

/// Multiplies registers of AMX `steps` times over and returns how many operations of a product that were.
#[cfg(target_arch = "x86_64")]
fn tile_products(operands: Operands, steps: usize) -> usize {
    let is_bf16 = operands == Operands::Bf16;
    amx::dispatch([WIDTH; 8], TileProducts { is_bf16, steps });
    // A value of `x` is several in bf16.
    let (elements, parts) = if is_bf16 { (WIDTH / 2, f32::PARTS) } else { (WIDTH, 1) };
    steps * 4 * ROWS * ROWS * elements * 2 / parts
}

#[cfg(target_arch = "x86_64")]
struct TileProducts {
    is_bf16: bool,
    steps: usize,
}

#[cfg(target_arch = "x86_64")]
impl amx::Kernel for TileProducts {
    fn run<T: Tiles>(self, tiles: &mut T) {
        for _ in 0..self.steps {
            if self.is_bf16 {
                tiles.multiply_bf16::<0, 4, 6>();
                tiles.multiply_bf16::<1, 4, 7>();
                tiles.multiply_bf16::<2, 5, 6>();
                tiles.multiply_bf16::<3, 5, 7>();
            } else {
                tiles.multiply_bytes::<0, 4, 6>();
                tiles.multiply_bytes::<1, 4, 7>();
                tiles.multiply_bytes::<2, 5, 6>();
                tiles.multiply_bytes::<3, 5, 7>();
            }
        }
    }
}

/// Rounds of multiply-adds in f32, in the widest registers; gives how many operations they were.
struct MultiplyAdds {
    steps: usize,
}

impl Kernel for MultiplyAdds {
    type Output = usize;

    #[inline(always)]
    fn run<V: Lanes>(self) -> usize {
        match instructions() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => multiply_adds::<V::Pair>(self.steps),
            _ => multiply_adds::<V>(self.steps),
        }
    }
}

#[inline(always)]
fn multiply_adds<V: Vector>(steps: usize) -> usize {
    /// Chains of latency four or five that keep two units busy.
    const CHAINS: usize = 12;
    let mut values = black_box([V::splat(1.0); CHAINS]);
    let factor = black_box(V::splat(0.5));
    for _ in 0..steps {
        for value in &mut values {
            *value = value.mul_add(factor, factor);
        }
    }
    black_box(values);
    steps * CHAINS * V::WIDTH * 2
}
