//! Packed products without operands to wait for: see [`crate::probe`].

use std::hint::black_box;

use super::dot::{self, Dot};
use super::{OUTS, Quantization};
#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
use crate::simd::instructions;

/// Multiplies codes in registers with rows in registers `steps` times over and returns how many operations that were.
pub(crate) fn products(format: Quantization, steps: usize) -> usize {
    #[cfg(any(test, target_arch = "x86_64"))]
    if amx::is_used() {
        amx::dispatch([WIDTH; 8], TileProducts { steps });
        return steps * 4 * ROWS * ROWS * WIDTH * 2;
    }
    let mut operations = 0;
    dot::dispatch(instructions(), Products { format, steps, operations: &mut operations });
    operations
}

struct Products<'a> {
    format: Quantization,
    steps: usize,
    operations: &'a mut usize,
}

impl dot::Kernel for Products<'_> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        match D::ROWS {
            12.. => self.rows::<D, 12>(),
            6.. => self.rows::<D, 6>(),
            _ => self.rows::<D, 4>(),
        }
    }
}

impl Products<'_> {
    #[inline(always)]
    fn rows<D: Dot, const R: usize>(self) {
        let codes = D::load(&black_box([[1; 4]; OUTS]), 0);
        let x = black_box([[1; 4]; R]);
        match self.format {
            Quantization::Q8 => {
                let mut sums = [D::unbiased(0); R];
                for _ in 0..self.steps {
                    D::add(&mut sums, codes, &x);
                }
                black_box(&sums);
            }
            Quantization::Q4 => {
                let mut sums = [D::small(); R];
                for _ in 0..self.steps {
                    D::add_small(&mut sums, codes, &x);
                }
                black_box(&sums);
            }
        }
        *self.operations = self.steps * R * D::WIDTH * 4 * 2;
    }
}

#[cfg(any(test, target_arch = "x86_64"))]
struct TileProducts {
    steps: usize,
}

#[cfg(any(test, target_arch = "x86_64"))]
impl amx::Kernel for TileProducts {
    fn run<T: Tiles>(self, tiles: &mut T) {
        for _ in 0..self.steps {
            tiles.multiply_bytes::<0, 4, 6>();
            tiles.multiply_bytes::<1, 4, 7>();
            tiles.multiply_bytes::<2, 5, 6>();
            tiles.multiply_bytes::<3, 5, 7>();
        }
    }
}
