//! Bytes from the host to the GPU at the speed of the bus: threads copy them into pinned buffers, one of which the GPU
//! reads while the others are filled.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream, sys};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, DType, Result, Shape, Storage, Tensor, bail};
use rayon::prelude::*;

use super::PerGpu;

const BUFFERS: usize = 4;
const BUFFER_BYTES: usize = 16 << 20;
/// Of a thread's share of a buffer.
const SHARE_BYTES: usize = 1 << 20;

/// The buffers of a GPU, made with the first upload and kept.
static STAGING: PerGpu<Mutex<Staging>> = PerGpu::new();

struct Staging {
    buffers: Vec<Buffer>,
    next: usize,
}

struct Buffer {
    start: *mut u8,
    /// The GPU has read it.
    read: CudaEvent,
}

// SAFETY: pinned memory belongs to no thread, and the lock around `Staging` sees to one user at a time.
unsafe impl Send for Buffer {}

impl Staging {
    fn new(stream: &CudaStream) -> Result<Self> {
        let context = stream.context();
        context.bind_to_thread().w()?;
        let buffer = |_| {
            let mut start = std::ptr::null_mut();
            // SAFETY: it writes to a local. The memory is never given back: a process uploads again, or ends.
            unsafe { sys::cuMemHostAlloc(&mut start, BUFFER_BYTES, 0) }.result().w()?;
            let read = context.new_event(None).w()?;
            read.record(stream).w()?;
            Ok(Buffer { start: start.cast(), read })
        };
        Ok(Self { buffers: (0..BUFFERS).map(buffer).collect::<Result<_>>()?, next: 0 })
    }
}

/// A tensor of the bytes of `parts`, one after the other. `done(i)` is told of each part that needs to be kept no
/// longer.
pub(crate) fn upload(
    device: &CudaDevice,
    shape: &Shape,
    dtype: DType,
    parts: &[&[u8]],
    done: impl Fn(usize),
) -> Result<Tensor> {
    let stream = device.cuda_stream();
    let len: usize = parts.iter().map(|part| part.len()).sum();
    if len != shape.elem_count() * dtype.size_in_bytes() {
        bail!("upload: {len} bytes for {:?} {dtype:?}", shape.dims())
    }
    // SAFETY: any bits are a valid float, and the loop below writes all of them.
    let mut storage = unsafe { device.alloc_uninit(shape, dtype)? };
    let mut to = match &mut storage.slice {
        CudaStorageSlice::F32(slice) => address(slice, &stream),
        CudaStorageSlice::F16(slice) => address(slice, &stream),
        CudaStorageSlice::BF16(slice) => address(slice, &stream),
        CudaStorageSlice::U32(slice) => address(slice, &stream),
        _ => bail!("upload: {dtype:?}, expected f32, f16, bf16 or u32"),
    };
    let staging = STAGING.get(device, || Ok(Mutex::new(Staging::new(&stream)?)))?;
    let mut staging = staging.lock().unwrap_or_else(PoisonError::into_inner);
    stream.context().bind_to_thread().w()?;
    for (index, part) in parts.iter().enumerate() {
        for bytes in part.chunks(BUFFER_BYTES) {
            let next = staging.next;
            staging.next = (next + 1) % BUFFERS;
            let buffer = &staging.buffers[next];
            buffer.read.synchronize().w()?;
            // SAFETY: the buffer is that long, and the GPU has read what it held.
            let pinned = unsafe { std::slice::from_raw_parts_mut(buffer.start, bytes.len()) };
            let shares = pinned.par_chunks_mut(SHARE_BYTES).zip(bytes.par_chunks(SHARE_BYTES));
            shares.for_each(|(to, from)| to.copy_from_slice(from));
            // SAFETY: both ranges are `bytes.len()` long, and the buffer is left alone until its event has come.
            unsafe { sys::cuMemcpyHtoDAsync_v2(to, buffer.start.cast(), bytes.len(), stream.cu_stream()) }
                .result()
                .w()?;
            buffer.read.record(&stream).w()?;
            to += bytes.len() as u64;
        }
        done(index);
    }
    Ok(crate::cpu::tensor(Storage::Cuda(storage), shape.clone()))
}

fn address<T>(slice: &mut impl candle_core::cuda_backend::cudarc::driver::DevicePtrMut<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr_mut(stream).0
}
