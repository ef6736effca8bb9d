//! Numbers from the GPU to pinned memory, so that the host need not wait for what is queued behind them.

use std::sync::{Mutex, PoisonError};

use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, sys};
use candle_core::{CudaDevice, Result, Tensor};

use super::PerGpu;
use crate::cpu::Operand;

/// The least length of a buffer.
const LEAST: usize = 1024;

/// Buffers that nobody waits for. The GPU may still be writing to one.
static FREE: PerGpu<Mutex<Vec<Buffer>>> = PerGpu::new();

struct Buffer {
    start: *mut u32,
    len: usize,
    /// The GPU has written it.
    written: CudaEvent,
}

// SAFETY: pinned memory belongs to no thread, and a buffer has one user at a time.
unsafe impl Send for Buffer {}

/// As [`crate::device::Download`].
pub(crate) struct Download {
    device: CudaDevice,
    /// Taken when it is dropped.
    buffer: Option<Buffer>,
    len: usize,
}

impl Download {
    /// `numbers` `[n]` in u32, contiguous.
    pub fn new(device: &CudaDevice, numbers: &Tensor) -> Result<Self> {
        let (stream, len) = (device.cuda_stream(), numbers.elem_count());
        let buffer = Buffer::with_room(device, len)?;
        let numbers = Operand::new(numbers);
        let from = numbers.cuda(&stream)?;
        // SAFETY: both ranges hold `len` numbers, and the buffer is left alone until its event has come.
        unsafe {
            sys::cuMemcpyDtoHAsync_v2(buffer.start.cast(), from.value, len * size_of::<u32>(), stream.cu_stream())
        }
        .result()
        .w()?;
        buffer.written.record(&stream).w()?;
        Ok(Self { device: device.clone(), buffer: Some(buffer), len })
    }

    pub fn wait(self) -> Result<Vec<u32>> {
        let Some(buffer) = &self.buffer else { return Ok(vec![]) };
        buffer.written.synchronize().w()?;
        // SAFETY: the GPU has written that many numbers, and nobody else has the buffer.
        Ok(unsafe { std::slice::from_raw_parts(buffer.start, self.len) }.to_vec())
    }
}

impl Drop for Download {
    fn drop(&mut self) {
        if let (Some(buffer), Ok(free)) = (self.buffer.take(), free(&self.device)) {
            free.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
        }
    }
}

fn free(device: &CudaDevice) -> Result<&'static Mutex<Vec<Buffer>>> {
    FREE.get(device, || Ok(Mutex::new(vec![])))
}

impl Buffer {
    /// A free one, or else a new one, which is never given back to the system.
    fn with_room(device: &CudaDevice, len: usize) -> Result<Self> {
        let context = device.cuda_stream().context().clone();
        context.bind_to_thread().w()?;
        let known = {
            let mut free = free(device)?.lock().unwrap_or_else(PoisonError::into_inner);
            let fitting = free.iter().position(|buffer| buffer.len >= len);
            fitting.map(|index| free.swap_remove(index))
        };
        if let Some(buffer) = known {
            // Of a download that was dropped, the numbers may be still on their way.
            buffer.written.synchronize().w()?;
            return Ok(buffer);
        }
        let len = len.next_power_of_two().max(LEAST);
        let mut start = std::ptr::null_mut();
        // SAFETY: it writes to a local.
        unsafe { sys::cuMemHostAlloc(&mut start, len * size_of::<u32>(), 0) }.result().w()?;
        Ok(Self { start: start.cast(), len, written: context.new_event(None).w()? })
    }
}
