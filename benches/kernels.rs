//! Time per op on the layers of real models, beside what candle's own ops take and what the CPU can do at most.
//!
//! `cargo bench --bench kernels -- linear bf16` runs the rows whose text contains every word given. Each row is
//! warmed up; then rounds go through its contenders in turn, so that a disturbance hits all of them, and the median
//! counts. `spread` is the distance of the quartiles over the median. `ceiling` is the time that the row's bytes and
//! operations take at least, at the read bandwidth and multiply-add rate measured between the rounds, over the
//! median.

use std::cell::Cell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use candle_core::{DType, Device, Result};
use candle_nn::ops::softmax_last_dim;
use candle_nn::{LayerNorm, Module};
use kernels::activation::gelu;
use kernels::attention::{AttentionParams, Mask, attention, paged_attention};
use kernels::linear::linear;
use kernels::moe::{Experts, Stack, route, sparse_mlp};
use kernels::norm::add_layer_norm;
use kernels::probe::{self, Memory, Operands};
use kernels::quantized::{self, Quantization, QuantizedMatrix};
use kernels::softcap::softcap;
use kernels::testing::Random;
use kernels::{Batch, Segment};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    let mut machine = Machine::new();
    println!(
        "{:<34} {:>12} {:>7} {:>8} {:>9} {:>8}   candle",
        "op shape dtype", "time", "spread", "GB/s", "GFLOP/s", "ceiling"
    );
    for case in cases() {
        if words.iter().all(|word| case.name.contains(word.as_str())) {
            case.report(&mut machine)?;
        }
    }
    machine.report();
    Ok(())
}

/// One row of the table. `bytes` are those that must come from memory at least, weights and caches mostly.
struct Case {
    name: String,
    bytes: usize,
    flops: usize,
    /// Builds the operands; returns ours and candle's way to do the same, where candle has one.
    build: Box<dyn Fn() -> Result<Contenders>>,
}

type Run = Box<dyn Fn() -> Result<()>>;

struct Contenders {
    ours: Run,
    candle: Option<Run>,
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (layer, inner, outer) in
        [("qkv", 1024, 4096), ("gate_up", 1024, 6144), ("down", 3072, 1024), ("head", 1024, 151936)]
    {
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            for n in [1, 8, 512] {
                // Only the last token of a sequence needs logits.
                if layer != "head" || n <= 8 {
                    cases.push(linear_case(layer, n, inner, outer, dtype));
                }
            }
        }
    }
    for (layer, inner, outer) in [("gate_up", 1024, 6144), ("down", 3072, 1024), ("head", 1024, 151936)] {
        for format in [Quantization::Q8, Quantization::Q4] {
            for n in [1, 2, 512] {
                if layer != "head" || n == 1 {
                    cases.push(quantized_case(layer, n, inner, outer, format));
                }
            }
        }
    }
    for dtype in [DType::F32, DType::BF16] {
        cases.push(softcap_case(262_144, dtype));
    }
    for (k, num_experts) in [(8, 32), (8, 128), (4, 128), (2, 128)] {
        cases.push(sparse_mlp_case(k, num_experts));
    }
    for (new, past) in [(512, 0), (512, 2048), (1, 2048)] {
        cases.extend([DType::F16, DType::F32].map(|pages| paged_attention_case(new, past, pages)));
    }
    cases.push(attention_case());
    cases.extend([1, 512].map(gelu_case));
    cases.extend([1, 512].map(add_layer_norm_case));
    cases
}

fn linear_case(layer: &str, n: usize, inner: usize, outer: usize, dtype: DType) -> Case {
    Case {
        name: format!("linear {layer} {n}x{inner}x{outer} {}", dtype.as_str()),
        bytes: inner * outer * dtype.size_in_bytes(),
        flops: 2 * n * inner * outer,
        build: Box::new(move || {
            let mut random = Random::new(0);
            let x = random.tensor(&[n, inner], 1.0, dtype, &Device::Cpu)?;
            let weight = random.tensor(&[outer, inner], 0.02, dtype, &Device::Cpu)?;
            let (candle_x, candle_weight) = (x.clone(), weight.t()?);
            // Candle has no bf16 product on the CPU.
            let has_candle = dtype != DType::BF16;
            Ok(Contenders {
                ours: Box::new(move || linear(&x, &weight).map(drop_result)),
                candle: has_candle
                    .then(|| -> Run { Box::new(move || candle_x.matmul(&candle_weight).map(drop_result)) }),
            })
        }),
    }
}

/// Operations are counted as those of the dense product, so beyond the ceiling of f32 where bytes are multiplied faster.
fn quantized_case(layer: &str, n: usize, inner: usize, outer: usize, format: Quantization) -> Case {
    Case {
        name: format!("linear {layer} {n}x{inner}x{outer} {format:?}").to_lowercase(),
        bytes: format.bytes([outer, inner]),
        flops: 2 * n * inner * outer,
        build: Box::new(move || {
            let x = Random::new(0).tensor(&[n, inner], 1.0, DType::F32, &Device::Cpu)?;
            let row = |o: usize, values: &mut [f32]| {
                values.iter_mut().enumerate().for_each(|(i, value)| *value = ((i * 31 + o * 17) % 97) as f32 - 48.0)
            };
            let weight = QuantizedMatrix::pack(format, [outer, inner], row)?;
            Ok(Contenders { ours: Box::new(move || quantized::linear(&x, &weight).map(drop_result)), candle: None })
        }),
    }
}

/// One row of Gemma 4's logits.
fn softcap_case(vocab: usize, dtype: DType) -> Case {
    Case {
        name: format!("softcap 1x{vocab} {}", dtype.as_str()),
        bytes: vocab * dtype.size_in_bytes(),
        flops: 0,
        build: Box::new(move || {
            let x = Random::new(0).tensor(&[1, vocab], 30.0, dtype, &Device::Cpu)?;
            let candle_x = x.clone();
            Ok(Contenders {
                ours: Box::new(move || softcap(&x, 30.0).map(drop_result)),
                candle: Some(Box::new(move || ((&candle_x / 30.0)?.tanh()? * 30.0).map(drop_result))),
            })
        }),
    }
}

/// A prompt or a token of Qwen3-0.6B. Layers beyond the caches' size take turns where keys come from memory.
fn paged_attention_case(new: usize, past: usize, pages: DType) -> Case {
    const BLOCK_SIZE: usize = 16;
    const HQ: usize = 16;
    const HK: usize = 8;
    const D: usize = 128;
    let context = past + new;
    let bytes = 2 * context * HK * D * pages.size_in_bytes();
    Case {
        name: format!("paged_attention {new} after {past} {HQ}:{HK}x{D} {}", pages.as_str()),
        bytes,
        flops: 4 * HQ * D * (new * past + new * (new + 1) / 2),
        build: Box::new(move || {
            let mut random = Random::new(0);
            let blocks: Vec<u32> = (0..context.div_ceil(BLOCK_SIZE) as u32).collect();
            let q = random.tensor(&[new, HQ, D], 1.0, DType::F32, &Device::Cpu)?;
            let kv = random.tensor(&[2, blocks.len(), BLOCK_SIZE, HK, D], 1.0, pages, &Device::Cpu)?;
            let layers = (0..(96usize << 20).div_ceil(bytes)).map(|_| kv.copy()).collect::<Result<Vec<_>>>()?;
            let segment = Segment { tokens: &vec![0; new], past, blocks: &blocks, slot: 0 };
            let batch = Batch::new(&[segment], BLOCK_SIZE, &Device::Cpu)?;
            let params = AttentionParams::causal((D as f32).powf(-0.5));
            let layer = Cell::new(0);
            let ours = move || {
                layer.set((layer.get() + 1) % layers.len());
                paged_attention(&q, &layers[layer.get()], &batch, params).map(drop_result)
            };
            Ok(Contenders { ours: Box::new(ours), candle: None })
        }),
    }
}

/// Eight texts of bge-m3.
fn attention_case() -> Case {
    const TEXTS: usize = 8;
    const TOKENS: usize = 512;
    const HEADS: usize = 16;
    const D: usize = 64;
    Case {
        name: format!("attention {TEXTS}x{TOKENS} {HEADS}x{D} f32"),
        bytes: 4 * 4 * TEXTS * TOKENS * HEADS * D,
        flops: 4 * TEXTS * TOKENS * TOKENS * HEADS * D,
        build: Box::new(|| {
            let mut random = Random::new(0);
            let mut rows = || random.tensor(&[TEXTS * TOKENS, HEADS, D], 1.0, DType::F32, &Device::Cpu);
            let (q, k, v) = (rows()?, rows()?, rows()?);
            let batch = Batch::uncached(&[&[0; TOKENS][..]; TEXTS], &Device::Cpu)?;
            let params =
                AttentionParams { mask: Mask::Bidirectional, ..AttentionParams::causal((D as f32).powf(-0.5)) };
            let ours = move || attention(&q, &k, &v, &batch, params).map(drop_result);
            Ok(Contenders { ours: Box::new(ours), candle: None })
        }),
    }
}

/// One token and experts of Qwen3.5-35B-A3B's size, of which it has 256. Candle's way is a product with all of them.
fn sparse_mlp_case(k: usize, num_experts: usize) -> Case {
    const HIDDEN: usize = 2048;
    const INTERMEDIATE: usize = 512;
    Case {
        name: format!("sparse_mlp 1x{HIDDEN} {k} of {num_experts} f32"),
        bytes: 4 * k * 3 * HIDDEN * INTERMEDIATE,
        flops: 2 * k * 3 * HIDDEN * INTERMEDIATE,
        build: Box::new(move || {
            let mut random = Random::new(0);
            let x = random.tensor(&[1, HIDDEN], 1.0, DType::F32, &Device::Cpu)?;
            let logits = random.tensor(&[1, num_experts], 1.0, DType::F32, &Device::Cpu)?;
            let mut stack = |outer: usize, inner: usize| {
                random.tensor(&[1, outer, inner], 0.02, DType::F32, &Device::Cpu)?.repeat((num_experts, 1, 1))
            };
            let (gate_up, down) = (stack(2 * INTERMEDIATE, HIDDEN)?, stack(HIDDEN, INTERMEDIATE)?);
            let experts = Experts::new(Stack::Dense(gate_up.clone()), Stack::Dense(down.clone()))?;
            let (candle_x, candle_logits) = (x.clone(), logits.clone());
            let candle = move || {
                let p = softmax_last_dim(&candle_logits)?;
                let chosen = p.arg_sort_last_dim(false)?.narrow(1, 0, k)?.contiguous()?;
                let weights = p.gather(&chosen, 1)?;
                let weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
                let weights = p.zeros_like()?.scatter_add(&chosen, &weights, 1)?;
                let flat = gate_up.reshape((num_experts * 2 * INTERMEDIATE, HIDDEN))?;
                let both = candle_x.matmul(&flat.t()?)?.reshape((1, num_experts, 2 * INTERMEDIATE))?;
                let activated =
                    (both.narrow(2, 0, INTERMEDIATE)?.silu()? * both.narrow(2, INTERMEDIATE, INTERMEDIATE)?)?;
                let weighted = activated.broadcast_mul(&weights.unsqueeze(2)?)?.transpose(0, 1)?.contiguous()?;
                weighted.matmul(&down.t()?)?.sum(0).map(drop_result)
            };
            Ok(Contenders {
                ours: Box::new(move || sparse_mlp(&x, &route(&logits, k)?, &experts).map(drop_result)),
                candle: Some(Box::new(candle)),
            })
        }),
    }
}

/// bge-m3's, after the first product of its MLP.
fn gelu_case(n: usize) -> Case {
    const WIDTH: usize = 4096;
    Case {
        name: format!("gelu {n}x{WIDTH} f32"),
        bytes: 2 * 4 * n * WIDTH,
        flops: 0,
        build: Box::new(move || {
            let x = Random::new(0).tensor(&[n, WIDTH], 1.0, DType::F32, &Device::Cpu)?;
            let candle_x = x.clone();
            Ok(Contenders {
                ours: Box::new(move || gelu(&x).map(drop_result)),
                candle: Some(Box::new(move || candle_x.gelu_erf().map(drop_result))),
            })
        }),
    }
}

/// bge-m3's, behind every block.
fn add_layer_norm_case(n: usize) -> Case {
    const HIDDEN: usize = 1024;
    Case {
        name: format!("add_layer_norm {n}x{HIDDEN} f32"),
        bytes: 3 * 4 * n * HIDDEN,
        flops: 0,
        build: Box::new(move || {
            let mut random = Random::new(0);
            let mut tensor = |shape: &[usize]| random.tensor(shape, 1.0, DType::F32, &Device::Cpu);
            let (x, residual) = (tensor(&[n, HIDDEN])?, tensor(&[n, HIDDEN])?);
            let (weight, bias) = (tensor(&[HIDDEN])?, tensor(&[HIDDEN])?);
            let candle = LayerNorm::new(weight.clone(), bias.clone(), 1e-5);
            let (candle_x, candle_residual) = (x.clone(), residual.clone());
            Ok(Contenders {
                ours: Box::new(move || add_layer_norm(&x, &residual, &weight, &bias, 1e-5).map(drop_result)),
                candle: Some(Box::new(move || candle.forward(&(&candle_x + &candle_residual)?).map(drop_result))),
            })
        }),
    }
}

fn drop_result<T>(result: T) {
    black_box(result);
}

impl Case {
    fn report(&self, machine: &mut Machine) -> Result<()> {
        let Contenders { ours, candle } = (self.build)()?;
        let mut samples = Samples::default();
        let mut candle_samples = Samples::default();
        let warm_up = time(&ours)?;
        if let Some(candle) = &candle {
            time(candle)?;
        }
        // About 50 ms a round, so that short ops are averaged over many calls.
        let calls = (0.05 / warm_up.as_secs_f64()).clamp(1.0, 1000.0) as usize;
        for _ in 0..ROUNDS {
            samples.add(&ours, calls)?;
            if let Some(candle) = &candle {
                candle_samples.add(candle, calls)?;
            }
            machine.measure();
        }
        let seconds = samples.median();
        let least =
            (self.bytes as f64 / machine.bandwidth.last_median()).max(self.flops as f64 / machine.flops.last_median());
        println!(
            "{:<34} {:>9.1} us {:>6.0}% {:>8.1} {:>9.1} {:>7.0}%   {}",
            self.name,
            seconds * 1e6,
            samples.spread() * 100.0,
            self.bytes as f64 / seconds / 1e9,
            self.flops as f64 / seconds / 1e9,
            least / seconds * 100.0,
            match candle {
                Some(_) => format!(
                    "{:.1} us, {:.2} times ours",
                    candle_samples.median() * 1e6,
                    candle_samples.median() / seconds
                ),
                None => "-".into(),
            }
        );
        Ok(())
    }
}

const ROUNDS: usize = 9;

fn time(run: &Run) -> Result<Duration> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed())
}

#[derive(Default)]
struct Samples(Vec<f64>);

impl Samples {
    /// The mean seconds of `calls` calls.
    fn add(&mut self, run: &Run, calls: usize) -> Result<()> {
        let start = Instant::now();
        for _ in 0..calls {
            run()?;
        }
        self.0.push(start.elapsed().as_secs_f64() / calls as f64);
        Ok(())
    }

    fn quantile(values: &[f64], q: f64) -> f64 {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        sorted[((sorted.len() - 1) as f64 * q).round() as usize]
    }

    fn median(&self) -> f64 {
        Self::quantile(&self.0, 0.5)
    }

    fn last_median(&self) -> f64 {
        Self::quantile(&self.0[self.0.len().saturating_sub(ROUNDS)..], 0.5)
    }

    fn spread(&self) -> f64 {
        (Self::quantile(&self.0, 0.75) - Self::quantile(&self.0, 0.25)) / self.median()
    }
}

/// The machine's ceilings, measured again in every round.
struct Machine {
    memory: Memory,
    bandwidth: Samples,
    flops: Samples,
}

impl Machine {
    fn new() -> Self {
        Self { memory: Memory::new(), bandwidth: Samples::default(), flops: Samples::default() }
    }

    fn measure(&mut self) {
        self.bandwidth.0.push(self.memory.read_bandwidth());
        self.flops.0.push(probe::peak(Operands::F32));
    }

    fn report(&self) {
        println!(
            "ceilings, {} threads: {:.1} GB/s, {:.1} GFLOP/s in f32 (medians over all rounds)",
            candle_core::utils::get_num_threads(),
            self.bandwidth.median() / 1e9,
            self.flops.median() / 1e9
        );
    }
}
