//! What only a GPU can show: the engine on CUDA beside itself. Without a GPU these tests say that they skip.
#![cfg(all(feature = "cuda", feature = "demo"))]

mod support;

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};
use kernels::testing::Random;
use models::{Checkpoint, Config};
use taper::{
    DeviceChoice, Embedder, EmbedderOptions, Embedding, Engine, EngineOptions, ModelLimits, Options, Request,
    SamplingParams, SequenceId,
};

fn gpu() -> Option<Device> {
    let device = DeviceChoice::Cuda.open();
    if let Err(error) = &device {
        eprintln!("skipped: {error}");
    }
    device.ok()
}

/// Each token with the bits of its log-probability and of the most likely ones'.
type Reply = Vec<(u32, Vec<u32>)>;

fn replies(fixture: &str, dtype: DType, device: &Device, options: &EngineOptions, requests: &[Request]) -> Vec<Reply> {
    let folder = Path::new("tests/fixtures").join(fixture).join("f32");
    let checkpoint = Checkpoint::Folder(folder);
    let config = Config::read(&checkpoint).expect("a configuration");
    let vocab = config.describe().vocab_size;
    let model = config.load(&checkpoint, dtype, device).expect("a model");
    let limits = ModelLimits { vocab_size: vocab, sampled_vocab: vocab, max_positions: 4096, stop_ids: vec![] };
    let options = EngineOptions { memory: Some(1 << 28), ..options.clone() };
    let mut engine = Engine::new(model, limits, dtype, device, &options).expect("an engine");
    let ids: Vec<SequenceId> = requests.iter().map(|request| engine.add(request.clone()).expect("valid")).collect();
    let mut replies: HashMap<SequenceId, Reply> = HashMap::new();
    while !engine.is_idle() {
        for output in engine.step().expect("a step") {
            let token = output.token.expect("a token");
            let logprobs = token.logprobs.expect("asked for");
            let mut bits = vec![logprobs.chosen.to_bits()];
            bits.extend(logprobs.top.iter().map(|(_, logprob)| logprob.to_bits()));
            replies.entry(output.id).or_default().push((token.id, bits));
        }
    }
    ids.iter().map(|id| replies.remove(id).expect("a reply")).collect()
}

fn requests(count: u32) -> Vec<Request> {
    let params = |i: u32| SamplingParams {
        max_tokens: 20 + i as usize,
        logprobs: Some(3),
        ignore_eos: true,
        ..SamplingParams::default()
    };
    (0..count)
        .map(|i| Request {
            prompt: (0..5 + 13 * i).map(|j| 3 + (i * 31 + j * 7) % 200).collect(),
            stable_len: 0,
            params: params(i),
        })
        .collect()
}

#[test]
fn every_family_agrees_with_transformers() {
    let Some(device) = gpu() else { return };
    support::assert_fixtures_agree(&device);
}

const FIXTURES: [&str; 4] = ["qwen3-base-s0", "qwen3_5-base-s0", "qwen3_5_moe-base-s4", "gemma4-base-s0"];

#[test]
fn replayed_steps_are_those_that_run_to_the_bit() {
    let Some(device) = gpu() else { return };
    for fixture in FIXTURES {
        for dtype in [DType::F32, DType::BF16] {
            let of = |replay| {
                let options = EngineOptions { replay, ..EngineOptions::default() };
                replies(fixture, dtype, &device, &options, &requests(6))
            };
            assert_eq!(of(true), of(false), "{fixture} {dtype:?}");
        }
    }
}

/// A step is queued before the token of the one before has come: sequences end meanwhile, others come, or are cancelled.
/// The same happens where every step waits.
#[test]
fn steps_that_do_not_wait_are_those_that_do() {
    let Some(device) = gpu() else { return };
    for fixture in FIXTURES {
        let of = |replay| {
            let folder = Path::new("tests/fixtures").join(fixture).join("f32");
            let checkpoint = Checkpoint::Folder(folder);
            let config = Config::read(&checkpoint).expect("a configuration");
            let vocab = config.describe().vocab_size;
            let model = config.load(&checkpoint, DType::F32, &device).expect("a model");
            // Many tokens end a reply, at steps that nobody knows ahead.
            let stop_ids = (0..vocab as u32).step_by(16).collect();
            let limits = ModelLimits { vocab_size: vocab, sampled_vocab: vocab, max_positions: 4096, stop_ids };
            let options = EngineOptions { memory: Some(1 << 28), replay, ..EngineOptions::default() };
            let mut engine = Engine::new(model, limits, DType::F32, &device, &options).expect("an engine");
            let mut replies: HashMap<SequenceId, Vec<u32>> = HashMap::new();
            let mut ids = vec![];
            for round in 0..60u32 {
                let params = match round % 3 {
                    0 => SamplingParams::default(),
                    _ => SamplingParams { temperature: 1.0, top_k: Some(20), top_p: 0.95, ..SamplingParams::default() },
                };
                let params = SamplingParams { max_tokens: 30, seed: Some(round.into()), ..params };
                // Later prompts begin with what earlier ones have left in the cache.
                let prompt = (0..5 + 17 * (round % 4)).map(|j| 3 + (round % 5 * 31 + j * 7) % 200).collect();
                ids.push(engine.add(Request { prompt, stable_len: 0, params }).expect("valid"));
                // Replies are of interest, not which step brings a token: they come a step later where none waits.
                if round % 7 == 6 {
                    engine.cancel(ids[round as usize - 2]);
                }
                for _ in 0..if round % 10 == 9 { 100 } else { round % 4 } {
                    for output in engine.step().expect("a step") {
                        replies.entry(output.id).or_default().push(output.token.expect("a token").id);
                    }
                }
            }
            while !engine.is_idle() {
                for output in engine.step().expect("a step") {
                    replies.entry(output.id).or_default().push(output.token.expect("a token").id);
                }
            }
            let is_whole = |index: &usize| !(4..60).step_by(7).any(|cancelled| cancelled == *index);
            (0..ids.len()).filter(is_whole).map(|index| replies.remove(&ids[index])).collect::<Vec<_>>()
        };
        let (ahead, waiting) = (of(true), of(false));
        let same = ahead.iter().zip(&waiting).filter(|(ahead, waiting)| ahead == waiting).count();
        assert!(ahead.iter().all(|reply| reply.as_ref().is_some_and(|reply| !reply.is_empty())));
        // Which requests share a step moves the last bits, and a draw that falls next to an edge with them.
        assert!(same * 20 >= ahead.len() * 19, "{fixture}: {same} of {} replies", ahead.len());
        let ended = ahead.iter().flatten().filter(|reply| reply.len() < 30).count();
        assert!(ended > 10, "{fixture}: {ended} replies were ended by a token");
    }
}

/// How far apart the log-probabilities of two replies are, on average, and over how many tokens: until the tokens differ,
/// after a near tie, and what follows is another text.
fn apart(a: &Reply, b: &Reply) -> (f64, usize) {
    let common = a.iter().zip(b).take_while(|((token, _), (other, _))| token == other);
    let differences =
        common.map(|((_, bits), (_, others))| f64::from((f32::from_bits(bits[0]) - f32::from_bits(others[0])).abs()));
    let (sum, count) = differences.fold((0.0, 0), |(sum, count), difference| (sum + difference, count + 1));
    (sum / f64::max(count as f64, 1.0), count)
}

#[test]
fn replies_in_company_are_the_lone_ones_within_the_rounding() {
    let Some(device) = gpu() else { return };
    let mut random = Random::new(7);
    let requests: Vec<Request> = (0..64)
        .map(|_| {
            let prompt = (0..1 + random.below(150)).map(|_| 3 + random.below(200) as u32).collect();
            let max_tokens = 4 + random.below(12);
            let params =
                SamplingParams { max_tokens, logprobs: Some(1), ignore_eos: true, ..SamplingParams::default() };
            Request { prompt, stable_len: 0, params }
        })
        .collect();
    for fixture in FIXTURES {
        let options = EngineOptions { max_sequences: 64, ..EngineOptions::default() };
        let of = |dtype, requests: &[Request]| replies(fixture, dtype, &device, &options, requests);
        let lone = |dtype| requests.iter().flat_map(|request| of(dtype, std::slice::from_ref(request))).collect();
        let (exact, rounded): (Vec<Reply>, Vec<Reply>) = (lone(DType::F32), lone(DType::BF16));
        let mean = |a: &[Reply], b: &[Reply]| {
            let (sum, count) = a
                .iter()
                .zip(b)
                .map(|(a, b)| apart(a, b))
                .fold((0.0, 0), |(sum, count), (mean, len)| (sum + mean * len as f64, count + len));
            assert!(count > 256, "{fixture}: {count} tokens in common");
            sum / count as f64
        };
        let difference = mean(&of(DType::F32, &requests), &exact);
        assert!(difference < 1e-4, "{fixture}: log-probabilities {difference} apart");
        // Company may cost no more than the dtype does.
        let (difference, rounding) = (mean(&of(DType::BF16, &requests), &rounded), mean(&rounded, &exact));
        assert!(difference < rounding, "{fixture}: log-probabilities {difference} apart in bf16, {rounding} from f32");
    }
}

/// The host finishes one batch of texts while the GPU has the next.
#[test]
fn texts_of_many_batches_are_those_of_one() {
    let Some(_) = gpu() else { return };
    let texts: Vec<String> = (0..200).map(|i| format!("Text {i} {}", "of several words ".repeat(i * 7 % 23))).collect();
    let embed = |batch_tokens| {
        let options = EmbedderOptions {
            device: DeviceChoice::Cuda,
            dtype: Some(DType::F32),
            batch_tokens: Some(batch_tokens),
            ..EmbedderOptions::default()
        };
        let embedder = Embedder::demo(&options).expect("the demo");
        embedder.embed(&texts).expect("embeddings")
    };
    for (a, b) in embed(128).iter().zip(&embed(100_000)) {
        assert_eq!((a.tokens, a.sparse.len()), (b.tokens, b.sparse.len()));
        let all = |embedding: &Embedding| [&embedding.dense[..], &embedding.colbert.values].concat();
        let far = all(a).iter().zip(&all(b)).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far < 1e-5, "{far} apart");
    }
}

#[test]
fn the_demo_knows_its_facts() {
    if gpu().is_none() {
        return;
    }
    for dtype in [DType::F32, DType::BF16] {
        let engine = EngineOptions { max_sequences: 64, ..EngineOptions::default() };
        let options = Options { device: DeviceChoice::Cuda, dtype: Some(dtype), engine, ..Options::default() };
        assert_eq!(support::wrong_facts(&options), vec![] as Vec<String>, "{dtype:?}");
    }
}
