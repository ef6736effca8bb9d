//! Work recorded once and launched again over the same addresses, as CUDA graphs do: a step of many small kernels costs
//! the host one call.

use candle_core::{Device, Result};

/// A recorded piece of work. It holds on to nothing: whoever records it keeps the tensors that it reads and writes.
pub struct Graph {
    #[cfg(feature = "cuda")]
    recorded: crate::cuda::Recorded,
}

/// What [`Graph::rehearse`] has found out.
#[derive(Clone, Copy, Debug)]
pub struct Rehearsal {
    /// Of all outputs.
    bytes: usize,
}

impl Graph {
    /// Whether work on `device` can be recorded.
    pub fn is_available(device: &Device) -> bool {
        device.is_cuda()
    }

    /// Runs `work` as it is, so that [`Graph::record`] finds loaded what it needs, and knows the memory that it takes.
    ///
    /// # Errors
    ///
    /// What `work` returns.
    pub fn rehearse<T>(device: &Device, work: impl FnOnce() -> Result<T>) -> Result<(T, Rehearsal)> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            let _kept = device.enable_cuda_graph_htod_cache();
            let (result, bytes) = crate::cuda::measure(work)?;
            return Ok((result, Rehearsal { bytes }));
        }
        let _ = device;
        Ok((work()?, Rehearsal { bytes: 0 }))
    }

    /// Records what `work` would do, which was rehearsed in the same shapes. Nothing is computed: `work` must not read a
    /// result, nor copy from the host, nor let a tensor that it makes live on.
    ///
    /// # Errors
    ///
    /// The device cannot record, `work` fails, or it does what cannot be recorded.
    pub fn record(device: &Device, rehearsal: &Rehearsal, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        match device {
            #[cfg(feature = "cuda")]
            Device::Cuda(device) => {
                let _kept = device.enable_cuda_graph_htod_cache();
                Ok(Self { recorded: crate::cuda::Recorded::new(device, rehearsal.bytes, work)? })
            }
            _ => {
                let _ = (work, rehearsal.bytes);
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
