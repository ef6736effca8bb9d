//! The configuration of [`super::Gemma4`].

use candle_core::{Result, bail};
use serde::Deserialize;
use serde_json::Value;

use crate::cache::CacheSpec;
use crate::checkpoint::Checkpoint;
use crate::config::{self, RopeParameters};
use crate::{AttentionShape, Description};

/// The text part of `config.json`, with its names.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    #[serde(deserialize_with = "config::size")]
    pub(super) vocab_size: usize,
    #[serde(default, deserialize_with = "config::optional_size")]
    vocab_size_per_layer_input: Option<usize>,
    #[serde(deserialize_with = "config::size")]
    pub(super) hidden_size: usize,
    /// 0 or null: no embeddings for each layer.
    pub(super) hidden_size_per_layer_input: Option<usize>,
    #[serde(deserialize_with = "config::size")]
    intermediate_size: usize,
    #[serde(deserialize_with = "config::size")]
    pub(super) num_hidden_layers: usize,
    #[serde(deserialize_with = "config::size")]
    pub(super) num_attention_heads: usize,
    #[serde(deserialize_with = "config::size")]
    pub(super) num_key_value_heads: usize,
    #[serde(default = "default_head_dim", deserialize_with = "config::size")]
    pub(super) head_dim: usize,
    #[serde(default = "default_global_head_dim", deserialize_with = "config::size")]
    pub(super) global_head_dim: usize,
    layer_types: Option<Vec<LayerType>>,
    #[serde(default = "default_sliding_window", deserialize_with = "config::size")]
    sliding_window: usize,
    #[serde(default)]
    rope_parameters: LayerRopeParameters,
    #[serde(default)]
    num_kv_shared_layers: usize,
    #[serde(default)]
    use_double_wide_mlp: bool,
    pub(super) final_logit_softcapping: Option<f32>,
    #[serde(deserialize_with = "config::size")]
    max_position_embeddings: usize,
    #[serde(default = "config::default_eps", deserialize_with = "config::positive")]
    pub(super) rms_norm_eps: f64,
    pub(super) tie_word_embeddings: Option<bool>,
    #[serde(default, rename = "attention_bias", deserialize_with = "config::only_false")]
    _attention_bias: (),
    #[serde(default, rename = "attention_k_eq_v", deserialize_with = "config::only_false")]
    _attention_k_eq_v: (),
    #[serde(default, rename = "enable_moe_block", deserialize_with = "config::only_false")]
    _enable_moe_block: (),
    /// How transformers writes `global_head_dim` when it saves a model again.
    #[serde(default, rename = "per_layer_config", deserialize_with = "config::only_null")]
    _per_layer_config: (),
    #[serde(default, rename = "use_bidirectional_attention")]
    _use_bidirectional_attention: Option<Bidirectional>,
    #[serde(default, rename = "hidden_activation")]
    _hidden_activation: HiddenActivation,
    #[serde(default, deserialize_with = "config::token_ids")]
    eos_token_id: Vec<u32>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum LayerType {
    SlidingAttention,
    FullAttention,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum HiddenActivation {
    #[default]
    GeluPytorchTanh,
}

/// Which tokens see later ones: those of an image, which a text does not have.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Bidirectional {
    Vision,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct LayerRopeParameters {
    #[serde(default)]
    sliding_attention: RopeParameters,
    #[serde(default)]
    full_attention: ProportionalRopeParameters,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct ProportionalRopeParameters {
    #[serde(default, rename = "rope_type")]
    _rope_type: ProportionalRopeType,
    rope_theta: Option<f64>,
    partial_rotary_factor: Option<f64>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum ProportionalRopeType {
    #[default]
    Proportional,
}

fn default_head_dim() -> usize {
    256
}

fn default_global_head_dim() -> usize {
    512
}

fn default_sliding_window() -> usize {
    512
}

impl Config {
    /// Reads the nested layout of the published checkpoints or the flat one of text-only exports.
    pub(crate) fn parse(checkpoint: &Checkpoint, value: &Value) -> Result<Self> {
        let mut config: Self = config::parse(checkpoint, value.get("text_config").unwrap_or(value))?;
        if config.tie_word_embeddings.is_none() {
            config.tie_word_embeddings = value.get("tie_word_embeddings").and_then(Value::as_bool);
        }
        if let Some(ids) = value.get("text_config").and(value.get("eos_token_id")) {
            config.eos_token_id.extend(config::token_ids(ids).map_err(candle_core::Error::wrap)?);
        }
        if let Err(error) = config.check() {
            bail!("{}: {error}", checkpoint.path("config.json").display())
        }
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let Config { num_attention_heads: nh, num_key_value_heads: kv, num_hidden_layers: layers, .. } = *self;
        if !nh.is_multiple_of(kv) {
            bail!("{nh} attention heads over {kv}, expected a multiple")
        }
        if !self.head_dim.is_multiple_of(2) || !self.global_head_dim.is_multiple_of(2) {
            bail!("head sizes {} and {}, expected even ones", self.head_dim, self.global_head_dim)
        }
        let types = self.layer_types();
        if types.len() != layers {
            bail!("{} layer_types for {layers} layers", types.len())
        }
        let Some(owning) = layers.checked_sub(self.num_kv_shared_layers).map(|owning| &types[..owning]) else {
            bail!("{} num_kv_shared_layers of {layers} layers", self.num_kv_shared_layers)
        };
        if let Some(orphan) = types.iter().find(|layer_type| !owning.contains(layer_type)) {
            bail!("layers of {orphan:?} share keys and values, and none has its own")
        }
        let (sliding, full) = (self.sliding_theta(), self.full_theta());
        if sliding <= 0.0 || full <= 0.0 {
            bail!("rope_theta is {sliding} and {full}, expected positive numbers")
        }
        if !(0.0..=1.0).contains(&self.partial_rotary_factor()) {
            bail!("partial_rotary_factor is {}, expected 0 to 1", self.partial_rotary_factor())
        }
        if self.rope_parameters.sliding_attention.partial_rotary_factor.is_some_and(|factor| factor != 1.0) {
            bail!("rope_parameters.sliding_attention.partial_rotary_factor is not supported")
        }
        if self.vocab_size_per_layer_input() < self.vocab_size {
            bail!(
                "vocab_size_per_layer_input is {}, expected vocab_size, {}, or more",
                self.vocab_size_per_layer_input(),
                self.vocab_size
            )
        }
        if self.final_logit_softcapping.is_some_and(|cap| cap.is_nan() || cap <= 0.0) {
            bail!("final_logit_softcapping is {:?}, expected a positive number", self.final_logit_softcapping)
        }
        Ok(())
    }

    pub(crate) fn describe(&self) -> Description {
        Description {
            family: "Gemma 4",
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            max_positions: self.max_position_embeddings,
            eos_token_ids: self.eos_token_id.clone(),
            cache_specs: self.cache_specs(),
            attention: self.layer_types().into_iter().map(|it| Some(self.attention_shape(it))).collect(),
            experts: None,
        }
    }

    pub(super) fn cache_specs(&self) -> Vec<CacheSpec> {
        let own = |layer_type| CacheSpec::KeyValue {
            num_kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim_of(layer_type),
            window: self.window_of(layer_type),
        };
        let mut specs: Vec<CacheSpec> = self.layer_types().into_iter().map(own).collect();
        specs[self.first_shared()..].fill(CacheSpec::None);
        specs
    }

    fn attention_shape(&self, layer_type: LayerType) -> AttentionShape {
        let shape = AttentionShape::causal(self.num_attention_heads, self.head_dim_of(layer_type));
        AttentionShape { window: self.window_of(layer_type), ..shape }
    }

    pub(super) fn layer_types(&self) -> Vec<LayerType> {
        let derived = |layer: usize| match (layer + 1) % 6 {
            0 => LayerType::FullAttention,
            _ => LayerType::SlidingAttention,
        };
        let mut types = self.layer_types.clone().unwrap_or_else(|| (0..self.num_hidden_layers).map(derived).collect());
        if let Some(last) = types.last_mut() {
            *last = LayerType::FullAttention;
        }
        types
    }

    /// The first of the layers without keys and values of their own.
    pub(super) fn first_shared(&self) -> usize {
        self.num_hidden_layers - self.num_kv_shared_layers
    }

    /// The layer whose keys and values `layer` reads: itself, or the last one of its type that has its own.
    pub(super) fn kv_source(&self, layer: usize) -> usize {
        let (types, first_shared) = (self.layer_types(), self.first_shared());
        if layer < first_shared {
            return layer;
        }
        (0..first_shared).rfind(|&source| types[source] == types[layer]).expect("checked by Config::parse")
    }

    pub(super) fn head_dim_of(&self, layer_type: LayerType) -> usize {
        match layer_type {
            LayerType::SlidingAttention => self.head_dim,
            LayerType::FullAttention => self.global_head_dim,
        }
    }

    pub(super) fn window_of(&self, layer_type: LayerType) -> Option<usize> {
        match layer_type {
            LayerType::SlidingAttention => Some(self.sliding_window),
            LayerType::FullAttention => None,
        }
    }

    /// Width of a layer's MLP, doubled in sharing layers where the configuration says so.
    pub(super) fn intermediate_size_of(&self, layer: usize) -> usize {
        let is_double = self.use_double_wide_mlp && layer >= self.first_shared();
        self.intermediate_size * if is_double { 2 } else { 1 }
    }

    pub(super) fn vocab_size_per_layer_input(&self) -> usize {
        self.vocab_size_per_layer_input.unwrap_or(self.vocab_size)
    }

    pub(super) fn sliding_theta(&self) -> f64 {
        self.rope_parameters.sliding_attention.rope_theta.unwrap_or(1e4)
    }

    pub(super) fn full_theta(&self) -> f64 {
        self.rope_parameters.full_attention.rope_theta.unwrap_or(1e6)
    }

    pub(super) fn partial_rotary_factor(&self) -> f64 {
        self.rope_parameters.full_attention.partial_rotary_factor.unwrap_or(0.25)
    }
}
