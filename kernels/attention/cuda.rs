//! Attention and the page writes on CUDA: chooses kernels, their tiles, and how contexts are split.
//!
//! f16 and bf16 of the head sizes that models have go to the tensor cores: prompts to `flash_wgmma` on compute
//! capability 9.0 and to `flash_mma` elsewhere, sequences of one token to `paged_decode`. A step that has both launches
//! both, and each leaves the other's sequences alone. Everything else goes to `attention_any`.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::{CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg};
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor, bail};

use super::{AttentionParams, Mask};
use crate::Batch;
use crate::cpu::Operand;
use crate::cuda::{self, EarlyLaunch, Floats, Gpu, Kernel, Rows, TensorMap, floats, modules};

/// Of a block of `write_kv`.
const THREADS: usize = 256;

/// By bytes of a word, widest first.
static WRITE_KV: [(usize, Kernel); 3] = [
    (16, Kernel::new(&modules::ATTENTION, "write_kv_u128")),
    (4, Kernel::new(&modules::ATTENTION, "write_kv_u32")),
    (2, Kernel::new(&modules::ATTENTION, "write_kv_u16")),
];

/// `kv` `[2, blocks, block_size, Hk, D]` contiguous, `k` and `v` `[N, Hk, D]` in rows, all of one dtype.
pub fn write_kv(
    kv: &mut CudaStorage,
    layout: &Layout,
    (k, kl): (&CudaStorage, &Layout),
    (v, vl): (&CudaStorage, &Layout),
    batch: &Batch,
) -> Result<()> {
    let (_, blocks, block_size, heads, d) = layout.shape().dims5()?;
    let (device, dtype) = (kv.device.clone(), kv.dtype());
    let stream = device.cuda_stream();
    let slots = Operand::new(&batch.slot_mapping);
    let kv = cuda::write(kv, layout, &stream)?;
    let (k, v) = (cuda::read_rows(k, kl, &stream)?, cuda::read_rows(v, vl, &stream)?);
    let slots = slots.cuda(&stream)?;

    // Heads that lie side by side are one.
    let is_whole = [&k, &v].iter().all(|rows| rows.strides[1] as usize == d);
    let (heads, d) = if is_whole { (1, heads * d) } else { (heads, d) };
    let fits = |word: usize| {
        (d * dtype.size_in_bytes()).is_multiple_of(word)
            && kv.is_aligned(word)
            && [&k, &v].iter().all(|rows| rows.are_aligned(word, dtype))
    };
    let Some((word, kernel)) = WRITE_KV.iter().find(|(word, _)| fits(*word)) else {
        bail!("write_kv: pages of {dtype:?}, expected f32, f16 or bf16")
    };
    let values = word / dtype.size_in_bytes();
    let (d, plane) = (d / values, (blocks * block_size * heads * d / values) as u64);
    let [k_strides, v_strides] = [&k, &v].map(|rows| rows.strides.map(|stride| stride / values as u32));
    let threads = (1 << d.ilog2()).min(THREADS);
    let mut config = cuda::grid(batch.num_tokens(), (threads, heads.min(THREADS / threads)))?;
    config.grid_dim.1 = 2;
    let [heads, d] = [heads, d].map(|size| size as u32);
    let mut launch = stream.launch_builder(kernel.on(&device)?);
    launch.arg(&kv.value);
    for (rows, strides) in [(&k, &k_strides), (&v, &v_strides)] {
        launch.arg(&rows.address.value).arg(&strides[0]).arg(&strides[1]);
    }
    launch.arg(&slots.value).arg(&plane).arg(&heads).arg(&d);
    // SAFETY: the arguments are the kernel's, in its order; `Batch` keeps every slot within the pages that
    // `check_blocks` compared with kv.
    unsafe { launch.launch(config) }.w()?;
    Ok(())
}

/// Head sizes that the tensor cores take.
const SIZES: [usize; 4] = [64, 128, 256, 512];
const MAX_D: usize = 512;

/// A kernel for each of [`SIZES`], in f16 and in bf16.
type Sizes = [[Kernel; 2]; SIZES.len()];

macro_rules! sizes {
    ($module:ident, $name:literal) => {
        sizes!($module, $name, "")
    };
    ($module:ident, $name:literal, $suffix:literal) => {
        [
            sizes!($module, $name, "_d64", $suffix),
            sizes!($module, $name, "_d128", $suffix),
            sizes!($module, $name, "_d256", $suffix),
            sizes!($module, $name, "_d512", $suffix),
        ]
    };
    ($module:ident, $name:literal, $size:literal, $suffix:literal) => {
        [
            Kernel::new(&modules::$module, concat!($name, $size, "_f16", $suffix)),
            Kernel::new(&modules::$module, concat!($name, $size, "_bf16", $suffix)),
        ]
    };
}

static FLASH_WGMMA: Sizes = sizes!(FLASH_WGMMA, "flash_wgmma");
static FLASH_MMA: Sizes = sizes!(FLASH_MMA, "flash_mma");
static PAGED_DECODE: Sizes = sizes!(PAGED_DECODE, "paged_decode");
static PAGED_DECODE_ENTERING: Sizes = sizes!(PAGED_DECODE, "paged_decode", "_entering");
static PAGED_DECODE_CLUSTER: Sizes = sizes!(PAGED_DECODE, "paged_decode", "_entering_cluster");
static ANY_D128: Floats = floats!(ATTENTION_ANY, "attention_any_d128");
static ANY_D512: Floats = floats!(ATTENTION_ANY, "attention_any_d512");
static MERGE_SCALAR: Floats = floats!(ATTENTION_ANY, "attention_merge_scalar");
/// Moves four values at a time.
static MERGE_VECTOR: Floats = floats!(ATTENTION_ANY, "attention_merge_vector");

/// `q` `[N, Hq, D]` in rows, `kv` `[2, blocks, block_size, Hk, D]` contiguous, of one dtype.
pub fn paged_attention(
    device: &CudaDevice,
    q: &Tensor,
    kv: &Tensor,
    batch: &Batch,
    params: AttentionParams,
) -> Result<Tensor> {
    let (_, blocks, block_size, hk, d) = kv.dims5()?;
    let stream = device.cuda_stream();
    let kv = Operand::new(kv);
    let kv = kv.cuda(&stream)?;
    let keys = planes(kv.value, [blocks, block_size, hk, d], q.dtype());
    let max_blocks = batch.block_tables.dim(1)?;
    let shape = q.shape();
    cuda::output(device, shape, q.dtype(), |y| {
        run(device, q, keys, hk, blocks * block_size, Some((block_size, max_blocks)), batch, params, None, y)
    })
}

/// Keys and values of pages `[2, blocks, block_size, Hk, D]`.
fn planes(address: u64, [blocks, block_size, hk, d]: [usize; 4], dtype: DType) -> [Keys; 2] {
    let plane = (blocks * block_size * hk * d * dtype.size_in_bytes()) as u64;
    [address, address + plane].map(|address| Keys { address, strides: [(hk * d) as u32, d as u32] })
}

/// The way of a step's heads to attention, as `Entering` in `paged_decode.cu`: what a projection gives of keys and
/// values, or no addresses; angles; weights and epsilons of the norms of query, key and value.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Entering {
    pub k: u64,
    pub v: u64,
    pub cos: u64,
    pub sin: u64,
    pub norms: [HeadNorm; 3],
    /// Of k and of v, from token to token and from head to head.
    pub strides: [[u32; 2]; 2],
    pub half: u32,
}

/// Its weight, or none.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HeadNorm {
    pub weight: u64,
    pub eps: f32,
}

// SAFETY: addresses and numbers, laid out as in C; the kernel reads no padding.
unsafe impl DeviceRepr for Entering {}

/// Whether a step goes to attention in one kernel with its heads: `q` `[N, Hq, D]` in rows for `pages`.
pub(crate) fn takes_entering(device: &CudaDevice, q: &Tensor, batch: &Batch, params: AttentionParams) -> Result<bool> {
    let (gpu, (_, _, d)) = (Gpu::of(device)?, q.dims3()?);
    let Some(size) = SIZES.iter().position(|&size| size == d) else { return Ok(false) };
    let (_, shared) = decode_block(gpu, size, q.dtype());
    Ok(matches!(q.dtype(), DType::F16 | DType::BF16)
        && batch.host.iter().all(|sequence| sequence.tokens.len() == 1)
        && shared + entered_bytes(size) <= gpu.shared[0]
        && params.scale > 0.0)
}

/// Of the queries of a block of `paged_decode`.
fn entered_bytes(size: usize) -> usize {
    DECODE_ROWS * SIZES[size] * 2
}

/// As [`paged_attention`] of a step that [`takes_entering`] and whose heads are still to enter. Rows, pages, angles and
/// weights are aligned to 16 bytes.
pub(crate) fn enter_and_attend(
    device: &CudaDevice,
    q: &Tensor,
    (pages, layout): (&mut CudaStorage, &Layout),
    batch: &Batch,
    params: AttentionParams,
    entering: &Entering,
    y: &mut CudaStorage,
) -> Result<()> {
    let (_, blocks, block_size, hk, d) = layout.shape().dims5()?;
    let stream = device.cuda_stream();
    let pages = cuda::write(pages, layout, &stream)?;
    let keys = planes(pages.value, [blocks, block_size, hk, d], q.dtype());
    let max_blocks = batch.block_tables.dim(1)?;
    run(device, q, keys, hk, blocks * block_size, Some((block_size, max_blocks)), batch, params, Some(entering), y)
}

/// `q` `[N, Hq, D]`, `k` and `v` `[N, Hk, D]` in rows, of one dtype.
pub fn attention(
    device: &CudaDevice,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    batch: &Batch,
    params: AttentionParams,
) -> Result<Tensor> {
    let stream = device.cuda_stream();
    let (n, hk, _) = k.dims3()?;
    let (k, v) = (Operand::new(k), Operand::new(v));
    let (k, v) = (k.cuda_rows(&stream)?, v.cuda_rows(&stream)?);
    let keys = [&k, &v].map(|rows| Keys { address: rows.address.value, strides: rows.strides });
    cuda::output(device, q.shape(), q.dtype(), |y| run(device, q, keys, hk, n, None, batch, params, None, y))
}

/// Where the rows of keys or of values lie: strides in values, from token to token and from head to head.
#[derive(Clone, Copy)]
struct Keys {
    address: u64,
    strides: [u32; 2],
}

/// `pages` are the tokens of a block and the blocks of a table.
#[expect(clippy::too_many_arguments, reason = "three functions in one")]
fn run(
    device: &CudaDevice,
    q: &Tensor,
    keys: [Keys; 2],
    hk: usize,
    key_rows: usize,
    pages: Option<(usize, usize)>,
    batch: &Batch,
    params: AttentionParams,
    entering: Option<&Entering>,
    y: &mut CudaStorage,
) -> Result<()> {
    let ((n, hq, d), shape) = (q.dims3()?, q.shape());
    if d > MAX_D {
        bail!("attention: D is {d}, the cuda kernels take at most {MAX_D}")
    }
    let (dtype, stream) = (q.dtype(), device.cuda_stream());
    let q = Operand::new(q);
    let q = q.cuda_rows(&stream)?;
    let arrays = [&batch.cu_seqlens, &batch.context_lens, &batch.block_tables].map(Operand::new);
    let [starts, lens, tables] = arrays.each_ref().map(|operand| operand.cuda(&stream));
    let (starts, lens, tables) = (starts?, lens?, tables?);

    let (block_size, max_blocks) = pages.unwrap_or((0, 0));
    let [k, v] = keys;
    let step = Step {
        q: q.address.value,
        k: k.address,
        v: v.address,
        y: 0,
        partial: 0,
        cu_seqlens: starts.value,
        context_lens: lens.value,
        block_tables: tables.value,
        strides: [q.strides, k.strides, v.strides],
        num_tokens: n as u32,
        num_sequences: batch.num_sequences() as u32,
        hq: hq as u32,
        hk: hk as u32,
        d: d as u32,
        block_size: block_size as u32,
        max_blocks: max_blocks as u32,
        splits: 1,
        is_causal: u32::from(params.mask == Mask::Causal),
        window: params.window.map_or(u32::MAX, |window| window.min(u32::MAX as usize) as u32),
        scale: params.scale,
        softcap: params.softcap.unwrap_or(0.0),
    };
    let gpu = Gpu::of(device)?;
    let singles = batch.host.iter().filter(|sequence| sequence.tokens.len() == 1).count();
    let has_prompts = singles < batch.num_sequences();
    let y = cuda::write(y, &Layout::contiguous(shape), &stream)?;
    let step = Step { y: y.value, ..step };
    let call = Call { device, dtype, gpu, step, key_rows, has_prompts };
    match call.tensor_cores(&q)? {
        Some((size, prompt_kernel)) => {
            if let Some(kernel) = prompt_kernel {
                call.prompts(size, kernel)?;
            }
            if singles > 0 {
                call.decode(size, entering)?;
            }
            Ok(())
        }
        None if entering.is_some() => bail!("attention: heads can enter on the tensor cores alone"),
        None => call.any(),
    }
}

/// The kernels' argument, as `Step` in `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct Step {
    q: u64,
    k: u64,
    v: u64,
    y: u64,
    partial: u64,
    cu_seqlens: u64,
    context_lens: u64,
    block_tables: u64,
    /// Of q, k and v, from token to token and from head to head.
    strides: [[u32; 2]; 3],
    num_tokens: u32,
    num_sequences: u32,
    hq: u32,
    hk: u32,
    d: u32,
    block_size: u32,
    max_blocks: u32,
    splits: u32,
    is_causal: u32,
    window: u32,
    scale: f32,
    softcap: f32,
}

// SAFETY: addresses and numbers, laid out as in C without padding.
unsafe impl DeviceRepr for Step {}

/// How a prompt kernel is launched.
struct Prompts<'a> {
    function: &'a CudaFunction,
    /// Of queries and of keys in a tile.
    tile: [usize; 2],
    threads: usize,
    shared: usize,
    has_maps: bool,
}

struct Call<'a> {
    device: &'a CudaDevice,
    dtype: DType,
    gpu: &'a Gpu,
    step: Step,
    key_rows: usize,
    has_prompts: bool,
}

impl Call<'_> {
    /// Which of [`SIZES`] the heads have and the kernel for prompts, if there are any; nothing if the tensor cores
    /// cannot run the step.
    fn tensor_cores(&self, q: &Rows) -> Result<Option<(usize, Option<Prompts<'_>>)>> {
        let Step { k, v, strides, scale, .. } = self.step;
        let Some(size) = SIZES.iter().position(|&d| d == self.step.d as usize) else { return Ok(None) };
        // Rows move by 16 bytes; the maximum of scaled products is the scaled maximum.
        let are_aligned = q.are_aligned(16, self.dtype)
            && [k, v].iter().all(|address| address.is_multiple_of(16))
            && strides.iter().flatten().all(|stride| stride.is_multiple_of(8));
        if !matches!(self.dtype, DType::F16 | DType::BF16) || !are_aligned || scale <= 0.0 || scale.is_nan() {
            return Ok(None);
        }
        let (_, decode_shared) = decode_block(self.gpu, size, self.dtype);
        if !self.has_prompts {
            return Ok((decode_shared <= self.gpu.shared[0]).then_some((size, None)));
        }
        let prompts = match self.wgmma(size)? {
            Some(prompts) => prompts,
            None => self.mma(size)?,
        };
        Ok((prompts.shared.max(decode_shared) <= self.gpu.shared[0]).then_some((size, Some(prompts))))
    }

    fn of<'a>(&self, sizes: &'a Sizes, size: usize) -> &'a Kernel {
        &sizes[size][usize::from(self.dtype == DType::BF16)]
    }

    /// Needs pages that are whole boxes of a tile's rows: powers of two from a swizzle's 8 rows on.
    fn wgmma(&self, size: usize) -> Result<Option<Prompts<'_>>> {
        let block_size = self.step.block_size;
        let takes_pages = block_size == 0 || (block_size >= 8 && block_size.is_power_of_two());
        if !self.gpu.is_hopper || !takes_pages {
            return Ok(None);
        }
        let [rows, keys, q_stages, stages] =
            [[128, 128, 2, 2], [128, 128, 2, 2], [128, 64, 1, 2], [64, 64, 1, 1]][size];
        let tiles = (q_stages * rows + 2 * stages * keys) * SIZES[size] * self.dtype.size_in_bytes();
        // Tiles are aligned to 1024 bytes; a stage of queries has two barriers, one of keys and values four.
        let shared = 1024 + tiles + (2 * q_stages + 4 * stages) * 8;
        let function = self.of(&FLASH_WGMMA, size).on_sharing(self.device, shared)?;
        Ok(Some(Prompts { function, tile: [rows, keys], threads: 384, shared, has_maps: true }))
    }

    fn mma(&self, size: usize) -> Result<Prompts<'_>> {
        let d = SIZES[size];
        let (rows, keys, threads) = if d > 256 { (64, 32, 256) } else { (64, 64, 128) };
        // Beside the tiles, two tiles' slots.
        let shared = (rows + 2 * keys) * d * self.dtype.size_in_bytes() + 2 * keys * size_of::<u32>();
        let limit = self.gpu.shared[0];
        let function = self.of(&FLASH_MMA, size).on_sharing(self.device, shared.min(limit))?;
        Ok(Prompts { function, tile: [rows, keys], threads, shared, has_maps: false })
    }

    fn group(&self) -> usize {
        (self.step.hq / self.step.hk) as usize
    }

    /// Tiles of `rows` rows of all sequences, at most.
    fn tiles(&self, rows: usize) -> usize {
        self.step.num_tokens as usize * self.group() / rows + self.step.num_sequences as usize
    }

    fn prompts(&self, size: usize, kernel: Prompts) -> Result<()> {
        let [rows, keys] = kernel.tile;
        let (tiles, hk) = (self.tiles(rows), self.step.hk as usize);
        if !kernel.has_maps {
            let grid = [tiles, hk, 1];
            return self.launch(kernel.function, &self.step, grid, kernel.threads, kernel.shared, &[]);
        }
        let Step { k, v, strides, block_size, .. } = self.step;
        let box_rows = if block_size == 0 { keys } else { keys.min(block_size as usize) };
        let shape = [self.key_rows, hk, SIZES[size]];
        let map = |address, strides| TensorMap::new(address, strides, self.dtype, shape, box_rows);
        let maps = [map(k, strides[1])?, map(v, strides[2])?];
        // A block a multiprocessor takes tiles in turn.
        let grid = [self.gpu.multiprocessors.min(tiles * hk), 1, 1];
        self.launch(kernel.function, &self.step, grid, kernel.threads, kernel.shared, &maps)
    }

    fn decode(&self, size: usize, entering: Option<&Entering>) -> Result<()> {
        if let Some(entering) = entering
            && self.decode_in_clusters(size, entering)?
        {
            return Ok(());
        }
        let (warps, shared) = decode_block(self.gpu, size, self.dtype);
        let (kernels, shared) = match entering {
            Some(_) => (&PAGED_DECODE_ENTERING, shared + entered_bytes(size)),
            None => (&PAGED_DECODE, shared),
        };
        let kernel = self.of(kernels, size).on_sharing(self.device, shared)?;
        let heads = self.step.hk as usize * self.group().div_ceil(DECODE_ROWS);
        let blocks = heads * self.step.num_sequences as usize;
        let slots = self.gpu.multiprocessors * (self.gpu.shared[1] / (shared + 1024)).max(1);
        let splits = self.splits(blocks, slots);
        self.split(splits, |step| {
            let config = config([splits, heads, step.num_sequences as usize], warps * 32, shared)?;
            let mut launch = EarlyLaunch::of(self.device, kernel);
            launch.arg(step);
            if let Some(entering) = entering {
                launch.arg(entering);
            }
            // SAFETY: as for `launch`; who enters heads has compared the shapes behind its addresses too.
            unsafe { launch.launch(config) }
        })
    }

    /// A context in parts by the blocks of a cluster, which fit beside those of other kernels: of few sequences, unless
    /// their contexts may be long. Whether it was so.
    fn decode_in_clusters(&self, size: usize, entering: &Entering) -> Result<bool> {
        const MOST_BLOCKS: usize = 8;
        const LONGEST_PART: usize = 512;
        let (warps, stages) = match SIZES[size] {
            512 => (2, 2),
            256 => (4, 2),
            _ => (4, 3),
        };
        let shared = decode_pipelines(size, warps, stages, self.dtype) + entered_bytes(size);
        let heads = self.step.hk as usize * self.group().div_ceil(DECODE_ROWS);
        let blocks = heads * self.step.num_sequences as usize;
        let slots = self.gpu.multiprocessors * (self.gpu.shared[1] / (shared + 1024));
        let longest = (self.step.max_blocks * self.step.block_size).min(self.step.window) as usize;
        let most = MOST_BLOCKS.min(slots / blocks).min(longest / KEYS_OF_SPLIT).max(1);
        let parts = 1 << most.ilog2();
        if !self.gpu.is_hopper || parts == 1 || longest > parts * LONGEST_PART {
            return Ok(false);
        }
        let step = Step { splits: parts as u32, ..self.step };
        let kernel = self.of(&PAGED_DECODE_CLUSTER, size).on_sharing(self.device, shared)?;
        let config = config([parts, heads, step.num_sequences as usize], warps * 32, shared)?;
        let mut launch = EarlyLaunch::of(self.device, kernel);
        launch.in_clusters(parts).arg(&step).arg(entering);
        // SAFETY: as for `launch`; who enters heads has compared the shapes behind its addresses too.
        unsafe { launch.launch(config) }?;
        Ok(true)
    }

    fn any(&self) -> Result<()> {
        const ROWS: usize = 16;
        const KEYS: usize = 32;
        let shared = |d| (ROWS * d + KEYS * (d + 1)) * size_of::<f32>();
        let d = self.step.d as usize;
        let (kernel, max_d) = if d <= 128 { (&ANY_D128, 128) } else { (&ANY_D512, MAX_D) };
        let function = kernel.of(self.dtype)?.on_sharing(self.device, shared(max_d))?;
        let (tiles, hk) = (self.tiles(ROWS), self.step.hk as usize);
        // The merge takes sequences of one token.
        let splits = if self.has_prompts { 1 } else { self.splits(tiles * hk, 2 * self.gpu.multiprocessors) };
        self.split(splits, |step| self.launch(function, step, [tiles, hk, splits], 128, shared(d), &[]))
    }

    /// Parts of each context, for `blocks` times as many blocks in turn on a GPU that has `slots` for them: the fewer
    /// turns and the shorter the better. Lengths are not asked: a step is replayed with others.
    fn splits(&self, blocks: usize, slots: usize) -> usize {
        // What a block takes to start and end, in parts of the time that a whole context takes.
        const OVERHEAD: f64 = 1.0 / 32.0;
        let max_context = (self.step.max_blocks * self.step.block_size).min(self.step.window) as usize;
        let time = |splits: usize| (blocks * splits).div_ceil(slots) as f64 * (1.0 / splits as f64 + OVERHEAD);
        if max_context <= SHORT_CONTEXT {
            return 1;
        }
        let splits = 1..=(max_context / KEYS_OF_SPLIT).clamp(1, MAX_SPLITS);
        splits.min_by(|&a, &b| time(a).total_cmp(&time(b))).unwrap_or(1)
    }

    /// Runs `launch` over so many parts of each context, and merges them.
    fn split(&self, splits: usize, launch: impl Fn(&Step) -> Result<()>) -> Result<()> {
        let mut step = Step { splits: splits as u32, ..self.step };
        if splits == 1 {
            return launch(&step);
        }
        let values = (step.num_tokens * step.hq) as usize * splits * (step.d as usize + 2);
        let stream = self.device.cuda_stream();
        let partial = cuda::output(self.device, values, DType::F32, |partial| {
            let address = cuda::write(partial, &Layout::contiguous(values), &stream)?;
            step.partial = address.value;
            launch(&step)
        })?;
        let (kernel, values) = if step.d.is_multiple_of(4) { (&MERGE_VECTOR, 4) } else { (&MERGE_SCALAR, 1) };
        let grid = [step.hq as usize, step.num_sequences as usize, step.d.div_ceil(32 * values) as usize];
        self.launch_early(kernel.of(self.dtype)?.on(self.device)?, &step, grid, 128, 0)?;
        drop(partial);
        Ok(())
    }

    fn launch(
        &self,
        function: &CudaFunction,
        step: &Step,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
        maps: &[TensorMap],
    ) -> Result<()> {
        let config = config(grid, threads, shared)?;
        let stream = self.device.cuda_stream();
        let mut launch = stream.launch_builder(function);
        launch.arg(step);
        for map in maps {
            launch.arg(map);
        }
        // SAFETY: the arguments are the kernel's; `attention` and `paged_attention` have compared the shapes behind
        // them with each other and the batch's pages with the cache, and a grid has a block for every tile.
        unsafe { launch.launch(config) }.w()?;
        Ok(())
    }

    /// As `launch`, of a kernel that waits for its inputs itself.
    fn launch_early(
        &self,
        function: &CudaFunction,
        step: &Step,
        grid: [usize; 3],
        threads: usize,
        shared: usize,
    ) -> Result<()> {
        let config = config(grid, threads, shared)?;
        // SAFETY: as for `launch`.
        unsafe { EarlyLaunch::of(self.device, function).arg(step).launch(config) }
    }
}

fn config(grid: [usize; 3], threads: usize, shared: usize) -> Result<LaunchConfig> {
    if grid[0] > i32::MAX as usize || grid[1..].iter().any(|&blocks| blocks > 65535) {
        bail!("attention: a grid of {grid:?} blocks is more than cuda takes")
    }
    Ok(LaunchConfig {
        grid_dim: (grid[0] as u32, grid[1] as u32, grid[2] as u32),
        block_dim: (threads as u32, 1, 1),
        shared_mem_bytes: shared as u32,
    })
}

/// Warps of a block of `paged_decode`, and bytes of their pipelines: 192 KiB, or half as much for smaller GPUs.
fn decode_block(gpu: &Gpu, size: usize, dtype: DType) -> (usize, usize) {
    let warps = if gpu.shared[0] >= 192 << 10 { 1024 } else { 512 } / SIZES[size];
    (warps, decode_pipelines(size, warps, 3, dtype))
}

fn decode_pipelines(size: usize, warps: usize, stages: usize, dtype: DType) -> usize {
    const KEYS: usize = 16;
    warps * stages * 2 * KEYS * SIZES[size] * dtype.size_in_bytes()
}

/// Rows that a block of `paged_decode` takes.
const DECODE_ROWS: usize = 8;
/// A merge would take as long as such a context.
const SHORT_CONTEXT: usize = 512;
/// Of a split, at least.
const KEYS_OF_SPLIT: usize = 64;
/// As in `attention_any.cu`.
const MAX_SPLITS: usize = 64;
