//! Accelerators: how one is opened for these kernels, what memory it has left, and what goes there and back.

use candle_core::{DType, Device, Error, Result, Shape, Tensor, bail};

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

/// Runs a step's work. On Metal within a pool of its own for what Objective-C releases later: without one, a program whose
/// threads do not return to a run loop keeps every command buffer that it ever made. Then idle buffers are given back, if
/// there are too many of them.
///
/// # Errors
///
/// As the work, or what the device was given before has failed.
pub fn step<T, E: From<Error>>(
    device: &Device,
    work: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    #[cfg(feature = "metal")]
    if let Device::Metal(metal) = device {
        return objc2::rc::autoreleasepool(|_| {
            let result = work()?;
            crate::metal::device::settle(metal)?;
            Ok(result)
        });
    }
    let _ = device;
    work()
}

/// Whether [`upload`] serves `device`.
pub fn takes_uploads(device: &Device) -> bool {
    device.is_cuda()
}

/// A tensor of the little-endian elements in `parts`, one after the other, f32, f16, bf16 or u32. The host is read in
/// parallel, and while the device takes what was read before. `done(i)` is told of each part that is needed no longer.
///
/// # Errors
///
/// The bytes are not those of `shape`, the dtype is another, or the device has no memory left, or is no CUDA GPU.
pub fn upload(
    device: &Device,
    shape: impl Into<Shape>,
    dtype: DType,
    parts: &[&[u8]],
    done: impl Fn(usize),
) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::upload(device, &shape.into(), dtype, parts, done),
        _ => {
            let _ = (shape.into(), dtype, parts, done);
            bail!("upload: {:?} is no cuda gpu", device.location())
        }
    }
}

/// Numbers on their way from a device to the host, which does not wait for what the device has been given since.
pub struct Download(Way);

enum Way {
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Download),
    There(Vec<u32>),
}

impl Download {
    /// `numbers` `[n]` in u32, as they are behind what was queued so far.
    ///
    /// # Errors
    ///
    /// Another dtype or rank, or the device refuses.
    pub fn new(numbers: &Tensor) -> Result<Self> {
        if numbers.dtype() != DType::U32 || numbers.rank() != 1 {
            bail!("download: {:?} {:?}, expected u32 [n]", numbers.dtype(), numbers.dims())
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = numbers.device() {
            return crate::cuda::Download::new(device, &numbers.contiguous()?).map(Way::Cuda).map(Self);
        }
        numbers.to_vec1().map(Way::There).map(Self)
    }

    /// The numbers, when they are there.
    ///
    /// # Errors
    ///
    /// What the device was given before has failed.
    pub fn wait(self) -> Result<Vec<u32>> {
        match self.0 {
            #[cfg(feature = "cuda")]
            Way::Cuda(download) => download.wait(),
            Way::There(numbers) => Ok(numbers),
        }
    }
}
