//! Products of many rows with the activation of an MLP behind them, by one kernel on compute capability 9.0: what is
//! activated never lies in memory.

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor};

use crate::activation::Activation;
use crate::cpu::{Operand, as_rows};
use crate::cuda::{self, Gpu, Kernel, TensorMap, modules};

/// What activates sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activated {
    Gelu,
    /// The halves of a row are a gate and what it multiplies.
    Gate(Activation),
}

macro_rules! kernels {
    ($name:literal) => {
        [
            Kernel::new(&modules::LINEAR_WGMMA, concat!($name, "_f16")),
            Kernel::new(&modules::LINEAR_WGMMA, concat!($name, "_bf16")),
        ]
    };
}
static GELU: [Kernel; 2] = kernels!("linear_gelu");
static SILU: [Kernel; 2] = kernels!("linear_silu_gated");
static GELU_TANH: [Kernel; 2] = kernels!("linear_gelu_tanh_gated");

/// As in the kernels: rows and rows of the weight of a block's tile, bytes of both in the ring and of the tile's sums,
/// and barriers; blocks of a cluster.
const ROWS: usize = 128;
const WEIGHT_ROWS: usize = 256;
const SHARED: usize = 1024 + 3 * (ROWS + WEIGHT_ROWS) * 128 + ROWS * WEIGHT_ROWS * 2 + 10 * 8;
const CLUSTER: usize = 2;
const THREADS: u32 = 512;

/// The kernels' argument, as `Shape` there.
#[repr(C)]
struct Sizes {
    rows: u32,
    inner: u32,
    outer: u32,
}

// SAFETY: plain numbers, as the kernels declare them.
unsafe impl DeviceRepr for Sizes {}

/// As [`activated`], where all clusters together are busy enough to be faster than a library's product and a pass over
/// it.
pub fn activated_if_faster(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activated,
) -> Result<Option<Tensor>> {
    let at_once = Gpu::of(device)?.multiprocessors / CLUSTER;
    let (tiles, filled) = (tiles(x.dim(0)?, weight.dim(0)?), x.dim(0)? * weight.dim(0)?);
    let turns = tiles.div_ceil(at_once.max(1));
    match 5 * filled >= 4 * turns * at_once * CLUSTER * ROWS * WEIGHT_ROWS {
        true => activated(device, x, weight, bias, activation),
        false => Ok(None),
    }
}

/// Of a cluster.
fn tiles(rows: usize, weight_rows: usize) -> usize {
    rows.div_ceil(CLUSTER * ROWS) * weight_rows.div_ceil(WEIGHT_ROWS)
}

/// `activation(x weight^T + bias)`: `x` `[N, I]` in rows, `weight` `[O, I]`, or `[2 O, I]` with the gates first, `bias`
/// `[O]` of what is not gated. `None` where no kernel takes it.
pub fn activated(
    device: &CudaDevice,
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activated,
) -> Result<Option<Tensor>> {
    let ((rows, inner), (weight_rows, _), dtype) = (x.dims2()?, weight.dims2()?, x.dtype());
    let (kernels, outer) = match activation {
        Activated::Gelu => (&GELU, weight_rows),
        Activated::Gate(Activation::Silu) => (&SILU, weight_rows / 2),
        Activated::Gate(Activation::GeluTanh) => (&GELU_TANH, weight_rows / 2),
    };
    let is_gated = outer < weight_rows;
    let gpu = Gpu::of(device)?;
    let takes = gpu.is_hopper
        && gpu.shared[0] >= SHARED
        && matches!(dtype, DType::F16 | DType::BF16)
        && weight.dtype() == dtype
        && weight.is_contiguous()
        && [inner, outer].iter().all(|size| *size > 0 && size.is_multiple_of(8))
        && rows > 0
        && !(is_gated && (bias.is_some() || !weight_rows.is_multiple_of(2)));
    if !takes {
        return Ok(None);
    }
    let (x, bias) = (as_rows(x)?, bias.map(Tensor::contiguous).transpose()?);
    let stream = device.cuda_stream();
    let (x, weight) = (Operand::new(&x), Operand::new(weight));
    let bias = bias.as_ref().map(Operand::new);
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let bias = bias.as_ref().map(|bias| bias.cuda(&stream)).transpose()?;
    // Tensor copies read 16 bytes at a time, threads two values of the bias.
    if !x.are_aligned(16, dtype) || !weight.is_aligned(16) || bias.as_ref().is_some_and(|bias| !bias.is_aligned(4)) {
        return Ok(None);
    }
    let map = |address, stride: usize, [rows, columns]: [usize; 2], box_rows| {
        TensorMap::new(address, [stride as u32, columns as u32], dtype, [rows, 1, columns], box_rows)
    };
    // A single row may have any stride.
    let x_stride = if rows == 1 { inner } else { x.strides[0] as usize };
    let x = map(x.address.value, x_stride, [rows, inner], ROWS)?;
    let weight = map(weight.value, inner, [weight_rows, inner], WEIGHT_ROWS / CLUSTER)?;
    let bias = bias.as_ref().map_or(0, |bias| bias.value);
    let function = kernels[usize::from(dtype == DType::BF16)].on_sharing(device, SHARED)?;
    let clusters = (gpu.multiprocessors / CLUSTER).min(tiles(rows, weight_rows));
    let config = LaunchConfig {
        grid_dim: ((clusters * CLUSTER) as u32, 1, 1),
        block_dim: (THREADS, 1, 1),
        shared_mem_bytes: SHARED as u32,
    };
    let sizes = Sizes { rows: rows as u32, inner: inner as u32, outer: outer as u32 };
    let shape = Shape::from((rows, outer));
    cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let y = map(y.value, outer, [rows, outer], 64)?;
        let mut launch = stream.launch_builder(function);
        launch.arg(&sizes).arg(&x).arg(&weight).arg(&y).arg(&bias);
        // SAFETY: the arguments are the kernel's; the maps end where the operands do, the bias has a value for each output.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    })
    .map(Some)
}
