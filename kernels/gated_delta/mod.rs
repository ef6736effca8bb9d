//! The gated delta rule: the recurrence of Gated DeltaNet layers, with its state kept in slots.

mod reference;
#[cfg(test)]
mod tests;

use std::cell::OnceCell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Storage, Tensor, bail};

use crate::Batch;
use crate::cpu::{self, Operand};

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
/// Devices: CPU, by the recurrence: at a few per cent of a prompt's time it needs no chunked form there, and
/// every token then has one result however the prompt was cut.
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
    if n != batch.num_tokens() || hv % hk != 0 {
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
        q: &q.contiguous()?,
        k: &k.contiguous()?,
        v: &v.contiguous()?,
        g: &g.contiguous()?,
        beta: &beta.contiguous()?,
        batch,
        out: OnceCell::new(),
    };
    state.inplace_op1(&op)?;
    Ok(cpu::tensor(op.out.into_inner().expect("every backend sets the output"), (n, hv, vd)))
}

struct GatedDeltaRule<'a> {
    q: &'a Tensor,
    k: &'a Tensor,
    v: &'a Tensor,
    g: &'a Tensor,
    beta: &'a Tensor,
    batch: &'a Batch,
    out: OnceCell<Storage>,
}

impl InplaceOp1 for GatedDeltaRule<'_> {
    fn name(&self) -> &'static str {
        "gated-delta-rule"
    }

    fn cpu_fwd(&self, state: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (_, hv, vd, kd) = layout.shape().dims4()?;
        let hk = self.q.dim(1)?;
        let [q, k, v, g, beta] = [self.q, self.k, self.v, self.g, self.beta].map(Operand::new);
        let (q, k, v, g, beta) = (q.f32()?, k.f32()?, v.f32()?, g.f32()?, beta.f32()?);
        let inputs = reference::Inputs { q: &q, k: &k, v: &v, g: &g, beta: &beta, hk, hv, kd, vd };
        let out = reference::recurrent(&inputs, cpu::write_f32(state, layout)?, self.batch);
        let out = Storage::Cpu(cpu::to_storage(out, self.v.dtype())?);
        self.out.set(out).expect("run once");
        Ok(())
    }
}

/// The gates of a Gated DeltaNet layer: `g = -exp(a_log) softplus(a + dt_bias)`, `beta = sigmoid(b)`.
///
/// `a`, `b` `[N, Hv]` in any float dtype; `a_log`, `dt_bias` `[Hv]` in f32. Returns `g` and `beta`, f32 `[N, Hv]`.
///
/// # Errors
///
/// Shapes disagree.
pub fn gates(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let x = a.to_dtype(DType::F32)?.broadcast_add(dt_bias)?;
    let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let g = softplus.broadcast_mul(&a_log.exp()?.neg()?)?;
    let beta = (b.to_dtype(DType::F32)?.neg()?.exp()? + 1.0)?.recip()?;
    Ok((g, beta))
}
