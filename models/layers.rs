//! Layers that more than one family uses unchanged.

use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor};
use kernels::activation::{Activation, gelu};
use kernels::attention::{AttentionParams, paged_attention};
use kernels::gather::gather;
use kernels::heads::{KeyValueHeads, norm_rope_attend, norm_rope_write};
use kernels::linear::{Around, linear_around, linear_gelu};
use kernels::norm::{self, Norm};
use kernels::quantized::{self, QuantizedMatrix};
use kernels::{Batch, rope};

use crate::weights::Weights;

/// A weight matrix `[O, I]`, as it is stored or packed. Clones share it.
#[derive(Clone)]
enum Matrix {
    Dense(Tensor),
    Packed(Arc<QuantizedMatrix>),
}

impl Matrix {
    /// The matrices `names`, one below the other.
    fn load(weights: &Weights, names: &[&str], rows: &[usize], columns: usize) -> Result<Self> {
        match weights.packed(names, rows, columns)? {
            Some(packed) => Ok(Self::Packed(Arc::new(packed))),
            None => Ok(Self::Dense(weights.stacked(names, rows, columns)?)),
        }
    }
}

/// `y = x W^T + b`, the bias optional.
pub struct Linear {
    weight: Matrix,
    bias: Option<Tensor>,
}

/// Whether a checkpoint's linear layer carries a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    Absent,
    Present,
}

impl Linear {
    /// Reads `weight` `[output, input]`, and `bias` `[output]` where there is one.
    ///
    /// # Errors
    ///
    /// A tensor is missing or of another shape.
    pub fn load(weights: &Weights, input: usize, output: usize, bias: Bias) -> Result<Self> {
        Self::merged(weights, &["weight"], &["bias"], &[output], input, bias)
    }

    /// The layers `names`, which read the same input, as one whose output is theirs side by side.
    ///
    /// # Errors
    ///
    /// As [`Linear::load`].
    pub fn side_by_side(
        weights: &Weights,
        names: &[&str],
        outputs: &[usize],
        input: usize,
        bias: Bias,
    ) -> Result<Self> {
        let tensors = |kind: &str| names.iter().map(|name| format!("{name}.{kind}")).collect::<Vec<_>>();
        let (matrices, biases) = (tensors("weight"), tensors("bias"));
        let matrices: Vec<&str> = matrices.iter().map(String::as_str).collect();
        let biases: Vec<&str> = biases.iter().map(String::as_str).collect();
        Self::merged(weights, &matrices, &biases, outputs, input, bias)
    }

    fn merged(
        weights: &Weights,
        matrices: &[&str],
        biases: &[&str],
        outputs: &[usize],
        input: usize,
        bias: Bias,
    ) -> Result<Self> {
        let bias = match bias {
            Bias::Absent => None,
            Bias::Present => {
                let parts = biases
                    .iter()
                    .zip(outputs)
                    .map(|(name, &output)| weights.f32(name, &[output]))
                    .collect::<Result<Vec<_>>>()?;
                Some(Tensor::cat(&parts, 0)?.to_dtype(weights.dtype())?)
            }
        };
        Ok(Self { weight: Matrix::load(weights, matrices, outputs, input)?, bias })
    }

    /// `x` `[N, I]` to `[N, O]`.
    ///
    /// # Errors
    ///
    /// `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_around(x, Around::default())
    }

    /// As [`Linear::forward`], with what surrounds the layer in its block.
    ///
    /// # Errors
    ///
    /// `x`, or what is added, has another width.
    pub fn forward_around(&self, x: &Tensor, around: Around) -> Result<Tensor> {
        match &self.weight {
            Matrix::Dense(weight) => linear_around(x, weight, self.bias.as_ref(), around),
            Matrix::Packed(weight) => quantized::linear_around(x, weight, self.bias.as_ref(), around),
        }
    }

    /// The GELU of [`Linear::forward`].
    ///
    /// # Errors
    ///
    /// As [`Linear::forward`].
    pub fn forward_gelu(&self, x: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Matrix::Dense(weight) => linear_gelu(x, weight, self.bias.as_ref()),
            Matrix::Packed(_) => gelu(&self.forward(x)?),
        }
    }
}

/// Token embedding `[V, H]`.
pub struct Embedding {
    weight: Matrix,
    dtype: DType,
}

impl Embedding {
    /// Reads `weight` `[vocab_size, hidden_size]`.
    ///
    /// # Errors
    ///
    /// The tensor is missing or of another shape.
    pub fn load(weights: &Weights, vocab_size: usize, hidden_size: usize) -> Result<Self> {
        let weight = Matrix::load(weights, &["weight"], &[vocab_size], hidden_size)?;
        Ok(Self { weight, dtype: weights.dtype() })
    }

    /// `tokens` `[N]` to `[N, H]` in the activations' dtype.
    ///
    /// # Errors
    ///
    /// On the CPU, a token beyond the vocabulary.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let rows = match &self.weight {
            Matrix::Dense(weight) => gather(weight, tokens)?,
            Matrix::Packed(weight) => weight.rows(tokens)?,
        };
        rows.to_dtype(self.dtype)
    }

    /// The same matrix as the output projection of a tied model.
    pub fn tied_head(&self) -> Linear {
        Linear { weight: self.weight.clone(), bias: None }
    }
}

/// RMS normalisation with a factor per channel, kept in f32.
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Reads `weight` `[size]`, stored as the factor itself.
    ///
    /// # Errors
    ///
    /// The tensor is missing or of another shape.
    pub fn load(weights: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: weights.f32("weight", &[size])?, eps })
    }

    /// Reads `weight` `[size]`, stored as the factor minus one.
    ///
    /// # Errors
    ///
    /// As [`RmsNorm::load`].
    pub fn load_zero_centred(weights: &Weights, size: usize, eps: f64) -> Result<Self> {
        Ok(Self { weight: (weights.f32("weight", &[size])? + 1.0)?, eps })
    }

    /// A norm without weight, over `size` channels.
    ///
    /// # Errors
    ///
    /// The device has no memory left.
    pub fn unweighted(size: usize, eps: f64, device: &Device) -> Result<Self> {
        Ok(Self { weight: Tensor::ones(size, DType::F32, device)?, eps })
    }

    /// Normalises over the last dimension.
    ///
    /// # Errors
    ///
    /// `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        norm::rms_norm(x, &self.weight, self.eps)
    }

    /// What an op needs that normalises on the way.
    pub fn parts(&self) -> Norm<'_> {
        Norm { weight: &self.weight, eps: self.eps }
    }

    /// Normalises, then multiplies by `silu(gate)`.
    ///
    /// # Errors
    ///
    /// `x` has another width, or `gate` another shape.
    pub fn forward_gated(&self, x: &Tensor, gate: &Tensor) -> Result<Tensor> {
        norm::rms_norm_gated(x, gate, &self.weight, self.eps)
    }
}

/// Rotary frequencies of a model, and a step's angles made from them.
pub struct RotaryEmbedding {
    /// `[R / 2]` f32, radians per position.
    inv_freq: Tensor,
}

impl RotaryEmbedding {
    /// `theta^(-2 i / rotary_dim)` for each of the `rotary_dim / 2` pairs of the head's leading part.
    ///
    /// # Errors
    ///
    /// The device has no memory left.
    pub fn new(theta: f64, rotary_dim: usize, device: &Device) -> Result<Self> {
        let half = rotary_dim / 2;
        let inv_freq: Vec<f32> = (0..half).map(|i| theta.powf(-2.0 * i as f64 / rotary_dim as f64) as f32).collect();
        Ok(Self { inv_freq: Tensor::from_vec(inv_freq, half, device)? })
    }

    /// Frequencies of the whole head, of which only the first `factor` turn: pair `i` of `head_dim / 2` has
    /// `theta^(-2 i / head_dim)` for `i` below `factor * head_dim / 2`, and zero beyond.
    ///
    /// # Errors
    ///
    /// The device has no memory left.
    pub fn proportional(theta: f64, head_dim: usize, factor: f64, device: &Device) -> Result<Self> {
        let turning = (factor * head_dim as f64 / 2.0) as usize;
        let whole = Self::new(theta, head_dim, device)?.inv_freq;
        let still = whole.narrow(0, turning, head_dim / 2 - turning)?.zeros_like()?;
        Ok(Self { inv_freq: Tensor::cat(&[whole.narrow(0, 0, turning)?, still], 0)? })
    }

    /// The rotations of the step's tokens, made once and shared by all layers.
    ///
    /// # Errors
    ///
    /// The device has no memory left.
    pub fn rotations(&self, batch: &Batch) -> Result<Rotations> {
        let (cos, sin) = rope::rotations(&batch.positions, &self.inv_freq)?;
        Ok(Rotations { cos, sin })
    }
}

/// `count` heads of `size` values from column `start` of `x` `[N, W]` on: `[N, count, size]`, a view where `x` is whole
/// heads.
///
/// # Errors
///
/// `x` is narrower.
pub fn heads(x: &Tensor, start: usize, count: usize, size: usize) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    match x.is_contiguous() && width.is_multiple_of(size) && start.is_multiple_of(size) {
        true => x.reshape((n, width / size, size))?.narrow(1, start / size, count),
        false => x.narrow(1, start, count * size)?.reshape((n, count, size)),
    }
}

/// Cosines and sines `[N, R / 2]` of a step's tokens.
pub struct Rotations {
    cos: Tensor,
    sin: Tensor,
}

impl Rotations {
    /// Rotates the leading part of every head of `x` `[N, heads, D]`.
    ///
    /// # Errors
    ///
    /// `x` has another number of tokens, or heads smaller than the rotation.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        rope::rope(x, &self.cos, &self.sin)
    }

    /// The way of heads from a projection through attention: norms, rotations, keys and values into `pages`, and what the
    /// query mixes of them, `[N, Hq, D]`.
    ///
    /// # Errors
    ///
    /// As [`norm_rope_attend`].
    pub fn attend(
        &self,
        q: &Tensor,
        q_norm: &RmsNorm,
        kv: Option<KeyValueHeads>,
        pages: &Tensor,
        batch: &Batch,
        params: AttentionParams,
    ) -> Result<Tensor> {
        norm_rope_attend(q, q_norm.parts(), kv, (&self.cos, &self.sin), pages, batch, params)
    }

    /// As [`Rotations::attend`], for some tokens alone: the others write their keys and values.
    ///
    /// # Errors
    ///
    /// As [`norm_rope_write`] and [`paged_attention`].
    pub fn attend_last(
        &self,
        q: &Tensor,
        q_norm: &RmsNorm,
        kv: KeyValueHeads,
        pages: &Tensor,
        last: &LastTokens,
        params: AttentionParams,
    ) -> Result<Tensor> {
        let (_, heads, d) = q.dims3()?;
        let q = norm_rope_write(q, q_norm.parts(), Some(kv), (&self.cos, &self.sin), pages, last.all)?;
        let q = gather(&q.flatten_from(1)?, &last.rows)?;
        paged_attention(&q.reshape(((), heads, d))?, pages, &last.batch, params)
    }
}

/// The tokens of a step whose hidden states are asked for, where there are others: of these the last layers need no
/// more than keys and values.
pub struct LastTokens<'a> {
    all: &'a Batch,
    batch: Batch,
    rows: Tensor,
}

impl<'a> LastTokens<'a> {
    /// The last tokens of `sequences`, by index in the batch, or of any where that is empty; `None` if there are no others.
    ///
    /// # Errors
    ///
    /// A sequence beyond the batch.
    pub fn of(all: &'a Batch, sequences: &[u32]) -> Result<Option<Self>> {
        if (0..all.num_tokens() as u32).eq(sequences.iter().copied()) {
            return Ok(None);
        }
        let sequences = if sequences.is_empty() { &[0] } else { sequences };
        Ok(Some(Self { all, batch: all.last_tokens(sequences)?, rows: all.last_rows(sequences)? }))
    }

    /// They alone, as a step of their own.
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// Where they stand in the step.
    pub fn rows(&self) -> &Tensor {
        &self.rows
    }
}

/// The rows of `x` `[N, D]` that a last layer goes on with, all of them if none are named.
///
/// # Errors
///
/// As [`gather`].
pub fn remaining(x: &Tensor, rows: Option<&Tensor>) -> Result<Tensor> {
    rows.map_or_else(|| Ok(x.clone()), |rows| gather(x, rows))
}

/// `down(act(gate(x)) * up(x))`.
pub struct GatedMlp {
    gate_up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl GatedMlp {
    /// Reads `gate_proj`, `up_proj` `[intermediate, hidden]` and `down_proj` `[hidden, intermediate]`.
    ///
    /// # Errors
    ///
    /// A tensor is missing or of another shape.
    pub fn load(weights: &Weights, hidden: usize, intermediate: usize, activation: Activation) -> Result<Self> {
        let names = ["gate_proj", "up_proj"];
        Ok(Self {
            gate_up_proj: Linear::side_by_side(weights, &names, &[intermediate; 2], hidden, Bias::Absent)?,
            down_proj: Linear::load(&weights.pp("down_proj"), intermediate, hidden, Bias::Absent)?,
            activation,
        })
    }

    /// `x` `[N, H]` to `[N, H]`.
    ///
    /// # Errors
    ///
    /// `x` has another width.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_around(x, Around::default())
    }

    /// As [`GatedMlp::forward`], with the norm before and the sum behind it.
    ///
    /// # Errors
    ///
    /// As [`GatedMlp::forward`].
    pub fn forward_around(&self, x: &Tensor, around: Around) -> Result<Tensor> {
        // There a product of packed weights rounds what it is given, and lets the gate do its work on the way.
        if let Matrix::Packed(down) = &self.down_proj.weight
            && x.device().is_cpu()
        {
            let gate_up = self.gate_up_proj.forward_around(x, Around { norm: around.norm, ..Around::default() })?;
            return quantized::linear_gated(&gate_up, self.activation, down, None, around.onto);
        }
        let gate = Some(self.activation);
        let gated = self.gate_up_proj.forward_around(x, Around { norm: around.norm, gate, onto: None })?;
        self.down_proj.forward_around(&gated, Around { onto: around.onto, ..Around::default() })
    }
}
