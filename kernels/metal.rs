//! How Metal ops describe their launches, and what runs a description: candle's Metal device, or in tests the
//! emulator, so that the grid, the threads and the arguments are tested where there is no Mac.
//!
//! An op's `metal.rs` allocates the result and hands one [`Launch`] to its [`Backend`]. A source is compiled once for
//! each GPU when the first of its kernels is needed; a pipeline is kept for each kernel and its constants.

#[cfg(feature = "metal")]
pub(crate) mod device;
#[cfg(any(test, feature = "emulator"))]
pub(crate) mod emulator;
#[cfg(any(test, feature = "metal"))]
mod pool;

use candle_core::backend::BackendStorage;
use candle_core::{DType, Layout, Result, Shape, Storage, Tensor, bail};

use crate::cpu::{Operand, tensor};

/// A `.metal` file with what all of them share before it.
pub(crate) struct Source {
    pub name: &'static str,
    pub text: &'static str,
}

/// The `Source` of a file beside the one that calls this, with the headers beside it that it needs.
macro_rules! source {
    ($name:literal $(, $header:literal)*) => {
        $crate::metal::Source {
            name: $name,
            text: concat!(
                include_str!("../metal.h"),
                $("\n#line 1 \"", $header, "\"\n", include_str!($header),)*
                "\n#line 1 \"",
                $name,
                ".metal\"\n",
                include_str!(concat!($name, ".metal"))
            ),
        }
    };
}
pub(crate) use source;

/// One run of a kernel.
pub(crate) struct Launch<'a, S> {
    pub source: &'static Source,
    /// The function is `<kernel>_<variant>`, or `<kernel>` if the variant is empty.
    pub kernel: &'static str,
    pub variant: &'static str,
    /// Function constants by index.
    pub constants: Vec<bool>,
    /// Threadgroups in the grid.
    pub threadgroups: [usize; 3],
    /// Threads in a threadgroup.
    pub threads: [usize; 3],
    /// By buffer index.
    pub arguments: Vec<Argument<'a, S>>,
}

impl<S> Launch<'_, S> {
    /// Name of the function.
    fn function(&self) -> String {
        match self.variant {
            "" => self.kernel.to_string(),
            variant => format!("{}_{variant}", self.kernel),
        }
    }
}

/// A buffer and the bytes before its first value, or a small struct of words.
pub(crate) enum Argument<'a, S> {
    Read(&'a S, usize),
    Write(&'a mut S, usize),
    Words(Vec<u32>),
    /// Nothing, where a constant says that the kernel does without.
    Absent,
}

/// What runs launches.
pub(crate) trait Backend {
    type Storage: BackendStorage;

    fn storage(storage: &Storage) -> Result<&Self::Storage>;

    fn wrap(storage: Self::Storage) -> Storage;

    /// An output that a launch writes in full; holds anything.
    fn allocate(&self, elements: usize, dtype: DType) -> Result<Self::Storage>;

    fn launch(&self, launch: Launch<Self::Storage>) -> Result<()>;
}

/// A tensor that `write` fills.
pub(crate) fn output<B: Backend>(
    backend: &B,
    shape: impl Into<Shape>,
    dtype: DType,
    write: impl FnOnce(&mut B::Storage) -> Result<()>,
) -> Result<Tensor> {
    let shape = shape.into();
    let mut out = backend.allocate(shape.elem_count(), dtype)?;
    if shape.elem_count() > 0 {
        write(&mut out)?;
    }
    Ok(tensor(B::wrap(out), shape))
}

impl<'a, S: BackendStorage> Argument<'a, S> {
    /// A contiguous operand that the launch reads.
    pub fn read(storage: &'a S, layout: &Layout) -> Result<Self> {
        Ok(Self::Read(storage, start(storage.dtype(), layout)?))
    }

    /// A contiguous operand that the launch writes.
    pub fn write(storage: &'a mut S, layout: &Layout) -> Result<Self> {
        let start = start(storage.dtype(), layout)?;
        Ok(Self::Write(storage, start))
    }
}

/// Bytes before a contiguous operand.
pub(crate) fn start(dtype: DType, layout: &Layout) -> Result<usize> {
    match layout.contiguous_offsets() {
        Some((start, _)) => Ok(start * dtype.size_in_bytes()),
        None => bail!("operand of shape {:?} is not contiguous", layout.shape()),
    }
}

/// Where the rows of an operand `[N, heads, D]`, `[N, D]` or `[D]` lie that [`as_rows`](crate::cpu::as_rows) returned;
/// `Rows` in `metal.h`.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub heads: u32,
    /// Values from one token's rows to the next's, and from one head's to the next's.
    pub strides: [u32; 2],
    /// Bytes before the first row.
    pub start: usize,
}

impl Rows {
    pub fn new(dtype: DType, layout: &Layout) -> Result<Self> {
        let (heads, strides) = match (layout.dims(), layout.stride()) {
            ([_], [1]) => (1, [0, 0]),
            (&[_, d], &[token, stride]) if stride == 1 || d == 1 => (1, [token, 0]),
            (&[_, heads, d], &[token, head, stride]) if stride == 1 || d == 1 => (heads, [token, head]),
            _ => bail!("operand of shape {:?} and strides {:?}, expected rows", layout.shape(), layout.stride()),
        };
        let strides = strides.map(|stride| stride as u32);
        Ok(Self { heads: heads as u32, strides, start: layout.start_offset() * dtype.size_in_bytes() })
    }

    /// Whether every row starts at a multiple of `bytes`, in values of `dtype`.
    pub fn are_aligned(&self, bytes: usize, dtype: DType) -> bool {
        let is_multiple = |stride: u32| (stride as usize * dtype.size_in_bytes()).is_multiple_of(bytes);
        self.start.is_multiple_of(bytes) && self.strides.into_iter().all(is_multiple)
    }

    pub fn words(&self) -> [u32; 3] {
        [self.heads, self.strides[0], self.strides[1]]
    }
}

/// The suffix of the kernels for `dtype`.
pub(crate) fn float(dtype: DType) -> Result<&'static str> {
    match dtype {
        DType::F32 => Ok("f32"),
        DType::F16 => Ok("f16"),
        DType::BF16 => Ok("bf16"),
        other => bail!("operand of dtype {other:?}, expected f32, f16 or bf16"),
    }
}

impl Operand<'_> {
    /// A contiguous operand that an op struct borrows as a tensor, as an argument that the launch reads.
    pub fn metal<B: Backend>(&self) -> Result<Argument<'_, B::Storage>> {
        Argument::read(B::storage(&self.storage)?, self.layout)
    }

    /// The rows of such an operand.
    pub fn metal_rows<B: Backend>(&self) -> Result<(Argument<'_, B::Storage>, Rows)> {
        let storage = B::storage(&self.storage)?;
        let rows = Rows::new(storage.dtype(), self.layout)?;
        Ok((Argument::Read(storage, rows.start), rows))
    }
}
