//! Rows of a table, such as the embeddings of a step's tokens.

#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[cfg(test)]
mod tests;

use std::ops::Range;

use candle_core::{DType, Result, Tensor, bail};

/// The rows that `ids` name:
///
/// ```text
/// y[n] = table[ids[n]]
/// ```
///
/// `table` `[V, D]` contiguous, in f32, f16 or bf16; `ids` `[N]` in u32. Returns `[N, D]` of the table's dtype. On CUDA and
/// Metal an id beyond the table gives zeros.
///
/// # Errors
///
/// `ids` is of another dtype; on the CPU, an id beyond the table.
///
/// Devices: CUDA, Metal; elsewhere through candle's `index_select`.
pub fn gather(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    gather_columns(table, 0..table.dim(1)?, ids)
}

/// As [`gather`], of the given columns alone.
///
/// # Errors
///
/// As [`gather`], or columns beyond the table's.
pub fn gather_columns(table: &Tensor, columns: Range<usize>, ids: &Tensor) -> Result<Tensor> {
    let n = ids.dims1()?;
    if ids.dtype() != DType::U32 {
        bail!("gather: ids are {:?} [{n}], expected u32", ids.dtype())
    }
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = table.device() {
        return cuda::gather(device, &table.narrow(1, columns.start, columns.len())?, &ids.contiguous()?);
    }
    on_metal!(table, backend => {
        metal::gather(backend, &table.narrow(1, columns.start, columns.len())?, &ids.contiguous()?)
    });
    table.index_select(ids, 0)?.narrow(1, columns.start, columns.len())?.contiguous()
}
