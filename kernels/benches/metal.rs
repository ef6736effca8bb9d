//! Time per call of the ops on a Mac's GPU, beside the bytes that they must move and the operations that they must do:
//! the shapes of the table "What to expect" in this crate's README.
//!
//! `cargo bench --features metal -p taper-kernels --bench metal`

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor};
use taper_kernels::activation::{Activation, gated_activation, gated_by, gelu, sigmoid_gated};
use taper_kernels::attention::{AttentionParams, paged_attention, write_kv};
use taper_kernels::conv::causal_conv1d;
use taper_kernels::gated_delta::{gated_delta_rule, gates};
use taper_kernels::gather::gather;
use taper_kernels::heads::{KeyValueHeads, norm_rope_write};
use taper_kernels::linear::linear;
use taper_kernels::moe::{Experts, Stack, route, sparse_mlp};
use taper_kernels::norm::{Norm, add_layer_norm, add_rms_norm, rms_norm, rms_norm_gated};
use taper_kernels::quantized::{self, Quantization, QuantizedMatrix};
use taper_kernels::rope::{rope, rotations};
use taper_kernels::sampling::{Draw, Draws, argmax, sample};
use taper_kernels::softcap::softcap;
use taper_kernels::testing::Random;
use taper_kernels::{Batch, Segment};

/// Calls that are queued before the GPU is waited for, and rounds of which the median counts.
const CALLS: usize = 32;
const ROUNDS: usize = 9;

fn main() -> Result<()> {
    let device = taper_kernels::device::metal()?;
    println!("{:<56} {:>10} {:>8} {:>8}", "call, bf16", "µs", "GB/s", "GFLOP/s");
    rows(&device)?;
    choices(&device)?;
    products(&device)?;
    experts(&device)?;
    attention(&device)?;
    recurrences(&device)
}

fn tensor(shape: &[usize], device: &Device) -> Result<Tensor> {
    Random::new(1).tensor(shape, 1.0, DType::BF16, device)
}

/// Norms, activations and copies of rows.
fn rows(device: &Device) -> Result<()> {
    let x = tensor(&[4096, 1024], device)?;
    let y = x.copy()?;
    let (weight, bias) = (Tensor::ones(1024, DType::F32, device)?, Tensor::zeros(1024, DType::F32, device)?);
    report(device, "rms_norm [4096, 1024]", 16.8e6, 0.0, || rms_norm(&x, &weight, 1e-6))?;
    let norm = Norm { weight: &weight, eps: 1e-6 };
    report(device, "add_rms_norm [4096, 1024]", 25.2e6, 0.0, || add_rms_norm(&x, &y, norm, 0.5))?;
    report(device, "add_layer_norm [4096, 1024]", 25.2e6, 0.0, || add_layer_norm(&x, &y, &weight, &bias, 1e-5))?;
    let heads = tensor(&[4096, 16, 128], device)?;
    let gate = heads.copy()?;
    let weight = Tensor::ones(128, DType::F32, device)?;
    report(device, "rms_norm_gated [4096, 16, 128]", 50.3e6, 0.0, || rms_norm_gated(&heads, &gate, &weight, 1e-6))?;
    report(device, "sigmoid_gated [4096, 16, 128]", 50.3e6, 0.0, || sigmoid_gated(&heads, &gate))?;
    let gate_up = tensor(&[4096, 6144], device)?;
    report(device, "gated_activation [4096, 2 x 3072]", 75.5e6, 0.0, || gated_activation(&gate_up, Activation::Silu))?;
    let (gate, up) = (gate_up.narrow(1, 0, 3072)?, gate_up.narrow(1, 3072, 3072)?);
    report(device, "gated_by [4096, 3072]", 75.5e6, 0.0, || gated_by(&gate, &up, Activation::GeluTanh))?;
    let x = tensor(&[4096, 4096], device)?;
    report(device, "gelu [4096, 4096]", 67.1e6, 0.0, || gelu(&x))?;
    let table = tensor(&[32_768, 1024], device)?;
    let ids = Tensor::from_vec(Random::new(2).permutation(32_768), 32_768, device)?.narrow(0, 0, 4096)?;
    report(device, "gather, 4096 rows of 1024", 16.8e6, 0.0, || gather(&table, &ids))?;
    let logits = tensor(&[1, 262_144], device)?;
    report(device, "softcap, 262144 logits", 1.0e6, 0.0, || softcap(&logits, 30.0))
}

/// Tokens, and experts of tokens.
fn choices(device: &Device) -> Result<()> {
    let logits = tensor(&[1, 151_936], device)?;
    let draws = Draws::new(&[Draw { top_k: 20, top_p: 0.8, position: 0.5, ..Draw::MOST_LIKELY }], device)?;
    report(device, "argmax, 151936 logits", 0.3e6, 0.0, || argmax(&logits, 151_936))?;
    report(device, "sample, 20 of 151936 logits", 0.3e6, 0.0, || sample(&logits, 151_936, &draws))?;
    let logits = tensor(&[4096, 256], device)?;
    report(device, "route, 4096 tokens, 8 of 256", 2.3e6, 0.0, || route(&logits, 8))
}

fn products(device: &Device) -> Result<()> {
    let matrix = tensor(&[6144, 1024], device)?;
    let packed = |format| pack(format, [6144, 1024])?.to_device(device);
    let (q8, q4) = (packed(Quantization::Q8)?, packed(Quantization::Q4)?);
    for n in [1, 8, 512] {
        let (x, flops) = (tensor(&[n, 1024], device)?, 2.0 * (n * 6144 * 1024) as f64);
        let bytes = |bits: f64| (6144 * 1024) as f64 * bits / 8.0;
        report(device, &format!("linear [{n}, 1024] by 6144"), bytes(16.0), flops, || linear(&x, &matrix))?;
        report(device, "the same, Q8", bytes(8.25), flops, || quantized::linear(&x, &q8))?;
        report(device, "the same, Q4", bytes(4.5), flops, || quantized::linear(&x, &q4))?;
    }
    Ok(())
}

fn pack(format: Quantization, dims: [usize; 2]) -> Result<QuantizedMatrix> {
    QuantizedMatrix::pack(format, dims, |o, values| values.fill((o % 7) as f32 - 3.0))
}

/// 256 experts of 512 for a hidden size of 2048, of which a token goes to 8: 1.6 GB in bf16.
fn experts(device: &Device) -> Result<()> {
    let (experts, hidden, intermediate) = (256, 2048, 512);
    let dense = |o, i| Tensor::ones((experts, o, i), DType::BF16, device).map(Stack::Dense);
    let packed = |o, i| {
        let matrix = |_| pack(Quantization::Q4, [o, i])?.to_device(device);
        (0..experts).map(matrix).collect::<Result<_>>().map(Stack::Packed)
    };
    for is_packed in [false, true] {
        let experts = match is_packed {
            false => Experts::new(dense(2 * intermediate, hidden)?, dense(hidden, intermediate)?)?,
            true => Experts::new(packed(2 * intermediate, hidden)?, packed(hidden, intermediate)?)?,
        };
        for n in [1, 512] {
            let (x, routing) = (tensor(&[n, hidden], device)?, route(&tensor(&[n, 256], device)?, 8)?);
            let values = (n * 8).min(256) * 3 * hidden * intermediate;
            let bytes = values as f64 * if is_packed { 4.5 } else { 16.0 } / 8.0;
            let flops = (n * 8 * 6 * hidden * intermediate) as f64;
            let name = format!("sparse_mlp{}, {n} tokens, 8 of 256 experts", if is_packed { ", Q4" } else { "" });
            report(device, &name, bytes, flops, || sparse_mlp(&x, &routing, &experts))?;
        }
    }
    Ok(())
}

/// A step of `new` tokens after `past`.
fn step(new: usize, past: usize, device: &Device) -> Result<Batch> {
    let blocks: Vec<u32> = (0..132).collect();
    Batch::new(&[Segment { tokens: &vec![0; new], past, blocks: &blocks, slot: 0 }], 32, device)
}

/// 16 heads of 128 over 8 of keys, from the projection on.
fn attention(device: &Device) -> Result<()> {
    let (pages, prompt) = (tensor(&[2, 132, 32, 8, 128], device)?, step(4096, 0, device)?);
    let (q, k) = (tensor(&[4096, 16, 128], device)?, tensor(&[4096, 8, 128], device)?);
    let v = k.copy()?;
    report(device, "write_kv [4096, 8, 128]", 33.6e6, 0.0, || write_kv(&pages, &k, &v, &prompt))?;
    let inv_freq = Tensor::from_vec((0..64).map(|i| 1e6f32.powf(-i as f32 / 64.0)).collect(), 64, device)?;
    report(device, "rotations, 4096 tokens, 64 of them", 2.1e6, 0.0, || rotations(&prompt.positions, &inv_freq))?;
    let (cos, sin) = rotations(&prompt.positions, &inv_freq)?;
    report(device, "rope [4096, 16, 128]", 33.6e6, 0.0, || rope(&q, &cos, &sin))?;
    let weight = Tensor::ones(128, DType::F32, device)?;
    let norm = Norm { weight: &weight, eps: 1e-6 };
    let heads = KeyValueHeads { k: &k, v: &v, k_norm: norm, v_norm: None };
    report(device, "norm_rope_write, 4096 tokens, 16:8 heads of 128", 67e6, 0.0, || {
        norm_rope_write(&q, norm, Some(heads), (&cos, &sin), &pages, &prompt)
    })?;
    let params = AttentionParams::causal(0.09);
    for (new, past, bytes, flops) in [(1, 4095, 16.8e6, 0.0), (512, 0, 0.0, 1.1e9), (4096, 0, 0.0, 69e9)] {
        let (q, batch) = (q.narrow(0, 0, new)?, step(new, past, device)?);
        let name = format!("paged_attention, {new} tokens after {past}, 16:8 x 128");
        report(device, &name, bytes, flops, || paged_attention(&q, &pages, &batch, params))?;
    }
    Ok(())
}

/// Convolution and delta rule, with what they carry from step to step.
fn recurrences(device: &Device) -> Result<()> {
    let (token, prompt) = (step(1, 4095, device)?, step(4096, 0, device)?);
    let window = Tensor::zeros((1, 6144, 3), DType::F32, device)?;
    let (x, factors) = (tensor(&[4096, 6144], device)?, tensor(&[6144, 4], device)?);
    report(device, "causal_conv1d [4096, 6144], width 4", 101e6, 0.0, || {
        causal_conv1d(&x, &factors, &window, &prompt)
    })?;
    let (a, constants) = (tensor(&[4096, 16], device)?, Tensor::ones(16, DType::F32, device)?);
    report(device, "gates [4096, 16]", 0.8e6, 0.0, || gates(&a, &a, &constants, &constants))?;
    let state = Tensor::zeros((1, 16, 128, 128), DType::F32, device)?;
    for (batch, n, bytes) in [(&token, 1, 2.1e6), (&prompt, 4096, 69e6)] {
        let q = tensor(&[n, 16, 128], device)?;
        let (k, v) = (q.copy()?, q.copy()?);
        let decay = Tensor::full(-0.1f32, (n, 16), device)?;
        let name = format!("gated_delta_rule, {n} tokens, 16 x 128 x 128");
        report(device, &name, bytes, 2.1e6 * n as f64, || {
            gated_delta_rule(&q, &k, &v, &decay, &decay.neg()?, &state, batch)
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
