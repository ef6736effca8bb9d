//! A checkpoint's tensors by name, straight from memory-mapped files: safetensors, or torch zips.
//!
//! Families read tensors through [`Weights`], which knows the prefix it stands at, converts once on the way to
//! the device, and remembers what was read: [`Weights::finish`] refuses a checkpoint that holds anything nobody
//! asked for.
//!
//! A tensor `name` `[E, O, I]` is a stack of matrices, which can be read one by one as `name.0` to `name.<E - 1>`. It
//! counts as read when its last matrix is.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, PoisonError};

use candle_core::{DType, Device, Result, Tensor, WithDType, bail};
use half::{bf16, f16};
use kernels::Batch;
use kernels::gather::gather_columns;
use kernels::quantized::{Quantization, QuantizedMatrix};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::checkpoint::Checkpoint;
use crate::pack_cache::{PackCache, Packing, Packs};
use crate::tensors::{Found, Tensors, WeightFile};
pub use crate::tensors::{TensorSize, header_sizes, sample, tensor_sizes};

/// The tensors of a checkpoint below a prefix.
#[derive(Clone)]
pub struct Weights {
    tensors: Arc<Tensors>,
    prefix: String,
    dtype: DType,
    device: Device,
    quantization: Option<Quantization>,
    packs: Option<Arc<Packs>>,
}

impl Weights {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names, or `pytorch_model.bin`.
    /// `dtype` is that of the activations; see [`Weights::matrix`] for what it means for weights.
    ///
    /// # Errors
    ///
    /// No weights, a file that is not of its format, is truncated or has overlapping tensors, a tensor that two
    /// shards hold or that the index names and no shard holds.
    pub fn open(checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Self> {
        Self::open_with_heads(checkpoint, &[], dtype, device)
    }

    /// As [`Weights::open`], with the tensors of `<head>.pt`, where the checkpoint has that file, under `<head>.`.
    ///
    /// # Errors
    ///
    /// As [`Weights::open`].
    pub fn open_with_heads(checkpoint: &Checkpoint, heads: &[&str], dtype: DType, device: &Device) -> Result<Self> {
        let mut tensors = Tensors::open(checkpoint)?;
        for head in heads {
            let file = format!("{head}.pt");
            if checkpoint.has(&file) {
                tensors.add(checkpoint, &file, &format!("{head}."))?;
            }
        }
        Ok(Self {
            tensors: Arc::new(tensors),
            prefix: String::new(),
            dtype,
            device: device.clone(),
            quantization: None,
            packs: None,
        })
    }

    /// As [`Weights::open_with_heads`], with matrices packed, and kept on disk, as `packing` says.
    ///
    /// # Errors
    ///
    /// As [`Weights::open`] and [`Weights::quantized`].
    pub(crate) fn open_packed(
        checkpoint: &Checkpoint,
        heads: &[&str],
        dtype: DType,
        device: &Device,
        packing: &Packing,
    ) -> Result<Self> {
        let weights = Self::open_with_heads(checkpoint, heads, dtype, device)?;
        Ok(weights.quantized(packing.quantization)?.cached(packing.cache.as_ref()))
    }

    /// The same weights, whose matrices [`Weights::packed`] packs, or with `None` leaves as they are stored.
    ///
    /// # Errors
    ///
    /// Weights to pack are for a device without kernels for them.
    pub fn quantized(self, quantization: Option<Quantization>) -> Result<Self> {
        if quantization.is_some() && !QuantizedMatrix::runs_on(&self.device) {
            bail!(
                "quantised weights run on the CPU, NVIDIA GPUs and Metal, not here: add --device cpu, or leave them as they are"
            )
        }
        Ok(Self { quantization, ..self })
    }

    /// The same weights, whose packed matrices come from `cache` if they are there, and are kept in it if not. Weights
    /// that are built into the program are not kept.
    pub fn cached(self, cache: Option<&PackCache>) -> Self {
        let (Some(cache), Some(format), false) = (cache, self.quantization, self.tensors.are_built_in()) else {
            return self;
        };
        let packs = Packs::open(cache, format, self.tensors.packed_bytes(format), |visit| self.tensors.identify(visit));
        Self { packs: packs.map(Arc::new), ..self }
    }

    /// The tensors whose names begin with this prefix, a dot and `name`.
    pub fn pp(&self, name: impl std::fmt::Display) -> Self {
        Self { prefix: self.name(name), ..self.clone() }
    }

    /// The dtype of the activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that tensors are read to.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Whether the checkpoint holds this tensor.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.entries.contains_key(&self.name(name))
    }

    /// A matrix of a product or an embedding. On the CPU it stays in the dtype it is stored in, unless that is
    /// wider than the activations': products widen it exactly. Elsewhere it takes the activations' dtype.
    ///
    /// # Errors
    ///
    /// The tensor is missing, of another shape, or not f32, f16 or bf16.
    pub fn matrix(&self, name: &str, shape: [usize; 2]) -> Result<Tensor> {
        self.stacked(&[name], &[shape[0]], shape[1])
    }

    /// The matrices `names`, of `rows[i]` rows and `columns` columns each, one below the other: `[sum(rows), columns]`.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`]; also if the matrices are stored in different dtypes.
    pub fn stacked(&self, names: &[&str], rows: &[usize], columns: usize) -> Result<Tensor> {
        let entries = names
            .iter()
            .zip(rows)
            .map(|(name, &rows)| self.entry(name, &[rows, columns]))
            .collect::<Result<Vec<_>>>()?;
        let stored = entries[0].dtype;
        if let Some(other) = entries.iter().find(|entry| entry.dtype != stored) {
            bail!(
                "{}: {} is {:?}, expected {stored:?} like {}",
                other.path.display(),
                other.name,
                other.dtype,
                names[0]
            )
        }
        let parts: Vec<&[u8]> = entries.iter().map(|entry| entry.bytes).collect();
        let shape = (rows.iter().sum::<usize>(), columns);
        let release = |part: usize| entries[part].file.release(&entries[part].range);
        let Some(tensor) = decode_tensor(stored, &parts, release, shape, &self.device)? else {
            bail!("{}: {} is {stored:?}, expected f32, f16 or bf16", entries[0].path.display(), entries[0].name)
        };
        let keep = self.device.is_cpu() && tensor.dtype().size_in_bytes() <= self.dtype.size_in_bytes();
        if keep { Ok(tensor) } else { tensor.to_dtype(self.dtype) }
    }

    /// As [`Weights::stacked`], packed row by row on the way from the file; `None` if these weights are not
    /// [quantised](Weights::quantized).
    ///
    /// # Errors
    ///
    /// As [`Weights::stacked`], and if a weight is NaN or infinite.
    pub fn packed(&self, names: &[&str], rows: &[usize], columns: usize) -> Result<Option<QuantizedMatrix>> {
        let Some(quantization) = self.quantization else { return Ok(None) };
        let mut parts = vec![];
        for (name, &rows) in names.iter().zip(rows) {
            let entry = self.entry(name, &[rows, columns])?;
            let widen = widen_row(entry.dtype);
            let Some(widen) = widen else {
                bail!("{}: {} is {:?}, expected f32, f16 or bf16", entry.path.display(), entry.name, entry.dtype)
            };
            parts.push((rows, entry, widen));
        }
        let shape = [rows.iter().sum(), columns];
        let name = parts.iter().map(|(_, entry, _)| entry.name.as_str()).collect::<Vec<_>>().join(" ");
        if let Some(packed) = self.packs.as_ref().and_then(|packs| packs.get(&name, shape)) {
            return packed.to_device(&self.device).map(Some);
        }
        let row = |mut index: usize, values: &mut [f32]| {
            for (rows, entry, widen) in &parts {
                match index.checked_sub(*rows) {
                    Some(rest) => index = rest,
                    None => {
                        let bytes = entry.bytes.len() / rows;
                        return widen(&entry.bytes[index * bytes..][..bytes], values);
                    }
                }
            }
        };
        let packed = QuantizedMatrix::pack(quantization, shape, row);
        parts.iter().for_each(|(_, entry, _)| entry.file.release(&entry.range));
        match packed {
            Ok(packed) => {
                self.packs.iter().for_each(|packs| packs.add(&name, &packed));
                packed.to_device(&self.device).map(Some)
            }
            Err(error) => bail!("{}: {}: {error}", parts[0].1.path.display(), names.join(", ")),
        }
    }

    /// A small tensor that enters the computation in f32 whatever it is stored in: a norm's weight, a decay.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`].
    pub fn f32(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let entry = self.entry(name, shape)?;
        let parts = [entry.bytes];
        let values = match entry.dtype {
            Dtype::F32 => decode(&parts, |_| (), f32::from_le_bytes),
            Dtype::F16 => decode(&parts, |_| (), |b| f16::from_le_bytes(b).to_f32()),
            Dtype::BF16 => decode(&parts, |_| (), |b| bf16::from_le_bytes(b).to_f32()),
            other => bail!("{}: {} is {other:?}, expected f32, f16 or bf16", entry.path.display(), entry.name),
        };
        Tensor::from_vec(values, shape, &self.device)
    }

    /// A matrix for a table of which a step reads a few rows. For the CPU it stays in its file; elsewhere it is on the
    /// device, which a step does not wait for.
    ///
    /// # Errors
    ///
    /// As [`Weights::matrix`].
    pub fn table(&self, name: &str, shape: [usize; 2]) -> Result<Table> {
        if !self.device.is_cpu() {
            return self.matrix(name, shape).map(Table::OnDevice);
        }
        self.mapped(name, shape).map(Table::InFile)
    }

    fn mapped(&self, name: &str, shape: [usize; 2]) -> Result<MappedRows> {
        let entry = self.entry(name, &shape)?;
        let element_bytes = match entry.dtype {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::BF16 => 2,
            other => bail!("{}: {} is {other:?}, expected f32, f16 or bf16", entry.path.display(), entry.name),
        };
        let Entry { name, dtype: stored, range, .. } = entry;
        Ok(MappedRows {
            file: self.tensors.find(&name).expect("an entry").file,
            tensors: self.tensors.clone(),
            name,
            range,
            stored,
            row_bytes: shape[1] * element_bytes,
            columns: shape[1],
            dtype: self.dtype,
        })
    }

    /// Passes over tensors that some checkpoints hold and the model does without.
    pub fn skip(&self, names: &[&str]) {
        let mut unread = self.tensors.unread.lock().unwrap_or_else(PoisonError::into_inner);
        names.iter().for_each(|name| {
            unread.remove(&self.name(name));
        });
    }

    /// Refuses a checkpoint that holds a tensor which was not read and whose name begins with none of `ignored`. No
    /// matrix is read after it.
    ///
    /// # Errors
    ///
    /// Names up to three such tensors, with shape and file.
    pub fn finish(&self, ignored: &[Ignored]) -> Result<()> {
        let unread = self.tensors.unread.lock().unwrap_or_else(PoisonError::into_inner);
        let left: Vec<&String> =
            unread.iter().filter(|name| !ignored.iter().any(|i| name.starts_with(i.prefix))).collect();
        if left.is_empty() {
            self.packs.iter().for_each(|packs| packs.finish());
            return Ok(());
        }
        let shown: Vec<String> = left
            .iter()
            .take(3)
            .map(|name| {
                let (file, info) = &self.tensors.entries[*name];
                format!("{name} {:?} in {}", info.shape, self.tensors.files[*file].path.display())
            })
            .collect();
        let more = if left.len() > shown.len() { ", .." } else { "" };
        bail!("{} tensors that the model does not use: {}{more}", left.len(), shown.join(", "))
    }

    fn name(&self, name: impl std::fmt::Display) -> String {
        if self.prefix.is_empty() { name.to_string() } else { format!("{}.{name}", self.prefix) }
    }

    fn entry(&self, name: &str, shape: &[usize]) -> Result<Entry<'_>> {
        let name = self.name(name);
        let Some(Found { file, info, read }) = self.tensors.find(&name) else {
            bail!("{}: no tensor {name}, expected {shape:?}", self.tensors.files[0].path.display())
        };
        let file = &self.tensors.files[file];
        if info.shape != shape {
            bail!("{}: {name} is {:?}, expected {shape:?}", file.path.display(), info.shape)
        }
        if let Some(read) = read {
            self.tensors.unread.lock().unwrap_or_else(PoisonError::into_inner).remove(read);
        }
        let (start, end) = info.data_offsets;
        let range = file.data + start..file.data + end;
        Ok(Entry { path: &file.path, name, dtype: info.dtype, bytes: &file.bytes()[range.clone()], range, file })
    }
}

/// A matrix of which a step reads a few rows; from [`Weights::table`].
pub enum Table {
    OnDevice(Tensor),
    InFile(MappedRows),
}

impl Table {
    /// The given columns of the rows of a step's tokens, `[N, columns.len()]` in the activations' dtype.
    ///
    /// # Errors
    ///
    /// On the CPU a token beyond the table, columns beyond it, or no memory left on the device.
    pub fn rows(&self, batch: &Batch, columns: Range<usize>) -> Result<Tensor> {
        match self {
            Self::OnDevice(table) => gather_columns(table, columns, &batch.tokens),
            Self::InFile(rows) => rows.gather(batch.token_ids(), columns),
        }
    }
}

/// A matrix that stays in its file. Only what [`MappedRows::gather`] reads comes to memory, and leaves it again.
pub struct MappedRows {
    tensors: Arc<Tensors>,
    file: usize,
    name: String,
    /// Bytes within the file.
    range: Range<usize>,
    stored: Dtype,
    row_bytes: usize,
    columns: usize,
    dtype: DType,
}

impl MappedRows {
    /// The given columns of each of `rows`, `[rows.len(), columns.len()]` in the activations' dtype.
    ///
    /// # Errors
    ///
    /// A row or column lies beyond the matrix, or the device has no memory left.
    fn gather(&self, rows: &[u32], columns: Range<usize>) -> Result<Tensor> {
        let count = self.range.len() / self.row_bytes;
        if let Some(row) = rows.iter().find(|&&row| row as usize >= count) {
            bail!("{}: row {row} of {count}", self.name)
        }
        if columns.start > columns.end || columns.end > self.columns {
            bail!("{}: columns {columns:?} of {}", self.name, self.columns)
        }
        let file = &self.tensors.files[self.file];
        let matrix = &file.bytes()[self.range.clone()];
        let element_bytes = self.row_bytes / self.columns;
        let bytes = columns.start * element_bytes..columns.end * element_bytes;
        let parts: Vec<&[u8]> =
            rows.iter().map(|&row| &matrix[row as usize * self.row_bytes..][bytes.clone()]).collect();
        let shape = (rows.len(), columns.len());
        let tensor =
            decode_tensor(self.stored, &parts, |_| (), shape, &Device::Cpu)?.expect("a float dtype, checked by mapped");
        file.release(&self.range);
        tensor.to_dtype(self.dtype)
    }
}

/// Tensors that a family leaves in the checkpoint, and why.
#[derive(Clone, Copy, Debug)]
pub struct Ignored {
    /// Beginning of the tensors' names.
    pub prefix: &'static str,
    /// Why the model does without them.
    pub reason: &'static str,
}

impl Ignored {
    /// Some tied checkpoints store the head all the same.
    pub const TIED_HEAD: Self = Self { prefix: "lm_head.weight", reason: "a copy of the tied embedding" };
}

struct Entry<'a> {
    path: &'a Path,
    name: String,
    dtype: Dtype,
    bytes: &'a [u8],
    range: Range<usize>,
    file: &'a WeightFile,
}

/// The elements of `parts`, one after the other, as they are stored; `None` if that is no float dtype. `done(i)` is told
/// of each part that is copied.
fn decode_tensor(
    stored: Dtype,
    parts: &[&[u8]],
    done: impl Fn(usize),
    shape: (usize, usize),
    device: &Device,
) -> Result<Option<Tensor>> {
    if kernels::device::takes_uploads(device) {
        let dtype = match stored {
            Dtype::F32 => DType::F32,
            Dtype::F16 => DType::F16,
            Dtype::BF16 => DType::BF16,
            _ => return Ok(None),
        };
        return kernels::device::upload(device, shape, dtype, parts, done).map(Some);
    }
    Ok(Some(match stored {
        Dtype::F32 => Tensor::from_vec(decode(parts, done, f32::from_le_bytes), shape, device)?,
        Dtype::F16 => Tensor::from_vec(decode(parts, done, f16::from_le_bytes), shape, device)?,
        Dtype::BF16 => Tensor::from_vec(decode(parts, done, bf16::from_le_bytes), shape, device)?,
        _ => return Ok(None),
    }))
}

/// The elements of `parts`, one after the other, converted in parallel.
fn decode<T: WithDType + Send, const SIZE: usize>(
    parts: &[&[u8]],
    done: impl Fn(usize),
    element: impl Fn([u8; SIZE]) -> T + Sync,
) -> Vec<T> {
    const CHUNK: usize = 1 << 18;
    let len = parts.iter().map(|part| part.len() / SIZE).sum();
    let mut values: Vec<T> = kernels::memory::with_capacity(len);
    let mut rest = &mut values.spare_capacity_mut()[..len];
    for (i, part) in parts.iter().enumerate() {
        let (head, tail) = rest.split_at_mut(part.len() / SIZE);
        rest = tail;
        head.par_chunks_mut(CHUNK).zip(part.par_chunks(CHUNK * SIZE)).for_each(|(values, bytes)| {
            for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<SIZE>().0) {
                value.write(element(*bytes));
            }
        });
        done(i);
    }
    // SAFETY: the loop above wrote each of the first `len` elements: every part fills its own share of them.
    unsafe { values.set_len(len) };
    values
}

/// Widens a row of stored elements.
type WidenRow = fn(&[u8], &mut [f32]);

/// How a stored row becomes f32; `None` for other dtypes than f32, f16 and bf16.
fn widen_row(stored: Dtype) -> Option<WidenRow> {
    fn each<const SIZE: usize>(bytes: &[u8], values: &mut [f32], widen: impl Fn([u8; SIZE]) -> f32) {
        values.iter_mut().zip(bytes.as_chunks().0).for_each(|(value, bytes)| *value = widen(*bytes));
    }
    Some(match stored {
        Dtype::F32 => |bytes, values| each(bytes, values, f32::from_le_bytes),
        Dtype::F16 => |bytes, values| each(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => |bytes, values| each(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
        _ => return None,
    })
}
