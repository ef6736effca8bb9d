//! Gemma 4, text part of the small dense models (E2B, E4B): sliding and full attention, the last layers without keys
//! and values of their own, and an embedding of each token for each layer.
//!
//! Follows transformers 5.23.0 `models/gemma4/modeling_gemma4.py`. Checked against it on random checkpoints of every
//! layout that `tests/fixtures` describes: nested and flat, with and without sharing layers, which may store keys and
//! values that nothing uses.
//!
//! The layers that share keys and values write no cache, so for a token whose logits nobody wants they need not run at
//! all: [`CausalLm::forward_last`] stops there for all tokens of a prompt but its last.

use std::ops::Range;

use candle_core::{IndexOp, Result, Tensor};
use kernels::Batch;
use kernels::activation::{Activation, gated_by};
use kernels::attention::AttentionParams;
use kernels::heads::KeyValueHeads;
use kernels::linear::{Around, linear};
use kernels::norm::add_rms_norm;
use kernels::softcap::softcap;

pub use self::config::Config;
use crate::cache::{Cache, CacheSpec};
use crate::layers::{
    Bias, Embedding, GatedMlp, LastTokens, Linear, RmsNorm, RotaryEmbedding, Rotations, heads, remaining,
};
use crate::weights::{Ignored, Table, Weights};
use crate::{CausalLm, Observed, Observer};

mod config;

/// Tensors of the published checkpoints that text generation does without.
const IGNORED: [Ignored; 4] = [
    Ignored { prefix: "model.vision_tower.", reason: "vision tower, text only here" },
    Ignored { prefix: "model.embed_vision.", reason: "projection of the vision tower's output" },
    Ignored { prefix: "model.audio_tower.", reason: "audio tower, text only here" },
    Ignored { prefix: "model.embed_audio.", reason: "projection of the audio tower's output" },
];

/// Gemma 4 with its language modelling head.
pub struct Gemma4 {
    embed_tokens: Embedding,
    embed_scale: f64,
    per_layer: Option<PerLayerEmbedding>,
    layers: Vec<DecoderLayer>,
    /// Where the layers without keys and values of their own begin.
    first_shared: usize,
    norm: RmsNorm,
    lm_head: Linear,
    final_logit_softcapping: Option<f32>,
    sliding_rotary: RotaryEmbedding,
    full_rotary: RotaryEmbedding,
    cache_specs: Vec<CacheSpec>,
}

impl Gemma4 {
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
        let tied = config.tie_word_embeddings.unwrap_or(true);
        let lm_head = if tied {
            embed_tokens.tied_head()
        } else {
            Linear::load(&weights.pp("lm_head"), hidden, config.vocab_size, Bias::Absent)?
        };
        let per_layer = match config.hidden_size_per_layer_input {
            None | Some(0) => None,
            Some(size) => Some(PerLayerEmbedding::load(config, size, &model)?),
        };
        let layers = (0..config.num_hidden_layers)
            .map(|layer| DecoderLayer::load(config, layer, &model.pp("layers").pp(layer)))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::load(&model.pp("norm"), hidden, eps)?;
        let mut ignored = IGNORED.to_vec();
        if tied {
            ignored.push(Ignored::TIED_HEAD);
        }
        weights.finish(&ignored)?;
        let device = weights.device();
        Ok(Self {
            embed_tokens,
            embed_scale: (hidden as f64).sqrt(),
            per_layer,
            layers,
            first_shared: config.first_shared(),
            norm,
            lm_head,
            final_logit_softcapping: config.final_logit_softcapping,
            sliding_rotary: RotaryEmbedding::new(config.sliding_theta(), config.head_dim, device)?,
            full_rotary: RotaryEmbedding::proportional(
                config.full_theta(),
                config.global_head_dim,
                config.partial_rotary_factor(),
                device,
            )?,
            cache_specs: config.cache_specs(),
        })
    }

    /// The scaled embeddings of the step's tokens. The factor is rounded to their dtype, as in transformers.
    fn embed(&self, batch: &Batch) -> Result<Tensor> {
        self.embed_tokens.forward(&batch.tokens)? * self.embed_scale
    }

    /// Runs the residual stream `x` of the batch's tokens through some layers; `embedded` is what it began as.
    fn run(
        &self,
        layers: Range<usize>,
        embedded: &Tensor,
        x: Tensor,
        batch: &Batch,
        cache: &Cache,
        observe: &mut Observer,
    ) -> Result<Tensor> {
        if layers.is_empty() {
            return Ok(x);
        }
        let rotations =
            StepRotations { sliding: self.sliding_rotary.rotations(batch)?, full: self.full_rotary.rotations(batch)? };
        let inputs =
            self.per_layer.as_ref().map(|per_layer| per_layer.forward(embedded, batch, layers.clone())).transpose()?;
        let mut x = x;
        for (position, layer) in layers.enumerate() {
            observe(Observed::Hidden(layer, &x))?;
            let input = inputs.as_ref().map(|inputs| inputs.i((.., position))).transpose()?;
            x = self.layers[layer].forward(&x, input.as_ref(), &rotations, batch, cache)?;
        }
        Ok(x)
    }
}

impl CausalLm for Gemma4 {
    fn cache_specs(&self) -> Vec<CacheSpec> {
        self.cache_specs.clone()
    }

    fn forward_observed(&self, batch: &Batch, cache: &mut Cache, observe: &mut Observer) -> Result<Tensor> {
        let embedded = self.embed(batch)?;
        let x = self.run(0..self.layers.len(), &embedded, embedded.clone(), batch, cache, observe)?;
        let x = self.norm.forward(&x)?;
        observe(Observed::Hidden(self.layers.len(), &x))?;
        Ok(x)
    }

    fn forward_last(&self, batch: &Batch, cache: &mut Cache, sequences: &[u32]) -> Result<Option<Tensor>> {
        let embedded = self.embed(batch)?;
        let unobserved = &mut |_: Observed| Ok(());
        let x = self.run(0..self.first_shared, &embedded, embedded.clone(), batch, cache, unobserved)?;
        if sequences.is_empty() {
            return Ok(None);
        }
        let last = LastTokens::of(batch, sequences)?;
        let rows = last.as_ref().map(LastTokens::rows);
        let (embedded, x) = (remaining(&embedded, rows)?, remaining(&x, rows)?);
        let batch = last.as_ref().map_or(batch, LastTokens::batch);
        let x = self.run(self.first_shared..self.layers.len(), &embedded, x, batch, cache, unobserved)?;
        self.norm.forward(&x).map(Some)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.lm_head.forward(hidden)?;
        match self.final_logit_softcapping {
            Some(cap) => softcap(&logits, cap),
            None => Ok(logits),
        }
    }
}

/// What each layer is told about its token: a row of a table too large for memory, and a projection of the embedding.
struct PerLayerEmbedding {
    /// `[V, L * P]`
    embed_tokens_per_layer: Table,
    /// `[L * P, H]`
    per_layer_model_projection: Tensor,
    per_layer_projection_norm: RmsNorm,
    /// `P`
    size: usize,
}

impl PerLayerEmbedding {
    fn load(config: &Config, size: usize, model: &Weights) -> Result<Self> {
        let (width, hidden) = (config.num_hidden_layers * size, config.hidden_size);
        let table = [config.vocab_size_per_layer_input(), width];
        Ok(Self {
            embed_tokens_per_layer: model.pp("embed_tokens_per_layer").table("weight", table)?,
            per_layer_model_projection: model.pp("per_layer_model_projection").matrix("weight", [width, hidden])?,
            per_layer_projection_norm: RmsNorm::load(
                &model.pp("per_layer_projection_norm"),
                size,
                config.rms_norm_eps,
            )?,
            size,
        })
    }

    /// The inputs `[N, layers, P]` of some layers.
    fn forward(&self, embedded: &Tensor, batch: &Batch, layers: Range<usize>) -> Result<Tensor> {
        let (_, hidden) = embedded.dims2()?;
        let columns = layers.start * self.size..layers.end * self.size;
        let projection = self.per_layer_model_projection.narrow(0, columns.start, columns.len())?;
        let projected = (linear(embedded, &projection)? * (hidden as f64).powf(-0.5))?;
        let shape = ((), layers.len(), self.size);
        let projected = self.per_layer_projection_norm.forward(&projected.reshape(shape)?)?;
        let looked_up = self.embed_tokens_per_layer.rows(batch, columns)?.reshape(shape)?;
        (projected + (looked_up * (self.size as f64).sqrt())?)? * 0.5f64.sqrt()
    }
}

/// A step's rotations, by attention type.
struct StepRotations {
    sliding: Rotations,
    full: Rotations,
}

struct DecoderLayer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    pre_feedforward_layernorm: RmsNorm,
    mlp: GatedMlp,
    post_feedforward_layernorm: RmsNorm,
    per_layer: Option<PerLayerInput>,
    layer_scalar: f64,
}

impl DecoderLayer {
    fn load(config: &Config, layer: usize, weights: &Weights) -> Result<Self> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), hidden, eps);
        let intermediate = config.intermediate_size_of(layer);
        Ok(Self {
            input_layernorm: norm("input_layernorm")?,
            self_attn: Attention::load(config, layer, &weights.pp("self_attn"))?,
            post_attention_layernorm: norm("post_attention_layernorm")?,
            pre_feedforward_layernorm: norm("pre_feedforward_layernorm")?,
            mlp: GatedMlp::load(&weights.pp("mlp"), hidden, intermediate, Activation::GeluTanh)?,
            post_feedforward_layernorm: norm("post_feedforward_layernorm")?,
            per_layer: match config.hidden_size_per_layer_input {
                None | Some(0) => None,
                Some(size) => Some(PerLayerInput::load(config, size, weights)?),
            },
            layer_scalar: f64::from(weights.f32("layer_scalar", &[1])?.squeeze(0)?.to_scalar::<f32>()?),
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        input: Option<&Tensor>,
        rotations: &StepRotations,
        batch: &Batch,
        cache: &Cache,
    ) -> Result<Tensor> {
        let mixed = self.self_attn.forward(x, &self.input_layernorm, rotations, batch, cache)?;
        let x = add_rms_norm(x, &mixed, self.post_attention_layernorm.parts(), 1.0)?;
        let norm = Some(self.pre_feedforward_layernorm.parts());
        let y = self.mlp.forward_around(&x, Around { norm, ..Around::default() })?;
        let norm = self.post_feedforward_layernorm.parts();
        match self.per_layer.as_ref().zip(input) {
            Some((per_layer, input)) => per_layer.forward(&add_rms_norm(&x, &y, norm, 1.0)?, input, self.layer_scalar),
            None => add_rms_norm(&x, &y, norm, self.layer_scalar),
        }
    }
}

/// Adds what the layer is told about the token.
struct PerLayerInput {
    per_layer_input_gate: Linear,
    per_layer_projection: Linear,
    post_per_layer_input_norm: RmsNorm,
}

impl PerLayerInput {
    fn load(config: &Config, size: usize, weights: &Weights) -> Result<Self> {
        let hidden = config.hidden_size;
        Ok(Self {
            per_layer_input_gate: Linear::load(&weights.pp("per_layer_input_gate"), hidden, size, Bias::Absent)?,
            per_layer_projection: Linear::load(&weights.pp("per_layer_projection"), size, hidden, Bias::Absent)?,
            post_per_layer_input_norm: RmsNorm::load(
                &weights.pp("post_per_layer_input_norm"),
                hidden,
                config.rms_norm_eps,
            )?,
        })
    }

    /// The sum, times the layer's factor.
    fn forward(&self, x: &Tensor, input: &Tensor, factor: f64) -> Result<Tensor> {
        let gate = self.per_layer_input_gate.forward(x)?;
        let gated = gated_by(&gate, input, Activation::GeluTanh)?;
        let update = self.per_layer_projection.forward(&gated)?;
        add_rms_norm(x, &update, self.post_per_layer_input_norm.parts(), factor)
    }
}

/// Attention without a scale on its scores, over this layer's keys and values or those of an earlier one.
struct Attention {
    /// `q_proj` alone in a sharing layer.
    qkv_proj: Linear,
    o_proj: Linear,
    q_norm: RmsNorm,
    /// The norms of keys and values, the latter without weight; `None` in a sharing layer.
    kv_norms: Option<[RmsNorm; 2]>,
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    /// `None`: full attention.
    window: Option<usize>,
    /// The layer whose pages are read.
    kv_source: usize,
}

impl Attention {
    fn load(config: &Config, layer: usize, weights: &Weights) -> Result<Self> {
        let layer_type = config.layer_types()[layer];
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let (num_heads, num_kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let head_dim = config.head_dim_of(layer_type);
        let (query, key) = (num_heads * head_dim, num_kv_heads * head_dim);
        let norm = |name: &str| RmsNorm::load(&weights.pp(name), head_dim, eps);
        let (qkv_proj, kv_norms) = if layer < config.first_shared() {
            let names = ["q_proj", "k_proj", "v_proj"];
            (
                Linear::side_by_side(weights, &names, &[query, key, key], hidden, Bias::Absent)?,
                Some([norm("k_norm")?, RmsNorm::unweighted(head_dim, eps, weights.device())?]),
            )
        } else {
            // Left over from training in some checkpoints.
            weights.skip(&["k_proj.weight", "v_proj.weight", "k_norm.weight"]);
            (Linear::load(&weights.pp("q_proj"), hidden, query, Bias::Absent)?, None)
        };
        Ok(Self {
            qkv_proj,
            o_proj: Linear::load(&weights.pp("o_proj"), query, hidden, Bias::Absent)?,
            q_norm: norm("q_norm")?,
            kv_norms,
            num_heads,
            num_kv_heads,
            head_dim,
            window: config.window_of(layer_type),
            kv_source: config.kv_source(layer),
        })
    }

    fn forward(
        &self,
        x: &Tensor,
        norm: &RmsNorm,
        rotations: &StepRotations,
        batch: &Batch,
        cache: &Cache,
    ) -> Result<Tensor> {
        let (rotations, batch) = match self.window {
            Some(_) => (&rotations.sliding, batch.windowed()),
            None => (&rotations.full, batch),
        };
        let qkv = self.qkv_proj.forward_around(x, Around { norm: Some(norm.parts()), ..Around::default() })?;
        let (hq, hk, d) = (self.num_heads, self.num_kv_heads, self.head_dim);
        let (k, v);
        let kv = match &self.kv_norms {
            Some([k_norm, v_norm]) => {
                k = heads(&qkv, hq * d, hk, d)?;
                v = heads(&qkv, (hq + hk) * d, hk, d)?;
                Some(KeyValueHeads { k: &k, v: &v, k_norm: k_norm.parts(), v_norm: Some(v_norm.parts()) })
            }
            None => None,
        };
        let pages = cache.kv(self.kv_source)?;
        let params = AttentionParams { window: self.window, ..AttentionParams::causal(1.0) };
        let mixed = rotations.attend(&heads(&qkv, 0, hq, d)?, &self.q_norm, kv, pages, batch, params)?;
        self.o_proj.forward(&mixed.flatten_from(1)?)
    }
}
