//! Every committed fixture through [`taper::verify`]: logits, hidden states, batch rows and greedy ids of transformers
//! 5.23, on f32 weights under f32 and bf16 activations, the same in shards and with single experts, and on bf16 weights.

mod support;

use std::path::Path;

use candle_core::{DType, Device};
use models::Checkpoint;
use taper::verify::{Report, verify};

fn check(folder: &Path, reference: &Path, dtype: DType) -> Report {
    let name = format!("{} {dtype:?}", folder.display());
    let report = verify(&Checkpoint::Folder(folder.into()), reference, dtype, &Device::Cpu)
        .unwrap_or_else(|error| panic!("{name}: {error}"));
    let failed: Vec<_> = report.entries.iter().filter(|entry| !entry.passed).collect();
    assert!(report.passed(), "{name}: {failed:#?}");
    report
}

#[test]
fn fixtures_agree_with_transformers() {
    let mut compared = 0;
    for fixture in support::fixtures() {
        let reference = fixture.join("reference.safetensors");
        compared += check(&fixture.join("f32"), &reference, DType::F32).entries.len();
        compared += check(&fixture.join("f32"), &reference, DType::BF16).entries.len();
        let sharded = support::derive_sharded(&fixture.join("f32"), 3);
        check(sharded.path(), &reference, DType::F32);
        if let Some(unfused) = support::derive_unfused(&fixture.join("f32")) {
            check(unfused.path(), &reference, DType::F32);
        }
        let bf16 = support::derive_bf16(&fixture.join("f32"));
        compared += check(bf16.path(), &reference, DType::F32).entries.len();
        compared += check(bf16.path(), &reference, DType::BF16).entries.len();
    }
    assert!(compared > 300, "{compared} arrays compared");
}

#[test]
fn a_wrong_reference_fails() {
    let fixture = support::fixture("qwen3_5", "flat", 0);
    let mut tensors = support::reference(&fixture);
    let name = "short.logits";
    tensors.insert(name.into(), (&tensors[name] + 0.01).expect("a float tensor"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("reference.safetensors");
    candle_core::safetensors::save(&tensors, &path).expect("writable");
    let report = verify(&Checkpoint::Folder(fixture.join("f32")), &path, DType::F32, &Device::Cpu).expect("runs");
    let failed: Vec<_> = report.entries.iter().filter(|entry| !entry.passed).map(|entry| entry.name.as_str()).collect();
    assert_eq!(failed, [name]);
}

/// In bf16 the lengths of an encoder's vectors are compared by themselves: their directions stay as they are here.
#[test]
fn a_wrong_length_fails() {
    let fixture = support::fixture("bge_m3", "base", 0);
    let bf16 = support::derive_bf16(&fixture.join("f32"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("reference.safetensors");
    for head in ["pooled", "dense", "colbert", "sparse"] {
        let mut tensors = support::reference(&fixture);
        let json = std::fs::read(fixture.join("reference.json")).expect("a fixture");
        let mut json: serde_json::Value = serde_json::from_slice(&json).expect("a fixture");
        // What transformers makes of it in bf16 sets the limit, so both are off by as much.
        for precision in ["bf16w", "bf16"] {
            if let Some(tensor) = tensors.get_mut(&format!("1.{precision}.{head}")) {
                *tensor = (&*tensor * 1.02).expect("a float tensor");
            }
            let weights = json[format!("{precision}.sparse")][1].as_object_mut().expect("weights");
            for weight in weights.values_mut().filter(|_| head == "sparse") {
                *weight = (1.02 * weight.as_f64().expect("a number")).into();
            }
        }
        candle_core::safetensors::save(&tensors, &path).expect("writable");
        std::fs::write(path.with_extension("json"), json.to_string()).expect("writable");
        let report = verify(&Checkpoint::Folder(bf16.path().into()), &path, DType::BF16, &Device::Cpu).expect("runs");
        let failed: Vec<_> = report.entries.iter().filter(|entry| !entry.passed).map(|entry| &entry.name).collect();
        assert_eq!(failed, [&format!("1.bf16w.{head} norm"), &format!("batch.1.bf16w.{head} norm")]);
    }
}
