//! The activations on CUDA: chooses wide or single accesses.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor};

use super::Activation;
use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, floats};

/// A kernel of two operands in rows, value by value or 16 bytes at a time.
struct Paired {
    single: Floats,
    wide: Floats,
}

static SILU: Paired =
    Paired { single: floats!(ACTIVATION, "silu_gated"), wide: floats!(ACTIVATION, "silu_gated", "_wide") };
static GELU_TANH: Paired =
    Paired { single: floats!(ACTIVATION, "gelu_tanh_gated"), wide: floats!(ACTIVATION, "gelu_tanh_gated", "_wide") };
static SIGMOID: Paired =
    Paired { single: floats!(ACTIVATION, "sigmoid_gated"), wide: floats!(ACTIVATION, "sigmoid_gated", "_wide") };
static GELU: Floats = floats!(ACTIVATION, "gelu");
static SOFTCAP: Floats = floats!(ACTIVATION, "softcap");

/// Of a block.
const THREADS: usize = 256;
/// Of a launch whose threads take several values each.
const MAX_BLOCKS: usize = 4096;

/// `gate_up` `[N, 2 * width]` in rows.
pub fn gated_activation(device: &CudaDevice, gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (_, width) = gate_up.dims2()?;
    let (gate, up) = (gate_up.narrow(1, 0, width / 2)?, gate_up.narrow(1, width / 2, width / 2)?);
    let kernel = match activation {
        Activation::Silu => &SILU,
        Activation::GeluTanh => &GELU_TANH,
    };
    paired(device, kernel, &gate, &up)
}

/// `x` and `gate` of one shape, in rows.
pub fn sigmoid_gated(device: &CudaDevice, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    paired(device, &SIGMOID, x, gate)
}

fn paired(device: &CudaDevice, kernel: &Paired, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (dtype, shape) = (a.dtype(), a.shape());
    let (rows, d) = (cuda::rows_of(a.layout()), a.dims().last().copied().unwrap_or(0));
    let stream = device.cuda_stream();
    let (a, b) = (Operand::new(a), Operand::new(b));
    let (a, b) = (a.cuda_rows(&stream)?, b.cuda_rows(&stream)?);
    let wide = 16 / dtype.size_in_bytes();
    let is_wide = d.is_multiple_of(wide) && [&a, &b].iter().all(|rows| rows.are_aligned(16, dtype));
    let (kernel, packs) = if is_wide { (&kernel.wide, d / wide) } else { (&kernel.single, d) };
    cuda::output(device, shape, dtype, |y| {
        if rows * d == 0 {
            return Ok(());
        }
        let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
        let config = cuda::grid((rows * packs).div_ceil(THREADS), (THREADS, 1))?;
        let (rows, d) = (rows as u32, d as u32);
        let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
        launch.arg(&a.address.value).rows(&a).arg(&b.address.value).rows(&b);
        launch.arg(&y.value).arg(&rows).arg(&d);
        // SAFETY: the arguments are the kernel's, in its order; a, b and y have `rows` rows of `d` values.
        unsafe { launch.launch(config) }
    })
}

/// `x` of any shape, contiguous.
pub fn gelu(x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    each(&GELU, x, layout, None)
}

/// `x` of any shape, contiguous.
pub fn softcap(x: &CudaStorage, layout: &Layout, cap: f32) -> Result<CudaStorage> {
    each(&SOFTCAP, x, layout, Some(cap))
}

fn each(kernel: &Floats, x: &CudaStorage, layout: &Layout, parameter: Option<f32>) -> Result<CudaStorage> {
    let (device, dtype, shape) = (&x.device, x.dtype(), layout.shape());
    let stream = device.cuda_stream();
    let mut out = cuda::uninit(device, shape, dtype)?;
    let count = shape.elem_count() as u64;
    if count == 0 {
        return Ok(out);
    }
    let x = cuda::read(x, layout, &stream)?;
    let y = cuda::write(&mut out, &Layout::contiguous(shape), &stream)?;
    let blocks = shape.elem_count().div_ceil(THREADS).min(MAX_BLOCKS);
    let config =
        LaunchConfig { grid_dim: (blocks as u32, 1, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
    let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
    launch.arg(&x.value).arg(&y.value).arg(&count);
    if let Some(parameter) = &parameter {
        launch.arg(parameter);
    }
    // SAFETY: the arguments are the kernel's, in its order; x and y have `count` values.
    unsafe { launch.launch(config) }?;
    drop(y);
    Ok(out)
}
