//! Accelerators: how one is opened for these kernels, and what memory it has left.

use candle_core::Device;
#[cfg(feature = "cuda")]
use candle_core::Result;

/// The first CUDA GPU, with a stream of its own. Nothing else may use the device's memory from another stream: candle
/// does not order streams by events here, which costs more than a small kernel takes. Freed memory stays with the
/// process.
///
/// # Errors
///
/// There is no such GPU, or its driver is too old.
#[cfg(feature = "cuda")]
pub fn cuda() -> Result<Device> {
    crate::cuda::open(0)
}

/// Bytes that are free on an accelerator; `None` for the CPU and where the accelerator does not say.
pub fn free_memory(device: &Device) -> Option<usize> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::free_memory(device).ok(),
        _ => None,
    }
}
