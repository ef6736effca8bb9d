//! Recordings of a stream, as graphs.
//!
//! What ops make while a stream records must have addresses that stay. An allocation that is recorded becomes a node of
//! the graph, and no kernel behind such a node can start early. So a recording has one buffer: its ops' outputs follow
//! one another in it, never freed one by one. Their tensors are kept until the recording has ended, and then give up
//! what they never owned.

use std::cell::{Cell, RefCell};
use std::sync::{Arc, PoisonError, RwLock};

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaSlice, CudaStream, DevicePtr, DeviceRepr, sys};
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CpuStorage, CudaDevice, CudaStorage, DType, InplaceOp1, Layout, Result, Shape, Tensor, bail};
use half::{bf16, f16};

thread_local! {
    /// Bytes that outputs have taken on this thread, in all.
    static TAKEN: Cell<usize> = const { Cell::new(0) };
    static ARENA: RefCell<Option<Arena>> = const { RefCell::new(None) };
}

/// Shared by recordings. Who waits for all streams of a GPU at once, as opening it again does, would end them.
static RECORDING: RwLock<()> = RwLock::new(());

/// Runs `f` while nothing is recorded.
pub(super) fn while_none<T>(f: impl FnOnce() -> T) -> T {
    let _alone = RECORDING.write().unwrap_or_else(PoisonError::into_inner);
    f()
}

/// Of every output in the buffer.
const ALIGNMENT: usize = 256;

/// The buffer of a recording under way.
struct Arena {
    memory: CudaSlice<u8>,
    used: usize,
    kept: Vec<Tensor>,
}

/// What a stream was given while it recorded.
pub(crate) struct Recorded {
    graph: CudaGraph,
    _memory: CudaSlice<u8>,
}

// SAFETY: the driver's calls on a graph may come from any thread, one at a time; `launch` is called by the one thread
// that drives the device.
unsafe impl Send for Recorded {}

impl Recorded {
    /// Records `work`, whose outputs take up to `bytes`, as [`measure`] has found.
    pub fn new(device: &CudaDevice, bytes: usize, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let stream = device.cuda_stream();
        let memory = stream.alloc_zeros::<u8>(bytes.max(ALIGNMENT)).w()?;
        stream.synchronize().w()?;
        let _shared = RECORDING.read().unwrap_or_else(PoisonError::into_inner);
        stream.begin_capture(sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        ARENA.set(Some(Arena { memory, used: 0, kept: vec![] }));
        let worked = work();
        let arena = ARENA.take().expect("set above");
        // In any case, or the stream would go on recording; an error that waits for the next call would keep it from that.
        let waiting = stream.context().check_err();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let graph = stream.end_capture(flags);
        let memory = arena.release()?;
        worked?;
        waiting.w()?;
        match graph.w()? {
            Some(graph) => Ok(Self { graph, _memory: memory }),
            None => bail!("cuda: nothing was recorded"),
        }
    }

    pub fn launch(&self) -> Result<()> {
        self.graph.launch().w()
    }
}

impl Arena {
    fn release(self) -> Result<CudaSlice<u8>> {
        self.kept.iter().try_for_each(|tensor| tensor.inplace_op1(&GiveUp))?;
        Ok(self.memory)
    }
}

/// What `work` returns, and the bytes that its outputs take.
pub(crate) fn measure<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, usize)> {
    let before = TAKEN.get();
    let result = work()?;
    Ok((result, TAKEN.get() - before))
}

/// Storage in the buffer of the recording under way, to be [kept](keep) at once; `None` if there is no recording.
pub(super) fn take(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<Option<CudaStorage>> {
    let len = shape.elem_count();
    let bytes = (len * dtype.size_in_bytes()).next_multiple_of(ALIGNMENT).max(ALIGNMENT);
    TAKEN.set(TAKEN.get() + bytes);
    ARENA.with_borrow_mut(|arena| {
        let Some(arena) = arena else { return Ok(None) };
        if arena.used + bytes > arena.memory.len() {
            bail!("cuda: the recording takes more memory than its rehearsal")
        }
        let stream = device.cuda_stream();
        let address = arena.memory.device_ptr(&stream).0 + arena.used as u64;
        arena.used += bytes;
        let slice = match dtype {
            DType::F32 => CudaStorageSlice::F32(alias::<f32>(&stream, address, len)),
            DType::F16 => CudaStorageSlice::F16(alias::<f16>(&stream, address, len)),
            DType::BF16 => CudaStorageSlice::BF16(alias::<bf16>(&stream, address, len)),
            DType::U32 => CudaStorageSlice::U32(alias::<u32>(&stream, address, len)),
            other => bail!("cuda: an output of {other:?}, expected f32, f16, bf16 or u32"),
        };
        Ok(Some(CudaStorage { slice, device: device.clone() }))
    })
}

/// A slice that does not own its memory: it must not be dropped, but given up by [`GiveUp`].
fn alias<T: DeviceRepr>(stream: &Arc<CudaStream>, address: u64, len: usize) -> CudaSlice<T> {
    // SAFETY: the range lies in the buffer, at a multiple of `ALIGNMENT`, and is no other output's.
    unsafe { stream.upgrade_device_ptr(address, len) }
}

/// Keeps a tensor of [`take`]n storage until the recording has ended.
pub(super) fn keep(tensor: &Tensor) {
    ARENA.with_borrow_mut(|arena| {
        if let Some(arena) = arena {
            arena.kept.push(tensor.clone());
        }
    });
}

/// Replaces a storage that does not own its memory by one that does.
struct GiveUp;

impl InplaceOp1 for GiveUp {
    fn name(&self) -> &'static str {
        "give-up"
    }

    fn cpu_fwd(&self, _: &mut CpuStorage, _: &Layout) -> Result<()> {
        Ok(())
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, _: &Layout) -> Result<()> {
        // SAFETY: any bits are a valid float or integer.
        let own = unsafe { storage.device.alloc_uninit(&Shape::from(1), storage.dtype())? };
        match std::mem::replace(&mut storage.slice, own.slice) {
            CudaStorageSlice::F32(slice) => slice.leak(),
            CudaStorageSlice::F16(slice) => slice.leak(),
            CudaStorageSlice::BF16(slice) => slice.leak(),
            CudaStorageSlice::U32(slice) => slice.leak(),
            _ => return Ok(()),
        };
        Ok(())
    }
}
