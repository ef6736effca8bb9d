//! Depthwise causal convolution over packed sequences, with its window kept in slots.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
#[cfg(feature = "metal")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::Batch;
use crate::cpu::{Operand, as_rows, tensor, write_f32};
use crate::simd::Stored;

/// Depthwise causal convolution followed by SiLU, for each sequence and channel on its own:
///
/// ```text
/// y[t] = silu(sum_j weight[c, j] * x[t - K + 1 + j])        j in 0..K
/// ```
///
/// where `x` before the first token of the step comes from the sequence's window, and before the first token
/// of the sequence is zero.
///
/// `x` `[N, C]` and `weight` `[C, K]`, K of 2 to 4, in f32, f16 or bf16; `state` `[S, C, K - 1]` in f32, written in
/// place: the last `K - 1` inputs, oldest first. A sequence whose first token is in this step ignores what its slot
/// holds. Returns `[N, C]` in `x`'s dtype; arithmetic in f32.
///
/// # Errors
///
/// Shapes disagree, K is not 2 to 4, `state` is not f32, or a slot of the batch lies outside it.
///
/// Devices: CPU, CUDA, Metal; `x` may be a column range of a matrix.
///
/// Source: Dao and Gu, Mamba's causal-conv1d, <https://github.com/Dao-AILab/causal-conv1d>.
pub fn causal_conv1d(x: &Tensor, weight: &Tensor, state: &Tensor, batch: &Batch) -> Result<Tensor> {
    let (n, channels) = x.dims2()?;
    let (_, width) = weight.dims2()?;
    let (slots, state_channels, past) = state.dims3()?;
    if n != batch.num_tokens() {
        bail!("causal_conv1d: x is {:?}, the batch has {} tokens", x.dims(), batch.num_tokens())
    }
    if weight.dims() != [channels, width] || !(2..=4).contains(&width) {
        bail!("causal_conv1d: weight is {:?}, expected [{channels}, K] with K of 2 to 4", weight.dims())
    }
    if (state_channels, past) != (channels, width - 1) || state.dtype() != DType::F32 {
        bail!(
            "causal_conv1d: state is {:?} {:?}, expected f32 [S, {channels}, {}]",
            state.dims(),
            state.dtype(),
            width - 1
        )
    }
    batch.check_slots("causal_conv1d", slots)?;
    let op = CausalConv1d { x: &as_rows(x)?, weight: &weight.contiguous()?, batch, out: OnceCell::new() };
    state.inplace_op1(&op)?;
    Ok(op.out.into_inner().expect("every backend sets the output"))
}

struct CausalConv1d<'a> {
    x: &'a Tensor,
    weight: &'a Tensor,
    batch: &'a Batch,
    out: OnceCell<Tensor>,
}

impl InplaceOp1 for CausalConv1d<'_> {
    fn name(&self) -> &'static str {
        "causal-conv1d"
    }

    fn cpu_fwd(&self, state: &mut CpuStorage, layout: &Layout) -> Result<()> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            let out = self.run_metal(&emulator, state, layout)?;
            self.out.set(tensor(Storage::Cpu(out), self.x.shape())).expect("run once");
            return Ok(());
        }
        let out = match self.x.dtype() {
            DType::F16 => CpuStorage::F16(self.run_cpu::<f16>(state, layout)?),
            DType::BF16 => CpuStorage::BF16(self.run_cpu::<bf16>(state, layout)?),
            _ => CpuStorage::F32(self.run_cpu::<f32>(state, layout)?),
        };
        self.out.set(tensor(Storage::Cpu(out), self.x.shape())).expect("run once");
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, state: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run_cuda(state, layout)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(&self, state: &mut MetalStorage, layout: &Layout) -> Result<()> {
        let out = self.run_metal(&state.device().clone(), state, layout)?;
        self.out.set(tensor(Storage::Metal(out), self.x.shape())).expect("run once");
        Ok(())
    }
}

impl CausalConv1d<'_> {
    fn run_cpu<T: Stored>(&self, state: &mut CpuStorage, layout: &Layout) -> Result<Vec<T>> {
        let (_, channels, past) = layout.shape().dims3()?;
        let (x, weight) = (Operand::new(self.x), Operand::new(self.weight));
        let state = write_f32(state, layout)?;
        Ok(cpu::causal_conv1d(&x.rows()?, &weight.f32()?, state, self.batch, channels, past + 1))
    }
}
