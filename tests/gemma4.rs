//! The layouts of Gemma 4 that no fixture has, derived from the one that there is, and what is refused.

mod support;

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use models::{CacheSpec, Checkpoint, Config};
use serde_json::{Value, json};
use tempfile::TempDir;

fn derive(change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) -> TempDir {
    support::derive(&support::fixture("gemma4", "base", 0).join("f32"), change)
}

fn agrees(folder: &TempDir) {
    support::assert_agrees(folder.path(), &support::fixture("gemma4", "base", 0));
}

#[test]
fn a_flat_checkpoint_is_the_nested_one() {
    agrees(&derive(|tensors, config| {
        let nested = std::mem::take(tensors).into_iter();
        let text = nested.filter(|(name, _)| name.starts_with("model.language_model."));
        tensors.extend(text.map(|(name, tensor)| (name.replace("model.language_model.", "model."), tensor)));
        *config = config["text_config"].take();
    }));
}

#[test]
fn keys_and_values_that_sharing_layers_keep_are_passed_over() {
    agrees(&derive(|tensors, _| {
        for name in ["k_proj.weight", "v_proj.weight", "k_norm.weight"] {
            let unused = Tensor::zeros((3, 5), DType::F32, &Device::Cpu).expect("memory");
            tensors.insert(format!("model.language_model.layers.7.self_attn.{name}"), unused);
        }
    }));
}

#[test]
fn tensors_that_nothing_uses_are_refused() {
    let folder = derive(|tensors, _| {
        let name = "model.language_model.layers.7.self_attn.v_norm.weight";
        tensors.insert(name.into(), Tensor::zeros(5, DType::F32, &Device::Cpu).expect("memory"));
    });
    let error = support::load_model(folder.path(), None).expect_err("a tensor too many");
    assert!(error.contains("layers.7.self_attn.v_norm.weight"), "{error}");
    let folder = derive(|tensors, _| {
        tensors.remove("model.language_model.layers.3.self_attn.v_proj.weight").expect("an owning layer");
    });
    let error = support::load_model(folder.path(), None).expect_err("a tensor too few");
    assert!(error.contains("no tensor model.language_model.layers.3.self_attn.v_proj.weight"), "{error}");
}

#[test]
fn values_that_are_not_supported_are_refused() {
    let cases = [
        ("attention_k_eq_v", json!(true)),
        ("attention_bias", json!(true)),
        ("enable_moe_block", json!(true)),
        ("use_bidirectional_attention", json!("all")),
        ("hidden_activation", json!("silu")),
        ("per_layer_config", json!({ "2": { "head_dim": 32 } })),
        ("layer_types", json!(["sliding_attention", "chunked_attention"])),
        ("layer_types", json!(["sliding_attention"])),
        ("num_kv_shared_layers", json!(10)),
        ("num_kv_shared_layers", json!(9)),
        ("num_key_value_heads", json!(3)),
        ("sliding_window", json!(0)),
        ("final_logit_softcapping", json!(-30.0)),
        ("vocab_size_per_layer_input", json!(100)),
        ("rope_parameters", json!({ "full_attention": { "rope_type": "yarn" } })),
        ("rope_parameters", json!({ "sliding_attention": { "rope_type": "proportional" } })),
        ("rope_parameters", json!({ "sliding_attention": { "rope_theta": -1.0 } })),
    ];
    for (field, value) in cases {
        let folder = derive(|_, config| config["text_config"][field] = value.clone());
        let error = support::load_model(folder.path(), None).expect_err(field);
        assert!(error.contains("config.json"), "{field} {value}: {error}");
    }
    let folder = derive(|_, config| config["text_config"]["use_bidirectional_attention"] = json!("vision"));
    assert_eq!(support::load_model(folder.path(), None), Ok(()));
}

/// The configuration of E4B: wider, two key heads, every sixth layer full, single-width MLPs.
#[test]
fn the_larger_model_is_described() {
    let folder = derive(|_, config| {
        let text = &mut config["text_config"];
        for (field, value) in [
            ("hidden_size", json!(2560)),
            ("intermediate_size", json!(10240)),
            ("num_hidden_layers", json!(42)),
            ("num_attention_heads", json!(8)),
            ("num_key_value_heads", json!(2)),
            ("num_kv_shared_layers", json!(18)),
            ("use_double_wide_mlp", json!(false)),
            ("head_dim", json!(256)),
            ("global_head_dim", json!(512)),
            ("sliding_window", json!(512)),
            ("layer_types", json!(null)),
        ] {
            text[field] = value;
        }
    });
    let description = Config::read(&Checkpoint::Folder(folder.path().into())).expect("supported").describe();
    let specs = description.cache_specs;
    let full: Vec<usize> = (0..24).filter(|&layer| (layer + 1) % 6 == 0).collect();
    assert_eq!(specs.len(), 42);
    for (layer, spec) in specs.into_iter().enumerate() {
        let expected = match layer {
            24.. => CacheSpec::None,
            _ if full.contains(&layer) => CacheSpec::KeyValue { num_kv_heads: 2, head_dim: 512, window: None },
            _ => CacheSpec::KeyValue { num_kv_heads: 2, head_dim: 256, window: Some(512) },
        };
        assert_eq!(spec, expected, "layer {layer}");
    }
}
