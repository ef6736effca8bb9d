//! The two gates of a Gated DeltaNet layer, from what it projects and its learned constants.

use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;

use crate::cpu::Operand;

/// The decay and the strength of the gated delta rule's updates:
///
/// ```text
/// g = -exp(a_log) softplus(a + dt_bias)          softplus(x) = x above 20, else ln(1 + e^x)
/// beta = sigmoid(b)
/// ```
///
/// `a`, `b` `[N, Hv]` in f32, f16 or bf16; `a_log`, `dt_bias` `[Hv]` in f32. Returns `g` and `beta`, `[N, Hv]` in f32.
///
/// # Errors
///
/// Shapes disagree, or `a_log` or `dt_bias` is not f32.
///
/// Devices: all; a kernel on the CPU, elsewhere composed of candle's ops.
///
/// Source: Yang et al., "Gated Delta Networks", <https://arxiv.org/abs/2412.06464>.
pub fn gates(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let (_, hv) = a.dims2()?;
    if b.dims() != a.dims() {
        bail!("gates: b is {:?}, expected {:?} like a", b.dims(), a.dims())
    }
    for (name, constant) in [("a_log", a_log), ("dt_bias", dt_bias)] {
        if constant.dims() != [hv] || constant.dtype() != DType::F32 {
            bail!("gates: {name} is {:?} {:?}, expected f32 [{hv}]", constant.dims(), constant.dtype())
        }
    }
    if a.device().is_cpu() { cpu(a, b, a_log, dt_bias) } else { composed(a, b, a_log, dt_bias) }
}

fn cpu(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let operands = [a.contiguous()?, b.contiguous()?, a_log.contiguous()?, dt_bias.contiguous()?];
    let [a_values, b_values, a_log, dt_bias] = operands.each_ref().map(Operand::new);
    let (a_log, dt_bias) = (a_log.f32()?, dt_bias.f32()?);
    let rates: Vec<f32> = a_log.iter().map(|a_log| -a_log.exp()).collect();
    let hv = rates.len();
    let (mut g, mut beta) = (a_values.f32()?.into_owned(), b_values.f32()?.into_owned());
    let task = (ROWS * hv).max(1);
    g.par_chunks_mut(task).zip(beta.par_chunks_mut(task)).for_each(|(g, beta)| {
        for row in g.chunks_mut(hv) {
            for ((g, bias), rate) in row.iter_mut().zip(dt_bias.iter()).zip(&rates) {
                *g = rate * softplus(*g + bias);
            }
        }
        beta.iter_mut().for_each(|beta| *beta = (1.0 + (-*beta).exp()).recip());
    });
    Ok((Tensor::from_vec(g, a.shape(), a.device())?, Tensor::from_vec(beta, a.shape(), a.device())?))
}

/// Rows of a task.
const ROWS: usize = 64;

fn softplus(x: f32) -> f32 {
    // Above 20, ln(1 + e^x) rounds to x, and e^x would overflow in the end.
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

pub(super) fn composed(a: &Tensor, b: &Tensor, a_log: &Tensor, dt_bias: &Tensor) -> Result<(Tensor, Tensor)> {
    let x = a.to_dtype(DType::F32)?.broadcast_add(dt_bias)?;
    let softplus = (x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?)?;
    let g = softplus.broadcast_mul(&a_log.exp()?.neg()?)?;
    let beta = (b.to_dtype(DType::F32)?.neg()?.exp()? + 1.0)?.recip()?;
    Ok((g, beta))
}
