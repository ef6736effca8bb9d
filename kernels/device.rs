//! Accelerators: how one is opened for these kernels, what memory it has left, and what goes there and back.

use candle_core::{DType, Device, Error, Result, Shape, Tensor, WithDType, bail};

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

/// The first Metal GPU.
///
/// # Errors
///
/// There is none, as on a virtual machine: candle would panic.
#[cfg(feature = "metal")]
pub fn metal() -> Result<Device> {
    if candle_metal_kernels::metal::Device::all().is_empty() {
        bail!("this machine has none")
    }
    Device::new_metal(0)
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

/// A tensor `[n]` of `numbers`, which a device takes without waiting for what it was given before.
pub(crate) fn numbers(numbers: Vec<u32>, device: &Device) -> Result<Tensor> {
    match device {
        #[cfg(feature = "cuda")]
        Device::Cuda(device) => crate::cuda::numbers(device, &numbers),
        _ => Tensor::new(numbers, device),
    }
}

/// Values on their way from a device to the host, which does not wait for what the device has been given since.
pub struct Download<T>(Way<T>);

enum Way<T> {
    #[cfg(feature = "cuda")]
    Cuda(crate::cuda::Download),
    There(Vec<T>),
}

impl<T: WithDType> Download<T> {
    /// The elements of `values`, as they are behind what was queued so far.
    ///
    /// # Errors
    ///
    /// They are of another dtype than `T`, or the device refuses.
    pub fn new(values: &Tensor) -> Result<Self> {
        if values.dtype() != T::DTYPE {
            bail!("download: {:?}, expected {:?}", values.dtype(), T::DTYPE)
        }
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = values.device() {
            return crate::cuda::Download::new(device, &values.contiguous()?).map(Way::Cuda).map(Self);
        }
        values.flatten_all()?.to_vec1().map(Way::There).map(Self)
    }

    /// The values, when they are there.
    ///
    /// # Errors
    ///
    /// What the device was given before has failed.
    pub fn wait(self) -> Result<Vec<T>> {
        match self.0 {
            #[cfg(feature = "cuda")]
            Way::Cuda(download) => download.wait(),
            Way::There(values) => Ok(values),
        }
    }
}
