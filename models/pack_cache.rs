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
mod tests {
    use std::cell::RefCell;

    use candle_core::{Device, Tensor};
    use kernels::quantized::linear;
    use tempfile::TempDir;

    use super::*;

    thread_local! {
        static WARNINGS: RefCell<Vec<String>> = const { RefCell::new(vec![]) };
    }

    const FORMATS: [Quantization; 2] = [Quantization::Q8, Quantization::Q4];
    const SHAPES: [[usize; 2]; 3] = [[96, 128], [33, 70], [1, 1]];

    fn cache(folder: &TempDir) -> PackCache {
        let warn = |message: &str| WARNINGS.with_borrow_mut(|warnings| warnings.push(message.into()));
        PackCache { folder: folder.path().join("packed"), max_bytes: 1 << 20, min_bytes: 0, warn }
    }

    fn warnings() -> Vec<String> {
        WARNINGS.take()
    }

    fn temporary() -> TempDir {
        tempfile::tempdir().expect("a temporary folder")
    }

    /// Weights that `seed` tells from others.
    fn matrix(format: Quantization, shape: [usize; 2], seed: usize) -> QuantizedMatrix {
        let row = |o: usize, values: &mut [f32]| {
            let value = |i: usize| ((i * 31 + o * 17 + seed * 7) % 97) as f32 - 48.0;
            values.iter_mut().enumerate().for_each(|(i, target)| *target = value(i));
        };
        QuantizedMatrix::pack(format, shape, row).expect("finite")
    }

    fn open(cache: &PackCache, format: Quantization, seed: usize) -> Packs {
        Packs::open(cache, format, 200_000, |visit| visit(&seed.to_le_bytes())).expect("within the bounds")
    }

    /// As a model is loaded: which of its matrices came from the cache, and all of them.
    fn load(cache: &PackCache, format: Quantization, seed: usize) -> (usize, Vec<QuantizedMatrix>) {
        let packs = open(cache, format, seed);
        let mut hits = 0;
        let matrices = SHAPES.iter().enumerate().map(|(index, &shape)| {
            let name = format!("layers.{index}.weight");
            if let Some(matrix) = packs.get(&name, shape) {
                hits += 1;
                return matrix;
            }
            let matrix = matrix(format, shape, seed);
            packs.add(&name, &matrix);
            matrix
        });
        let matrices = matrices.collect();
        packs.finish();
        (hits, matrices)
    }

    /// How many matrices of a load come from the cache.
    fn hits(cache: &PackCache, format: Quantization, seed: usize) -> usize {
        load(cache, format, seed).0
    }

    fn files(cache: &PackCache) -> Vec<PathBuf> {
        let entries = fs::read_dir(&cache.folder).expect("the folder").map(|entry| entry.expect("a file").path());
        entries.filter(|path| path.extension().is_some_and(|it| it == SUFFIX || it == PART)).collect()
    }

    fn bits(tensor: Tensor) -> Vec<u32> {
        let values = tensor.flatten_all().and_then(|tensor| tensor.to_vec1::<f32>()).expect("f32");
        values.into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn mapped_weights_are_the_packed_ones_to_the_bit() {
        for format in FORMATS {
            let folder = temporary();
            let cache = cache(&folder);
            let (hits, owned) = load(&cache, format, 1);
            assert_eq!((hits, files(&cache).len()), (0, 1));
            let (hits, mapped) = load(&cache, format, 1);
            assert_eq!((hits, files(&cache).len()), (SHAPES.len(), 1));
            for (owned, mapped) in owned.iter().zip(&mapped) {
                assert_eq!((owned.dims(), owned.as_bytes()), (mapped.dims(), mapped.as_bytes()));
                assert!(mapped.as_bytes().as_ptr().addr().is_multiple_of(64));
                let [outer, inner] = owned.dims();
                for n in [1, 5] {
                    let x = Tensor::randn(0f32, 1.0, (n, inner), &Device::Cpu).expect("memory");
                    let product = |weight| bits(linear(&x, weight).expect("shapes fit"));
                    assert_eq!(product(owned), product(mapped));
                }
                let ids = Tensor::new(&[0, outer as u32 - 1], &Device::Cpu).expect("memory");
                assert_eq!(bits(owned.rows(&ids).expect("rows")), bits(mapped.rows(&ids).expect("rows")));
            }
        }
        assert_eq!(warnings(), [""; 0]);
    }

    #[test]
    fn blocks_that_are_not_there_or_not_aligned_are_refused() {
        let folder = temporary();
        let path = folder.path().join("blocks");
        let matrix = matrix(Quantization::Q8, SHAPES[0], 1);
        fs::write(&path, [&[0; HEADER], matrix.as_bytes()].concat()).expect("writable");
        let file = Arc::new(Mapped::new(File::open(&path).expect("there")).expect("it maps"));
        let map = |start, shape| QuantizedMatrix::map(Quantization::Q8, shape, file.clone(), start);
        assert!(map(HEADER, SHAPES[0]).is_ok_and(|mapped| mapped.as_bytes() == matrix.as_bytes()));
        for (start, shape) in
            [(HEADER + 8, [32, 32]), (HEADER + 64, SHAPES[0]), (HEADER, [129, 128]), (usize::MAX, [1, 1])]
        {
            assert!(map(start, shape).is_err(), "{start} {shape:?}");
        }
    }

    #[test]
    fn another_source_format_or_choice_of_matrices_is_another_file() {
        let folder = temporary();
        let cache = cache(&folder);
        hits(&cache, Quantization::Q8, 1);
        assert_eq!((hits(&cache, Quantization::Q8, 2), hits(&cache, Quantization::Q4, 1)), (0, 0));
        assert_eq!(files(&cache).len(), 3);

        let packs = open(&cache, Quantization::Q8, 1);
        assert!(packs.get("layers.0.weight", SHAPES[0]).is_some());
        assert!(packs.get("layers.0.weight", SHAPES[1]).is_none());
        packs.finish();
        assert_eq!((files(&cache).len(), hits(&cache, Quantization::Q8, 1)), (2, 0));
        assert_eq!(hits(&cache, Quantization::Q8, 1), 3);
        assert_eq!(warnings(), [""; 0]);
    }

    #[test]
    fn every_damage_is_noticed_and_repaired() {
        let folder = temporary();
        let cache = cache(&folder);
        hits(&cache, Quantization::Q4, 1);
        let path = &files(&cache)[0];
        let whole = fs::read(path).expect("readable");
        let flips = (0..whole.len()).step_by(whole.len() / 97).chain(0..HEADER).chain(whole.len() - 300..whole.len());
        let flipped = flips.map(|at| {
            let mut bytes = whole.clone();
            bytes[at] ^= 1 << (at % 8);
            bytes
        });
        let cuts = [0, 1, HEADER - 1, HEADER, whole.len() / 2, whole.len() - 1].map(|len| whole[..len].to_vec());
        for (case, bytes) in flipped.chain(cuts).enumerate() {
            // A new file, as the old one may be mapped.
            fs::remove_file(path).expect("there");
            fs::write(path, bytes).expect("writable");
            assert_eq!(hits(&cache, Quantization::Q4, 1), 0, "case {case}");
            let said = warnings();
            assert!(said.len() == 1 && said[0].contains("packed again") && !said[0].contains('\n'), "{case}: {said:?}");
            assert_eq!(fs::read(path).expect("replaced"), whole, "case {case}");
        }
        assert_eq!((hits(&cache, Quantization::Q4, 1), warnings().len()), (3, 0));
    }

    #[test]
    fn the_least_recently_used_goes_and_none_in_use() {
        let folder = temporary();
        let cache = PackCache { max_bytes: 420_000, ..cache(&folder) };
        hits(&cache, Quantization::Q8, 1);
        let one = files(&cache)[0].clone();
        let len = one.metadata().expect("there").len();
        // Room for as many files as they are, beside the bound of what comes.
        let fits = (cache.max_bytes - 200_000) / len;
        let touch = |path: &Path, age| {
            let file = File::open(path).expect("there");
            file.set_modified(SystemTime::now() - Duration::from_secs(age)).expect("ours");
        };
        touch(&one, 1000);
        let (_, held) = load(&cache, Quantization::Q8, 1); // used now, and held
        touch(&one, 1000);
        for seed in 2..20 {
            hits(&cache, Quantization::Q8, seed);
        }
        assert!(one.exists(), "in use");
        assert!((2..=fits + 1).contains(&(files(&cache).len() as u64)), "{} files of {len}", files(&cache).len());
        drop(held);
        hits(&cache, Quantization::Q8, 20);
        assert!(!one.exists(), "the oldest, and free");
        assert_eq!((hits(&cache, Quantization::Q8, 20), warnings().len()), (3, 0));

        let other = cache.folder.join("notes.pack");
        fs::write(&other, vec![0; 1 << 20]).expect("writable");
        hits(&cache, Quantization::Q8, 21);
        assert!(other.exists(), "not the cache's");
    }

    #[test]
    fn what_a_killed_process_left_goes_and_what_is_being_written_stays() {
        let folder = temporary();
        let cache = cache(&folder);
        let first = open(&cache, Quantization::Q8, 1);
        assert_eq!(hits(&cache, Quantization::Q8, 1), 0, "the first one writes it");
        assert_eq!(files(&cache).len(), 1);
        SHAPES.iter().enumerate().for_each(|(index, &shape)| {
            first.add(&format!("layers.{index}.weight"), &matrix(Quantization::Q8, shape, 1));
        });
        first.finish();
        assert_eq!(hits(&cache, Quantization::Q8, 1), 3);

        drop(open(&cache, Quantization::Q8, 2));
        assert_eq!(files(&cache).len(), 1, "a load that failed leaves nothing");

        let left = cache.folder.join(format!("{}.99-0.{PART}", "a".repeat(64)));
        fs::write(&left, "half").expect("writable");
        hits(&cache, Quantization::Q8, 3);
        assert!(left.exists(), "its owner may be about to lock it");
        File::open(&left).expect("there").set_modified(SystemTime::now() - Duration::from_secs(100)).expect("ours");
        hits(&cache, Quantization::Q8, 4);
        assert!(!left.exists());
        assert_eq!(warnings(), [""; 0]);
    }

    #[test]
    fn many_at_once_all_get_whole_weights() {
        let folder = temporary();
        let cache = cache(&folder);
        let want = matrix(Quantization::Q4, SHAPES[0], 1);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    (0..20).for_each(|_| {
                        assert_eq!(load(&cache, Quantization::Q4, 1).1[0].as_bytes(), want.as_bytes());
                        assert_eq!(warnings(), [""; 0]);
                    })
                });
            }
        });
        assert_eq!((hits(&cache, Quantization::Q4, 1), files(&cache).len()), (3, 1));
    }

    #[test]
    fn a_folder_that_cannot_be_and_a_full_disk_are_one_warning() {
        let folder = temporary();
        fs::write(folder.path().join("packed"), "a file").expect("writable");
        assert_eq!(hits(&cache(&folder), Quantization::Q8, 1), 0);
        let said = warnings();
        assert!(said.len() == 1 && said[0].contains("not kept"), "{said:?}");

        #[cfg(target_os = "linux")]
        {
            let folder = temporary();
            let cache = cache(&folder);
            let packs = open(&cache, Quantization::Q8, 1);
            let part = files(&cache)[0].clone();
            let full = File::options().write(true).open("/dev/full").expect("Linux has it");
            let path = cache.folder.join("path");
            *packs.state() = State::Writing(Writer::new(full, part, path.clone(), "key"));
            packs.add("a", &matrix(Quantization::Q8, SHAPES[0], 1));
            packs.add("b", &matrix(Quantization::Q8, SHAPES[0], 1));
            packs.finish();
            let said = warnings();
            assert!(said.len() == 1 && said[0].contains("not kept"), "{said:?}");
            assert!(!path.exists() && files(&cache).is_empty());
        }
    }

    #[test]
    fn small_weights_and_those_beyond_the_bound_touch_nothing() {
        let folder = temporary();
        for (min_bytes, max_bytes) in [(101, 1000), (0, 99)] {
            let cache = PackCache { min_bytes, max_bytes, ..cache(&folder) };
            assert!(Packs::open(&cache, Quantization::Q8, 100, |_| ()).is_none());
        }
        assert!(!folder.path().join("packed").exists());
    }

    #[test]
    fn the_folder_is_the_variable_or_the_users_caches() {
        let folder = |variables: &[(&str, &str)]| {
            let find =
                |name: &str| variables.iter().find(|(it, _)| *it == name).map(|(_, value)| OsString::from(value));
            PackCache::from_variables(find, Some("/home/ada".into())).folder
        };
        assert_eq!(folder(&[("TAPER_CACHE", "")]), Path::new("/home/ada/.cache/taper/packed"));
        assert_eq!(folder(&[("XDG_CACHE_HOME", "/xdg")]), Path::new("/xdg/taper/packed"));
        assert_eq!(folder(&[("XDG_CACHE_HOME", "/xdg"), ("TAPER_CACHE", "/fast")]), Path::new("/fast/packed"));
    }

    #[test]
    fn every_change_changes_the_checksum() {
        let bytes: Vec<u8> = (0..3 << 20).map(|i: u32| (i.wrapping_mul(0x9e37_79b9) >> 24) as u8).collect();
        let sum = checksum(&bytes);
        for at in [0, 63, 64, 1 << 20, (3 << 20) - 1] {
            let mut changed = bytes.clone();
            changed[at] ^= 0x80;
            assert_ne!(checksum(&changed), sum, "{at}");
        }
        let (mut cut, mut swapped) = (bytes.clone(), bytes);
        cut.truncate(2 << 20);
        swapped.rotate_left(1 << 20);
        assert!(checksum(&cut) != sum && checksum(&swapped) != sum);
    }
}
