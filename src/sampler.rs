//! Logits to token: what a request may ask of sampling, and the state that one sequence's sampling needs.
//!
//! The engine makes one [`Sampler`] per sequence and hands it that sequence's row of logits. The transforms and their
//! order are those of transformers 5.23: penalties, temperature, top-k, top-p, min-p. The presence and frequency
//! penalties, which transformers lacks, are those of the `OpenAI` API.
//!
//! The random number of a step depends on the seed and on how many tokens the sequence has, nothing else: neighbours,
//! batch order and preemption do not change a reply.

use std::borrow::Cow;
use std::cmp::Ordering;
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::fmt::Display;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;

use kernels::sampling::{Draw, MAX_K};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How the tokens of a reply are chosen, and how many.
///
/// A model's own defaults come from [`SamplingParams::from_generation_config`]; a caller changes some of them with
/// struct update syntax:
///
/// ```
/// # use taper::SamplingParams;
/// # fn main() -> taper::Result<()> {
/// # let folder = std::path::Path::new(".");
/// let defaults = SamplingParams::from_generation_config(&folder.join("generation_config.json"))?;
/// let params = SamplingParams { temperature: 0.7, seed: Some(1), ..defaults };
/// params.validate()
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct SamplingParams {
    /// Divides the logits. 0 is greedy: the most likely token after the penalties, and no filter applies. Default 0.
    pub temperature: f32,
    /// Keeps the `k` most likely tokens, at least 1. Default `None`: all of them.
    pub top_k: Option<usize>,
    /// Keeps the most likely tokens up to and including the one that brings their probability to `top_p`, above 0 and
    /// at most 1. Default 1: all of them.
    pub top_p: f32,
    /// Keeps tokens at least `min_p` times as likely as the most likely one, from 0 to 1. Default 0: all of them.
    pub min_p: f32,
    /// Divides the positive logits and multiplies the negative ones of every token in the prompt or the reply, above 0.
    /// Default 1: no change.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every token in the reply, from -2 to 2. Default 0.
    pub presence_penalty: f32,
    /// Subtracted from a token's logit once for each time the reply has it, from -2 to 2. Default 0.
    pub frequency_penalty: f32,
    /// Two runs with one seed give one reply. Default `None`: a seed is drawn for each sequence, see [`Sampler::seed`].
    pub seed: Option<u64>,
    /// The reply ends after this many tokens, at least 1; the model's context may end it earlier. Default 4096.
    pub max_tokens: usize,
    /// Reports the log-probability of each token, and of this many most likely ones. Default `None`: neither.
    pub logprobs: Option<usize>,
    /// Goes on past end-of-sequence tokens, up to `max_tokens`. Default false.
    pub ignore_eos: bool,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: None,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: 4096,
            logprobs: None,
            ignore_eos: false,
        }
    }
}

impl SamplingParams {
    /// The defaults that a model's `generation_config.json` asks for; those of this type if there is no such file.
    ///
    /// As in transformers, a model samples only if its file says `do_sample`, and a `top_k` of 0 means none; unlike
    /// there, one that is absent means none too. Fields other than `do_sample`, `temperature`, `top_k`, `top_p`,
    /// `min_p` and `repetition_penalty` are not read.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, is not JSON, or holds a value out of range.
    pub fn from_generation_config(path: &Path) -> Result<Self> {
        match std::fs::read(path) {
            Ok(bytes) => Self::parse_generation_config(path, &bytes),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(Error::Io { path: path.into(), source }),
        }
    }

    /// As [`SamplingParams::from_generation_config`], from the file's content. Errors name `path`.
    pub(crate) fn parse_generation_config(path: &Path, bytes: &[u8]) -> Result<Self> {
        let invalid = |message| Error::Model { path: path.into(), message };
        let config: GenerationConfig = serde_json::from_slice(bytes).map_err(|error| invalid(error.to_string()))?;
        let default = Self::default();
        let params = Self {
            temperature: if config.do_sample == Some(true) { config.temperature.unwrap_or(1.0) } else { 0.0 },
            top_k: config.top_k.filter(|&k| k > 0),
            top_p: config.top_p.unwrap_or(default.top_p),
            min_p: config.min_p.unwrap_or(default.min_p),
            repetition_penalty: config.repetition_penalty.unwrap_or(default.repetition_penalty),
            ..default
        };
        params.validate().map_err(|error| invalid(error.to_string()))?;
        Ok(params)
    }

    /// Checks every field against its range.
    ///
    /// # Errors
    ///
    /// [`Error::Request`] with the first field out of range, its value and the range. NaN is in no range.
    pub fn validate(&self) -> Result<()> {
        let check = |name: &str, got: &dyn Display, valid: bool, expected: &str| {
            if valid { Ok(()) } else { Err(Error::Request(format!("{name}: got {got}, expected {expected}"))) }
        };
        let Self { temperature, top_k, top_p, min_p, repetition_penalty, max_tokens, .. } = *self;
        let is_valid = temperature.is_finite() && temperature >= 0.0;
        check("temperature", &temperature, is_valid, "a finite number, at least 0")?;
        check("top_k", &0, top_k != Some(0), "at least 1")?;
        check("top_p", &top_p, top_p > 0.0 && top_p <= 1.0, "a number above 0, at most 1")?;
        check("min_p", &min_p, (0.0..=1.0).contains(&min_p), "a number from 0 to 1")?;
        let is_valid = repetition_penalty.is_finite() && repetition_penalty > 0.0;
        check("repetition_penalty", &repetition_penalty, is_valid, "a finite number above 0")?;
        let offsets = [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (name, penalty) in offsets {
            check(name, &penalty, (-2.0..=2.0).contains(&penalty), "a number from -2 to 2")?;
        }
        check("max_tokens", &max_tokens, max_tokens > 0, "at least 1")
    }

    fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

#[derive(Deserialize)]
struct GenerationConfig {
    do_sample: Option<bool>,
    temperature: Option<f32>,
    top_k: Option<usize>,
    top_p: Option<f32>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
}

/// The choice of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The chosen token.
    pub token: u32,
    /// Present if [`SamplingParams::logprobs`] asks for it.
    pub logprobs: Option<Logprobs>,
}

/// Natural logarithms of probabilities as the model gives them, before any penalty, temperature or filter, among the
/// tokens that may be sampled at all.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The most likely tokens, best first, equal ones by id. The chosen one need not be among them.
    pub top: Vec<(u32, f32)>,
}

/// Chooses the tokens of one sequence, and remembers what that takes: its seed and the tokens it has.
///
/// Nothing here changes when the engine preempts a sequence and computes it again.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    seed: u64,
    /// Tokens chosen so far.
    step: u64,
    vocab_limit: usize,
    /// Times each token is in the reply; tokens of the prompt alone are there with 0.
    counts: HashMap<u32, u32>,
}

impl Sampler {
    /// A sampler for a sequence that begins with `prompt`. Tokens from `vocab_limit` on are never chosen: the rows that
    /// pad a model's embedding beyond its tokenizer's vocabulary.
    ///
    /// # Errors
    ///
    /// As [`SamplingParams::validate`].
    pub fn new(params: SamplingParams, prompt: &[u32], vocab_limit: usize) -> Result<Self> {
        params.validate()?;
        let seed = params.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let prompt = if params.repetition_penalty == 1.0 { &[] } else { prompt };
        Ok(Self { params, seed, step: 0, vocab_limit, counts: prompt.iter().map(|&token| (token, 0)).collect() })
    }

    /// The seed in use: the one asked for, or the one drawn in its absence.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// How the token `ahead` tokens behind the next one is drawn, if its row need not leave the device for that: penalties,
    /// log-probabilities and drawing from more than [`MAX_K`] tokens take the whole of it. The choice is then to be
    /// reported to [`Sampler::accept`].
    pub(crate) fn draw(&self, ahead: u64) -> Option<Draw> {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        if self.params.has_penalties() || self.params.logprobs.is_some() {
            return None;
        }
        if temperature == 0.0 {
            return Some(Draw::MOST_LIKELY);
        }
        // Rounding must not bring it to one.
        let position = (uniform(self.seed, self.step + ahead) as f32).min(1.0 - f32::EPSILON / 2.0);
        let top_k = top_k.filter(|&k| k <= MAX_K)?;
        Some(Draw { temperature, top_k, top_p, min_p, position })
    }

    /// Records a token that was chosen for this sequence without [`Sampler::sample`].
    pub fn accept(&mut self, token: u32) {
        self.step += 1;
        if self.params.has_penalties() {
            *self.counts.entry(token).or_insert(0) += 1;
        }
    }

    /// Chooses the sequence's next token from its `logits` `[vocab]`, where -inf forbids a token, and records it. Equal
    /// logits count as ordered by id, the lowest first.
    ///
    /// # Errors
    ///
    /// Logits that leave nothing to choose from: NaN or +inf among them, or no finite one.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled> {
        let raw = &logits[..self.vocab_limit.min(logits.len())];
        let raw_max = checked_max(raw)?;
        let logits = self.penalised(raw);
        let max = if self.params.has_penalties() { checked_max(&logits)? } else { raw_max };
        let token = if self.params.temperature == 0.0 {
            first(&logits, max).expect("the maximum is one of them")
        } else {
            draw(&self.candidates(&logits, max), uniform(self.seed, self.step)) as usize
        };
        let logprobs = self.params.logprobs.map(|top| {
            let mass: f64 = raw.iter().map(|&logit| f64::from((logit - raw_max).exp())).sum();
            let logprob = |logit: f32| (f64::from(logit - raw_max) - mass.ln()) as f32;
            let mut best = largest(raw, top);
            best.sort_unstable_by(better);
            let top = best.into_iter().map(|(token, logit)| (token, logprob(logit))).collect();
            Logprobs { chosen: logprob(raw[token]), top }
        });
        let token = token as u32;
        self.accept(token);
        Ok(Sampled { token, logprobs })
    }

    fn penalised<'a>(&self, logits: &'a [f32]) -> Cow<'a, [f32]> {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = self.params;
        if !self.params.has_penalties() {
            return Cow::Borrowed(logits);
        }
        let mut logits = logits.to_vec();
        for (&token, &count) in &self.counts {
            // The prompt may hold tokens that are never chosen.
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit < 0.0 { *logit * repetition_penalty } else { *logit / repetition_penalty };
            if count > 0 {
                *logit -= presence_penalty + count as f32 * frequency_penalty;
            }
        }
        Cow::Owned(logits)
    }

    /// The tokens that the filters leave, by id, each with its probability over that of the most likely one.
    fn candidates(&self, logits: &[f32], max: f32) -> Vec<(u32, f32)> {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let weigh = |(token, logit): (u32, f32)| (token, ((logit - max) / temperature).exp());
        match top_k {
            Some(k) => {
                let mut best = largest(logits, k);
                best.sort_unstable_by_key(|&(token, _)| token);
                filter(best.into_iter().map(weigh), top_p.into(), min_p)
            }
            None => filter((0..).zip(logits.iter().copied()).map(weigh), top_p.into(), min_p),
        }
    }
}

/// The error of a row that has no most likely token.
pub(crate) fn nothing_to_choose_from() -> Error {
    candle_core::Error::Msg("sampler: NaN or +inf among the logits, or none of them is finite".into()).into()
}

/// The largest of `logits`, or an error if they leave nothing to choose from.
fn checked_max(logits: &[f32]) -> Result<f32> {
    // In lanes, of which the compiler makes vectors.
    const LANES: usize = 16;
    let (mut max, mut has_nan) = ([f32::NEG_INFINITY; LANES], [false; LANES]);
    let (whole, rest) = logits.as_chunks::<LANES>();
    for logits in whole {
        for (lane, &logit) in logits.iter().enumerate() {
            has_nan[lane] |= logit.is_nan();
            max[lane] = if logit > max[lane] { logit } else { max[lane] };
        }
    }
    let has_nan = has_nan.contains(&true) || rest.iter().any(|logit| logit.is_nan());
    let max = max.iter().chain(rest).copied().fold(f32::NEG_INFINITY, f32::max);
    let message = if has_nan {
        "NaN among the logits".into()
    } else if max == f32::INFINITY {
        "+inf among the logits".into()
    } else if max == f32::NEG_INFINITY {
        format!("none of {} logits is finite", logits.len())
    } else {
        return Ok(max);
    };
    Err(candle_core::Error::Msg(format!("sampler: {message}")).into())
}

/// Where `value` first is; a part in which it may be is searched without a branch for each logit.
fn first(logits: &[f32], value: f32) -> Option<usize> {
    const PART: usize = 256;
    let has = |part: &[f32]| part.iter().fold(false, |found, &logit| found | (logit == value));
    let start = PART * logits.chunks(PART).position(has)?;
    logits[start..].iter().position(|&logit| logit == value).map(|index| start + index)
}

/// Larger values first; equal ones by id.
fn better(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.partial_cmp(&a.1).expect("logits are checked for NaN").then(a.0.cmp(&b.0))
}

/// The `k` best of the logits above -inf with their ids, in no order.
fn largest(logits: &[f32], k: usize) -> Vec<(u32, f32)> {
    let k = k.min(logits.len());
    if k == 0 {
        return Vec::new();
    }
    let mut kept = Vec::with_capacity(2 * k);
    // Most logits fail one comparison with the k-th best so far; a selection runs once in k that pass.
    let mut floor = f32::NEG_INFINITY;
    for (token, &logit) in (0..).zip(logits) {
        if logit > floor {
            kept.push((token, logit));
            if kept.len() == 2 * k {
                keep_best(&mut kept, k);
                floor = kept[k - 1].1;
            }
        }
    }
    keep_best(&mut kept, k);
    kept
}

fn keep_best(kept: &mut Vec<(u32, f32)>, k: usize) {
    if k < kept.len() {
        kept.select_nth_unstable_by(k - 1, better);
        kept.truncate(k);
    }
}

/// What top-p and then min-p leave of `candidates`, in their order; the best one weighs 1.
fn filter(candidates: impl Iterator<Item = (u32, f32)> + Clone, top_p: f64, min_p: f32) -> Vec<(u32, f32)> {
    if top_p == 1.0 {
        return candidates.filter(|&(_, weight)| weight >= min_p).collect();
    }
    let (count, total) =
        candidates.clone().fold((0.0, 0.0), |(n, sum), (_, weight)| (n + 1.0, sum + f64::from(weight)));
    // Candidates below this hold less than `1 - top_p` of the whole, so the better ones hold all that is wanted.
    let floor = (1.0 - top_p) * total / count;
    let mut kept: Vec<_> = candidates.filter(|&(_, w)| f64::from(w) >= floor && w >= min_p).collect();
    let last = last_wanted(kept.clone(), top_p * total);
    kept.retain(|candidate| better(candidate, &last).is_le());
    kept
}

/// The candidate that brings the weight of those from the best one on to `wanted`, or else the worst.
fn last_wanted(mut candidates: Vec<(u32, f32)>, mut wanted: f64) -> (u32, f32) {
    let mut rest = candidates.as_mut_slice();
    while rest.len() > 1 {
        let middle = rest.len() / 2;
        rest.select_nth_unstable_by(middle, better);
        let (top, bottom) = rest.split_at_mut(middle);
        let held = mass(top);
        if held < wanted {
            wanted -= held;
            rest = bottom;
        } else {
            rest = top;
        }
    }
    rest[0]
}

fn mass(candidates: &[(u32, f32)]) -> f64 {
    candidates.iter().map(|&(_, weight)| f64::from(weight)).sum()
}

/// The candidate at `position`, from 0 to below 1, of their weights laid end to end.
fn draw(candidates: &[(u32, f32)], position: f64) -> u32 {
    let target = position * mass(candidates);
    let mut reached = 0.0;
    let drawn = candidates.iter().find(|&&(_, weight)| {
        reached += f64::from(weight);
        reached > target
    });
    // The product may round up to the whole mass.
    let drawn = drawn.or_else(|| candidates.iter().rfind(|&&(_, weight)| weight > 0.0));
    drawn.expect("the most likely token passes every filter").0
}

/// A number from 0 to below 1 for one step of one sequence: output `step` of SplitMix64 seeded with a mix of `seed`, so
/// that neighbouring seeds share no numbers.
///
/// Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
fn uniform(seed: u64, step: u64) -> f64 {
    fn mix(mut z: u64) -> u64 {
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    let state = mix(seed).wrapping_add((step + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    (mix(state) >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests;
