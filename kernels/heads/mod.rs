//! The step between a projection and attention: query and key heads are normalised and rotated, keys and values go to
//! their pages.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod tests;

use candle_core::{DType, Result, Tensor};

use crate::Batch;
use crate::attention::{AttentionParams, paged_attention, write_kv};
use crate::norm::Norm;
use crate::rope::rope;

/// The heads of a step's keys and values, as a projection gives them.
#[derive(Clone, Copy, Debug)]
pub struct KeyValueHeads<'a> {
    /// `[N, Hk, D]`
    pub k: &'a Tensor,
    /// `[N, Hk, D]`
    pub v: &'a Tensor,
    pub k_norm: Norm<'a>,
    /// Of models that normalise values too.
    pub v_norm: Option<Norm<'a>>,
}

/// Normalises and rotates the query heads, which it returns, and does the same with the keys on the way to their pages;
/// values go there as they are, or normalised:
///
/// ```text
/// q' = rope(rms_norm(q))        write_kv(pages, rope(rms_norm(k)), v or rms_norm(v))
/// ```
///
/// `q` `[N, Hq, D]` in f32, f16 or bf16; `cos` and `sin` `[N, R/2]` in f32; `pages` as for [`write_kv`]. Without `kv`, as
/// for layers that read another layer's pages, only the query is made. Returns `[N, Hq, D]`. In one pass
/// over the heads.
///
/// # Errors
///
/// As [`rms_norm`](crate::norm::rms_norm), [`rope`] and [`write_kv`].
///
/// Devices: CPU, CUDA, Metal.
pub fn norm_rope_write(
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = q.device() {
        return cuda::norm_rope_write(device, q, q_norm, kv, (cos, sin), pages, batch);
    }
    #[cfg(any(test, feature = "emulator"))]
    if let Some(emulator) = crate::metal::emulator::emulator()
        && let Some(q) = metal::norm_rope_write(&emulator, q, q_norm, kv, (cos, sin), pages, batch)?
    {
        return Ok(q);
    }
    #[cfg(feature = "metal")]
    if let candle_core::Device::Metal(device) = q.device()
        && let Some(q) = metal::norm_rope_write(device, q, q_norm, kv, (cos, sin), pages, batch)?
    {
        return Ok(q);
    }
    if q.device().is_cpu()
        && let Some(q) = cpu::norm_rope_write(q, q_norm, kv, (cos, sin), pages, batch)?
    {
        return Ok(q);
    }
    by_parts(q, q_norm, kv, (cos, sin), pages, batch)
}

/// Op by op: what the kernels are held to, and what says what is wrong with operands that they do not take.
fn by_parts(
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<Tensor> {
    if let Some(kv) = kv {
        let k = rope(&kv.k_norm.apply(kv.k)?, cos, sin)?;
        match kv.v_norm {
            Some(norm) => write_kv(pages, &k, &norm.apply(kv.v)?, batch)?,
            None => write_kv(pages, &k, kv.v, batch)?,
        }
    }
    rope(&q_norm.apply(q)?, cos, sin)
}

/// Of queries, keys and values.
fn norms<'a>(q_norm: Norm<'a>, kv: Option<KeyValueHeads<'a>>) -> [Option<Norm<'a>>; 3] {
    [Some(q_norm), kv.map(|kv| kv.k_norm), kv.and_then(|kv| kv.v_norm)]
}

/// Whether the operands fit each other; pages may be of another dtype. `norms` are of queries, keys and values.
fn takes(
    q: &Tensor,
    norms: [Option<Norm>; 3],
    kv: Option<KeyValueHeads>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> bool {
    let (&[n, _, d], &[_, half]) = (q.dims(), cos.dims()) else { return false };
    let takes_norm = |norm: &Norm| norm.weight.dims() == [d] && norm.weight.dtype() == DType::F32;
    let takes_angles = |x: &Tensor| x.dims() == [n, half] && x.dtype() == DType::F32;
    let takes_kv = |kv: KeyValueHeads| match *pages.dims() {
        [2, _, _, hk, size] => {
            size == d && [kv.k, kv.v].iter().all(|x| x.dims() == [n, hk, d] && x.dtype() == q.dtype())
        }
        _ => false,
    };
    n == batch.num_tokens()
        && 2 * half <= d
        && norms.iter().flatten().all(takes_norm)
        && [cos, sin].into_iter().all(takes_angles)
        && kv.is_none_or(takes_kv)
}

/// [`norm_rope_write`], and [`paged_attention`] of the query that it makes: the whole way from a projection to what mixes
/// the values. Returns `[N, Hq, D]`. On CUDA in one kernel where every sequence has one token.
///
/// # Errors
///
/// As both.
///
/// Devices: CPU, CUDA, Metal.
pub fn norm_rope_attend(
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    angles: (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
    params: AttentionParams,
) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = q.device()
        && let Some(y) = cuda::norm_rope_attend(device, q, q_norm, kv, angles, pages, batch, params)?
    {
        return Ok(y);
    }
    let q = norm_rope_write(q, q_norm, kv, angles, pages, batch)?;
    paged_attention(&q, pages, batch, params)
}
