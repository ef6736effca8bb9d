//! Qwen3, dense, and Qwen3-Embedding: grouped-query attention with a norm on queries and keys, gated SiLU MLP.
//!
//! Follows transformers 5.23.0 `models/qwen3/modeling_qwen3.py`. Checked against it on random checkpoints of every
//! layout that `tests/fixtures` describes: tied and untied, biased, multi-query, with a redundant head.

use candle_core::{Result, Tensor, bail};
use kernels::Batch;
use kernels::activation::Activation;
use kernels::attention::{AttentionParams, attention};
use kernels::heads::KeyValueHeads;
use kernels::linear::Around;
use serde::Deserialize;

use crate::cache::{Cache, CacheSpec};
use crate::checkpoint::Checkpoint;
use crate::config::{self, HiddenAct, RopeParameters};
use crate::layers::{
    Bias, Embedding, GatedMlp, LastTokens, Linear, RmsNorm, RotaryEmbedding, Rotations, heads, remaining,
};
use crate::pooling::Pooling;
use crate::weights::{Ignored, Weights};
use crate::{AttentionShape, CausalLm, Description, Encoded, Encoder, EncoderTraits, Heads, Observed, Observer};

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
    #[serde(default, deserialize_with = "config::optional_size")]
    num_key_value_heads: Option<usize>,
    #[serde(default, deserialize_with = "config::optional_size")]
    head_dim: Option<usize>,
    #[serde(deserialize_with = "config::size")]
    max_position_embeddings: usize,
    #[serde(default = "config::default_eps", deserialize_with = "config::positive")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<RopeParameters>,
    rope_parameters: Option<RopeParameters>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default, rename = "use_sliding_window", deserialize_with = "config::only_false")]
    _use_sliding_window: (),
    #[serde(default, rename = "hidden_act")]
    _hidden_act: HiddenAct,
    #[serde(default, deserialize_with = "config::token_ids")]
    eos_token_id: Vec<u32>,
}

impl Config {
    pub(crate) fn describe(&self) -> Description {
        Description {
            family: "Qwen3",
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: self.max_position_embeddings,
            eos_token_ids: self.eos_token_id.clone(),
            cache_specs: vec![self.cache_spec(); self.num_hidden_layers],
            attention: vec![Some(self.attention_shape()); self.num_hidden_layers],
            experts: None,
        }
    }

    fn cache_spec(&self) -> CacheSpec {
        CacheSpec::KeyValue { num_kv_heads: self.num_kv_heads(), head_dim: self.head_dim(), window: None }
    }

    fn attention_shape(&self) -> AttentionShape {
        AttentionShape::causal(self.num_attention_heads, self.head_dim())
    }

    fn num_kv_heads(&self) -> usize {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(128)
    }

    fn rope_theta(&self) -> Result<f64> {
        let parameters = self.rope_parameters.as_ref().or(self.rope_scaling.as_ref());
        match parameters.and_then(|parameters| parameters.rope_theta).or(self.rope_theta) {
            Some(theta) if theta > 0.0 => Ok(theta),
            Some(theta) => bail!("qwen3: rope_theta is {theta}, expected a positive number"),
            None => bail!("qwen3: neither rope_theta nor rope_parameters.rope_theta in config.json"),
        }
    }
}

/// Qwen3 with its language modelling head.
pub struct Qwen3 {
    model: Model,
    lm_head: Linear,
    cache_spec: CacheSpec,
}

impl Qwen3 {
    /// Reads the weights that `config` describes.
    ///
    /// # Errors
    ///
    /// A tensor is missing, of another shape, or not used by the model.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let model = Model::load(config, &weights.pp("model"))?;
        let lm_head = if config.tie_word_embeddings {
            model.embed_tokens.tied_head()
        } else {
            Linear::load(&weights.pp("lm_head"), config.hidden_size, config.vocab_size, Bias::Absent)?
        };
        weights.finish(if config.tie_word_embeddings { &[Ignored::TIED_HEAD] } else { &[] })?;
        Ok(Self { model, lm_head, cache_spec: config.cache_spec() })
    }
}

impl CausalLm for Qwen3 {
    fn cache_specs(&self) -> Vec<CacheSpec> {
        vec![self.cache_spec; self.model.layers.len()]
    }

    fn forward_observed(&self, batch: &Batch, cache: &mut Cache, observe: &mut Observer) -> Result<Tensor> {
        self.model.forward(batch, Some(cache), None, observe)
    }

    fn forward_last(&self, batch: &Batch, cache: &mut Cache, sequences: &[u32]) -> Result<Option<Tensor>> {
        let last = LastTokens::of(batch, sequences)?;
        let x = self.model.forward(batch, Some(cache), last.as_ref(), &mut |_| Ok(()))?;
        Ok((!sequences.is_empty()).then_some(x))
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(hidden)
    }
}

/// Qwen3-Embedding: the same stack without a head, whose last hidden state stands for the text.
///
/// Follows the usage that <https://huggingface.co/Qwen/Qwen3-Embedding-0.6B> describes.
pub struct Qwen3Embedding {
    model: Model,
    traits: EncoderTraits,
}

impl Qwen3Embedding {
    /// Reads the weights that `config` describes. An embedding model is known by its tensors, whose names have no
    /// prefix, or by `modules.json`.
    ///
    /// # Errors
    ///
    /// The checkpoint is a language model, pools otherwise than by its last token, or a tensor is missing, of another
    /// shape, or not used by the model.
    pub fn load(config: &Config, checkpoint: &Checkpoint, weights: &Weights) -> Result<Self> {
        let has_prefix = !weights.contains("embed_tokens.weight");
        if has_prefix && !checkpoint.has("modules.json") {
            bail!(
                "{}: a language model, expected an embedding model such as Qwen/Qwen3-Embedding-0.6B",
                checkpoint.path("config.json").display()
            )
        }
        Pooling::LastToken.check(checkpoint)?;
        let model = Model::load(config, &if has_prefix { weights.pp("model") } else { weights.clone() })?;
        weights.finish(&[Ignored { prefix: "lm_head.weight", reason: "embeddings are hidden states" }])?;
        let traits = EncoderTraits {
            family: "Qwen3-Embedding",
            heads: Heads::DENSE,
            dense_size: config.hidden_size,
            vocab_size: config.vocab_size,
            max_tokens: config.max_position_embeddings,
            has_nested_sizes: true,
            special_ids: vec![],
            end_token: Some("<|endoftext|>"),
        };
        Ok(Self { model, traits })
    }
}

impl Encoder for Qwen3Embedding {
    fn traits(&self) -> EncoderTraits {
        self.traits.clone()
    }

    fn encode(&self, batch: &Batch, heads: Heads) -> Result<Encoded> {
        if !heads.within(Heads::DENSE) {
            bail!("qwen3: {heads:?} asked for, the model has a dense head alone")
        }
        if !heads.dense {
            return Ok(Encoded::default());
        }
        let texts: Vec<u32> = (0..batch.num_sequences() as u32).collect();
        let last = LastTokens::of(batch, &texts)?;
        let dense = self.model.forward(batch, None, last.as_ref(), &mut |_| Ok(()))?;
        Ok(Encoded { dense: Some(dense), ..Encoded::default() })
    }
}

/// The stack between token ids and normed hidden states.
struct Model {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    rotary: RotaryEmbedding,
}

impl Model {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        if !config.num_attention_heads.is_multiple_of(config.num_kv_heads()) || !config.head_dim().is_multiple_of(2) {
            bail!(
                "qwen3: {} attention heads, {} key and value heads, head_dim {}: expected a multiple, and an even size",
                config.num_attention_heads,
                config.num_kv_heads(),
                config.head_dim()
            )
        }
        // The largest tensor first: until it is read, its pages in the file count as memory too.
        let embed_tokens = Embedding::load(&weights.pp("embed_tokens"), config.vocab_size, config.hidden_size)?;
        let layers = (0..config.num_hidden_layers)
            .map(|layer| DecoderLayer::load(config, layer, &weights.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        Ok(Self {
            embed_tokens,
            layers,
            norm: RmsNorm::load(&weights.pp("norm"), config.hidden_size, config.rms_norm_eps)?,
            rotary: RotaryEmbedding::new(config.rope_theta()?, config.head_dim(), weights.device())?,
        })
    }

    /// Of all tokens, or of the last ones. Without a cache, each sequence of the batch is whole.
    fn forward(
        &self,
        batch: &Batch,
        cache: Option<&Cache>,
        last: Option<&LastTokens>,
        observe: &mut Observer,
    ) -> Result<Tensor> {
        let rotations = self.rotary.rotations(batch)?;
        let mut x = self.embed_tokens.forward(&batch.tokens)?;
        for (index, layer) in self.layers.iter().enumerate() {
            observe(Observed::Hidden(index, &x))?;
            let last = last.filter(|_| index + 1 == self.layers.len());
            x = layer.forward(&x, &rotations, batch, cache, last)?;
        }
        let x = self.norm.forward(&x)?;
        observe(Observed::Hidden(self.layers.len(), &x))?;
        Ok(x)
    }
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: GatedMlp,
}

impl DecoderLayer {
    fn load(config: &Config, layer: usize, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        Ok(Self {
            input_layernorm: RmsNorm::load(&weights.pp("input_layernorm"), hidden, eps)?,
            self_attn: Attention::load(config, layer, &weights.pp("self_attn"))?,
            post_attention_layernorm: RmsNorm::load(&weights.pp("post_attention_layernorm"), hidden, eps)?,
            mlp: GatedMlp::load(&weights.pp("mlp"), hidden, config.intermediate_size, Activation::Silu)?,
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        rotations: &Rotations,
        batch: &Batch,
        cache: Option<&Cache>,
        last: Option<&LastTokens>,
    ) -> Result<Tensor> {
        let x = self.self_attn.forward(x, &self.input_layernorm, rotations, batch, cache, last)?;
        let norm = Some(self.post_attention_layernorm.parts());
        self.mlp.forward_around(&x, Around { norm, onto: Some(&x), ..Around::default() })
    }
}

struct Attention {
    qkv_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    layer: usize,
}

impl Attention {
    fn load(config: &Config, layer: usize, weights: &Weights) -> Result<Self> {
        let (num_heads, num_kv_heads, head_dim) =
            (config.num_attention_heads, config.num_kv_heads(), config.head_dim());
        let bias = if config.attention_bias { Bias::Present } else { Bias::Absent };
        let (query, key) = (num_heads * head_dim, num_kv_heads * head_dim);
        let names = ["q_proj", "k_proj", "v_proj"];
        Ok(Self {
            qkv_proj: Linear::side_by_side(weights, &names, &[query, key, key], config.hidden_size, bias)?,
            o_proj: Linear::load(&weights.pp("o_proj"), query, config.hidden_size, bias)?,
            q_norm: RmsNorm::load(&weights.pp("q_norm"), head_dim, config.rms_norm_eps)?,
            k_norm: RmsNorm::load(&weights.pp("k_norm"), head_dim, config.rms_norm_eps)?,
            num_heads,
            num_kv_heads,
            head_dim,
            layer,
        })
    }

    /// What enters a layer, normalised, to what leaves its attention, added to it.
    fn forward(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        rotations: &Rotations,
        batch: &Batch,
        cache: Option<&Cache>,
        last: Option<&LastTokens>,
    ) -> Result<Tensor> {
        let qkv = self.qkv_proj.forward_around(x, Around { norm: Some(norm.parts()), ..Around::default() })?;
        let (hq, hk, d) = (self.num_heads, self.num_kv_heads, self.head_dim);
        let q = heads(&qkv, 0, hq, d)?;
        let k = heads(&qkv, hq * d, hk, d)?;
        let v = heads(&qkv, (hq + hk) * d, hk, d)?;
        let params = AttentionParams::causal((d as f32).powf(-0.5));
        let rows = last.map(LastTokens::rows);
        let mixed = match cache {
            Some(cache) => {
                let pages = cache.kv(self.layer)?;
                let kv = KeyValueHeads { k: &k, v: &v, k_norm: self.k_norm.parts(), v_norm: None };
                match last {
                    None => rotations.attend(&q, &self.q_norm, Some(kv), pages, batch, params)?.flatten_from(1)?,
                    Some(last) => rotations.attend_last(&q, &self.q_norm, kv, pages, last, params)?.flatten_from(1)?,
                }
            }
            None => {
                let q = rotations.apply(&self.q_norm.forward(&q)?)?;
                let k = rotations.apply(&self.k_norm.forward(&k)?)?;
                remaining(&attention(&q, &k, &v, batch, params)?.flatten_from(1)?, rows)?
            }
        };
        let x = remaining(x, rows)?;
        self.o_proj.forward_around(&mixed, Around { onto: Some(&x), ..Around::default() })
    }
}
