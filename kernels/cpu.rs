//! How CPU ops read operands and hand back results: arithmetic is in f32 whatever the storage holds.

use std::borrow::Cow;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, DType, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, WithDType, bail};
use half::{bf16, f16};

pub(crate) use self::team::{reads, share, share_pieces};

mod team;

/// A storage type whose values are exact in f32.
pub(crate) trait Element: WithDType + Send + Sync {
    fn widen(self) -> f32;
    fn round(value: f32) -> Self;
}

impl Element for f32 {
    fn widen(self) -> f32 {
        self
    }
    fn round(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    fn widen(self) -> f32 {
        self.to_f32()
    }
    fn round(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// Runs `f` on one of the threads that CPU ops share their work among, so that none of them waits for a message from
/// outside to begin and another to return: worth it around a step of many short ops.
pub fn on_pool<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    // The emulator serves the thread whose test asked for it.
    #[cfg(feature = "emulator")]
    if crate::metal::emulator::emulator().is_some() {
        return f();
    }
    team::lead(f)
}

/// A contiguous operand that an op struct borrows as a tensor, locked for reading.
pub(crate) struct Operand<'a> {
    pub(crate) storage: StorageRef<'a>,
    pub(crate) layout: &'a Layout,
}

impl<'a> Operand<'a> {
    pub fn new(tensor: &'a Tensor) -> Self {
        let (storage, layout) = tensor.storage_and_layout();
        Self { storage, layout }
    }

    pub fn f32(&self) -> Result<Cow<'_, [f32]>> {
        match &*self.storage {
            Storage::Cpu(storage) => read_f32(storage, self.layout),
            _ => bail!("operand is not on the cpu"),
        }
    }

    /// The stored elements.
    pub fn elements<T: WithDType>(&self) -> Result<&[T]> {
        match &*self.storage {
            Storage::Cpu(storage) => view(storage.as_slice()?, self.layout),
            _ => bail!("operand is not on the cpu"),
        }
    }

    /// The whole storage of an operand that [`as_rows`] returned, and where its rows lie in it.
    pub fn rows<T: Element>(&self) -> Result<(&[T], RowStarts)> {
        match &*self.storage {
            Storage::Cpu(storage) => Ok((storage.as_slice()?, RowStarts::new(self.layout)?)),
            _ => bail!("operand is not on the cpu"),
        }
    }
}

/// A buffer that several tasks write, each its own part.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    buffer: PhantomData<&'a mut [T]>,
}

// SAFETY: nothing but `part` reaches the buffer, whose caller promises that no two parts overlap.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub fn new(buffer: &'a mut [T]) -> Self {
        Self { start: buffer.as_mut_ptr(), len: buffer.len(), buffer: PhantomData }
    }

    /// # Safety
    ///
    /// The part overlaps no other part still in use.
    #[allow(clippy::mut_from_ref)] // the point of the type
    pub unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(start + len <= self.len, "part {start}..{} of a buffer of {}", start + len, self.len);
        // SAFETY: within the buffer by the assertion, unaliased by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Asks for a part to be brought near.
    #[inline(always)]
    pub fn fetch(&self, part: Range<usize>) {
        crate::simd::prefetch_at(self.start.wrapping_add(part.start), part.len());
    }
}

/// The stored elements of a contiguous operand.
pub(crate) fn view<'a, T>(values: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&values[start..end]),
        None => bail!("operand of shape {:?} is not contiguous", layout.shape()),
    }
}

/// The values of a contiguous operand: borrowed if stored in f32, widened otherwise.
pub(crate) fn read_f32<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    Ok(match storage {
        CpuStorage::F32(values) => Cow::Borrowed(view(values, layout)?),
        CpuStorage::F16(values) => Cow::Owned(view(values, layout)?.iter().map(|v| v.widen()).collect()),
        CpuStorage::BF16(values) => Cow::Owned(view(values, layout)?.iter().map(|v| v.widen()).collect()),
        other => bail!("operand of dtype {:?}, expected f32, f16 or bf16", dtype_of(other)),
    })
}

/// The contiguous f32 region that an op writes in place.
pub(crate) fn write_f32<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("state of shape {:?} is not contiguous", layout.shape())
    };
    match storage {
        CpuStorage::F32(values) => Ok(&mut values[start..end]),
        other => bail!("state of dtype {:?}, expected f32", dtype_of(other)),
    }
}

/// Where the rows of an operand lie whose last dimension is contiguous, the others in any stride: what `narrow`
/// leaves of a merged projection.
pub(crate) struct RowStarts {
    offset: usize,
    /// Rows and strides of the dimensions before the last, those as one that lie in one stride.
    outer: Vec<(usize, usize)>,
}

impl RowStarts {
    pub fn new(layout: &Layout) -> Result<Self> {
        let (dims, strides) = match (layout.dims(), layout.stride()) {
            ([dims @ .., d], [strides @ .., stride]) if *stride == 1 || *d == 1 => (dims, strides),
            _ => bail!("operand of shape {:?} has a last dimension in strides", layout.shape()),
        };
        let mut outer: Vec<(usize, usize)> = Vec::with_capacity(dims.len());
        for (&dim, &stride) in dims.iter().zip(strides) {
            match outer.last_mut() {
                Some((rows, last)) if *last == dim * stride => (*rows, *last) = (*rows * dim, stride),
                _ => outer.push((dim, stride)),
            }
        }
        Ok(Self { offset: layout.start_offset(), outer })
    }

    /// Index of the first element of row `row`, counted over all dimensions but the last.
    #[inline(always)]
    pub fn start(&self, mut row: usize) -> usize {
        let mut start = self.offset;
        // No row lies beyond the first dimension, which saves a division.
        let Some((&(_, first), inner)) = self.outer.split_first() else { return start };
        for &(dim, stride) in inner.iter().rev() {
            start += row % dim * stride;
            row /= dim;
        }
        start + row * first
    }
}

/// `x` as a kernel takes it that reads [`RowStarts`] on the CPU, and rows of two strides on CUDA and Metal.
pub(crate) fn as_rows(x: &Tensor) -> Result<Tensor> {
    let takes_strides = match x.device() {
        Device::Cpu => true,
        Device::Cuda(_) | Device::Metal(_) => x.rank() <= 3,
    };
    if takes_strides && x.stride().last() == Some(&1) { Ok(x.clone()) } else { x.contiguous() }
}

/// The layout of an operand `[N, H D]` in rows as that of `[N, H, D]`, where that is `shape`; otherwise as it is.
pub(crate) fn with_heads(layout: &Layout, shape: &Shape) -> Layout {
    match (layout.dims(), layout.stride(), shape.dims()) {
        (&[n, width], &[stride, 1], &[rows, heads, d]) if n == rows && width == heads * d => {
            Layout::new(shape.clone(), vec![stride, d, 1], layout.start_offset())
        }
        _ => layout.clone(),
    }
}

/// `len` elements in rows of `d`, zero and then filled by `fill(first row, rows)`, on many threads when there are enough to
/// pay.
pub(crate) fn fill_rows<T: Element>(len: usize, d: usize, fill: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
    // About ten microseconds of work, as much as waking a thread costs.
    const ELEMENTS_PER_TASK: usize = 1 << 14;
    let rows = (ELEMENTS_PER_TASK / d.max(1)).max(1);
    let fill = |first: usize, part: &mut [MaybeUninit<T>]| {
        part.fill(MaybeUninit::new(T::round(0.0)));
        // SAFETY: all of it was just written.
        fill(first, unsafe { &mut *(part as *mut [MaybeUninit<T>] as *mut [T]) })
    };
    let mut out = Vec::with_capacity(len);
    let parts = Shared::new(&mut out.spare_capacity_mut()[..len]);
    share_pieces(0..len, (rows * d).max(1), |part| {
        // SAFETY: pieces do not overlap.
        fill(part.start / d, unsafe { parts.part(part.start, part.len()) })
    });
    // SAFETY: the parts cover it, and each was written.
    unsafe { out.set_len(len) };
    out
}

/// `len` zeros, written by all threads: one alone takes as long over a large result as all over the op.
pub(crate) fn zeros<T: Element>(len: usize) -> Vec<T> {
    fill_rows(len, 1, |_, _| {})
}

/// A tensor around the storage that an in-place op produced beside its target.
pub(crate) fn tensor(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

pub(crate) fn dtype_of(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}
