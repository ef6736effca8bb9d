//! Rows of a table on CUDA: chooses the width of accesses.

use candle_core::{CudaDevice, Layout, Result, Shape, Tensor};

use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Kernel, modules};

/// By bytes of a word, widest first.
static GATHER: [(usize, Kernel); 3] = [
    (16, Kernel::new(&modules::GATHER, "gather_u128")),
    (4, Kernel::new(&modules::GATHER, "gather_u32")),
    (2, Kernel::new(&modules::GATHER, "gather_u16")),
];

/// Of a block, at most.
const THREADS: usize = 256;

/// `table` `[V, D]` in rows, `ids` `[N]` contiguous.
pub fn gather(device: &CudaDevice, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((rows, d), n, dtype) = (table.dims2()?, ids.elem_count(), table.dtype());
    let shape = Shape::from((n, d));
    let stream = device.cuda_stream();
    let (table, ids) = (Operand::new(table), Operand::new(ids));
    let (table, ids) = (table.cuda_rows(&stream)?, ids.cuda(&stream)?);
    let size = dtype.size_in_bytes();
    let fits = |word: usize| (d * size).is_multiple_of(word) && table.are_aligned(word, dtype);
    let (word, kernel) = GATHER.iter().find(|(word, _)| fits(*word)).unwrap_or(&GATHER[GATHER.len() - 1]);
    cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let words = d * size / word;
        let threads = words.next_power_of_two().min(THREADS);
        let config = cuda::grid(n.div_ceil(THREADS / threads), (threads, THREADS / threads))?;
        let (n, rows, words) = (n as u32, rows as u32, words as u32);
        let stride = u64::from(table.strides[0]) * size as u64 / *word as u64;
        let mut launch = EarlyLaunch::new(device, kernel)?;
        launch.arg(&table.address.value).arg(&stride).arg(&rows).arg(&ids.value).arg(&y.value).arg(&n).arg(&words);
        // SAFETY: the arguments are the kernel's, in its order; y has a row of `words` words for each of `n` ids.
        unsafe { launch.launch(config) }
    })
}
