//! The rotary embedding on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Tensor};

use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, Kernel, floats, modules};

static ROPE: Floats = floats!(ROPE, "rope");
static ROTATIONS: Kernel = Kernel::new(&modules::ROPE, "rotations");

/// Of a block.
const THREADS: usize = 256;

/// `x` `[N, heads, D]` in rows, `cos` and `sin` `[N, R/2]` contiguous.
pub fn rope(
    (x, xl): (&CudaStorage, &Layout),
    (cos, cl): (&CudaStorage, &Layout),
    (sin, sl): (&CudaStorage, &Layout),
) -> Result<CudaStorage> {
    let (n, heads, d) = xl.shape().dims3()?;
    let (_, half) = cl.shape().dims2()?;
    let (device, dtype) = (&x.device, x.dtype());
    let stream = device.cuda_stream();
    let mut out = cuda::uninit(device, xl.shape(), dtype)?;
    let x = cuda::read_rows(x, xl, &stream)?;
    let (cos, sin) = (cuda::read(cos, cl, &stream)?, cuda::read(sin, sl, &stream)?);
    let y = cuda::write(&mut out, &Layout::contiguous(xl.shape()), &stream)?;
    let threads = (1 << (d - half).max(1).ilog2()).clamp(32, THREADS);
    let (half, d) = (half as u32, d as u32);
    let mut launch = stream.launch_builder(ROPE.of(dtype)?.on(device)?);
    launch.arg(&x.address.value).arg(&x.heads).arg(&x.strides[0]).arg(&x.strides[1]);
    launch.arg(&cos.value).arg(&sin.value).arg(&y.value).arg(&half).arg(&d);
    // SAFETY: the arguments are the kernel's, in its order; `rope` has compared their shapes.
    unsafe { launch.launch(cuda::grid(n, (threads, heads.min(THREADS / threads)))?) }.w()?;
    drop(y);
    Ok(out)
}

/// `positions` `[N]`, `inv_freq` `[R/2]`; cosines and sines as `[2, N, R/2]`.
pub fn rotations(device: &CudaDevice, positions: &Tensor, inv_freq: &Tensor) -> Result<Tensor> {
    let (n, half) = (positions.elem_count(), inv_freq.elem_count());
    let shape = Shape::from((2, n, half));
    cuda::output(device, shape.clone(), DType::F32, |out| {
        if n * half == 0 {
            return Ok(());
        }
        let stream = device.cuda_stream();
        let (positions, inv_freq) = (Operand::new(positions), Operand::new(inv_freq));
        let (positions, inv_freq) = (positions.cuda(&stream)?, inv_freq.cuda(&stream)?);
        let out = cuda::write(out, &Layout::contiguous(&shape), &stream)?;
        let (half, count) = (half as u32, (n * half) as u32);
        let mut launch = EarlyLaunch::new(device, &ROTATIONS)?;
        launch.arg(&positions.value).arg(&inv_freq.value).arg(&out.value).arg(&half).arg(&count);
        // SAFETY: the arguments are the kernel's, in its order; the output has two halves of `count` values.
        unsafe { launch.launch(cuda::grid((n * half as usize).div_ceil(THREADS), (THREADS, 1))?) }
    })
}
