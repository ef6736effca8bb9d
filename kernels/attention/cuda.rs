//! Writing keys and values into their pages on CUDA: chooses the word that rows are copied by.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::PushKernelArg;
use candle_core::{CudaStorage, Layout, Result, bail};

use crate::Batch;
use crate::cpu::Operand;
use crate::cuda::{self, Kernel, modules};

/// Of a block.
const THREADS: usize = 256;

/// By bytes of a word, widest first.
static WRITE_KV: [(usize, Kernel); 3] = [
    (16, Kernel::new(&modules::ATTENTION, "write_kv_u128")),
    (4, Kernel::new(&modules::ATTENTION, "write_kv_u32")),
    (2, Kernel::new(&modules::ATTENTION, "write_kv_u16")),
];

/// `kv` `[2, blocks, block_size, Hk, D]` contiguous, `k` and `v` `[N, Hk, D]` in rows, all of one dtype.
pub fn write_kv(
    kv: &mut CudaStorage,
    layout: &Layout,
    (k, kl): (&CudaStorage, &Layout),
    (v, vl): (&CudaStorage, &Layout),
    batch: &Batch,
) -> Result<()> {
    let (_, blocks, block_size, heads, d) = layout.shape().dims5()?;
    let (device, dtype) = (kv.device.clone(), kv.dtype());
    let stream = device.cuda_stream();
    let slots = Operand::new(&batch.slot_mapping);
    let kv = cuda::write(kv, layout, &stream)?;
    let (k, v) = (cuda::read_rows(k, kl, &stream)?, cuda::read_rows(v, vl, &stream)?);
    let slots = slots.cuda(&stream)?;

    // Heads that lie side by side are one.
    let is_whole = [&k, &v].iter().all(|rows| rows.strides[1] as usize == d);
    let (heads, d) = if is_whole { (1, heads * d) } else { (heads, d) };
    let fits = |word: usize| {
        (d * dtype.size_in_bytes()).is_multiple_of(word)
            && kv.is_aligned(word)
            && [&k, &v].iter().all(|rows| rows.are_aligned(word, dtype))
    };
    let Some((word, kernel)) = WRITE_KV.iter().find(|(word, _)| fits(*word)) else {
        bail!("write_kv: pages of {dtype:?}, expected f32, f16 or bf16")
    };
    let values = word / dtype.size_in_bytes();
    let (d, plane) = (d / values, (blocks * block_size * heads * d / values) as u64);
    let [k_strides, v_strides] = [&k, &v].map(|rows| rows.strides.map(|stride| stride / values as u32));
    let threads = (1 << d.ilog2()).min(THREADS);
    let mut config = cuda::grid(batch.num_tokens(), (threads, heads.min(THREADS / threads)))?;
    config.grid_dim.1 = 2;
    let [heads, d] = [heads, d].map(|size| size as u32);
    let mut launch = stream.launch_builder(kernel.on(&device)?);
    launch.arg(&kv.value);
    for (rows, strides) in [(&k, &k_strides), (&v, &v_strides)] {
        launch.arg(&rows.address.value).arg(&strides[0]).arg(&strides[1]);
    }
    launch.arg(&slots.value).arg(&plane).arg(&heads).arg(&d);
    // SAFETY: the arguments are the kernel's, in its order; `Batch` keeps every slot within the pages that
    // `check_blocks` compared with kv.
    unsafe { launch.launch(config) }.w()?;
    Ok(())
}
