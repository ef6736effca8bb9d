//! Floats to codes, once when a model is loaded.

use candle_core::{Result, bail};
use half::bf16;
use rayon::prelude::*;

use super::{Blocks, GROUP, OUTS, Q4Block, Q8Block, Quantization, QuantizedMatrix, STEPS};
use crate::memory;
use crate::simd::{Kernel, LANES, Lanes, dispatch};

pub fn pack(
    format: Quantization,
    [outer, inner]: [usize; 2],
    row: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<QuantizedMatrix> {
    let blocks = match format {
        Quantization::Q8 => Blocks::Q8(blocks([outer, inner], row)?.into()),
        Quantization::Q4 => Blocks::Q4(blocks([outer, inner], row)?.into()),
    };
    Ok(QuantizedMatrix { outer, inner, blocks })
}

fn blocks<B: Block>([outer, inner]: [usize; 2], row: impl Fn(usize, &mut [f32]) + Sync) -> Result<Vec<B>> {
    let groups = inner.div_ceil(GROUP);
    let count = outer.div_ceil(OUTS) * groups;
    let mut blocks = memory::with_capacity(count);
    blocks.resize(count, B::ZERO);
    let finite = blocks
        .par_chunks_mut(groups.max(1))
        .enumerate()
        .map_init(
            || vec![0.0; groups * GROUP],
            |values, (panel, blocks)| {
                (panel * OUTS..outer.min((panel + 1) * OUTS)).zip(0..).all(|(o, lane)| {
                    row(o, &mut values[..inner]);
                    dispatch(Row { values, lane, blocks })
                })
            },
        )
        .reduce(|| true, |a, b| a && b);
    if !finite {
        bail!("quantized: a weight is NaN or infinite")
    }
    Ok(blocks)
}

trait Block: Clone + Send {
    const ZERO: Self;

    /// Packs the inputs of one output, which lie between `least` and `largest`.
    fn set(&mut self, lane: usize, values: &[f32], least: f32, largest: f32);
}

impl Block for Q8Block {
    const ZERO: Self = Self { codes: [[[0; 4]; OUTS]; STEPS], scales: [bf16::ZERO; OUTS] };

    #[inline(always)]
    fn set(&mut self, lane: usize, values: &[f32], least: f32, largest: f32) {
        let scale = round_up(largest.max(-least) / 127.0);
        let inverse = inverse(scale);
        for (four, codes) in values.as_chunks::<4>().0.iter().zip(&mut self.codes) {
            codes[lane] = four.map(|value| (value * inverse).round_ties_even() as i32 as u8);
        }
        self.scales[lane] = scale;
    }
}

impl Block for Q4Block {
    const ZERO: Self =
        Self { codes: [[[0; 4]; OUTS]; STEPS / 2], scales: [bf16::ZERO; OUTS], minima: [bf16::ZERO; OUTS] };

    #[inline(always)]
    fn set(&mut self, lane: usize, values: &[f32], least: f32, largest: f32) {
        let minimum = -round_up(-least);
        let low = minimum.to_f32();
        let scale = round_up((largest - low) / 15.0);
        let inverse = inverse(scale);
        let code = |value: f32| ((value - low) * inverse).round_ties_even() as i32 as u8;
        for (eight, codes) in values.as_chunks::<8>().0.iter().zip(&mut self.codes) {
            codes[lane] = std::array::from_fn(|i| code(eight[i]) | code(eight[i + 4]) << 4);
        }
        (self.scales[lane], self.minima[lane]) = (scale, minimum);
    }
}

/// One row of the weight, which is lane `lane` of its blocks.
struct Row<'a, B> {
    values: &'a [f32],
    lane: usize,
    blocks: &'a mut [B],
}

impl<B: Block> Kernel for Row<'_, B> {
    /// Whether every value is finite.
    type Output = bool;

    #[inline(always)]
    fn run<V: Lanes>(self) -> bool {
        let mut finite = true;
        for (values, block) in self.values.chunks_exact(GROUP).zip(self.blocks) {
            let (least, largest) = range::<V>(values);
            block.set(self.lane, values, least, largest);
            // Infinity shows in the range; NaN may not.
            finite &= least.is_finite() && largest.is_finite() && !values.iter().any(|value| value.is_nan());
        }
        finite
    }
}

/// The least and the greatest of the values, which are a multiple of eight.
#[inline(always)]
fn range<V: Lanes>(values: &[f32]) -> (f32, f32) {
    let (mut least, mut largest) = (V::splat(f32::INFINITY), V::splat(f32::NEG_INFINITY));
    for values in values.as_chunks::<LANES>().0 {
        let values = V::load(values);
        least = values.min(least);
        largest = values.max(largest);
    }
    (-V::splat(0.0).sub(least).greatest(), largest.greatest())
}

/// The least bf16 that is not below `value`.
#[inline(always)]
fn round_up(value: f32) -> bf16 {
    let cut = bf16::from_bits((value.to_bits() >> 16) as u16);
    match cut.to_f32() < value {
        true if value > 0.0 => bf16::from_bits(cut.to_bits() + 1),
        true => bf16::from_bits(cut.to_bits() - 1),
        false => cut,
    }
}

#[inline(always)]
fn inverse(scale: bf16) -> f32 {
    if scale == bf16::ZERO { 0.0 } else { scale.to_f32().recip() }
}
