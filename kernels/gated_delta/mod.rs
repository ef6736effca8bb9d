//! The gated delta rule: the recurrence of Gated DeltaNet layers, with its state kept in slots.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
mod gates;
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

pub use gates::gates;

/// The gated delta rule, for each sequence and value head on its own. With state `S` `[V, K]`, zero before the
/// sequence's first token, and value head `h` reading query and key head `h / (Hv / Hk)`:
///
/// ```text
/// q = q / sqrt(sum(q^2) + 1e-6) / sqrt(K)        k = k / sqrt(sum(k^2) + 1e-6)
/// S = exp(g) S
/// S = S + beta (v - S k) k^T
/// y = S q                                         the updated state
/// ```
///
/// `q`, `k` `[N, Hk, K]` and `v` `[N, Hv, V]` in f32, f16 or bf16; `g` (log decay, at most 0) and `beta` `[N, Hv]`
/// in f32; `state` `[S, Hv, V, K]` in f32, written in place. A sequence whose first token is in this step starts
/// from zero whatever its slot holds. Returns `[N, Hv, V]` in `v`'s dtype; arithmetic in f32.
///
/// # Errors
///
/// Shapes or dtypes disagree, or a slot of the batch lies outside `state`.
///
/// Devices: CPU, by the recurrence: the chunked form takes as many operations there, and the recurrence gives every
/// token one result however the prompt was cut. CUDA and Metal likewise, `K` up to 256. On Metal sequences of 24 tokens
/// and more with `K` of 128 and `V` a multiple of 32 go in chunks over matrix units in f32. On CUDA sequences of 24 tokens
/// and more in f16 or bf16 with `K` and `V` of 128 go in chunks over tensor cores, whose operands, the state among them,
/// are rounded to the dtype of `q`: there results depend on the cuts within that rounding. `q`, `k` and `v` may be column
/// ranges of one matrix.
///
/// Source: Yang et al., "Gated Delta Networks", <https://arxiv.org/abs/2412.06464>.
pub fn gated_delta_rule(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    g: &Tensor,
    beta: &Tensor,
    state: &Tensor,
    batch: &Batch,
) -> Result<Tensor> {
    let (n, hk, kd) = q.dims3()?;
    let (_, hv, vd) = v.dims3()?;
    let (slots, ..) = state.dims4()?;
    if n != batch.num_tokens() || hk == 0 || hv % hk != 0 {
        bail!(
            "gated_delta_rule: q is {:?} and v {:?}, the batch has {} tokens and Hv must be a multiple of Hk",
            q.dims(),
            v.dims(),
            batch.num_tokens()
        )
    }
    if k.dims() != q.dims() || k.dtype() != q.dtype() || v.dtype() != q.dtype() || v.dims() != [n, hv, vd] {
        bail!(
            "gated_delta_rule: k is {:?} {:?} and v {:?} {:?}, q is {:?} {:?}",
            k.dims(),
            k.dtype(),
            v.dims(),
            v.dtype(),
            q.dims(),
            q.dtype()
        )
    }
    for (name, gate) in [("g", g), ("beta", beta)] {
        if gate.dims() != [n, hv] || gate.dtype() != DType::F32 {
            bail!("gated_delta_rule: {name} is {:?} {:?}, expected f32 [{n}, {hv}]", gate.dims(), gate.dtype())
        }
    }
    if state.dims()[1..] != [hv, vd, kd] || state.dtype() != DType::F32 {
        bail!("gated_delta_rule: state is {:?} {:?}, expected f32 [S, {hv}, {vd}, {kd}]", state.dims(), state.dtype())
    }
    batch.check_slots("gated_delta_rule", slots)?;
    let op = GatedDeltaRule {
        q: &as_rows(q)?,
        k: &as_rows(k)?,
        v: &as_rows(v)?,
        g: &g.contiguous()?,
        beta: &beta.contiguous()?,
        batch,
        out: OnceCell::new(),
    };
    state.inplace_op1(&op)?;
    Ok(op.out.into_inner().expect("every backend sets the output"))
}

struct GatedDeltaRule<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    g: &'a Tensor,
    beta: &'a Tensor,
    batch: &'a Batch,
    out: OnceCell<Tensor>,
}

impl InplaceOp1 for GatedDeltaRule<'_> {
    fn name(&self) -> &'static str {
        "gated-delta-rule"
    }

    fn cpu_fwd(&self, state: &mut CpuStorage, layout: &Layout) -> Result<()> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            let out = self.run_metal(&emulator, state, layout)?;
            self.out.set(tensor(Storage::Cpu(out), self.v.shape())).expect("run once");
            return Ok(());
        }
        let out = match self.v.dtype() {
            DType::F16 => CpuStorage::F16(self.run_cpu::<f16>(state, layout)?),
            DType::BF16 => CpuStorage::BF16(self.run_cpu::<bf16>(state, layout)?),
            _ => CpuStorage::F32(self.run_cpu::<f32>(state, layout)?),
        };
        self.out.set(tensor(Storage::Cpu(out), self.v.shape())).expect("run once");
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, state: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run_cuda(state, layout)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(&self, state: &mut MetalStorage, layout: &Layout) -> Result<()> {
        let out = self.run_metal(&state.device().clone(), state, layout)?;
        self.out.set(tensor(Storage::Metal(out), self.v.shape())).expect("run once");
        Ok(())
    }
}

impl GatedDeltaRule<'_> {
    fn run_cpu<T: Stored>(&self, state: &mut CpuStorage, layout: &Layout) -> Result<Vec<T>> {
        let (_, hv, vd, kd) = layout.shape().dims4()?;
        let hk = self.q.dim(1)?;
        let [q, k, v, g, beta] = [self.q, self.k, self.v, self.g, self.beta].map(Operand::new);
        let (q, k, v, g, beta) = (q.rows::<T>()?, k.rows()?, v.rows()?, g.f32()?, beta.f32()?);
        let inputs = cpu::Inputs { q, k, v, g: &g, beta: &beta, hk, hv, kd, vd };
        Ok(cpu::gated_delta_rule(&inputs, write_f32(state, layout)?, self.batch))
    }
}
