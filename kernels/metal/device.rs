//! Launches on candle's Metal device, and the buffers that they write.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use candle_core::metal_backend::DeviceId;
use candle_core::{DType, Error, MetalDevice, MetalStorage, Result, Storage, bail};
use candle_metal_kernels::MetalKernelError;
use candle_metal_kernels::metal::{Buffer, ComputePipeline, ConstantValues, Library, Value};
use objc2::available;
use objc2_metal::{MTLCompileOptions, MTLMathFloatingPointFunctions, MTLMathMode, MTLSize};

use super::pool::Memory;
use super::{Argument, Backend, Launch, Source};

impl Backend for MetalDevice {
    type Storage = MetalStorage;

    fn storage(storage: &Storage) -> Result<&MetalStorage> {
        match storage {
            Storage::Metal(storage) => Ok(storage),
            _ => bail!("operand is not on the metal device"),
        }
    }

    fn wrap(storage: MetalStorage) -> Storage {
        Storage::Metal(storage)
    }

    fn allocate(&self, elements: usize, dtype: DType) -> Result<MetalStorage> {
        let bytes = elements * dtype.size_in_bytes();
        // In no pool of candle's, and resident until it is unregistered.
        let create = |bytes| self.new_private_buffer(bytes, DType::U8, "taper");
        let buffer = with_memory(self, |memory| memory.pool.get(bytes, create))?;
        Ok(MetalStorage::new(buffer, self.clone(), elements, dtype))
    }

    fn launch(&self, launch: Launch<MetalStorage>) -> Result<()> {
        let pipeline = pipeline(self, &launch)?;
        let threads = launch.threads.iter().product::<usize>();
        if threads > pipeline.max_total_threads_per_threadgroup() {
            bail!(
                "{}: {threads} threads in a threadgroup, this gpu takes {}",
                launch.kernel,
                pipeline.max_total_threads_per_threadgroup()
            )
        }
        // Holds candle's lock: nothing may be allocated until it is dropped.
        let encoder = self.command_encoder()?;
        let encoder = encoder.as_ref();
        encoder.set_compute_pipeline_state(&pipeline);
        for (index, argument) in launch.arguments.iter().enumerate() {
            match argument {
                Argument::Read(storage, start) => encoder.set_input_buffer(index, Some(storage.buffer()), *start),
                // Candle orders launches by what is declared as written: after reads and writes of the same buffer.
                Argument::Write(storage, start) => encoder.set_output_buffer(index, Some(storage.buffer()), *start),
                Argument::Words(words) => {
                    encoder.set_bytes_directly(index, size_of_val(words.as_slice()), words.as_ptr().cast())
                }
                Argument::Absent => {}
            }
        }
        encoder.dispatch_thread_groups(size(launch.threadgroups), size(launch.threads));
        Ok(())
    }
}

fn with_memory<T>(device: &MetalDevice, f: impl FnOnce(&mut Memory<Buffer>) -> T) -> T {
    static DEVICES: Mutex<Option<HashMap<DeviceId, Memory<Buffer>>>> = Mutex::new(None);
    let mut devices = DEVICES.lock().unwrap_or_else(PoisonError::into_inner);
    f(devices.get_or_insert_default().entry(device.id()).or_default())
}

/// Gives memory back at the end of a step, where too much is idle or nobody has waited for the GPU in a while.
///
/// # Errors
///
/// What the GPU was given before has failed.
pub(crate) fn settle(device: &MetalDevice) -> Result<()> {
    let allocated = || device.metal_device().current_allocated_size();
    if !with_memory(device, |memory| memory.must_wait(allocated())) {
        return Ok(());
    }
    device.wait_until_completed()?;
    with_memory(device, |memory| {
        let idle = memory.trim();
        device.unregister_buffers(idle.iter().map(|buffer| buffer.as_ref()));
        drop(idle);
        memory.settled(allocated());
    });
    Ok(())
}

fn size([width, height, depth]: [usize; 3]) -> MTLSize {
    MTLSize { width, height, depth }
}

/// A kernel with its constants on the GPU of a registry id.
type Key = (u64, &'static str, &'static str, &'static str, Vec<bool>);

/// Compiled once, kept as long as the process lives.
#[derive(Default)]
struct Compiled {
    libraries: HashMap<(u64, &'static str), Library>,
    pipelines: HashMap<Key, ComputePipeline>,
}

static COMPILED: Mutex<Option<Compiled>> = Mutex::new(None);

fn pipeline(device: &MetalDevice, launch: &Launch<MetalStorage>) -> Result<ComputePipeline> {
    let Launch { source, kernel, variant, constants, .. } = launch;
    let device = device.metal_device();
    let gpu = device.registry_id();
    let mut compiled = COMPILED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let Compiled { libraries, pipelines } = compiled.get_or_insert_default();
    let key = (gpu, source.name, *kernel, *variant, constants.clone());
    if let Some(pipeline) = pipelines.get(&key) {
        return Ok(pipeline.clone());
    }
    let library = match libraries.get(&(gpu, source.name)) {
        Some(library) => library.clone(),
        None => {
            let library = compile(device, source)?;
            libraries.insert((gpu, source.name), library.clone());
            library
        }
    };
    let values = constants.iter().copied().map(Value::Bool).enumerate().collect::<Vec<_>>();
    let values = (!values.is_empty()).then(|| ConstantValues::new(values));
    let function = library.get_function(&launch.function(), values.as_ref()).map_err(wrap)?;
    let pipeline = device.new_compute_pipeline_state_with_function(&function).map_err(wrap)?;
    pipelines.insert(key, pipeline.clone());
    Ok(pipeline)
}

fn compile(device: &candle_metal_kernels::metal::Device, source: &Source) -> Result<Library> {
    let options = MTLCompileOptions::new();
    // Fast math would let `exp` and sums differ from what is tested.
    if available!(macos = 15.0, ..) {
        options.setMathMode(MTLMathMode::Safe);
        options.setMathFloatingPointFunctions(MTLMathFloatingPointFunctions::Precise);
    } else {
        #[allow(deprecated, reason = "what older systems have")]
        options.setFastMathEnabled(false);
    }
    device.new_library_with_source(source.text, Some(&options)).map_err(wrap)
}

fn wrap(error: MetalKernelError) -> Error {
    Error::wrap(error)
}
