//! Where the blocks of a packed weight are: in memory of their own, or in a mapped file.

use std::ops::Deref;
use std::sync::Arc;

use super::{Q4Block, Q8Block};
use crate::memory::Mapped;

pub enum Storage<B> {
    Owned(Vec<B>),
    Mapped {
        /// First block, aligned for `B`.
        blocks: *const B,
        count: usize,
        /// Keeps the mapping, in which all of `blocks` lies.
        _file: Arc<Mapped>,
    },
}

// SAFETY: the pointer leads to memory that is only read and that `_file`, itself `Send` and `Sync`, keeps.
unsafe impl<B: Send> Send for Storage<B> {}
// SAFETY: as above.
unsafe impl<B: Sync> Sync for Storage<B> {}

/// Blocks without padding, of which any bytes are one.
///
/// # Safety
///
/// As the sentence above says.
unsafe trait Plain {}

// SAFETY: bytes and bf16, which add up to the block's size.
unsafe impl Plain for Q8Block {}
// SAFETY: as above.
unsafe impl Plain for Q4Block {}
const _: () = assert!(size_of::<Q8Block>() == 64 * 32 + 2 * 32 && size_of::<Q4Block>() == 32 * 32 + 2 * 2 * 32);

#[expect(private_bounds, reason = "nobody else has blocks")]
impl<B: Plain> Storage<B> {
    /// The blocks in `len` bytes of the file from `start` on; `None` if they are not whole, not aligned, or not there.
    pub fn map(file: Arc<Mapped>, start: usize, len: usize) -> Option<Self> {
        let blocks = file.get(start..start.checked_add(len)?)?.as_ptr().cast::<B>();
        let whole = len.is_multiple_of(size_of::<B>()) && blocks.is_aligned();
        whole.then(|| Self::Mapped { blocks, count: len / size_of::<B>(), _file: file })
    }

    pub fn as_bytes(&self) -> &[u8] {
        let blocks: &[B] = self;
        // SAFETY: blocks have no padding, so each of their bytes is initialised.
        unsafe { std::slice::from_raw_parts(blocks.as_ptr().cast(), size_of_val(blocks)) }
    }
}

impl<B> Deref for Storage<B> {
    type Target = [B];

    fn deref(&self) -> &[B] {
        match self {
            Self::Owned(blocks) => blocks,
            // SAFETY: `map`, which alone makes this variant, saw that `count` blocks lie there, and aligned; any bytes
            // are a block.
            Self::Mapped { blocks, count, .. } => unsafe { std::slice::from_raw_parts(*blocks, *count) },
        }
    }
}

impl<B> From<Vec<B>> for Storage<B> {
    fn from(blocks: Vec<B>) -> Self {
        Self::Owned(blocks)
    }
}
