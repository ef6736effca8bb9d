//! What a test takes at least on the CPU: bytes from memory, and operations.

use candle_core::DType;
use kernels::probe::Operands;
use models::weights::TensorSize;
use models::{CacheSpec, Quantization, cache};

use super::super::info;
use super::report::median;
use super::{Kind, Machine, Setup, Test};

/// The weights in one format.
pub struct Weights {
    /// Bytes in memory.
    pub resident: usize,
    /// Bytes that every step reads: of an embedding that is not the head as well it needs a row, and no experts but those
    /// that its tokens go to.
    pub read: usize,
    /// Bytes of one expert in each layer.
    expert: usize,
    /// Of the keys and values beside them.
    kv_dtype: DType,
    pub operands: Operands,
    /// Weights that a token meets.
    met: usize,
    /// Those that a token meets whose hidden state is asked for, the head among them.
    met_by_last: usize,
}

/// What a test takes at least.
struct Work {
    tokens: usize,
    /// Read from memory.
    bytes: usize,
    /// Operations of products with weights.
    products: usize,
    /// Operations of attention, in f32.
    attention: usize,
}

impl Setup {
    /// Of the checkpoint's `tensors`.
    pub fn weights(&self, tensors: &[TensorSize], quantization: Option<Quantization>) -> Weights {
        let has_head = tensors.iter().any(|tensor| info::part(&tensor.name) == info::HEAD);
        let is_bf16 = tensors.iter().any(|tensor| tensor.shape.len() > 1 && tensor.dtype == safetensors::Dtype::BF16);
        let mut weights = Weights {
            resident: 0,
            read: 0,
            expert: 0,
            kv_dtype: taper::kv_dtype(&self.device, self.dtype, quantization),
            operands: match quantization {
                Some(format) => Operands::Packed(format),
                None if is_bf16 => Operands::Bf16,
                None => Operands::F32,
            },
            met: 0,
            met_by_last: 0,
        };
        let below = self.layers_of_all();
        for tensor in tensors {
            let part = info::part(&tensor.name);
            if [info::UNUSED, info::ON_DISK].contains(&part) || (self.is_encoder && part == info::HEAD) {
                continue;
            }
            let size = self.tensor_bytes(tensor, quantization);
            let elements: usize = tensor.shape.iter().product();
            weights.resident += size;
            let is_head = part == info::HEAD || (part == info::EMBEDDING && !has_head && !self.is_encoder);
            let is_table = !is_head && [info::EMBEDDING, info::POSITIONS].contains(&part);
            let mut met = if is_table || tensor.shape.len() < 2 { 0 } else { elements };
            if let (info::EXPERTS, Some(experts)) = (part, self.description.experts) {
                weights.expert += size / experts.total;
                met = elements / experts.total * experts.per_token;
            } else if !is_table {
                weights.read += size;
            }
            weights.met_by_last += met;
            if !is_head && layer(&tensor.name).is_none_or(|layer| layer < below) {
                weights.met += met;
            }
        }
        weights
    }

    fn tensor_bytes(&self, tensor: &TensorSize, quantization: Option<Quantization>) -> usize {
        let elements: usize = tensor.shape.iter().product();
        match quantization {
            Some(format) => info::packed_bytes(tensor, format) as usize,
            None if self.device.is_cpu() => tensor.bytes.min(elements * self.dtype.size_in_bytes()),
            None => elements * self.dtype.size_in_bytes(),
        }
    }

    /// How many layers every token needs: those below the last that keeps something. Of that one, tokens before the last
    /// need keys and values alone, which are not counted.
    fn layers_of_all(&self) -> usize {
        let specs = &self.description.cache_specs;
        let last = specs.iter().rposition(|spec| *spec != CacheSpec::None);
        last.unwrap_or(self.description.attention.len().saturating_sub(1))
    }

    /// Tokens a second at which `test` takes all of the machine's bandwidth, or of its operations. `peak` is that of products
    /// with these weights.
    pub fn limit(&self, weights: &Weights, test: &Test, machine: &Machine, peak: &[f64]) -> f64 {
        let work = match test.kind {
            Kind::Decode => self.decode_work(weights, test),
            Kind::Prompt | Kind::Encode => self.prompt_work(weights, test),
        };
        let reading = work.bytes as f64 / median(&machine.bandwidth);
        let computing = work.products as f64 / median(peak) + work.attention as f64 / median(&machine.flops);
        work.tokens as f64 / reading.max(computing)
    }

    /// One token of each sequence.
    fn decode_work(&self, weights: &Weights, test: &Test) -> Work {
        let context = test.depth + test.tokens.div_ceil(2);
        Work {
            tokens: test.batch,
            bytes: self.weight_bytes(weights, test.batch) + test.batch * self.cache_bytes(weights, context),
            products: 2 * test.batch * weights.met_by_last,
            attention: test.batch * self.attention(self.description.attention.len(), 1, context),
        }
    }

    /// All tokens of each sequence.
    fn prompt_work(&self, weights: &Weights, test: &Test) -> Work {
        let Test { tokens, depth, batch, .. } = *test;
        let below = self.layers_of_all();
        let last = self.attention(self.description.attention.len(), 1, depth + tokens - 1);
        Work {
            tokens: batch * tokens,
            bytes: self.weight_bytes(weights, batch * tokens) + batch * self.cache_bytes(weights, depth),
            products: 2 * batch * ((tokens - 1) * weights.met + weights.met_by_last),
            attention: batch * (self.attention(below, tokens - 1, depth) + last),
        }
    }

    /// Operations in the first `layers`.
    fn attention(&self, layers: usize, tokens: usize, past: usize) -> usize {
        self.description.attention[..layers].iter().flatten().map(|shape| shape.operations(tokens, past)).sum()
    }

    /// Of the weights that so many tokens meet.
    fn weight_bytes(&self, weights: &Weights, tokens: usize) -> usize {
        let experts = self.description.experts.map_or(0, |experts| experts.total.min(tokens * experts.per_token));
        weights.read + experts * weights.expert
    }

    /// Of what a sequence of `tokens` keeps.
    fn cache_bytes(&self, weights: &Weights, tokens: usize) -> usize {
        let specs = &self.description.cache_specs;
        let windowed = cache::window(specs).unwrap_or(0).min(tokens);
        tokens * cache::bytes_per_block(specs, 1, weights.kv_dtype)
            + windowed * cache::bytes_per_window_block(specs, 1, weights.kv_dtype)
            + cache::bytes_per_slot(specs)
    }
}

/// The index of the layer that a tensor belongs to.
fn layer(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once("layers.").or_else(|| name.split_once("layer."))?;
    rest.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_belong_to_layers() {
        assert_eq!(layer("model.language_model.layers.17.mlp.up_proj.weight"), Some(17));
        assert_eq!(layer("encoder.layer.3.attention.self.query.weight"), Some(3));
        assert_eq!(layer("model.embed_tokens.weight"), None);
    }
}
