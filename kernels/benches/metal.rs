//! Time per call of the ops on a Mac's GPU, beside the bytes that they must move and the operations that they must do:
//! the shapes of the table "What to expect" in this crate's README.
//!
//! `cargo bench --features metal -p taper-kernels --bench metal`

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use taper_kernels::activation::{Activation, gated_activation};
use taper_kernels::attention::{AttentionParams, paged_attention, write_kv};
use taper_kernels::conv::causal_conv1d;
use taper_kernels::gated_delta::gated_delta_rule;
use taper_kernels::linear::linear;
use taper_kernels::norm::rms_norm;
use taper_kernels::quantized::{self, Quantization, QuantizedMatrix};
use taper_kernels::sampling::{Draw, Draws, argmax, sample};
use taper_kernels::testing::Random;
use taper_kernels::{Batch, Segment};

/// Calls that are queued before the GPU is waited for, and rounds of which the median counts.
const CALLS: usize = 32;
const ROUNDS: usize = 9;

fn main() -> Result<()> {
    let device = Device::new_metal(0)?;
    println!("{:<56} {:>10} {:>8} {:>8}", "call, bf16", "µs", "GB/s", "GFLOP/s");
    let mut random = Random::new(1);
    let mut tensor = |shape: &[usize]| random.tensor(shape, 1.0, DType::BF16, &device);
    let weight = Tensor::ones(1024, DType::F32, &device)?;

    let x = tensor(&[4096, 1024])?;
    report(&device, "rms_norm [4096, 1024]", 16.8e6, 0.0, || rms_norm(&x, &weight, 1e-6))?;
    let gate_up = tensor(&[4096, 6144])?;
    report(&device, "gated_activation [4096, 2 x 3072]", 75.5e6, 0.0, || gated_activation(&gate_up, Activation::Silu))?;

    let logits = tensor(&[1, 151_936])?;
    let draws = Draws::new(&[Draw { top_k: 20, top_p: 0.8, position: 0.5, ..Draw::MOST_LIKELY }], &device)?;
    report(&device, "argmax, 151936 logits", 0.3e6, 0.0, || argmax(&logits, 151_936))?;
    report(&device, "sample, 20 of 151936 logits", 0.3e6, 0.0, || sample(&logits, 151_936, &draws))?;

    let matrix = tensor(&[6144, 1024])?;
    let packed = |format| {
        let row = |o: usize, values: &mut [f32]| values.fill((o % 7) as f32 - 3.0);
        QuantizedMatrix::pack(format, [6144, 1024], row)?.to_device(&device)
    };
    let (q8, q4) = (packed(Quantization::Q8)?, packed(Quantization::Q4)?);
    for n in [1, 8, 512] {
        let (x, flops) = (tensor(&[n, 1024])?, 2.0 * (n * 6144 * 1024) as f64);
        let bytes = |bits: f64| (6144 * 1024) as f64 * bits / 8.0;
        report(&device, &format!("linear [{n}, 1024] by 6144"), bytes(16.0), flops, || linear(&x, &matrix))?;
        report(&device, "the same, Q8", bytes(8.5), flops, || quantized::linear(&x, &q8))?;
        report(&device, "the same, Q4", bytes(4.5), flops, || quantized::linear(&x, &q4))?;
    }

    let blocks: Vec<u32> = (0..132).collect();
    let pages = tensor(&[2, 132, 32, 8, 128])?;
    let step = |new: usize, past: usize| {
        let segment = Segment { tokens: &vec![0; new], past, blocks: &blocks, slot: 0 };
        Batch::new(&[segment], 32, &device)
    };
    let params = AttentionParams::causal(0.09);
    let (token, prompt) = (step(1, 4095)?, step(4096, 0)?);
    let (q, queries) = (tensor(&[1, 16, 128])?, tensor(&[4096, 16, 128])?);
    report(&device, "paged_attention, one token after 4095, 16:8 x 128", 16.8e6, 0.0, || {
        paged_attention(&q, &pages, &token, params)
    })?;
    report(&device, "paged_attention, a prompt of 4096, 16:8 x 128", 0.0, 68.7e9, || {
        paged_attention(&queries, &pages, &prompt, params)
    })?;
    let k = tensor(&[4096, 8, 128])?;
    report(&device, "write_kv [4096, 8, 128]", 33.6e6, 0.0, || write_kv(&pages, &k, &k, &prompt))?;

    let window = Tensor::zeros((1, 6144, 3), DType::F32, &device)?;
    let factors = tensor(&[6144, 4])?;
    report(&device, "causal_conv1d [4096, 6144], width 4", 101e6, 0.0, || {
        causal_conv1d(&gate_up, &factors, &window, &prompt)
    })?;
    let state = Tensor::zeros((1, 16, 128, 128), DType::F32, &device)?;
    for (batch, n) in [(&token, 1), (&prompt, 4096)] {
        let x = tensor(&[n, 16, 128])?;
        let gates = Tensor::full(-0.1f32, (n, 16), &device)?;
        let name = format!("gated_delta_rule, {n} tokens, 16 x 128 x 128");
        report(&device, &name, 2.1e6, 2.1e6 * n as f64, || {
            gated_delta_rule(&x, &x, &x, &gates, &gates.neg()?, &state, batch)
        })?;
    }
    Ok(())
}

fn report<T>(device: &Device, name: &str, bytes: f64, flops: f64, call: impl Fn() -> Result<T>) -> Result<()> {
    let round = || -> Result<f64> {
        let start = Instant::now();
        taper_kernels::device::step(device, || (0..CALLS).try_for_each(|_| call().map(drop)))?;
        device.synchronize()?;
        Ok(start.elapsed().as_secs_f64() / CALLS as f64)
    };
    round()?;
    let mut seconds = (0..ROUNDS).map(|_| round()).collect::<Result<Vec<_>>>()?;
    seconds.sort_by(f64::total_cmp);
    let median = seconds[ROUNDS / 2];
    let rate = |amount: f64| if amount > 0.0 { format!("{:.0}", amount / median / 1e9) } else { String::new() };
    println!("{name:<56} {:>10.1} {:>8} {:>8}", median * 1e6, rate(bytes), rate(flops));
    Ok(())
}
