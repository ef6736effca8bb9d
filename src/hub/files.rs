//! Which files of a model are needed, and the headers of its weights.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use super::{
    Extent, HubError,
    cache::is_plain_name,
    client::{Client, Listing},
};

const REQUIRED: [&str; 2] = ["config.json", "tokenizer.json"];
const OPTIONAL: [&str; 7] = [
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "modules.json",
    "1_Pooling/config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];
pub(super) const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const PICKLED_WEIGHTS: &str = "pytorch_model.bin";
/// The sparse and multi-vector heads of bge-m3.
const HEADS: [&str; 2] = ["sparse_linear.pt", "colbert_linear.pt"];

/// One file of weights.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct WeightsFile {
    /// Name in the model's folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// The safetensors header: JSON from each tensor's name to its dtype, shape and place. None for other formats.
    pub header: Option<String>,
}

/// The small files to fetch of a repository that `has` files.
pub(super) fn metadata(
    has: impl Fn(&str) -> bool,
    absent: impl Fn(&str) -> HubError,
) -> Result<Vec<&'static str>, HubError> {
    if let Some(file) = REQUIRED.into_iter().find(|file| !has(file)) {
        return Err(absent(file));
    }
    let index = Some(INDEX).filter(|_| !has(WEIGHTS));
    Ok(REQUIRED.into_iter().chain(OPTIONAL.into_iter().chain(index).filter(|file| has(file))).collect())
}

/// The files of weights of a model that `has` files; the index, if there is one, is in `folder`. Empty: no weights.
pub(super) fn weights(folder: &Path, has: impl Fn(&str) -> bool) -> Result<Vec<String>, HubError> {
    let mut names = if has(WEIGHTS) {
        vec![WEIGHTS.to_string()]
    } else if has(INDEX) {
        shards(&folder.join(INDEX))?
    } else if has(PICKLED_WEIGHTS) {
        vec![PICKLED_WEIGHTS.to_string()]
    } else {
        return Ok(Vec::new());
    };
    names.extend(HEADS.into_iter().filter(|file| has(file)).map(String::from));
    Ok(names)
}

/// The files of weights that are in `folder`.
pub(super) fn local_weights(folder: &Path) -> Result<Vec<WeightsFile>, HubError> {
    let has = |file: &str| folder.join(file).is_file();
    weights(folder, has)?.into_iter().filter(|file| has(file)).map(|file| WeightsFile::local(folder, file)).collect()
}

/// What `folder` lacks of what `extent` needs.
pub(super) fn missing(folder: &Path, extent: Extent) -> Result<Vec<String>, HubError> {
    let has = |file: &str| folder.join(file).is_file();
    let mut needed: Vec<String> = REQUIRED.map(String::from).to_vec();
    if extent == Extent::Everything {
        let weights = weights(folder, has)?;
        needed.extend(if weights.is_empty() { vec![WEIGHTS.to_string()] } else { weights });
    }
    needed.retain(|file| !has(file));
    Ok(needed)
}

fn shards(index: &Path) -> Result<Vec<String>, HubError> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let malformed = |message: String| HubError::Malformed { what: index.display().to_string(), message };
    let text = fs::read(index).map_err(HubError::io(index))?;
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain_name(name) || !name.ends_with(".safetensors")) {
        return Err(malformed(format!("weight_map names `{name}`, expected a .safetensors file beside the index")));
    }
    if names.is_empty() {
        return Err(malformed("weight_map is empty".to_string()));
    }
    Ok(names.into_iter().collect())
}

impl WeightsFile {
    /// Of a file in a folder.
    pub(super) fn local(folder: &Path, name: String) -> Result<Self, HubError> {
        let path = folder.join(&name);
        let read = |from: u64, bytes: u64| {
            let mut file = File::open(&path)?;
            let total = file.metadata()?.len();
            let mut buffer = Vec::new();
            file.seek(SeekFrom::Start(from))?;
            file.take(bytes).read_to_end(&mut buffer)?;
            Ok((buffer, total))
        };
        Self::read(name, |from, bytes| read(from, bytes).map_err(HubError::io(&path)))
    }

    /// Of a file that stays at the Hub.
    pub(super) fn remote(client: &Client, listing: &Listing, name: String) -> Result<Self, HubError> {
        if let Some(&Some(bytes)) = listing.files.get(&name)
            && !name.ends_with(".safetensors")
        {
            return Ok(Self { name, bytes, header: None });
        }
        let file = name.clone();
        Self::read(name, |from, bytes| client.range(&listing.commit, &file, from, bytes))
    }

    /// `read` gives the bytes at an offset, up to a count, and the size of the whole file.
    fn read(name: String, read: impl Fn(u64, u64) -> Result<(Vec<u8>, u64), HubError>) -> Result<Self, HubError> {
        /// Enough for the whole header of most models, so that one request does.
        const FIRST_READ: u64 = 256 << 10;
        /// The safetensors crate refuses longer ones.
        const MAX_HEADER: u64 = 100_000_000;

        if !name.ends_with(".safetensors") {
            let (_, bytes) = read(0, 1)?;
            return Ok(Self { name, bytes, header: None });
        }
        let malformed = |message: String| HubError::Malformed { what: name.clone(), message };
        let (mut header, total) = read(0, FIRST_READ)?;
        let Some(length) = header.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)) else {
            return Err(malformed(format!("{total} bytes, too short for safetensors")));
        };
        if length > MAX_HEADER || length > total.saturating_sub(8) {
            return Err(malformed(format!("the header is {length} bytes long, the file {total}")));
        }
        header.drain(..8);
        header.truncate(length as usize);
        let missing = length - header.len() as u64;
        if missing > 0 {
            header.extend(read(8 + header.len() as u64, missing)?.0);
        }
        if header.len() as u64 != length {
            return Err(malformed(format!("the header is {length} bytes long, got {}", header.len())));
        }
        let header = String::from_utf8(header).map_err(|_| malformed("the header is not UTF-8".to_string()))?;
        Ok(Self { name, bytes: total, header: Some(header) })
    }
}
