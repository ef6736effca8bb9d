//! What the sparse models' fixture does not show by itself: other layouts, packed experts, and what is refused.

mod support;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use models::{Checkpoint, Config, ExpertCount, Quantization};
use serde_json::{Value, json};
use taper::verify::verify;
use tempfile::TempDir;

const EXPERTS: &str = "model.language_model.layers.1.mlp.experts";

fn derive(change: impl FnOnce(&mut HashMap<String, Tensor>, &mut Value)) -> TempDir {
    support::derive(&support::fixture("qwen3_5_moe", "base", 4).join("f32"), change)
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).expect("memory")
}

fn agrees(folder: &TempDir) {
    support::assert_agrees(folder.path(), &support::fixture("qwen3_5_moe", "base", 4));
}

#[test]
fn a_flat_checkpoint_is_the_nested_one() {
    agrees(&derive(|tensors, config| {
        let nested = std::mem::take(tensors).into_iter();
        tensors.extend(nested.map(|(name, tensor)| (name.replace("model.language_model.", "model."), tensor)));
        *config = config["text_config"].take();
        assert_eq!(config["model_type"], "qwen3_5_moe_text");
    }));
}

#[test]
fn prediction_heads_and_towers_are_passed_over() {
    agrees(&derive(|tensors, _| {
        for name in ["mtp.layers.0.mlp.experts.gate_up_proj", "mtp.fc.weight", "model.visual.pos_embed.weight"] {
            tensors.insert(name.into(), zeros(&[2, 3, 5]));
        }
    }));
}

#[test]
fn stacks_of_other_sizes_are_refused() {
    let gate_up = format!("{EXPERTS}.gate_up_proj");
    let cases: [(&[usize], &str); 3] = [
        (&[7, 32, 48], "no tensor model.language_model.layers.1.mlp.experts.gate_up_proj.7, expected [32, 48]"),
        (&[9, 32, 48], "does not use: model.language_model.layers.1.mlp.experts.gate_up_proj [9, 32, 48]"),
        (&[8, 30, 48], "gate_up_proj.0 is [30, 48], expected [32, 48]"),
    ];
    for (shape, expected) in cases {
        let folder = derive(|tensors, _| {
            tensors.insert(gate_up.clone(), zeros(shape)).expect("a stack");
        });
        for quantization in [None, Some(Quantization::Q8)] {
            let error = support::load_model(folder.path(), quantization).expect_err(expected);
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn values_that_do_not_fit_are_refused() {
    for (field, value, expected) in [
        ("num_experts_per_tok", json!(9), "num_experts_per_tok is 9 of 8"),
        ("num_experts_per_tok", json!(0), "num_experts_per_tok: 0"),
        ("num_experts", json!(null), "num_experts"),
        ("moe_intermediate_size", json!("16"), "moe_intermediate_size"),
        ("hidden_act", json!("gelu"), "hidden_act"),
    ] {
        let folder = derive(|_, config| config["text_config"][field] = value.clone());
        let error = support::load_model(folder.path(), None).expect_err(field);
        assert!(error.contains("config.json") && error.contains(expected), "{field} {value}: {error}");
    }
    let folder = derive(|_, config| config["model_type"] = json!("qwen3_5"));
    let error = support::load_model(folder.path(), None).expect_err("a sparse configuration under the dense name");
    assert!(error.contains("missing field `intermediate_size`"), "{error}");
}

#[test]
fn the_published_model_is_described() {
    let folder = derive(|_, config| {
        let text = &mut config["text_config"];
        (text["num_experts"], text["num_experts_per_tok"]) = (json!(256), json!(8));
    });
    let description = Config::read(&Checkpoint::Folder(folder.path().into())).expect("supported").describe();
    assert_eq!(description.family, "Qwen3.5 MoE");
    assert_eq!(description.experts, Some(ExpertCount { total: 256, per_token: 8 }));
}

/// Packing refuses an infinite weight, so what may hold one is not packed.
#[test]
fn routers_and_the_shared_gate_are_not_packed() {
    let infinite = |tensors: &mut HashMap<String, Tensor>, name: &str| {
        let tensor = &tensors[name];
        let large = tensor.ones_like().and_then(|ones| ones * f64::INFINITY).expect("memory");
        tensors.insert(name.into(), large);
    };
    for quantization in [Quantization::Q8, Quantization::Q4] {
        let folder = derive(|tensors, _| {
            infinite(tensors, "model.language_model.layers.1.mlp.gate.weight");
            infinite(tensors, "model.language_model.layers.1.mlp.shared_expert_gate.weight");
        });
        assert_eq!(support::load_model(folder.path(), Some(quantization)), Ok(()));
        for name in ["experts.down_proj", "shared_expert.down_proj.weight"] {
            let name = format!("model.language_model.layers.1.mlp.{name}");
            let folder = derive(|tensors, _| infinite(tensors, &name));
            let error = support::load_model(folder.path(), Some(quantization)).expect_err(&name);
            assert!(error.contains("infinite"), "{name}: {error}");
        }
    }
}

#[test]
fn single_experts_are_packed_like_stacked_ones() {
    let fixture = support::fixture("qwen3_5_moe", "base", 4).join("f32");
    let unfused = support::derive_unfused(&fixture).expect("it has experts");
    for quantization in [None, Some(Quantization::Q8), Some(Quantization::Q4)] {
        let prompt: Vec<u32> = (0..40).collect();
        let bits = |folder: &Path| {
            let logits = support::logits(folder, &prompt, quantization, DType::F32);
            logits.into_iter().map(f32::to_bits).collect::<Vec<_>>()
        };
        assert_eq!(bits(unfused.path()), bits(&fixture), "{quantization:?}");
    }
}

/// Two experts that the router cannot tell apart, and the same two in the other order.
#[test]
fn a_tie_between_experts_excuses_what_follows_and_nothing_before() {
    let swap = |tensors: &mut HashMap<String, Tensor>, name: &str, order: [u32; 8]| {
        let order = Tensor::new(&order, &Device::Cpu).expect("memory");
        let swapped = tensors[name].index_select(&order, 0).expect("eight experts");
        tensors.insert(name.into(), swapped);
    };
    let router = "model.language_model.layers.1.mlp.gate.weight";
    let tied = derive(|tensors, _| swap(tensors, router, [0, 0, 2, 3, 4, 5, 6, 7]));
    let swapped = support::derive(tied.path(), |tensors, _| {
        for name in ["gate_up_proj", "down_proj"] {
            swap(tensors, &format!("{EXPERTS}.{name}"), [1, 0, 2, 3, 4, 5, 6, 7]);
        }
    });
    let run = |folder: &TempDir, reference: &Path| {
        let checkpoint = Checkpoint::Folder(folder.path().into());
        verify(&checkpoint, reference, DType::F32, &Device::Cpu).expect("a reference")
    };
    let fixture = support::fixture("qwen3_5_moe", "base", 4);
    let mut reference = support::reference(&fixture);
    reference.retain(|name, _| name.ends_with(".ids") || name == "batch.mask" || name.ends_with(".greedy"));
    reference.extend(run(&tied, &fixture.join("reference.safetensors")).computed);
    let path = tied.path().join("reference.safetensors");
    candle_core::safetensors::save(&reference, &path).expect("writable");

    let report = run(&swapped, &path);
    assert!(report.passed(), "{:#?}", report.entries);
    let excused = report.entries.iter().find(|entry| entry.limit.contains(" rows: then experts tie"));
    let name = &excused.unwrap_or_else(|| panic!("no array notices: {:#?}", report.entries)).name;

    let rows = reference[name].dim(0).expect("rows");
    let first = (Tensor::zeros((rows, 1), DType::F32, &Device::Cpu))
        .and_then(|zeros| zeros.slice_assign(&[0..1, 0..1], &Tensor::full(0.01f32, (1, 1), &Device::Cpu)?))
        .and_then(|first| reference[name].broadcast_add(&first));
    reference.insert(name.clone(), first.expect("memory"));
    candle_core::safetensors::save(&reference, &path).expect("writable");
    let failed: Vec<_> = run(&swapped, &path).entries.into_iter().filter(|entry| !entry.passed).collect();
    assert!(failed.len() == 1 && failed[0].name == *name, "{failed:#?}");
}
