//! The fixtures, and the other forms of a checkpoint that are derived from them instead of being stored.

#![allow(dead_code, reason = "each test binary uses its own part")]

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::safetensors::{load, save};
use candle_core::{DType, Device, Tensor};
use kernels::{Batch, Segment};
use models::{Cache, CacheConfig, Checkpoint, Config, Quantization};
use serde_json::{Value, json};
use taper::verify::verify;
#[cfg(feature = "demo")]
use taper::{Llm, Message, Options, SamplingParams};
use tempfile::TempDir;

/// Loads a language model, packed or not, for what loading says.
pub fn load_model(folder: &Path, quantization: Option<Quantization>) -> Result<(), String> {
    let checkpoint = Checkpoint::Folder(folder.into());
    let config = Config::read(&checkpoint).map_err(|error| error.to_string())?;
    let model = config.load_quantized(&checkpoint, DType::F32, &Device::Cpu, quantization);
    model.map(|_| ()).map_err(|error| error.to_string())
}

/// The logits of every token of `prompt`, with keys and values in `pages`.
pub fn logits(folder: &Path, prompt: &[u32], quantization: Option<Quantization>, pages: DType) -> Vec<f32> {
    let checkpoint = Checkpoint::Folder(folder.into());
    let config = Config::read(&checkpoint).expect("a fixture");
    let model = config.load_quantized(&checkpoint, DType::F32, &Device::Cpu, quantization).expect("a fixture");
    let cache_config = CacheConfig {
        num_blocks: 1,
        num_window_blocks: 1,
        block_size: prompt.len(),
        num_slots: 1,
        dtype: pages,
        device: Device::Cpu,
    };
    let mut cache = Cache::new(&model.cache_specs(), cache_config).expect("memory");
    let segment = Segment { tokens: prompt, past: 0, blocks: &[0], slot: 0 };
    let batch = Batch::new(&[segment], prompt.len(), &Device::Cpu).expect("a batch");
    let hidden = model.forward(&batch, &mut cache).expect("a step");
    model.logits(&hidden).and_then(|logits| logits.flatten_all()?.to_vec1()).expect("logits")
}

/// Asserts that a checkpoint computes what `fixture` says.
pub fn assert_agrees(folder: &Path, fixture: &Path) {
    let reference = fixture.join("reference.safetensors");
    let report = verify(&Checkpoint::Folder(folder.into()), &reference, DType::F32, &Device::Cpu);
    assert!(report.expect("a reference").passed());
}

/// Asserts that every fixture computes on a GPU what transformers does, in f32 and in bf16. All failures are told at once.
pub fn assert_fixtures_agree(device: &Device) {
    let (mut compared, mut failures) = (0, Vec::new());
    for fixture in fixtures() {
        let (f32, bf16) = (fixture.join("f32"), derive_bf16(&fixture.join("f32")));
        for (folder, dtype) in [(&*f32, DType::F32), (&f32, DType::BF16), (bf16.path(), DType::BF16)] {
            let name = format!("{} {dtype:?}", folder.display());
            match verify(&Checkpoint::Folder(folder.into()), &fixture.join("reference.safetensors"), dtype, device) {
                Err(error) => failures.push(format!("{name}: {error}")),
                Ok(report) => {
                    compared += report.entries.len();
                    let failed = report.entries.iter().filter(|entry| !entry.passed);
                    failures.extend(failed.map(|entry| format!("{name}: {entry:?}")));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {compared} arrays:\n{}", failures.len(), failures.join("\n"));
    assert!(compared > 300, "{compared} arrays compared");
}

/// The questions that the demo, loaded so, does not answer word for word.
#[cfg(feature = "demo")]
pub fn wrong_facts(options: &Options) -> Vec<String> {
    wrong_draws(options, SamplingParams { temperature: 0.0, ..SamplingParams::default() })
}

/// As [`wrong_facts`], with tokens chosen so.
#[cfg(feature = "demo")]
pub fn wrong_draws(options: &Options, params: SamplingParams) -> Vec<String> {
    let facts: Vec<Value> = serde_json::from_str(include_str!("../../examples/demo/chat/facts.json")).expect("JSON");
    assert_eq!(facts.len(), 233);
    let text = |fact: &Value, key: &str| fact[key].as_str().expect("a string").to_string();
    let questions: Vec<Vec<Message>> = facts.iter().map(|fact| vec![Message::user(text(fact, "question"))]).collect();
    let mut llm = Llm::demo(options).expect("the demo is built in");
    let params = SamplingParams { max_tokens: 200, ..params };
    let mut replies = llm.reply_all(&questions, &params).expect("valid requests");
    for piece in &mut replies {
        piece.expect("a piece");
    }
    let wrong = facts.iter().enumerate().filter(|(index, fact)| replies.reply(*index).content != text(fact, "answer"));
    wrong.map(|(index, fact)| format!("{} {}", text(fact, "question"), replies.reply(index).content)).collect()
}

/// The folder of one fixture: `f32/` (a checkpoint), `reference.safetensors`, `reference.json`.
pub fn fixture(family: &str, variant: &str, seed: u32) -> PathBuf {
    let folder = root().join(format!("{family}-{variant}-s{seed}"));
    assert!(folder.is_dir(), "no fixture {}", folder.display());
    folder
}

/// Every fixture's folder, by name.
pub fn fixtures() -> Vec<PathBuf> {
    folders(&root())
}

/// The folders in `root` that hold a reference, by name.
pub fn folders(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).unwrap_or_else(|error| panic!("{}: {error}", root.display()));
    let mut folders: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    folders.retain(|folder| folder.join("reference.json").is_file());
    folders.sort();
    folders
}

/// The arrays that transformers computed for a fixture. A `logits` array with fewer rows than its prompt has ids holds
/// those of the last ones.
pub fn reference(fixture: &Path) -> HashMap<String, Tensor> {
    tensors(&fixture.join("reference.safetensors"))
}

/// The tensors of one safetensors file.
pub fn tensors(file: &Path) -> HashMap<String, Tensor> {
    load(file, &Device::Cpu).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The weights of a checkpoint, from whichever of its files holds them.
pub fn weights(folder: &Path) -> HashMap<String, Tensor> {
    let torch = folder.join("pytorch_model.bin");
    match torch.is_file() {
        true => candle_core::pickle::read_all(&torch).expect("a torch zip").into_iter().collect(),
        false => tensors(&folder.join("model.safetensors")),
    }
}

/// The checkpoint in `folder` with its weights in one safetensors file, under other names.
pub fn derive_renamed(folder: &Path, rename: impl Fn(String) -> String) -> TempDir {
    let derived = copy_but_weights(folder);
    let renamed = weights(folder).into_iter().map(|(name, tensor)| (rename(name), tensor)).collect();
    write(&renamed, &derived.path().join("model.safetensors"));
    derived
}

/// The checkpoint in `folder` with its weights rounded to bf16, but for those that published checkpoints keep in f32.
pub fn derive_bf16(folder: &Path) -> TempDir {
    let derived = copy_but_weights(folder);
    let rounded = weights(folder).into_iter().map(|(name, tensor)| {
        let is_kept = ["linear_attn.A_log", "linear_attn.norm.weight"].iter().any(|kept| name.ends_with(kept));
        let dtype = if is_kept { DType::F32 } else { DType::BF16 };
        (name, tensor.to_dtype(dtype).expect("a float tensor"))
    });
    write(&rounded.collect(), &derived.path().join("model.safetensors"));

    let path = derived.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("copied")).expect("a fixture is valid");
    set_dtype(&mut config);
    if let Some(config) = config.get_mut("text_config") {
        set_dtype(config);
    }
    fs::write(&path, config.to_string()).expect("a temporary folder is writable");
    derived
}

fn set_dtype(config: &mut Value) {
    for name in ["dtype", "torch_dtype"] {
        if let Some(dtype) = config.get_mut(name) {
            *dtype = json!("bfloat16");
        }
    }
}

/// The checkpoint in `folder` with its tensors and configuration changed.
pub fn derive(folder: &Path, change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) -> TempDir {
    let derived = copy_but_weights(folder);
    let mut tensors = tensors(&folder.join("model.safetensors"));
    let path = derived.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("copied")).expect("a fixture is valid");
    change(&mut tensors, &mut config);
    write(&tensors, &derived.path().join("model.safetensors"));
    fs::write(&path, config.to_string()).expect("a temporary folder is writable");
    derived
}

/// The checkpoint in `folder` with the matrices of its experts one by one, as some exports have them; `None` if it has no
/// experts.
pub fn derive_unfused(folder: &Path) -> Option<TempDir> {
    if !weights(folder).keys().any(|name| name.ends_with("experts.gate_up_proj")) {
        return None;
    }
    Some(derive(folder, |tensors, _| {
        let stacks = std::mem::take(tensors).into_iter();
        let (stacks, others): (Vec<_>, Vec<_>) = stacks.partition(|(name, _)| name.contains(".experts."));
        tensors.extend(others);
        for (name, stack) in stacks {
            let (prefix, name) = name.rsplit_once('.').expect("a path");
            for expert in 0..stack.dim(0).expect("a stack") {
                let matrix = stack.get(expert).expect("an expert");
                let parts = matrix.chunk(if name == "gate_up_proj" { 2 } else { 1 }, 0).expect("halves");
                let names = if name == "gate_up_proj" { &["gate_proj", "up_proj"][..] } else { &["down_proj"] };
                for (name, part) in names.iter().zip(parts) {
                    let part = part.contiguous().expect("memory");
                    tensors.insert(format!("{prefix}.{expert}.{name}.weight"), part);
                }
            }
        }
    }))
}

/// The checkpoint in `folder` with its weights dealt out by name to `shards` files.
pub fn derive_sharded(folder: &Path, shards: usize) -> TempDir {
    let derived = copy_but_weights(folder);
    let tensors: BTreeMap<_, _> = weights(folder).into_iter().collect();
    let total_size: usize = tensors.values().map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes()).sum();
    let mut weight_map = BTreeMap::new();
    for shard in 0..shards {
        let file = format!("model-{:05}-of-{shards:05}.safetensors", shard + 1);
        let part: HashMap<_, _> = tensors.clone().into_iter().skip(shard).step_by(shards).collect();
        weight_map.extend(part.keys().map(|name| (name.clone(), file.clone())));
        write(&part, &derived.path().join(file));
    }
    let index = json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    fs::write(derived.path().join("model.safetensors.index.json"), index.to_string()).expect("as above");
    derived
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn copy_but_weights(folder: &Path) -> TempDir {
    let derived = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let file = entry.expect("readable").path();
        if file.extension().is_some_and(|extension| extension != "safetensors" && extension != "bin") {
            fs::copy(&file, derived.path().join(file.file_name().expect("a file"))).expect("copied");
        }
    }
    derived
}

fn write(tensors: &HashMap<String, Tensor>, file: &Path) {
    save(tensors, file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
}
