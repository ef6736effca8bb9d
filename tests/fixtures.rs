//! The fixtures are whole, and what is derived from them is what their generator would have written.

mod support;

use std::collections::{BTreeSet, HashMap};
use std::env;
use std::fs;
use std::path::Path;

use candle_core::{DType, Tensor};
use serde_json::Value;

/// A tensor's dtype, shape and bits.
fn exactly(tensor: &Tensor) -> (DType, Vec<usize>, Vec<u32>) {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F32).unwrap();
    let bits = flat.to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect();
    (tensor.dtype(), tensor.dims().to_vec(), bits)
}

fn assert_same_tensors(name: &str, got: &HashMap<String, Tensor>, want: &HashMap<String, Tensor>) {
    let names = |tensors: &HashMap<String, Tensor>| tensors.keys().cloned().collect::<BTreeSet<_>>();
    assert_eq!(names(got), names(want), "{name}");
    for (tensor, want) in want {
        assert!(exactly(&got[tensor]) == exactly(want), "{name}: {tensor} differs");
    }
}

fn json(file: &Path) -> Value {
    let bytes = fs::read(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

fn shards(folder: &Path) -> HashMap<String, Tensor> {
    let index = json(&folder.join("model.safetensors.index.json"));
    let map = index["weight_map"].as_object().unwrap();
    let files: BTreeSet<&str> = map.values().map(|file| file.as_str().unwrap()).collect();
    let mut all = HashMap::new();
    for file in files {
        for (name, tensor) in support::tensors(&folder.join(file)) {
            assert_eq!(map[&name], file, "{name}");
            assert!(all.insert(name, tensor).is_none());
        }
    }
    assert_eq!(all.len(), map.len());
    all
}

#[test]
fn every_fixture_is_whole_and_free_of_templates() {
    let fixtures = support::fixtures();
    assert!(fixtures.len() >= 13, "{} fixtures", fixtures.len());
    for fixture in fixtures {
        let name = fixture.display();
        let config = json(&fixture.join("f32/config.json"));
        let arrays = support::reference(&fixture);
        let reference = json(&fixture.join("reference.json"));
        assert!(reference["tokenizer_cases"].as_array().is_some_and(|cases| cases.len() > 10), "{name}");
        assert!(reference.get("chat").is_none(), "{name}: renderings of a template that is not ours");
        assert!(json(&fixture.join("f32/tokenizer_config.json")).get("chat_template").is_none(), "{name}");
        assert!(!fixture.join("f32/chat_template.jinja").exists(), "{name}");
        if reference["family"] == "bge_m3" || reference["family"] == "qwen3_embedding" {
            let texts = reference["ids"].as_array().map_or(0, Vec::len);
            assert!(texts > 3 && arrays["batch.dense"].dim(0).unwrap() == texts, "{name}");
            continue;
        }
        for prompt in ["one", "short", "mid", "long"] {
            let ids = arrays[&format!("{prompt}.ids")].dims1().unwrap();
            for kind in ["logits", "bf16w.logits", "bf16.logits"] {
                let (rows, _) = arrays[&format!("{prompt}.{kind}")].dims2().unwrap();
                assert!(rows == ids || (8..ids).contains(&rows), "{name}: {prompt}.{kind} has {rows} rows");
            }
            for kind in ["greedy", "greedy_margin", "bf16w.greedy"] {
                assert_eq!(arrays[&format!("{prompt}.{kind}")].dims(), [32], "{name}: {prompt}.{kind}");
            }
        }
        let layers = &config.get("text_config").unwrap_or(&config)["num_hidden_layers"];
        assert!(arrays.contains_key(&format!("short.hidden.{layers}")), "{name}");
        assert_eq!(arrays["batch.ids"].dims(), arrays["batch.mask"].dims(), "{name}");
    }
}

#[test]
fn derived_checkpoints_hold_the_same_weights() {
    let folder = support::fixture("qwen3_5", "base", 0).join("f32");
    let stored = support::tensors(&folder.join("model.safetensors"));
    assert_same_tensors("sharded", &shards(support::derive_sharded(&folder, 3).path()), &stored);

    let derived = support::derive_bf16(&folder);
    let rounded = support::tensors(&derived.path().join("model.safetensors"));
    let kept: BTreeSet<&str> = rounded
        .iter()
        .filter(|(_, tensor)| tensor.dtype() == DType::F32)
        .map(|(name, _)| name.rsplit_once("linear_attn.").expect("only these stay f32").1)
        .collect();
    assert_eq!(Vec::from_iter(kept), ["A_log", "norm.weight"]);
    assert_eq!(json(&derived.path().join("config.json"))["text_config"]["dtype"], "bfloat16");
}

/// Against everything that `make_reference.py` left in the folder that `TAPER_REFERENCE` names.
#[test]
fn derived_checkpoints_are_the_generators_own() {
    let Some(root) = env::var_os("TAPER_REFERENCE") else {
        println!("skipped: TAPER_REFERENCE names no folder that make_reference.py wrote");
        return;
    };
    let mut compared = 0;
    for folder in support::folders(Path::new(&root)) {
        let name = folder.display().to_string();
        if json(&folder.join("reference.json"))["family"] == "bge_m3" {
            println!("skipped: {name} rounds every tensor, as no decoder does");
            continue;
        }
        let bf16 = support::derive_bf16(&folder.join("f32"));
        let weights = |folder: &Path| support::tensors(&folder.join("model.safetensors"));
        assert_same_tensors(&name, &weights(bf16.path()), &weights(&folder.join("bf16")));
        assert_eq!(json(&bf16.path().join("config.json")), json(&folder.join("bf16/config.json")), "{name}");

        let sharded = support::derive_sharded(&folder.join("f32"), 3);
        assert_same_tensors(&name, &shards(sharded.path()), &shards(&folder.join("f32-sharded")));
        let index = |folder: &Path| json(&folder.join("model.safetensors.index.json"));
        assert_eq!(index(sharded.path()), index(&folder.join("f32-sharded")), "{name}");
        compared += 1;
    }
    assert!(compared > 0, "nothing to compare in {}", Path::new(&root).display());
}
