//! Conversations on disk: messages and settings, and what the cache holds of them, so that a conversation goes on
//! where it stopped without running its history again.
//!
//! A file is a safetensors file. Its tensors are blocks of keys and values and recurrent states as
//! [`Cache::export`](models::Cache::export) gives them; its metadata is the format's name, the session as JSON, and a
//! SHA-256 over both. It appears whole or not at all, and one byte of difference is noticed when it is read.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use models::{Checkpoint, Quantization, weights};
use ring::digest::{Context, SHA256};
use safetensors::tensor::{SafeTensors, View, serialize_to_file};
use serde::{Deserialize, Serialize};

use crate::message::{Message, Tool};
use crate::sampler::SamplingParams;
use crate::snapshot::{Snapshot, SnapshotLayout};
use crate::{Error, Result, atomic};

/// A conversation with all its branches, as it is written to disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Session {
    /// What computed the cache.
    pub origin: Origin,
    /// The name of the current branch.
    pub branch: String,
    /// The messages of every branch.
    pub branches: BTreeMap<String, Vec<Message>>,
    pub tools: Vec<Tool>,
    pub thinking: Option<bool>,
    pub params: SamplingParams,
}

/// Which model computed a cache, and how: another one cannot go on with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Origin {
    /// What the user called the model.
    pub model: String,
    /// A hash of the configuration and of a sample of the weights.
    fingerprint: String,
    /// Version, device, dtype and quantisation, which decide how results are rounded.
    computed: String,
}

impl Origin {
    /// The origin of what `checkpoint` computes.
    ///
    /// # Errors
    ///
    /// The checkpoint cannot be read.
    pub fn new(
        checkpoint: &Checkpoint,
        dtype: DType,
        quantization: Option<Quantization>,
        device: &Device,
    ) -> Result<Self> {
        let mut digest = Context::new(&SHA256);
        digest.update(&checkpoint.read("config.json")?.unwrap_or_default());
        weights::sample(checkpoint, |bytes| digest.update(bytes))?;
        let quantization = match quantization {
            None => "",
            Some(Quantization::Q8) => " and q8",
            Some(Quantization::Q4) => " and q4",
        };
        let device = match device {
            Device::Cpu => "the CPU",
            Device::Cuda(_) => "CUDA",
            Device::Metal(_) => "Metal",
        };
        Ok(Self {
            model: checkpoint.path("").display().to_string().trim_end_matches(['/', '\\']).to_string(),
            fingerprint: hex(digest),
            computed: format!("taper {} in {}{quantization} on {device}", env!("CARGO_PKG_VERSION"), dtype.as_str()),
        })
    }

    /// Why what `self` computed is of no use to `other`; `None` if it is.
    pub fn differs_from(&self, other: &Self) -> Option<String> {
        if self.fingerprint != other.fingerprint {
            Some(format!("it was computed by {}, this is {}", self.model, other.model))
        } else if self.computed != other.computed {
            Some(format!("it was computed by {}, this is {}", self.computed, other.computed))
        } else {
            None
        }
    }
}

/// Writes a session. A file that is there is replaced if it is a session too.
///
/// # Errors
///
/// The file cannot be written, or something else is there.
pub(crate) fn save(path: &Path, session: Session, snapshot: Snapshot) -> Result<()> {
    if fs::symlink_metadata(path).is_ok() && read_header(path).is_err() {
        let message = "is there and is no saved conversation, so it stays as it is: choose another name";
        return Err(Error::Session { path: path.into(), message: message.into() });
    }
    let Snapshot { layout, tensors } = snapshot;
    let json = serde_json::to_string(&Content { session, cache: layout })
        .map_err(|error| Error::Session { path: path.into(), message: error.to_string() })?;
    let tensors: BTreeMap<&str, &Tensor> = tensors.iter().map(|(name, tensor)| (&**name, tensor)).collect();
    let mut digest = Context::new(&SHA256);
    digest.update(json.as_bytes());
    for (name, tensor) in &tensors {
        digest_tensor(&mut digest, name, *tensor);
    }
    let metadata = HashMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("session".to_string(), json),
        ("sha256".to_string(), hex(digest)),
    ]);
    let write = |path: &Path| {
        serialize_to_file(tensors, Some(metadata), path).map_err(io::Error::other)?;
        File::options().write(true).open(path)?.sync_all()
    };
    atomic::replace(path, write).map_err(|source| Error::Io { path: path.into(), source })
}

/// Reads a session and its cache.
///
/// # Errors
///
/// The file cannot be read, is not a session, or not what was written.
pub(crate) fn load(path: &Path) -> Result<(Session, Snapshot)> {
    let fail = |message: &str| Error::Session { path: path.into(), message: message.into() };
    let metadata = read_header(path)?;
    let bytes = fs::read(path).map_err(|source| Error::Io { path: path.into(), source })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|_| fail(DAMAGED))?;
    let json = metadata.get("session").ok_or_else(|| fail(DAMAGED))?;
    let mut digest = Context::new(&SHA256);
    digest.update(json.as_bytes());
    for (name, tensor) in tensors.tensors().into_iter().collect::<BTreeMap<_, _>>() {
        digest_tensor(&mut digest, &name, &tensor);
    }
    if metadata.get("sha256") != Some(&hex(digest)) {
        return Err(fail(DAMAGED));
    }
    let Content { session, cache: layout } = serde_json::from_str(json).map_err(|error| fail(&error.to_string()))?;
    let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
    Ok((session, Snapshot { layout, tensors }))
}

const FORMAT: &str = "taper session 1";
const DAMAGED: &str = "the saved conversation is damaged or cut short";

#[derive(Serialize, Deserialize)]
struct Content {
    #[serde(flatten)]
    session: Session,
    cache: SnapshotLayout,
}

/// The metadata of a session's file, from its header alone.
fn read_header(path: &Path) -> Result<HashMap<String, String>> {
    /// What the safetensors format allows.
    const MAX_HEADER: u64 = 100_000_000;
    #[derive(Deserialize)]
    struct Header {
        #[serde(rename = "__metadata__", default)]
        metadata: HashMap<String, String>,
    }
    let read = || -> io::Result<Option<Vec<u8>>> {
        let mut file = File::open(path)?;
        let mut len = [0; 8];
        let is_short = file.read_exact(&mut len).is_err();
        let len = u64::from_le_bytes(len);
        if is_short || len > MAX_HEADER {
            return Ok(None);
        }
        let mut header = vec![];
        file.take(len).read_to_end(&mut header)?;
        Ok(Some(header))
    };
    let header = read().map_err(|source| Error::Io { path: path.into(), source })?;
    let header: Option<Header> = header.and_then(|header| serde_json::from_slice(&header).ok());
    let metadata = header.map(|header| header.metadata).unwrap_or_default();
    let message = match metadata.get("format").map(String::as_str) {
        Some(FORMAT) => return Ok(metadata),
        Some(format) if format.starts_with("taper session") => {
            format!("it is a {format}, this version reads a {FORMAT}")
        }
        _ => "not a saved conversation, or one that is damaged or cut short".to_string(),
    };
    Err(Error::Session { path: path.into(), message })
}

fn digest_tensor(digest: &mut Context, name: &str, tensor: impl View) {
    digest.update(format!("{name} {:?} {:?}\n", tensor.dtype(), tensor.shape()).as_bytes());
    digest.update(&tensor.data());
}

fn hex(digest: Context) -> String {
    digest.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}
