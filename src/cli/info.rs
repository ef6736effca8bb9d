//! `taper info`: a model's parts and the memory that they take, before or after downloading it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use models::{CacheSpec, Checkpoint, Config, ExpertCount, Quantization, cache, weights};
use serde_json::json;
use taper::hub::{self, Metadata};

use super::Result;
use super::model::{DeviceArgs, SourceArgs};
use super::progress::Bars;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hub id or folder
    model: String,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let metadata = hub::fetch_metadata(&args.model, &args.source.hub(), &mut Bars::default())?;
    let checkpoint = Checkpoint::Folder(metadata.folder.clone());
    let description = Config::read(&checkpoint)?.describe();
    let device = args.device.choice().open()?;
    let dtype = args.device.dtype().unwrap_or_else(|| taper::default_dtype(&device));
    let parts = Parts::read(&checkpoint, &metadata, description.experts)?;
    let specs = &description.cache_specs;
    let per_token = cache::bytes_per_block(specs, 1, dtype);
    let per_sequence = cache::bytes_per_slot(specs);
    let window = cache::window(specs).unwrap_or(0);
    let per_window = window * cache::bytes_per_window_block(specs, 1, dtype);
    let free = taper::available_memory(&device);
    let context = free
        .saturating_sub(parts.resident as usize + per_sequence + per_window)
        .checked_div(per_token)
        .unwrap_or(usize::MAX)
        .min(description.max_positions);
    let attention = specs.iter().filter(|spec| matches!(spec, CacheSpec::KeyValue { .. })).count();
    let recurrent = specs.iter().filter(|spec| matches!(spec, CacheSpec::Recurrent { .. })).count();
    if args.json {
        let value = json!({
            "family": description.family,
            "layers": { "total": specs.len(), "attention": attention, "recurrent": recurrent },
            "hidden_size": description.hidden_size,
            "vocab_size": description.vocab_size,
            "max_positions": description.max_positions,
            "weight_bytes": parts.bytes,
            "parameters": parts.parameters,
            "active_parameters": parts.active,
            "experts": description.experts.map(|experts| experts.total),
            "experts_per_token": description.experts.map(|experts| experts.per_token),
            "bytes_by_part": parts.by_part,
            "packed_bytes": parts.packed.map(BTreeMap::from),
            "cache_dtype": dtype.as_str(),
            "key_value_bytes_per_token": per_token,
            "window_tokens": cache::window(specs),
            "window_bytes_per_sequence": per_window,
            "state_bytes_per_sequence": per_sequence,
            "free_memory_bytes": free,
            "context_that_fits": context,
        });
        println!("{value:#}");
        return Ok(ExitCode::SUCCESS);
    }
    let row = |name: &str, value: String| println!("{name:<22}{value}");
    row("model", format!("{} ({})", args.model, description.family));
    let kinds = if recurrent > 0 { format!(" ({recurrent} recurrent, {attention} attention)") } else { String::new() };
    match specs.len() {
        0 => row("hidden size", description.hidden_size.to_string()),
        layers => row("layers", format!("{layers}{kinds}, hidden size {}", description.hidden_size)),
    }
    row("context", format!("{} tokens", description.max_positions));
    row("vocabulary", format!("{} tokens", description.vocab_size));
    if let Some(ExpertCount { total, per_token }) = description.experts {
        row("experts", format!("{total} a layer, {per_token} for each token"));
    }
    let active = parts.active.filter(|_| description.experts.is_some());
    let active = active.map(|count| format!(" ({} for each token)", count_of(count))).unwrap_or_default();
    let parameters = parts.parameters.map(|count| format!("{} parameters{active}, ", count_of(count)));
    row("weights", format!("{}{}", parameters.unwrap_or_default(), bytes_of(parts.bytes)));
    for (part, bytes) in &parts.by_part {
        row(&format!("  {part}"), bytes_of(*bytes));
    }
    for (quantization, bytes) in parts.packed.iter().flatten() {
        row(&format!("  with --quant {quantization}"), format!("{} in memory", bytes_of(*bytes)));
    }
    if per_token > 0 {
        let beside_packed = taper::kv_dtype(&device, dtype, Some(Quantization::Q8));
        let halved = if beside_packed == dtype { "" } else { ", half of it with --quant" };
        row("keys and values", format!("{} per token in {}{halved}", bytes_of(per_token as u64), dtype.as_str()));
    }
    if per_window > 0 {
        row("  in the window", format!("{} per sequence for the last {window} tokens", bytes_of(per_window as u64)));
    }
    if per_sequence > 0 {
        row("recurrent state", format!("{} per sequence in f32", bytes_of(per_sequence as u64)));
    }
    if device.is_metal() {
        row("device", "Metal, whose kernels are type-checked and emulated, not yet run on Apple hardware".into());
    }
    row("free memory", bytes_of(free as u64));
    let fits = |bytes: u64| (bytes as usize).saturating_add(per_sequence + per_window) < free;
    let packed = parts.packed.iter().flatten().find(|(_, bytes)| fits(*bytes));
    let fits = match (fits(parts.resident), packed) {
        (true, _) if specs.is_empty() => format!("yes, with texts of up to {context} tokens"),
        (true, _) => format!("yes, with a context of up to {context} tokens"),
        (false, Some((quantization, _))) => format!("with --quant {quantization}; not as they are stored"),
        (false, None) => "no: the weights alone need more memory than is free".into(),
    };
    row("fits", fits);
    Ok(ExitCode::SUCCESS)
}

/// The size of the weights, and of their parts where headers are at hand.
struct Parts {
    bytes: u64,
    /// Without what is not used or stays in its file.
    resident: u64,
    /// As `resident`, with the weights packed; `None` where only the files' sizes are known.
    packed: Option<[(&'static str, u64); 2]>,
    parameters: Option<u64>,
    /// What a token's step computes with: without the experts that it does not go to, and the embedding, of which it
    /// reads a row.
    active: Option<u64>,
    by_part: BTreeMap<&'static str, u64>,
}

impl Parts {
    fn read(checkpoint: &Checkpoint, metadata: &Metadata, experts: Option<ExpertCount>) -> Result<Self> {
        let local = metadata.weights.iter().all(|file| metadata.folder.join(&file.name).exists());
        let headers = metadata.weights.iter().map(|file| Some((Path::new(&file.name), file.header.as_deref()?)));
        let tensors = match (local, headers.collect::<Option<Vec<_>>>()) {
            (true, _) => Some(weights::tensor_sizes(checkpoint)?),
            (false, Some(headers)) => {
                let files = headers.into_iter().map(|(path, header)| weights::header_sizes(path, header));
                Some(files.collect::<candle_core::Result<Vec<_>>>()?.concat())
            }
            (false, None) => None,
        };
        let Some(tensors) = tensors else {
            let bytes = metadata.weights.iter().map(|file| file.bytes).sum();
            return Ok(Self {
                bytes,
                resident: bytes,
                packed: None,
                parameters: None,
                active: None,
                by_part: BTreeMap::new(),
            });
        };
        let mut by_part = BTreeMap::new();
        for tensor in &tensors {
            *by_part.entry(part(&tensor.name)).or_default() += tensor.bytes as u64;
        }
        let elements = |tensor: &weights::TensorSize| tensor.shape.iter().product::<usize>() as u64;
        let bytes = by_part.values().sum();
        let elsewhere: u64 = [UNUSED, ON_DISK].iter().filter_map(|part| by_part.get(part)).sum();
        let parameters = Some(tensors.iter().map(elements).sum());
        let used = || tensors.iter().filter(|tensor| ![UNUSED, ON_DISK].contains(&part(&tensor.name)));
        let packed = [("q8", Quantization::Q8), ("q4", Quantization::Q4)]
            .map(|(name, quantization)| (name, used().map(|tensor| packed_bytes(tensor, quantization)).sum()));
        let has_head = used().any(|tensor| part(&tensor.name) == HEAD);
        let active = used().map(|tensor| match (part(&tensor.name), experts) {
            (EMBEDDING, _) if has_head => 0,
            (EXPERTS, Some(ExpertCount { total, per_token })) => elements(tensor) * per_token as u64 / total as u64,
            _ => elements(tensor),
        });
        let active = Some(active.sum());
        Ok(Self { bytes, resident: bytes - elsewhere, packed: Some(packed), parameters, active, by_part })
    }
}

pub const UNUSED: &str = "not used";
pub const ON_DISK: &str = "read from the file";
pub const EMBEDDING: &str = "embedding";
pub const HEAD: &str = "head";
pub const EXPERTS: &str = "experts";
pub const POSITIONS: &str = "positions";

/// What a tensor takes in memory under `--quant`.
pub fn packed_bytes(tensor: &weights::TensorSize, quantization: Quantization) -> u64 {
    let is_router = ["mlp.gate.weight", "shared_expert_gate.weight"].iter().any(|name| tensor.name.ends_with(name));
    match *tensor.shape {
        [outer, inner] if !is_router && part(&tensor.name) != POSITIONS => quantization.bytes([outer, inner]) as u64,
        [count, outer, inner] if part(&tensor.name) == EXPERTS => (count * quantization.bytes([outer, inner])) as u64,
        _ => tensor.bytes as u64,
    }
}

/// The part of the model that a tensor belongs to.
pub fn part(name: &str) -> &'static str {
    const PARTS: [(&str, &str); 22] = [
        ("mtp.", UNUSED),
        ("visual.", UNUSED),
        ("vision_tower.", UNUSED),
        ("audio_tower.", UNUSED),
        ("embed_vision.", UNUSED),
        ("embed_audio.", UNUSED),
        ("embed_tokens_per_layer", ON_DISK),
        ("per_layer_", "per-layer input"),
        ("embed_tokens", EMBEDDING),
        ("lm_head", HEAD),
        ("self_attn", "attention"),
        ("linear_attn", "delta net"),
        ("mlp.experts.", EXPERTS),
        ("mlp", "mlp"),
        // XLM-RoBERTa's, the first that fits.
        ("LayerNorm", "norms"),
        ("word_embeddings", EMBEDDING),
        ("position_embeddings", POSITIONS),
        ("token_type_embeddings", POSITIONS),
        (".attention.", "attention"),
        (".intermediate.", "mlp"),
        (".output.", "mlp"),
        ("pooler.", UNUSED),
    ];
    PARTS.iter().find(|(marker, _)| name.contains(marker)).map_or("norms", |(_, part)| part)
}

/// A size as people read it.
pub fn bytes_of(bytes: u64) -> String {
    match bytes as f64 {
        bytes if bytes >= (1u64 << 30) as f64 => format!("{:.2} GiB", bytes / (1u64 << 30) as f64),
        bytes if bytes >= (1u64 << 20) as f64 => format!("{:.1} MiB", bytes / (1u64 << 20) as f64),
        bytes if bytes >= 1024.0 => format!("{:.1} KiB", bytes / 1024.0),
        bytes => format!("{bytes} bytes"),
    }
}

fn count_of(count: u64) -> String {
    match count as f64 {
        count if count >= 1e9 => format!("{:.2} G", count / 1e9),
        count => format!("{:.1} M", count / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_belong_to_parts() {
        assert_eq!(part("model.language_model.layers.0.linear_attn.norm.weight"), "delta net");
        assert_eq!(part("model.layers.0.post_attention_layernorm.weight"), "norms");
        assert_eq!(part("model.language_model.embed_tokens_per_layer.weight"), ON_DISK);
        assert_eq!(part("model.language_model.layers.0.post_per_layer_input_norm.weight"), "per-layer input");
        assert_eq!(part("mtp.layers.0.mlp.down_proj.weight"), "not used");
        assert_eq!(part("model.language_model.layers.0.mlp.experts.gate_up_proj"), EXPERTS);
        assert_eq!(part("model.layers.0.mlp.shared_expert.gate_proj.weight"), "mlp");
        assert_eq!(part("encoder.layer.0.attention.output.LayerNorm.weight"), "norms");
        assert_eq!(part("encoder.layer.0.attention.output.dense.weight"), "attention");
        assert_eq!(part("roberta.encoder.layer.0.output.dense.bias"), "mlp");
        assert_eq!(part("embeddings.position_embeddings.weight"), POSITIONS);
        assert_eq!(part("pooler.dense.weight"), UNUSED);
    }

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes_of(512), "512 bytes");
        assert_eq!(bytes_of(6 * 1024), "6.0 KiB");
        assert_eq!(bytes_of(5 << 30), "5.00 GiB");
        assert_eq!(count_of(596_049_920), "596.0 M");
    }
}
