//! The most likely token on CUDA, in two launches.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Storage, Tensor};

use crate::cpu::{Operand, tensor};
use crate::cuda::{self, EarlyLaunch, Floats, Kernel, floats, modules};

static ARGMAX: Floats = floats!(ARGMAX, "argmax");
static ARGMAX_OF_BLOCKS: Kernel = Kernel::new(&modules::ARGMAX, "argmax_of_blocks");

/// Of a block, as in the kernel.
const THREADS: usize = 256;
/// Of a row at most.
const MAX_BLOCKS: usize = 64;

/// `x` `[n, V]` contiguous.
pub fn argmax(device: &CudaDevice, x: &Tensor, limit: usize) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let stream = device.cuda_stream();
    let mut out = cuda::uninit(device, &Shape::from(n), DType::U32)?;
    if n > 0 {
        let blocks = limit.div_ceil(8 * THREADS).clamp(1, MAX_BLOCKS);
        // Keys of 64 bits, as pairs.
        let shape = Shape::from((n, blocks, 2));
        let mut keys = cuda::uninit(device, &shape, DType::U32)?;
        let operand = Operand::new(x);
        let x_address = operand.cuda(&stream)?;
        let keys = cuda::write(&mut keys, &Layout::contiguous(&shape), &stream)?;
        let indices = cuda::write(&mut out, &Layout::contiguous(n), &stream)?;
        let [width, limit, of_row] = [width, limit, blocks].map(|size| size as u32);
        let mut launch = EarlyLaunch::new(device, ARGMAX.of(x.dtype())?)?;
        launch.arg(&x_address.value).arg(&width).arg(&limit).arg(&keys.value);
        let config =
            LaunchConfig { grid_dim: (of_row, n as u32, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, in its order; `limit` is at most the width of a row.
        unsafe { launch.launch(config) }?;
        let mut launch = EarlyLaunch::new(device, &ARGMAX_OF_BLOCKS)?;
        launch.arg(&keys.value).arg(&of_row).arg(&indices.value);
        // SAFETY: the arguments are the kernel's, in its order.
        unsafe { launch.launch(cuda::grid(n, (32, 1))?) }?;
    }
    Ok(tensor(Storage::Cuda(out), n))
}
