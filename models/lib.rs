//! Model families, written directly against Candle: one file per family.
//!
//! A family reads its `Config` from `config.json`, its tensors by name from [`Weights`], says what every layer
//! keeps between steps ([`CacheSpec`]), and maps a packed [`Batch`] and a [`Cache`] to hidden states. It does not
//! know the device, the phase (prompt or decode) or how many sequences there are.

pub mod bge_m3;
pub mod cache;
pub mod checkpoint;
mod config;
pub mod gemma4;
pub mod layers;
mod moe;
mod pack_cache;
mod pooling;
pub mod qwen3;
pub mod qwen3_5;
mod tensors;
mod torch_zip;
pub mod weights;

use candle_core::{DType, Device, Result, Tensor, bail};
use kernels::Batch;
use kernels::attention::Mask;
use kernels::gather::gather;
pub use kernels::quantized::Quantization;
use serde_json::Value;

pub use cache::{Cache, CacheConfig, CacheSpec};
pub use checkpoint::Checkpoint;
pub use pack_cache::{PackCache, Packing};
pub use weights::Weights;

/// A decoder: packed tokens in, hidden states out, logits on request.
pub trait CausalLm: Send {
    /// What each layer keeps between steps, by layer index.
    fn cache_specs(&self) -> Vec<CacheSpec>;

    /// Runs a step and writes its cache entries: `[N, H]`, final norm applied.
    ///
    /// # Errors
    ///
    /// The cache was made for other specs, a token lies beyond the vocabulary, or the device has no memory left.
    fn forward(&self, batch: &Batch, cache: &mut Cache) -> Result<Tensor> {
        self.forward_observed(batch, cache, &mut |_| Ok(()))
    }

    /// As [`CausalLm::forward`], showing `observe` what is computed on the way.
    ///
    /// # Errors
    ///
    /// As [`CausalLm::forward`]; also what `observe` returns.
    fn forward_observed(&self, batch: &Batch, cache: &mut Cache, observe: &mut Observer) -> Result<Tensor>;

    /// As [`CausalLm::forward`], for the last tokens of `sequences` alone, by index in the batch:
    /// `[sequences.len(), H]`, `None` if there are none. A family that can leaves out what the others do not need.
    ///
    /// # Errors
    ///
    /// As [`CausalLm::forward`]; also a sequence beyond the batch.
    fn forward_last(&self, batch: &Batch, cache: &mut Cache, sequences: &[u32]) -> Result<Option<Tensor>> {
        let hidden = self.forward(batch, cache)?;
        if sequences.is_empty() {
            return Ok(None);
        }
        gather(&hidden, &batch.last_rows(sequences)?).map(Some)
    }

    /// `hidden` `[n, H]` to logits `[n, V]`.
    ///
    /// # Errors
    ///
    /// `hidden` has another width.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor>;
}

/// What [`CausalLm::forward_observed`] shows of a step.
#[derive(Clone, Copy, Debug)]
pub enum Observed<'a> {
    /// The residual stream `[N, H]` that enters a layer, by layer index, and last what the final norm makes of it, under
    /// the number of layers.
    Hidden(usize, &'a Tensor),
    /// A layer's logits `[N, E]` over experts, of which each token goes to the greatest `chosen`.
    Router { logits: &'a Tensor, chosen: usize },
}

/// Is shown what a step computes on the way; an error ends the step.
pub type Observer<'a> = dyn FnMut(Observed) -> Result<()> + 'a;

/// An encoder: packed texts in, what they are compared by out.
pub trait Encoder: Send + Sync {
    /// What it gives and takes.
    fn traits(&self) -> EncoderTraits;

    /// Runs a step over whole texts and gives the outputs that `heads` asks for.
    ///
    /// # Errors
    ///
    /// A head that [`EncoderTraits::heads`] lacks, a text longer than the model's positions, a token beyond the
    /// vocabulary, or no memory left on the device.
    fn encode(&self, batch: &Batch, heads: Heads) -> Result<Encoded>;
}

/// Which outputs of an encoder: wanted, or there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// One vector a text.
    pub dense: bool,
    /// A weight for each token of a text.
    pub sparse: bool,
    /// A vector for each token of a text.
    pub colbert: bool,
}

impl Heads {
    /// The dense vector alone.
    pub const DENSE: Self = Self { dense: true, sparse: false, colbert: false };

    /// Whether each head of `self` is one of `other`.
    pub fn within(self, other: Self) -> bool {
        (!self.dense || other.dense) && (!self.sparse || other.sparse) && (!self.colbert || other.colbert)
    }
}

/// What an encoder gives and takes.
#[derive(Clone, Debug)]
pub struct EncoderTraits {
    /// The family's name as people write it.
    pub family: &'static str,
    /// The heads that the checkpoint has weights for.
    pub heads: Heads,
    /// Size of a dense vector.
    pub dense_size: usize,
    /// Rows of the embedding; a tokenizer may have fewer entries.
    pub vocab_size: usize,
    /// Longest text in tokens, special ones included.
    pub max_tokens: usize,
    /// Whether the leading dimensions of a dense vector are a vector by themselves, which the model must have been
    /// trained for (Matryoshka representation learning, <https://arxiv.org/abs/2205.13147>).
    pub has_nested_sizes: bool,
    /// Token ids that carry no sparse weight.
    pub special_ids: Vec<u32>,
    /// The token that must end a text, if the tokenizer might not append it.
    pub end_token: Option<&'static str>,
}

/// What an encoder made of a step. Vectors are not normalised yet.
#[derive(Clone, Debug, Default)]
pub struct Encoded {
    /// `[B, H]`
    pub dense: Option<Tensor>,
    /// `[N]`, none negative.
    pub sparse: Option<Tensor>,
    /// `[N, C]`; the first token of a text has a row like the others, though it takes no part in a comparison.
    pub colbert: Option<Tensor>,
}

/// A checkpoint's configuration, of any supported family.
#[derive(Clone, Debug)]
pub enum Config {
    Qwen3(qwen3::Config),
    Qwen35(qwen3_5::Config),
    Gemma4(gemma4::Config),
    BgeM3(bge_m3::Config),
}

/// What `config.json` says about a model without its weights.
#[derive(Clone, Debug)]
pub struct Description {
    /// The family's name as people write it.
    pub family: &'static str,
    pub hidden_size: usize,
    /// Rows of the embedding; a tokenizer may have fewer entries.
    pub vocab_size: usize,
    /// Longest context in tokens that the model was made for.
    pub max_positions: usize,
    /// End tokens that `config.json` names.
    pub eos_token_ids: Vec<u32>,
    /// By layer index; empty where nothing is kept.
    pub cache_specs: Vec<CacheSpec>,
    /// By layer index; `None` where a layer has none.
    pub attention: Vec<Option<AttentionShape>>,
    /// Of each MLP, if they are sparse.
    pub experts: Option<ExpertCount>,
}

/// The attention of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub num_heads: usize,
    pub head_dim: usize,
    pub mask: Mask,
    /// Positions that a token sees at most, its own among them.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Without a window.
    pub(crate) fn causal(num_heads: usize, head_dim: usize) -> Self {
        Self { num_heads, head_dim, mask: Mask::Causal, window: None }
    }

    /// Operations of the scores and mixes of `tokens` of a sequence behind `past` others: two for each product of an
    /// element of a query or a weight with one that it sees.
    pub fn operations(&self, tokens: usize, past: usize) -> usize {
        let context = past + tokens;
        let seen = |position: usize| match self.mask {
            Mask::Causal => position + 1,
            Mask::Bidirectional => context,
        };
        let window = self.window.unwrap_or(usize::MAX);
        let pairs: usize = (past..context).map(|position| seen(position).min(window)).sum();
        4 * self.num_heads * self.head_dim * pairs
    }
}

/// How many experts there are, and to how many of them a token goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertCount {
    pub total: usize,
    pub per_token: usize,
}

/// The values of `model_type` that [`Config::read`] takes.
pub const SUPPORTED: &[&str] =
    &["qwen3", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", "gemma4", "gemma4_text", "xlm-roberta"];

impl Config {
    /// Reads `config.json` and picks the family by `model_type`.
    ///
    /// # Errors
    ///
    /// No `config.json`, one that is not JSON, an unknown architecture, or a field with a value that the family
    /// does not support.
    pub fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path("config.json");
        let Some(bytes) = checkpoint.read("config.json")? else {
            bail!("{}: no such file, so this is not a model folder", path.display())
        };
        let value: Value = match serde_json::from_slice(&bytes) {
            Ok(value) => value,
            Err(error) => bail!("{}: {error}", path.display()),
        };
        match value.get("model_type").and_then(Value::as_str) {
            Some("qwen3") => Ok(Self::Qwen3(config::parse(checkpoint, &value)?)),
            Some("qwen3_5" | "qwen3_5_text" | "qwen3_5_moe" | "qwen3_5_moe_text") => {
                Ok(Self::Qwen35(qwen3_5::Config::parse(checkpoint, &value)?))
            }
            Some("gemma4" | "gemma4_text") => Ok(Self::Gemma4(gemma4::Config::parse(checkpoint, &value)?)),
            Some("xlm-roberta") => Ok(Self::BgeM3(config::parse(checkpoint, &value)?)),
            Some(other) => {
                bail!(
                    "{}: model_type {other:?} is not supported, expected one of {}",
                    path.display(),
                    SUPPORTED.join(", ")
                )
            }
            None => bail!("{}: no model_type, expected one of {}", path.display(), SUPPORTED.join(", ")),
        }
    }

    /// What the configuration says by itself.
    pub fn describe(&self) -> Description {
        match self {
            Self::Qwen3(config) => config.describe(),
            Self::Qwen35(config) => config.describe(),
            Self::Gemma4(config) => config.describe(),
            Self::BgeM3(config) => config.describe(),
        }
    }

    /// Reads the weights of a language model. `dtype` is that of activations and of keys and values.
    ///
    /// # Errors
    ///
    /// The model is an encoder; a tensor is missing, of another shape than the configuration says, or not used by the
    /// model; or the device has no memory left. Messages name tensor, shape and file.
    pub fn load(&self, checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Box<dyn CausalLm>> {
        self.load_quantized(checkpoint, dtype, device, Packing::default())
    }

    /// As [`Config::load`], with the matrices of linear layers and embeddings packed on the way from the file. Norms,
    /// convolutions, decays, routers and tables that stay in their file are not.
    ///
    /// # Errors
    ///
    /// As [`Config::load`]; also if a weight is NaN or infinite, or the device has no kernels for packed weights. A cache
    /// that cannot be used is no error.
    pub fn load_quantized(
        &self,
        checkpoint: &Checkpoint,
        dtype: DType,
        device: &Device,
        packing: impl Into<Packing>,
    ) -> Result<Box<dyn CausalLm>> {
        let packing = packing.into();
        let weights = || Weights::open_packed(checkpoint, &[], dtype, device, &packing);
        Ok(match self {
            Self::Qwen3(config) => Box::new(qwen3::Qwen3::load(config, &weights()?)?),
            Self::Qwen35(config) => Box::new(qwen3_5::Qwen35::load(config, &weights()?)?),
            Self::Gemma4(config) => Box::new(gemma4::Gemma4::load(config, &weights()?)?),
            Self::BgeM3(_) => bail!("{}: an encoder, not a language model", checkpoint.path("config.json").display()),
        })
    }

    /// Reads the weights of an encoder. `dtype` is that of activations.
    ///
    /// # Errors
    ///
    /// As [`Config::load`], and if the model is not an encoder.
    pub fn load_encoder(&self, checkpoint: &Checkpoint, dtype: DType, device: &Device) -> Result<Box<dyn Encoder>> {
        self.load_encoder_quantized(checkpoint, dtype, device, Packing::default())
    }

    /// As [`Config::load_encoder`], with matrices packed as by [`Config::load_quantized`]. The sparse and ColBERT heads
    /// are not: they are small, and what they give is compared as it is.
    ///
    /// # Errors
    ///
    /// As [`Config::load_encoder`] and [`Config::load_quantized`].
    pub fn load_encoder_quantized(
        &self,
        checkpoint: &Checkpoint,
        dtype: DType,
        device: &Device,
        packing: impl Into<Packing>,
    ) -> Result<Box<dyn Encoder>> {
        let packing = packing.into();
        let weights = |heads: &[&str]| Weights::open_packed(checkpoint, heads, dtype, device, &packing);
        Ok(match self {
            Self::Qwen3(config) => Box::new(qwen3::Qwen3Embedding::load(config, checkpoint, &weights(&[])?)?),
            Self::BgeM3(config) => Box::new(bge_m3::BgeM3::load(config, checkpoint, &weights(&bge_m3::HEADS)?)?),
            Self::Qwen35(_) | Self::Gemma4(_) => bail!(
                "{}: a language model, expected an encoder such as BAAI/bge-m3 or Qwen/Qwen3-Embedding-0.6B",
                checkpoint.path("config.json").display()
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attention_counts_what_tokens_see() {
        let causal = AttentionShape::causal(3, 5);
        assert_eq!(causal.operations(3, 2), 4 * 15 * (3 + 4 + 5));
        assert_eq!(AttentionShape { window: Some(4), ..causal }.operations(3, 2), 4 * 15 * (3 + 4 + 4));
        assert_eq!(AttentionShape { mask: Mask::Bidirectional, ..causal }.operations(3, 0), 4 * 15 * 9);
    }
}
