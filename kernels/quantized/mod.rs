//! Products with weight matrices that are packed to 8 or 4 bits.

#[cfg(any(test, target_arch = "x86_64"))]
mod amx;
mod block;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod dot;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
pub(crate) mod metal;
mod pack;
pub(crate) mod probe;
#[cfg(test)]
mod reference;
mod rounded;
mod storage;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, DType, Device, Error, Layout, Result, Shape, Tensor, bail};
use half::bf16;
use rayon::prelude::*;

use self::cpu::Before;
use self::storage::Storage;
use crate::activation::{Activation, gated_activation};
use crate::cpu::{Operand, view};
use crate::linear::Around;
use crate::memory::Mapped;
use crate::simd::Stored;

/// Changes whenever a packed weight becomes other bytes: the layout of a block, their order, or how values are rounded.
/// What was packed under another version is of no use.
pub const PACKING_VERSION: u32 = 2;

/// How a weight is packed. Groups of 64 weights lie along the inner dimension; factors are bf16, rounded so that no
/// weight is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Quantization {
    /// `w = scale * code`, codes in `-127..=127`: 8.25 bits a weight. For normally distributed weights the error is 0.7 %
    /// of their size.
    Q8,
    /// `w = scale * code + minimum`, codes in `0..=15`: 4.5 bits a weight. For normally distributed weights the error is
    /// 9 % of their size.
    Q4,
}

impl Quantization {
    /// Bytes that a packed weight `[outer, inner]` takes.
    pub fn bytes(self, [outer, inner]: [usize; 2]) -> usize {
        let block = match self {
            Self::Q8 => size_of::<Q8Block>(),
            Self::Q4 => size_of::<Q4Block>(),
        };
        outer.div_ceil(OUTS) * inner.div_ceil(GROUP) * block
    }
}

/// A weight `[O, I]`, packed.
///
/// Thirty-two outputs make a panel, a panel and one group make a block, and blocks lie in the order in which a product
/// reads them: panel by panel, from the first group to the last. Rows and columns missing from the last blocks are zero.
pub struct QuantizedMatrix {
    outer: usize,
    inner: usize,
    blocks: Blocks,
}

/// `[O / 32, groups]`
enum Blocks {
    Q8(Storage<Q8Block>),
    Q4(Storage<Q4Block>),
    /// The same bytes as words, on an accelerator.
    OnDevice(Quantization, Tensor),
}

/// Outputs of a panel.
const OUTS: usize = 32;

/// Inputs that share their factors, of weights and of activations.
const GROUP: usize = 64;
/// Products take a group four inputs at a time.
const STEPS: usize = GROUP / 4;

/// What one step takes of the weight: four bytes of each output, side by side.
type Codes = [[u8; 4]; OUTS];

/// A step after the other.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Q8Block {
    codes: [Codes; STEPS],
    scales: [bf16; OUTS],
}

/// Two steps at once: the first in the lower halves of the bytes, the second in the upper.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Q4Block {
    codes: [Codes; STEPS / 2],
    scales: [bf16; OUTS],
    minima: [bf16; OUTS],
}

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

    /// The weight `[outer, inner]` whose blocks lie in `file` from byte `start` on, as [`QuantizedMatrix::as_bytes`]
    /// gave them on a machine with this one's byte order. They stay there: nothing is copied.
    ///
    /// # Errors
    ///
    /// The blocks do not begin at a multiple of 64 bytes, or reach beyond the end of the file.
    pub fn map(format: Quantization, [outer, inner]: [usize; 2], file: Arc<Mapped>, start: usize) -> Result<Self> {
        let bytes = format.bytes([outer, inner]);
        let blocks = match format {
            Quantization::Q8 => Storage::map(file, start, bytes).map(Blocks::Q8),
            Quantization::Q4 => Storage::map(file, start, bytes).map(Blocks::Q4),
        };
        let Some(blocks) = blocks else {
            bail!("quantized: no {bytes} bytes of blocks from byte {start} of the file on")
        };
        Ok(Self { outer, inner, blocks })
    }

    /// The blocks as they lie in the host's memory; none once they are on an accelerator.
    pub fn as_bytes(&self) -> &[u8] {
        match &self.blocks {
            Blocks::Q8(blocks) => blocks.as_bytes(),
            Blocks::Q4(blocks) => blocks.as_bytes(),
            Blocks::OnDevice(..) => &[],
        }
    }

    /// Whether there are kernels for packed weights on `device`.
    pub fn runs_on(device: &Device) -> bool {
        device.is_cpu() || device.is_cuda() || device.is_metal()
    }

    /// The same weight where `device` multiplies.
    ///
    /// # Errors
    ///
    /// The device has no memory left.
    pub fn to_device(self, device: &Device) -> Result<Self> {
        if device.is_cpu() { Ok(self) } else { self.uploaded(device) }
    }

    /// The words of the blocks, if they are on an accelerator.
    pub(crate) fn on_device(&self) -> Option<&Tensor> {
        match &self.blocks {
            Blocks::OnDevice(_, words) => Some(words),
            _ => None,
        }
    }

    pub(crate) fn uploaded(&self, device: &Device) -> Result<Self> {
        let Self { outer, inner, .. } = *self;
        if crate::device::takes_uploads(device) {
            let bytes = self.as_bytes();
            let words = crate::device::upload(device, bytes.len() / 4, DType::U32, &[bytes], |_| ())?;
            return Ok(Self { outer, inner, blocks: Blocks::OnDevice(self.format(), words) });
        }
        let (words, _) = self.as_bytes().as_chunks::<4>();
        let words: Vec<u32> = words.iter().map(|word| u32::from_ne_bytes(*word)).collect();
        let count = words.len();
        let blocks = Blocks::OnDevice(self.format(), Tensor::from_vec(words, count, device)?);
        Ok(Self { outer, inner, blocks })
    }

    /// `[O, I]`
    pub fn dims(&self) -> [usize; 2] {
        [self.outer, self.inner]
    }

    /// How it is packed.
    pub fn format(&self) -> Quantization {
        match self.blocks {
            Blocks::Q8(_) => Quantization::Q8,
            Blocks::Q4(_) => Quantization::Q4,
            Blocks::OnDevice(format, _) => format,
        }
    }

    /// Memory that it takes, be it its own or that of a mapped file.
    pub fn bytes(&self) -> usize {
        self.format().bytes(self.dims())
    }

    /// The rows `ids` `[N]` (u32), as `[N, I]` in f32: an embedding.
    ///
    /// # Errors
    ///
    /// An id lies beyond the last row, except on an accelerator, where such a row is NaN.
    pub fn rows(&self, ids: &Tensor) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = ids.device() {
            return cuda::rows(device, self, &ids.contiguous()?);
        }
        on_metal!(ids, backend => metal::rows(backend, self, &ids.contiguous()?));
        let ids = ids.to_vec1::<u32>()?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.outer) {
            bail!("quantized: row {id}, there are {}", self.outer)
        }
        let mut out = vec![0.0; ids.len() * self.inner];
        out.par_chunks_mut(self.inner.max(1)).zip(&ids).for_each(|(out, &id)| self.unpack(id as usize, out));
        Tensor::from_vec(out, (ids.len(), self.inner), &Device::Cpu)
    }

    fn unpack(&self, row: usize, out: &mut [f32]) {
        let groups = self.inner.div_ceil(GROUP);
        let (first, lane) = (row / OUTS * groups, row % OUTS);
        match &self.blocks {
            Blocks::OnDevice(..) => unreachable!("an accelerator looks up its own rows"),
            Blocks::Q8(blocks) => {
                for (block, out) in blocks[first..].iter().zip(out.chunks_mut(GROUP)) {
                    let scale = block.scales[lane].to_f32();
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = scale * f32::from(block.codes[i / 4][lane][i % 4] as i8);
                    }
                }
            }
            Blocks::Q4(blocks) => {
                for (block, out) in blocks[first..].iter().zip(out.chunks_mut(GROUP)) {
                    let (scale, minimum) = (block.scales[lane].to_f32(), block.minima[lane].to_f32());
                    for (i, out) in out.iter_mut().enumerate() {
                        let pair = block.codes[i / 8][lane][i % 4];
                        let code = if i % 8 < 4 { pair & 15 } else { pair >> 4 };
                        *out = scale.mul_add(f32::from(code), minimum);
                    }
                }
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
/// where `x'` is `x` rounded to 8 bits: groups of 64 values share a scale, which is their greatest size over 127. On an
/// accelerator it is `x` itself.
///
/// `x` `[N, I]` in f32, f16 or bf16. Returns `[N, O]` in `x`'s dtype. On the CPU products within a group are exact, groups
/// are added in f32 in their order, so a row does not depend on the others or on threads.
///
/// # Errors
///
/// The inner dimensions differ, or the weight is on another device.
///
/// Devices: CPU, CUDA, Metal.
pub fn linear(x: &Tensor, weight: &QuantizedMatrix) -> Result<Tensor> {
    linear_around(x, weight, None, Around::default())
}

/// As [`linear`], plus `bias` `[O]` of `x`'s dtype, with what surrounds it. The bias is added before the one rounding; on CUDA
/// the residual too.
///
/// # Errors
///
/// As [`linear`] and [`Around::apply`], or `bias` has another length or dtype.
pub fn linear_around(x: &Tensor, weight: &QuantizedMatrix, bias: Option<&Tensor>, around: Around) -> Result<Tensor> {
    check(x, weight, bias)?;
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = x.device() {
        return cuda::quantized_linear(device, x, weight, bias, around);
    }
    on_metal!(x, backend => around.apply(x, |x| match bias {
        Some(bias) => metal::linear(backend, x, weight)?.broadcast_add(bias),
        None => metal::linear(backend, x, weight),
    }));
    let norm = around.norm.map(|norm| Ok::<_, Error>((norm.weight_for("quantized linear", x)?, norm.eps as f32)));
    let norm = norm.transpose()?;
    around.behind(on_cpu(x, weight, bias, norm, None)?)
}

/// As [`linear_around`] of [`gated_activation`]`(x)`, plus `onto` `[N, O]` of its dtype if there is one. `x` `[N, 2 I]`. On
/// the CPU, which rounds its operand anyway, in one pass over `x` before the product.
///
/// # Errors
///
/// As both.
///
/// Devices: CPU, CUDA, Metal.
pub fn linear_gated(
    x: &Tensor,
    activation: Activation,
    weight: &QuantizedMatrix,
    bias: Option<&Tensor>,
    onto: Option<&Tensor>,
) -> Result<Tensor> {
    let around = Around { onto, ..Around::default() };
    let by_itself = || linear_around(&gated_activation(x, activation)?, weight, bias, around);
    on_metal!(x, _backend => by_itself());
    if !x.device().is_cpu() {
        return by_itself();
    }
    let (_, width) = x.dims2()?;
    if width % 2 != 0 {
        bail!("gated quantized linear: x is {:?}, expected [N, 2 I]", x.dims())
    }
    check(&x.narrow(1, 0, width / 2)?, weight, bias)?;
    around.behind(on_cpu(x, weight, bias, None, Some(activation))?)
}

fn check(x: &Tensor, weight: &QuantizedMatrix, bias: Option<&Tensor>) -> Result<()> {
    let (_, inner) = x.dims2()?;
    if inner != weight.inner {
        bail!("quantized linear: weight is {:?}, expected [O, {inner}] for x {:?}", weight.dims(), x.dims())
    }
    if let Some(bias) = bias
        && (bias.dims() != [weight.outer] || bias.dtype() != x.dtype())
    {
        let (dtype, outer) = (x.dtype(), weight.outer);
        bail!("quantized linear: bias is {:?} {:?}, expected {dtype:?} [{outer}]", bias.dims(), bias.dtype())
    }
    Ok(())
}

/// The product, with the weight and epsilon of a norm before it, or with a gate.
fn on_cpu(
    x: &Tensor,
    weight: &QuantizedMatrix,
    bias: Option<&Tensor>,
    norm: Option<(Tensor, f32)>,
    gate: Option<Activation>,
) -> Result<Tensor> {
    if matches!(weight.blocks, Blocks::OnDevice(..)) {
        bail!("quantized linear: the weight is on an accelerator, x on {:?}", x.device().location())
    }
    let bias = bias.map(Tensor::contiguous).transpose()?;
    x.contiguous()?.apply_op1_no_bwd(&Linear { weight, bias, norm, gate })
}

struct Linear<'a> {
    weight: &'a QuantizedMatrix,
    bias: Option<Tensor>,
    /// Weight and epsilon.
    norm: Option<(Tensor, f32)>,
    gate: Option<Activation>,
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
        let bias = self.bias.as_ref().map(Operand::new);
        let bias = bias.as_ref().map(Operand::f32).transpose()?;
        let norm = self.norm.as_ref().map(|(weight, eps)| (Operand::new(weight), *eps));
        let before = match (&norm, self.gate) {
            (Some((weight, eps)), _) => Before::Norm(weight.elements()?, *eps),
            (None, Some(activation)) => Before::Gate(activation),
            (None, None) => Before::Nothing,
        };
        Ok(cpu::linear(view(x, layout)?, before, self.weight, bias.as_deref()))
    }
}
