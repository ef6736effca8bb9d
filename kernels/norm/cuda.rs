//! The norms on CUDA: chooses wide or single accesses and the threads of a row.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, Layout, Result, Tensor};

use super::Then;
use crate::cpu::{Operand, with_heads};
use crate::cuda::{self, EarlyLaunch, Floats, floats};

static SCALAR: Floats = floats!(NORM, "rms_norm_scalar");
/// Moves 16 bytes at a time.
static VECTOR: Floats = floats!(NORM, "rms_norm_vector");
static GATED_SCALAR: Floats = floats!(NORM, "rms_norm_gated_scalar");
static GATED_VECTOR: Floats = floats!(NORM, "rms_norm_gated_vector");
static ADD_SCALAR: Floats = floats!(NORM, "add_rms_norm_scalar");
static ADD_VECTOR: Floats = floats!(NORM, "add_rms_norm_vector");
static LAYER_SCALAR: Floats = floats!(NORM, "add_layer_norm_scalar");
static LAYER_VECTOR: Floats = floats!(NORM, "add_layer_norm_vector");

/// Of a block, unless a row needs more.
const THREADS: usize = 256;
/// Accesses of a row that a thread keeps in registers.
const KEPT: usize = 2;

/// `x` `[.., D]` in rows, `weight` `[D]` contiguous.
pub fn rms_norm(device: &CudaDevice, x: &Tensor, weight: &Tensor, eps: f32, then: Then) -> Result<Tensor> {
    let (shape, dtype, d) = (x.shape(), x.dtype(), weight.elem_count());
    let rows = cuda::rows_of(x.layout());
    let stream = device.cuda_stream();
    let other = match then {
        Then::Nothing => None,
        Then::Gate(other) | Then::Add(other, _) => Some(Operand::new(other)),
    };
    let (x, weight) = (Operand::new(x), Operand::new(weight));
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let other_layout = other.as_ref().map(|other| with_heads(other.layout, shape));
    let other = other.zip(other_layout.as_ref()).map(|(other, layout)| Operand { layout, ..other });
    let other = other.as_ref().map(|other| other.cuda_rows(&stream)).transpose()?;

    let wide = 16 / dtype.size_in_bytes();
    let are_aligned = [Some(&x), other.as_ref()].into_iter().flatten().all(|rows| rows.are_aligned(16, dtype));
    let is_vector = d.is_multiple_of(wide) && are_aligned && weight.is_aligned(16);
    let kernel = match (is_vector, &then) {
        (true, Then::Nothing) => &VECTOR,
        (true, Then::Gate(_)) => &GATED_VECTOR,
        (true, Then::Add(..)) => &ADD_VECTOR,
        (false, Then::Nothing) => &SCALAR,
        (false, Then::Gate(_)) => &GATED_SCALAR,
        (false, Then::Add(..)) => &ADD_SCALAR,
    };
    let config = config(rows, if is_vector { d / wide } else { d })?;
    let (num_rows, num_columns) = (rows as u32, d as u32);
    cuda::output(device, shape, dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
        for rows in [Some(&x), other.as_ref()].into_iter().flatten() {
            launch.arg(&rows.address.value).rows(rows);
        }
        launch.arg(&weight.value).arg(&y.value).arg(&num_rows).arg(&num_columns).arg(&eps);
        if let Then::Add(_, factor) = &then {
            launch.arg(factor);
        }
        // SAFETY: the arguments are the kernel's, in its order; x, the other and y have `rows` rows of `d` values, weight `d`.
        unsafe { launch.launch(config) }
    })
}

/// `x` and `residual` `[.., D]` in rows, `weight` and `bias` `[D]` contiguous.
pub fn add_layer_norm(
    device: &CudaDevice,
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f32,
) -> Result<Tensor> {
    let (shape, dtype, d) = (x.shape(), x.dtype(), weight.elem_count());
    let rows = cuda::rows_of(x.layout());
    let stream = device.cuda_stream();
    let [x, residual, weight, bias] = [x, residual, weight, bias].map(Operand::new);
    let (x, residual) = (x.cuda_rows(&stream)?, residual.cuda_rows(&stream)?);
    let (weight, bias) = (weight.cuda(&stream)?, bias.cuda(&stream)?);

    let wide = 16 / dtype.size_in_bytes();
    let is_vector = d.is_multiple_of(wide)
        && [&x, &residual].iter().all(|rows| rows.are_aligned(16, dtype))
        && weight.is_aligned(16)
        && bias.is_aligned(16);
    let kernel = if is_vector { &LAYER_VECTOR } else { &LAYER_SCALAR };
    let config = config(rows, if is_vector { d / wide } else { d })?;
    let (num_rows, num_columns) = (rows as u32, d as u32);
    cuda::output(device, shape, dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
        launch.arg(&x.address.value).rows(&x).arg(&residual.address.value).rows(&residual);
        launch.arg(&weight.value).arg(&bias.value).arg(&y.value).arg(&num_rows).arg(&num_columns).arg(&eps);
        // SAFETY: the arguments are the kernel's, in its order; x, residual and y have `rows` rows of `d` values, weight
        // and bias `d`.
        unsafe { launch.launch(config) }
    })
}

/// The threads of rows that take `accesses` each.
fn config(rows: usize, accesses: usize) -> Result<LaunchConfig> {
    let threads = (1 << (accesses / KEPT).max(1).ilog2()).min(1024);
    // Rows of more than a warp would share the memory that their warps meet in.
    let rows_per_block = if threads <= 32 { THREADS / threads } else { 1 };
    cuda::grid(rows.div_ceil(rows_per_block), (threads, rows_per_block))
}
