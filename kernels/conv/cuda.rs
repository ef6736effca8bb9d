//! The causal convolution on CUDA: chooses the kernel by width and alignment, and the tokens of a tile.

use candle_core::{CudaStorage, DType, Layout, Result, bail};

use super::CausalConv1d;
use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, floats};

/// By width, from 2.
static SCALAR: [Floats; 3] = [
    floats!(CONV, "causal_conv1d_scalar_2"),
    floats!(CONV, "causal_conv1d_scalar_3"),
    floats!(CONV, "causal_conv1d_scalar_4"),
];
/// The same; move 16 bytes of `x` at a time.
static VECTOR: [Floats; 3] = [
    floats!(CONV, "causal_conv1d_vector_2"),
    floats!(CONV, "causal_conv1d_vector_3"),
    floats!(CONV, "causal_conv1d_vector_4"),
];

/// Of a block, as in the kernels.
const THREADS: usize = 128;
/// Tokens of a tile, longest first: a long one reads fewer inputs twice.
const TILES: [usize; 3] = [32, 16, 8];
/// What fills a GPU.
const BLOCKS: usize = 1024;

impl CausalConv1d<'_> {
    pub(super) fn run_cuda(&self, state: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (batch, (n, channels), dtype) = (self.batch, self.x.dims2()?, self.x.dtype());
        let device = state.device.clone();
        let stream = device.cuda_stream();
        let weight = self.weight.to_dtype(DType::F32)?;
        let x = Operand::new(self.x);
        let x = x.cuda_rows(&stream)?;
        let arrays = [&weight, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);
        let [weight, starts, lens, slots] = arrays.each_ref().map(|operand| operand.cuda(&stream));
        let (weight, starts, lens, slots) = (weight?, starts?, lens?, slots?);
        let state = cuda::write(state, layout, &stream)?;

        let wide = 16 / dtype.size_in_bytes();
        let are_aligned = x.are_aligned(16, dtype) && weight.is_aligned(16) && state.is_aligned(16);
        let (kernels, wide) = if channels.is_multiple_of(wide) && are_aligned { (&VECTOR, wide) } else { (&SCALAR, 1) };
        let width = self.weight.dim(1)?;
        let Some(kernel) = width.checked_sub(2).and_then(|index| kernels.get(index)) else {
            bail!("causal_conv1d: a width of {width}, the cuda kernels take 2 to 4")
        };
        let groups = (channels / wide).div_ceil(THREADS);
        let fills = |tile: &usize| n.div_ceil(*tile) * groups >= BLOCKS;
        let tile = match batch.num_sequences() {
            sequences if sequences == n => 1,
            _ => TILES.into_iter().find(fills).unwrap_or(TILES[TILES.len() - 1]),
        };
        let blocks = n.div_ceil(tile) * groups;
        let [tokens, sequences, channels, tile] = [n, batch.num_sequences(), channels, tile].map(|size| size as u32);
        let out = cuda::output(&device, self.x.shape(), dtype, |y| {
            let y = cuda::write(y, &Layout::contiguous(self.x.shape()), &stream)?;
            let mut launch = EarlyLaunch::new(&device, kernel.of(dtype)?)?;
            launch.arg(&x.address.value).arg(&x.strides[0]);
            for address in [&weight, &state, &y, &starts, &lens, &slots] {
                launch.arg(&address.value);
            }
            launch.arg(&tokens).arg(&sequences).arg(&channels).arg(&tile);
            // SAFETY: the arguments are the kernel's, in its order; `causal_conv1d` has compared their shapes with each
            // other and the batch's slots with the state.
            unsafe { launch.launch(cuda::grid(blocks, (THREADS, 1))?) }
        })?;
        self.out.set(out).expect("run once");
        Ok(())
    }
}
