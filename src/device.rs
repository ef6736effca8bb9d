//! Which device and dtype a model runs with, and how much memory there is.

use candle_core::{DType, Device};
use models::Quantization;

use crate::{Error, Result};

/// Where to run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// An accelerator that this build and machine have, else the CPU.
    #[default]
    Auto,
    Cpu,
    Cuda,
    Metal,
}

impl DeviceChoice {
    /// Opens the device.
    ///
    /// # Errors
    ///
    /// The device was asked for by name and this build or machine does not have it.
    pub fn open(self) -> Result<Device> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Auto => Ok(cuda().or_else(|_| metal()).unwrap_or(Device::Cpu)),
            Self::Cuda => cuda(),
            Self::Metal => metal(),
        }
    }
}

/// The dtype of activations that suits a device: on the CPU all arithmetic is f32 anyway.
pub fn default_dtype(device: &Device) -> DType {
    if device.is_cpu() { DType::F32 } else { DType::BF16 }
}

/// The dtype of keys and values that suits activations of `dtype`. Beside packed weights on the CPU it has 16 bits: half
/// the bytes to read for every token, rounded finer than the weights are.
pub fn kv_dtype(device: &Device, dtype: DType, quantization: Option<Quantization>) -> DType {
    let is_short = device.is_cpu() && dtype == DType::F32 && quantization.is_some();
    if is_short { kernels::attention::short_page_dtype() } else { dtype }
}

/// Tokens of a step that keep a device busy without making whoever waits for a reply wait long for another's prompt.
pub fn default_step(device: &Device) -> usize {
    if device.is_cpu() { 512 } else { 4096 }
}

/// Bytes of memory that this process can still have where `device` keeps its tensors; 4 GiB where the system does not
/// say.
pub fn available_memory(device: &Device) -> usize {
    const UNKNOWN: u64 = 4 << 30;
    if let Some(free) = kernels::device::free_memory(device) {
        return free;
    }
    let available = sysinfo::System::new().map_or(UNKNOWN, |mut system| {
        system.refresh_memory();
        let container = system.cgroup_limits().map_or(u64::MAX, |limits| limits.free_memory);
        system.available_memory().min(container)
    });
    available as usize
}

fn cuda() -> Result<Device> {
    #[cfg(feature = "cuda")]
    return kernels::device::cuda().map_err(|error| Error::Request(format!("no CUDA device: {}", reason(&error))));
    #[cfg(not(feature = "cuda"))]
    Err(Error::Request("this build has no CUDA: build it with --features cuda".into()))
}

/// What the driver calls an error, without its trace.
#[cfg(feature = "cuda")]
fn reason(error: &candle_core::Error) -> String {
    let text = error.to_string();
    let name = text.split(|c: char| !c.is_ascii_uppercase() && c != '_').find(|word| word.starts_with("CUDA_ERROR_"));
    match name {
        Some("CUDA_ERROR_NO_DEVICE") => "the driver finds none".into(),
        Some(name) => format!("the driver says {name}"),
        None => text.lines().next().unwrap_or_default().into(),
    }
}

fn metal() -> Result<Device> {
    #[cfg(feature = "metal")]
    return kernels::device::metal().map_err(|error| Error::Request(format!("no Metal device: {error}")));
    #[cfg(not(feature = "metal"))]
    Err(Error::Request("this build has no Metal: build it with --features metal".into()))
}
