//! Files that appear whole or not at all. The Hub's cache and saved conversations are written through here.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::{fs, io, process};

/// Makes `path` with `write` under another name first, so that nobody ever sees half of it; what stood there before
/// goes only when the new file is whole. The name belongs to this call alone: threads and processes may write the same
/// file at once.
pub(crate) fn replace(path: &Path, write: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    let Some(name) = path.file_name() else { return Err(io::ErrorKind::IsADirectory.into()) };
    static WRITES: AtomicU64 = AtomicU64::new(0);
    let write_id = WRITES.fetch_add(1, Ordering::Relaxed);
    let new = path.with_file_name(format!(".{}.{}-{write_id}", name.to_string_lossy(), process::id()));
    let _ = fs::remove_file(&new);
    let written = write(&new).and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}
