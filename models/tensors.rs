//! The files of a checkpoint, mapped, and where each tensor lies in them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use candle_core::{Result, bail};
use kernels::quantized::Quantization;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::Dtype;
use safetensors::tensor::{SafeTensors, TensorInfo};
use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::torch_zip;

/// Every tensor of a checkpoint's files.
pub(crate) struct Tensors {
    pub files: Vec<WeightFile>,
    pub entries: BTreeMap<String, (usize, TensorInfo)>,
    pub unread: Mutex<BTreeSet<String>>,
}

impl Tensors {
    pub fn open(checkpoint: &Checkpoint) -> Result<Self> {
        let (names, index) = weight_files(checkpoint)?;
        let mut tensors = Self { files: vec![], entries: BTreeMap::new(), unread: Mutex::default() };
        for name in &names {
            tensors.add(checkpoint, name, "")?;
        }
        if let Some((tensor, file)) = index.iter().find(|(tensor, _)| !tensors.entries.contains_key(*tensor)) {
            bail!("{}: {tensor} is in the index but not in {file}", checkpoint.path(INDEX).display())
        }
        Ok(tensors)
    }

    /// Adds the tensors of a file under `prefix`.
    pub fn add(&mut self, checkpoint: &Checkpoint, name: &str, prefix: &str) -> Result<()> {
        let (file, tensors) = WeightFile::open(checkpoint, name)?;
        let unread = self.unread.get_mut().unwrap_or_else(PoisonError::into_inner);
        for (tensor, info) in tensors {
            let tensor = format!("{prefix}{tensor}");
            unread.insert(tensor.clone());
            if let Some((other, _)) = self.entries.insert(tensor.clone(), (self.files.len(), info)) {
                let other = self.files.get(other).unwrap_or(&file);
                bail!("{}: {tensor} is also in {}", file.path.display(), other.path.display())
            }
        }
        self.files.push(file);
        Ok(())
    }

    pub fn find(&self, name: &str) -> Option<Found<'_>> {
        if let Some((name, (file, info))) = self.entries.get_key_value(name) {
            return Some(Found { file: *file, info: info.clone(), read: Some(name) });
        }
        let (stack, index) = name.rsplit_once('.')?;
        let (stack, (file, info)) = self.entries.get_key_value(stack)?;
        let index = index.parse::<usize>().ok()?;
        let [count, rows, columns] = *info.shape else { return None };
        let (start, end) = info.data_offsets;
        let bytes = (end - start).checked_div(count)?;
        let start = start + index * bytes;
        let info = TensorInfo { dtype: info.dtype, shape: vec![rows, columns], data_offsets: (start, start + bytes) };
        let read = (index + 1 == count).then_some(stack.as_str());
        (index < count).then_some(Found { file: *file, info, read })
    }

    pub fn are_built_in(&self) -> bool {
        self.files.iter().any(|file| matches!(file.bytes, Bytes::Static(_)))
    }

    /// What packing takes at most: not every matrix is packed.
    pub fn packed_bytes(&self, format: Quantization) -> u64 {
        let bytes = self.entries.values().map(|(_, info)| match *info.shape {
            [ref outer @ .., inner] if !outer.is_empty() => format.bytes([outer.iter().product(), inner]) as u64,
            _ => 0,
        });
        bytes.sum()
    }

    /// Gives `visit` what changes when the weights do: each file's name, size, time of change and header, and a sample
    /// of each tensor's bytes.
    pub fn identify(&self, visit: &mut dyn FnMut(&[u8])) {
        for file in &self.files {
            let modified = file.path.metadata().and_then(|metadata| metadata.modified()).ok();
            let since_epoch = modified.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
            let name = file.path.file_name().unwrap_or_default();
            visit(format!("{name:?} {} {since_epoch:?}\n", file.bytes().len()).as_bytes());
            visit(&file.bytes()[..file.data]);
        }
        for (name, (file, info)) in &self.entries {
            visit(format!("{name} {file} {:?}\n", info.data_offsets).as_bytes());
        }
        self.sample(visit);
    }

    fn sample(&self, visit: &mut dyn FnMut(&[u8])) {
        const STRETCH: usize = 64;
        for (name, (file, info)) in &self.entries {
            visit(format!("{name} {:?} {:?}\n", info.dtype, info.shape).as_bytes());
            let file = &self.files[*file];
            let (start, end) = info.data_offsets;
            let range = file.data + start..file.data + end;
            let bytes = &file.bytes()[range.clone()];
            for start in [0, bytes.len() / 2] {
                visit(&bytes[start..bytes.len().min(start + STRETCH)]);
            }
            file.release(&range);
        }
    }
}

/// A tensor, or a matrix of a stack.
pub(crate) struct Found<'a> {
    pub file: usize,
    pub info: TensorInfo,
    /// The tensor that has been read when this has been.
    pub read: Option<&'a str>,
}

/// Names, shapes and bytes of a checkpoint's tensors, read from the headers alone.
///
/// # Errors
///
/// As [`Weights::open`].
pub fn tensor_sizes(checkpoint: &Checkpoint) -> Result<Vec<TensorSize>> {
    let tensors = Tensors::open(checkpoint)?;
    Ok(tensors.entries.into_iter().map(|(name, (_, info))| TensorSize::new(name, &info)).collect())
}

/// Gives `visit` what tells one checkpoint's weights from another's: name, dtype and shape of every tensor, and two
/// short stretches of its bytes. It reads little of a large file.
///
/// # Errors
///
/// As [`Weights::open`].
pub fn sample(checkpoint: &Checkpoint, mut visit: impl FnMut(&[u8])) -> Result<()> {
    Tensors::open(checkpoint)?.sample(&mut visit);
    Ok(())
}

/// Names, shapes and bytes of the tensors that a safetensors header describes. Errors call the file `path`.
///
/// # Errors
///
/// The header is not that of a safetensors file.
pub fn header_sizes(path: &Path, header: &str) -> Result<Vec<TensorSize>> {
    match serde_json::from_str::<safetensors::tensor::Metadata>(header) {
        Ok(metadata) => {
            let tensors = metadata.tensors().into_iter();
            Ok(tensors.map(|(name, info)| TensorSize::new(name, info)).collect())
        }
        Err(error) => bail!("{}: not a safetensors header: {error}", path.display()),
    }
}

/// Name, shape and size of a stored tensor.
#[derive(Clone, Debug)]
pub struct TensorSize {
    pub name: String,
    pub shape: Vec<usize>,
    pub dtype: Dtype,
    pub bytes: usize,
}

impl TensorSize {
    fn new(name: String, info: &TensorInfo) -> Self {
        Self { name, shape: info.shape.clone(), dtype: info.dtype, bytes: info.data_offsets.1 - info.data_offsets.0 }
    }
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TORCH_ZIP: &str = "pytorch_model.bin";

/// The weight files of a checkpoint, and the index's entries if it has one.
fn weight_files(checkpoint: &Checkpoint) -> Result<(Vec<String>, BTreeMap<String, String>)> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(bytes) = checkpoint.read(INDEX)? else {
        let is_torch = !checkpoint.has(SINGLE) && checkpoint.has(TORCH_ZIP);
        return Ok((vec![if is_torch { TORCH_ZIP } else { SINGLE }.to_string()], BTreeMap::new()));
    };
    let path = checkpoint.path(INDEX);
    let index: Index = match serde_json::from_slice(&bytes) {
        Ok(index) => index,
        Err(error) => bail!("{}: {error}", path.display()),
    };
    let files: BTreeSet<&String> = index.weight_map.values().collect();
    if let Some(file) = files.iter().find(|file| Path::new(file).components().count() != 1 || file.starts_with('.')) {
        bail!("{}: {file:?} is not a file name", path.display())
    }
    if files.is_empty() {
        bail!("{}: the index names no tensors", path.display())
    }
    let files = files.into_iter().cloned().collect();
    Ok((files, index.weight_map))
}

/// A file of tensors.
pub(crate) struct WeightFile {
    pub path: PathBuf,
    bytes: Bytes,
    /// Where tensor data begins.
    pub data: usize,
}

enum Bytes {
    Mapped(Mmap),
    Static(&'static [u8]),
}

impl WeightFile {
    fn open(checkpoint: &Checkpoint, name: &str) -> Result<(Self, Vec<(String, TensorInfo)>)> {
        let path = checkpoint.path(name);
        let bytes = match checkpoint {
            Checkpoint::Folder(_) => map(&path)?,
            Checkpoint::Memory(..) => match checkpoint.in_memory(name) {
                Some(bytes) => Bytes::Static(bytes),
                None => bail!("{}: no such file", path.display()),
            },
        };
        let mut file = Self { path, bytes, data: 0 };
        if !name.ends_with(".safetensors") {
            return match torch_zip::tensors(file.bytes()) {
                Ok(tensors) => Ok((file, tensors)),
                Err(error) => bail!("{}: {error}", file.path.display()),
            };
        }
        let (header, metadata) = match SafeTensors::read_metadata(file.bytes()) {
            Ok(parsed) => parsed,
            Err(error) => bail!("{}: not a safetensors file, or cut short: {error}", file.path.display()),
        };
        file.data = header + 8;
        let tensors: Vec<(String, TensorInfo)> =
            metadata.tensors().into_iter().map(|(name, info)| (name, info.clone())).collect();
        let end = tensors.iter().map(|(_, info)| info.data_offsets.1).max().unwrap_or(0);
        let available = file.bytes().len() - file.data;
        if end != available {
            bail!(
                "{}: {available} bytes of tensor data, the header says {end}: cut short or damaged",
                file.path.display()
            )
        }
        Ok((file, tensors))
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }

    /// Drops mapped pages from this process: what was read has its own copy now, and resident memory would otherwise
    /// grow by as much again.
    pub fn release(&self, range: &Range<usize>) {
        if let Bytes::Mapped(map) = &self.bytes {
            // SAFETY: the mapping is read-only and backed by the file, so pages that are dropped are read again.
            let advice = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
            let _ = advice; // advice only: without it memory stays higher
        }
    }
}

fn map(path: &Path) -> Result<Bytes> {
    let mapped = File::open(path).and_then(|file| {
        // SAFETY: weights are read-only by convention of every checkpoint; a file that another process cuts
        // short while it is mapped ends this one with a bus error, which no reader of a mapping can prevent.
        unsafe { Mmap::map(&file) }
    });
    match mapped {
        Ok(map) => Ok(Bytes::Mapped(map)),
        Err(error) => bail!("{}: {error}", path.display()),
    }
}
