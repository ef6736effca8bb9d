//! Qwen3.5, a hybrid: three Gated DeltaNet layers to one gated attention layer, with dense or sparse MLPs.
//!
//! Follows transformers 5.23.0 `models/qwen3_5/modeling_qwen3_5.py` and `models/qwen3_5_moe`, text only. Checked against
//! it on random checkpoints of every layout that `tests/fixtures` describes: nested and flat configurations, tied and
//! untied, one to three value heads per key head, experts stacked and one by one.

use candle_core::{Result, Tensor, bail};
use kernels::Batch;
use kernels::activation::{Activation, sigmoid_gated};
use kernels::attention::AttentionParams;
use kernels::conv::causal_conv1d;
use kernels::gated_delta::{gated_delta_rule, gates};
use kernels::heads::KeyValueHeads;
use kernels::linear::Around;
use kernels::residual::add;
use serde::Deserialize;
use serde_json::Value;

use crate::cache::{Cache, CacheSpec};
use crate::checkpoint::Checkpoint;
use crate::config::{self, HiddenAct, RopeParameters};
use crate::layers::{
    Bias, Embedding, GatedMlp, LastTokens, Linear, RmsNorm, RotaryEmbedding, Rotations, heads, remaining,
};
use crate::moe::{self, SparseMlp};
use crate::weights::{Ignored, Weights};
use crate::{AttentionShape, CausalLm, Description, Observed, Observer};

/// The text part of `config.json`, with its names.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    #[serde(deserialize_with = "config::size")]
    vocab_size: usize,
    #[serde(deserialize_with = "config::size")]
    hidden_size: usize,
    /// Of dense models.
    #[serde(default, deserialize_with = "config::optional_size")]
    intermediate_size: Option<usize>,
    /// Of sparse models, from the same fields.
    #[serde(skip)]
    moe: Option<moe::Config>,
    #[serde(deserialize_with = "config::size")]
    num_hidden_layers: usize,
    #[serde(deserialize_with = "config::size")]
    num_attention_heads: usize,
    #[serde(deserialize_with = "config::size")]
    num_key_value_heads: usize,
    #[serde(default = "default_head_dim", deserialize_with = "config::size")]
    head_dim: usize,
    layer_types: Option<Vec<LayerType>>,
    #[serde(default = "default_interval", deserialize_with = "config::size")]
    full_attention_interval: usize,
    #[serde(deserialize_with = "config::size")]
    linear_num_key_heads: usize,
    #[serde(deserialize_with = "config::size")]
    linear_num_value_heads: usize,
    #[serde(deserialize_with = "config::size")]
    linear_key_head_dim: usize,
    #[serde(deserialize_with = "config::size")]
    linear_value_head_dim: usize,
    #[serde(deserialize_with = "config::size")]
    linear_conv_kernel_dim: usize,
    #[serde(deserialize_with = "config::size")]
    max_position_embeddings: usize,
    #[serde(default = "config::default_eps", deserialize_with = "config::positive")]
    rms_norm_eps: f64,
    rope_parameters: RopeParameters,
    #[serde(default)]
    tie_word_embeddings: Option<bool>,
    #[serde(default, rename = "attention_bias", deserialize_with = "config::only_false")]
    _attention_bias: (),
    #[serde(default, rename = "hidden_act")]
    _hidden_act: HiddenAct,
    #[serde(default, deserialize_with = "config::token_ids")]
    eos_token_id: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LayerType {
    LinearAttention,
    FullAttention,
}

fn default_head_dim() -> usize {
    256
}

fn default_interval() -> usize {
    4
}

impl Config {
    /// Reads the nested layout of the published checkpoints or the flat one of text-only exports.
    pub(crate) fn parse(checkpoint: &Checkpoint, value: &Value) -> Result<Self> {
        let text = value.get("text_config").unwrap_or(value);
        let mut config: Self = config::parse(checkpoint, text)?;
        if config.tie_word_embeddings.is_none() {
            config.tie_word_embeddings = value.get("tie_word_embeddings").and_then(Value::as_bool);
        }
        let path = checkpoint.path("config.json");
        if matches!(value.get("model_type").and_then(Value::as_str), Some("qwen3_5_moe" | "qwen3_5_moe_text")) {
            config.moe = Some(moe::Config::parse(checkpoint, text)?);
        } else if config.intermediate_size.is_none() {
            bail!("{}: missing field `intermediate_size`", path.display())
        }
        let Config { num_attention_heads: nh, num_key_value_heads: kv, .. } = config;
        let heads = (config.linear_num_value_heads, config.linear_num_key_heads);
        if !nh.is_multiple_of(kv) || !heads.0.is_multiple_of(heads.1) {
            bail!(
                "{}: {nh} attention heads over {kv}, {} value heads over {}: expected multiples",
                path.display(),
                heads.0,
                heads.1
            )
        }
        let layers = config.layer_types().len();
        if layers != config.num_hidden_layers {
            bail!("{}: {layers} layer_types for {} layers", path.display(), config.num_hidden_layers)
        }
        if config.linear_conv_kernel_dim < 2 {
            bail!("{}: linear_conv_kernel_dim is 1, expected 2 or more", path.display())
        }
        if config.rope_parameters.rope_theta.is_none_or(|theta| theta <= 0.0) {
            bail!("{}: rope_parameters.rope_theta must be a positive number", path.display())
        }
        if !(0.0..=1.0).contains(&config.partial_rotary_factor()) {
            bail!("{}: partial_rotary_factor is {}, expected 0 to 1", path.display(), config.partial_rotary_factor())
        }
        Ok(config)
    }

    pub(crate) fn describe(&self) -> Description {
        Description {
            family: if self.moe.is_some() { "Qwen3.5 MoE" } else { "Qwen3.5" },
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: self.max_position_embeddings,
            eos_token_ids: self.eos_token_id.clone(),
            cache_specs: self.cache_specs(),
            attention: self.attention_shapes(),
            experts: self.moe.as_ref().map(moe::Config::experts),
        }
    }

    fn cache_specs(&self) -> Vec<CacheSpec> {
        let spec = |layer_type| match layer_type {
            LayerType::FullAttention => {
                CacheSpec::KeyValue { num_kv_heads: self.num_key_value_heads, head_dim: self.head_dim, window: None }
            }
            LayerType::LinearAttention => CacheSpec::Recurrent {
                conv_dim: self.conv_dim(),
                conv_width: self.linear_conv_kernel_dim,
                num_heads: self.linear_num_value_heads,
                value_dim: self.linear_value_head_dim,
                key_dim: self.linear_key_head_dim,
            },
        };
        self.layer_types().into_iter().map(spec).collect()
    }

    fn attention_shapes(&self) -> Vec<Option<AttentionShape>> {
        let shape = AttentionShape::causal(self.num_attention_heads, self.head_dim);
        self.layer_types().into_iter().map(|it| matches!(it, LayerType::FullAttention).then_some(shape)).collect()
    }

    fn layer_types(&self) -> Vec<LayerType> {
        let derived = |layer: usize| match (layer + 1) % self.full_attention_interval {
            0 => LayerType::FullAttention,
            _ => LayerType::LinearAttention,
        };
        self.layer_types.clone().unwrap_or_else(|| (0..self.num_hidden_layers).map(derived).collect())
    }

    fn conv_dim(&self) -> usize {
        2 * self.linear_num_key_heads * self.linear_key_head_dim + self.value_dim()
    }

    fn value_dim(&self) -> usize {
        self.linear_num_value_heads * self.linear_value_head_dim
    }

    fn partial_rotary_factor(&self) -> f64 {
        self.rope_parameters.partial_rotary_factor.unwrap_or(0.25)
    }
}

/// Tensors of the published checkpoints that text generation does without.
const IGNORED: [Ignored; 2] = [
    Ignored { prefix: "mtp.", reason: "multi-token prediction, not used for generation" },
    Ignored { prefix: "model.visual.", reason: "vision tower, text only here" },
];

/// Qwen3.5 with its language modelling head.
pub struct Qwen35 {
    embed_tokens: Embedding,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    lm_head: Linear,
    rotary: RotaryEmbedding,
    cache_specs: Vec<CacheSpec>,
}

impl Qwen35 {
    /// Reads the weights that `config` describes.
    ///
    /// # Errors
    ///
    /// A tensor is missing, of another shape, or not used by the model.
    pub fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let nested = weights.contains("model.language_model.embed_tokens.weight");
        let model = weights.pp(if nested { "model.language_model" } else { "model" });
        let embed_tokens = Embedding::load(&model.pp("embed_tokens"), config.vocab_size, hidden)?;
        let tied = config.tie_word_embeddings == Some(true);
        let lm_head = if tied {
            embed_tokens.tied_head()
        } else {
            Linear::load(&weights.pp("lm_head"), hidden, config.vocab_size, Bias::Absent)?
        };
        let layers = config
            .layer_types()
            .into_iter()
            .enumerate()
            .map(|(layer, layer_type)| DecoderLayer::load(config, layer, layer_type, &model.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::load_zero_centred(&model.pp("norm"), hidden, eps)?;
        let mut ignored = IGNORED.to_vec();
        if tied {
            ignored.push(Ignored::TIED_HEAD);
        }
        weights.finish(&ignored)?;
        let theta = config.rope_parameters.rope_theta.expect("checked by Config::parse");
        let rotary_dim = (config.head_dim as f64 * config.partial_rotary_factor()) as usize;
        let rotary = RotaryEmbedding::new(theta, rotary_dim, weights.device())?;
        Ok(Self { embed_tokens, layers, norm, lm_head, rotary, cache_specs: config.cache_specs() })
    }
}

impl Qwen35 {
    /// Of all tokens, or of the last ones.
    fn run(&self, batch: &Batch, cache: &Cache, last: Option<&LastTokens>, observe: &mut Observer) -> Result<Tensor> {
        let rotations = self.rotary.rotations(batch)?;
        let mut x = self.embed_tokens.forward(&batch.tokens)?;
        for (index, layer) in self.layers.iter().enumerate() {
            observe(Observed::Hidden(index, &x))?;
            let last = last.filter(|_| index + 1 == self.layers.len());
            x = layer.mix(&x, &rotations, batch, cache, last)?;
            x = layer.mlp.forward(&x, &layer.post_attention_layernorm, observe)?;
        }
        let x = self.norm.forward(&x)?;
        observe(Observed::Hidden(self.layers.len(), &x))?;
        Ok(x)
    }
}

impl CausalLm for Qwen35 {
    fn cache_specs(&self) -> Vec<CacheSpec> {
        self.cache_specs.clone()
    }

    fn forward_observed(&self, batch: &Batch, cache: &mut Cache, observe: &mut Observer) -> Result<Tensor> {
        self.run(batch, cache, None, observe)
    }

    fn forward_last(&self, batch: &Batch, cache: &mut Cache, sequences: &[u32]) -> Result<Option<Tensor>> {
        let last = LastTokens::of(batch, sequences)?;
        let x = self.run(batch, cache, last.as_ref(), &mut |_| Ok(()))?;
        Ok((!sequences.is_empty()).then_some(x))
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.lm_head.forward(hidden)
    }
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    mixer: Mixer,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
}

enum Mixer {
    SelfAttn(Attention),
    LinearAttn(GatedDeltaNet),
}

enum Mlp {
    Dense(GatedMlp),
    Sparse(SparseMlp),
}

impl DecoderLayer {
    fn load(config: &Config, layer: usize, layer_type: LayerType, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let norm = |name: &str| RmsNorm::load_zero_centred(&weights.pp(name), hidden, eps);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            mixer: match layer_type {
                LayerType::FullAttention => Mixer::SelfAttn(Attention::load(config, layer, &weights.pp("self_attn"))?),
                LayerType::LinearAttention => {
                    Mixer::LinearAttn(GatedDeltaNet::load(config, layer, &weights.pp("linear_attn"))?)
                }
            },
            post_attention_layernorm: norm("post_attention_layernorm")?,
            mlp: Mlp::load(config, &weights.pp("mlp"))?,
        })
    }

    /// What enters the layer to what enters its MLP.
    fn mix(
        &self,
        x: &Tensor,
        rotations: &Rotations,
        batch: &Batch,
        cache: &Cache,
        last: Option<&LastTokens>,
    ) -> Result<Tensor> {
        let norm = &self.input_layernorm;
        match &self.mixer {
            Mixer::SelfAttn(attention) => attention.forward(x, norm, rotations, batch, cache, last),
            Mixer::LinearAttn(delta_net) => {
                remaining(&delta_net.forward(x, norm, batch, cache)?, last.map(LastTokens::rows))
            }
        }
    }
}

impl Mlp {
    fn load(config: &Config, weights: &Weights) -> Result<Self> {
        let hidden = config.hidden_size;
        if let Some(moe) = &config.moe {
            return Ok(Self::Sparse(SparseMlp::load(weights, hidden, moe)?));
        }
        let intermediate = config.intermediate_size.expect("checked by Config::parse");
        Ok(Self::Dense(GatedMlp::load(weights, hidden, intermediate, Activation::Silu)?))
    }

    /// What the MLP makes of `x`, normalised, added to it.
    fn forward(&self, x: &Tensor, norm: &RmsNorm, observe: &mut Observer) -> Result<Tensor> {
        match self {
            Self::Dense(mlp) => {
                mlp.forward_around(x, Around { norm: Some(norm.parts()), onto: Some(x), ..Around::default() })
            }
            Self::Sparse(mlp) => add(x, &mlp.forward(&norm.forward(x)?, observe)?),
        }
    }
}

/// Attention whose result is multiplied by the sigmoid of a gate that `q_proj` gives beside each query head.
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
            (config.num_attention_heads, config.num_key_value_heads, config.head_dim);
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let (query, key) = (num_heads * head_dim, num_kv_heads * head_dim);
        let names = ["q_proj", "k_proj", "v_proj"];
        Ok(Self {
            qkv_proj: Linear::side_by_side(weights, &names, &[2 * query, key, key], hidden, Bias::Absent)?,
            o_proj: Linear::load(&weights.pp("o_proj"), query, hidden, Bias::Absent)?,
            q_norm: RmsNorm::load_zero_centred(&weights.pp("q_norm"), head_dim, eps)?,
            k_norm: RmsNorm::load_zero_centred(&weights.pp("k_norm"), head_dim, eps)?,
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
        cache: &Cache,
        last: Option<&LastTokens>,
    ) -> Result<Tensor> {
        let d = self.head_dim;
        let qkv = self.qkv_proj.forward_around(x, Around { norm: Some(norm.parts()), ..Around::default() })?;
        let query_and_gate = |qkv: &Tensor| heads(qkv, 0, self.num_heads, 2 * d);
        let q = query_and_gate(&qkv)?.narrow(2, 0, d)?;
        let k = heads(&qkv, 2 * self.num_heads * d, self.num_kv_heads, d)?;
        let v = heads(&qkv, (2 * self.num_heads + self.num_kv_heads) * d, self.num_kv_heads, d)?;
        let pages = cache.kv(self.layer)?;
        let kv = KeyValueHeads { k: &k, v: &v, k_norm: self.k_norm.parts(), v_norm: None };
        let params = AttentionParams::causal((d as f32).powf(-0.5));
        let mixed = match last {
            None => rotations.attend(&q, &self.q_norm, Some(kv), pages, batch, params)?,
            Some(last) => rotations.attend_last(&q, &self.q_norm, kv, pages, last, params)?,
        };
        let rows = last.map(LastTokens::rows);
        let (x, qkv) = (remaining(x, rows)?, remaining(&qkv, rows)?);
        let mixed = sigmoid_gated(&mixed, &query_and_gate(&qkv)?.narrow(2, d, d)?)?;
        self.o_proj.forward_around(&mixed.flatten_from(1)?, Around { onto: Some(&x), ..Around::default() })
    }
}

/// The recurrent mixer: projections, a short convolution, the gated delta rule, a gated norm.
struct GatedDeltaNet {
    /// `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a` side by side.
    in_proj: Linear,
    conv1d: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm: RmsNorm,
    out_proj: Linear,
    num_key_heads: usize,
    num_value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    layer: usize,
}

impl GatedDeltaNet {
    fn load(config: &Config, layer: usize, weights: &Weights) -> Result<Self> {
        let (num_key_heads, num_value_heads) = (config.linear_num_key_heads, config.linear_num_value_heads);
        let (key_dim, value_dim) = (config.linear_key_head_dim, config.linear_value_head_dim);
        let (hidden, conv_dim, width) = (config.hidden_size, config.conv_dim(), config.linear_conv_kernel_dim);
        let names = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"];
        let outputs = [conv_dim, config.value_dim(), num_value_heads, num_value_heads];
        Ok(Self {
            in_proj: Linear::side_by_side(weights, &names, &outputs, hidden, Bias::Absent)?,
            conv1d: weights.f32("conv1d.weight", &[conv_dim, 1, width])?.squeeze(1)?,
            a_log: weights.f32("A_log", &[num_value_heads])?,
            dt_bias: weights.f32("dt_bias", &[num_value_heads])?,
            norm: RmsNorm::load(&weights.pp("norm"), value_dim, config.rms_norm_eps)?,
            out_proj: Linear::load(&weights.pp("out_proj"), config.value_dim(), hidden, Bias::Absent)?,
            num_key_heads,
            num_value_heads,
            key_dim,
            value_dim,
            layer,
        })
    }

    /// What enters a layer, normalised, to what leaves its mixer, added to it.
    fn forward(&self, x: &Tensor, norm: &RmsNorm, batch: &Batch, cache: &Cache) -> Result<Tensor> {
        let (hk, hv, kd, vd) = (self.num_key_heads, self.num_value_heads, self.key_dim, self.value_dim);
        let conv_dim = 2 * hk * kd + hv * vd;
        let projected = self.in_proj.forward_around(x, Around { norm: Some(norm.parts()), ..Around::default() })?;
        let z = projected.narrow(1, conv_dim, hv * vd)?;
        let b = projected.narrow(1, conv_dim + hv * vd, hv)?;
        let a = projected.narrow(1, conv_dim + hv * vd + hv, hv)?;
        let (g, beta) = gates(&a, &b, &self.a_log, &self.dt_bias)?;

        let qkv = projected.narrow(1, 0, conv_dim)?;
        let qkv = causal_conv1d(&qkv, &self.conv1d, cache.conv(self.layer)?, batch)?;
        let q = heads(&qkv, 0, hk, kd)?;
        let k = heads(&qkv, hk * kd, hk, kd)?;
        let v = heads(&qkv, 2 * hk * kd, hv, vd)?;
        let mixed = gated_delta_rule(&q, &k, &v, &g, &beta, cache.state(self.layer)?, batch)?;
        let gated = self.norm.forward_gated(&mixed, &z)?.flatten_from(1)?;
        self.out_proj.forward_around(&gated, Around { onto: Some(x), ..Around::default() })
    }
}
