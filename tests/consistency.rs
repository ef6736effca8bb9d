//! One request, one reply: whatever shares its steps, however its prompt is cut, from cached prefixes or not, after
//! preemption. On the CPU the log-probabilities are equal to the bit, not only the tokens.

mod support;

use candle_core::{DType, Device};
use kernels::testing::Random;
use models::{Cache, CacheConfig, CausalLm, Checkpoint, Config};
use taper::{Engine, EngineOptions, ModelLimits, Request, SamplingParams};

const FIXTURES: [(&str, &str, u32); 5] = [
    ("qwen3", "base", 0),
    ("qwen3_5", "base", 0),
    ("qwen3_5", "ratio1", 0),
    ("qwen3_5_moe", "base", 4),
    ("gemma4", "base", 0),
];

fn engine((family, variant, seed): (&str, &str, u32), options: &EngineOptions) -> Engine {
    let checkpoint = Checkpoint::Folder(support::fixture(family, variant, seed).join("f32"));
    let config = Config::read(&checkpoint).expect("a fixture");
    let model = config.load(&checkpoint, DType::F32, &Device::Cpu).expect("a fixture");
    let vocab_size = config.describe().vocab_size;
    let limits = ModelLimits { vocab_size, sampled_vocab: vocab_size, max_positions: 256, stop_ids: vec![] };
    Engine::new(model, limits, DType::F32, &Device::Cpu, options).expect("enough memory")
}

/// Tokens and the bits of their log-probabilities.
type Reply = Vec<(u32, u32)>;

/// Runs the requests, adding the next one every `stagger` steps.
fn run(engine: &mut Engine, requests: &[Request], stagger: usize) -> Vec<Reply> {
    let mut replies = vec![vec![]; requests.len()];
    let mut ids = vec![];
    for step in 0.. {
        if ids.len() < requests.len() && (step % stagger == 0 || engine.is_idle()) {
            ids.push(engine.add(requests[ids.len()].clone()).expect("a valid request"));
        }
        if ids.len() == requests.len() && engine.is_idle() {
            break;
        }
        for output in engine.step().expect("a step") {
            let index = ids.iter().position(|id| *id == output.id).expect("a known request");
            let token = output.token.expect("a token");
            replies[index].push((token.id, token.logprobs.expect("asked for").chosen.to_bits()));
        }
    }
    replies
}

/// Requests whose prompts share prefixes of many lengths.
fn requests(count: u64) -> Vec<Request> {
    let mut random = Random::new(7);
    let base: Vec<u32> = (0..150).map(|_| random.below(400) as u32).collect();
    (0..count)
        .map(|index| {
            let mut prompt = base[..random.below(100)].to_vec();
            prompt.extend((0..1 + random.below(60)).map(|_| random.below(400) as u32));
            let params = SamplingParams {
                max_tokens: 5 + random.below(30),
                temperature: if index % 2 == 0 { 0.0 } else { 1.0 },
                seed: Some(index),
                logprobs: Some(1),
                ..SamplingParams::default()
            };
            Request { stable_len: random.below(prompt.len()), prompt, params }
        })
        .collect()
}

#[test]
fn a_reply_does_not_depend_on_its_schedule() {
    let requests = requests(12);
    for fixture in FIXTURES {
        let alone: Vec<Reply> = requests
            .iter()
            .map(|request| {
                run(&mut engine(fixture, &EngineOptions::default()), std::slice::from_ref(request), 1).remove(0)
            })
            .collect();
        for (tokens, block_size, sequences, memory) in
            [(512, 16, 8, 1 << 30), (7, 4, 3, 1 << 30), (64, 8, 5, 1_000_000), (33, 32, 4, 600_000)]
        {
            let options = EngineOptions {
                max_tokens_per_step: Some(tokens),
                block_size,
                max_sequences: sequences,
                memory: Some(memory),
                max_checkpoints: 6,
                checkpoint_interval: Some(32),
                ..EngineOptions::default()
            };
            let mut engine = engine(fixture, &options);
            for (round, stagger) in [2, 3].into_iter().enumerate() {
                for (index, reply) in run(&mut engine, &requests, stagger).into_iter().enumerate() {
                    assert_eq!(reply, alone[index], "{fixture:?}, request {index}, {options:?}, round {round}");
                }
            }
        }
    }
}

/// Logits of the last token of `prompt`, run in chunks of `sizes` on poisoned pages and slots, `strangers` packed
/// beside each chunk; `last_only` asks for nothing but these logits.
fn logits(
    model: &dyn CausalLm,
    prompt: &[u32],
    sizes: &[usize],
    strangers: bool,
    last_only: bool,
    random: &mut Random,
) -> Vec<u32> {
    use kernels::{Batch, Segment};
    const BLOCK_SIZE: usize = 8;
    let config = CacheConfig {
        num_blocks: 40,
        num_window_blocks: 40,
        block_size: BLOCK_SIZE,
        num_slots: 6,
        dtype: DType::F32,
        device: Device::Cpu,
    };
    let mut cache = Cache::new(&model.cache_specs(), config).expect("memory");
    cache.poison().expect("memory");
    let blocks = random.permutation(40);
    let (ours, theirs) = blocks.split_at(30);
    let slots = random.permutation(6);
    let stranger = [3u32, 1, 4, 1, 5];
    let (mut past, mut last): (usize, Vec<f32>) = (0, vec![]);
    for (turn, &size) in sizes.iter().enumerate() {
        let segment = Segment { tokens: &prompt[past..past + size], past, blocks: ours, slot: slots[0] };
        let beside = Segment { tokens: &stranger, past: 0, blocks: theirs, slot: slots[1] };
        let (segments, row) = match (strangers, turn % 2) {
            (false, _) => (vec![segment], 0),
            (true, 0) => (vec![beside, segment], 1),
            (true, _) => (vec![segment, beside], 0),
        };
        let batch = Batch::new(&segments, BLOCK_SIZE, &Device::Cpu).expect("a batch");
        let hidden = match last_only {
            // A chunk that ends inside the prompt is asked for nothing.
            true if past + size < prompt.len() => model.forward_last(&batch, &mut cache, &[]).expect("a step"),
            true => model.forward_last(&batch, &mut cache, &[row]).expect("a step"),
            false => {
                let hidden = model.forward(&batch, &mut cache).expect("a step");
                Some(hidden.index_select(&batch.last_rows(&[row]).expect("a row"), 0).expect("a row"))
            }
        };
        if let Some(hidden) = hidden {
            last = model.logits(&hidden).expect("logits").squeeze(0).expect("one row").to_vec1().expect("f32");
        }
        past += size;
    }
    assert_eq!(past, prompt.len());
    last.into_iter().map(f32::to_bits).collect()
}

#[test]
fn whole_is_chunked_is_token_by_token_is_packed() {
    let mut random = Random::new(3);
    let prompt: Vec<u32> = (0..133).map(|_| random.below(400) as u32).collect();
    for fixture in FIXTURES {
        let (family, variant, seed) = fixture;
        let checkpoint = Checkpoint::Folder(support::fixture(family, variant, seed).join("f32"));
        let config = Config::read(&checkpoint).expect("a fixture");
        let model = config.load(&checkpoint, DType::F32, &Device::Cpu).expect("a fixture");
        let whole = logits(&*model, &prompt, &[133], false, false, &mut random);
        assert!(whole.iter().all(|bits| f32::from_bits(*bits).is_finite()));
        for sizes in [vec![133], vec![64, 64, 5], vec![1, 63, 69], vec![100, 32, 1], vec![1; 133]] {
            for (strangers, last_only) in [(false, false), (true, false), (false, true), (true, true)] {
                let cut = logits(&*model, &prompt, &sizes, strangers, last_only, &mut random);
                let case = format!("{sizes:?}, strangers {strangers}, last_only {last_only}");
                assert_eq!(cut, whole, "{fixture:?}: {case}");
            }
        }
    }
}

#[test]
fn a_prompt_that_never_fits_is_refused_with_the_numbers() {
    let prompt = |len| Request { prompt: vec![1; len], ..Request::default() };
    let small =
        EngineOptions { memory: Some(1 << 17), max_sequences: 1, max_checkpoints: 0, ..EngineOptions::default() };
    let mut engine = engine(FIXTURES[0], &small);
    let holds = engine.max_context();
    assert!(holds < 256);
    engine.add(prompt(holds - 1)).expect("it fits");
    let error = engine.add(prompt(holds)).expect_err("it does not").to_string();
    assert!(error.starts_with(&format!("the prompt has {holds} tokens, and the cache of 0.1 MiB holds {holds} for")));
    assert!(error.ends_with(": it takes 0.1 MiB, or a shorter prompt"), "{error}");
}
