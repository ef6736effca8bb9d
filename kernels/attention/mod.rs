//! Attention over packed sequences: uncached for encoders, over pages of keys and values for decoders.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
#[cfg(feature = "metal")]
use candle_core::MetalStorage;
#[cfg(feature = "metal")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, InplaceOp3, Layout, Result, Shape, Tensor, bail};

use crate::Batch;
use crate::batch::Sequence;
use crate::cpu::{as_rows, dtype_of};
use crate::simd::{Stored, dispatch, dots_are_fast};

/// Which keys a query sees, and how scores are formed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionParams {
    /// Factor on `q . k`.
    pub scale: f32,
    pub mask: Mask,
    /// With `Some(w)` a query at position `p` sees no key before `p + 1 - w`: `w` tokens including its own. For
    /// causal attention only: what a window means to a query that also looks ahead differs between models.
    pub window: Option<usize>,
    /// With `Some(c)` scores become `c * tanh(score / c)`.
    pub softcap: Option<f32>,
}

/// Whether a query sees the keys that come after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    Causal,
    Bidirectional,
}

impl AttentionParams {
    /// Causal attention with the given scale, no window, no softcap.
    pub fn causal(scale: f32) -> Self {
        Self { scale, mask: Mask::Causal, window: None, softcap: None }
    }

    /// The positions that a query at `position` sees.
    fn visible(&self, position: usize, context_len: usize) -> Range<usize> {
        let start = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        match self.mask {
            Mask::Causal => start..position + 1,
            Mask::Bidirectional => start..context_len,
        }
    }

    fn check(&self, op: &str) -> Result<()> {
        match (self.window, self.mask) {
            (Some(0), _) => bail!("{op}: a window of 0, expected at least the token itself"),
            (Some(window), Mask::Bidirectional) => {
                bail!("{op}: a window of {window} with a bidirectional mask, expected a causal one")
            }
            _ => Ok(()),
        }
    }
}

/// Attention of each packed sequence over itself, nothing cached:
///
/// ```text
/// y[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, h / (Hq / Hk)]) v[s, h / (Hq / Hk)]
/// ```
///
/// `q` `[N, Hq, D]`, `k` and `v` `[N, Hk, D]` in f32, f16 or bf16. Returns `[N, Hq, D]` in `q`'s dtype; softmax
/// in f32.
///
/// # Errors
///
/// Shapes or dtypes disagree, `Hq` is not a multiple of `Hk`, or `params` has a window of 0 or one that is not causal.
///
/// Devices: CPU; CUDA and Metal, `D` up to 512.
///
/// Source: Vaswani et al., "Attention Is All You Need", 2017; grouped heads after Ainslie et al., 2023.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch, params: AttentionParams) -> Result<Tensor> {
    let (n, hq, d) = q.dims3()?;
    let (_, hk, _) = k.dims3()?;
    if n != batch.num_tokens()
        || k.dims() != [n, hk, d]
        || v.dims() != k.dims()
        || hk == 0
        || !hq.is_multiple_of(hk)
        || q.elem_count() == 0
    {
        bail!(
            "attention: q is {:?}, k {:?}, v {:?}, the batch has {} tokens",
            q.dims(),
            k.dims(),
            v.dims(),
            batch.num_tokens()
        )
    }
    if k.dtype() != q.dtype() || v.dtype() != q.dtype() {
        bail!("attention: q is {:?}, k {:?}, v {:?}, expected one dtype", q.dtype(), k.dtype(), v.dtype())
    }
    params.check("attention")?;
    let (q, k, v) = (as_rows(q)?, as_rows(k)?, as_rows(v)?);
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = q.device() {
        return cuda::attention(device, &q, &k, &v, batch, params);
    }
    q.apply_op3_no_bwd(&k, &v, &Attention { batch, params })
}

/// Writes the step's keys and values into their pages, in place:
///
/// ```text
/// kv[0, slot_mapping[n]] = k[n]        kv[1, slot_mapping[n]] = v[n]        pages taken as [blocks * block_size]
/// ```
///
/// `kv` `[2, blocks, block_size, Hk, D]`; `k` and `v` `[N, Hk, D]`; one dtype, f32, f16 or bf16. On the CPU f32 keys and
/// values may also go to f16 or bf16 pages, rounded to nearest.
///
/// # Errors
///
/// Shapes or dtypes disagree, or a page of the batch lies outside `kv`.
///
/// Devices: CPU, CUDA, Metal.
///
/// Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.
pub fn write_kv(kv: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<()> {
    let (two, blocks, block_size, hk, d) = kv.dims5()?;
    if two != 2 || k.dims() != [batch.num_tokens(), hk, d] || v.dims() != k.dims() {
        bail!(
            "write_kv: k is {:?} and v {:?}, expected [{}, {hk}, {d}] for kv {:?}",
            k.dims(),
            v.dims(),
            batch.num_tokens(),
            kv.dims()
        )
    }
    if v.dtype() != k.dtype() || !takes_pages(k, kv) {
        bail!("write_kv: k is {:?} and v {:?}, expected {:?} like kv", k.dtype(), v.dtype(), kv.dtype())
    }
    batch.check_blocks("write_kv", blocks, block_size, |sequence| sequence.past())?;
    kv.inplace_op3(&as_rows(k)?, &as_rows(v)?, &WriteKv { batch })
}

/// Attention of the step's queries over the pages of their sequences, which `write_kv` has filled:
///
/// ```text
/// y[t, h] = sum_s softmax_s(scale * q[t, h] . K[s, h / (Hq / Hk)]) V[s, h / (Hq / Hk)]
/// ```
///
/// with `s` over the sequence's cached positions that `params` lets the query at `t` see.
///
/// `q` `[N, Hq, D]`; `kv` `[2, blocks, block_size, Hk, D]` of the same dtype, f32, f16 or bf16, or on the CPU f32 queries
/// over f16 or bf16 pages. Returns `[N, Hq, D]` in `q`'s dtype; softmax in f32. Over bf16 a CPU that
/// multiplies two bf16 values at a time rounds queries, and weights before they meet values, to bf16.
///
/// # Errors
///
/// Shapes or dtypes disagree, `Hq` is not a multiple of `Hk`, a page that a query sees lies outside `kv`, or `params`
/// is refused as by [`attention`].
///
/// Devices: CPU; CUDA and Metal, `D` up to 512.
///
/// Source: Kwon et al., 2023, as for [`write_kv`].
pub fn paged_attention(q: &Tensor, kv: &Tensor, batch: &Batch, params: AttentionParams) -> Result<Tensor> {
    check_pages(q, kv, batch, params)?;
    let q = as_rows(q)?;
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = q.device() {
        return cuda::paged_attention(device, &q, kv, batch, params);
    }
    q.apply_op2_no_bwd(kv, &PagedAttention { batch, params })
}

/// What [`paged_attention`] asks of its operands.
pub(crate) fn check_pages(q: &Tensor, kv: &Tensor, batch: &Batch, params: AttentionParams) -> Result<()> {
    let (n, hq, d) = q.dims3()?;
    let (two, blocks, block_size, hk, dk) = kv.dims5()?;
    if two != 2
        || n != batch.num_tokens()
        || d != dk
        || hk == 0
        || !hq.is_multiple_of(hk)
        || q.elem_count() == 0
        || !takes_pages(q, kv)
    {
        bail!(
            "paged_attention: q is {:?} {:?}, kv {:?} {:?}, the batch has {} tokens",
            q.dims(),
            q.dtype(),
            kv.dims(),
            kv.dtype(),
            batch.num_tokens()
        )
    }
    params.check("paged_attention")?;
    let first_seen = |sequence: &Sequence| params.visible(sequence.past(), sequence.context_len).start;
    batch.check_blocks("paged_attention", blocks, block_size, first_seen)
}

/// The dtype of 16 bits that suits pages of keys and values in f32 on this CPU: bf16 if its products of two bf16 values
/// at a time are fast, else f16, which is rounded more finely.
pub fn short_page_dtype() -> DType {
    if dots_are_fast() { DType::BF16 } else { DType::F16 }
}

/// Whether there is a kernel for these rows and pages.
pub(crate) fn takes_pages(rows: &Tensor, pages: &Tensor) -> bool {
    let are_rounded = matches!((rows.dtype(), pages.dtype()), (DType::F32, DType::F16 | DType::BF16));
    rows.dtype() == pages.dtype() || are_rounded && rows.device().is_cpu()
}

struct Attention<'a> {
    batch: &'a Batch,
    params: AttentionParams,
}

impl CustomOp3 for Attention<'_> {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        ql: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            let kv = metal::KeysAndValues::of_tokens((k, kl), (v, vl))?;
            let out = metal::attention(&emulator, (q, ql), kv, self.batch, self.params)?;
            return Ok((out, ql.shape().clone()));
        }
        let out = match q {
            CpuStorage::F32(q) => CpuStorage::F32(self.run(q, ql, k.as_slice()?, kl, v.as_slice()?, vl)?),
            CpuStorage::F16(q) => CpuStorage::F16(self.run(q, ql, k.as_slice()?, kl, v.as_slice()?, vl)?),
            CpuStorage::BF16(q) => CpuStorage::BF16(self.run(q, ql, k.as_slice()?, kl, v.as_slice()?, vl)?),
            other => bail!("attention: q is {:?}, expected f32, f16 or bf16", dtype_of(other)),
        };
        Ok((out, ql.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        q: &MetalStorage,
        ql: &Layout,
        k: &MetalStorage,
        kl: &Layout,
        v: &MetalStorage,
        vl: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let kv = metal::KeysAndValues::of_tokens((k, kl), (v, vl))?;
        let out = metal::attention(q.device(), (q, ql), kv, self.batch, self.params)?;
        Ok((out, ql.shape().clone()))
    }
}

impl Attention<'_> {
    fn run<T: Stored>(&self, q: &[T], ql: &Layout, k: &[T], kl: &Layout, v: &[T], vl: &Layout) -> Result<Vec<T>> {
        let ((_, hq, d), (_, hk, _)) = (ql.shape().dims3()?, kl.shape().dims3()?);
        let (q, keys, values) = (operand(q, ql), operand(k, kl), operand(v, vl));
        let Self { batch, params } = *self;
        Ok(cpu::Attention { q, keys, values, block_size: None, hq, hk, d, batch, params }.run())
    }
}

/// A `[N, heads, D]` operand, its last dimension contiguous.
fn operand<'a, T>(data: &'a [T], layout: &Layout) -> cpu::Operand<'a, T> {
    let strides = layout.stride();
    cpu::Operand { data: &data[layout.start_offset()..], strides: [strides[0], strides[1]] }
}

struct WriteKv<'a> {
    batch: &'a Batch,
}

impl InplaceOp3 for WriteKv<'_> {
    fn name(&self) -> &'static str {
        "write-kv"
    }

    fn cpu_fwd(
        &self,
        kv: &mut CpuStorage,
        layout: &Layout,
        k: &CpuStorage,
        kl: &Layout,
        v: &CpuStorage,
        vl: &Layout,
    ) -> Result<()> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            return metal::write_kv(&emulator, kv, layout, (k, kl), (v, vl), self.batch);
        }
        match (kv, k, v) {
            (CpuStorage::F32(kv), CpuStorage::F32(k), CpuStorage::F32(v)) => self.run(kv, layout, k, kl, v, vl),
            (CpuStorage::F16(kv), CpuStorage::F16(k), CpuStorage::F16(v)) => self.run(kv, layout, k, kl, v, vl),
            (CpuStorage::BF16(kv), CpuStorage::BF16(k), CpuStorage::BF16(v)) => self.run(kv, layout, k, kl, v, vl),
            (CpuStorage::F16(kv), CpuStorage::F32(k), CpuStorage::F32(v)) => self.run(kv, layout, k, kl, v, vl),
            (CpuStorage::BF16(kv), CpuStorage::F32(k), CpuStorage::F32(v)) => self.run(kv, layout, k, kl, v, vl),
            (kv, k, _) => bail!("write_kv: {:?} into pages of {:?}", dtype_of(k), dtype_of(kv)),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        kv: &mut CudaStorage,
        layout: &Layout,
        k: &CudaStorage,
        kl: &Layout,
        v: &CudaStorage,
        vl: &Layout,
    ) -> Result<()> {
        cuda::write_kv(kv, layout, (k, kl), (v, vl), self.batch)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        kv: &mut MetalStorage,
        layout: &Layout,
        k: &MetalStorage,
        kl: &Layout,
        v: &MetalStorage,
        vl: &Layout,
    ) -> Result<()> {
        metal::write_kv(&kv.device().clone(), kv, layout, (k, kl), (v, vl), self.batch)
    }
}

impl WriteKv<'_> {
    fn run<T: Stored, P: Stored>(
        &self,
        kv: &mut [P],
        layout: &Layout,
        k: &[T],
        kl: &Layout,
        v: &[T],
        vl: &Layout,
    ) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("write_kv: pages must be contiguous") };
        let (_, heads, d) = kl.shape().dims3()?;
        let slots = &self.batch.host_slot_mapping;
        let (keys, values) = kv[start..end].split_at_mut((end - start) / 2);
        dispatch(cpu::WriteRows { pages: keys, rows: operand(k, kl), heads, d, slots });
        dispatch(cpu::WriteRows { pages: values, rows: operand(v, vl), heads, d, slots });
        Ok(())
    }
}

struct PagedAttention<'a> {
    batch: &'a Batch,
    params: AttentionParams,
}

impl CustomOp2 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        "paged-attention"
    }

    fn cpu_fwd(&self, q: &CpuStorage, ql: &Layout, kv: &CpuStorage, kvl: &Layout) -> Result<(CpuStorage, Shape)> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            let kv = metal::KeysAndValues::paged(kv, kvl)?;
            let out = metal::attention(&emulator, (q, ql), kv, self.batch, self.params)?;
            return Ok((out, ql.shape().clone()));
        }
        let out = match (q, kv) {
            (CpuStorage::F32(q), CpuStorage::F32(kv)) => CpuStorage::F32(self.run(q, ql, kv, kvl)?),
            (CpuStorage::F16(q), CpuStorage::F16(kv)) => CpuStorage::F16(self.run(q, ql, kv, kvl)?),
            (CpuStorage::BF16(q), CpuStorage::BF16(kv)) => CpuStorage::BF16(self.run(q, ql, kv, kvl)?),
            (CpuStorage::F32(q), CpuStorage::F16(kv)) => CpuStorage::F32(self.run(q, ql, kv, kvl)?),
            (CpuStorage::F32(q), CpuStorage::BF16(kv)) => CpuStorage::F32(self.run(q, ql, kv, kvl)?),
            (q, kv) => bail!("paged_attention: {:?} over pages of {:?}", dtype_of(q), dtype_of(kv)),
        };
        Ok((out, ql.shape().clone()))
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        q: &MetalStorage,
        ql: &Layout,
        kv: &MetalStorage,
        kvl: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        let kv = metal::KeysAndValues::paged(kv, kvl)?;
        let out = metal::attention(q.device(), (q, ql), kv, self.batch, self.params)?;
        Ok((out, ql.shape().clone()))
    }
}

impl PagedAttention<'_> {
    fn run<T: Stored, P: Stored>(&self, q: &[T], ql: &Layout, kv: &[P], layout: &Layout) -> Result<Vec<T>> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("paged_attention: pages must be contiguous")
        };
        let (_, hq, d) = ql.shape().dims3()?;
        let (_, _, block_size, hk, _) = layout.shape().dims5()?;
        let (keys, values) = kv[start..end].split_at((end - start) / 2);
        let pages = |data| cpu::Operand { data, strides: [hk * d, d] };
        let (q, keys, values) = (operand(q, ql), pages(keys), pages(values));
        let Self { batch, params } = *self;
        Ok(cpu::Attention { q, keys, values, block_size: Some(block_size), hq, hk, d, batch, params }.run())
    }
}
