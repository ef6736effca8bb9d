//! Packed products without operands to wait for: see [`crate::probe`].

use std::hint::black_box;

use super::dot::{self, Dot};
use super::{OUTS, Quantization, STEPS};
use crate::simd::instructions;

/// Multiplies codes in registers with rows in registers `steps` times over and returns how many operations that were.
pub(crate) fn products(format: Quantization, steps: usize) -> usize {
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
        let x = black_box([[[1; 4]; STEPS]; R]);
        match self.format {
            Quantization::Q8 => {
                let mut sums = [D::unbiased(0); R];
                for _ in 0..self.steps {
                    D::add(&mut sums, codes, &x, 0);
                }
                black_box(&sums);
            }
            Quantization::Q4 => {
                let mut sums = [D::small(); R];
                for _ in 0..self.steps {
                    D::add_small(&mut sums, codes, &x, 0);
                }
                black_box(&sums);
            }
        }
        *self.operations = self.steps * R * D::WIDTH * 4 * 2;
    }
}
