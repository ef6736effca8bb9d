//! The most likely token on CUDA, in two launches.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor};

use crate::cpu::Operand;
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
    if n == 0 {
        return Tensor::zeros(0, DType::U32, x.device());
    }
    let (stream, kernel) = (device.cuda_stream(), ARGMAX.of(x.dtype())?);
    let blocks = limit.div_ceil(8 * THREADS).clamp(1, MAX_BLOCKS);
    let [row, taken, of_row] = [width, limit, blocks].map(|size| size as u32);
    // Keys of 64 bits, as pairs.
    let shape = Shape::from((n, blocks, 2));
    let keys = cuda::output(device, shape.clone(), DType::U32, |keys| {
        let x = Operand::new(x);
        let x = x.cuda(&stream)?;
        let keys = cuda::write(keys, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel)?;
        launch.arg(&x.value).arg(&row).arg(&taken).arg(&keys.value);
        let config =
            LaunchConfig { grid_dim: (of_row, n as u32, 1), block_dim: (THREADS as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, in its order; `limit` is at most the width of a row.
        unsafe { launch.launch(config) }
    })?;
    cuda::output(device, n, DType::U32, |indices| {
        let keys = Operand::new(&keys);
        let keys = keys.cuda(&stream)?;
        let indices = cuda::write(indices, &Layout::contiguous(n), &stream)?;
        let mut launch = EarlyLaunch::new(device, &ARGMAX_OF_BLOCKS)?;
        launch.arg(&keys.value).arg(&of_row).arg(&indices.value);
        // SAFETY: the arguments are the kernel's, in its order.
        unsafe { launch.launch(cuda::grid(n, (32, 1))?) }
    })
}
