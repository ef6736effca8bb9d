//! Floats to codes, once when a model is loaded.

use candle_core::{Result, bail};
use half::bf16;
use rayon::prelude::*;

use super::{OUTS, Quantization, QuantizedMatrix, Tile};
use crate::simd::{Kernel, LANES, Lanes, dispatch};

pub fn pack(
    format: Quantization,
    [outer, inner]: [usize; 2],
    row: impl Fn(usize, &mut [f32]) + Sync,
) -> Result<QuantizedMatrix> {
    let group = format.group();
    let groups = inner.div_ceil(group);
    let count = outer.div_ceil(OUTS) * groups;
    let mut tiles = vec![Tile([[0; 32]; 8]); count];
    let mut scales = vec![[bf16::ZERO; OUTS]; count];
    let mut minima = vec![[bf16::ZERO; OUTS]; count];
    let width = groups.max(1);
    let finite = tiles
        .par_chunks_mut(width)
        .zip(scales.par_chunks_mut(width))
        .zip(minima.par_chunks_mut(width))
        .enumerate()
        .map_init(
            || vec![0.0; groups * group],
            |values, (first, ((tiles, scales), minima))| {
                (first * OUTS..outer.min((first + 1) * OUTS)).zip(0..).all(|(o, lane)| {
                    row(o, &mut values[..inner]);
                    dispatch(Row { format, values, lane, tiles, scales, minima })
                })
            },
        )
        .reduce(|| true, |a, b| a && b);
    if !finite {
        bail!("quantized: a weight is NaN or infinite")
    }
    if format == Quantization::Q8 {
        minima = vec![];
    }
    Ok(QuantizedMatrix { format, outer, inner, tiles, scales, minima })
}

/// One row of the weight, which is lane `lane` of its tiles.
struct Row<'a> {
    format: Quantization,
    values: &'a [f32],
    lane: usize,
    tiles: &'a mut [Tile],
    scales: &'a mut [[bf16; OUTS]],
    minima: &'a mut [[bf16; OUTS]],
}

impl Kernel for Row<'_> {
    /// Whether every value is finite.
    type Output = bool;

    #[inline(always)]
    fn run<V: Lanes>(self) -> bool {
        let Self { format, lane, .. } = self;
        let mut finite = true;
        for (g, values) in self.values.chunks_exact(format.group()).enumerate() {
            let (least, largest) = range::<V>(values);
            let tile = &mut self.tiles[g].0;
            let place = 4 * lane..4 * lane + 4;
            match format {
                Quantization::Q8 => {
                    let scale = round_up(largest.max(-least) / 127.0);
                    let inverse = inverse(scale);
                    for (four, bytes) in values.as_chunks::<4>().0.iter().zip(tile) {
                        let code = four.map(|value| (value * inverse).round_ties_even() as i32 as u8);
                        bytes[place.clone()].copy_from_slice(&code);
                    }
                    self.scales[g][lane] = scale;
                }
                Quantization::Q4 => {
                    let minimum = -round_up(-least);
                    let low = minimum.to_f32();
                    let scale = round_up((largest - low) / 15.0);
                    let inverse = inverse(scale);
                    let code = |value: f32| ((value - low) * inverse).round_ties_even() as i32 as u8;
                    for (eight, bytes) in values.as_chunks::<8>().0.iter().zip(tile) {
                        for (i, byte) in bytes[place.clone()].iter_mut().enumerate() {
                            *byte = code(eight[i]) | code(eight[i + 4]) << 4;
                        }
                    }
                    (self.scales[g][lane], self.minima[g][lane]) = (scale, minimum);
                }
            }
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
