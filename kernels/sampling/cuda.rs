//! The choice of tokens on CUDA, in two launches each.

use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, DType, Layout, Result, Shape, Tensor};

use super::MAX_K;
use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, Kernel, floats, modules};

static ARGMAX: Floats = floats!(ARGMAX, "argmax");
static ARGMAX_OF_BLOCKS: Kernel = Kernel::new(&modules::ARGMAX, "argmax_of_blocks");
static BEST_OF_CHUNKS: Floats = floats!(SAMPLING, "best_of_chunks");
static DRAW_OF_BEST: Kernel = Kernel::new(&modules::SAMPLING, "draw_of_best");

/// Of a block of [`argmax`], as in the kernel.
const THREADS: usize = 256;
/// Of a row of [`argmax`] at most.
const MAX_BLOCKS: usize = 64;

/// Of a block of [`sample`], and values that it sorts, as in the kernels.
const SORTING_THREADS: usize = 512;
const CHUNK: usize = 4096;
/// The last block of a row sorts the best of all.
pub const MAX_LIMIT: usize = CHUNK / MAX_K * CHUNK;

/// `x` `[n, V]` contiguous.
pub fn argmax(device: &CudaDevice, x: &Tensor, limit: usize) -> Result<Tensor> {
    let blocks = limit.div_ceil(8 * THREADS).clamp(1, MAX_BLOCKS);
    let keys = keys(device, ARGMAX.of(x.dtype())?, x, limit, [blocks, 1], THREADS)?;
    of_rows(device, &ARGMAX_OF_BLOCKS, &keys, blocks, None, 32)
}

/// `x` `[n, V]` contiguous, `draws` the words of `n` of them; `limit` at most [`MAX_LIMIT`].
pub fn sample(device: &CudaDevice, x: &Tensor, limit: usize, draws: &Tensor) -> Result<Tensor> {
    let chunks = limit.div_ceil(CHUNK);
    let keys = keys(device, BEST_OF_CHUNKS.of(x.dtype())?, x, limit, [chunks, MAX_K], SORTING_THREADS)?;
    of_rows(device, &DRAW_OF_BEST, &keys, chunks, Some(draws), SORTING_THREADS)
}

/// What `blocks` blocks find in each row: `of_block` keys of 64 bits each, as pairs.
fn keys(
    device: &CudaDevice,
    kernel: &Kernel,
    x: &Tensor,
    limit: usize,
    [blocks, of_block]: [usize; 2],
    threads: usize,
) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let stream = device.cuda_stream();
    let shape = Shape::from((n, blocks * of_block, 2));
    let [row, taken] = [width, limit].map(|size| size as u32);
    cuda::output(device, shape.clone(), DType::U32, |keys| {
        if n == 0 {
            return Ok(());
        }
        let x = Operand::new(x);
        let x = x.cuda(&stream)?;
        let keys = cuda::write(keys, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel)?;
        launch.arg(&x.value).arg(&row).arg(&taken).arg(&keys.value);
        let grid_dim = (blocks as u32, n as u32, 1);
        let config = LaunchConfig { grid_dim, block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, in its order; `limit` is at most the width of a row.
        unsafe { launch.launch(config) }
    })
}

/// The index that a block chooses for each row from the keys of `blocks` others.
fn of_rows(
    device: &CudaDevice,
    kernel: &Kernel,
    keys: &Tensor,
    blocks: usize,
    draws: Option<&Tensor>,
    threads: usize,
) -> Result<Tensor> {
    let (n, stream, blocks) = (keys.dim(0)?, device.cuda_stream(), blocks as u32);
    cuda::output(device, n, DType::U32, |indices| {
        if n == 0 {
            return Ok(());
        }
        let (keys, draws) = (Operand::new(keys), draws.map(Operand::new));
        let keys = keys.cuda(&stream)?;
        let draws = draws.as_ref().map(|draws| draws.cuda(&stream)).transpose()?;
        let indices = cuda::write(indices, &Layout::contiguous(n), &stream)?;
        let mut launch = EarlyLaunch::new(device, kernel)?;
        launch.arg(&keys.value).arg(&blocks);
        if let Some(draws) = &draws {
            launch.arg(&draws.value);
        }
        launch.arg(&indices.value);
        // SAFETY: the arguments are the kernel's, in its order; there is a draw for each row.
        unsafe { launch.launch(cuda::grid(n, (threads, 1))?) }
    })
}
