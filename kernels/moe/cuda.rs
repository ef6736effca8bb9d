//! Routing and experts on CUDA: chooses the kernels by how many tokens an expert has.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{LaunchConfig, PushKernelArg};
use candle_core::cuda_backend::{CudaDevice, WrapErr};
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Tensor, bail};

use super::{Experts, Routing, SparseMlp, Stack, sparse_mlp};
use crate::activation::Activation;
use crate::cpu::Operand;
use crate::cuda::{self, Address, Floats, Kernel, floats, modules};
use crate::quantized::cuda as quantized;

/// For up to 256 and up to 1024 experts.
static ROUTE: [(usize, Floats); 2] = [(256, floats!(ROUTE, "moe_route_256")), (1024, floats!(ROUTE, "moe_route_1024"))];

macro_rules! halves {
    ($name:literal) => {
        [Kernel::new(&modules::MOE, concat!($name, "_f16")), Kernel::new(&modules::MOE, concat!($name, "_bf16"))]
    };
}
macro_rules! any {
    ($name:literal) => {
        [
            any!($name, "_f32_f32", "_f32_f16", "_f32_bf16"),
            any!($name, "_f16_f32", "_f16_f16", "_f16_bf16"),
            any!($name, "_bf16_f32", "_bf16_f16", "_bf16_bf16"),
        ]
    };
    ($name:literal, $f32:literal, $f16:literal, $bf16:literal) => {
        [
            Kernel::new(&modules::MOE, concat!($name, $f32)),
            Kernel::new(&modules::MOE, concat!($name, $f16)),
            Kernel::new(&modules::MOE, concat!($name, $bf16)),
        ]
    };
}
static GROUP: Kernel = Kernel::new(&modules::MOE, "moe_group");
static GATE_UP: [Kernel; 2] = halves!("moe_gate_up");
static DOWN: [Kernel; 2] = halves!("moe_down");
static DOWN_FEW: [Kernel; 2] = halves!("moe_down_few");
static GATE_UP_MANY: [Kernel; 2] = halves!("moe_gate_up_many");
static DOWN_MANY: [Kernel; 2] = halves!("moe_down_many");
static COMBINE: [Kernel; 2] = halves!("moe_combine");
/// By activations, then by weights, in f32, f16 and bf16: any sizes, a warp for a value.
static GATE_UP_ANY: [[Kernel; 3]; 3] = any!("moe_gate_up_any");
static DOWN_ANY: [[Kernel; 3]; 3] = any!("moe_down_any");

/// Of a block, and warps in it, except for tiles; as in the kernels.
const THREADS: usize = 256;
const WARPS: usize = 8;
const GROUP_THREADS: usize = 1024;
const ROUTE_THREADS: usize = 128;
/// Pairs and rows of weights of a tile, and its threads.
const TILE: usize = 64;
const TILE_ROWS: usize = 128;
const TILE_THREADS: usize = 128;
/// Shared memory of a block.
const STREAM_SHARED: usize = 81920;
const DOWN_FEW_SHARED: usize = 98304;
const TILE_SHARED: usize = 73728;

/// Tokens whose pairs are not worth grouping, and the most experts of each then.
const FEW: usize = 4;
const FEW_EXPERTS: usize = 32;
/// Pairs for each expert from which tiles are faster than streams.
const MANY: usize = 2;
/// Pairs for each packed expert up to which they are read pair by pair.
const FEW_PACKED: usize = 4;

/// Experts u32 and weights, `[N, k]`.
pub fn route(logits: &CudaStorage, layout: &Layout, k: usize) -> Result<(CudaStorage, CudaStorage)> {
    let (device, dtype, (n, num_experts)) = (&logits.device, logits.dtype(), layout.shape().dims2()?);
    let Some((_, kernel)) = ROUTE.iter().find(|(most, _)| num_experts <= *most) else {
        bail!("route: {num_experts} experts, the cuda kernels take at most {}", ROUTE[ROUTE.len() - 1].0)
    };
    let shape = Shape::from((n, k));
    let mut experts = cuda::uninit(device, &shape, DType::U32)?;
    let mut weights = cuda::uninit(device, &shape, dtype)?;
    let stream = device.cuda_stream();
    let logits = cuda::read(logits, layout, &stream)?;
    let ids = cuda::write(&mut experts, &Layout::contiguous(&shape), &stream)?;
    let factors = cuda::write(&mut weights, &Layout::contiguous(&shape), &stream)?;
    let blocks = n.div_ceil(ROUTE_THREADS / 32);
    let [n, num_experts, k] = [n, num_experts, k].map(|size| size as u32);
    let mut launch = stream.launch_builder(kernel.of(dtype)?.on(device)?);
    launch.arg(&logits.value).arg(&ids.value).arg(&factors.value).arg(&n).arg(&num_experts).arg(&k);
    // SAFETY: the arguments are the kernel's, in its order; `route` has checked that k is at most the experts.
    unsafe { launch.launch(cuda::grid(blocks, (ROUTE_THREADS, 1))?) }.w()?;
    drop((ids, factors));
    Ok((experts, weights))
}

/// The operands and sizes of one call; `activated` is scratch.
struct Call<'a> {
    device: &'a CudaDevice,
    x: Address<'a>,
    ids: Address<'a>,
    factors: Address<'a>,
    gate_up: Address<'a>,
    down: Address<'a>,
    activated: Address<'a>,
    y: Address<'a>,
    n: usize,
    k: usize,
    num_experts: usize,
    hidden: usize,
    intermediate: usize,
    dtype: DType,
}

impl SparseMlp<'_> {
    /// `x` `[N, H]`, contiguous.
    pub(super) fn run_cuda(&self, x: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
        let (Stack::Dense(gate_up), Stack::Dense(down)) = (&self.experts.gate_up, &self.experts.down) else {
            bail!("sparse_mlp: experts are on the cpu, x is not")
        };
        let (device, dtype, (n, k)) = (&x.device, x.dtype(), self.ids.dims2()?);
        let (hidden, intermediate) = (self.experts.hidden, self.experts.intermediate);
        let mut out = cuda::uninit(device, layout.shape(), dtype)?;
        if n == 0 {
            return Ok(out);
        }
        let stream = device.cuda_stream();
        let shape = Shape::from((n * k, intermediate));
        let mut activated = cuda::uninit(device, &shape, dtype)?;
        let operands = [self.ids, self.weights, gate_up, down].map(Operand::new);
        let [ids, factors, gate_up_at, down_at] = operands.each_ref().map(|operand| operand.cuda(&stream));
        let call = Call {
            device,
            x: cuda::read(x, layout, &stream)?,
            ids: ids?,
            factors: factors?,
            gate_up: gate_up_at?,
            down: down_at?,
            activated: cuda::write(&mut activated, &Layout::contiguous(&shape), &stream)?,
            y: cuda::write(&mut out, &Layout::contiguous(layout.shape()), &stream)?,
            n,
            k,
            num_experts: self.experts.num_experts,
            hidden,
            intermediate,
            dtype,
        };
        let is_wide = dtype != DType::F32
            && [gate_up, down].iter().all(|weights| weights.dtype() == dtype)
            && hidden.is_multiple_of(32)
            && intermediate.is_multiple_of(32)
            && [&call.x, &call.gate_up, &call.down].iter().all(|address| address.is_aligned(16));
        match is_wide {
            false => call.any(gate_up, down)?,
            true if n <= FEW && k <= FEW_EXPERTS => call.few()?,
            true => call.grouped()?,
        }
        drop(call);
        Ok(out)
    }
}

/// As `sparse_mlp`, for packed experts: few pairs read theirs one by one, many find all of them unpacked. `None` if they are
/// not packed.
pub fn packed(device: &CudaDevice, x: &Tensor, routing: &Routing, experts: &Experts) -> Result<Option<Tensor>> {
    let &Experts { ref gate_up, ref down, num_experts, hidden, intermediate } = experts;
    let (Some(gate_up), Some(down)) = (gate_up.on_device(), down.on_device()) else { return Ok(None) };
    let (ids, (n, k), dtype) = (routing.experts.contiguous()?, routing.experts.dims2()?, x.dtype());
    let x = x.contiguous()?;
    if n > 0 && n * k <= FEW_PACKED * num_experts && hidden.is_multiple_of(8) {
        let activated = gate_up.chosen(device, &x, &ids, k, Some(Activation::Silu))?;
        let terms = activated.map(|activated| down.chosen(device, &activated, &ids, 1, None)).transpose()?;
        if let Some(terms) = terms.flatten() {
            return combined(device, &terms, &ids, &routing.weights.contiguous()?, [num_experts, hidden]).map(Some);
        }
    }
    let stacks = (gate_up.unpacked(device, dtype)?, down.unpacked(device, dtype)?);
    let (gate_up, down) = (Stack::Dense(stacks.0), Stack::Dense(stacks.1));
    sparse_mlp(&x, routing, &Experts { gate_up, down, num_experts, hidden, intermediate }).map(Some)
}

/// The weighted sums of `terms` `[N k, H]` in f16 or bf16, `ids` and `weights` `[N, k]`, `H` a multiple of 8.
fn combined(
    device: &CudaDevice,
    terms: &Tensor,
    ids: &Tensor,
    weights: &Tensor,
    [num_experts, hidden]: [usize; 2],
) -> Result<Tensor> {
    let ((n, k), dtype) = (ids.dims2()?, terms.dtype());
    let stream = device.cuda_stream();
    let operands = [terms, ids, weights].map(Operand::new);
    let [terms, ids, weights] = operands.each_ref().map(|operand| operand.cuda(&stream));
    let (terms, ids, weights) = (terms?, ids?, weights?);
    let shape = Shape::from((n, hidden));
    cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let addresses = [terms.value, ids.value, weights.value, y.value];
        combine(device, dtype, addresses, [n, num_experts, hidden, k])
    })
}

/// Queues [`combined`]'s kernel for terms, ids, weights and sums at these addresses.
fn combine(
    device: &CudaDevice,
    dtype: DType,
    addresses: [u64; 4],
    [n, num_experts, hidden, k]: [usize; 4],
) -> Result<()> {
    let stream = device.cuda_stream();
    let mut launch = stream.launch_builder(COMBINE[usize::from(dtype == DType::BF16)].on(device)?);
    for address in &addresses {
        launch.arg(address);
    }
    let blocks = n * (hidden / 8).div_ceil(THREADS);
    let [num_experts, hidden, k] = [num_experts, hidden, k].map(|size| size as u32);
    launch.arg(&num_experts).arg(&hidden).arg(&k);
    // SAFETY: the arguments are the kernel's, in its order; `sparse_mlp` and `Experts::new` have compared the shapes behind
    // the addresses.
    unsafe { launch.launch(cuda::grid(blocks, (THREADS, 1))?) }.w().map(drop)
}

impl Stack {
    fn on_device(&self) -> Option<quantized::Stack<'_>> {
        match self {
            &Self::OnDevice { format, ref words, dims: [count, outer, inner] } => {
                Some(quantized::Stack { words, format, count, dims: [outer, inner] })
            }
            _ => None,
        }
    }
}

// SAFETY of the launches below: the arguments are the kernels', in their order; `Experts::new` and `sparse_mlp` have
// compared the shapes, and kernels leave out experts that are not there.
impl Call<'_> {
    fn any(&self, gate_up: &Tensor, down: &Tensor) -> Result<()> {
        let place = |dtype: DType| match dtype {
            DType::F32 => Ok(0),
            DType::F16 => Ok(1),
            DType::BF16 => Ok(2),
            other => bail!("sparse_mlp: operand of dtype {other:?}, expected f32, f16 or bf16"),
        };
        let stream = self.device.cuda_stream();
        let [n, pairs, num_experts, hidden, intermediate, k] = self.words();
        let kernel = &GATE_UP_ANY[place(self.dtype)?][place(gate_up.dtype())?];
        let mut launch = stream.launch_builder(kernel.on(self.device)?);
        for address in [&self.x, &self.gate_up, &self.ids, &self.activated] {
            launch.arg(&address.value);
        }
        launch.arg(&pairs).arg(&num_experts).arg(&hidden).arg(&intermediate).arg(&k);
        let blocks = (self.n * self.k * self.intermediate).div_ceil(WARPS);
        // SAFETY: see above.
        unsafe { launch.launch(cuda::grid(blocks, (THREADS, 1))?) }.w()?;

        let kernel = &DOWN_ANY[place(self.dtype)?][place(down.dtype())?];
        let mut launch = stream.launch_builder(kernel.on(self.device)?);
        for address in [&self.activated, &self.down, &self.ids, &self.factors, &self.y] {
            launch.arg(&address.value);
        }
        launch.arg(&n).arg(&num_experts).arg(&hidden).arg(&intermediate).arg(&k);
        // SAFETY: see above.
        unsafe { launch.launch(cuda::grid((self.n * self.hidden).div_ceil(WARPS), (THREADS, 1))?) }.w().map(drop)
    }

    /// Each pair by itself, and the sum beside the second product.
    fn few(&self) -> Result<()> {
        self.stream_gate_up(self.n * self.k, [0, 0])?;
        let stream = self.device.cuda_stream();
        let [_, _, num_experts, hidden, intermediate, k] = self.words();
        let mut launch = stream.launch_builder(DOWN_FEW[self.half()].on_sharing(self.device, DOWN_FEW_SHARED)?);
        for address in [&self.activated, &self.down, &self.ids, &self.factors, &self.y] {
            launch.arg(&address.value);
        }
        launch.arg(&num_experts).arg(&hidden).arg(&intermediate).arg(&k);
        let config = shared(cuda::grid(self.n * self.hidden / 16, (THREADS, 1))?, DOWN_FEW_SHARED);
        // SAFETY: see above.
        unsafe { launch.launch(config) }.w().map(drop)
    }

    /// Pairs grouped by expert.
    fn grouped(&self) -> Result<()> {
        let (stream, pairs) = (self.device.cuda_stream(), self.n * self.k);
        let tiles = pairs / TILE + self.num_experts;
        let is_many =
            pairs >= MANY * self.num_experts && self.hidden.is_multiple_of(128) && self.intermediate.is_multiple_of(64);
        let shapes = [self.num_experts + 1, pairs, tiles, pairs * self.hidden].map(Shape::from);
        let dtypes = [DType::U32, DType::U32, DType::U32, self.dtype];
        let mut scratch = Vec::new();
        for (shape, dtype) in shapes.iter().zip(dtypes) {
            scratch.push(cuda::uninit(self.device, shape, dtype)?);
        }
        let mut addresses = Vec::new();
        for (storage, shape) in scratch.iter_mut().zip(&shapes) {
            addresses.push(cuda::write(storage, &Layout::contiguous(shape), &stream)?);
        }
        let [starts, order, tile_experts, terms] = [0, 1, 2, 3].map(|i| &addresses[i].value);
        let [_, pair_count, num_experts, hidden, intermediate, k] = self.words();

        let mut launch = stream.launch_builder(GROUP.on(self.device)?);
        launch.arg(&self.ids.value).arg(starts).arg(order).arg(tile_experts).arg(&pair_count).arg(&num_experts);
        let config = shared(cuda::grid(1, (GROUP_THREADS, 1))?, self.num_experts * 4);
        // SAFETY: see above.
        unsafe { launch.launch(config) }.w()?;

        if is_many {
            let mut launch = stream.launch_builder(GATE_UP_MANY[self.half()].on_sharing(self.device, TILE_SHARED)?);
            launch.arg(&self.x.value).arg(&self.gate_up.value).arg(starts).arg(order).arg(tile_experts);
            launch.arg(&self.activated.value).arg(&hidden).arg(&intermediate).arg(&k);
            let config = tile_grid(tiles, self.intermediate / (TILE_ROWS / 2))?;
            // SAFETY: see above.
            unsafe { launch.launch(config) }.w()?;
            let mut launch = stream.launch_builder(DOWN_MANY[self.half()].on_sharing(self.device, TILE_SHARED)?);
            launch.arg(&self.activated.value).arg(&self.down.value).arg(starts).arg(order).arg(tile_experts);
            launch.arg(terms).arg(&hidden).arg(&intermediate);
            // SAFETY: see above.
            unsafe { launch.launch(tile_grid(tiles, self.hidden / TILE_ROWS)?) }.w()?;
        } else {
            self.stream_gate_up(self.num_experts, [*starts, *order])?;
            let mut launch = stream.launch_builder(DOWN[self.half()].on_sharing(self.device, STREAM_SHARED)?);
            launch.arg(&self.activated.value).arg(&self.down.value).arg(starts).arg(order).arg(terms);
            launch.arg(&hidden).arg(&intermediate);
            let blocks = self.num_experts * self.hidden.div_ceil(32 * WARPS);
            // SAFETY: see above.
            unsafe { launch.launch(shared(cuda::grid(blocks, (THREADS, 1))?, STREAM_SHARED)) }.w()?;
        }

        let addresses = [*terms, self.ids.value, self.factors.value, self.y.value];
        combine(self.device, self.dtype, addresses, [self.n, self.num_experts, self.hidden, self.k])
    }

    /// `groups` of the pairs from `starts` in `order`, or single pairs where these are null.
    fn stream_gate_up(&self, groups: usize, [starts, order]: [u64; 2]) -> Result<()> {
        let stream = self.device.cuda_stream();
        let [_, _, num_experts, hidden, intermediate, k] = self.words();
        let mut launch = stream.launch_builder(GATE_UP[self.half()].on_sharing(self.device, STREAM_SHARED)?);
        launch.arg(&self.x.value).arg(&self.gate_up.value).arg(&self.ids.value).arg(&starts).arg(&order);
        launch.arg(&self.activated.value).arg(&num_experts).arg(&hidden).arg(&intermediate).arg(&k);
        let config = shared(cuda::grid(groups * self.intermediate / 16, (THREADS, 1))?, STREAM_SHARED);
        // SAFETY: see above.
        unsafe { launch.launch(config) }.w().map(drop)
    }

    fn half(&self) -> usize {
        usize::from(self.dtype == DType::BF16)
    }

    fn words(&self) -> [u32; 6] {
        [self.n, self.n * self.k, self.num_experts, self.hidden, self.intermediate, self.k].map(|size| size as u32)
    }
}

fn shared(config: LaunchConfig, bytes: usize) -> LaunchConfig {
    LaunchConfig { shared_mem_bytes: bytes as u32, ..config }
}

fn tile_grid(tiles: usize, rows: usize) -> Result<LaunchConfig> {
    let config = cuda::grid(tiles, (TILE_THREADS, 1))?;
    Ok(shared(LaunchConfig { grid_dim: (config.grid_dim.0, rows as u32, 1), ..config }, TILE_SHARED))
}
