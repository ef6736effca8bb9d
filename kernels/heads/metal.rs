//! Heads on their way to attention on Metal, in one kernel.

use std::cell::OnceCell;

#[cfg(feature = "metal")]
use candle_core::MetalStorage;
#[cfg(feature = "metal")]
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Tensor, bail};

use super::{KeyValueHeads, takes};
use crate::Batch;
use crate::cpu::{Operand, as_rows};
use crate::metal::{Argument, Backend, Launch, Source, float, source};
use crate::norm::Norm;

pub(super) static SOURCE: Source = source!("heads");

const LANES: usize = 32;
/// Of a threadgroup, as in the kernel.
const SIMDGROUPS: usize = 4;

/// As the public function, and `None` for operands that the kernel does not take; its parts say what is wrong with
/// them.
pub fn norm_rope_write<B: Backend>(
    backend: &B,
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<Option<Tensor>> {
    let norms = super::norms(q_norm, kv);
    if !takes(q, norms, kv, (cos, sin), pages, batch) || kv.is_some() && pages.dtype() != q.dtype() {
        return Ok(None);
    }
    let rows = |x: &Tensor| as_rows(x);
    let operation = NormRopeWrite {
        q: rows(q)?,
        kv: kv.map(|kv| Ok::<_, candle_core::Error>([rows(kv.k)?, rows(kv.v)?])).transpose()?,
        norms,
        angles: [cos.contiguous()?, sin.contiguous()?],
        batch,
        out: OnceCell::new(),
    };
    if kv.is_none() {
        return operation.run(backend, None).map(Some);
    }
    let (_, blocks, block_size, ..) = pages.dims5()?;
    batch.check_blocks("norm_rope_write", blocks, block_size, |sequence| sequence.past())?;
    pages.inplace_op1(&operation)?;
    Ok(operation.out.into_inner())
}

struct NormRopeWrite<'a> {
    q: Tensor,
    kv: Option<[Tensor; 2]>,
    /// Of queries, keys and values.
    norms: [Option<Norm<'a>>; 3],
    angles: [Tensor; 2],
    batch: &'a Batch,
    out: OnceCell<Tensor>,
}

impl NormRopeWrite<'_> {
    fn run<B: Backend>(&self, backend: &B, pages: Option<(&mut B::Storage, &Layout)>) -> Result<Tensor> {
        let ((n, hq, d), (_, half), dtype) = (self.q.dims3()?, self.angles[0].dims2()?, self.q.dtype());
        let weights = self.norms.map(|norm| norm.map(|norm| norm.weight.contiguous()).transpose());
        let [Some(q_weight), k_weight, v_weight] = [weights[0].as_ref(), weights[1].as_ref(), weights[2].as_ref()]
            .map(|weight| weight.ok().and_then(Option::as_ref))
        else {
            bail!("norm_rope_write: a weight cannot be copied")
        };
        let (q, q_weight) = (Operand::new(&self.q), Operand::new(q_weight));
        let [cos, sin] = self.angles.each_ref().map(Operand::new);
        let kv = self.kv.as_ref().map(|kv| kv.each_ref().map(Operand::new));
        let [k_weight, v_weight] = [k_weight, v_weight].map(|weight| weight.map(Operand::new));
        let slots = Operand::new(&self.batch.slot_mapping);

        let (q_argument, q_rows) = q.metal_rows::<B>()?;
        let mut rows = [q_rows; 3];
        let mut of_pages = Vec::new();
        let mut plane = 0;
        if let (Some((pages, layout)), Some([k, v]), Some(k_weight)) = (pages, &kv, &k_weight) {
            let (_, blocks, block_size, ..) = layout.shape().dims5()?;
            plane = blocks * block_size;
            let [(k, k_rows), (v, v_rows)] = [k.metal_rows::<B>()?, v.metal_rows::<B>()?];
            (rows[1], rows[2]) = (k_rows, v_rows);
            of_pages = vec![Argument::write(pages, layout)?, k, k_weight.metal::<B>()?, v, slots.metal::<B>()?];
        }
        if let Some(weight) = &v_weight {
            of_pages.push(weight.metal::<B>()?);
        }
        let mut sizes: Vec<u32> = rows.iter().flat_map(|rows| rows.words()).collect();
        sizes.extend([n, d, half, plane].map(|size| size as u32));
        sizes.extend(self.norms.map(|norm| norm.map_or(0, |norm| (norm.eps as f32).to_bits())));
        let heads = n * (hq + if kv.is_some() { 2 * rows[1].heads as usize } else { 0 });
        crate::metal::output(backend, (n, hq, d), dtype, |y| {
            let mut arguments = vec![
                Argument::Write(y, 0),
                q_argument,
                q_weight.metal::<B>()?,
                cos.metal::<B>()?,
                sin.metal::<B>()?,
                Argument::Words(sizes),
            ];
            arguments.extend(of_pages);
            backend.launch(Launch {
                source: &SOURCE,
                kernel: "norm_rope_write",
                variant: float(dtype)?,
                constants: vec![kv.is_some(), v_weight.is_some()],
                threadgroups: [heads.div_ceil(SIMDGROUPS), 1, 1],
                threads: [SIMDGROUPS * LANES, 1, 1],
                arguments,
            })
        })
    }
}

/// The pages are the target of an in-place op, so that candle locks them.
impl InplaceOp1 for NormRopeWrite<'_> {
    fn name(&self) -> &'static str {
        "norm-rope-write"
    }

    fn cpu_fwd(&self, pages: &mut CpuStorage, layout: &Layout) -> Result<()> {
        #[cfg(any(test, feature = "emulator"))]
        if let Some(emulator) = crate::metal::emulator::emulator() {
            self.out.set(self.run(&emulator, Some((pages, layout)))?).expect("run once");
            return Ok(());
        }
        let _ = (pages, layout);
        bail!("norm_rope_write: pages on the cpu, q on a gpu")
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(&self, pages: &mut MetalStorage, layout: &Layout) -> Result<()> {
        self.out.set(self.run(&pages.device().clone(), Some((pages, layout)))?).expect("run once");
        Ok(())
    }
}
