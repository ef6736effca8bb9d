//! Random schedules against a model of the memory: a block's row holds a fingerprint of all tokens up to it, a slot
//! one of all tokens that went through it. A step that reads a stale row, a wrong checkpoint or a reused slot shows.

use std::collections::HashMap;

use kernels::testing::Random;

use super::*;

struct Memory {
    rows: Vec<u64>,
    slots: Vec<u64>,
    block_size: usize,
    stateful: bool,
}

impl Memory {
    fn new(limits: &Limits) -> Self {
        let rows = vec![0; limits.num_blocks * limits.block_size];
        Self { rows, slots: vec![0; limits.num_slots], block_size: limits.block_size, stateful: limits.stateful }
    }

    fn copy(&mut self, copies: &[Copy]) {
        for copy in copies {
            match *copy {
                Copy::Block { from, to } => {
                    let start = from as usize * self.block_size;
                    self.rows.copy_within(start..start + self.block_size, to as usize * self.block_size);
                }
                Copy::Slot { from, to } => self.slots[to as usize] = self.slots[from as usize],
            }
        }
    }

    /// What a forward pass does: reads every earlier row and the state, writes the new ones.
    fn run(&mut self, sequence: &Sequence, tokens: Range<usize>) {
        let row = |position: usize| {
            sequence.blocks[position / self.block_size] as usize * self.block_size + position % self.block_size
        };
        for position in 0..tokens.start {
            assert_eq!(self.rows[row(position)], fingerprint(&sequence.tokens[..=position]), "stale row {position}");
        }
        let slot = sequence.slot.expect("running") as usize;
        if self.stateful && tokens.start > 0 {
            assert_eq!(self.slots[slot], fingerprint(&sequence.tokens[..tokens.start]), "wrong state");
        }
        for position in tokens.clone() {
            self.rows[row(position)] = fingerprint(&sequence.tokens[..=position]);
        }
        self.slots[slot] = fingerprint(&sequence.tokens[..tokens.end]);
    }
}

/// A prefix that left the cache, with what its rows and slots held.
struct Saved {
    prefix: Prefix,
    rows: Vec<u64>,
    states: Vec<u64>,
}

fn save(scheduler: &Scheduler, memory: &Memory, tokens: &[u32]) -> Saved {
    let mut prefix = scheduler.resumable(tokens);
    let row = |block: u32| (0..memory.block_size).map(move |offset| block as usize * memory.block_size + offset);
    let rows = prefix.blocks.iter().flat_map(|&block| row(block)).map(|row| memory.rows[row]).collect();
    let states = prefix.states.iter().map(|&(_, slot)| memory.slots[slot as usize]).collect();
    prefix.blocks = (0..prefix.blocks.len() as u32).collect();
    prefix.states.iter_mut().zip(0..).for_each(|((_, slot), index)| *slot = index);
    Saved { prefix, rows, states }
}

/// Brings a saved prefix back; returns how many of its tokens can be reused.
fn restore(scheduler: &mut Scheduler, memory: &mut Memory, saved: &Saved) -> usize {
    let held = scheduler.hold(saved.prefix.blocks.len(), saved.prefix.states.len());
    for (index, &block) in held.blocks.iter().enumerate() {
        let rows = &saved.rows[index * memory.block_size..][..memory.block_size];
        memory.rows[block as usize * memory.block_size..][..memory.block_size].copy_from_slice(rows);
    }
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
    let (blocks, slots) = scheduler.prefixes.holdings();
    let mut owners: HashMap<u32, u32> = HashMap::new();
    let running = scheduler.running.iter().flat_map(|sequence| &sequence.blocks);
    for &block in blocks.iter().chain(running) {
        *owners.entry(block).or_default() += 1;
    }
    for block in 0..scheduler.limits.num_blocks as u32 {
        assert_eq!(scheduler.blocks.owners(block), owners.get(&block).copied().unwrap_or(0), "owners of block {block}");
    }
    let mut taken: Vec<u32> = scheduler.running.iter().filter_map(|sequence| sequence.slot).chain(slots).collect();
    taken.sort_unstable();
    let count = taken.len();
    taken.dedup();
    assert_eq!(taken.len(), count, "a slot with two owners");
    assert_eq!(scheduler.slots.available() + count, scheduler.limits.num_slots, "a lost slot");
    for sequence in &scheduler.running {
        assert!(sequence.blocks.len() * scheduler.limits.block_size >= sequence.computed);
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
    Limits {
        block_size,
        num_blocks: 40 / block_size + 1 + random.below(20),
        num_slots: max_sequences + random.below(5),
        max_tokens_per_step: max_sequences + random.below(20),
        max_sequences,
        checkpoint_interval: 1 + random.below(12),
        stateful: random.below(3) > 0,
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
    for stateful in [true, false] {
        let mut run = Run::new(roomy(stateful));
        let first = run_alone(&mut run, 0, (0..30).collect(), 26);
        let saved = save(&run.scheduler, &run.memory, &first.tokens);
        assert_eq!((saved.prefix.tokens.len(), saved.prefix.states.len()), (32, if stateful { 2 } else { 0 }));
        let mut run = Run::new(roomy(stateful));
        assert_eq!(restore(&mut run.scheduler, &mut run.memory, &saved), 32);
        let mut prompt = first.tokens;
        prompt.extend([7, 7]);
        let reuse = run_alone(&mut run, 1, prompt, 0).reuse.expect("ran");
        assert_eq!((reuse.common, reuse.reused), (32, 32), "stateful {stateful}");
        let mut small = Run::new(Limits { num_blocks: 3, ..roomy(stateful) });
        assert_eq!(restore(&mut small.scheduler, &mut small.memory, &saved), if stateful { 0 } else { 12 });
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
