//! Products with packed weights on CUDA: up to 64 rows on the matrix units as the weight streams by, more with the weight
//! unpacked first.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::LaunchConfig;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

use super::{GROUP, OUTS, Quantization, QuantizedMatrix};
use crate::activation::Activation;
use crate::cpu::{Operand, as_rows, tensor};
use crate::cuda::{self, EarlyLaunch, Floats, Gpu, Kernel, floats, modules};
use crate::linear::{Around, by_candle, cuda as linear};

macro_rules! kernels {
    ($module:ident, $name:literal) => {
        [
            [
                Kernel::new(&modules::$module, concat!($name, "_q8_f16")),
                Kernel::new(&modules::$module, concat!($name, "_q8_bf16")),
            ],
            [
                Kernel::new(&modules::$module, concat!($name, "_q4_f16")),
                Kernel::new(&modules::$module, concat!($name, "_q4_bf16")),
            ],
        ]
    };
}

/// By format, in f16 and in bf16.
type Kernels = [[Kernel; 2]; 2];
/// Of one row, plain and gated.
static ROW: [Kernels; 2] = [kernels!(QUANTIZED, "quantized_linear"), kernels!(QUANTIZED, "quantized_linear_gated")];
/// Of rows with an id each.
static CHOSEN: [Kernels; 2] = [kernels!(QUANTIZED, "quantized_chosen"), kernels!(QUANTIZED, "quantized_chosen_gated")];
/// Of blocks of 8 and of 16 rows.
static TILES: [[Kernels; 2]; 2] = [
    [kernels!(QUANTIZED_TILES, "quantized_tiles_8"), kernels!(QUANTIZED_TILES, "quantized_tiles_8_gated")],
    [kernels!(QUANTIZED_TILES, "quantized_tiles_16"), kernels!(QUANTIZED_TILES, "quantized_tiles_16_gated")],
];
/// By format.
static ROWS: [Floats; 2] = [floats!(QUANTIZED, "quantized_rows_q8"), floats!(QUANTIZED, "quantized_rows_q4")];
static UNPACK: [Floats; 2] = [floats!(QUANTIZED, "quantized_unpack_q8"), floats!(QUANTIZED, "quantized_unpack_q4")];

/// As in the kernels: warps of a block, of one that unpacks.
const WARPS: usize = 16;
const UNPACKING_WARPS: usize = 4;
/// From more rows on, unpacking the weight for cuBLAS takes less time.
const MAX_ROWS: usize = 64;
/// What a block of one row has in shared memory beside its dynamic one.
const OTHER_SHARED: usize = 10 << 10;

fn of(format: Quantization) -> usize {
    usize::from(format == Quantization::Q4)
}

/// Bytes of shared memory for a row of x and the sums of its groups.
fn row_shared(inner: usize, dtype: DType) -> usize {
    inner.div_ceil(GROUP) * (GROUP * dtype.size_in_bytes() + size_of::<f32>())
}

/// Bytes of shared memory for the sums of each warp, `kinds` weights.
fn tile_shared(rows: usize, kinds: usize) -> usize {
    kinds * WARPS * rows * (OUTS + 1) * size_of::<f32>()
}

fn words(weight: &QuantizedMatrix) -> Result<&Tensor> {
    match weight.on_device() {
        Some(words) => Ok(words),
        None => bail!("quantized: the weight is on the cpu, x on a gpu"),
    }
}

/// `x` `[N, I]` times the weight, with what surrounds it.
pub fn quantized_linear(
    device: &CudaDevice,
    x: &Tensor,
    weight: &QuantizedMatrix,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Tensor> {
    if let Some(y) = few_rows(device, x, weight, bias, around)? {
        return Ok(y);
    }
    let normed = around.norm.map(|norm| norm.apply(x)).transpose()?;
    let x = as_rows(normed.as_ref().unwrap_or(x))?;
    let around = Around { norm: None, ..around };
    let few = around.behind_sum(|onto| few_rows(device, &x, weight, bias, Around { onto, ..Around::default() }))?;
    match few {
        Some(y) => Ok(y),
        None => many_rows(device, &x, weight, bias, around),
    }
}

/// Not by kernels of few rows, whatever there are: those fetch a weight before the kernel ahead of them has ended, and
/// here that one writes it.
fn many_rows(
    device: &CudaDevice,
    x: &Tensor,
    weight: &QuantizedMatrix,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Tensor> {
    let (dims, packed) = (weight.dims(), words(weight)?);
    let weight =
        cuda::output(device, (dims[0], dims[1]), x.dtype(), |y| unpack(device, packed, weight.format(), dims, y))?;
    if let Some(y) = linear::many_rows(device, x, &weight, bias, around)? {
        return Ok(y);
    }
    around.apply(x, |x| by_candle(x, &weight, bias))
}

/// With the norm of one row, and a gate whose halves are whole panels.
fn few_rows(
    device: &CudaDevice,
    x: &Tensor,
    weight: &QuantizedMatrix,
    bias: Option<&Tensor>,
    around: Around,
) -> Result<Option<Tensor>> {
    let ((rows, inner), [weight_rows, _], dtype) = (x.dims2()?, weight.dims(), x.dtype());
    let kinds = if around.gate.is_some() { 2 } else { 1 };
    let outer = weight_rows / kinds;
    let tile = match rows {
        1 => None,
        2..=8 => Some(8),
        _ => Some(16),
    };
    let gpu = Gpu::of(device)?;
    let most_shared = gpu.shared[0] - OTHER_SHARED;
    let shared = tile.map_or(row_shared(inner, dtype), |rows| tile_shared(rows, kinds));
    let takes = (1..=MAX_ROWS).contains(&rows)
        && matches!(dtype, DType::F16 | DType::BF16)
        && inner.is_multiple_of(8)
        && shared <= most_shared
        && (around.norm.is_none() || tile.is_none())
        && (kinds == 1 || (outer.is_multiple_of(OUTS) && bias.is_none() && around.onto.is_none()));
    if !takes {
        return Ok(None);
    }
    let shape = Shape::from((rows, outer));
    if let Some(onto) = around.onto
        && (onto.shape() != &shape || onto.dtype() != dtype)
    {
        bail!("quantized linear: onto is {:?} {:?}, expected {dtype:?} {:?}", onto.dims(), onto.dtype(), shape.dims())
    }
    let x = as_rows(x)?;
    let norm_weight = around.norm.map(|norm| norm.weight.contiguous()).transpose()?;
    let (bias, onto) = (bias.map(Tensor::contiguous).transpose()?, around.onto.map(as_rows).transpose()?);
    let stream = device.cuda_stream();
    let (x, weights) = (Operand::new(&x), Operand::new(words(weight)?));
    let [norm_weight, bias, onto] = [&norm_weight, &bias, &onto].map(|tensor| tensor.as_ref().map(Operand::new));
    let (x, weights) = (x.cuda_rows(&stream)?, weights.cuda(&stream)?);
    let norm_weight = norm_weight.as_ref().map(|weight| weight.cuda(&stream)).transpose()?;
    if !x.are_aligned(16, dtype) || norm_weight.as_ref().is_some_and(|weight| !weight.is_aligned(16)) {
        return Ok(None);
    }
    let bias = bias.as_ref().map(|bias| bias.cuda(&stream)).transpose()?;
    let onto = onto.as_ref().map(|onto| onto.cuda_rows(&stream)).transpose()?;
    let by_kind = tile.map_or(&ROW, |rows| &TILES[rows / 16]);
    let kernel = &by_kind[kinds - 1][of(weight.format())][usize::from(dtype == DType::BF16)];
    let [norm_weight, bias] = [&norm_weight, &bias].map(|address| address.as_ref().map_or(0, |address| address.value));
    let eps = around.norm.map_or(0.0, |norm| norm.eps as f32);
    let (onto, onto_stride) = onto.as_ref().map_or((0, 0), |onto| (onto.address.value, onto.strides[0]));
    let activation = linear::activation(around.gate);
    // As many blocks as run at once, one a multiprocessor, each with several panels in turn.
    let row_blocks = tile.map_or(1, |tile| rows.div_ceil(tile));
    let blocks = outer.div_ceil(OUTS).min((gpu.multiprocessors / row_blocks).max(1));
    let mut config = LaunchConfig { shared_mem_bytes: shared as u32, ..cuda::grid(blocks, (WARPS * 32, 1))? };
    config.grid_dim.1 = row_blocks as u32;
    let [rows, inner, weight_rows] = [rows, inner, weight_rows].map(|size| size as u32);
    let y = cuda::output(device, shape.clone(), dtype, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::of(device, kernel.on_sharing(device, most_shared)?);
        launch.arg(&x.address.value);
        match tile {
            None => launch.arg(&norm_weight).arg(&eps).arg(&weights.value).arg(&bias).arg(&onto).arg(&y.value),
            Some(_) => {
                launch.arg(&x.strides[0]).arg(&weights.value).arg(&bias).arg(&onto).arg(&onto_stride).arg(&y.value);
                launch.arg(&rows)
            }
        };
        launch.arg(&inner).arg(&weight_rows).arg(&activation);
        // SAFETY: the arguments are the kernel's, in its order; shapes, dtypes and alignment were compared above, and the
        // words are the blocks of `weight_rows` by `inner` weights.
        unsafe { launch.launch(config) }
    })?;
    Ok(Some(y))
}

/// Packed weights `[O, I]` of one format, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Stack<'a> {
    pub words: &'a Tensor,
    pub format: Quantization,
    pub count: usize,
    pub dims: [usize; 2],
}

impl Stack<'_> {
    /// Row `i` of the result is row `i / share` of `x` `[N, I]`, contiguous, times the weight `ids[i]`, and undefined for an
    /// id beyond them. A gate takes the halves of the product. `None` where no kernel takes it.
    pub fn chosen(
        self,
        device: &CudaDevice,
        x: &Tensor,
        ids: &Tensor,
        share: usize,
        gate: Option<Activation>,
    ) -> Result<Option<Tensor>> {
        let Self { words, format, count, dims: [weight_rows, inner] } = self;
        let (rows, kinds, dtype) = (ids.elem_count(), if gate.is_some() { 2 } else { 1 }, x.dtype());
        let outer = weight_rows / kinds;
        let shared = row_shared(inner, dtype);
        let most_shared = Gpu::of(device)?.shared[0] - OTHER_SHARED;
        let takes = matches!(dtype, DType::F16 | DType::BF16)
            && (1..=usize::from(u16::MAX)).contains(&rows)
            && inner.is_multiple_of(8)
            && outer.is_multiple_of(OUTS)
            && shared <= most_shared;
        let stream = device.cuda_stream();
        let [x, words, ids] = [x, words, ids].map(Operand::new);
        let (x, words, ids) = (x.cuda(&stream)?, words.cuda(&stream)?, ids.cuda(&stream)?);
        if !takes || !x.is_aligned(16) {
            return Ok(None);
        }
        let kernel = &CHOSEN[kinds - 1][of(format)][usize::from(dtype == DType::BF16)];
        let mut config = cuda::grid(outer / OUTS, (WARPS * 32, 1))?;
        (config.grid_dim.1, config.shared_mem_bytes) = (rows as u32, shared as u32);
        let [inner, weight_rows, count, share] = [inner, weight_rows, count, share].map(|size| size as u32);
        let activation = linear::activation(gate);
        let shape = Shape::from((rows, outer));
        let y = cuda::output(device, shape.clone(), dtype, |y| {
            let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
            let mut launch = EarlyLaunch::of(device, kernel.on_sharing(device, most_shared)?);
            launch.arg(&x.value).arg(&words.value).arg(&ids.value).arg(&y.value).arg(&inner).arg(&weight_rows);
            launch.arg(&count).arg(&share).arg(&activation);
            // SAFETY: the arguments are the kernel's, in its order; a row of blocks has a row of the result, and `words` are
            // the blocks of `count` weights.
            unsafe { launch.launch(config) }
        })?;
        Ok(Some(y))
    }

    /// All of them, `[count, O, I]` in `dtype`. Not for a kernel that fetches weights before the one ahead has ended. A
    /// recording gives the memory back, large as it is, when the tensor is dropped.
    pub fn unpacked(self, device: &CudaDevice, dtype: DType) -> Result<Tensor> {
        let Self { words, format, count, dims: [outer, inner] } = self;
        let unpacked = |words: &Tensor, dims: [usize; 2]| {
            let mut storage = cuda::uninit(device, &Shape::from((dims[0], dims[1])), dtype)?;
            unpack(device, words, format, dims, &mut storage)?;
            Ok::<_, candle_core::Error>(tensor(Storage::Cuda(storage), (dims[0], dims[1])))
        };
        if outer.is_multiple_of(OUTS) {
            return unpacked(words, [count * outer, inner])?.reshape((count, outer, inner));
        }
        let len = words.elem_count() / count;
        let of = |i| unpacked(&words.narrow(0, i * len, len)?, [outer, inner]);
        Tensor::stack(&(0..count).map(of).collect::<Result<Vec<_>>>()?, 0)
    }
}

/// Writes the weight `[O, I]` to `y`, in its dtype.
fn unpack(
    device: &CudaDevice,
    words: &Tensor,
    format: Quantization,
    [outer, inner]: [usize; 2],
    y: &mut CudaStorage,
) -> Result<()> {
    let stream = device.cuda_stream();
    let words = Operand::new(words);
    let words = words.cuda(&stream)?;
    let blocks = outer.div_ceil(OUTS) * inner.div_ceil(GROUP);
    let config = cuda::grid(blocks.div_ceil(UNPACKING_WARPS), (UNPACKING_WARPS * 32, 1))?;
    let kernel = UNPACK[of(format)].of(y.dtype())?;
    let y = cuda::write(y, &Layout::contiguous((outer, inner)), &stream)?;
    let [inner, outer] = [inner, outer].map(|size| size as u32);
    let mut launch = EarlyLaunch::new(device, kernel)?;
    launch.arg(&words.value).arg(&y.value).arg(&inner).arg(&outer);
    // SAFETY: the arguments are the kernel's, in its order; a warp has each block of the weight.
    unsafe { launch.launch(config) }
}

/// The rows `ids` `[N]` contiguous, `[N, I]` in f32.
pub fn rows(device: &CudaDevice, weight: &QuantizedMatrix, ids: &Tensor) -> Result<Tensor> {
    let (n, [outer, inner]) = (ids.dims1()?, weight.dims());
    let shape = Shape::from((n, inner));
    let stream = device.cuda_stream();
    let (words, ids) = (Operand::new(words(weight)?), Operand::new(ids));
    let (words, ids) = (words.cuda(&stream)?, ids.cuda(&stream)?);
    const THREADS: usize = 256;
    if n > usize::from(u16::MAX) {
        bail!("quantized: {n} rows at once, a gpu takes {}", u16::MAX)
    }
    let mut config = cuda::grid(inner.div_ceil(THREADS), (THREADS, 1))?;
    config.grid_dim.1 = n as u32;
    let [of_inner, of_outer] = [inner, outer].map(|size| size as u32);
    cuda::output(device, shape.clone(), DType::F32, |y| {
        let y = cuda::write(y, &Layout::contiguous(&shape), &stream)?;
        let mut launch = EarlyLaunch::new(device, ROWS[of(weight.format())].of(DType::F32)?)?;
        launch.arg(&words.value).arg(&ids.value).arg(&y.value).arg(&of_inner).arg(&of_outer);
        // SAFETY: the arguments are the kernel's, in its order; a block of threads has a row of each id.
        unsafe { launch.launch(config) }
    })
}
