//! Memory for weights: their own, or that of a file.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::Mmap;

/// A file, mapped for reading. It stays open, so a lock on it lasts as long as the mapping.
pub struct Mapped {
    bytes: Mmap,
    _file: File,
}

impl Mapped {
    /// Maps the whole file. It must not become shorter while it is mapped.
    ///
    /// # Errors
    ///
    /// The system refuses.
    pub fn new(file: File) -> io::Result<Self> {
        // SAFETY: whoever keeps weights in files replaces them by new ones and never writes to one that is there. A
        // file that another process cuts short all the same ends this one with a bus error, which no reader of a
        // mapping can prevent.
        let bytes = unsafe { Mmap::map(&file)? };
        Ok(Self { bytes, _file: file })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// An empty vector with room for `capacity` elements, on huge pages where the system grants them: a product reads its
/// weights from end to end, and with small pages it waits for address translation at every one of them.
pub fn with_capacity<T>(capacity: usize) -> Vec<T> {
    let vector: Vec<T> = Vec::with_capacity(capacity);
    #[cfg(target_os = "linux")]
    ask_for_huge_pages(vector.as_ptr().addr(), vector.capacity() * size_of::<T>());
    vector
}

/// Asks the allocator to keep what is freed for what comes next, instead of giving it back to the system: every op of
/// every step allocates its result, and pages that come back must be mapped and cleared again, which can take as long as the
/// op itself. For a whole process, at its start. Does nothing where the allocator is not glibc's.
pub fn keep_freed() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// More than a step's largest activations: weights above it are mappings of their own.
        const LARGEST: libc::c_int = 64 << 20;
        // SAFETY: parameters of the allocator, which take effect on what is allocated from now on.
        unsafe {
            libc::mallopt(libc::M_MMAP_THRESHOLD, LARGEST);
            libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
            libc::mallopt(libc::M_TOP_PAD, LARGEST);
        }
    }
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(start: usize, len: usize) {
    /// Of x86-64, and of aarch64 with pages of 4 KiB; elsewhere the advice covers less, or nothing.
    const HUGE_PAGE: usize = 2 << 20;
    let first = start.next_multiple_of(HUGE_PAGE);
    let end = (start + len) / HUGE_PAGE * HUGE_PAGE;
    if first < end {
        // SAFETY: the range lies within one allocation, and the advice changes nothing that a program can see. An
        // error means small pages, as before.
        unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_there_for_every_size() {
        for capacity in [0, 1, 1000, 3 << 20] {
            let mut vector = with_capacity::<u16>(capacity);
            assert!(vector.capacity() >= capacity && vector.is_empty());
            vector.resize(capacity, 7);
            assert!(vector.iter().all(|&value| value == 7));
        }
    }
}
