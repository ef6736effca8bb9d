//! The activations on CUDA: chooses wide or single accesses.

use candle_core::{CudaDevice, Layout, Result, Tensor};

use super::Activation;
use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, floats};

/// A kernel value by value, and 16 bytes at a time.
struct Widths {
    single: Floats,
    wide: Floats,
}

static SILU: Widths =
    Widths { single: floats!(ACTIVATION, "silu_gated"), wide: floats!(ACTIVATION, "silu_gated", "_wide") };
static GELU_TANH: Widths =
    Widths { single: floats!(ACTIVATION, "gelu_tanh_gated"), wide: floats!(ACTIVATION, "gelu_tanh_gated", "_wide") };
static SIGMOID: Widths =
    Widths { single: floats!(ACTIVATION, "sigmoid_gated"), wide: floats!(ACTIVATION, "sigmoid_gated", "_wide") };
static GELU: Widths = Widths { single: floats!(ACTIVATION, "gelu"), wide: floats!(ACTIVATION, "gelu", "_wide") };
static SOFTCAP: Widths =
    Widths { single: floats!(ACTIVATION, "softcap"), wide: floats!(ACTIVATION, "softcap", "_wide") };

/// Of a block.
const THREADS: usize = 256;
/// Of a launch whose threads take several values each.
const MAX_BLOCKS: usize = 4096;

/// `gate_up` `[N, 2 * width]` in rows.
pub fn gated_activation(device: &CudaDevice, gate_up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (_, width) = gate_up.dims2()?;
    gated_by(device, &gate_up.narrow(1, 0, width / 2)?, &gate_up.narrow(1, width / 2, width / 2)?, activation)
}

/// `gate` and `up` of one shape, in rows.
pub fn gated_by(device: &CudaDevice, gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let kernel = match activation {
        Activation::Silu => &SILU,
        Activation::GeluTanh => &GELU_TANH,
    };
    paired(device, kernel, gate, up)
}

/// `x` and `gate` of one shape, in rows.
pub fn sigmoid_gated(device: &CudaDevice, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
    paired(device, &SIGMOID, x, gate)
}

fn paired(device: &CudaDevice, kernel: &Widths, a: &Tensor, b: &Tensor) -> Result<Tensor> {
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
pub fn gelu(device: &CudaDevice, x: &Tensor) -> Result<Tensor> {
    map(device, &GELU, x, None)
}

/// `x` of any shape, contiguous.
pub fn softcap(device: &CudaDevice, x: &Tensor, cap: f32) -> Result<Tensor> {
    map(device, &SOFTCAP, x, Some(cap))
}

fn map(device: &CudaDevice, kernel: &Widths, x: &Tensor, parameter: Option<f32>) -> Result<Tensor> {
    let (dtype, shape, count) = (x.dtype(), x.shape(), x.elem_count());
    let stream = device.cuda_stream();
    let x = Operand::new(x);
    let x = x.cuda(&stream)?;
    let wide = 16 / dtype.size_in_bytes();
    let is_wide = count.is_multiple_of(wide) && x.is_aligned(16);
    let (kernel, packs) = if is_wide { (&kernel.wide, count / wide) } else { (&kernel.single, count) };
    cuda::output(device, shape, dtype, |y| {
        if count == 0 {
            return Ok(());
        }
        let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
        let config = cuda::grid(packs.div_ceil(THREADS).min(MAX_BLOCKS), (THREADS, 1))?;
        let count = count as u64;
        let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
        launch.arg(&x.value).arg(&y.value).arg(&count);
        if let Some(parameter) = &parameter {
            launch.arg(parameter);
        }
        // SAFETY: the arguments are the kernel's, in its order; x and y have `count` values.
        unsafe { launch.launch(config) }
    })
}
