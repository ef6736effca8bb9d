//! The sparse MLP of Qwen3.5's larger models: a few of many experts for each token, and one that all tokens share.
//!
//! Follows transformers 5.23.0 `models/qwen3_5_moe/modeling_qwen3_5_moe.py`, `Qwen3_5MoeSparseMoeBlock`. Checkpoints
//! hold the experts of a layer in two stacks or, as exports do, one by one.

use candle_core::{Result, Tensor, bail};
use kernels::activation::{Activation, sigmoid_gated};
use kernels::moe::{Experts, Stack, route, sparse_mlp};
use kernels::residual::add;
use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::config;
use crate::layers::{Bias, GatedMlp, Linear};
use crate::weights::Weights;
use crate::{ExpertCount, Observed, Observer};

/// The fields of `config.json` that a sparse MLP has.
#[derive(Clone, Debug, Deserialize)]
pub(crate) struct Config {
    #[serde(deserialize_with = "config::size")]
    num_experts: usize,
    #[serde(deserialize_with = "config::size")]
    num_experts_per_tok: usize,
    #[serde(deserialize_with = "config::size")]
    moe_intermediate_size: usize,
    #[serde(deserialize_with = "config::size")]
    shared_expert_intermediate_size: usize,
}

impl Config {
    pub fn parse(checkpoint: &Checkpoint, text: &Value) -> Result<Self> {
        let config: Self = config::parse(checkpoint, text)?;
        let Self { num_experts, num_experts_per_tok: chosen, .. } = config;
        if chosen > num_experts {
            bail!("{}: num_experts_per_tok is {chosen} of {num_experts}", checkpoint.path("config.json").display())
        }
        Ok(config)
    }

    pub fn experts(&self) -> ExpertCount {
        ExpertCount { total: self.num_experts, per_token: self.num_experts_per_tok }
    }
}

/// `experts(x) + sigmoid(shared_expert_gate(x)) * shared_expert(x)`.
pub(crate) struct SparseMlp {
    /// The router.
    gate: Linear,
    num_experts_per_tok: usize,
    experts: Experts,
    shared_expert: GatedMlp,
    shared_expert_gate: Linear,
}

impl SparseMlp {
    /// Router and gate of the shared expert stay as they are stored: they are small, and the router decides.
    pub fn load(weights: &Weights, hidden: usize, config: &Config) -> Result<Self> {
        let stored = weights.clone().quantized(None)?;
        let shared = config.shared_expert_intermediate_size;
        Ok(Self {
            gate: Linear::load(&stored.pp("gate"), hidden, config.num_experts, Bias::Absent)?,
            num_experts_per_tok: config.num_experts_per_tok,
            experts: load_experts(weights, hidden, config)?,
            shared_expert: GatedMlp::load(&weights.pp("shared_expert"), hidden, shared, Activation::Silu)?,
            shared_expert_gate: Linear::load(&stored.pp("shared_expert_gate"), hidden, 1, Bias::Absent)?,
        })
    }

    /// `x` `[N, H]` to `[N, H]`.
    pub fn forward(&self, x: &Tensor, observe: &mut Observer) -> Result<Tensor> {
        let logits = self.gate.forward(x)?;
        observe(Observed::Router { logits: &logits, chosen: self.num_experts_per_tok })?;
        let y = sparse_mlp(x, &route(&logits, self.num_experts_per_tok)?, &self.experts)?;
        let shared = self.shared_expert.forward(x)?;
        let gate = self.shared_expert_gate.forward(x)?.broadcast_as(shared.shape())?;
        add(&y, &sigmoid_gated(&shared, &gate)?)
    }
}

fn load_experts(weights: &Weights, hidden: usize, config: &Config) -> Result<Experts> {
    let weights = &weights.pp("experts");
    let &Config { num_experts, moe_intermediate_size: size, .. } = config;
    let (gate_up, down) = match weights.contains("gate_up_proj") {
        true => (
            load_stack(weights, num_experts, |e| vec![format!("gate_up_proj.{e}")], &[2 * size], hidden)?,
            load_stack(weights, num_experts, |e| vec![format!("down_proj.{e}")], &[hidden], size)?,
        ),
        false => {
            let gate_up = |e| vec![format!("{e}.gate_proj.weight"), format!("{e}.up_proj.weight")];
            let down = |e| vec![format!("{e}.down_proj.weight")];
            (
                load_stack(weights, num_experts, gate_up, &[size; 2], hidden)?,
                load_stack(weights, num_experts, down, &[hidden], size)?,
            )
        }
    };
    Experts::new(gate_up, down)
}

/// For each expert the matrices `names`, one below the other. No more than one expert is in memory twice.
fn load_stack(
    weights: &Weights,
    num_experts: usize,
    names: impl Fn(usize) -> Vec<String>,
    rows: &[usize],
    columns: usize,
) -> Result<Stack> {
    let names: Vec<Vec<String>> = (0..num_experts).map(names).collect();
    let mut packed = Vec::with_capacity(num_experts);
    let names: Vec<&str> = names.iter().flatten().map(String::as_str).collect();
    for names in names.chunks(rows.len()) {
        packed.extend(weights.packed(names, rows, columns)?);
    }
    if !packed.is_empty() {
        return Ok(Stack::Packed(packed));
    }
    let stack = weights.stacked(&names, &rows.repeat(num_experts), columns)?;
    Ok(Stack::Dense(stack.reshape((num_experts, (), columns))?))
}
