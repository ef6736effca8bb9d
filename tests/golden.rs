//! Every committed fixture through [`taper::verify`]: logits, hidden states, batch rows and greedy ids of transformers
//! 5.23, on f32 weights, the same in shards and with single experts, and bf16 weights under f32 and bf16 activations.

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
