//! Products on CUDA: chooses the kernel by rows, dtype and what surrounds the product. Those of many rows go to cuBLASLt.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor, bail};

use super::wgmma::{self, Activated};
use super::{Around, cublas};
use crate::activation::Activation;
use crate::cpu::{Operand, as_rows};
use crate::cuda::{self, EarlyLaunch, Floats, Gpu, Kernel, floats, modules};

/// Of one row, plain and gated.
static ROW: [Floats; 2] = [floats!(LINEAR, "linear"), floats!(LINEAR, "linear_gated")];
macro_rules! tiles {
    ($name:literal) => {
        [Kernel::new(&modules::LINEAR, concat!($name, "_f16")), Kernel::new(&modules::LINEAR, concat!($name, "_bf16"))]
    };
}
/// Of up to 8 and up to 16 rows, on the matrix units, plain and gated.
static TILES: [[[Kernel; 2]; 2]; 2] = [
    [tiles!("linear_tiles_8"), tiles!("linear_tiles_8_gated")],
    [tiles!("linear_tiles_16"), tiles!("linear_tiles_16_gated")],
];

/// Of a block, as in the kernels, and bytes of weights that each has under way.
const WARPS: usize = 8;
const RING_BYTES: usize = 6 << 10;
/// Outputs of a block on the matrix units.
const TILE: usize = 16;
/// The most rows, and those of a weight of up to so many values: a larger one is then faster by cuBLAS.
const MAX_ROWS: usize = 8;
const MAX_ROWS_OF_SMALL: usize = 16;
const SMALL: usize = 8 << 20;
/// What a block has beside its dynamic shared memory, of one row, up to 8 and up to 16: its static one, and what the GPU
/// takes.
const OTHER_SHARED: [usize; 3] = [2 << 10, 10 << 10, 19 << 10];

/// As the kernels number it.
pub(crate) fn activation(gate: Option<Activation>) -> u32 {
    match gate {
        None => 0,
        Some(Activation::Silu) => 1,
        Some(Activation::GeluTanh) => 2,
    }
}

/// The product with what surrounds it; `None` where no kernel takes it.
pub fn linear(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    match few_rows(device, x, weight, bias, around)? {
        Some(y) => Ok(Some(y)),
        None => many_rows(device, x, weight, bias, around),
    }
}

/// As [`linear`], with no kernel that starts before the one ahead of it has ended.
pub(crate) fn many_rows(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    let normed = around.norm.map(|norm| norm.apply(x)).transpose()?;
    let x = normed.as_ref().unwrap_or(x);
    if let Around { gate: Some(gate), onto: None, .. } = around
        && let Some(y) = wgmma::activated_if_faster(device, x, weight, bias, Activated::Gate(gate))?
    {
        return Ok(Some(y));
    }
    around.behind_sum(|onto| cublas::linear(device, x, weight, bias, onto))
}

/// The GELU of the product; `None` where no kernel takes both.
pub fn linear_gelu(device: &CudaDevice, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Option<Tensor>> {
    wgmma::activated_if_faster(device, x, weight, bias, Activated::Gelu)
}

fn few_rows(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    let ((rows, inner), (weight_rows, _), dtype) = (x.dims2()?, weight.dims2()?, x.dtype());
    let is_gated = around.gate.is_some();
    let on_tiles = rows > 1;
    let most_rows = if inner * weight_rows <= SMALL { MAX_ROWS_OF_SMALL } else { MAX_ROWS };
    let takes = weight.dtype() == dtype
        && (1..=most_rows).contains(&rows)
        && weight.is_contiguous()
        && !(is_gated && (bias.is_some() || around.onto.is_some() || weight_rows % 2 != 0))
        && match dtype {
            DType::F16 | DType::BF16 => inner.is_multiple_of(if on_tiles { 32 } else { 8 }),
            DType::F32 => !on_tiles && inner.is_multiple_of(4),
            _ => false,
        };
    if !takes || inner == 0 || weight_rows == 0 {
        return Ok(None);
    }
    let outer = if is_gated { weight_rows / 2 } else { weight_rows };
    let shape = Shape::from((rows, outer));
    if let Some(onto) = around.onto
        && (onto.shape() != &shape || onto.dtype() != dtype)
    {
        bail!("linear: onto is {:?} {:?}, expected {dtype:?} {:?}", onto.dims(), onto.dtype(), shape.dims())
    }
    let fused_norm = around.norm.filter(|_| !on_tiles);
    let x = match (around.norm, fused_norm) {
        (Some(norm), None) => norm.apply(x)?,
        _ => as_rows(x)?,
    };
    let norm_weight = fused_norm.map(|norm| norm.weight.contiguous()).transpose()?;
    let (bias, onto) = (bias.map(Tensor::contiguous).transpose()?, around.onto.map(as_rows).transpose()?);

    let stream = device.cuda_stream();
    let (x, weight) = (Operand::new(&x), Operand::new(weight));
    let [norm_weight, bias, onto] =
        [norm_weight.as_ref(), bias.as_ref(), onto.as_ref()].map(|tensor| tensor.map(Operand::new));
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let norm_weight = norm_weight.as_ref().map(|weight| weight.cuda(&stream)).transpose()?;
    let bias = bias.as_ref().map(|bias| bias.cuda(&stream)).transpose()?;
    let onto = onto.as_ref().map(|onto| onto.cuda_rows(&stream)).transpose()?;
    let is_aligned = weight.is_aligned(16)
        && x.are_aligned(16, dtype)
        && norm_weight.as_ref().is_none_or(|weight| weight.is_aligned(16));
    if !is_aligned {
        return Ok(None);
    }
    let (kernel, outputs_per_block, shared) = if on_tiles {
        let by_kind = &TILES[usize::from(rows > 8)];
        (&by_kind[usize::from(is_gated)][usize::from(dtype == DType::BF16)], TILE, WARPS * RING_BYTES)
    } else {
        let shared = WARPS * RING_BYTES + inner * dtype.size_in_bytes();
        (ROW[usize::from(is_gated)].of(dtype)?, WARPS, shared)
    };
    let (gpu, other) = (Gpu::of(device)?, OTHER_SHARED[usize::from(rows > 1) + usize::from(rows > 8)]);
    let most_shared = gpu.shared[0] - other;
    if shared > most_shared {
        return Ok(None);
    }
    // As many blocks as run at once, each with several outputs in turn: their rings never run dry. So few that each could
    // have a multiprocessor for itself take half of its memory, or they would crowd on those that are free first.
    let resident = gpu.multiprocessors * (gpu.shared[1] / (shared + other)).max(1);
    let blocks = outer.div_ceil(outputs_per_block).min(resident);
    let spread = if blocks <= gpu.multiprocessors { gpu.shared[1] / 2 } else { 0 };
    let shared = shared.max(spread.min(most_shared));
    let config = LaunchConfig { shared_mem_bytes: shared as u32, ..cuda::grid(blocks, (WARPS * 32, 1))? };
    let activation = activation(around.gate);
    let eps = fused_norm.map_or(0.0, |norm| norm.eps as f32);
    let [rows, inner, outer] = [rows, inner, outer].map(|size| size as u32);
    let [norm_weight, bias] = [&norm_weight, &bias].map(|address| address.as_ref().map_or(0, |address| address.value));
    let (onto, onto_stride) = onto.as_ref().map_or((0, 0), |onto| (onto.address.value, onto.strides[0]));
    let y = cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::of(device, kernel.on_sharing(device, most_shared)?);
        launch.arg(&x.address.value).arg(&x.strides[0]).arg(&norm_weight).arg(&eps).arg(&weight.value).arg(&bias);
        launch.arg(&onto).arg(&onto_stride).arg(&y.value).arg(&rows).arg(&inner).arg(&outer).arg(&activation);
        // SAFETY: the arguments are the kernel's, in its order; shapes, dtypes and alignment were compared above.
        unsafe { launch.launch(config) }
    })?;
    Ok(Some(y))
}
