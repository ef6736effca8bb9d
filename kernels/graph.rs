//! Work recorded once and launched again over the same addresses, as CUDA graphs do: a step of many small kernels costs
//! the host one call.

use candle_core::{Device, Result};

/// A recorded piece of work. It holds on to nothing: whoever records it keeps the tensors that it reads and writes.
pub struct Graph {
    #[cfg(feature = "cuda")]
    recorded: crate::cuda::Recorded,
}

impl Graph {
    /// Whether work on `device` can be recorded.
    pub fn is_available(device: &Device) -> bool {
        device.is_cuda()
    }

    /// Runs `work` as it is, so that [`Graph::record`] finds loaded what it needs.
    ///
    /// # Errors
    ///
    /// What `work` returns.
    pub fn rehearse<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<T> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            let _kept = device.enable_cuda_graph_htod_cache();
            return work();
        }
        let _ = device;
        work()
    }

    /// Records what `work` would do, which [`Graph::rehearse`] has done before in the same shapes. Nothing is computed:
    /// `work` must not read a result, nor copy from the host, nor return a tensor that it makes.
    ///
    /// # Errors
    ///
    /// The device cannot record, `work` fails, or it does what cannot be recorded.
    pub fn record(device: &Device, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let _kept = device.enable_cuda_graph_htod_cache();
                Ok(Self { recorded: crate::cuda::Recorded::new(device, work)? })
            }
            _ => {
                drop(work);
                candle_core::bail!("work on {:?} cannot be recorded", device.location())
            }
        }
    }

    /// Queues the recorded work.
    ///
    /// # Errors
    ///
    /// The device refuses.
    pub fn launch(&self) -> Result<()> {
        #[cfg(feature = "cuda")]
        return self.recorded.launch();
        #[cfg(not(feature = "cuda"))]
        unreachable!("nothing is recorded without a device that can")
    }
}
