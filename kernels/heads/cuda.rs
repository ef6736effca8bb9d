//! Heads on their way to attention on CUDA, in one kernel.

use std::cell::RefCell;

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, DType, InplaceOp1, Layout, Result, Tensor, bail};

use super::KeyValueHeads;
use crate::Batch;
use crate::attention::cuda::{self as attention, Entering, HeadNorm};
use crate::attention::{AttentionParams, check_pages};
use crate::cpu::{Operand, as_rows};
use crate::cuda::{self, EarlyLaunch, Floats, Kernel, Rows, floats, modules};
use crate::norm::Norm;

static SINGLE: Floats = floats!(HEADS, "norm_rope_write");
/// Moves four values at a time.
static WIDE: Floats = floats!(HEADS, "norm_rope_write_wide");
const WIDTH: usize = 4;

/// Of heads that lie across the lanes of a warp, in f16 and in bf16: a head a warp, and [`HEADS`] of them.
type Lanes = [[Kernel; 2]; 2];

macro_rules! lanes {
    ($d:literal) => {
        [lanes!("norm_rope_write_d", $d), lanes!("norm_rope_write_many_d", $d)]
    };
    ($name:literal, $d:literal) => {
        [
            Kernel::new(&modules::HEADS, concat!($name, $d, "_f16")),
            Kernel::new(&modules::HEADS, concat!($name, $d, "_bf16")),
        ]
    };
}

static LANES: [(usize, Lanes); 4] = [(64, lanes!(64)), (128, lanes!(128)), (256, lanes!(256)), (512, lanes!(512))];
const HEADS: usize = 4;
/// Tokens from which on there are warps enough for several heads each.
const MANY_TOKENS: usize = 64;

/// Of a block, as in the kernels.
const WARPS: usize = 8;
/// The shared memory of a block that every GPU grants.
const MAX_D: usize = (48 << 10) / (4 * WARPS);

/// As the public function, in one kernel; `None` where none takes the step.
#[expect(clippy::too_many_arguments, reason = "the operands of two ops, and their device")]
pub fn norm_rope_attend(
    device: &CudaDevice,
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    angles: (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
    params: AttentionParams,
) -> Result<Option<Tensor>> {
    let q = as_rows(q)?;
    if !attention::takes_entering(device, &q, batch, params)? {
        return Ok(None);
    }
    check_pages(&q, pages, batch, params)?;
    let norms = check(&q, q_norm, kv, angles, pages, batch)?;
    let ((_, _, d), (_, half), dtype) = (q.dims3()?, angles.0.dims2()?, q.dtype());
    let (k, v) = (kv.map(|kv| as_rows(kv.k)).transpose()?, kv.map(|kv| as_rows(kv.v)).transpose()?);
    let (cos, sin) = (angles.0.contiguous()?, angles.1.contiguous()?);
    let stream = device.cuda_stream();
    let are_aligned = {
        let q = Operand::new(&q);
        let pages = Operand::new(pages);
        q.cuda_rows(&stream)?.are_aligned(16, dtype) && pages.cuda(&stream)?.is_aligned(16)
    };
    let [k, v] = [&k, &v].map(|rows| rows.as_ref().map(Operand::new));
    let (k, v) =
        (k.as_ref().map(|k| k.cuda_rows(&stream)).transpose()?, v.as_ref().map(|v| v.cuda_rows(&stream)).transpose()?);
    let [cos, sin] = [&cos, &sin].map(Operand::new);
    let (cos, sin) = (cos.cuda(&stream)?, sin.cuda(&stream)?);
    let weights = norms.map(|norm| norm.map(|norm| Operand::new(norm.weight)));
    let mut of_heads = [HeadNorm { weight: 0, eps: 0.0 }; 3];
    let mut weights_are_aligned = true;
    for ((of_head, weight), norm) in of_heads.iter_mut().zip(&weights).zip(norms) {
        if let (Some(weight), Some(norm)) = (weight, norm) {
            let weight = weight.cuda(&stream)?;
            weights_are_aligned &= weight.is_aligned(16);
            *of_head = HeadNorm { weight: weight.value, eps: norm.eps as f32 };
        }
    }
    let takes = are_aligned
        && weights_are_aligned
        && half.is_multiple_of(d / 32)
        && cos.is_aligned(16)
        && sin.is_aligned(16)
        && [&k, &v].into_iter().flatten().all(|rows| rows.are_aligned(16, dtype));
    if !takes {
        return Ok(None);
    }
    let of_rows = |rows: &Option<Rows>| rows.as_ref().map_or((0, [0; 2]), |rows| (rows.address.value, rows.strides));
    let ((k, k_strides), (v, v_strides)) = (of_rows(&k), of_rows(&v));
    let entering = Entering {
        k,
        v,
        cos: cos.value,
        sin: sin.value,
        norms: of_heads,
        strides: [k_strides, v_strides],
        half: half as u32,
    };
    cuda::output(device, q.shape(), dtype, |y| {
        pages.inplace_op1(&Attending { device, q: &q, batch, params, entering, y: RefCell::new(y) })
    })
    .map(Some)
}

/// The pages are the target of an in-place op, so that candle locks them.
struct Attending<'a> {
    device: &'a CudaDevice,
    q: &'a Tensor,
    batch: &'a Batch,
    params: AttentionParams,
    entering: Entering,
    y: RefCell<&'a mut CudaStorage>,
}

impl InplaceOp1 for Attending<'_> {
    fn name(&self) -> &'static str {
        "norm-rope-attend"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> Result<()> {
        bail!("norm_rope_attend: pages on the cpu, q on a gpu")
    }

    fn cuda_fwd(&self, pages: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let &Self { device, q, batch, params, ref entering, ref y } = self;
        attention::enter_and_attend(device, q, (pages, layout), batch, params, entering, &mut y.borrow_mut())
    }
}

/// Checks what both ops are given; returns the norms of query, key and value.
fn check<'a>(
    q: &Tensor,
    q_norm: Norm<'a>,
    kv: Option<KeyValueHeads<'a>>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<[Option<Norm<'a>>; 3]> {
    let ((n, _, d), (_, half), dtype) = (q.dims3()?, cos.dims2()?, q.dtype());
    if n != batch.num_tokens() || cos.dims() != [n, half] || sin.dims() != cos.dims() || 2 * half > d || d > MAX_D {
        bail!(
            "norm_rope_write: q is {:?}, cos {:?}, sin {:?}, the batch has {} tokens, heads have at most {MAX_D} values",
            q.dims(),
            cos.dims(),
            sin.dims(),
            batch.num_tokens()
        )
    }
    if cos.dtype() != DType::F32 || sin.dtype() != DType::F32 {
        bail!("norm_rope_write: cos is {:?} and sin {:?}, expected f32", cos.dtype(), sin.dtype())
    }
    let norms = super::norms(q_norm, kv);
    for norm in norms.into_iter().flatten() {
        if norm.weight.dims() != [d] || norm.weight.dtype() != DType::F32 {
            bail!("norm_rope_write: weight is {:?} {:?}, expected f32 [{d}]", norm.weight.dims(), norm.weight.dtype())
        }
    }
    if let Some(kv) = kv {
        let (two, blocks, block_size, hk, _) = pages.dims5()?;
        if two != 2
            || kv.k.dims() != [n, hk, d]
            || kv.v.dims() != kv.k.dims()
            || pages.dim(4)? != d
            || [kv.k.dtype(), kv.v.dtype(), pages.dtype()] != [dtype; 3]
        {
            bail!(
                "norm_rope_write: k is {:?} {:?} and v {:?} {:?}, q {:?} {dtype:?}, pages {:?} {:?}",
                kv.k.dims(),
                kv.k.dtype(),
                kv.v.dims(),
                kv.v.dtype(),
                q.dims(),
                pages.dims(),
                pages.dtype()
            )
        }
        batch.check_blocks("norm_rope_write", blocks, block_size, |sequence| sequence.past())?;
    }
    Ok(norms)
}

/// As the public function.
pub fn norm_rope_write(
    device: &CudaDevice,
    q: &Tensor,
    q_norm: Norm,
    kv: Option<KeyValueHeads>,
    (cos, sin): (&Tensor, &Tensor),
    pages: &Tensor,
    batch: &Batch,
) -> Result<Tensor> {
    let norms = check(q, q_norm, kv, (cos, sin), pages, batch)?;
    let (shape, dtype) = (q.shape().clone(), q.dtype());
    let (q, k, v) = (as_rows(q)?, kv.map(|kv| as_rows(kv.k)).transpose()?, kv.map(|kv| as_rows(kv.v)).transpose()?);
    let (cos, sin) = (cos.contiguous()?, sin.contiguous()?);
    let operation = NormRopeWrite { device, q: &q, kv: k.as_ref().zip(v.as_ref()), norms, cos: &cos, sin: &sin, batch };
    cuda::output(device, shape, dtype, |out| match kv {
        Some(_) => pages.inplace_op1(&Writing { operation, out: RefCell::new(out) }),
        None => operation.run(None, out),
    })
}

struct NormRopeWrite<'a> {
    device: &'a CudaDevice,
    q: &'a Tensor,
    kv: Option<(&'a Tensor, &'a Tensor)>,
    norms: [Option<Norm<'a>>; 3],
    cos: &'a Tensor,
    sin: &'a Tensor,
    batch: &'a Batch,
}

impl NormRopeWrite<'_> {
    fn run(&self, pages: Option<(&mut CudaStorage, &Layout)>, out: &mut CudaStorage) -> Result<()> {
        let ((n, hq, d), (_, half), dtype) = (self.q.dims3()?, self.cos.dims2()?, self.q.dtype());
        let stream = self.device.cuda_stream();
        let q = Operand::new(self.q);
        let kv = self.kv.map(|(k, v)| (Operand::new(k), Operand::new(v)));
        let [cos, sin, slots] = [self.cos, self.sin, &self.batch.slot_mapping].map(Operand::new);
        let weights = self.norms.map(|norm| norm.map(|norm| Operand::new(norm.weight)));
        let q = q.cuda_rows(&stream)?;
        let kv = match &kv {
            Some((k, v)) => Some((k.cuda_rows(&stream)?, v.cuda_rows(&stream)?)),
            None => None,
        };
        let [cos, sin, slots] = [&cos, &sin, &slots].map(|operand| operand.cuda(&stream));
        let (cos, sin, slots) = (cos?, sin?, slots?);
        let addresses = weights.each_ref().map(|weight| weight.as_ref().map(|weight| weight.cuda(&stream)).transpose());
        let [q_weight, k_weight, v_weight] = addresses;
        let weights = [q_weight?, k_weight?, v_weight?];
        let plane = pages.as_ref().map_or(0, |(_, layout)| layout.shape().elem_count() as u64 / 2);
        let pages = pages.map(|(pages, layout)| cuda::write(pages, layout, &stream)).transpose()?;
        let y = cuda::write(out, &Layout::contiguous((n, hq, d)), &stream)?;

        let rows: Vec<&Rows> = std::iter::once(&q).chain(kv.iter().flat_map(|(k, v)| [k, v])).collect();
        let bytes = WIDTH * dtype.size_in_bytes();
        let is_wide = d.is_multiple_of(WIDTH)
            && rows.iter().all(|rows| rows.are_aligned(bytes, dtype))
            && pages.as_ref().is_none_or(|pages| pages.is_aligned(bytes));
        let hk = kv.as_ref().map_or(0, |(k, _)| k.heads);
        let (k, v) = kv
            .as_ref()
            .map_or(((0, [0; 2]), (0, [0; 2])), |(k, v)| ((k.address.value, k.strides), (v.address.value, v.strides)));
        let heads = hq + 2 * hk as usize;
        let angles_are_aligned = cos.is_aligned(16) && sin.is_aligned(16) && half.is_multiple_of(d / 32);
        let lanes = LANES.iter().find(|(size, _)| *size == d).filter(|_| {
            let bytes = (d / 32 * dtype.size_in_bytes()).min(16);
            matches!(dtype, DType::F16 | DType::BF16)
                && angles_are_aligned
                && rows.iter().all(|rows| rows.are_aligned(bytes, dtype))
                && pages.as_ref().is_none_or(|pages| pages.is_aligned(bytes))
                && weights.iter().flatten().all(|weight| weight.is_aligned(16))
        });
        let (kernel, of_warp, shared) = match lanes {
            Some((_, kernels)) => {
                let is_many = n >= MANY_TOKENS;
                let kernel = &kernels[usize::from(is_many)][usize::from(dtype == DType::BF16)];
                (kernel, if is_many { HEADS } else { 1 }, 0)
            }
            None => (if is_wide { &WIDE } else { &SINGLE }.of(dtype)?, 1, WARPS * d * size_of::<f32>()),
        };
        let warps = n * heads.div_ceil(of_warp);
        let config =
            LaunchConfig { shared_mem_bytes: shared as u32, ..cuda::grid(warps.div_ceil(WARPS), (WARPS * 32, 1))? };
        let weights = weights.each_ref().map(|weight| weight.as_ref().map_or(0, |weight| weight.value));
        let eps = self.norms.map(|norm| norm.map_or(0.0, |norm| norm.eps as f32));
        let pages = pages.as_ref().map_or(0, |pages| pages.value);
        let [n, d, half] = [n, d, half].map(|size| size as u32);
        let mut launch = EarlyLaunch::new(self.device, kernel)?;
        launch.arg(&q.address.value).rows(&q).arg(&weights[0]).arg(&eps[0]);
        launch.arg(&k.0).arg(&hk).arg(&k.1[0]).arg(&k.1[1]).arg(&weights[1]).arg(&eps[1]);
        launch.arg(&v.0).arg(&v.1[0]).arg(&v.1[1]).arg(&weights[2]).arg(&eps[2]);
        launch.arg(&cos.value).arg(&sin.value).arg(&slots.value).arg(&plane).arg(&pages).arg(&y.value);
        launch.arg(&n).arg(&d).arg(&half);
        // SAFETY: the arguments are the kernel's, in its order; the public function compared shapes and dtypes, and
        // `check_blocks` the batch's pages with these.
        unsafe { launch.launch(config) }
    }
}

/// The pages are the target of an in-place op, so that candle locks them.
struct Writing<'a> {
    operation: NormRopeWrite<'a>,
    out: RefCell<&'a mut CudaStorage>,
}

impl InplaceOp1 for Writing<'_> {
    fn name(&self) -> &'static str {
        "norm-rope-write"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> Result<()> {
        bail!("norm_rope_write: pages on the cpu, q on a gpu")
    }

    fn cuda_fwd(&self, pages: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.operation.run(Some((pages, layout)), &mut self.out.borrow_mut())
    }
}
