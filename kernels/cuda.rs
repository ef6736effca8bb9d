//! How CUDA ops find their kernels, reach their operands and hand back results.
//!
//! An op's `cuda.rs` names its kernels in statics, takes the addresses of its operands, allocates the result,
//! and queues one launch on the device's stream. Nothing waits for the GPU.
//!
//! A kernel is looked up by name once per GPU and then found with one atomic load. Its module stays loaded as
//! long as the process lives: candle's devices on one GPU share its primary context, which the module keeps.

use std::ffi::c_void;
use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::sys::{CUdevice_attribute_enum as Attribute, CUfunction_attribute_enum};
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaModule, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, SyncOnDrop, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::cuda_backend::{CudaStorageSlice, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::Operand;

mod pinned;
mod recording;
mod upload;
pub(crate) use pinned::{Download, numbers, overwrite};
pub(crate) use recording::{Recorded, measure};
pub(crate) use upload::upload;

/// What `build.rs` compiled: one static `Module` for each `.cu`, named like the file.
pub(crate) mod modules {
    use super::Module;
    include!(concat!(env!("OUT_DIR"), "/modules.rs"));
}

/// A compiled `.cu`.
pub(crate) struct Module {
    image: &'static [u8],
    loaded: PerGpu<Arc<CudaModule>>,
}

impl Module {
    const fn new(image: &'static [u8]) -> Self {
        Self { image, loaded: PerGpu::new() }
    }

    fn on(&self, device: &CudaDevice) -> Result<&Arc<CudaModule>> {
        self.loaded
            .get(device, || device.cuda_stream().context().load_module(Ptx::from_binary(self.image.to_vec())).w())
    }
}

/// One `extern "C"` kernel of a module.
pub(crate) struct Kernel {
    module: &'static Module,
    name: &'static str,
    loaded: PerGpu<CudaFunction>,
}

impl Kernel {
    pub const fn new(module: &'static Module, name: &'static str) -> Self {
        Self { module, name, loaded: PerGpu::new() }
    }

    pub fn on(&self, device: &CudaDevice) -> Result<&CudaFunction> {
        self.loaded.get(device, || self.module.on(device)?.load_function(self.name).w())
    }

    /// The kernel, allowed up to `bytes` of shared memory at launch, the same in every call.
    pub fn on_sharing(&self, device: &CudaDevice, bytes: usize) -> Result<&CudaFunction> {
        self.loaded.get(device, || {
            let function = self.module.on(device)?.load_function(self.name).w()?;
            function
                .set_attribute(CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, bytes as i32)
                .w()?;
            Ok(function)
        })
    }
}

/// A kernel in the three float dtypes, named `<op>_<variant>_f32`, `_f16`, `_bf16`, or with something behind that; made
/// by [`floats!`].
pub(crate) struct Floats {
    pub f32: Kernel,
    pub f16: Kernel,
    pub bf16: Kernel,
}

impl Floats {
    pub fn of(&self, dtype: DType) -> Result<&Kernel> {
        match dtype {
            DType::F32 => Ok(&self.f32),
            DType::F16 => Ok(&self.f16),
            DType::BF16 => Ok(&self.bf16),
            other => bail!("{}: operand of dtype {other:?}, expected f32, f16 or bf16", self.f32.name),
        }
    }
}

macro_rules! floats {
    ($module:ident, $name:literal $(, $suffix:literal)?) => {{
        use $crate::cuda::{Floats, Kernel, modules};
        Floats {
            f32: Kernel::new(&modules::$module, concat!($name, "_f32" $(, $suffix)?)),
            f16: Kernel::new(&modules::$module, concat!($name, "_f16" $(, $suffix)?)),
            bf16: Kernel::new(&modules::$module, concat!($name, "_bf16" $(, $suffix)?)),
        }
    }};
}
pub(crate) use floats;

/// A launch that may begin while the kernel before it in the stream still runs: a kernel for it calls
/// `wait_for_inputs` before it touches anything that another kernel writes. Where the GPU cannot do that, it begins
/// afterwards.
pub(crate) struct EarlyLaunch<'a> {
    device: &'a CudaDevice,
    function: &'a CudaFunction,
    /// Blocks of a cluster, along the first dimension of the grid.
    cluster: usize,
    arguments: Vec<*mut c_void>,
}

impl<'a> EarlyLaunch<'a> {
    pub fn new(device: &'a CudaDevice, kernel: &'a Kernel) -> Result<Self> {
        Ok(Self::of(device, kernel.on(device)?))
    }

    pub fn of(device: &'a CudaDevice, function: &'a CudaFunction) -> Self {
        Self { device, function, cluster: 1, arguments: Vec::with_capacity(24) }
    }

    /// Has so many blocks side by side run at once and reach each other's shared memory, from compute capability 9.0 on.
    pub fn in_clusters(&mut self, blocks: usize) -> &mut Self {
        self.cluster = blocks;
        self
    }

    /// The kernel's next argument.
    pub fn arg<T: DeviceRepr>(&mut self, value: &'a T) -> &mut Self {
        self.arguments.push(std::ptr::from_ref(value).cast_mut().cast());
        self
    }

    /// The kernel's next three arguments: heads and strides of an operand's rows.
    pub fn rows(&mut self, rows: &'a Rows) -> &mut Self {
        self.arg(&rows.heads).arg(&rows.strides[0]).arg(&rows.strides[1])
    }

    /// # Safety
    ///
    /// The arguments are the kernel's, in its order, and what they point to is as large as the kernel takes it to be.
    pub unsafe fn launch(&mut self, config: LaunchConfig) -> Result<()> {
        let stream = self.device.cuda_stream();
        stream.context().bind_to_thread().w()?;
        let attribute = |id, value| sys::CUlaunchAttribute { id, pad: [0; 4], value };
        let mut cluster = sys::CUlaunchAttributeValue { pad: [0; 64] };
        cluster.clusterDim = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: self.cluster as u32, y: 1, z: 1 };
        let mut attributes = [
            attribute(
                sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
            ),
            attribute(sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
        ];
        let count = match (Gpu::of(self.device)?.is_hopper, self.cluster) {
            (false, _) => 0,
            (true, 1) => 1,
            (true, _) => 2,
        };
        let config = sys::CUlaunchConfig {
            gridDimX: config.grid_dim.0,
            gridDimY: config.grid_dim.1,
            gridDimZ: config.grid_dim.2,
            blockDimX: config.block_dim.0,
            blockDimY: config.block_dim.1,
            blockDimZ: config.block_dim.2,
            sharedMemBytes: config.shared_mem_bytes,
            hStream: stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count,
        };
        let function = self.function.cu_function();
        // SAFETY: the caller's promise; the arguments are borrowed until here.
        unsafe { sys::cuLaunchKernelEx(&config, function, self.arguments.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .w()
    }
}

/// What kernels are cut to fit.
pub(crate) struct Gpu {
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block can have, and a multiprocessor has.
    pub shared: [usize; 2],
    /// Whether it runs the code for compute capability 9.0: warp-group products, clusters, and kernels that begin before
    /// the one ahead of them in the stream has ended.
    pub is_hopper: bool,
}

impl Gpu {
    pub fn of(device: &CudaDevice) -> Result<&'static Self> {
        static GPUS: PerGpu<Gpu> = PerGpu::new();
        GPUS.get(device, || {
            let context = device.cuda_stream().context().clone();
            let get = |attribute| Ok::<_, candle_core::Error>(context.attribute(attribute).w()? as usize);
            let generation = get(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            Ok(Self {
                multiprocessors: get(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
                shared: [
                    get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
                    get(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
                ],
                is_hopper: modules::HOPPER && generation == 9,
            })
        })
    }
}

/// A value made on first use on each GPU.
pub(crate) struct PerGpu<T>([OnceLock<T>; PerGpu::<()>::LIMIT]);

impl PerGpu<()> {
    const LIMIT: usize = 16;
}

impl<T> PerGpu<T> {
    pub const fn new() -> Self {
        Self([const { OnceLock::new() }; PerGpu::<()>::LIMIT])
    }

    pub fn get(&self, device: &CudaDevice, make: impl FnOnce() -> Result<T>) -> Result<&T> {
        let gpu = device.cuda_stream().context().ordinal();
        let Some(cell) = self.0.get(gpu) else {
            bail!("cuda: kernels run on the first {} gpus, this is number {gpu}", self.0.len())
        };
        match cell.get() {
            Some(value) => Ok(value),
            None => {
                let value = make()?;
                Ok(cell.get_or_init(|| value))
            }
        }
    }
}

/// Where the first element of an operand lies, its start offset counted. Held until the launch that
/// uses it is queued: dropping it tells candle's other streams what this one reads or writes.
pub(crate) struct Address<'a> {
    /// The kernel argument.
    pub value: u64,
    _order: SyncOnDrop<'a>,
}

impl Address<'_> {
    pub fn is_aligned(&self, bytes: usize) -> bool {
        self.value.is_multiple_of(bytes as u64)
    }
}

/// Where the rows of an operand `[N, heads, D]`, `[N, D]` or `[D]` lie that [`as_rows`](crate::cpu::as_rows) returned.
pub(crate) struct Rows<'a> {
    pub address: Address<'a>,
    pub heads: u32,
    /// Values from one token's rows to the next's, and from one head's to the next's.
    pub strides: [u32; 2],
}

impl Rows<'_> {
    /// Whether every row starts at a multiple of `bytes`, in values of `dtype`.
    pub fn are_aligned(&self, bytes: usize, dtype: DType) -> bool {
        let is_multiple = |stride: u32| (stride as usize * dtype.size_in_bytes()).is_multiple_of(bytes);
        self.address.is_aligned(bytes) && self.strides.into_iter().all(is_multiple)
    }
}

/// What tensor copies need to know of an operand's rows.
#[repr(transparent)]
pub(crate) struct TensorMap(sys::CUtensorMap);

// SAFETY: the driver's own type for a kernel's argument.
unsafe impl DeviceRepr for TensorMap {}

impl TensorMap {
    /// Rows of `[heads, d]`, strides in values from one to the next and from head to head, that copies fetch in boxes of
    /// 64 values of one head by `box_rows` rows.
    pub fn new(
        address: u64,
        strides: [u32; 2],
        dtype: DType,
        [rows, heads, d]: [usize; 3],
        box_rows: usize,
    ) -> Result<Self> {
        let kind = match dtype {
            DType::F16 => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let sizes = [d as u64, heads as u64, rows as u64];
        let [token, head] = strides.map(|stride| u64::from(stride) * dtype.size_in_bytes() as u64);
        let mut map = std::mem::MaybeUninit::uninit();
        // SAFETY: three dimensions everywhere; the driver checks what it is told and writes the map.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                kind,
                3,
                address as *mut _,
                sizes.as_ptr(),
                [head, token].as_ptr(),
                [64, 1, box_rows as u32].as_ptr(),
                [1; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
            .result()
            .w()?;
            Ok(Self(map.assume_init()))
        }
    }
}

macro_rules! address {
    ($slice:expr, $start:expr, $stream:ident, $pointer:ident) => {{
        let ((base, order), bytes) = match $slice {
            CudaStorageSlice::F32(slice) => (slice.$pointer($stream), 4),
            CudaStorageSlice::F16(slice) => (slice.$pointer($stream), 2),
            CudaStorageSlice::BF16(slice) => (slice.$pointer($stream), 2),
            CudaStorageSlice::U32(slice) => (slice.$pointer($stream), 4),
            _ => bail!("operand is not f32, f16, bf16 or u32"),
        };
        Ok(Address { value: base + ($start * bytes) as u64, _order: order })
    }};
}

/// The address of a contiguous operand that the launch reads.
pub(crate) fn read<'a>(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<Address<'a>> {
    address!(&storage.slice, start(layout)?, stream, device_ptr)
}

/// The address of a contiguous operand that the launch writes.
pub(crate) fn write<'a>(storage: &'a mut CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<Address<'a>> {
    address!(&mut storage.slice, start(layout)?, stream, device_ptr_mut)
}

/// The rows of an operand that the launch reads.
pub(crate) fn read_rows<'a>(storage: &'a CudaStorage, layout: &Layout, stream: &'a CudaStream) -> Result<Rows<'a>> {
    let (heads, strides) = match (layout.dims(), layout.stride()) {
        ([_], [1]) => (1, [0, 0]),
        ([_, _], &[token, 1]) => (1, [token, 0]),
        (&[_, heads, _], &[token, head, 1]) => (heads, [token, head]),
        _ => bail!("operand of shape {:?} and strides {:?}, expected rows", layout.shape(), layout.stride()),
    };
    let address: Result<_> = address!(&storage.slice, layout.start_offset(), stream, device_ptr);
    Ok(Rows { address: address?, heads: heads as u32, strides: strides.map(|stride| stride as u32) })
}

fn start(layout: &Layout) -> Result<usize> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start),
        None => bail!("operand of shape {:?} is not contiguous", layout.shape()),
    }
}

impl Operand<'_> {
    /// The address of a contiguous operand that an op struct borrows as a tensor.
    pub fn cuda<'a>(&'a self, stream: &'a CudaStream) -> Result<Address<'a>> {
        read(self.cuda_storage()?, self.layout, stream)
    }

    /// The rows of such an operand.
    pub fn cuda_rows<'a>(&'a self, stream: &'a CudaStream) -> Result<Rows<'a>> {
        read_rows(self.cuda_storage()?, self.layout, stream)
    }

    fn cuda_storage(&self) -> Result<&CudaStorage> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage),
            _ => bail!("operand is not on the cuda device"),
        }
    }
}

/// A tensor of `shape` that `fill` writes in full. While a stream records, its memory is the recording's.
pub(crate) fn output(
    device: &CudaDevice,
    shape: impl Into<Shape>,
    dtype: DType,
    fill: impl FnOnce(&mut CudaStorage) -> Result<()>,
) -> Result<Tensor> {
    let shape = shape.into();
    let mut storage = match recording::take(device, &shape, dtype)? {
        Some(storage) => storage,
        None => uninit(device, &shape, dtype)?,
    };
    let filled = fill(&mut storage);
    let tensor = crate::cpu::tensor(Storage::Cuda(storage), shape);
    recording::keep(&tensor);
    filled.map(|()| tensor)
}

/// An output that the launch writes in full.
pub(crate) fn uninit(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: any bits are a valid float or integer.
    unsafe { device.alloc_uninit(shape, dtype) }
}

/// The GPU `ordinal`, as [`device::cuda`](crate::device::cuda) says.
pub(crate) fn open(ordinal: usize) -> Result<Device> {
    let device = recording::while_none(|| Device::new_cuda_with_stream(ordinal))?;
    let cuda = device.as_cuda_device()?;
    // SAFETY: the device is new, its stream the only one that work on it is queued on.
    unsafe { cuda.disable_event_tracking() };
    let stream = cuda.cuda_stream();
    stream.context().bind_to_thread().w()?;
    let mut pool = std::ptr::null_mut();
    let mut kept = u64::MAX;
    let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: both calls write to, or read from, locals of the types that they document.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()).result().w()?;
        sys::cuMemPoolSetAttribute(pool, threshold, (&raw mut kept).cast()).result().w()?;
    }
    Ok(device)
}

pub(crate) fn free_memory(device: &CudaDevice) -> Result<usize> {
    device.cuda_stream().context().bind_to_thread().w()?;
    let (mut free, mut total) = (0, 0);
    // SAFETY: it writes to two locals.
    unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) }.result().w()?;
    Ok(free)
}

/// How many rows an operand `[.., D]` has.
pub(crate) fn rows_of(layout: &Layout) -> usize {
    layout.dims().iter().rev().skip(1).product()
}

/// A one-dimensional grid of blocks of `threads` (x, y), without shared memory beyond what the kernel declares.
pub(crate) fn grid(blocks: usize, threads: (usize, usize)) -> Result<LaunchConfig> {
    if blocks > i32::MAX as usize {
        bail!("cuda: {blocks} blocks, a grid takes {}", i32::MAX)
    }
    Ok(LaunchConfig {
        grid_dim: (blocks as u32, 1, 1),
        block_dim: (threads.0 as u32, threads.1 as u32, 1),
        shared_mem_bytes: 0,
    })
}
