//! One sample: a test, run once.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use models::{Heads, Packing, Quantization};
use taper::{
    Embedder, EmbedderOptions, Engine, EngineOptions, ModelLimits, Request, SamplingParams, SequenceId, Token,
};

use super::super::{Error, Result};
use super::{Args, Kind, Setup, Test};

/// Tokens in a block of the cache.
pub const BLOCK: usize = 32;
/// Sequences that fit into a step on every device.
pub const MAX_BATCH: usize = 512;

/// What a test took.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// Over all sequences.
    pub tokens: usize,
    pub seconds: f64,
}

/// Checkpoints of states and windows, so that a test can begin at its depth.
pub fn checkpoints(args: &Args) -> usize {
    args.max_batch() * (args.depth.len() + 2)
}

/// A loaded model.
#[expect(clippy::large_enum_variant, reason = "there are a few of them, and none moves")]
pub enum Subject {
    Decoder(Decoder),
    Encoder { embedder: Embedder, random: Random, vocab: usize },
}

impl Subject {
    /// `longest` is the context that the tests take.
    pub fn load(setup: &Setup, args: &Args, quantization: Option<Quantization>, longest: usize) -> Result<Self> {
        let vocab = setup.description.vocab_size;
        if setup.is_encoder {
            let options = EmbedderOptions {
                device: args.device.choice(),
                dtype: Some(setup.dtype),
                quantization,
                pack_cache: args.pack_cache.cache(),
                heads: Some(Heads::DENSE),
                ..EmbedderOptions::default()
            };
            let embedder = Embedder::open(&setup.checkpoint, &options)?;
            return Ok(Self::Encoder { embedder, random: Random::default(), vocab });
        }
        let packing = Packing { quantization, cache: args.pack_cache.cache() };
        let model = setup.config.load_quantized(&setup.checkpoint, setup.dtype, &setup.device, packing)?;
        let max_positions = setup.description.max_positions;
        let limits = ModelLimits { vocab_size: vocab, sampled_vocab: vocab, max_positions, stop_ids: vec![] };
        let options = EngineOptions {
            max_sequences: args.max_batch(),
            block_size: BLOCK,
            memory: Some(setup.memory(args, longest)),
            max_checkpoints: checkpoints(args),
            ..EngineOptions::default()
        };
        let kv_dtype = taper::kv_dtype(&setup.device, setup.dtype, quantization);
        let engine = Engine::new(model, limits, kv_dtype, &setup.device, &options)?;
        Ok(Self::Decoder(Decoder { engine, random: Random::default(), prefixes: vec![], requests: vec![] }))
    }

    /// `None` if `stop` was set meanwhile.
    pub fn measure(&mut self, test: &Test, stop: &AtomicBool) -> Result<Option<Sample>> {
        match self {
            Self::Decoder(decoder) => decoder.measure(test, stop),
            Self::Encoder { embedder, random, vocab } => {
                let texts = (0..test.batch).map(|_| random.ids(test.tokens, *vocab)).collect();
                let start = Instant::now();
                embedder.embed_tokens(texts)?;
                let seconds = start.elapsed().as_secs_f64();
                Ok(Some(Sample { tokens: test.batch * test.tokens, seconds }))
            }
        }
    }
}

/// A language model, with what its sequences begin with.
pub struct Decoder {
    engine: Engine,
    random: Random,
    /// For each sequence of a batch; a shorter depth is the beginning of a longer one.
    prefixes: Vec<Vec<u32>>,
    /// What the current test asked for.
    requests: Vec<SequenceId>,
}

impl Decoder {
    fn measure(&mut self, test: &Test, stop: &AtomicBool) -> Result<Option<Sample>> {
        let sample = match self.fill(test, stop)? {
            true if test.kind == Kind::Decode => self.decode(test, stop),
            true => self.prompt(test, stop),
            false => Ok(None),
        };
        for request in self.requests.drain(..) {
            self.engine.cancel(request);
        }
        sample
    }

    /// Runs each sequence up to its depth, unless the cache holds that from an earlier test.
    fn fill(&mut self, test: &Test, stop: &AtomicBool) -> Result<bool> {
        let vocab = self.engine.limits().vocab_size;
        for sequence in 0..test.batch {
            if self.prefixes.len() == sequence {
                self.prefixes.push(vec![]);
            }
            let prefix = &mut self.prefixes[sequence];
            let missing = test.depth.saturating_sub(prefix.len());
            prefix.extend(self.random.ids(missing, vocab));
            let prompt = prefix[..test.depth].to_vec();
            if self.engine.resumable(&prompt) < test.depth {
                self.add(prompt, test.depth, 1)?;
            }
        }
        while !self.engine.is_idle() && !stop.load(Ordering::Relaxed) {
            self.step()?;
        }
        Ok(self.engine.is_idle())
    }

    fn prompt(&mut self, test: &Test, stop: &AtomicBool) -> Result<Option<Sample>> {
        self.start(test, test.tokens, 1)?;
        let start = Instant::now();
        let mut tokens = 0;
        while !self.engine.is_idle() {
            // What the cache had of the depth did not run.
            tokens += self.step()?.iter().map(|(_, token)| token.reuse.prompt - token.reuse.reused).sum::<usize>();
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
        }
        Ok(Some(Sample { tokens, seconds: start.elapsed().as_secs_f64() }))
    }

    fn decode(&mut self, test: &Test, stop: &AtomicBool) -> Result<Option<Sample>> {
        self.start(test, 1, usize::MAX)?;
        let mut begun = BTreeSet::new();
        while begun.len() < test.batch {
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
            if self.engine.is_idle() {
                return Err(Error::Usage("a sequence ended before the others began: ask for fewer at once".into()));
            }
            begun.extend(self.step()?.into_iter().map(|(id, _)| id));
        }
        let start = Instant::now();
        let mut tokens = 0;
        for _ in 0..test.tokens {
            tokens += self.step()?.len();
            if stop.load(Ordering::Relaxed) {
                return Ok(None);
            }
        }
        Ok(Some(Sample { tokens, seconds: start.elapsed().as_secs_f64() }))
    }

    /// Queues a batch: each sequence has its prefix, then `tokens` that were never seen.
    fn start(&mut self, test: &Test, tokens: usize, max_tokens: usize) -> Result<()> {
        let vocab = self.engine.limits().vocab_size;
        for sequence in 0..test.batch {
            let mut prompt = self.prefixes[sequence][..test.depth].to_vec();
            prompt.extend(self.random.ids(tokens, vocab));
            self.add(prompt, test.depth, max_tokens)?;
        }
        Ok(())
    }

    fn add(&mut self, prompt: Vec<u32>, stable_len: usize, max_tokens: usize) -> Result<()> {
        let params = SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::default() };
        self.requests.push(self.engine.add(Request { prompt, stable_len, params })?);
        Ok(())
    }

    fn step(&mut self) -> Result<Vec<(SequenceId, Token)>> {
        let outputs = self.engine.step()?;
        outputs.into_iter().map(|output| Ok((output.id, output.token?))).collect()
    }
}

/// Token ids without a pattern (SplitMix64, <https://prng.di.unimi.it/splitmix64.c>): no two tests share a prefix, and
/// two runs are alike.
#[derive(Default)]
pub struct Random(u64);

impl Random {
    fn ids(&mut self, count: usize, vocab: usize) -> Vec<u32> {
        (0..count).map(|_| (self.next() % vocab as u64) as u32).collect()
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
