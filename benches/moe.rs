//! Decode time of sparse models by how many experts they have, and by how many of them a token goes to.
//!
//! `cargo bench --bench moe -- none|q8|q4 FOLDER..` with cuts of Qwen3.5-35B-A3B in their real shape, such as
//! `make_fullsize.py Qwen3.5-35B-A3B --layers 4 --set num_experts=64 --set vocab_size=8192` writes. Every folder is
//! held in memory; rounds go through them in turn, and the median counts, spread beside it. Seconds are those on the
//! clock and those of the process on all its cores, which a busy machine changes less.

mod support;

use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device};
use models::{Checkpoint, Config, ExpertCount, Quantization, weights};
use support::{cpu_seconds, median};
use taper::{Engine, EngineOptions, ModelLimits, Request, SamplingParams};

const PROMPT: usize = 64;
const DECODE: usize = 24;
const ROUNDS: usize = 7;

type AnyError = Box<dyn std::error::Error>;

/// Wall and CPU seconds of a decoded token.
type Times = (f64, f64);

fn main() -> Result<(), AnyError> {
    let mut args = std::env::args().skip(1).filter(|arg| !arg.starts_with("--"));
    let quantization = match args.next().as_deref() {
        Some("none") => None,
        Some("q8") => Some(Quantization::Q8),
        Some("q4") => Some(Quantization::Q4),
        _ => {
            println!("no format and folders given: cargo bench --bench moe -- none|q8|q4 FOLDER..");
            return Ok(());
        }
    };
    let mut contenders = vec![];
    for folder in args {
        contenders.push((Contender::load(Path::new(&folder), quantization)?, vec![]));
    }
    for round in 0..=ROUNDS {
        for (contender, times) in &mut contenders {
            let time = contender.decode(round as u32)?;
            // The first round warms up.
            times.extend((round > 0).then_some(time));
        }
    }
    println!("{:<20} {:>9} {:>12} {:>8} {:>16} {:>8}", "experts", "layers", "wall, ms", "spread", "CPU, ms", "spread");
    for (Contender { name, layers, .. }, times) in &contenders {
        let (wall, wall_spread) = median(times.iter().map(|times| times.0));
        let (cpu, cpu_spread) = median(times.iter().map(|times| times.1));
        println!(
            "{name:<20} {layers:>9} {:>12.2} {:>7.0}% {:>16.2} {:>7.0}%",
            wall * 1e3,
            wall_spread * 100.0,
            cpu * 1e3,
            cpu_spread * 100.0
        );
    }
    Ok(())
}

struct Contender {
    name: String,
    layers: usize,
    vocab_size: usize,
    engine: Engine,
}

impl Contender {
    fn load(folder: &Path, quantization: Option<Quantization>) -> Result<Self, AnyError> {
        let checkpoint = Checkpoint::Folder(folder.into());
        let config = Config::read(&checkpoint)?;
        let description = config.describe();
        let name = match description.experts {
            Some(ExpertCount { total, per_token }) => format!("{per_token} of {total}"),
            None => "dense".into(),
        };
        let loading = Instant::now();
        let model = config.load_quantized(&checkpoint, DType::F32, &Device::Cpu, quantization)?;
        let bytes: usize = weights::tensor_sizes(&checkpoint)?.iter().map(|tensor| tensor.bytes).sum();
        println!("{name}: {:.2} GB of file loaded in {:.1} s", bytes as f64 / 1e9, loading.elapsed().as_secs_f64());
        let vocab_size = description.vocab_size;
        let limits = ModelLimits { vocab_size, sampled_vocab: vocab_size, max_positions: 512, stop_ids: vec![] };
        let options = EngineOptions { memory: Some(1 << 28), ..EngineOptions::default() };
        let kv_dtype = taper::kv_dtype(&Device::Cpu, DType::F32, quantization);
        let engine = Engine::new(model, limits, kv_dtype, &Device::Cpu, &options)?;
        Ok(Self { name, layers: description.cache_specs.len(), vocab_size, engine })
    }

    /// Each round begins with another token, so that no prefix is in the cache, and its tokens go to other experts.
    fn decode(&mut self, round: u32) -> Result<Times, AnyError> {
        let prompt = (0..PROMPT as u32).map(|i| (i * 7919 + round * 104_729) % self.vocab_size as u32).collect();
        let params = SamplingParams {
            max_tokens: DECODE + 1,
            temperature: 1.0,
            seed: Some(u64::from(round)),
            ..SamplingParams::default()
        };
        self.engine.add(Request { prompt, stable_len: 0, params })?;
        let mut start = None;
        while !self.engine.is_idle() {
            for output in self.engine.step()? {
                output.token?;
                start.get_or_insert_with(|| (Instant::now(), cpu_seconds()));
            }
        }
        let (wall, cpu) = start.ok_or("no token")?;
        Ok((wall.elapsed().as_secs_f64() / DECODE as f64, (cpu_seconds() - cpu) / DECODE as f64))
    }
}
