//! The whole answer of a Mac, in one command: `cargo test --release --features metal`. The kernels' own tests compare each
//! op with its reference on the GPU; these compare each family with transformers, and the engine with itself on the CPU.
//! Without a GPU they say that they skip.
#![cfg(all(feature = "metal", feature = "demo"))]

mod support;

use candle_core::{DType, Device};
use models::Quantization;
use taper::{DeviceChoice, EngineOptions, Options, SamplingParams};

fn gpu() -> Option<Device> {
    let device = DeviceChoice::Metal.open();
    if let Err(error) = &device {
        eprintln!("skipped: {error}");
    }
    device.ok()
}

#[test]
fn every_family_agrees_with_transformers() {
    let Some(device) = gpu() else { return };
    support::assert_fixtures_agree(&device);
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
