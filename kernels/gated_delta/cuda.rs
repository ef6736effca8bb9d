//! The gated delta rule on CUDA: the recurrence for short sequences, chunks on tensor cores for long ones, and one
//! token of each with nothing between a warp and its rows of the state.

use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result, Shape, bail};

use super::GatedDeltaRule;
use crate::cpu::Operand;
use crate::cuda::{self, Address, EarlyLaunch, Floats, Gpu, Kernel, Rows, TensorMap, floats, modules};

static K32: Floats = floats!(GATED_DELTA, "gated_delta_rule_k32");
static K64: Floats = floats!(GATED_DELTA, "gated_delta_rule_k64");
static K128: Floats = floats!(GATED_DELTA, "gated_delta_rule_k128");
/// Moves the state value by value, a warp for a row.
static ANY: Floats = floats!(GATED_DELTA, "gated_delta_rule_any");
/// One token a sequence, `K` of 128.
static STEP: Floats = floats!(GATED_DELTA_STEP, "gated_delta_step");
/// For chunks, in f16 and bf16.
static PREPARE: [Kernel; 2] = [
    Kernel::new(&modules::GATED_DELTA_CHUNKED, "gated_delta_prepare_f16"),
    Kernel::new(&modules::GATED_DELTA_CHUNKED, "gated_delta_prepare_bf16"),
];
static SCAN: [Kernel; 2] = [
    Kernel::new(&modules::GATED_DELTA_CHUNKED, "gated_delta_scan_f16"),
    Kernel::new(&modules::GATED_DELTA_CHUNKED, "gated_delta_scan_bf16"),
];
/// The scan on compute capability 9.0.
static SCAN_WGMMA: [Kernel; 2] = [
    Kernel::new(&modules::GATED_DELTA_SCAN_WGMMA, "gated_delta_scan_wgmma_f16"),
    Kernel::new(&modules::GATED_DELTA_SCAN_WGMMA, "gated_delta_scan_wgmma_bf16"),
];

const MAX_K: usize = 256;
/// Of a block of the recurrence, as in its kernels.
const THREADS: usize = 128;

/// Of the step's kernel: threads of a block, and rows of the state that they have.
const STEP_THREADS: usize = 64;
const STEP_ROWS: usize = 8;

/// Tokens of a chunk, `K` and `V`, as in the chunked kernels.
const CHUNK: usize = 64;
const CHUNKED_SIZE: usize = 128;
/// What is prepared of a chunk, and what blocks share.
const PREPARED_BYTES: usize = 17280;
const PREPARE_SHARED: usize = 36096;
const SCAN_SHARED: usize = 132640;
const PREPARE_THREADS: usize = 128;
const SCAN_THREADS: usize = 256;
/// Rows of the state of a block.
const SCAN_ROWS: usize = 32;
/// The scan's on compute capability 9.0.
const WGMMA_SHARED: usize = 176128;
const WGMMA_THREADS: usize = 160;
const WGMMA_ROWS: usize = 64;
/// Tokens of a sequence from which chunks are faster than the recurrence.
const SHORTEST_CHUNKED: usize = 24;

/// The kernels' arguments.
struct Arguments<'a> {
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    g: Address<'a>,
    beta: Address<'a>,
    starts: Address<'a>,
    lens: Address<'a>,
    slots: Address<'a>,
    state: Address<'a>,
    y: Address<'a>,
    tokens: usize,
    sequences: usize,
    hk: u32,
    hv: u32,
    kd: u32,
    vd: u32,
    dtype: DType,
}

impl GatedDeltaRule<'_> {
    pub(super) fn run_cuda(&self, state: &mut CudaStorage, layout: &Layout) -> Result<()> {
        let (_, hv, vd, kd) = layout.shape().dims4()?;
        if kd > MAX_K {
            bail!("gated_delta_rule: K is {kd}, the cuda kernels take at most {MAX_K}")
        }
        let (hk, dtype, device) = (self.q.dim(1)?, self.v.dtype(), state.device.clone());
        let stream = device.cuda_stream();
        let batch = self.batch;
        let rows = [self.q, self.k, self.v].map(Operand::new);
        let arrays = [self.g, self.beta, &batch.cu_seqlens, &batch.context_lens, &batch.state_slots].map(Operand::new);
        let [q, k, v] = rows.each_ref().map(|operand| operand.cuda_rows(&stream));
        let [g, beta, starts, lens, slots] = arrays.each_ref().map(|operand| operand.cuda(&stream));
        let (q, k, v, g, beta, starts, context_lens, slots) = (q?, k?, v?, g?, beta?, starts?, lens?, slots?);
        let state = cuda::write(state, layout, &stream)?;
        let [hk, hv, kd, vd] = [hk, hv, kd, vd].map(|size| size as u32);
        let (tokens, sequences) = (batch.num_tokens(), batch.num_sequences());
        let out = cuda::output(&device, self.v.shape(), dtype, |y| {
            let y = cuda::write(y, &Layout::contiguous(self.v.shape()), &stream)?;
            let lens = context_lens;
            let arguments =
                Arguments { q, k, v, g, beta, starts, lens, slots, state, y, tokens, sequences, hk, hv, kd, vd, dtype };
            let lens = || batch.host.iter().map(|sequence| sequence.tokens.len());
            if arguments.sequences == arguments.tokens && arguments.fit_step() {
                return arguments.step(&device);
            }
            if !lens().any(|len| len >= SHORTEST_CHUNKED) || !arguments.fit_chunks(&device)? {
                return arguments.recurrent(&device, &stream, u32::MAX as usize);
            }
            arguments.chunked(&device, &stream)?;
            if lens().any(|len| len < SHORTEST_CHUNKED) {
                arguments.recurrent(&device, &stream, SHORTEST_CHUNKED - 1)?;
            }
            Ok(())
        })?;
        self.out.set(out).expect("run once");
        Ok(())
    }
}

// SAFETY of the launches below: the arguments are the kernels', in their order; `gated_delta_rule` has compared their
// shapes and dtypes with each other and the batch's slots with the state.
impl Arguments<'_> {
    fn fit_step(&self) -> bool {
        let is_aligned = |rows: &Rows| rows.are_aligned(4 * self.dtype.size_in_bytes(), self.dtype);
        self.kd == 128
            && (self.vd as usize).is_multiple_of(STEP_ROWS)
            && self.state.is_aligned(16)
            && [&self.q, &self.k].into_iter().all(is_aligned)
    }

    fn step(&self, device: &CudaDevice) -> Result<()> {
        let blocks = self.sequences * self.hv as usize * (self.vd as usize / STEP_ROWS);
        let mut launch = EarlyLaunch::new(device, STEP.of(self.dtype)?)?;
        for rows in [&self.q, &self.k, &self.v] {
            launch.arg(&rows.address.value).arg(&rows.strides[0]).arg(&rows.strides[1]);
        }
        for address in [&self.g, &self.beta, &self.state, &self.y, &self.lens, &self.slots] {
            launch.arg(&address.value);
        }
        launch.arg(&self.hk).arg(&self.hv).arg(&self.vd);
        // SAFETY: see above.
        unsafe { launch.launch(cuda::grid(blocks, (STEP_THREADS, 1))?) }
    }

    /// Sequences of more than `longest` tokens are left to another kernel.
    fn recurrent(&self, device: &CudaDevice, stream: &CudaStream, longest: usize) -> Result<()> {
        let is_aligned = self.state.is_aligned(16);
        let (kernel, lanes) = match self.kd {
            32 if is_aligned => (&K32, 8),
            64 if is_aligned => (&K64, 8),
            128 if is_aligned => (&K128, 8),
            _ => (&ANY, 32),
        };
        let blocks = self.sequences * self.hv as usize * (self.vd as usize).div_ceil(THREADS / lanes);
        let longest = longest as u32;
        let mut launch = stream.launch_builder(kernel.of(self.dtype)?.on(device)?);
        for rows in [&self.q, &self.k, &self.v] {
            launch.arg(&rows.address.value).arg(&rows.strides[0]).arg(&rows.strides[1]);
        }
        for address in [&self.g, &self.beta, &self.state, &self.y, &self.starts, &self.lens, &self.slots] {
            launch.arg(&address.value);
        }
        launch.arg(&self.hk).arg(&self.hv).arg(&self.kd).arg(&self.vd).arg(&longest);
        // SAFETY: see above.
        unsafe { launch.launch(cuda::grid(blocks, (THREADS, 1))?) }.w().map(drop)
    }

    fn fit_chunks(&self, device: &CudaDevice) -> Result<bool> {
        const SHARED: CUdevice_attribute = CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
        let is_aligned = |rows: &Rows| rows.are_aligned(16, self.dtype);
        Ok(self.dtype != DType::F32
            && [self.kd, self.vd] == [CHUNKED_SIZE as u32; 2]
            && self.state.is_aligned(16)
            && [&self.q, &self.k, &self.v].into_iter().all(is_aligned)
            && device.cuda_stream().context().attribute(SHARED).w()? as usize >= SCAN_SHARED)
    }

    /// Sequences of less than [`SHORTEST_CHUNKED`] tokens are left to another kernel.
    fn chunked(&self, device: &CudaDevice, stream: &CudaStream) -> Result<()> {
        // Those of a sequence start at the first multiple of a chunk in it, one further for each sequence before.
        let chunks = (self.tokens / CHUNK + self.sequences) * self.hv as usize;
        let shape = Shape::from(chunks * PREPARED_BYTES / 4);
        let mut prepared = cuda::uninit(device, &shape, DType::F32)?;
        let prepared = cuda::write(&mut prepared, &Layout::contiguous(&shape), stream)?;
        let dtype = usize::from(self.dtype == DType::BF16);
        let (sequences, shortest) = (self.sequences as u32, SHORTEST_CHUNKED as u32);

        let mut launch = stream.launch_builder(PREPARE[dtype].on(device)?);
        for rows in [&self.q, &self.k] {
            launch.arg(&rows.address.value).arg(&rows.strides[0]).arg(&rows.strides[1]);
        }
        for address in [&self.g, &self.beta, &prepared, &self.starts] {
            launch.arg(&address.value);
        }
        launch.arg(&sequences).arg(&self.hk).arg(&self.hv).arg(&shortest);
        let config =
            LaunchConfig { shared_mem_bytes: PREPARE_SHARED as u32, ..cuda::grid(chunks, (PREPARE_THREADS, 1))? };
        // SAFETY: see above; `prepared` holds all chunks.
        unsafe { launch.launch(config) }.w()?;

        let rest = [&prepared, &self.state, &self.y, &self.starts, &self.lens, &self.slots];
        let sizes = [&sequences, &self.hk, &self.hv, &shortest];
        let heads = self.sequences * self.hv as usize;
        // Not all rows can be copied like that.
        if Gpu::of(device)?.is_hopper
            && let Ok(maps) = self.maps()
        {
            let mut launch = EarlyLaunch::of(device, SCAN_WGMMA[dtype].on_sharing(device, WGMMA_SHARED)?);
            for map in &maps {
                launch.arg(map);
            }
            for address in rest {
                launch.arg(&address.value);
            }
            for size in sizes {
                launch.arg(size);
            }
            let blocks = cuda::grid(heads * (CHUNKED_SIZE / WGMMA_ROWS), (WGMMA_THREADS, 1))?;
            // SAFETY: see above; the scan follows what prepares it on the same stream, and waits for that.
            return unsafe { launch.launch(LaunchConfig { shared_mem_bytes: WGMMA_SHARED as u32, ..blocks }) };
        }
        let mut launch = stream.launch_builder(SCAN[dtype].on_sharing(device, SCAN_SHARED)?);
        for rows in [&self.q, &self.k, &self.v] {
            launch.arg(&rows.address.value).arg(&rows.strides[0]).arg(&rows.strides[1]);
        }
        for address in rest {
            launch.arg(&address.value);
        }
        for size in sizes {
            launch.arg(size);
        }
        let blocks = cuda::grid(heads * (CHUNKED_SIZE / SCAN_ROWS), (SCAN_THREADS, 1))?;
        // SAFETY: see above; the scan follows what prepares it on the same stream.
        unsafe { launch.launch(LaunchConfig { shared_mem_bytes: SCAN_SHARED as u32, ..blocks }) }.w().map(drop)
    }

    /// Of q, k and v, for copies of a chunk.
    fn maps(&self) -> Result<[TensorMap; 3]> {
        let map = |rows: &Rows| {
            let shape = [self.tokens, rows.heads as usize, CHUNKED_SIZE];
            TensorMap::new(rows.address.value, rows.strides, self.dtype, shape, CHUNK)
        };
        Ok([map(&self.q)?, map(&self.k)?, map(&self.v)?])
    }
}
