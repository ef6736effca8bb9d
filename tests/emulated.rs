//! Whole models on Metal's kernels without a Mac: each family's fixture on the CPU, where every op that has a Metal kernel
//! runs it through the emulator, compared with transformers. What an op of its own cannot show is shown here: that models
//! call them with what they take, in an order that works.
//!
//! Only built with `--features emulator`; says that it skips where the emulator is not to be had. On a Mac,
//! `tests/metal.rs` runs the same on the GPU.

mod support;

use std::collections::BTreeSet;

use candle_core::{DType, Device, Error};
use kernels::testing::{emulated, launched};
use models::Checkpoint;
use support::{derive_bf16, fixture};
use taper::verify::verify;

/// What all language models run, whatever the dtype and variant.
const DECODER: [&str; 6] = ["gather", "rms_norm", "rotations", "norm_rope_write", "attention_rows", "linear"];

/// Runs a fixture and asks whether it ran these kernels.
fn agrees(family: &str, variant: &str, seed: u32, expected: &[&str]) {
    let fixture = fixture(family, variant, seed);
    let reference = fixture.join("reference.safetensors");
    let bf16 = derive_bf16(&fixture.join("f32"));
    emulated(|| {
        for (folder, dtype) in [(fixture.join("f32"), DType::F32), (bf16.path().into(), DType::BF16)] {
            let report = verify(&Checkpoint::Folder(folder), &reference, dtype, &Device::Cpu).map_err(Error::wrap)?;
            let failed: Vec<_> = report.entries.iter().filter(|entry| !entry.passed).collect();
            assert!(failed.is_empty(), "{family} {dtype:?}: {failed:?}");
            let launched = launched();
            let missing = expected.iter().filter(|kernel| !launched.iter().any(|name| name.starts_with(**kernel)));
            let missing: BTreeSet<_> = missing.collect();
            assert!(missing.is_empty(), "{family} {dtype:?}: {missing:?} not among {launched:?}");
        }
        Ok(())
    })
    .expect(family);
}

#[test]
fn qwen3() {
    agrees("qwen3", "base", 0, &[&DECODER[..], &["silu_gated"]].concat());
}

#[test]
fn qwen3_5() {
    agrees(
        "qwen3_5",
        "base",
        0,
        &[&DECODER[..], &["silu_gated", "causal_conv1d", "gates", "gated_delta_rule", "sigmoid_gated"]].concat(),
    );
}

#[test]
fn qwen3_5_moe() {
    agrees(
        "qwen3_5_moe",
        "base",
        4,
        &[&DECODER[..], &["causal_conv1d", "gated_delta_rule", "moe_route", "moe_combine"]].concat(),
    );
}

#[test]
fn gemma4() {
    agrees("gemma4", "base", 0, &[&DECODER[..], &["gelu_tanh_gated", "softcap"]].concat());
}

#[test]
fn bge_m3() {
    agrees("bge_m3", "base", 0, &["gather", "add_layer_norm", "attention_rows", "linear", "gelu"]);
}
