//! CUDA kernels beside a device-to-device copy: `cargo bench --features cuda -p taper-kernels --bench cuda`.
//!
//! Microseconds a call, the host's share of them, and the bytes that a call must move (each input read once, each
//! output written once) over its time. The working set of a row is several times the cache, except in decode steps
//! of few tokens. With the argument `events`, candle orders streams by events, which one stream does not need.

use std::time::Instant;

use candle_core::cuda_backend::WrapErr;
use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;
use taper_kernels::activation::{Activation, gated_activation, gelu};
use taper_kernels::attention::{self, AttentionParams, Mask};
use taper_kernels::device::upload;
use taper_kernels::linear::{Around, linear, linear_around, linear_gelu, linear_with_bias};
use taper_kernels::moe::{self, Experts, Stack};
use taper_kernels::quantized::{Quantization, QuantizedMatrix};
use taper_kernels::testing::{Random, poisoned};
use taper_kernels::{Batch, Segment, conv, gated_delta, norm};

const CALLS: usize = 64;
const REPEATS: usize = 9;
/// Tokens of a page.
const BLOCK_SIZE: usize = 32;

fn main() -> Result<()> {
    let device = Device::new_cuda_with_stream(0)?;
    if !std::env::args().any(|argument| argument == "events") {
        // SAFETY: there is one stream.
        unsafe { device.as_cuda_device()?.disable_event_tracking() }
    }
    let mut bench = Bench { device: device.clone(), ceiling: None };
    println!("{:<56} {:>8} {:>8} {:>6} {:>8}", "op", "us", "host us", "GB/s", "of copy");

    let large = Tensor::zeros((1 << 30) / 4, DType::F32, &device)?;
    bench.ceiling = Some(bench.row("copy of 1 GiB", 2 << 30, |_| large.copy().map(drop))?);
    drop(large);
    for (n, d) in [(65536, 1024), (16384, 4096), (1 << 19, 128), (64, 1024)] {
        bench.rms_norm(n, d)?;
    }
    bench.write_kv(16384, 8, 128)?;
    bench.write_kv(64, 8, 128)?;
    for (tokens, hq, hk, d) in [(4096, 32, 8, 128), (16384, 32, 8, 128), (16384, 16, 4, 256), (4096, 8, 1, 512)] {
        bench.prompt(tokens, hq, hk, d)?;
    }
    bench.encoder(64, 512, 16, 64)?;
    for (batch, hq, hk, d) in [(1, 32, 8, 128), (8, 32, 8, 128), (64, 32, 8, 128), (1, 16, 4, 256), (1, 8, 1, 512)] {
        bench.decode(batch, 4096, hq, hk, d)?;
    }
    for batch in [64, 8, 1] {
        bench.gated_delta(&format!("decode, {batch} sequences"), &vec![(1, 100); batch])?;
    }
    for prompt in [512, 4096, 16384] {
        bench.gated_delta(&format!("prompt of {prompt}"), &[(prompt, 0)])?;
    }
    bench.gated_delta("8 prompts of 512", &[(512, 0); 8])?;
    for (name, sequences) in [("prompt of 16384", vec![(16384, 0)]), ("decode, 64 sequences", vec![(1, 100); 64])] {
        bench.causal_conv1d(name, &sequences)?;
    }
    bench.rms_norm_gated(1 << 18, 128)?;
    for (n, inner, outer) in [(4096, 1024, 3072), (4096, 4096, 12288), (512, 4096, 12288), (32768, 2560, 9216)] {
        bench.gated(n, inner, outer)?;
    }
    bench.gelu(16384, 1024, 4096)?;
    bench.upload()?;
    for format in [None, Some(Quantization::Q8), Some(Quantization::Q4)] {
        bench.sparse_mlp(&[1, 8, 64, 4096], format)?;
    }
    Ok(())
}

struct Bench {
    device: Device,
    /// Bytes per second of a copy, once measured.
    ceiling: Option<f64>,
}

impl Bench {
    /// Times `call`, which gets its number, and prints a row; returns bytes per second.
    fn row(&self, name: &str, bytes: usize, call: impl Fn(usize) -> Result<()>) -> Result<f64> {
        let mut times = Vec::new();
        for repeat in 0..=REPEATS {
            let start = Instant::now();
            for i in 0..CALLS {
                call(i)?;
            }
            let queued = start.elapsed().as_secs_f64() / CALLS as f64;
            self.device.synchronize()?;
            // The first loads kernels and fills the memory pool.
            if repeat > 0 {
                times.push((start.elapsed().as_secs_f64() / CALLS as f64, queued));
            }
        }
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        let (time, queued) = times[REPEATS / 2];
        let rate = bytes as f64 / time;
        println!(
            "{name:<56} {:>8.2} {:>8.2} {:>6.0} {:>7.0}%   {:.2} to {:.2} us",
            time * 1e6,
            queued * 1e6,
            rate / 1e9,
            rate / self.ceiling.unwrap_or(rate) * 100.0,
            times[0].0 * 1e6,
            times[REPEATS - 1].0 * 1e6,
        );
        Ok(rate)
    }

    fn random(&self, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Tensor::randn(0f32, 1f32, shape, &self.device)?.to_dtype(dtype)
    }

    fn rms_norm(&self, n: usize, d: usize) -> Result<()> {
        let x = self.random(&[n, d], DType::BF16)?;
        let weight = self.random(&[d], DType::F32)?;
        self.row(&format!("rms_norm bf16 [{n}, {d}]"), n * d * 4, |_| norm::rms_norm(&x, &weight, 1e-6).map(drop))?;
        Ok(())
    }

    fn write_kv(&self, n: usize, heads: usize, d: usize) -> Result<()> {
        let blocks = Random::new(1).permutation(n.div_ceil(BLOCK_SIZE));
        let kv = poisoned(&[2, blocks.len(), BLOCK_SIZE, heads, d], DType::BF16, &self.device)?;
        let (k, v) = (self.random(&[n, heads, d], DType::BF16)?, self.random(&[n, heads, d], DType::BF16)?);
        let segment = Segment { tokens: &vec![0; n], past: 0, blocks: &blocks, slot: 0 };
        let batch = Batch::new(&[segment], BLOCK_SIZE, &self.device)?;
        let bytes = 2 * 2 * n * heads * d * 2;
        self.row(&format!("write_kv bf16 [{n}, {heads}, {d}]"), bytes, |_| attention::write_kv(&kv, &k, &v, &batch))?;
        Ok(())
    }

    /// Attention of a whole prompt over its pages; bytes are those of queries, keys, values and results.
    fn prompt(&self, tokens: usize, hq: usize, hk: usize, d: usize) -> Result<()> {
        let (kv, blocks) = self.pages(&[tokens], hk, d)?;
        let segment = Segment { tokens: &vec![0; tokens], past: 0, blocks: &blocks[0], slot: 0 };
        let batch = Batch::new(&[segment], BLOCK_SIZE, &self.device)?;
        let q = self.random(&[tokens, hq, d], DType::BF16)?;
        let name = format!("paged_attention bf16 {hq}:{hk} heads of {d}, prompt of {tokens}");
        let operations = 2 * tokens * tokens * hq * d;
        self.products(&name, 4 * tokens * (hq + hk) * d, operations, || {
            attention::paged_attention(&q, &kv, &batch, AttentionParams::causal(0.1)).map(drop)
        })
    }

    /// Attention of texts of equal length that see all of themselves.
    fn encoder(&self, texts: usize, len: usize, heads: usize, d: usize) -> Result<()> {
        let tokens = vec![0; len];
        let batch = Batch::uncached(&vec![&tokens[..]; texts], &self.device)?;
        let qkv = self.random(&[texts * len, 3 * heads, d], DType::BF16)?;
        let [q, k, v] = [0, 1, 2].map(|i| qkv.narrow(1, i * heads, heads));
        let (q, k, v) = (q?, k?, v?);
        let params = AttentionParams { mask: Mask::Bidirectional, ..AttentionParams::causal(0.1) };
        let name = format!("attention bf16 {heads} heads of {d}, {texts} texts of {len}");
        self.products(&name, 8 * texts * len * heads * d, 4 * texts * len * len * heads * d, || {
            attention::attention(&q, &k, &v, &batch, params).map(drop)
        })
    }

    /// One token of each sequence over pages of several layers in turn.
    fn decode(&self, sequences: usize, context: usize, hq: usize, hk: usize, d: usize) -> Result<()> {
        let layers = 1 + 16 / sequences;
        let lens = vec![context; sequences];
        let layers: Vec<Tensor> =
            (0..layers).map(|_| self.pages(&lens, hk, d).map(|(kv, _)| kv)).collect::<Result<_>>()?;
        let (_, blocks) = self.pages(&lens, hk, d)?;
        let segments: Vec<Segment> = (0..sequences)
            .map(|i| Segment { tokens: &[0], past: context - 1, blocks: &blocks[i], slot: i as u32 })
            .collect();
        let batch = Batch::new(&segments, BLOCK_SIZE, &self.device)?;
        let q = self.random(&[sequences, hq, d], DType::BF16)?;
        let name = format!("paged_attention bf16 {hq}:{hk} heads of {d}, {sequences} x 1 after {context}");
        self.row(&name, 4 * sequences * (context * hk + hq) * d, |i| {
            let kv = &layers[i % layers.len()];
            attention::paged_attention(&q, kv, &batch, AttentionParams::causal(0.1)).map(drop)
        })?;
        Ok(())
    }

    /// Random pages for sequences of these lengths, and their blocks in random order.
    fn pages(&self, lens: &[usize], hk: usize, d: usize) -> Result<(Tensor, Vec<Vec<u32>>)> {
        let blocks = |len: &usize| len.div_ceil(BLOCK_SIZE);
        let mut pool = Random::new(3).permutation(lens.iter().map(blocks).sum());
        let kv = self.random(&[2, pool.len(), BLOCK_SIZE, hk, d], DType::BF16)?;
        Ok((kv, lens.iter().map(|len| pool.drain(..blocks(len)).collect()).collect()))
    }

    /// A row for what is bound by products: says also how many operations a second it does.
    fn products(&self, name: &str, bytes: usize, operations: usize, call: impl Fn() -> Result<()>) -> Result<()> {
        let rate = self.row(name, bytes, |_| call())?;
        println!("{:<56} {:>8.0} TFLOP/s", "", operations as f64 * rate / bytes as f64 / 1e12);
        Ok(())
    }

    /// Sequences are (tokens, past), each with a slot, and a block of the same number, of its own.
    fn batch(&self, sequences: &[(usize, usize)], slots: &[u32]) -> Result<Batch> {
        let tokens = vec![0; sequences.iter().map(|&(new, _)| new).max().unwrap_or(0)];
        let segments: Vec<Segment> = sequences
            .iter()
            .zip(slots)
            .map(|(&(new, past), slot)| Segment {
                tokens: &tokens[..new],
                past,
                blocks: std::slice::from_ref(slot),
                slot: *slot,
            })
            .collect();
        Batch::new(&segments, 1 << 16, &self.device)
    }

    /// Sequences are (tokens, past); the operands are parts of one matrix, as the convolution leaves them. Each call
    /// is another layer's state.
    fn gated_delta(&self, name: &str, sequences: &[(usize, usize)]) -> Result<()> {
        let (heads, d, layers) = (16, 128, 8);
        let slots = Random::new(2).permutation(sequences.len());
        let states: Vec<Tensor> = (0..layers)
            .map(|_| Tensor::zeros((slots.len(), heads, d, d), DType::F32, &self.device))
            .collect::<Result<_>>()?;
        let batch = self.batch(sequences, &slots)?;
        let n = batch.num_tokens();
        let qkv = self.random(&[n, 3 * heads, d], DType::BF16)?;
        let [q, k, v] = [0, 1, 2].map(|i| qkv.narrow(1, i * heads, heads));
        let (q, k, v) = (q?, k?, v?);
        let g = Tensor::full(-0.1f32, (n, heads), &self.device)?;
        let beta = Tensor::full(0.5f32, (n, heads), &self.device)?;
        let kept = sequences.iter().filter(|(_, past)| *past > 0).count();
        let state_bytes = (kept + sequences.len()) * heads * d * d * 4;
        let bytes = state_bytes + n * heads * (4 * d * 2 + 2 * 4);
        self.row(&format!("gated_delta_rule bf16 16x128x128, {name}"), bytes, |i| {
            gated_delta::gated_delta_rule(&q, &k, &v, &g, &beta, &states[i % layers], &batch).map(drop)
        })?;
        Ok(())
    }

    fn causal_conv1d(&self, name: &str, sequences: &[(usize, usize)]) -> Result<()> {
        let (channels, width) = (6144, 4);
        let slots = Random::new(3).permutation(sequences.len());
        let batch = self.batch(sequences, &slots)?;
        let n = batch.num_tokens();
        let x = self.random(&[n, channels], DType::BF16)?;
        let weight = self.random(&[channels, width], DType::F32)?;
        let state = Tensor::zeros((sequences.len(), channels, width - 1), DType::F32, &self.device)?;
        let kept = sequences.iter().filter(|(_, past)| *past > 0).count();
        let bytes = n * channels * 4 + (kept + sequences.len()) * channels * (width - 1) * 4;
        self.row(&format!("causal_conv1d bf16, {channels} channels, {name}"), bytes, |_| {
            conv::causal_conv1d(&x, &weight, &state, &batch).map(drop)
        })?;
        Ok(())
    }

    fn rms_norm_gated(&self, n: usize, d: usize) -> Result<()> {
        let (x, gate) = (self.random(&[n, d], DType::BF16)?, self.random(&[n, d], DType::BF16)?);
        let weight = self.random(&[d], DType::F32)?;
        self.row(&format!("rms_norm_gated bf16 [{n}, {d}]"), n * d * 6, |_| {
            norm::rms_norm_gated(&x, &gate, &weight, 1e-6).map(drop)
        })?;
        Ok(())
    }

    /// The first product of an MLP, and with its gate, op by op and as models ask for it.
    fn gated(&self, n: usize, inner: usize, outer: usize) -> Result<()> {
        let [x, weight] = [[n, inner], [2 * outer, inner]].map(|shape| self.random(&shape, DType::BF16));
        let (x, weight) = (x?, weight?);
        let (name, operations) = (format!("[{n}, {inner}] by 2 x {outer}"), 4 * n * inner * outer);
        let bytes = 2 * (n * inner + 2 * outer * inner + n * outer);
        let gate = Around { gate: Some(Activation::Silu), ..Around::default() };
        self.products(&name, bytes, operations, || linear(&x, &weight).map(drop))?;
        self.products(&format!("{name}, then gated"), bytes, operations, || {
            gated_activation(&linear(&x, &weight)?, Activation::Silu).map(drop)
        })?;
        self.products(&format!("{name}, gated"), bytes, operations, || linear_around(&x, &weight, None, gate).map(drop))
    }

    /// The same with a bias and the GELU.
    fn gelu(&self, n: usize, inner: usize, outer: usize) -> Result<()> {
        let [x, weight, bias] =
            [&[n, inner][..], &[outer, inner], &[outer]].map(|shape| self.random(shape, DType::BF16));
        let (x, weight, bias) = (x?, weight?, bias?);
        let (name, operations) = (format!("[{n}, {inner}] by {outer}"), 2 * n * inner * outer);
        let bytes = 2 * (n * inner + outer * inner + n * outer);
        self.products(&name, bytes, operations, || linear_with_bias(&x, &weight, &bias).map(drop))?;
        self.products(&format!("{name}, then GELU"), bytes, operations, || {
            gelu(&linear_with_bias(&x, &weight, &bias)?).map(drop)
        })?;
        self.products(&format!("{name}, GELU"), bytes, operations, || linear_gelu(&x, &weight, Some(&bias)).map(drop))
    }

    /// Weights on their way from the host's memory: what the bus takes by itself, what threads copy by themselves, and
    /// both.
    fn upload(&self) -> Result<()> {
        const BYTES: usize = 64 << 20;
        let weights = vec![1u8; CALLS * BYTES];
        let stream = self.device.as_cuda_device()?.cuda_stream();
        // SAFETY: nobody asks what the GPU reads there.
        let pinned = unsafe { stream.context().alloc_pinned::<u8>(BYTES) }.w()?;
        let target = std::cell::RefCell::new(stream.alloc_zeros::<u8>(BYTES).w()?);
        self.row("64 MiB from pinned memory", BYTES, |_| stream.memcpy_htod(&pinned, &mut *target.borrow_mut()).w())?;
        let copy = std::cell::RefCell::new(vec![0u8; BYTES]);
        self.row("64 MiB copied on the host", BYTES, |i| {
            let (mut copy, weights) = (copy.borrow_mut(), &weights[i * BYTES..][..BYTES]);
            let shares = copy.par_chunks_mut(1 << 20).zip(weights.par_chunks(1 << 20));
            shares.for_each(|(to, from)| to.copy_from_slice(from));
            Ok(())
        })?;
        self.row("upload of 64 MiB", BYTES, |i| {
            let weights = &weights[i * BYTES..][..BYTES];
            upload(&self.device, BYTES / 4, DType::F32, &[weights], |_| ()).map(drop)
        })?;
        Ok(())
    }

    /// Of Qwen3.5-35B-A3B: bytes are those of the experts that some token goes to. Each call is another layer's.
    fn sparse_mlp(&self, counts: &[usize], format: Option<Quantization>) -> Result<()> {
        let (num_experts, hidden, intermediate, k, layers) = (256, 2048, 512, 8, 3);
        let fill = |row: usize, target: &mut [f32]| {
            target.iter_mut().enumerate().for_each(|(i, x)| *x = (row * 7 + i * 13) as f32 % 17.0 - 8.0)
        };
        let pack = |format, dims| QuantizedMatrix::pack(format, dims, fill)?.to_device(&self.device);
        let stack = |rows: usize, columns: usize| -> Result<Stack> {
            Ok(match format {
                None => Stack::Dense(self.random(&[num_experts, rows, columns], DType::BF16)?),
                Some(format) => {
                    Stack::Packed((0..num_experts).map(|_| pack(format, [rows, columns])).collect::<Result<_>>()?)
                }
            })
        };
        let experts = (0..layers)
            .map(|_| Experts::new(stack(2 * intermediate, hidden)?, stack(hidden, intermediate)?))
            .collect::<Result<Vec<_>>>()?;
        for &n in counts {
            let x = self.random(&[n, hidden], DType::BF16)?;
            let routing = moe::route(&self.random(&[n, num_experts], DType::BF16)?, k)?;
            let mut used: Vec<u32> = routing.experts.flatten_all()?.to_vec1()?;
            used.sort_unstable();
            used.dedup();
            let of = |dims: [usize; 2]| format.map_or(dims[0] * dims[1] * 2, |format: Quantization| format.bytes(dims));
            let expert = of([2 * intermediate, hidden]) + of([hidden, intermediate]);
            let weights = format.map_or("bf16".to_string(), |format| format!("{format:?}"));
            let name = format!("sparse_mlp {weights}, 8 of 256 experts of 512, {n} tokens");
            self.row(&name, used.len() * expert + 2 * n * hidden * 2, |i| {
                moe::sparse_mlp(&x, &routing, &experts[i % layers]).map(drop)
            })?;
        }
        Ok(())
    }
}
