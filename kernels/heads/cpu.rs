//! Heads on their way to attention on the CPU, in one pass: threads over tokens, lanes along a head.

use std::cell::OnceCell;

use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};
use half::{bf16, f16};

use super::{KeyValueHeads, takes};
use crate::Batch;
use crate::attention::takes_pages;
use crate::cpu::{Operand, Shared, as_rows, dtype_of, fill_rows};
use crate::norm::{self, Norm};
use crate::rope;
use crate::simd::{Kernel, Lanes, Stored, dispatch};

/// As the public function, and `None` for operands that its parts refuse.
pub fn norm_rope_write(
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    angles: (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<Option<Tensor>> {
    let norms = super::norms(q_norm, kv);
    if q.elem_count() == 0 || !takes(q, norms, kv, angles, pages, batch) || kv.is_some() && !takes_pages(q, pages) {
        return Ok(None);
    }
    let whole = |norm: Norm| Ok::<_, candle_core::Error>((norm.weight.contiguous()?, norm.eps as f32));
    let [q_norm, k_norm, v_norm] = norms.map(|norm| norm.map(whole).transpose());
    let operation = NormRopeWrite {
        q: as_rows(q)?,
        kv: kv.map(|kv| Ok::<_, candle_core::Error>([as_rows(kv.k)?, as_rows(kv.v)?])).transpose()?,
        norms: [q_norm?, k_norm?, v_norm?],
        angles: [angles.0.contiguous()?, angles.1.contiguous()?],
        batch,
        out: OnceCell::new(),
    };
    if kv.is_none() {
        return match q.dtype() {
            DType::F32 => operation.run::<f32, f32>(None).map(Some),
            DType::F16 => operation.run::<f16, f16>(None).map(Some),
            DType::BF16 => operation.run::<bf16, bf16>(None).map(Some),
            _ => Ok(None),
        };
    }
    let (_, blocks, block_size, ..) = pages.dims5()?;
    batch.check_blocks("norm_rope_write", blocks, block_size, |sequence| sequence.past())?;
    pages.inplace_op1(&operation)?;
    Ok(operation.out.into_inner())
}

struct NormRopeWrite<'a> {
    q: Tensor,
    kv: Option<[Tensor; 2]>,
    /// Weight and epsilon for queries, keys and values.
    norms: [Option<(Tensor, f32)>; 3],
    angles: [Tensor; 2],
    batch: &'a Batch,
    out: OnceCell<Tensor>,
}

/// The pages are the target of an in-place op, so that candle locks them.
impl InplaceOp1 for NormRopeWrite<'_> {
    fn name(&self) -> &'static str {
        "norm-rope-write"
    }

    fn cpu_fwd(&self, pages: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            bail!("norm_rope_write: pages must be contiguous")
        };
        let out = match (pages, self.q.dtype()) {
            (CpuStorage::F32(pages), DType::F32) => self.run::<f32, _>(Some(&mut pages[start..end])),
            (CpuStorage::F16(pages), DType::F32) => self.run::<f32, _>(Some(&mut pages[start..end])),
            (CpuStorage::BF16(pages), DType::F32) => self.run::<f32, _>(Some(&mut pages[start..end])),
            (CpuStorage::F16(pages), DType::F16) => self.run::<f16, _>(Some(&mut pages[start..end])),
            (CpuStorage::BF16(pages), DType::BF16) => self.run::<bf16, _>(Some(&mut pages[start..end])),
            (pages, dtype) => bail!("norm_rope_write: {dtype:?} into pages of {:?}", dtype_of(pages)),
        };
        self.out.set(out?).expect("run once");
        Ok(())
    }
}

impl NormRopeWrite<'_> {
    /// The query heads, of elements `T`; those of keys and values go to `pages`.
    fn run<T: Stored, P: Stored>(&self, pages: Option<&mut [P]>) -> Result<Tensor> {
        let ((n, hq, d), (_, half)) = (self.q.dims3()?, self.angles[0].dims2()?);
        let (q, kv) = (Operand::new(&self.q), self.kv.as_ref().map(|kv| kv.each_ref().map(Operand::new)));
        let (q, q_rows) = q.rows::<T>()?;
        let kv = match &kv {
            Some([k, v]) => Some((k.rows::<T>()?, v.rows::<T>()?, k.layout.dims()[1])),
            None => None,
        };
        let norms = self.norms.each_ref().map(|norm| norm.as_ref().map(|(weight, eps)| (Operand::new(weight), *eps)));
        let (q_norm, k_norm, v_norm) = (parts(&norms[0])?, parts(&norms[1])?, parts(&norms[2])?);
        let [cos, sin] = self.angles.each_ref().map(Operand::new);
        let (cos, sin) = (cos.elements::<f32>()?, sin.elements::<f32>()?);
        let pages = pages.map(|pages| {
            let (keys, values) = pages.split_at_mut(pages.len() / 2);
            (Shared::new(keys), Shared::new(values))
        });
        let out = fill_rows(n * hq * d, hq * d, |first, out: &mut [T]| {
            let normed = &mut vec![T::round(0.0); d];
            for (token, out) in (first..).zip(out.chunks_exact_mut(hq * d)) {
                let angles = (&cos[token * half..][..half], &sin[token * half..][..half]);
                for (head, out) in out.chunks_exact_mut(d).enumerate() {
                    let x = &q[q_rows.start(token * hq + head)..][..d];
                    dispatch(Head { x, norm: q_norm, angles, normed, out });
                }
                let (Some(((k, k_rows), (v, v_rows), hk)), Some((keys, values))) = (&kv, &pages) else { continue };
                let place = self.batch.host_slot_mapping[token] as usize * hk * d;
                // SAFETY: no two tokens of a batch go to one place.
                let (keys, values) = unsafe { (keys.part(place, hk * d), values.part(place, hk * d)) };
                for (head, (key, value)) in keys.chunks_exact_mut(d).zip(values.chunks_exact_mut(d)).enumerate() {
                    let x = &k[k_rows.start(token * hk + head)..][..d];
                    dispatch(Head { x, norm: k_norm, angles, normed, out: key });
                    let x = &v[v_rows.start(token * hk + head)..][..d];
                    dispatch(Head { x, norm: v_norm, angles: (&[], &[]), normed, out: value });
                }
            }
        });
        Tensor::from_vec(out, (n, hq, d), self.q.device())
    }
}

fn parts<'a>(norm: &'a Option<(Operand, f32)>) -> Result<Option<(&'a [f32], f32)>> {
    norm.as_ref().map(|(weight, eps)| Ok((weight.elements()?, *eps))).transpose()
}

/// A head of a token.
struct Head<'a, T, P> {
    x: &'a [T],
    /// Weight and epsilon.
    norm: Option<(&'a [f32], f32)>,
    /// Cosines and sines, none where it does not rotate.
    angles: (&'a [f32], &'a [f32]),
    /// Of any content.
    normed: &'a mut [T],
    out: &'a mut [P],
}

impl<T: Stored, P: Stored> Kernel for Head<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { x, norm, angles: (cos, sin), normed, out } = self;
        let x = match norm {
            Some((weight, eps)) => {
                norm::cpu::Row { x, gate: None, weight, eps, out: &mut *normed }.run::<V>();
                &*normed
            }
            None => x,
        };
        rope::cpu::Head { x, cos, sin, out }.run::<V>()
    }
}
