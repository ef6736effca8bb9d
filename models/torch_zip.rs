//! Where the tensors of a torch zip lie: what `torch.save` writes for a dict of tensors (`pytorch_model.bin`, `*.pt`).
//!
//! Such a file is a zip whose entries are stored uncompressed: `data.pkl` names the tensors, `data/<key>` holds their
//! bytes. The pickle is interpreted by candle, which builds a tree of values and calls nothing; here that tree must
//! be a dict from names to plain tensors, and anything else is refused. So no code of a checkpoint can run.
//!
//! Follows pytorch 2.15 `torch/serialization.py` and `torch/_utils.py`, `_rebuild_tensor_v2`.

use std::collections::HashMap;
use std::io::{BufRead, Cursor, Read};
use std::ops::Range;

use candle_core::pickle::{Object, Stack};
use candle_core::{Result, bail};
use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use zip::{CompressionMethod, ZipArchive};

/// Bytes of a pickle that names tensors: 150 are usual for one of them.
const MAX_PICKLE: u64 = 16 << 20;

/// The tensors in the file `bytes`, with offsets from its beginning.
///
/// # Errors
///
/// The file is not a torch zip, holds anything but contiguous tensors by name, or a tensor lies outside its storage.
pub fn tensors(bytes: &[u8]) -> Result<Vec<(String, TensorInfo)>> {
    let (pickle, storages) = match entries(bytes) {
        Ok(entries) => entries,
        Err(error) => bail!("not a torch zip, or cut short: {error}"),
    };
    let Object::Dict(items) = unpickle(&pickle)? else { bail!("the pickle is not a dict of tensors") };
    items
        .into_iter()
        .filter(|(name, value)| !is_metadata(name, value))
        .map(|(name, value)| {
            let Object::Unicode(name) = name else { bail!("the pickle has the key {name:?}, expected a name") };
            match Stored::parse(value).and_then(|stored| stored.info(&name, &storages)) {
                Ok(info) => Ok((name, info)),
                Err(error) => bail!("{name}: {error}"),
            }
        })
        .collect()
}

/// The versions of its modules, which a whole state dict carries along.
fn is_metadata(name: &Object, value: &Object) -> bool {
    matches!((name, value), (Object::Unicode(name), Object::Dict(_)) if name == "_metadata")
}

type Storages = HashMap<String, Range<usize>>;

/// The pickle, and where each storage lies by its key.
fn entries(bytes: &[u8]) -> zip::result::ZipResult<(Vec<u8>, Storages)> {
    let invalid = |message: &str| Err(std::io::Error::other(message.to_string()).into());
    let mut archive = ZipArchive::new(Cursor::new(bytes))?;
    let (mut pickle, mut storages) = (None, HashMap::new());
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let name = entry.name()?.into_owned();
        let Some((_, name)) = name.split_once('/') else { continue };
        if name == "data.pkl" {
            if entry.size() > MAX_PICKLE {
                return invalid("data.pkl is too long for names of tensors");
            }
            let mut content = vec![];
            entry.by_ref().take(MAX_PICKLE).read_to_end(&mut content)?;
            pickle = Some(content);
        } else if let Some(key) = name.strip_prefix("data/") {
            let start = entry.data_start().unwrap_or(u64::MAX);
            let end = start.saturating_add(entry.size());
            if entry.compression() != CompressionMethod::Stored || entry.encrypted() || end > bytes.len() as u64 {
                return invalid("a storage is compressed, encrypted or cut short");
            }
            storages.insert(key.to_string(), start as usize..end as usize);
        } else if name == "byteorder" {
            let mut order = String::new();
            entry.take(16).read_to_string(&mut order)?;
            if order != "little" {
                return invalid("it is not little-endian");
            }
        }
    }
    match pickle {
        Some(pickle) => Ok((pickle, storages)),
        None => invalid("it has no data.pkl"),
    }
}

/// Interprets a pickle, and refuses one that repeats or nests values as no dict of tensors does: a short one could
/// otherwise grow beyond any memory.
fn unpickle(mut pickle: &[u8]) -> Result<Object> {
    const DEEPEST: usize = 6;
    const GETS: [u8; 2] = *b"hj";
    const PUTS: [u8; 2] = *b"qr";
    let mut stack = Stack::empty();
    loop {
        let (op, rest) = (pickle.fill_buf()?.first().copied().unwrap_or_default(), pickle.len());
        // The op that reads a text allocates what it says before it reads.
        if op == b'X'
            && pickle.get(1..5).is_some_and(|len| len.iter().rev().fold(0, |n, b| n << 8 | *b as usize) > rest)
        {
            bail!("the pickle is cut short")
        }
        if stack.read(&mut pickle)? {
            return stack.finalize();
        }
        let Some(top) = stack.stack().last() else { continue };
        let is_plain = match top {
            Object::Dict(items) => items.is_empty() || !PUTS.contains(&op),
            Object::Tuple(items) if GETS.contains(&op) => items.iter().all(|item| matches!(item, Object::Int(_))),
            Object::List(_) => false,
            Object::Class { .. } | Object::Unicode(_) | Object::Int(_) | Object::Long(_) => true,
            other => !GETS.contains(&op) && nests_within(other, DEEPEST),
        };
        if !is_plain {
            bail!("the pickle holds more than a dict of tensors")
        }
    }
}

fn nests_within(value: &Object, depth: usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return false };
    match value {
        Object::Tuple(items) => items.iter().all(|item| nests_within(item, depth)),
        Object::Dict(items) => items.iter().all(|(key, item)| nests_within(key, depth) && nests_within(item, depth)),
        Object::Reduce { callable, args } | Object::Build { callable, args } => {
            nests_within(callable, depth) && nests_within(args, depth)
        }
        Object::PersistentLoad(id) => nests_within(id, depth),
        _ => true,
    }
}

/// A tensor as its pickle describes it.
struct Stored {
    dtype: Dtype,
    storage: String,
    /// In elements, as are the strides.
    offset: usize,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl Stored {
    /// `_rebuild_tensor_v2(storage, offset, size, stride, requires_grad, backward_hooks, ..)`, the storage being
    /// `("storage", class, key, location, elements)`.
    fn parse(value: Object) -> Result<Self> {
        let Object::Reduce { callable, args } = value else { bail!("expected a tensor, got {}", kind(&value)) };
        match &*callable {
            Object::Class { module_name, class_name }
                if module_name == "torch._utils" && class_name == "_rebuild_tensor_v2" => {}
            other => bail!("expected a tensor, got a call of {}", kind(other)),
        }
        let malformed = || candle_core::Error::Msg("a tensor with other parts than torch writes".into());
        let Object::Tuple(args) = *args else { return Err(malformed()) };
        let [Object::PersistentLoad(storage), offset, Object::Tuple(shape), Object::Tuple(strides), ..] = &args[..]
        else {
            return Err(malformed());
        };
        let Object::Tuple(storage) = &**storage else { return Err(malformed()) };
        let [Object::Unicode(_), Object::Class { module_name, class_name }, Object::Unicode(key), ..] = &storage[..]
        else {
            return Err(malformed());
        };
        let dtype = match (module_name.as_str(), class_name.as_str()) {
            ("torch", "FloatStorage") => Dtype::F32,
            ("torch", "HalfStorage") => Dtype::F16,
            ("torch", "BFloat16Storage") => Dtype::BF16,
            ("torch", "LongStorage") => Dtype::I64,
            _ => bail!("a storage of {module_name}.{class_name}, expected f32, f16, bf16 or i64"),
        };
        let count = |value: &Object| match value {
            Object::Int(value) => usize::try_from(*value).map_err(|_| malformed()),
            Object::Long(value) => usize::try_from(*value).map_err(|_| malformed()),
            _ => Err(malformed()),
        };
        let counts = |values: &[Object]| values.iter().map(count).collect::<Result<Vec<_>>>();
        let (shape, strides) = (counts(shape)?, counts(strides)?);
        if shape.len() != strides.len() {
            return Err(malformed());
        }
        Ok(Self { dtype, storage: key.clone(), offset: count(offset)?, shape, strides })
    }

    fn info(self, name: &str, storages: &Storages) -> Result<TensorInfo> {
        let Some(storage) = storages.get(&self.storage) else { bail!("no storage data/{}", self.storage) };
        let mut elements = 1usize;
        for (&size, &stride) in self.shape.iter().zip(&self.strides).rev() {
            if size != 1 && stride != elements {
                bail!("strides {:?} for shape {:?}, expected a contiguous tensor", self.strides, self.shape)
            }
            elements = elements.saturating_mul(size);
        }
        let size = self.dtype.bitsize() / 8;
        let start = self.offset.saturating_mul(size).saturating_add(storage.start);
        let end = elements.saturating_mul(size).saturating_add(start);
        if end > storage.end {
            bail!("{name} {:?} lies outside its storage of {} bytes", self.shape, storage.len())
        }
        Ok(TensorInfo { dtype: self.dtype, shape: self.shape, data_offsets: (start, end) })
    }
}

/// What a refused value is, in few words.
fn kind(value: &Object) -> String {
    match value {
        Object::Class { module_name, class_name } => format!("{module_name}.{class_name}"),
        Object::Reduce { callable, .. } | Object::Build { callable, .. } => format!("a call of {}", kind(callable)),
        Object::Dict(_) => "a dict".into(),
        Object::Tuple(_) => "a tuple".into(),
        _ => "a plain value".into(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn file(pickle: &[u8], storage: &[u8]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(vec![]));
        let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
        for (name, content) in [("archive/data.pkl", pickle), ("archive/data/0", storage)] {
            zip.start_file(name, options).expect("in memory");
            zip.write_all(content).expect("in memory");
        }
        zip.finish().expect("in memory").into_inner()
    }

    /// What torch writes for `{"weight": torch.zeros(2, 3)}`, with a class, offset and stride of choice.
    fn tensor(class: &str, offset: u8, stride: u8) -> Vec<u8> {
        let mut pickle =
            b"\x80\x02}q\x00X\x06\x00\x00\x00weightq\x01ctorch._utils\n_rebuild_tensor_v2\nq\x02((".to_vec();
        pickle.extend(format!("X\x07\0\0\0storageq\x03ctorch\n{class}\nq\x04X\x01\0\0\x000q\x05").bytes());
        pickle.extend(b"X\x03\x00\x00\x00cpuq\x06K\x06tq\x07Q");
        pickle.extend([b'K', offset, b'K', 2, b'K', 3, 0x86, b'q', 8, b'K', stride, b'K', 1, 0x86, b'q', 9, 0x89]);
        pickle.extend(b"ccollections\nOrderedDict\nq\n)Rq\x0btq\x0cRq\rs.");
        pickle
    }

    fn error(pickle: &[u8]) -> String {
        tensors(&file(pickle, &[0; 24])).expect_err("refused").to_string()
    }

    #[test]
    fn tensors_are_found() {
        let file = file(&tensor("FloatStorage", 0, 3), &[7; 24]);
        let found = tensors(&file).expect("a torch zip");
        assert_eq!(found.len(), 1);
        let (name, info) = &found[0];
        assert_eq!((name.as_str(), info.dtype, &info.shape[..]), ("weight", Dtype::F32, &[2, 3][..]));
        assert_eq!(file[info.data_offsets.0..info.data_offsets.1], [7; 24]);
    }

    #[test]
    fn tensors_that_do_not_fit_are_refused() {
        assert!(error(&tensor("FloatStorage", 1, 3)).contains("outside its storage"));
        assert!(error(&tensor("FloatStorage", 0, 4)).contains("contiguous"));
        assert!(error(&tensor("QUInt8Storage", 0, 3)).contains("torch.QUInt8Storage"));
        let cut = file(&tensor("FloatStorage", 0, 3), &[7; 24]);
        assert!(tensors(&cut[..cut.len() - 30]).expect_err("cut").to_string().contains("not a torch zip"));
        assert!(tensors(b"").is_err());
    }

    /// Pickles that would run code in Python, as a value, as a key's neighbour, as the whole and as a state to set.
    #[test]
    fn whatever_would_run_code_is_refused() {
        let call = b"cposix\nsystem\nX\x09\x00\x00\x00touch /xy\x85R";
        let value = [&b"\x80\x02}X\x01\x00\x00\x00w"[..], call, b"s."].concat();
        assert!(error(&value).contains("w: expected a tensor, got a call of posix.system"));
        assert!(error(&[&b"\x80\x02"[..], call, b"."].concat()).contains("not a dict"));
        let built = [&b"\x80\x02}X\x01\x00\x00\x00w"[..], call, b"}bs."].concat();
        assert!(error(&built).contains("w: expected a tensor"));
        // A tensor's own call with another storage, and one whose arguments are calls.
        let mut nested = tensor("FloatStorage", 0, 3);
        let at = nested.iter().position(|&b| b == b'Q').expect("there");
        nested.splice(at + 1..at + 3, call.iter().copied());
        assert!(error(&nested).contains("weight: a tensor with other parts"), "{}", error(&nested));
        // INST, OBJ, GLOBAL by stack and extensions are ops that the reader does not have.
        for op in
            [&b"(iposix\nsystem\n."[..], b"(cposix\nsystem\no.", b"\x8c\x05posix\x8c\x06system\x93.", b"\x82\x01."]
        {
            assert!(error(op).contains("op-code"), "{}", error(op));
        }
    }

    #[test]
    fn pickles_that_grow_or_nest_without_end_are_refused() {
        let mut doubling = b"\x80\x02K\x01".to_vec();
        for i in 0..64u8 {
            doubling.extend([b'q', i, b'h', i, 0x86]);
        }
        assert!(error(&doubling).contains("more than a dict"), "{}", error(&doubling));
        let deep = [&b"\x80\x02K\x01"[..], &[0x85; 1 << 20]].concat();
        assert!(error(&deep).contains("more than a dict"));
        let long = b"\x80\x02X\xff\xff\xff\xffshort";
        assert!(error(long).contains("cut short"));
    }
}
