//! RMS normalisation on CUDA, plain and gated: chooses wide or single accesses and the threads of a row.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, CudaStorage, Layout, Result, Tensor};

use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, floats};

static SCALAR: Floats = floats!(NORM, "rms_norm_scalar");
/// Moves 16 bytes at a time.
static VECTOR: Floats = floats!(NORM, "rms_norm_vector");
static GATED_SCALAR: Floats = floats!(NORM, "rms_norm_gated_scalar");
static GATED_VECTOR: Floats = floats!(NORM, "rms_norm_gated_vector");

/// Of a block, unless a row needs more.
const THREADS: usize = 256;
/// Accesses of a row that a thread keeps in registers.
const KEPT: usize = 2;

/// `x` and `gate` `[.., D]` in rows, `weight` `[D]` contiguous.
pub fn rms_norm(device: &CudaDevice, x: &Tensor, gate: Option<&Tensor>, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (shape, dtype, d) = (x.shape(), x.dtype(), weight.elem_count());
    let rows = cuda::rows_of(x.layout());
    let stream = device.cuda_stream();
    let (x, gate, weight) = (Operand::new(x), gate.map(Operand::new), Operand::new(weight));
    let (x, weight) = (x.cuda_rows(&stream)?, weight.cuda(&stream)?);
    let gate = gate.as_ref().map(|gate| gate.cuda_rows(&stream)).transpose()?;

    let wide = 16 / dtype.size_in_bytes();
    let are_aligned = [Some(&x), gate.as_ref()].into_iter().flatten().all(|rows| rows.are_aligned(16, dtype));
    let is_vector = d.is_multiple_of(wide) && are_aligned && weight.is_aligned(16);
    let kernel = match (is_vector, &gate) {
        (true, None) => &VECTOR,
        (true, Some(_)) => &GATED_VECTOR,
        (false, None) => &SCALAR,
        (false, Some(_)) => &GATED_SCALAR,
    };
    let accesses = if is_vector { d / wide } else { d };
    let threads = (1 << (accesses / KEPT).max(1).ilog2()).min(1024);
    // Rows of more than a warp would share the memory that their warps meet in.
    let rows_per_block = if threads <= 32 { THREADS / threads } else { 1 };
    let config = cuda::grid(rows.div_ceil(rows_per_block), (threads, rows_per_block))?;
    let (num_rows, num_columns) = (rows as u32, d as u32);
    cuda::output(device, shape, dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel.of(dtype)?)?;
        for rows in [Some(&x), gate.as_ref()].into_iter().flatten() {
            launch.arg(&rows.address.value).rows(rows);
        }
        launch.arg(&weight.value).arg(&y.value).arg(&num_rows).arg(&num_columns).arg(&eps);
        // SAFETY: the arguments are the kernel's, in its order; x, gate and y have `rows` rows of `d` values, weight `d`.
        unsafe { launch.launch(config) }
    })
}

static ADD_LAYER_NORM: Floats = floats!(LAYER_NORM, "add_layer_norm");

/// `x` and `residual` `[.., D]` in rows, `weight` and `bias` `[D]` contiguous.
pub fn add_layer_norm(
    (x, xl): (&CudaStorage, &Layout),
    (residual, rl): (&CudaStorage, &Layout),
    (weight, wl): (&CudaStorage, &Layout),
    bias: &Tensor,
    eps: f32,
) -> Result<CudaStorage> {
    let (device, dtype, d) = (&x.device, x.dtype(), wl.shape().elem_count());
    let stream = device.cuda_stream();
    let bias = Operand::new(bias);
    let mut out = cuda::uninit(device, xl.shape(), dtype)?;
    let (x, residual) = (cuda::read_rows(x, xl, &stream)?, cuda::read_rows(residual, rl, &stream)?);
    let (weight, bias) = (cuda::read(weight, wl, &stream)?, bias.cuda(&stream)?);
    let y = cuda::write(&mut out, &Layout::contiguous(xl.shape()), &stream)?;
    let config = cuda::grid(cuda::rows_of(xl), (THREADS, 1))?;
    let d = d as u32;
    let mut launch = stream.launch_builder(ADD_LAYER_NORM.of(dtype)?.on(device)?);
    for rows in [&x, &residual] {
        launch.arg(&rows.address.value).arg(&rows.heads).arg(&rows.strides[0]).arg(&rows.strides[1]);
    }
    launch.arg(&weight.value).arg(&bias.value).arg(&y.value).arg(&d).arg(&eps);
    // SAFETY: the arguments are the kernel's, in its order; a block has a row, of `d` values.
    unsafe { launch.launch(config) }.w()?;
    drop(y);
    Ok(out)
}
