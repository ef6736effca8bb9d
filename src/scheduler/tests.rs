//! Random schedules against a model of the memory: a block's row holds a fingerprint of all tokens up to it, a slot
//! one of all tokens that went through it. A step that reads a stale row, a wrong checkpoint or a reused slot shows.

use std::collections::{HashMap, HashSet};

use kernels::testing::Random;

use super::*;

struct Memory {
    rows: Vec<u64>,
    /// Of the layers with a window.
    window_rows: Vec<u64>,
    slots: Vec<u64>,
    block_size: usize,
    stateful: bool,
    window: Option<usize>,
}

impl Memory {
    fn new(limits: &Limits) -> Self {
        let rows = |blocks| vec![0; blocks * limits.block_size];
        Self {
            rows: rows(limits.num_blocks),
            window_rows: rows(limits.window.map_or(0, |window| window.num_blocks)),
            slots: vec![0; limits.num_slots],
            block_size: limits.block_size,
            stateful: limits.stateful,
            window: limits.window.map(|window| window.tokens),
        }
    }

    fn copy(&mut self, copies: &[Copy]) {
        for copy in copies {
            match *copy {
                Copy::Block { from, to } => copy_block(&mut self.rows, from, to, self.block_size),
                Copy::WindowBlock { from, to } => copy_block(&mut self.window_rows, from, to, self.block_size),
                Copy::Slot { from, to } => self.slots[to as usize] = self.slots[from as usize],
            }
        }
    }

    /// What a forward pass does: reads every earlier row, those of the window and the state, writes the new ones.
    fn run(&mut self, sequence: &Sequence, tokens: Range<usize>) {
        let row = |blocks: &[u32], position: usize| {
            blocks[position / self.block_size] as usize * self.block_size + position % self.block_size
        };
        for position in 0..tokens.start {
            let got = self.rows[row(&sequence.blocks, position)];
            assert_eq!(got, fingerprint(&sequence.tokens[..=position]), "stale row {position}");
        }
        if let Some(window) = self.window {
            for position in (tokens.start + 1).saturating_sub(window)..tokens.start {
                assert_ne!(sequence.window_blocks[position / self.block_size], NO_BLOCK, "no row {position}");
                let got = self.window_rows[row(&sequence.window_blocks, position)];
                assert_eq!(got, fingerprint(&sequence.tokens[..=position]), "stale row {position} in the window");
            }
            for position in tokens.clone() {
                self.window_rows[row(&sequence.window_blocks, position)] = fingerprint(&sequence.tokens[..=position]);
            }
        }
        let slot = sequence.slot.expect("running") as usize;
        if self.stateful && tokens.start > 0 {
            assert_eq!(self.slots[slot], fingerprint(&sequence.tokens[..tokens.start]), "wrong state");
        }
        for position in tokens.clone() {
            self.rows[row(&sequence.blocks, position)] = fingerprint(&sequence.tokens[..=position]);
        }
        self.slots[slot] = fingerprint(&sequence.tokens[..tokens.end]);
    }
}

fn copy_block(rows: &mut [u64], from: u32, to: u32, block_size: usize) {
    let start = from as usize * block_size;
    rows.copy_within(start..start + block_size, to as usize * block_size);
}

/// A prefix that left the cache, with what its rows and slots held.
struct Saved {
    prefix: Prefix,
    blocks: Vec<Vec<u64>>,
    window_blocks: Vec<Vec<u64>>,
    states: Vec<u64>,
}

fn save(scheduler: &Scheduler, memory: &Memory, tokens: &[u32]) -> Saved {
    let mut prefix = scheduler.resumable(tokens);
    let take = |rows: &[u64], ids: &mut Vec<u32>| {
        let held = ids.iter_mut().filter(|id| **id != NO_BLOCK);
        let block = |(id, index): (&mut u32, u32)| {
            let block = std::mem::replace(id, index) as usize;
            rows[block * memory.block_size..][..memory.block_size].to_vec()
        };
        held.zip(0..).map(block).collect()
    };
    let blocks = take(&memory.rows, &mut prefix.blocks);
    let window_blocks = take(&memory.window_rows, &mut prefix.window_blocks);
    let states = prefix.states.iter().map(|&(_, slot)| memory.slots[slot as usize]).collect();
    prefix.states.iter_mut().zip(0..).for_each(|((_, slot), index)| *slot = index);
    Saved { prefix, blocks, window_blocks, states }
}

/// Brings a saved prefix back; returns how many of its tokens can be reused.
fn restore(scheduler: &mut Scheduler, memory: &mut Memory, saved: &Saved) -> usize {
    let held = scheduler.hold(saved.blocks.len(), saved.window_blocks.len(), saved.states.len());
    let put = |rows: &mut [u64], ids: &[u32], blocks: &[Vec<u64>]| {
        for (&id, block) in ids.iter().zip(blocks) {
            rows[id as usize * block.len()..][..block.len()].copy_from_slice(block);
        }
    };
    put(&mut memory.rows, &held.blocks, &saved.blocks);
    put(&mut memory.window_rows, &held.window_blocks, &saved.window_blocks);
    for (&state, &slot) in saved.states.iter().zip(&held.slots) {
        memory.slots[slot as usize] = state;
    }
    let adopted = scheduler.adopt(std::slice::from_ref(&saved.prefix), held);
    check(scheduler);
    adopted[0]
}

fn fingerprint(tokens: &[u32]) -> u64 {
    tokens.iter().fold(1, |hash, &token| Random::new(hash ^ u64::from(token)).next_u64())
}

/// The token that any schedule must sample after these.
fn next_token(tokens: &[u32]) -> u32 {
    (fingerprint(tokens) % 3) as u32
}

fn check(scheduler: &Scheduler) {
    let [blocks, window_blocks, slots] = scheduler.prefixes.holdings();
    let distinct: HashSet<u32> = window_blocks.iter().copied().collect();
    assert_eq!(distinct.len(), window_blocks.len(), "a window block that two prefixes hold is never given up");
    let running = || scheduler.running.iter();
    let blocks = blocks.iter().chain(running().flat_map(|sequence| &sequence.blocks));
    check_owners(&scheduler.pools.blocks, blocks);
    let window_blocks = window_blocks.iter().chain(running().flat_map(|sequence| &sequence.window_blocks));
    check_owners(&scheduler.pools.window_blocks, window_blocks.filter(|&&block| block != NO_BLOCK));
    let mut taken: Vec<u32> = running().filter_map(|sequence| sequence.slot).chain(slots).collect();
    taken.sort_unstable();
    let count = taken.len();
    taken.dedup();
    assert_eq!(taken.len(), count, "a slot with two owners");
    assert_eq!(scheduler.pools.slots.available() + count, scheduler.limits.num_slots, "a lost slot");
    for sequence in &scheduler.running {
        assert!(sequence.blocks.len() * scheduler.limits.block_size >= sequence.computed);
    }
}

fn check_owners<'a>(pool: &BlockPool, held: impl Iterator<Item = &'a u32>) {
    let mut owners: HashMap<u32, u32> = HashMap::new();
    held.for_each(|&block| *owners.entry(block).or_default() += 1);
    for block in 0..pool.len() as u32 {
        assert_eq!(pool.owners(block), owners.get(&block).copied().unwrap_or(0), "owners of block {block}");
    }
}

/// What is left when a step has run: the blocks that the next token's window reaches, no others.
fn check_windows(scheduler: &Scheduler) {
    let Some(window) = scheduler.limits.window else { return };
    for sequence in &scheduler.running {
        let reached = (sequence.computed + 1).saturating_sub(window.tokens) / scheduler.limits.block_size;
        let held = sequence.window_blocks.iter().map(|&block| block != NO_BLOCK);
        assert!(held.enumerate().all(|(index, held)| held == (index >= reached)), "{:?}", sequence.window_blocks);
    }
}

struct Run {
    scheduler: Scheduler,
    memory: Memory,
    replies: HashMap<SequenceId, usize>,
    steps: usize,
}

impl Run {
    fn new(limits: Limits) -> Self {
        let (scheduler, memory) = (Scheduler::new(limits), Memory::new(&limits));
        Self { scheduler, memory, replies: HashMap::new(), steps: 0 }
    }

    fn add(&mut self, id: u64, prompt: Vec<u32>, stable_len: usize, reply_len: usize) {
        let id = SequenceId(id);
        self.scheduler.add(Sequence::new(id, prompt, stable_len));
        self.replies.insert(id, reply_len);
    }

    /// One step; returns the sequences that finished in it.
    fn step(&mut self) -> Vec<Sequence> {
        self.steps += 1;
        let plan = self.scheduler.plan();
        check(&self.scheduler);
        let total: usize = plan.work.iter().map(|work| work.tokens.len()).sum();
        assert!(total <= self.scheduler.limits.max_tokens_per_step, "{total} tokens in a step");
        self.memory.copy(&plan.copies);
        for work in &plan.work {
            let sequence = self.scheduler.running(work.id).expect("planned");
            assert!(!work.tokens.is_empty() && work.tokens.start == sequence.computed);
            self.memory.run(sequence, work.tokens.clone());
        }
        let copies = self.scheduler.complete(&plan.work);
        self.memory.copy(&copies);
        check_windows(&self.scheduler);
        let mut finished = vec![];
        for work in plan.work.iter().filter(|work| work.sample) {
            let token = next_token(&self.scheduler.running(work.id).expect("planned").tokens);
            self.scheduler.push(work.id, token);
            if self.scheduler.running(work.id).expect("planned").generated() == self.replies[&work.id] {
                finished.push(self.scheduler.finish(work.id).expect("running"));
            }
        }
        check(&self.scheduler);
        finished
    }
}

fn limits(random: &mut Random) -> Limits {
    let block_size = 1 + random.below(6);
    let max_sequences = 1 + random.below(4);
    let max_tokens_per_step = max_sequences + random.below(20);
    let window = (random.below(2) > 0).then(|| {
        let tokens = 1 + random.below(14);
        let least = Window::blocks_for(max_sequences, tokens, block_size, max_tokens_per_step);
        Window { tokens, num_blocks: least + random.below(12) }
    });
    Limits {
        block_size,
        num_blocks: 40 / block_size + 1 + random.below(20),
        num_slots: max_sequences + random.below(5),
        max_tokens_per_step,
        max_sequences,
        checkpoint_interval: 1 + random.below(12),
        stateful: random.below(3) > 0,
        window,
    }
}

#[test]
fn random_schedules_read_what_they_should() {
    for seed in 0..3000 {
        let mut random = Random::new(seed);
        let mut run = Run::new(limits(&mut random));
        let mut histories: Vec<Vec<u32>> = vec![vec![]];
        let (mut next, mut alive, mut saved) = (0, vec![], vec![]);
        while next < 12 || !run.scheduler.is_idle() {
            assert!(run.steps < 3000, "seed {seed}: a sequence starves");
            if next < 12 && random.below(3) == 0 {
                let history = &histories[random.below(histories.len())];
                let mut prompt = history[..random.below(history.len() + 1).min(24)].to_vec();
                prompt.extend((0..1 + random.below(8)).map(|_| random.below(3) as u32));
                let stable_len = random.below(prompt.len() + 1);
                run.add(next, prompt, stable_len, 1 + random.below(8));
                alive.push(SequenceId(next));
                next += 1;
            }
            if !alive.is_empty() && random.below(15) == 0 {
                run.scheduler.cancel(alive[random.below(alive.len())]);
                check(&run.scheduler);
            }
            if random.below(20) == 0 {
                let history = &histories[random.below(histories.len())];
                let len = random.below(history.len() + 1);
                saved.push(save(&run.scheduler, &run.memory, &history[..len]));
                restore(&mut run.scheduler, &mut run.memory, &saved[random.below(saved.len())]);
            }
            for sequence in run.step() {
                assert_eq!(sequence.generated(), run.replies[&sequence.id]);
                let generated = sequence.prompt_len..sequence.tokens.len();
                for position in generated {
                    assert_eq!(sequence.tokens[position], next_token(&sequence.tokens[..position]));
                }
                histories.push(sequence.tokens);
            }
        }
        let (free, cached, all, _) = run.scheduler.usage();
        assert!(free + cached >= all, "seed {seed}: {free} free and {cached} cached of {all}");
    }
}

fn roomy(stateful: bool) -> Limits {
    Limits {
        block_size: 4,
        num_blocks: 100,
        num_slots: 10,
        max_tokens_per_step: 16,
        max_sequences: 4,
        checkpoint_interval: 1000,
        stateful,
        window: None,
    }
}

fn run_alone(run: &mut Run, id: u64, prompt: Vec<u32>, stable_len: usize) -> Sequence {
    run.add(id, prompt, stable_len, 3);
    loop {
        if let Some(sequence) = run.step().pop() {
            return sequence;
        }
    }
}

#[test]
fn a_prompt_resumes_where_an_earlier_one_was_stable() {
    let prompt: Vec<u32> = (0..30).collect();
    for stateful in [true, false] {
        let mut run = Run::new(roomy(stateful));
        run_alone(&mut run, 0, prompt[..25].to_vec(), 22);
        let mut next = prompt[..22].to_vec();
        next.extend([70, 71, 72]);
        let reuse = run_alone(&mut run, 1, next, 0).reuse.expect("ran");
        assert_eq!((reuse.common, reuse.reused, reuse.shortfall), (22, 22, None), "stateful {stateful}");
    }
}

#[test]
fn a_continued_sequence_runs_only_its_new_tokens() {
    let mut run = Run::new(roomy(true));
    let first = run_alone(&mut run, 0, (0..10).collect(), 0);
    let computed = first.tokens.len() - 1;
    let mut prompt = first.tokens;
    prompt.push(9);
    let reuse = run_alone(&mut run, 1, prompt, 0).reuse.expect("ran");
    assert_eq!(reuse.reused, computed);
}

#[test]
fn a_state_without_checkpoint_is_not_reused() {
    let mut run = Run::new(roomy(true));
    run_alone(&mut run, 0, (0..20).collect(), 0);
    let reuse = run_alone(&mut run, 1, (0..19).collect(), 0).reuse.expect("ran");
    assert_eq!((reuse.common, reuse.reused, reuse.shortfall), (19, 0, Some(Shortfall::NoCheckpoint)));
}

#[test]
fn a_short_prompt_does_not_wait_for_a_long_one() {
    let mut run = Run::new(roomy(false));
    run.add(0, (0..300).collect(), 0, 1);
    run.step();
    run.add(1, vec![5, 6, 7], 0, 1);
    let finished = run.step();
    assert_eq!(finished.iter().map(|sequence| sequence.id.0).collect::<Vec<_>>(), [1]);
}

#[test]
fn many_prompts_run_a_few_at_a_time() {
    let limits = Limits { num_blocks: 2000, max_tokens_per_step: 1024, max_sequences: 9, ..roomy(false) };
    let mut run = Run::new(limits);
    run.add(0, (0..5000).collect(), 0, 1);
    for id in 1..9 {
        run.add(id, (id as u32 * 1000..id as u32 * 1000 + 600).collect(), 0, 1);
    }
    let work = run.scheduler.plan().work;
    let tokens = |id: u64| work.iter().find(|work| work.id.0 == id).map_or(0, |work| work.tokens.len());
    // The oldest goes on although it is the longest; the others take turns.
    assert_eq!((0..9).map(tokens).collect::<Vec<_>>(), [256, 256, 256, 256, 0, 0, 0, 0, 0]);
}

#[test]
fn cancelling_frees_everything_but_the_prefix() {
    let mut run = Run::new(roomy(true));
    run.add(0, (0..50).collect(), 0, 5);
    run.step();
    assert!(run.scheduler.cancel(SequenceId(0)));
    assert!(!run.scheduler.cancel(SequenceId(0)));
    assert!(run.scheduler.is_idle());
    let (free, cached, all, _) = run.scheduler.usage();
    assert_eq!(free + cached, all);
    let reuse = run_alone(&mut run, 1, (0..40).collect(), 0).reuse.expect("ran");
    assert_eq!(reuse.reused, 16);
}

#[test]
fn a_prefix_comes_back_from_outside() {
    for (stateful, limits) in [(true, roomy(true)), (false, roomy(false)), (false, sliding(false))] {
        let mut run = Run::new(limits);
        let first = run_alone(&mut run, 0, (0..30).collect(), 26);
        let saved = save(&run.scheduler, &run.memory, &first.tokens);
        assert_eq!((saved.prefix.tokens.len(), saved.prefix.states.len()), (32, if stateful { 2 } else { 0 }));
        let mut run = Run::new(limits);
        assert_eq!(restore(&mut run.scheduler, &mut run.memory, &saved), 32);
        let mut prompt = first.tokens;
        prompt.extend([7, 7]);
        let reuse = run_alone(&mut run, 1, prompt, 0).reuse.expect("ran");
        assert_eq!((reuse.common, reuse.reused), (32, 32), "stateful {stateful}");
        let mut small = Run::new(Limits { num_blocks: 3, ..limits });
        let fits = if stateful || limits.window.is_some() { 0 } else { 12 };
        assert_eq!(restore(&mut small.scheduler, &mut small.memory, &saved), fits);
    }
}

/// A conversation whose replies end differently in the cache and in the next prompt, as thinking does. Each turn leaves
/// its checkpoint in a block that goes on otherwise in the next one.
#[test]
fn every_turn_of_a_conversation_can_be_come_back_to() {
    for block_size in [4, 7, 32] {
        let mut run = Run::new(Limits { block_size, num_blocks: 200, num_slots: 40, ..roomy(true) });
        let mut history: Vec<u32> = vec![];
        let mut turns = vec![];
        for turn in 0..8 {
            history.extend([10 + turn, 20, 21, 22, 23]);
            turns.push(history.len());
            let prompt = [&history[..], &[90, 91]].concat();
            run_alone(&mut run, u64::from(turn), prompt, history.len());
            history.extend([30 + turn, 40, 41]);
        }
        for (turn, &said) in turns.iter().enumerate().skip(1) {
            let edited = [&history[..said - 3], &[50, 51, 52, 90, 91]].concat();
            let reuse = run_alone(&mut run, 100 + turn as u64, edited, 0).reuse.expect("ran");
            assert_eq!(reuse.reused, turns[turn - 1], "turn {turn} in blocks of {block_size}: {reuse:?}");
        }
    }
}

/// Blocks of 4 and a window of 6 tokens.
fn sliding(stateful: bool) -> Limits {
    Limits { window: Some(Window { tokens: 6, num_blocks: 40 }), ..roomy(stateful) }
}

#[test]
fn a_prompt_does_not_resume_where_its_window_has_passed() {
    let prompt: Vec<u32> = (0..40).collect();
    for stateful in [true, false] {
        let mut run = Run::new(sliding(stateful));
        let first = run_alone(&mut run, 0, prompt.clone(), 22).tokens;
        // Up to the checkpoint, whose window the cache has kept.
        let mut next = prompt[..30].to_vec();
        next.extend([70, 71]);
        let reuse = run_alone(&mut run, 1, next, 0).reuse.expect("ran");
        let shortfall = if stateful { Shortfall::NoCheckpoint } else { Shortfall::WindowPassed };
        assert_eq!((reuse.common, reuse.reused, reuse.shortfall), (30, 22, Some(shortfall)), "stateful {stateful}");
        // Before it there is nothing.
        let mut next = prompt[..20].to_vec();
        next.extend([80, 81]);
        let reuse = run_alone(&mut run, 2, next, 0).reuse.expect("ran");
        assert_eq!((reuse.common, reuse.reused), (20, 0), "stateful {stateful}");
        // Where a sequence ended its window is whole.
        let reuse = run_alone(&mut run, 3, first, 0).reuse.expect("ran");
        assert_eq!((reuse.reused, reuse.shortfall), (42, None), "stateful {stateful}");
    }
}

#[test]
fn a_window_whose_block_is_needed_elsewhere_is_given_up() {
    let least = Window::blocks_for(1, 6, 4, 16);
    let limits = Limits { window: Some(Window { tokens: 6, num_blocks: least }), max_sequences: 1, ..roomy(false) };
    let mut run = Run::new(limits);
    let first = run_alone(&mut run, 0, (0..40).collect(), 0).tokens;
    let reuse = run_alone(&mut run, 1, first.clone(), 0).reuse.expect("ran");
    assert_eq!(reuse.reused, 42);
    run_alone(&mut run, 2, (100..190).collect(), 0);
    let reuse = run_alone(&mut run, 3, first, 0).reuse.expect("ran");
    assert_eq!((reuse.common, reuse.reused, reuse.shortfall), (43, 0, Some(Shortfall::WindowPassed)));
}
