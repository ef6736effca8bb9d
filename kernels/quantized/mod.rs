//! Products with weight matrices that are packed to 8 or 4 bits.

pub(crate) mod cpu;
mod pack;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Device, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

use crate::cpu::view;
use crate::simd::Stored;

/// How a weight is packed. Groups lie along the inner dimension; factors are bf16, rounded so that no weight is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// `w = scale * code`, codes in `-127..=127`, a scale for 32 weights: 8.5 bits a weight. For normally distributed
    /// weights the error is 0.6 % of their size.
    Q8,
    /// `w = scale * code + minimum`, codes in `0..=15`, both factors for 64 weights: 4.5 bits a weight. For normally
    /// distributed weights the error is 9 % of their size.
    Q4,
}

impl Quantization {
    /// Bytes that a packed weight `[outer, inner]` takes.
    pub fn bytes(self, [outer, inner]: [usize; 2]) -> usize {
        let factors = match self {
            Self::Q8 => 1,
            Self::Q4 => 2,
        };
        let tile = size_of::<Tile>() + factors * OUTS * size_of::<bf16>();
        outer.div_ceil(OUTS) * inner.div_ceil(self.group()) * tile
    }

    /// Weights that share their factors.
    pub(crate) fn group(self) -> usize {
        match self {
            Self::Q8 => 32,
            Self::Q4 => 64,
        }
    }
}

/// A weight `[O, I]`, packed for the CPU.
///
/// Eight outputs and one group make a tile of 256 bytes, thirty-two at a time as the kernels load them: four weights
/// of the first output, four of the second, and so on; for Q4 the next four are in the upper halves of the bytes. Rows
/// and columns missing from the last tiles are zero.
pub struct QuantizedMatrix {
    format: Quantization,
    outer: usize,
    inner: usize,
    /// `[O / 8, groups]`
    tiles: Vec<Tile>,
    /// `[O / 8, groups]`
    scales: Vec<[bf16; OUTS]>,
    /// `[O / 8, groups]` for Q4, else empty.
    minima: Vec<[bf16; OUTS]>,
}

/// Outputs of a tile.
const OUTS: usize = 8;

/// Two cache lines' worth of loads never straddle a third.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Tile([[u8; 32]; 8]);

impl QuantizedMatrix {
    /// Packs a weight `[outer, inner]`, on all threads. `row(o, values)` writes its row `o`.
    ///
    /// # Errors
    ///
    /// A weight is NaN or infinite.
    pub fn pack(
        format: Quantization,
        [outer, inner]: [usize; 2],
        row: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Self> {
        pack::pack(format, [outer, inner], row)
    }

    /// `[O, I]`
    pub fn dims(&self) -> [usize; 2] {
        [self.outer, self.inner]
    }

    /// How it is packed.
    pub fn format(&self) -> Quantization {
        self.format
    }

    /// Memory that it takes.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.tiles[..]) + size_of_val(&self.scales[..]) + size_of_val(&self.minima[..])
    }

    /// The rows `ids` `[N]` (u32), as `[N, I]` in f32: an embedding.
    ///
    /// # Errors
    ///
    /// An id lies beyond the last row.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        let ids = ids.to_vec1::<u32>()?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.outer) {
            bail!("quantized: row {id}, there are {}", self.outer)
        }
        let mut out = vec![0.0; ids.len() * self.inner];
        out.par_chunks_mut(self.inner.max(1)).zip(&ids).for_each(|(out, &id)| self.unpack(id as usize, out));
        Tensor::from_vec(out, (ids.len(), self.inner), &Device::Cpu)
    }

    /// Tiles and factors of an output's tile row, by group.
    fn groups(&self) -> usize {
        self.inner.div_ceil(self.format.group())
    }

    fn unpack(&self, row: usize, out: &mut [f32]) {
        let (first, lane) = (row / OUTS * self.groups(), row % OUTS);
        for (group, out) in out.chunks_mut(self.format.group()).enumerate() {
            let tile = &self.tiles[first + group].0;
            let scale = self.scales[first + group][lane].to_f32();
            for (i, out) in out.iter_mut().enumerate() {
                *out = match self.format {
                    Quantization::Q8 => scale * f32::from(tile[i / 4][4 * lane + i % 4] as i8),
                    Quantization::Q4 => {
                        let pair = tile[i / 8][4 * lane + i % 4];
                        let code = if i % 8 < 4 { pair & 15 } else { pair >> 4 };
                        scale.mul_add(f32::from(code), self.minima[first + group][lane].to_f32())
                    }
                };
            }
        }
    }
}

/// A linear layer whose weight is packed:
///
/// ```text
/// y[n, o] = sum_i x'[n, i] * weight[o, i]
/// ```
///
/// where `x'` is `x` rounded to 8 bits: groups of 32 values share a scale, which is their greatest size over 127.
///
/// `x` `[N, I]` in f32, f16 or bf16. Returns `[N, O]` in `x`'s dtype. Products within a group are exact, groups are
/// added in f32 in their order, so a row does not depend on the others or on threads.
///
/// # Errors
///
/// The inner dimensions differ.
///
/// Devices: CPU.
pub fn linear(x: &Tensor, weight: &QuantizedMatrix) -> Result<Tensor> {
    let (_, inner) = x.dims2()?;
    if inner != weight.inner {
        bail!("quantized linear: weight is {:?}, expected [O, {inner}] for x {:?}", weight.dims(), x.dims())
    }
    x.contiguous()?.apply_op1_no_bwd(&Linear { weight })
}

struct Linear<'a> {
    weight: &'a QuantizedMatrix,
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        "quantized-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let n = layout.shape().dims2()?.0;
        let out = match x {
            CpuStorage::F32(x) => CpuStorage::F32(self.product(x, layout)?),
            CpuStorage::F16(x) => CpuStorage::F16(self.product(x, layout)?),
            CpuStorage::BF16(x) => CpuStorage::BF16(self.product(x, layout)?),
            _ => bail!("quantized linear: x is of another dtype than f32, f16 and bf16"),
        };
        Ok((out, (n, self.weight.outer).into()))
    }
}

impl Linear<'_> {
    fn product<X: Stored>(&self, x: &[X], layout: &Layout) -> Result<Vec<X>> {
        Ok(cpu::linear(view(x, layout)?, self.weight))
    }
}
