//! bge-m3: XLM-RoBERTa with 8192 positions and three heads, for one vector a text, a weight a token and a vector a
//! token, all from one pass.
//!
//! Follows transformers 5.23.0 `models/xlm_roberta/modeling_xlm_roberta.py` and FlagEmbedding's
//! `inference/embedder/encoder_only/m3.py`. Checked against both on random checkpoints of both layouts of names, from
//! safetensors and from torch zips.

use candle_core::{Result, Tensor, bail};
use kernels::Batch;
use kernels::attention::{AttentionParams, Mask, attention};
use kernels::gather::gather;
use kernels::norm::add_layer_norm;
use serde::Deserialize;

use crate::checkpoint::Checkpoint;
use crate::config::{self, token_ids};
use crate::layers::{Bias, Embedding, Linear, remaining};
use crate::pooling::Pooling;
use crate::weights::{Ignored, Weights};
use crate::{AttentionShape, Description, Encoded, Encoder, EncoderTraits, Heads};

/// `config.json`, with its names.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    #[serde(deserialize_with = "config::size")]
    vocab_size: usize,
    #[serde(deserialize_with = "config::size")]
    hidden_size: usize,
    #[serde(deserialize_with = "config::size")]
    intermediate_size: usize,
    #[serde(deserialize_with = "config::size")]
    num_hidden_layers: usize,
    #[serde(deserialize_with = "config::size")]
    num_attention_heads: usize,
    #[serde(deserialize_with = "config::size")]
    max_position_embeddings: usize,
    #[serde(deserialize_with = "config::size")]
    type_vocab_size: usize,
    #[serde(default = "default_eps", deserialize_with = "config::positive")]
    layer_norm_eps: f64,
    #[serde(rename = "hidden_act")]
    _hidden_act: HiddenAct,
    #[serde(default, rename = "position_embedding_type")]
    _position_embedding_type: PositionEmbedding,
    bos_token_id: u32,
    pad_token_id: u32,
    #[serde(deserialize_with = "token_ids")]
    eos_token_id: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HiddenAct {
    /// By the error function.
    Gelu,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum PositionEmbedding {
    #[default]
    Absolute,
}

fn default_eps() -> f64 {
    1e-12
}

/// `<unk>`, which has this id in every XLM-RoBERTa and no field in its configuration.
const UNKNOWN_ID: u32 = 3;

impl Config {
    pub(crate) fn describe(&self) -> Description {
        Description {
            family: "bge-m3",
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: self.max_tokens(),
            eos_token_ids: self.eos_token_id.clone(),
            cache_specs: vec![],
            attention: vec![Some(self.attention_shape()); self.num_hidden_layers],
            experts: None,
        }
    }

    fn attention_shape(&self) -> AttentionShape {
        let shape = AttentionShape::causal(self.num_attention_heads, self.hidden_size / self.num_attention_heads);
        AttentionShape { mask: Mask::Bidirectional, ..shape }
    }

    /// The first token has the position after the padding's.
    fn first_position(&self) -> usize {
        self.pad_token_id as usize + 1
    }

    fn max_tokens(&self) -> usize {
        self.max_position_embeddings.saturating_sub(self.first_position())
    }
}

/// The heads that lie beside the model, each in a torch zip of this name.
pub(crate) const HEADS: [&str; 2] = ["sparse_linear", "colbert_linear"];

/// XLM-RoBERTa with the heads that its checkpoint has.
pub struct BgeM3 {
    embeddings: Embeddings,
    layers: Vec<EncoderLayer>,
    sparse_linear: Option<Linear>,
    colbert_linear: Option<Linear>,
    traits: EncoderTraits,
}

impl BgeM3 {
    /// Reads the weights that `config` describes, and the heads from `sparse_linear.pt` and `colbert_linear.pt` where
    /// `weights` has them. Heads are not packed.
    ///
    /// # Errors
    ///
    /// A tensor is missing, of another shape, or not used by the model; or the checkpoint pools otherwise than by its
    /// first token.
    pub fn load(config: &Config, checkpoint: &Checkpoint, weights: &Weights) -> Result<Self> {
        if !config.hidden_size.is_multiple_of(config.num_attention_heads) {
            bail!(
                "bge_m3: hidden size {}, expected a multiple of the {} attention heads",
                config.hidden_size,
                config.num_attention_heads
            )
        }
        Pooling::FirstToken.check(checkpoint)?;
        let is_prefixed = weights.pp("roberta").contains("embeddings.word_embeddings.weight");
        let model = if is_prefixed { weights.pp("roberta") } else { weights.clone() };
        let embeddings = Embeddings::load(config, &model.pp("embeddings"))?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| EncoderLayer::load(config, &model.pp("encoder.layer").pp(layer)))
            .collect::<Result<_>>()?;
        let head = |name: &str, output: usize| {
            let weights = weights.pp(name).quantized(None)?;
            let is_there = weights.contains("weight");
            is_there.then(|| Linear::load(&weights, config.hidden_size, output, Bias::Present)).transpose()
        };
        let [sparse, colbert] = HEADS;
        let (sparse_linear, colbert_linear) = (head(sparse, 1)?, head(colbert, config.hidden_size)?);
        weights.finish(if is_prefixed { &IGNORED_WITH_PREFIX } else { &IGNORED })?;
        let mut special_ids = vec![config.bos_token_id, config.pad_token_id, UNKNOWN_ID];
        special_ids.extend(&config.eos_token_id);
        let traits = EncoderTraits {
            family: "bge-m3",
            heads: Heads { dense: true, sparse: sparse_linear.is_some(), colbert: colbert_linear.is_some() },
            dense_size: config.hidden_size,
            vocab_size: config.vocab_size,
            max_tokens: config.max_tokens(),
            has_nested_sizes: false,
            special_ids,
            end_token: None,
        };
        Ok(Self { embeddings, layers, sparse_linear, colbert_linear, traits })
    }
}

const IGNORED: [Ignored; 2] = [
    Ignored { prefix: "pooler.", reason: "the dense vector is the hidden state itself" },
    Ignored { prefix: "embeddings.position_ids", reason: "positions are counted" },
];
const IGNORED_WITH_PREFIX: [Ignored; 3] = [
    Ignored { prefix: "roberta.pooler.", reason: IGNORED[0].reason },
    Ignored { prefix: "roberta.embeddings.position_ids", reason: IGNORED[1].reason },
    Ignored { prefix: "lm_head.", reason: "predicts masked tokens" },
];

impl Encoder for BgeM3 {
    fn traits(&self) -> EncoderTraits {
        self.traits.clone()
    }

    fn encode(&self, batch: &Batch, heads: Heads) -> Result<Encoded> {
        if !heads.within(self.traits.heads) {
            bail!("bge_m3: {heads:?} asked for, the checkpoint has {:?}", self.traits.heads)
        }
        let mut x = self.embeddings.forward(batch)?;
        let (last, layers) = self.layers.split_last().expect("sizes are 1 or more");
        for layer in layers {
            x = layer.forward(&x, batch, None)?;
        }
        if heads.within(Heads::DENSE) {
            // Of other tokens the last layer needs no more than keys and values.
            let dense = heads.dense.then(|| last.forward(&x, batch, Some(&batch.first()?))).transpose()?;
            return Ok(Encoded { dense, ..Encoded::default() });
        }
        let x = last.forward(&x, batch, None)?;
        let of = |linear: &Option<Linear>, wanted: bool| linear.as_ref().filter(|_| wanted).map(|l| l.forward(&x));
        Ok(Encoded {
            dense: heads.dense.then(|| gather(&x, &batch.first()?)).transpose()?,
            sparse: of(&self.sparse_linear, heads.sparse).transpose()?.map(|w| w.flatten_all()?.relu()).transpose()?,
            colbert: of(&self.colbert_linear, heads.colbert).transpose()?,
        })
    }
}

struct Embeddings {
    word_embeddings: Embedding,
    /// Positions from that of the first token on, with the embedding of the one token type added.
    position_embeddings: Tensor,
    layer_norm: LayerNorm,
}

impl Embeddings {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (hidden, positions) = (config.hidden_size, config.max_position_embeddings);
        if config.max_tokens() == 0 {
            bail!("bge_m3: {positions} positions, of which the first {} are padding's", config.first_position())
        }
        let types = weights.f32("token_type_embeddings.weight", &[config.type_vocab_size, hidden])?;
        let position_embeddings = weights
            .f32("position_embeddings.weight", &[positions, hidden])?
            .narrow(0, config.first_position(), config.max_tokens())?
            .broadcast_add(&types.narrow(0, 0, 1)?)?
            .to_dtype(weights.dtype())?;
        Ok(Self {
            word_embeddings: Embedding::load(&weights.pp("word_embeddings"), config.vocab_size, hidden)?,
            position_embeddings,
            layer_norm: LayerNorm::load(config, &weights.pp("LayerNorm"))?,
        })
    }

    fn forward(&self, batch: &Batch) -> Result<Tensor> {
        let words = self.word_embeddings.forward(&batch.tokens)?;
        self.layer_norm.forward(&words, &gather(&self.position_embeddings, &batch.positions)?)
    }
}

struct EncoderLayer {
    attention: SelfAttention,
    attention_norm: LayerNorm,
    intermediate: Linear,
    output: Linear,
    output_norm: LayerNorm,
}

impl EncoderLayer {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        Ok(Self {
            attention: SelfAttention::load(config, &weights.pp("attention"))?,
            attention_norm: LayerNorm::load(config, &weights.pp("attention.output.LayerNorm"))?,
            intermediate: Linear::load(&weights.pp("intermediate.dense"), hidden, wide, Bias::Present)?,
            output: Linear::load(&weights.pp("output.dense"), wide, hidden, Bias::Present)?,
            output_norm: LayerNorm::load(config, &weights.pp("output.LayerNorm"))?,
        })
    }

    /// Of all tokens, or of those in `rows`.
    fn forward(&self, x: &Tensor, batch: &Batch, rows: Option<&Tensor>) -> Result<Tensor> {
        let mixed = self.attention.output.forward(&remaining(&self.attention.mix(x, batch)?, rows)?)?;
        let x = self.attention_norm.forward(&mixed, &remaining(x, rows)?)?;
        let y = self.output.forward(&self.intermediate.forward_gelu(&x)?)?;
        self.output_norm.forward(&y, &x)
    }
}

struct SelfAttention {
    qkv: Linear,
    output: Linear,
    num_heads: usize,
}

impl SelfAttention {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let hidden = config.hidden_size;
        let names = ["query", "key", "value"];
        Ok(Self {
            qkv: Linear::side_by_side(&weights.pp("self"), &names, &[hidden; 3], hidden, Bias::Present)?,
            output: Linear::load(&weights.pp("output.dense"), hidden, hidden, Bias::Present)?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `[N, H]`, before the output's product.
    fn mix(&self, x: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (n, hidden) = x.dims2()?;
        let head_dim = hidden / self.num_heads;
        let qkv = self.qkv.forward(x)?.reshape((n, 3 * self.num_heads, head_dim))?;
        let heads = |part: usize| qkv.narrow(1, part * self.num_heads, self.num_heads);
        let scale = (head_dim as f32).powf(-0.5);
        let params = AttentionParams { scale, mask: Mask::Bidirectional, window: None, softcap: None };
        let mixed = attention(&heads(0)?, &heads(1)?, &heads(2)?, batch, params)?;
        mixed.flatten_from(1)
    }
}

/// Layer normalisation of a sum, its factors and offsets kept in f32.
struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let shape = [config.hidden_size];
        let (weight, bias) = (weights.f32("weight", &shape)?, weights.f32("bias", &shape)?);
        Ok(Self { weight, bias, eps: config.layer_norm_eps })
    }

    fn forward(&self, x: &Tensor, residual: &Tensor) -> Result<Tensor> {
        add_layer_norm(x, residual, &self.weight, &self.bias, self.eps)
    }
}
