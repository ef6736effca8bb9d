//! The whole answer of a Mac, in one command: `cargo test --release --features metal`. The kernels' own tests compare each
//! op with its reference on the GPU; these compare each family with transformers, and the engine with itself on the CPU.
//! Without a GPU they say that they skip.
#![cfg(all(feature = "metal", feature = "demo"))]

mod support;

use candle_core::{DType, Device};
use models::{Checkpoint, Quantization};
use taper::verify::{Entry, verify};
use taper::{DeviceChoice, EngineOptions, Options, SamplingParams};

fn gpu() -> Option<Device> {
    let device = DeviceChoice::Metal.open();
    if let Err(error) = &device {
        eprintln!("skipped: {error}");
    }
    device.ok()
}

/// Every committed fixture, all families, in f32 and with bf16 weights and activations. All failures are told at once. The
/// limits of bf16 are transformers' own errors, and a few arrays are as far off on the CPU: those say nothing of Metal.
#[test]
fn every_family_agrees_with_transformers() {
    let Some(device) = gpu() else { return };
    let (mut compared, mut failures) = (0, Vec::new());
    for fixture in support::fixtures() {
        let reference = fixture.join("reference.safetensors");
        let bf16 = support::derive_bf16(&fixture.join("f32"));
        for (folder, dtype) in [(fixture.join("f32"), DType::F32), (bf16.path().into(), DType::BF16)] {
            let name = format!("{} {dtype:?}", fixture.display());
            let checkpoint = Checkpoint::Folder(folder);
            let failed_on = |device: &Device| {
                let report = verify(&checkpoint, &reference, dtype, device)?;
                let failed: Vec<Entry> = report.entries.iter().filter(|entry| !entry.passed).cloned().collect();
                Ok::<_, taper::Error>((report.entries.len(), failed))
            };
            match failed_on(&device) {
                Err(error) => failures.push(format!("{name}: {error}")),
                Ok((len, mut failed)) => {
                    compared += len;
                    if !failed.is_empty() {
                        let (_, elsewhere) = failed_on(&Device::Cpu).expect("the CPU runs every fixture");
                        failed.retain(|entry| !elsewhere.iter().any(|other| other.name == entry.name));
                    }
                    failures.extend(failed.iter().map(|entry| format!("{name}: {entry:?}")));
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {compared} arrays:\n{}", failures.len(), failures.join("\n"));
    assert!(compared > 200, "{compared} arrays compared");
}

#[test]
fn the_demo_knows_its_facts() {
    if gpu().is_none() {
        return;
    }
    for (dtype, quantization) in [(DType::F32, None), (DType::BF16, None), (DType::BF16, Some(Quantization::Q8))] {
        let engine = EngineOptions { max_sequences: 64, ..EngineOptions::default() };
        let device = DeviceChoice::Metal;
        let options = Options { device, dtype: Some(dtype), quantization, engine, ..Options::default() };
        assert_eq!(support::wrong_facts(&options), vec![] as Vec<String>, "{dtype:?}, {quantization:?}");
        // Drawn on the GPU, from one token.
        let drawn = SamplingParams { temperature: 0.5, top_k: Some(1), ..SamplingParams::default() };
        assert_eq!(support::wrong_draws(&options, drawn), vec![] as Vec<String>, "drawn, {dtype:?}, {quantization:?}");
    }
}
