//! Few values to and from the GPU through pinned memory, so that the host need not wait for what else is queued.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, WithDType};

use super::{PerGpu, write};
use crate::cpu::Operand;

/// Bytes of the smallest buffer.
const LEAST: usize = 4096;

/// Buffers that nobody waits for. The GPU may still be reading or writing one.
static FREE: PerGpu<Mutex<Vec<Buffer>>> = PerGpu::new();

struct Buffer {
    start: *mut u8,
    bytes: usize,
    /// The GPU is done with it.
    used: CudaEvent,
}

// SAFETY: pinned memory belongs to no thread, and a buffer has one user at a time.
unsafe impl Send for Buffer {}

impl Buffer {
    /// One that the GPU is done with, or else a new one, which is never given back to the system.
    fn with_room(device: &CudaDevice, bytes: usize) -> Result<Self> {
        let context = device.cuda_stream().context().clone();
        context.bind_to_thread().w()?;
        let known = {
            let mut free = free(device)?.lock().unwrap_or_else(PoisonError::into_inner);
            let fitting = free.iter().position(|buffer| buffer.bytes >= bytes && buffer.used.is_complete());
            fitting.map(|index| free.swap_remove(index))
        };
        if let Some(buffer) = known {
            return Ok(buffer);
        }
        let bytes = bytes.next_power_of_two().max(LEAST);
        let mut start = std::ptr::null_mut();
        // SAFETY: it writes to a local.
        unsafe { sys::cuMemHostAlloc(&mut start, bytes, 0) }.result().w()?;
        Ok(Self { start: start.cast(), bytes, used: context.new_event(None).w()? })
    }
}

fn free(device: &CudaDevice) -> Result<&'static Mutex<Vec<Buffer>>> {
    FREE.get(device, || Ok(Mutex::new(vec![])))
}

fn release(device: &CudaDevice, buffer: Buffer) {
    if let Ok(free) = free(device) {
        free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// As [`crate::device::Download`].
pub(crate) struct Download {
    device: CudaDevice,
    /// Taken when it is dropped.
    buffer: Option<Buffer>,
    len: usize,
}

impl Download {
    /// `values` are contiguous.
    pub fn new(device: &CudaDevice, values: &Tensor) -> Result<Self> {
        let (stream, len) = (device.cuda_stream(), values.elem_count());
        let bytes = len * values.dtype().size_in_bytes();
        let buffer = Buffer::with_room(device, bytes)?;
        let values = Operand::new(values);
        let from = values.cuda(&stream)?;
        // SAFETY: both ranges hold `bytes`, and the buffer is left alone until its event has come.
        unsafe { sys::cuMemcpyDtoHAsync_v2(buffer.start.cast(), from.value, bytes, stream.cu_stream()) }
            .result()
            .w()?;
        buffer.used.record(&stream).w()?;
        Ok(Self { device: device.clone(), buffer: Some(buffer), len })
    }

    /// The values, which are of type `T`.
    pub fn wait<T: WithDType>(self) -> Result<Vec<T>> {
        let Some(buffer) = &self.buffer else { return Ok(vec![]) };
        buffer.used.synchronize().w()?;
        // SAFETY: the GPU has written that many values, and nobody else has the buffer.
        Ok(unsafe { std::slice::from_raw_parts(buffer.start.cast::<T>(), self.len) }.to_vec())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            release(&self.device, buffer);
        }
    }
}

/// A tensor `[n]` of `numbers`.
pub(crate) fn numbers(device: &CudaDevice, numbers: &[u32]) -> Result<Tensor> {
    let shape = Shape::from(numbers.len());
    // SAFETY: any bits are a number, and all are written.
    let mut storage = unsafe { device.alloc_uninit(&shape, DType::U32)? };
    overwrite(numbers, &mut storage)?;
    Ok(crate::cpu::tensor(Storage::Cuda(storage), shape))
}

/// Writes over the first of a storage of u32, behind what is queued.
pub(crate) fn overwrite(numbers: &[u32], storage: &mut CudaStorage) -> Result<()> {
    let device = storage.device.clone();
    let (stream, bytes) = (device.cuda_stream(), size_of_val(numbers));
    let buffer = Buffer::with_room(&device, bytes)?;
    // SAFETY: the buffer holds `bytes`, and the GPU is done with it.
    unsafe { std::ptr::copy_nonoverlapping(numbers.as_ptr().cast(), buffer.start, bytes) };
    let to = write(storage, &Layout::contiguous(numbers.len()), &stream)?;
    // SAFETY: both ranges hold `bytes`, and the buffer is left alone until its event has come.
    unsafe { sys::cuMemcpyHtoDAsync_v2(to.value, buffer.start.cast(), bytes, stream.cu_stream()) }.result().w()?;
    buffer.used.record(&stream).w()?;
    release(&device, buffer);
    Ok(())
}
