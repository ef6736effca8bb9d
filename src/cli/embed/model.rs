//! The options that name an encoder and say how to run it.

use models::Checkpoint;
use serde_json::{Value, json};
use taper::{Embedder, EmbedderOptions, Heads};

use super::super::Result;
use super::super::model::{DeviceArgs, PackCacheArgs, Quant, SourceArgs};

/// An encoder to load and how.
#[derive(Debug, clap::Args)]
pub struct EncoderArgs {
    /// Hub id such as BAAI/bge-m3 or Qwen/Qwen3-Embedding-0.6B, or a folder [default: the built-in demo]
    #[arg(short, long, value_name = "MODEL", help_heading = "Model")]
    model: Option<String>,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Pack the weights while loading: less memory and faster on the CPU, a little less exact
    #[arg(long, value_enum, default_value = "none", help_heading = "Model")]
    quant: Quant,
    #[command(flatten)]
    pack_cache: PackCacheArgs,
    /// Tokens that run at once; a longer text runs alone [default: 4096, on a GPU 16384]
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    batch_tokens: Option<usize>,
    /// Longest text in tokens, if less than the model allows; the rest is cut off and reported
    #[arg(long, value_name = "TOKENS", help_heading = "Model")]
    max_length: Option<usize>,
    /// Keep this many dimensions of dense vectors, for models trained for it
    #[arg(long, value_name = "DIMENSIONS", help_heading = "Model")]
    dim: Option<usize>,
}

impl EncoderArgs {
    /// Loads the model, and says by what it is known; without one, the demo.
    pub fn load(&self, heads: Option<Heads>, normalize: bool) -> Result<(Embedder, Value)> {
        let options = EmbedderOptions {
            device: self.device.choice(),
            dtype: self.device.dtype(),
            quantization: self.quant.quantization(),
            pack_cache: self.pack_cache.cache(),
            hub: self.source.hub(),
            heads,
            max_tokens: self.max_length,
            batch_tokens: self.batch_tokens,
            dimensions: self.dim,
            normalize,
        };
        let (embedder, files) = match &self.model {
            Some(model) => {
                let folder = self.source.resolve(model)?;
                let mut files = vec![];
                for entry in std::fs::read_dir(&folder)?.filter_map(|entry| entry.ok()) {
                    let bytes = std::fs::metadata(entry.path())?.len();
                    files.push(json!([entry.file_name().to_string_lossy(), bytes]));
                }
                files.sort_by_key(Value::to_string);
                (Embedder::open(&Checkpoint::Folder(folder), &options)?, files)
            }
            None => (demo(&options)?, vec![]),
        };
        let known = json!({
            "model": self.model,
            "files": files,
            "device": format!("{:?} {:?}", self.device.device, self.device.dtype),
            "quant": format!("{:?}", self.quant),
            "max_length": embedder.max_tokens(),
            "dense_size": embedder.dense_size(),
        });
        Ok((embedder, known))
    }
}

#[cfg(feature = "demo")]
fn demo(options: &EmbedderOptions) -> Result<Embedder> {
    eprintln!("This is the built-in demo encoder, which knows a few facts. For a real model: -m BAAI/bge-m3");
    Ok(Embedder::demo(options)?)
}

#[cfg(not(feature = "demo"))]
fn demo(_: &EmbedderOptions) -> Result<Embedder> {
    Err(super::super::Error::Usage("no model: this build has no demo, so name one, such as -m BAAI/bge-m3".into()))
}

/// Parses `dense,sparse,colbert` or some of them.
pub fn parse_heads(text: &str) -> std::result::Result<Heads, String> {
    let mut heads = Heads { dense: false, sparse: false, colbert: false };
    for name in text.split(',') {
        match name.trim() {
            "dense" => heads.dense = true,
            "sparse" => heads.sparse = true,
            "colbert" => heads.colbert = true,
            other => return Err(format!("{other:?}, expected some of dense,sparse,colbert")),
        }
    }
    Ok(heads)
}

/// The prompt that `--prompt` means: one that the model knows by this name, else the text itself.
pub fn prompt(embedder: &Embedder, name_or_text: &str) -> String {
    embedder.prompt(name_or_text).unwrap_or(name_or_text).to_string()
}
