//! Packed weights on disk, so that a second start maps them instead of packing again.
//!
//! A file holds all packed matrices of one checkpoint in one format. It is named by a key, which covers the file's own
//! layout and the packing's ([`PACKING_VERSION`]), the format, and of every weight file: its name, size, time of change
//! and header with all offsets, and of every tensor 128 of its bytes. A source that is changed in place, with the same
//! size and time and not where it is sampled, would go unnoticed; no tool that writes checkpoints does that.
//!
//! ```text
//! 64 bytes    magic, start and length of the table, SHA-256 of the table
//! matrices    as the kernels read them, each from a multiple of 64 on
//! table       JSON: the key, and of each matrix its name, shape, start and checksum
//! ```
//!
//! A file appears whole or not at all, and all of it is checked before any of it is used: the checksums read it once,
//! at the speed of memory, which also brings it there. Whatever is wrong with it, or with the folder, the weights are
//! packed as they would be without a cache. A process holds a shared lock on the file that it maps, and the least
//! recently used files that nobody holds make room for new ones.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};
use std::{env, process};

use kernels::memory::Mapped;
use kernels::quantized::{PACKING_VERSION, Quantization, QuantizedMatrix};
use rayon::prelude::*;
use ring::digest::{Context, SHA256};
use serde::{Deserialize, Serialize};

/// Where packed weights are kept between starts, and how many.
#[derive(Clone, Debug)]
pub struct PackCache {
    /// The folder. Files in it that are not the cache's own stay as they are.
    pub folder: PathBuf,
    /// Bytes that its files take together. The least recently used go first, those in use never. Default 16 GiB.
    pub max_bytes: u64,
    /// Weights that take fewer bytes when packed are packed at every start. Default 64 MiB.
    pub min_bytes: u64,
    /// Told, at most once a load, why weights were packed again or are not kept. Default: nobody.
    pub warn: fn(&str),
}

impl PackCache {
    /// A cache in the folder `packed` of `TAPER_CACHE`, else of `XDG_CACHE_HOME/taper`, else of `~/.cache/taper`.
    pub fn from_env() -> Self {
        Self::from_variables(|name| env::var_os(name), env::home_dir())
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>, user: Option<PathBuf>) -> Self {
        let path = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let caches = || path("XDG_CACHE_HOME").unwrap_or_else(|| user.unwrap_or_else(env::temp_dir).join(".cache"));
        let folder = path("TAPER_CACHE").unwrap_or_else(|| caches().join("taper")).join("packed");
        Self { folder, max_bytes: 16 << 30, min_bytes: 64 << 20, warn: |_| () }
    }
}

/// How matrices are packed while they are read. Made from a [`Quantization`], it keeps nothing on disk.
#[derive(Clone, Debug, Default)]
pub struct Packing {
    /// `None`: they stay as they are stored.
    pub quantization: Option<Quantization>,
    pub cache: Option<PackCache>,
}

impl From<Option<Quantization>> for Packing {
    fn from(quantization: Option<Quantization>) -> Self {
        Self { quantization, cache: None }
    }
}

/// What the cache has or gets of one checkpoint in one format, while it is loaded.
pub(crate) struct Packs {
    format: Quantization,
    /// Until it was told something.
    warn: Mutex<Option<fn(&str)>>,
    state: Mutex<State>,
}

enum State {
    Reading(Reader),
    Writing(Writer),
    Off,
}

impl Packs {
    /// `bytes` is what the packed weights take at most, `source` gives what tells them from others.
    pub fn open(
        cache: &PackCache,
        format: Quantization,
        bytes: u64,
        source: impl FnOnce(&mut dyn FnMut(&[u8])),
    ) -> Option<Self> {
        if cfg!(target_endian = "big") || !(cache.min_bytes..=cache.max_bytes).contains(&bytes) {
            return None;
        }
        let mut digest = Context::new(&SHA256);
        digest.update(format!("{MAGIC:?} {PACKING_VERSION} {format:?}\n").as_bytes());
        source(&mut |part| digest.update(part));
        let key: String = digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let path = cache.folder.join(format!("{key}.{SUFFIX}"));
        let packs = Self { format, warn: Mutex::new(Some(cache.warn)), state: Mutex::new(State::Off) };
        let state = match Reader::open(&path, &key, format) {
            Ok(Some(reader)) => State::Reading(reader),
            damaged => {
                if let Err(error) = damaged {
                    packs.tell(format!("{}: {error}, so the weights are packed again", path.display()));
                }
                match Writer::create(cache, &path, &key, bytes) {
                    Ok(writer) => writer.map_or(State::Off, State::Writing),
                    Err(error) => {
                        packs.not_kept(&cache.folder, &error);
                        State::Off
                    }
                }
            }
        };
        *packs.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
        Some(packs)
    }

    /// The matrix, if the cache has it.
    pub fn get(&self, name: &str, shape: [usize; 2]) -> Option<QuantizedMatrix> {
        match &mut *self.state() {
            State::Reading(reader) => reader.get(name, shape, self.format),
            _ => None,
        }
    }

    /// Keeps a matrix for the next start.
    pub fn add(&self, name: &str, matrix: &QuantizedMatrix) {
        self.write(|writer| writer.add(name, matrix));
    }

    /// Lets the file appear, now that all matrices were read.
    pub fn finish(&self) {
        self.write(Writer::finish);
        if let State::Reading(Reader { path, lacks: true, .. }) = &*self.state() {
            let _ = fs::remove_file(path); // another version's choice of matrices: the next start writes ours
        }
        *self.state() = State::Off;
    }

    fn write(&self, write: impl FnOnce(&mut Writer) -> io::Result<()>) {
        let mut state = self.state();
        if let State::Writing(writer) = &mut *state
            && let Err(error) = write(writer)
        {
            self.not_kept(&writer.path, &error);
            *state = State::Off;
        }
    }

    fn not_kept(&self, path: &Path, error: &io::Error) {
        self.tell(format!("{}: {error}, so packed weights are not kept for the next start", path.display()));
    }

    fn tell(&self, message: String) {
        if let Some(warn) = self.warn.lock().unwrap_or_else(PoisonError::into_inner).take() {
            warn(&message);
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const MAGIC: [u8; 16] = *b"taper packed 1\r\n";
const HEADER: usize = 64;
const SUFFIX: &str = "pack";
const PART: &str = "part";

#[derive(Serialize, Deserialize)]
struct Table {
    key: String,
    matrices: Vec<Entry>,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    name: String,
    shape: [usize; 2],
    start: usize,
    checksum: u64,
}

struct Reader {
    path: PathBuf,
    file: Arc<Mapped>,
    entries: HashMap<String, Entry>,
    /// Whether a matrix was asked for that is not there.
    lacks: bool,
}

impl Reader {
    /// `None` if there is no such file, or none that may be read.
    ///
    /// # Errors
    ///
    /// What is there is not what was written.
    fn open(path: &Path, key: &str, format: Quantization) -> io::Result<Option<Self>> {
        let Ok(file) = File::open(path) else { return Ok(None) };
        if let Err(TryLockError::WouldBlock) = file.try_lock_shared() {
            return Ok(None); // about to be removed
        }
        let _ = file.set_modified(SystemTime::now()); // in a folder that is not ours it only looks older than it is
        let damaged = || io::Error::other("damaged or cut short");
        if file.metadata()?.len() < HEADER as u64 {
            return Err(damaged());
        }
        let file = Arc::new(Mapped::new(file)?);
        let table = read_table(&file).filter(|table| table.key == key).ok_or_else(damaged)?;
        let intact = table.matrices.par_iter().all(|entry| {
            let possible = entry.shape.iter().all(|&size| size < 1 << 28);
            let end = possible.then(|| entry.start.checked_add(format.bytes(entry.shape))).flatten();
            end.and_then(|end| file.get(entry.start..end)).is_some_and(|bytes| checksum(bytes) == entry.checksum)
        });
        if !intact {
            return Err(damaged());
        }
        let entries = table.matrices.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        Ok(Some(Self { path: path.into(), file, entries, lacks: false }))
    }

    fn get(&mut self, name: &str, shape: [usize; 2], format: Quantization) -> Option<QuantizedMatrix> {
        let entry = self.entries.get(name).filter(|entry| entry.shape == shape);
        let matrix = entry.and_then(|entry| QuantizedMatrix::map(format, shape, self.file.clone(), entry.start).ok());
        self.lacks |= matrix.is_none();
        matrix
    }
}

/// The table, if it is what was written.
fn read_table(file: &[u8]) -> Option<Table> {
    let (header, _) = file.split_at_checked(HEADER)?;
    let (magic, rest) = header.split_at(MAGIC.len());
    let (range, sha256) = rest.split_at(16);
    let [start, len] = [0, 8].map(|at| range[at..at + 8].try_into().map(u64::from_le_bytes).unwrap_or(u64::MAX));
    let start = usize::try_from(start).ok()?;
    let table = file.get(start..)?;
    let whole = magic == MAGIC && table.len() as u64 == len && ring::digest::digest(&SHA256, table).as_ref() == sha256;
    if whole { serde_json::from_slice(table).ok() } else { None }
}

struct Writer {
    file: File,
    /// What the file is called until it is whole.
    part: PathBuf,
    path: PathBuf,
    table: Table,
    position: usize,
}

impl Writer {
    /// `None` if another process writes the same file, or there is no room beside files that are in use.
    fn create(cache: &PackCache, path: &Path, key: &str, bytes: u64) -> io::Result<Option<Self>> {
        fs::create_dir_all(&cache.folder)?;
        if !make_room(&cache.folder, path, key, cache.max_bytes - bytes)? {
            return Ok(None);
        }
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let write_id = WRITES.fetch_add(1, Ordering::Relaxed);
        let part = cache.folder.join(format!("{key}.{}-{write_id}.{PART}", process::id()));
        let file = File::options().write(true).create(true).truncate(true).open(&part)?;
        let _ = file.try_lock(); // it says that somebody is writing; where there are no locks, nobody asks
        let mut writer = Self::new(file, part, path.into(), key);
        writer.append(&[0; HEADER])?;
        Ok(Some(writer))
    }

    fn new(file: File, part: PathBuf, path: PathBuf, key: &str) -> Self {
        Self { file, part, path, table: Table { key: key.into(), matrices: vec![] }, position: 0 }
    }

    fn add(&mut self, name: &str, matrix: &QuantizedMatrix) -> io::Result<()> {
        let (start, bytes) = (self.position, matrix.as_bytes());
        self.append(bytes)?;
        self.table.matrices.push(Entry { name: name.into(), shape: matrix.dims(), start, checksum: checksum(bytes) });
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.position += bytes.len();
        self.file.write_all(bytes)
    }

    fn finish(&mut self) -> io::Result<()> {
        let table = serde_json::to_vec(&self.table)?;
        let start = self.position;
        self.append(&table)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(&MAGIC)?;
        self.file.write_all(&(start as u64).to_le_bytes())?;
        self.file.write_all(&(table.len() as u64).to_le_bytes())?;
        self.file.write_all(ring::digest::digest(&SHA256, &table).as_ref())?;
        self.file.sync_all()?;
        fs::rename(&self.part, &self.path)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.part); // not there if it was finished
    }
}

/// Removes what processes left that ended while they wrote, then the least recently used files until the folder holds
/// no more than `limit` bytes, not counting `path`, which is to be replaced. `false` if another process is writing the
/// file of `key`, or files in use take more.
fn make_room(folder: &Path, path: &Path, key: &str, limit: u64) -> io::Result<bool> {
    /// Nobody is between creating a file and locking it for as long as this.
    const ABANDONED: Duration = Duration::from_secs(60);
    let (mut total, mut files) = (0, vec![]);
    for entry in fs::read_dir(folder)?.filter_map(|entry| entry.ok()) {
        let (file, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let ours =
            name.split('.').next().is_some_and(|key| key.len() == 64 && key.bytes().all(|b| b.is_ascii_hexdigit()));
        let extension = file.extension().and_then(|extension| extension.to_str());
        let Ok(metadata) = entry.metadata() else { continue }; // another process removed it
        let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        match extension {
            Some(SUFFIX) if ours && file != path => files.push((modified, metadata.len(), file)),
            Some(PART) if ours => {
                let free = is_free(&file);
                if free && modified.elapsed().is_ok_and(|age| age > ABANDONED) {
                    let _ = fs::remove_file(&file);
                } else if !free && name.starts_with(key) {
                    return Ok(false);
                } else {
                    total += metadata.len();
                }
            }
            _ => {}
        }
    }
    total += files.iter().map(|(_, len, _)| len).sum::<u64>();
    files.sort();
    for (_, len, file) in files {
        if total > limit && is_free(&file) && fs::remove_file(&file).is_ok() {
            total -= len;
        }
    }
    Ok(total <= limit)
}

/// Whether no process holds a lock on the file.
fn is_free(file: &Path) -> bool {
    File::open(file).is_ok_and(|file| file.try_lock().is_ok())
}

/// A checksum of whole blocks of 64 bytes that notices every change within eight bytes, and others but for one in
/// 2^64. It takes about as long as reading them, on all threads.
fn checksum(bytes: &[u8]) -> u64 {
    const CHUNK: usize = 1 << 20;
    /// 2^64 divided by the golden ratio: odd, so that no step loses anything.
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let step = |sum: u64, word: u64| (sum.rotate_left(29) ^ word).wrapping_mul(FACTOR);
    let chunk = |bytes: &[u8]| {
        let mut lanes = [1u64, 2, 3, 4, 5, 6, 7, 8];
        for block in bytes.as_chunks::<64>().0 {
            for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<8>().0) {
                *lane = step(*lane, u64::from_le_bytes(*word));
            }
        }
        lanes.into_iter().fold(bytes.len() as u64, step)
    };
    let chunks: Vec<u64> = bytes.par_chunks(CHUNK).map(chunk).collect();
    chunks.into_iter().fold(bytes.len() as u64, step)
}

#[cfg(test)]
mod tests;
