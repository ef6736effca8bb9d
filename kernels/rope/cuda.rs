//! The rotary embedding on CUDA.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use crate::cpu::{Operand, tensor};
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

/// `positions` `[N]`, `inv_freq` `[R/2]`.
pub fn rotations(device: &CudaDevice, positions: &Tensor, inv_freq: &Tensor) -> Result<(Tensor, Tensor)> {
    let shape = Shape::from((positions.elem_count(), inv_freq.elem_count()));
    let stream = device.cuda_stream();
    let mut outs = [cuda::uninit(device, &shape, DType::F32)?, cuda::uninit(device, &shape, DType::F32)?];
    let (half, count) = (inv_freq.elem_count() as u32, shape.elem_count() as u32);
    if count > 0 {
        let (positions, inv_freq) = (Operand::new(positions), Operand::new(inv_freq));
        let (positions, inv_freq) = (positions.cuda(&stream)?, inv_freq.cuda(&stream)?);
        let layout = Layout::contiguous(&shape);
        let [cos, sin] = outs.each_mut().map(|out| cuda::write(out, &layout, &stream));
        let (cos, sin) = (cos?, sin?);
        let mut launch = EarlyLaunch::new(device, &ROTATIONS)?;
        for address in [&positions, &inv_freq, &cos, &sin] {
            launch.arg(&address.value);
        }
        launch.arg(&half).arg(&count);
        // SAFETY: the arguments are the kernel's, in its order; the outputs have `count` values.
        unsafe { launch.launch(cuda::grid(shape.elem_count().div_ceil(THREADS), (THREADS, 1))?) }?;
    }
    let [cos, sin] = outs.map(|out| tensor(Storage::Cuda(out), shape.clone()));
    Ok((cos, sin))
}
