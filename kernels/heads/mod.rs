//! The step between a projection and attention: query and key heads are normalised and rotated, keys and values go to
//! their pages.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod tests;

use candle_core::{Result, Tensor};

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
/// for layers that read another layer's pages, only the query is made. Returns `[N, Hq, D]`. On CUDA and
/// Metal in one kernel, elsewhere op by op.
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
    if let Some(kv) = kv {
        let k = rope(&kv.k_norm.apply(kv.k)?, cos, sin)?;
        match kv.v_norm {
            Some(norm) => write_kv(pages, &k, &norm.apply(kv.v)?, batch)?,
            None => write_kv(pages, &k, kv.v, batch)?,
        }
    }
    rope(&q_norm.apply(q)?, cos, sin)
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
