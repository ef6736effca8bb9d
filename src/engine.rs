//! The engine: requests in, a step at a time, tokens out.
//!
//! A step asks the scheduler what runs, makes the copies that prefix reuse needs, runs one forward pass over prompt
//! chunks and decoding sequences alike, and samples where a sequence's last token has run. Everything else (streaming,
//! conversations, many prompts at once) is a loop over [`Engine::step`]. A GPU that replays decode steps and may choose the
//! tokens itself is given the next one before the host has seen this one's: [`Engine::step`] then returns what an earlier
//! call has queued.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use kernels::device::Download;
use kernels::sampling::{Draw, Draws, NOTHING, argmax, sample, samples_on};
use kernels::{Batch, Segment};
use models::{Cache, CacheConfig, CausalLm, cache};

use crate::prefix_cache::Prefix;
use crate::recorded::{Inputs, Recordings, Runner, Step};
use crate::sampler::{self, Logprobs, Sampled, Sampler, SamplingParams};
use crate::scheduler::{Copy, Plan, Scheduler, Work};
use crate::sequence::{Reuse, Sequence, SequenceId};
use crate::sizes::Sizes;
use crate::snapshot::{Snapshot, SnapshotLayout, index_of, pick_blocks};
use crate::{Error, Result};

/// How an engine shares its memory and its steps. The defaults suit one person at one machine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Sequences that run at the same time; further requests wait. Default 8.
    pub max_sequences: usize,
    /// Tokens that a step runs at most, over all sequences. Default: 512 on the CPU, 4096 elsewhere.
    pub max_tokens_per_step: Option<usize>,
    /// Tokens per block of keys and values. Default 32.
    pub block_size: usize,
    /// Bytes for keys, values, states and checkpoints together. Default: half of the free memory.
    pub memory: Option<usize>,
    /// Longest sequence in tokens, if shorter than what the model allows.
    pub max_context: Option<usize>,
    /// Checkpoints of recurrent state, or windows of sliding layers, that are kept for later prompts, memory permitting.
    /// Default 24.
    pub max_checkpoints: usize,
    /// Tokens of prompt between two checkpoints, where a step of a prompt ends too. Default: 2048 on the CPU, 4096
    /// elsewhere.
    pub checkpoint_interval: Option<usize>,
    /// Whether a GPU that can record decode steps does, and replays them: the same results to the bit, sooner. Default
    /// true.
    pub replay: bool,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            max_sequences: 8,
            max_tokens_per_step: None,
            block_size: 32,
            memory: None,
            max_context: None,
            max_checkpoints: 24,
            checkpoint_interval: None,
            replay: true,
        }
    }
}

/// What an engine must know of a model beside its weights.
#[derive(Clone, Debug)]
pub struct ModelLimits {
    /// Rows of the embedding: no prompt token lies beyond.
    pub vocab_size: usize,
    /// Tokens that may be sampled: the tokenizer's, without the rows that pad the embedding.
    pub sampled_vocab: usize,
    /// Longest context in tokens.
    pub max_positions: usize,
    /// A reply ends after one of these.
    pub stop_ids: Vec<u32>,
}

/// A prompt, and how to go on from it.
#[derive(Clone, Debug, Default)]
pub struct Request {
    pub prompt: Vec<u32>,
    /// Leading tokens of the prompt that the next prompt is likely to share; 0 if unknown. See [`Engine`].
    pub stable_len: usize,
    pub params: SamplingParams,
}

/// What a step produced for one request.
#[derive(Debug)]
pub struct Output {
    pub id: SequenceId,
    /// The next token, or why the request ended without one.
    pub token: Result<Token>,
}

/// One generated token.
#[derive(Clone, Debug)]
pub struct Token {
    pub id: u32,
    pub logprobs: Option<Logprobs>,
    /// Present with the last token.
    pub finish: Option<FinishReason>,
    /// How much of the prompt came from the cache.
    pub reuse: Reuse,
}

/// Why a reply ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// The model said so, with one of its end tokens.
    Stop,
    /// The request's `max_tokens` or the context's end was reached.
    Length,
}

/// What an engine holds and does at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stats {
    pub waiting: usize,
    pub running: usize,
    /// Blocks that nothing holds.
    pub free_blocks: usize,
    /// Blocks that later prompts may reuse.
    pub cached_blocks: usize,
    pub num_blocks: usize,
    /// Checkpoints of recurrent state.
    pub checkpoints: usize,
}

/// Runs requests on one model.
///
/// # Prefix reuse
///
/// What a sequence computed stays in the cache until its memory is needed. A new prompt shares the blocks of the
/// longest prefix that the cache knows. A recurrent state cannot be cut back, so models with recurrent layers resume
/// at checkpoints of it: where an earlier sequence ended, every `checkpoint_interval` tokens of a prompt, and at a
/// request's `stable_len`. Sliding layers forget what their window has passed, and resume at the same places. On the CPU a
/// reply is the same to the bit whether its prefix came from the cache or not.
pub struct Engine {
    model: Box<dyn CausalLm>,
    cache: Cache,
    limits: ModelLimits,
    scheduler: Scheduler,
    requests: HashMap<SequenceId, Active>,
    max_context: usize,
    next_id: u64,
    recordings: Recordings,
    /// The step that is under way while nobody waits for it.
    flight: Option<Flight>,
}

struct Active {
    sampler: Sampler,
    max_tokens: usize,
    ignore_eos: bool,
}

impl Engine {
    /// An engine around a loaded model. `dtype` is that of keys and values.
    ///
    /// # Errors
    ///
    /// An option is zero, or the memory does not hold a single block and slot.
    pub fn new(
        model: Box<dyn CausalLm>,
        limits: ModelLimits,
        dtype: DType,
        device: &Device,
        options: &EngineOptions,
    ) -> Result<Self> {
        let specs = model.cache_specs();
        let sizes = Sizes::plan(&specs, &limits, dtype, device, options)?;
        let scheduler = Scheduler::new(sizes.limits);
        let config = CacheConfig {
            num_blocks: sizes.limits.num_blocks,
            num_window_blocks: sizes.limits.window.map_or(0, |window| window.num_blocks),
            block_size: options.block_size,
            num_slots: sizes.limits.num_slots,
            dtype,
            device: device.clone(),
        };
        let cache = Cache::new(&specs, config)?;
        let max_context = sizes.max_context.min(scheduler.capacity());
        Ok(Self {
            model,
            cache,
            limits,
            scheduler,
            requests: HashMap::new(),
            max_context,
            next_id: 0,
            recordings: Recordings::new(options.replay),
            flight: None,
        })
    }

    /// Longest sequence in tokens, prompt and reply together.
    pub fn max_context(&self) -> usize {
        self.max_context
    }

    /// Where the model runs.
    pub fn device(&self) -> &Device {
        &self.cache.config().device
    }

    /// What the engine must know of its model.
    pub fn limits(&self) -> &ModelLimits {
        &self.limits
    }

    /// Queues a request.
    ///
    /// # Errors
    ///
    /// An empty prompt, one that leaves no room for a reply, a token that the model does not have, or a sampling
    /// parameter out of range.
    pub fn add(&mut self, request: Request) -> Result<SequenceId> {
        let Request { prompt, stable_len, params } = request;
        if prompt.is_empty() {
            return Err(Error::Request("the prompt is empty".into()));
        }
        if prompt.len() >= self.max_context {
            return Err(Error::Request(self.too_long(prompt.len())));
        }
        if let Some(token) = prompt.iter().find(|&&token| token as usize >= self.limits.vocab_size) {
            return Err(Error::Request(format!(
                "token {token} in the prompt, the model has {} of them",
                self.limits.vocab_size
            )));
        }
        let (max_tokens, ignore_eos) = (params.max_tokens, params.ignore_eos);
        let sampler = Sampler::new(params, &prompt, self.limits.sampled_vocab)?;
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        let stable_len = stable_len.min(prompt.len());
        self.scheduler.add(Sequence::new(id, prompt, stable_len));
        self.requests.insert(id, Active { sampler, max_tokens, ignore_eos });
        Ok(id)
    }

    /// Why a prompt of `len` tokens can never run.
    fn too_long(&self, len: usize) -> String {
        if self.max_context < self.scheduler.capacity() {
            let context = self.max_context;
            return format!(
                "the prompt has {len} tokens, and a context of {context} must hold it and a reply: shorten it"
            );
        }
        let CacheConfig { num_blocks, num_window_blocks, block_size, num_slots, dtype, .. } = *self.cache.config();
        let specs = self.model.cache_specs();
        let fixed = num_slots * cache::bytes_per_slot(&specs)
            + num_window_blocks * cache::bytes_per_window_block(&specs, block_size, dtype);
        let mebibytes = |blocks: usize| {
            let bytes = fixed + blocks * cache::bytes_per_block(&specs, block_size, dtype);
            format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
        };
        format!(
            "the prompt has {len} tokens, and the cache of {} holds {} for it and its reply: it takes {}, or a shorter prompt",
            mebibytes(num_blocks),
            self.max_context,
            mebibytes(len / block_size + 1)
        )
    }

    /// Ends a request without further output. Returns whether it was still there.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        self.requests.remove(&id);
        self.scheduler.cancel(id)
    }

    /// Whether a request is still to be served.
    pub fn is_active(&self, id: SequenceId) -> bool {
        self.requests.contains_key(&id)
    }

    /// Whether there is nothing left to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// What the engine holds and does now.
    pub fn stats(&self) -> Stats {
        let (waiting, running) = self.scheduler.queue();
        let (free_blocks, cached_blocks, num_blocks, checkpoints) = self.scheduler.usage();
        Stats { waiting, running, free_blocks, cached_blocks, num_blocks, checkpoints }
    }

    /// Leading tokens of `tokens` behind which a longer prompt could resume now.
    pub fn resumable(&self, tokens: &[u32]) -> usize {
        self.scheduler.resumable(tokens).tokens.len()
    }

    /// Copies to the host what the cache holds of `prefixes`, as far as a prompt that begins with them could resume.
    ///
    /// # Errors
    ///
    /// The copy failed.
    pub(crate) fn snapshot(&self, prefixes: &[Vec<u32>]) -> Result<Snapshot> {
        let block_size = self.cache.config().block_size;
        let (mut blocks, mut window_blocks, mut slots) = (vec![], vec![], vec![]);
        let mut prefixes: Vec<Prefix> = prefixes.iter().map(|tokens| self.scheduler.resumable(tokens)).collect();
        for prefix in &mut prefixes {
            let len = prefix.tokens.len();
            pick_blocks(&mut prefix.blocks, len, block_size, &mut blocks);
            pick_blocks(&mut prefix.window_blocks, len, block_size, &mut window_blocks);
            prefix.states.iter_mut().for_each(|(_, slot)| *slot = index_of(&mut slots, *slot, |slot| *slot));
        }
        let tensors = self.cache.export(&blocks, &window_blocks, &slots)?;
        let (num_blocks, num_window_blocks, num_slots) = (blocks.len(), window_blocks.len(), slots.len());
        let layout = SnapshotLayout { block_size, num_blocks, num_window_blocks, num_slots, prefixes };
        Ok(Snapshot { layout, tensors })
    }

    /// Puts a snapshot into the cache, as much of it as there is room for beside the sequences that run. Returns how
    /// many tokens of each prefix a prompt can resume behind.
    ///
    /// # Errors
    ///
    /// It does not fit this engine's model or block size, or contradicts itself.
    pub(crate) fn restore(&mut self, snapshot: &Snapshot) -> Result<Vec<usize>> {
        let Snapshot { layout, tensors } = snapshot;
        layout.check(self.cache.config().block_size, self.limits.vocab_size)?;
        let held = self.scheduler.hold(layout.num_blocks, layout.num_window_blocks, layout.num_slots);
        let indexed = |ids: &[u32]| (0..).zip(ids.iter().copied()).collect::<Vec<(u32, u32)>>();
        let (blocks, window_blocks) = (indexed(&held.blocks), indexed(&held.window_blocks));
        match self.cache.import(tensors, &blocks, &window_blocks, &indexed(&held.slots)) {
            Ok(()) => Ok(self.scheduler.adopt(&layout.prefixes, held)),
            Err(error) => {
                self.scheduler.adopt(&[], held);
                Err(error.into())
            }
        }
    }

    /// Runs one step. The result holds a token for each sequence that has one now: none for a prompt still under way.
    ///
    /// # Errors
    ///
    /// The computation failed; every request it ran is cancelled.
    pub fn step(&mut self) -> Result<Vec<Output>> {
        let (ids, outputs) = match self.flight.take() {
            Some(flight) => (flight.ids.clone(), self.land(flight)),
            None => {
                let plan = self.scheduler.plan();
                (plan.work.iter().map(|work| work.id).collect(), self.run(&plan))
            }
        };
        if outputs.is_err() {
            ids.into_iter().for_each(|id| {
                self.cancel(id);
            });
        }
        outputs
    }

    fn run(&mut self, plan: &Plan) -> Result<Vec<Output>> {
        self.copy(&plan.copies)?;
        if plan.work.is_empty() {
            return Ok(vec![]);
        }
        let ids: Vec<SequenceId> = plan.work.iter().filter(|work| work.sample).map(|work| work.id).collect();
        let device = self.device().clone();
        let is_decode = ids.len() == plan.work.len() && plan.work.iter().all(|work| work.tokens.len() == 1);
        let draws = if device.is_cpu() { None } else { self.draws(&ids, 0) };
        let choices = if is_decode && self.recordings.are_used(&device) {
            if let Some(draws) = draws {
                let flight = self.launch(plan, &draws, None)?;
                return self.land(flight);
            }
            Choices::logits(self.recorded(plan, None, None)?.logits)?
        } else {
            self.forward(plan, draws)?
        };
        let checkpoints = self.scheduler.complete(&plan.work);
        self.copy(&checkpoints)?;
        let ids = ids.into_iter();
        Ok(match choices {
            Choices::None => vec![],
            Choices::Logits(logits) => {
                ids.zip(&logits).map(|(id, row)| self.choose(id, false, |sampler| sampler.sample(row))).collect()
            }
            Choices::Made(tokens) => {
                ids.zip(tokens).map(|(id, token)| self.choose(id, false, |sampler| accept(sampler, token))).collect()
            }
        })
    }

    /// How the tokens of these sequences are drawn, `ahead` tokens behind their next ones, if the device may draw all.
    fn draws(&self, ids: &[SequenceId], ahead: u64) -> Option<Vec<Draw>> {
        let draws: Vec<Draw> = ids.iter().map(|id| self.requests[id].sampler.draw(ahead)).collect::<Option<_>>()?;
        let is_drawn_there = samples_on(self.device(), self.limits.sampled_vocab);
        (is_drawn_there || are_most_likely(&draws)).then_some(draws)
    }

    /// Runs a step as it is.
    fn forward(&mut self, plan: &Plan, draws: Option<Vec<Draw>>) -> Result<Choices> {
        let (segments, tables) = inputs(&self.scheduler, plan);
        let sampled: Vec<u32> = (0..).zip(&plan.work).filter(|(_, work)| work.sample).map(|(index, _)| index).collect();
        let (model, cache, limit) = (self.model.as_mut(), &mut self.cache, self.limits.sampled_vocab);
        let CacheConfig { block_size, ref device, .. } = *cache.config();
        let device = device.clone();
        let mut batch = Batch::new(&segments, block_size, &device)?;
        if !tables.is_empty() {
            batch = batch.with_windows(&tables, block_size)?;
        }
        let forward = move || {
            let Some(hidden) = model.forward_last(&batch, cache, &sampled)? else { return Ok(Choices::None) };
            let logits = model.logits(&hidden)?;
            match draws {
                None => Choices::logits(&logits),
                Some(draws) if are_most_likely(&draws) => Ok(Choices::Made(argmax(&logits, limit)?.to_vec1()?)),
                Some(draws) => {
                    let draws = Draws::new(&draws, logits.device())?;
                    Ok(Choices::Made(sample(&logits, limit, &draws)?.to_vec1()?))
                }
            }
        };
        Ok(if device.is_cpu() { kernels::on_pool(forward) } else { kernels::device::step(&device, forward) }?)
    }

    /// Runs a step of one token for each sequence as it was recorded.
    fn recorded(&mut self, plan: &Plan, draws: Option<&[Draw]>, tokens: Option<&Tensor>) -> Result<Step<'_>> {
        let (segments, tables) = inputs(&self.scheduler, plan);
        let (model, cache) = (self.model.as_mut(), &mut self.cache);
        let runner = Runner { model, cache, sampled_vocab: self.limits.sampled_vocab };
        Ok(self.recordings.step(runner, Inputs { segments: &segments, tables: &tables, tokens, draws })?)
    }

    /// Queues a recorded step and books it as run; `tokens` are what it begins with, if the host does not know it yet.
    fn launch(&mut self, plan: &Plan, draws: &[Draw], tokens: Option<&Tensor>) -> Result<Flight> {
        let step = self.recorded(plan, (!are_most_likely(draws)).then_some(draws), tokens)?;
        let (chosen, tokens) = (step.chosen.clone(), Download::new(step.chosen)?);
        let checkpoints = self.scheduler.complete(&plan.work);
        self.copy(&checkpoints)?;
        Ok(Flight { ids: plan.work.iter().map(|work| work.id).collect(), chosen, tokens })
    }

    /// Waits for a step's tokens, once the step behind it is queued, if there can be one.
    fn land(&mut self, flight: Flight) -> Result<Vec<Output>> {
        let next = self.launch_behind(&flight)?;
        let tokens = flight.tokens.wait()?;
        let mut outputs = vec![];
        for (id, token) in flight.ids.into_iter().zip(tokens) {
            // It may have ended with the token before.
            if self.is_active(id) {
                outputs.push(self.choose(id, next.is_some(), |sampler| accept(sampler, token)));
            }
        }
        self.flight = next.filter(|next| next.ids.iter().any(|&id| self.is_active(id)));
        Ok(outputs)
    }

    /// Queues the step behind one that is under way, with the same sequences, whose tokens are still on the device. What
    /// it does for a sequence that turns out to have ended is lost, but right: it ran the token that ended it.
    fn launch_behind(&mut self, flight: &Flight) -> Result<Option<Flight>> {
        let goes_on = |id: &SequenceId| match (self.requests.get(id), self.scheduler.running(*id)) {
            (Some(active), Some(sequence)) => {
                sequence.generated() + 1 < active.max_tokens && sequence.tokens.len() + 1 < self.max_context
            }
            _ => false,
        };
        // The step under way may have been the one that could not be recorded.
        let is_recorded = self.recordings.are_used(self.device());
        if !is_recorded || !flight.ids.iter().all(goes_on) || !self.scheduler.can_go_on(&flight.ids) {
            return Ok(None);
        }
        let Some(draws) = self.draws(&flight.ids, 1) else { return Ok(None) };
        flight.ids.iter().for_each(|&id| self.scheduler.push(id, UNKNOWN));
        let plan = self.scheduler.plan();
        self.launch(&plan, &draws, Some(&flight.chosen)).map(Some)
    }

    /// Gives a sequence the token that `choose` makes its sampler choose, in place of one that stands for it if that is so.
    fn choose(
        &mut self,
        id: SequenceId,
        has_place: bool,
        choose: impl FnOnce(&mut Sampler) -> Result<Sampled>,
    ) -> Output {
        let active = self.requests.get_mut(&id).expect("a running sequence has a request");
        let sampled = match choose(&mut active.sampler) {
            Ok(sampled) => sampled,
            Err(error) => {
                self.cancel(id);
                return Output { id, token: Err(error) };
            }
        };
        let (max_tokens, ignore_eos) = (active.max_tokens, active.ignore_eos);
        match has_place {
            true => self.scheduler.replace_last(id, sampled.token),
            false => self.scheduler.push(id, sampled.token),
        }
        let sequence = self.scheduler.running(id).expect("it was just sampled from");
        let finish = if !ignore_eos && self.limits.stop_ids.contains(&sampled.token) {
            Some(FinishReason::Stop)
        } else if sequence.generated() >= max_tokens || sequence.tokens.len() >= self.max_context {
            Some(FinishReason::Length)
        } else {
            None
        };
        let reuse = sequence.reuse.expect("set when the sequence first ran");
        if finish.is_some() {
            self.requests.remove(&id);
            self.scheduler.finish(id);
        }
        Output { id, token: Ok(Token { id: sampled.token, logprobs: sampled.logprobs, finish, reuse }) }
    }

    fn copy(&mut self, copies: &[Copy]) -> Result<()> {
        for copy in copies {
            match *copy {
                Copy::Block { from, to } if from != to => self.cache.copy_block(from, to)?,
                Copy::WindowBlock { from, to } if from != to => self.cache.copy_window_block(from, to)?,
                Copy::Slot { from, to } if from != to => self.cache.copy_slot(from, to)?,
                Copy::Block { .. } | Copy::WindowBlock { .. } | Copy::Slot { .. } => {}
            }
        }
        Ok(())
    }
}

/// Stands for a token that the device has chosen and the host does not know yet. No prompt has it.
const UNKNOWN: u32 = u32::MAX;

/// A step of one token for each of some sequences, whose next tokens are under way.
struct Flight {
    ids: Vec<SequenceId>,
    /// `[ids]`, on the device.
    chosen: Tensor,
    tokens: Download<u32>,
}

/// The segments of a plan, and the block tables of layers with a window if there are any.
fn inputs<'a>(scheduler: &'a Scheduler, plan: &Plan) -> (Vec<Segment<'a>>, Vec<&'a [u32]>) {
    let of = |work: &Work| {
        let sequence = scheduler.running(work.id).expect("planned work is running");
        let segment = Segment {
            tokens: &sequence.tokens[work.tokens.clone()],
            past: work.tokens.start,
            blocks: &sequence.blocks,
            slot: sequence.slot.expect("a running sequence has a slot"),
        };
        (segment, sequence.window_blocks.as_slice())
    };
    let (segments, tables): (Vec<_>, Vec<_>) = plan.work.iter().map(of).unzip();
    (segments, if scheduler.has_window() { tables } else { vec![] })
}

fn are_most_likely(draws: &[Draw]) -> bool {
    draws.iter().all(|draw| *draw == Draw::MOST_LIKELY)
}

/// What the sampled sequences of a step choose from.
enum Choices {
    None,
    /// A row for each.
    Logits(Vec<Vec<f32>>),
    /// The device has chosen.
    Made(Vec<u32>),
}

impl Choices {
    fn logits(logits: &Tensor) -> candle_core::Result<Self> {
        logits.to_dtype(DType::F32)?.to_vec2().map(Self::Logits)
    }
}

/// Takes the most likely token, unless there was none.
fn accept(sampler: &mut Sampler, token: u32) -> Result<Sampled> {
    if token == NOTHING {
        return Err(sampler::nothing_to_choose_from());
    }
    sampler.accept(token);
    Ok(Sampled { token, logprobs: None })
}
