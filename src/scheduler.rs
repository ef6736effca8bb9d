//! Which sequences run in a step, how many tokens of each, and where their cache lies.
//!
//! Only numbers here, no tensors: [`Scheduler::plan`] says what the engine must copy and run, and the engine reports
//! back with [`Scheduler::complete`], [`Scheduler::push`] and [`Scheduler::finish`]. A sequence that decodes runs one
//! token; what is left of the step's budget goes to prompts in equal shares, so that a short prompt does not wait for a
//! long one, or to some of them where shares would be too small to be worth a step. When blocks run out, cached prefixes go
//! first, the least recently used one before others; then the youngest sequence is preempted and computed again later, with
//! the same tokens.
//!
//! # Layers with a window
//!
//! Layers that look back `window` tokens have blocks, a pool and a table for each sequence of their own, beside those of
//! the other attention layers. When a step has run, the blocks that the window of a sequence's next token does not reach
//! go back to the pool, and [`NO_BLOCK`] takes their place in the table. The pool is large enough for the windows of all
//! sequences that run and the tokens of a step ([`Window::blocks_for`]), so these blocks never make a sequence wait; what
//! is left over holds the windows of cached prefixes, until a sequence needs it. A prefix can be reused up to where
//! the cache holds a whole window: where a sequence ended, and at the checkpoints that prompts leave behind.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::ops::Range;

use kernels::NO_BLOCK;

use crate::blocks::{BlockPool, Pools, SlotPool};
use crate::prefix_cache::{Blocks, Prefix, PrefixCache};
use crate::sequence::{Reuse, Sequence, SequenceId, Shortfall};

/// Sizes that the scheduler keeps to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Tokens per block.
    pub block_size: usize,
    pub num_blocks: usize,
    pub num_slots: usize,
    /// Tokens that a step runs at most.
    pub max_tokens_per_step: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Tokens of prompt between two checkpoints.
    pub checkpoint_interval: usize,
    /// Whether the model has recurrent layers.
    pub stateful: bool,
    /// For a model that has layers with a window.
    pub window: Option<Window>,
}

/// What layers with a window need.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Window {
    /// Tokens that a query sees, its own included.
    pub tokens: usize,
    /// Blocks of these layers, [`Window::blocks_for`] the sequences that may run or more.
    pub num_blocks: usize,
}

impl Window {
    /// Blocks that one sequence can hold at a time beside those of the tokens that it runs.
    pub fn blocks_per_sequence(tokens: usize, block_size: usize) -> usize {
        (tokens - 1).div_ceil(block_size) + 2
    }

    /// Blocks that `sequences` can hold at a time, when a step runs `max_tokens_per_step` tokens of them.
    pub fn blocks_for(sequences: usize, tokens: usize, block_size: usize, max_tokens_per_step: usize) -> usize {
        sequences * Self::blocks_per_sequence(tokens, block_size) + max_tokens_per_step / block_size
    }

    /// Sequences that the blocks are enough for.
    pub fn max_sequences(&self, block_size: usize, max_tokens_per_step: usize) -> usize {
        (self.num_blocks - max_tokens_per_step / block_size) / Self::blocks_per_sequence(self.tokens, block_size)
    }
}

#[derive(Debug)]
pub(crate) struct Scheduler {
    limits: Limits,
    pools: Pools,
    prefixes: PrefixCache,
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    running: Vec<Sequence>,
}

/// What a step does: copies in order, then one forward pass over `work`, then `complete`.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub copies: Vec<Copy>,
    pub work: Vec<Work>,
}

/// A copy within the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copy {
    Block { from: u32, to: u32 },
    WindowBlock { from: u32, to: u32 },
    Slot { from: u32, to: u32 },
}

/// Blocks and slots on their way to the prefix cache.
#[derive(Debug)]
pub(crate) struct Held {
    pub blocks: Vec<u32>,
    pub window_blocks: Vec<u32>,
    pub slots: Vec<u32>,
}

/// One sequence's share of a step.
#[derive(Clone, Debug)]
pub(crate) struct Work {
    pub id: SequenceId,
    /// Which of its tokens run.
    pub tokens: Range<usize>,
    /// Whether its next token can be sampled afterwards.
    pub sample: bool,
    /// Whether a checkpoint belongs behind it.
    checkpoint: bool,
}

impl Scheduler {
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            pools: Pools {
                blocks: BlockPool::new(limits.num_blocks),
                window_blocks: BlockPool::new(limits.window.map_or(0, |window| window.num_blocks)),
                slots: SlotPool::new(limits.num_slots),
            },
            prefixes: PrefixCache::new(limits.block_size, limits.stateful, limits.window.map(|window| window.tokens)),
            waiting: VecDeque::new(),
            running: vec![],
        }
    }

    /// Tokens of the longest sequence that the blocks can hold.
    pub fn capacity(&self) -> usize {
        self.limits.num_blocks * self.limits.block_size
    }

    /// Whether sequences have `window_blocks`.
    pub fn has_window(&self) -> bool {
        self.limits.window.is_some()
    }

    /// Queues a sequence, which must fit [`Scheduler::capacity`].
    pub fn add(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    /// Forgets a sequence wherever it is. Its blocks are free at once, but for what other prompts may reuse.
    pub fn cancel(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            self.waiting.remove(index);
            return true;
        }
        self.finish(id).is_some()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Sequences that wait and that run.
    pub fn queue(&self) -> (usize, usize) {
        (self.waiting.len(), self.running.len())
    }

    /// Blocks: free, held by cached prefixes, in all. Checkpoints last.
    pub fn usage(&self) -> (usize, usize, usize, usize) {
        let (cached, checkpoints) = self.prefixes.held();
        (self.pools.blocks.available(), cached, self.pools.blocks.len(), checkpoints)
    }

    pub fn running(&self, id: SequenceId) -> Option<&Sequence> {
        self.running.iter().find(|sequence| sequence.id == id)
    }

    /// Chooses the next step's work and makes room for it. Empty only if there is nothing to do.
    pub fn plan(&mut self) -> Plan {
        let mut plan = Plan::default();
        self.admit(&mut plan.copies);
        let shares = self.shares();
        let mut budget = self.limits.max_tokens_per_step;
        let mut index = 0;
        while index < self.running.len() && budget > 0 {
            let want = shares[index].min(budget);
            if want == 0 {
                index += 1;
                continue;
            }
            let (end, checkpoint) = self.chunk_end(&self.running[index], want);
            if !self.reserve(index, end) {
                break;
            }
            let sequence = &self.running[index];
            budget -= end - sequence.computed;
            plan.work.push(Work {
                id: sequence.id,
                tokens: sequence.computed..end,
                sample: end == sequence.tokens.len(),
                checkpoint,
            });
            index += 1;
        }
        plan
    }

    /// Whether the next step would run just these sequences, one token each, as soon as they have one, and take nothing
    /// from any of them.
    pub fn can_go_on(&self, ids: &[SequenceId]) -> bool {
        let Self { limits, pools, waiting, running, .. } = self;
        let is_full = |sequence: &&Sequence| sequence.blocks.len() * limits.block_size <= sequence.tokens.len();
        (waiting.is_empty() || running.len() == limits.max_sequences)
            && running.iter().map(|sequence| sequence.id).eq(ids.iter().copied())
            && running.iter().all(|sequence| sequence.remaining() == 0)
            && running.iter().filter(is_full).count() <= pools.blocks.available()
    }

    /// Records that the planned work has run. Returns the checkpoints to take: copies of slots, to make before
    /// anything else runs.
    pub fn complete(&mut self, work: &[Work]) -> Vec<Copy> {
        let mut copies = vec![];
        for work in work {
            let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == work.id) else { continue };
            sequence.computed = work.tokens.end;
            if let Some(window) = self.limits.window {
                leave_behind(sequence, window.tokens, self.limits.block_size, &mut self.pools.window_blocks);
            }
            if !work.checkpoint {
                continue;
            }
            let tokens = &sequence.tokens[..work.tokens.end];
            let mut slot = None;
            if self.limits.stateful {
                if self.prefixes.has_checkpoint(tokens) {
                    continue;
                }
                let Some(to) = take_slot(&mut self.pools, &mut self.prefixes) else { continue };
                copies.push(Copy::Slot { from: sequence.slot.expect("a running sequence has a slot"), to });
                slot = Some(to);
            }
            let held = Blocks { blocks: &sequence.blocks, window_blocks: &sequence.window_blocks };
            self.prefixes.insert(tokens, held, slot, &mut self.pools);
        }
        copies
    }

    /// Appends a sampled token.
    pub fn push(&mut self, id: SequenceId, token: u32) {
        if let Some(sequence) = self.running.iter_mut().find(|sequence| sequence.id == id) {
            sequence.tokens.push(token);
        }
    }

    /// Puts a token in the place of the last one, which was not known yet.
    pub fn replace_last(&mut self, id: SequenceId, token: u32) {
        if let Some(last) =
            self.running.iter_mut().find(|sequence| sequence.id == id).and_then(|it| it.tokens.last_mut())
        {
            *last = token;
        }
    }

    /// Takes a sequence out. What it computed stays in the cache for as long as there is room.
    pub fn finish(&mut self, id: SequenceId) -> Option<Sequence> {
        let index = self.running.iter().position(|sequence| sequence.id == id)?;
        let mut sequence = self.running.remove(index);
        self.retire(&mut sequence);
        Some(sequence)
    }

    /// What the cache holds of `tokens`, as far as a prompt that begins with them could resume.
    pub fn resumable(&self, tokens: &[u32]) -> Prefix {
        self.prefixes.resumable(tokens)
    }

    /// Takes blocks and slots for prefixes that come from outside: as many as can be had without preempting a
    /// sequence.
    pub fn hold(&mut self, blocks: usize, window_blocks: usize, slots: usize) -> Held {
        let Self { pools, prefixes, .. } = self;
        let blocks = (0..blocks).map_while(|_| take_block(pools, prefixes)).collect();
        let window_blocks = (0..window_blocks).map_while(|_| take_window_block(pools, prefixes)).collect();
        let slots = (0..slots).map_while(|_| take_slot(pools, prefixes)).collect();
        Held { blocks, window_blocks, slots }
    }

    /// Makes prefixes reusable whose blocks and slots are indices of what is held, and have been written there. What
    /// nobody needs is free again. Returns how many tokens of each prefix are in the cache now.
    pub fn adopt(&mut self, prefixes: &[Prefix], held: Held) -> Vec<usize> {
        let Self { pools, prefixes: cache, limits, .. } = self;
        let mut slots: Vec<Option<u32>> = held.slots.into_iter().map(Some).collect();
        let of = |ids: &[u32], index: u32| ids.get(index as usize).copied();
        for prefix in prefixes {
            let blocks: Vec<u32> = prefix.blocks.iter().map_while(|&index| of(&held.blocks, index)).collect();
            let window_block = |&index: &u32| of(&held.window_blocks, index).unwrap_or(NO_BLOCK);
            let window_blocks: Vec<u32> = prefix.window_blocks.iter().map(window_block).collect();
            let own = Blocks { blocks: &blocks, window_blocks: &window_blocks };
            let tokens = &prefix.tokens[..prefix.tokens.len().min(blocks.len() * limits.block_size)];
            cache.insert(tokens, own, None, pools);
            for &(position, index) in prefix.states.iter().filter(|(position, _)| *position <= tokens.len()) {
                if let Some(slot) = slots.get_mut(index as usize).and_then(Option::take) {
                    cache.insert(&tokens[..position], own, Some(slot), pools);
                }
            }
        }
        held.blocks.into_iter().for_each(|block| pools.blocks.release(block));
        held.window_blocks.into_iter().for_each(|block| pools.window_blocks.release(block));
        slots.into_iter().flatten().for_each(|slot| pools.slots.release(slot));
        prefixes.iter().map(|prefix| cache.resumable(&prefix.tokens).tokens.len()).collect()
    }

    /// Starts waiting sequences while there is room, from what the cache holds of them.
    fn admit(&mut self, copies: &mut Vec<Copy>) {
        let block_size = self.limits.block_size;
        while self.running.len() < self.limits.max_sequences {
            let Some(mut sequence) = self.waiting.pop_front() else { return };
            let resume = self.prefixes.find(&sequence.tokens);
            resume.blocks.iter().for_each(|&block| self.pools.blocks.share(block));
            let windows = resume.window_blocks.iter().copied().filter(|&block| block != NO_BLOCK);
            windows.clone().for_each(|block| self.pools.window_blocks.share(block));
            // A block for the next token of each running sequence is part of what must remain.
            let outstanding: usize = self
                .running
                .iter()
                .map(|s| (s.tokens.len() + 1).div_ceil(block_size).saturating_sub(s.blocks.len()))
                .sum();
            let needed = (sequence.tokens.len() + 1).div_ceil(block_size) - resume.blocks.len();
            let available = self.pools.blocks.available() + self.prefixes.evictable_blocks(&self.pools);
            let fits = self.running.is_empty() || needed + outstanding <= available;
            let slot = fits.then(|| take_slot(&mut self.pools, &mut self.prefixes)).flatten();
            let partial = slot.is_some().then_some(resume.partial).flatten();
            let copied = partial.and_then(|from| Some((from, take_block(&mut self.pools, &mut self.prefixes)?)));
            let (Some(slot), true) = (slot, partial.is_some() == copied.is_some()) else {
                resume.blocks.iter().for_each(|&block| self.pools.blocks.release(block));
                windows.for_each(|block| self.pools.window_blocks.release(block));
                slot.into_iter().for_each(|slot| self.pools.slots.release(slot));
                self.waiting.push_front(sequence);
                return;
            };
            sequence.blocks = resume.blocks;
            if let Some((from, to)) = copied {
                copies.push(Copy::Block { from, to });
                sequence.blocks.push(to);
            }
            sequence.window_blocks = resume.window_blocks;
            if let Some(from) = resume.window_partial {
                let to = self.window_block();
                copies.push(Copy::WindowBlock { from, to });
                sequence.window_blocks.push(to);
            }
            if let Some(from) = resume.slot {
                copies.push(Copy::Slot { from, to: slot });
            }
            sequence.slot = Some(slot);
            sequence.computed = resume.reused;
            let shortfall = (resume.reused < resume.common.min(sequence.tokens.len() - 1)).then_some(
                match (resume.window_passed, resume.evicted) {
                    (true, _) => Shortfall::WindowPassed,
                    (false, true) => Shortfall::Evicted,
                    (false, false) => Shortfall::NoCheckpoint,
                },
            );
            sequence.reuse.get_or_insert(Reuse {
                prompt: sequence.prompt_len,
                common: resume.common,
                reused: resume.reused,
                shortfall,
            });
            self.running.push(sequence);
        }
    }

    /// Tokens that each running sequence may run in this step. Prompts share equally what decoding leaves, what short
    /// ones do not need going to the others; but a share is worth the step's overhead: if there are too many, the oldest
    /// and the shortest go first.
    fn shares(&self) -> Vec<usize> {
        const LEAST: usize = 256;
        let needs: Vec<usize> = self.running.iter().map(Sequence::remaining).collect();
        let mut shares: Vec<usize> = needs.iter().map(|&need| usize::from(need == 1)).collect();
        let mut prompts: Vec<usize> = (0..needs.len()).filter(|&index| needs[index] > 1).collect();
        let mut budget = self.limits.max_tokens_per_step.saturating_sub(needs.len() - prompts.len());
        let least = LEAST.min(budget / 2);
        if let Some(&oldest) = prompts.first() {
            shares[oldest] = needs[oldest].min(least);
            budget -= shares[oldest];
        }
        prompts.sort_by_key(|&index| needs[index]);
        for (done, &index) in prompts.iter().enumerate() {
            let share = (budget / (prompts.len() - done)).max(least).min(budget);
            let more = (needs[index] - shares[index]).min(share);
            shares[index] += more;
            budget -= more;
        }
        shares
    }

    /// Where a chunk of at most `want` tokens ends, and whether a checkpoint belongs there: at the end of the
    /// prompt's stable part, and every so many tokens of it. Where any token can be resumed behind, every chunk of the
    /// prompt has one.
    fn chunk_end(&self, sequence: &Sequence, want: usize) -> (usize, bool) {
        let start = sequence.computed;
        if !self.limits.stateful && self.limits.window.is_none() {
            return (start + want, start + want <= sequence.prompt_len);
        }
        let interval = self.limits.checkpoint_interval;
        let regular = (start / interval + 1) * interval;
        let stable = if sequence.stable_len > start { sequence.stable_len } else { usize::MAX };
        let checkpoint = regular.min(stable);
        let end = (start + want).min(checkpoint);
        (end, end == checkpoint && end <= sequence.prompt_len)
    }

    /// Gives the sequence at `index` blocks up to token `end`. Sequences behind it may be preempted for that, and in
    /// the end it itself: then the answer is false.
    fn reserve(&mut self, index: usize, end: usize) -> bool {
        while self.running[index].blocks.len() * self.limits.block_size < end {
            if let Some(block) = take_block(&mut self.pools, &mut self.prefixes) {
                self.running[index].blocks.push(block);
                continue;
            }
            let mut youngest = self.running.pop().expect("the sequence at index is running");
            self.retire(&mut youngest);
            self.waiting.push_front(youngest);
            if self.running.len() == index {
                return false;
            }
        }
        if self.limits.window.is_some() {
            while self.running[index].window_blocks.len() * self.limits.block_size < end {
                let block = self.window_block();
                self.running[index].window_blocks.push(block);
            }
        }
        true
    }

    fn window_block(&mut self) -> u32 {
        let taken = take_window_block(&mut self.pools, &mut self.prefixes);
        taken.expect("the pool holds the windows of all sequences that run")
    }

    /// Hands everything that a sequence holds to the prefix cache.
    fn retire(&mut self, sequence: &mut Sequence) {
        let (blocks, window_blocks) =
            (std::mem::take(&mut sequence.blocks), std::mem::take(&mut sequence.window_blocks));
        let slot = sequence.slot.take().expect("a running sequence has a slot");
        let computed = &sequence.tokens[..sequence.computed];
        let checkpoint = (self.limits.stateful && sequence.computed > 0).then_some(slot);
        let held = Blocks { blocks: &blocks, window_blocks: &window_blocks };
        self.prefixes.insert(computed, held, checkpoint, &mut self.pools);
        if checkpoint.is_none() {
            self.pools.slots.release(slot);
        }
        blocks.iter().for_each(|&block| self.pools.blocks.release(block));
        let windows = window_blocks.iter().filter(|&&block| block != NO_BLOCK);
        windows.for_each(|&block| self.pools.window_blocks.release(block));
        sequence.computed = 0;
    }
}

fn take_block(pools: &mut Pools, prefixes: &mut PrefixCache) -> Option<u32> {
    pools.blocks.take().or_else(|| {
        prefixes.evict_block(pools);
        pools.blocks.take()
    })
}

fn take_window_block(pools: &mut Pools, prefixes: &mut PrefixCache) -> Option<u32> {
    pools.window_blocks.take().or_else(|| {
        prefixes.evict_window_block(pools);
        pools.window_blocks.take()
    })
}

fn take_slot(pools: &mut Pools, prefixes: &mut PrefixCache) -> Option<u32> {
    pools.slots.take().or_else(|| {
        prefixes.evict_checkpoint(pools);
        pools.slots.take()
    })
}

/// Gives back the blocks that no window of the sequence's tokens to come reaches.
fn leave_behind(sequence: &mut Sequence, window: usize, block_size: usize, window_blocks: &mut BlockPool) {
    let passed = (sequence.computed + 1).saturating_sub(window) / block_size;
    let held = sequence.window_blocks[..passed].iter_mut().rev().take_while(|block| **block != NO_BLOCK);
    held.for_each(|block| window_blocks.release(std::mem::replace(block, NO_BLOCK)));
}
