//! Whole-model speed, weights as stored and packed, beside candle-transformers' Qwen3: a prompt of 512 tokens and
//! decoding after it.
//!
//! `cargo bench --bench generate -- FOLDER` with a Qwen3 folder, such as `make_fullsize.py Qwen3-0.6B` writes. Both
//! contenders take the same weights and ids; rounds alternate between them and the median counts, spread beside it.

mod support;

use std::path::PathBuf;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::qwen3::{Config as CandleConfig, ModelForCausalLM};
use models::{Checkpoint, Config, Quantization};
use support::median;
use taper::{Engine, EngineOptions, ModelLimits, Request, SamplingParams};

const PROMPT: usize = 512;
const DECODE: usize = 16;
const ROUNDS: usize = 3;

/// Seconds for the prompt and for each token after it.
type Times = (f64, f64);

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let Some(folder) = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).map(PathBuf::from) else {
        println!("no folder given: cargo bench --bench generate -- FOLDER");
        return Ok(());
    };
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 7919 % 50000).collect();
    let checkpoint = Checkpoint::Folder(folder.clone());
    let config = Config::read(&checkpoint)?;
    let vocab_size = config.describe().vocab_size;
    let mut engines = vec![];
    let mut contenders = vec![];
    for (name, quantization) in
        [("taper", None), ("taper q8", Some(Quantization::Q8)), ("taper q4", Some(Quantization::Q4))]
    {
        let loading = Instant::now();
        let model = config.load_quantized(&checkpoint, DType::F32, &Device::Cpu, quantization)?;
        println!("{name}: loaded in {:.2} s", loading.elapsed().as_secs_f64());
        let limits = ModelLimits { vocab_size, sampled_vocab: vocab_size, max_positions: 4096, stop_ids: vec![] };
        let options = EngineOptions { memory: Some(1 << 30), ..EngineOptions::default() };
        let kv_dtype = taper::kv_dtype(&Device::Cpu, DType::F32, quantization);
        engines.push(Engine::new(model, limits, kv_dtype, &Device::Cpu, &options)?);
        contenders.push((name, vec![]));
    }

    let candle_config: CandleConfig = serde_json::from_slice(&std::fs::read(folder.join("config.json"))?)?;
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu)?;
    let mut candles = vec![];
    for (name, dtype) in [("candle bf16", DType::BF16), ("candle f32", DType::F32)] {
        let weights = VarBuilder::from_tensors(tensors.clone(), dtype, &Device::Cpu);
        candles.push(ModelForCausalLM::new(&candle_config, weights)?);
        contenders.push((name, vec![]));
    }
    for round in 0..ROUNDS {
        for (engine, (_, times)) in engines.iter_mut().zip(&mut contenders) {
            times.push(ours(engine, &prompt, round as u32)?);
        }
        for (candle, (_, times)) in candles.iter_mut().zip(&mut contenders[engines.len()..]) {
            times.push(theirs(candle, &prompt)?);
        }
    }
    println!("{:<22} {:>14} {:>8} {:>14} {:>8}", "", "prompt tok/s", "spread", "decode tok/s", "spread");
    for (name, times) in &contenders {
        let (prompt, prompt_spread) = median(times.iter().map(|times| times.0));
        let (decode, decode_spread) = median(times.iter().map(|times| times.1));
        println!(
            "{name:<22} {:>14.1} {:>7.0}% {:>14.2} {:>7.0}%",
            PROMPT as f64 / prompt,
            prompt_spread * 100.0,
            1.0 / decode,
            decode_spread * 100.0
        );
    }
    Ok(())
}

/// A different first token each round, so that no prefix is in the cache.
fn ours(engine: &mut Engine, prompt: &[u32], round: u32) -> Result<Times, AnyError> {
    let mut prompt = prompt.to_vec();
    prompt[0] = 50001 + round;
    let params = SamplingParams { max_tokens: DECODE + 1, ..SamplingParams::default() };
    engine.add(Request { prompt, stable_len: 0, params })?;
    let start = Instant::now();
    let mut first = None;
    while !engine.is_idle() {
        for output in engine.step()? {
            output.token?;
            first.get_or_insert_with(|| start.elapsed().as_secs_f64());
        }
    }
    let first = first.ok_or("no token")?;
    Ok((first, (start.elapsed().as_secs_f64() - first) / DECODE as f64))
}

fn theirs(model: &mut ModelForCausalLM, prompt: &[u32]) -> Result<Times, AnyError> {
    model.clear_kv_cache();
    let row = |ids: &[u32]| Tensor::new(ids, &Device::Cpu)?.unsqueeze(0);
    let next = |logits: Tensor| logits.flatten_all()?.to_dtype(DType::F32)?.argmax(D::Minus1)?.to_scalar::<u32>();
    let start = Instant::now();
    let mut token = next(model.forward(&row(prompt)?, 0)?)?;
    let first = start.elapsed().as_secs_f64();
    for step in 0..DECODE {
        token = next(model.forward(&row(&[token])?, prompt.len() + step)?)?;
    }
    Ok((first, (start.elapsed().as_secs_f64() - first) / DECODE as f64))
}
