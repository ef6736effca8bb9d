//! Floats to codes, once when a model is loaded.

use candle_core::{Result, bail};
use half::bf16;
use rayon::prelude::*;

use super::{OUTS, Quantization, QuantizedMatrix, Tile};

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
    let mut minima = vec![[bf16::ZERO; OUTS]; if format == Quantization::Q4 { count } else { 0 }];
    let width = groups.max(1);
    // Chunks of no factors keep the iterators equally long.
    let mut none = vec![[bf16::ZERO; OUTS]; if minima.is_empty() { count } else { 0 }];
    let lows = if minima.is_empty() { &mut none } else { &mut minima };
    let finite = tiles
        .par_chunks_mut(width)
        .zip(scales.par_chunks_mut(width))
        .zip(lows.par_chunks_mut(width))
        .enumerate()
        .map_init(
            || vec![0.0; groups * group],
            |values, (first, ((tiles, scales), minima))| {
                (first * OUTS..outer.min((first + 1) * OUTS)).zip(0..).all(|(o, lane)| {
                    row(o, &mut values[..inner]);
                    for (g, values) in values.chunks_exact(group).enumerate() {
                        let (tile, scale) = (&mut tiles[g].0, &mut scales[g][lane]);
                        match format {
                            Quantization::Q8 => *scale = signed(values, |i, code| tile[i / 4][4 * lane + i % 4] = code),
                            Quantization::Q4 => {
                                let place = |i: usize, code: u8| {
                                    tile[i / 8][4 * lane + i % 4] |= if i % 8 < 4 { code } else { code << 4 }
                                };
                                (*scale, minima[g][lane]) = affine(values, place);
                            }
                        }
                    }
                    values[..inner].iter().all(|value| value.is_finite())
                })
            },
        )
        .reduce(|| true, |a, b| a && b);
    if !finite {
        bail!("quantized: a weight is NaN or infinite")
    }
    Ok(QuantizedMatrix { format, outer, inner, tiles, scales, minima })
}

/// Codes in `-127..=127`; returns their scale.
fn signed(values: &[f32], mut place: impl FnMut(usize, u8)) -> bf16 {
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = round_up(largest / 127.0);
    let inverse = inverse(scale);
    for (i, value) in values.iter().enumerate() {
        place(i, (value * inverse).round_ties_even() as i8 as u8);
    }
    scale
}

/// Codes in `0..=15`; returns their scale and minimum.
fn affine(values: &[f32], mut place: impl FnMut(usize, u8)) -> (bf16, bf16) {
    let (least, largest) =
        values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(least, largest), &v| (least.min(v), largest.max(v)));
    let minimum = -round_up(-least);
    let scale = round_up((largest - minimum.to_f32()) / 15.0);
    let (inverse, low) = (inverse(scale), minimum.to_f32());
    for (i, value) in values.iter().enumerate() {
        place(i, ((value - low) * inverse).round_ties_even() as u8);
    }
    (scale, minimum)
}

/// The least bf16 that is not below `value`.
fn round_up(value: f32) -> bf16 {
    let cut = bf16::from_bits((value.to_bits() >> 16) as u16);
    match cut.to_f32() < value {
        true if value > 0.0 => bf16::from_bits(cut.to_bits() + 1),
        true => bf16::from_bits(cut.to_bits() - 1),
        false => cut,
    }
}

fn inverse(scale: bf16) -> f32 {
    if scale == bf16::ZERO { 0.0 } else { scale.to_f32().recip() }
}
