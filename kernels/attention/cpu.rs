//! Attention on the CPU: threads over blocks of queries, lanes along heads and keys.
//!
//! Keys come in chunks of [`CHUNK`] positions, on a grid from position 0. Each chunk is attended to on its own, which
//! gives a maximum, a sum and a mix of values for every query, and these are merged in the order of the chunks, as in
//! Flash-Decoding (Dao et al., 2023). A score is a dot product in eight lanes, as those of `linear::tile`; a mix adds
//! the values of a chunk one after the other, or two by two, see [`form`]. [`few`] and [`many`] do the same operations in
//! different places, so what a query gets depends on its own position alone: not on the queries beside it, and not on
//! whether one thread ran the chunks of its block or several.

use std::cell::Cell;
use std::ops::Range;

use self::few::Few;
use self::form::{Dots, Form, Plain};
use self::many::Many;
use super::AttentionParams;
use crate::Batch;
use crate::batch::Sequence;
use crate::cpu::{Shared, share, zeros};
#[cfg(target_arch = "x86_64")]
use crate::linear::tile::Wide;
use crate::linear::tile::{Narrow, Tile, pieces};
#[cfg(target_arch = "x86_64")]
use crate::simd::Instructions;
use crate::simd::{
    Kernel, LANES, Lanes, PAIR, Stored, Vector, dispatch, dots_are_fast, instructions, load, load_pair, store,
    store_pair,
};

mod few;
mod form;
mod many;

/// Key positions of one chunk.
const CHUNK: usize = 128;

/// Up to this many rows of a key head, keys and values stream through registers as they lie; a row is one query head
/// of one token.
const FEW_ROWS: usize = 16;

/// Most rows of a block of many, whole register tiles of every kind.
const BLOCK_ROWS: usize = 192;

/// Elements of its queries, which the second-level cache holds beside a chunk and the scores and mixes of the block.
const BLOCK_ELEMENTS: usize = 24 << 10;

/// Multiplications below which waking threads does not pay.
const SERIAL: usize = 1 << 18;

/// `[rows, heads, d]` with the last dimension contiguous.
pub struct Operand<'a, T> {
    pub data: &'a [T],
    /// Elements from one row to the next, and from one head to the next.
    pub strides: [usize; 2],
}

impl<'a, T> Operand<'a, T> {
    #[inline(always)]
    fn head(&self, row: usize, head: usize, d: usize) -> &'a [T] {
        &self.data[row * self.strides[0] + head * self.strides[1]..][..d]
    }
}

/// Attention of the batch's queries `T`, rows of which are tokens, over keys and values `P`.
pub struct Attention<'a, T, P> {
    pub q: Operand<'a, T>,
    /// Rows are tokens, or with `block_size` the positions of all pages.
    pub keys: Operand<'a, P>,
    pub values: Operand<'a, P>,
    pub block_size: Option<usize>,
    pub hq: usize,
    pub hk: usize,
    pub d: usize,
    pub batch: &'a Batch,
    pub params: AttentionParams,
}

/// Consecutive tokens of a sequence and the query heads of some key heads.
struct Block<'a> {
    sequence: &'a Sequence,
    heads: Range<usize>,
    tokens: Range<usize>,
    /// Positions that each token sees. Both ends move forward from token to token.
    seen: Vec<Range<usize>>,
}

impl<T: Stored, P: Stored> Attention<'_, T, P> {
    /// `[N, hq, d]`
    pub fn run(&self) -> Vec<T> {
        let mut out = zeros(self.batch.num_tokens() * self.hq * self.d);
        let target = Shared::new(&mut out);
        let work: usize = self.batch.host.iter().map(|sequence| sequence.tokens.len() * sequence.context_len).sum();
        let is_serial = work * self.hq * self.d < SERIAL;
        let blocks = self.blocks(is_serial);
        let attend = |block: &Block| {
            let mix = Part { attention: self, block, chunks: block.chunks() }.attend();
            self.write(block, block.heads.clone(), &mix, &target)
        };
        if is_serial {
            blocks.iter().for_each(attend);
        } else if blocks.len() >= 4 * rayon::current_num_threads() {
            share(blocks.len(), |i| attend(&blocks[i]));
        } else {
            self.attend_by_chunks(&blocks, &target);
        }
        out
    }

    /// Too few blocks for all threads, which share the chunks of each as well.
    fn attend_by_chunks(&self, blocks: &[Block], out: &Shared<T>) {
        let mut parts = Vec::new();
        let mut parts_of = Vec::with_capacity(blocks.len());
        for block in blocks {
            let first = parts.len();
            parts.extend(block.chunks().map(|chunk| Part { attention: self, block, chunks: chunk..chunk + 1 }));
            parts_of.push(first..parts.len());
        }
        let mut mixes: Vec<Mix> = parts.iter().map(|_| Mix::default()).collect();
        let shared = Shared::new(&mut mixes);
        // SAFETY: every task has a mix of its own.
        share(parts.len(), |i| unsafe { shared.part(i, 1) }[0] = parts[i].attend());
        let heads: Vec<_> = blocks
            .iter()
            .zip(parts_of)
            .flat_map(|(block, parts)| (0..block.heads.len()).map(move |head| (block, parts.clone(), head)))
            .collect();
        share(heads.len(), |i| {
            let (block, ref parts, head) = heads[i];
            let mix = Mix::merged(&mixes[parts.clone()], head, block.heads.len());
            let head = block.heads.start + head;
            self.write(block, head..head + 1, &mix, out);
        });
    }

    /// Few rows of all heads make one block, which reads whole pages from end to end; with many rows every key head
    /// has blocks of its own.
    fn blocks(&self, is_serial: bool) -> Vec<Block<'_>> {
        let group = self.hq / self.hk;
        let rows = (BLOCK_ELEMENTS / self.d / 12 * 12).clamp(12, BLOCK_ROWS);
        let chunks: usize = self.batch.host.iter().map(|sequence| sequence.context_len.div_ceil(CHUNK)).sum();
        // Only part of the heads where there are fewer chunks than threads: memory delivers whole pages faster.
        let threads = if is_serial { 0 } else { rayon::current_num_threads() };
        let shares = if chunks < threads { (4 * threads).div_ceil(chunks.max(1)).min(self.hk) } else { 1 };
        let mut blocks = Vec::new();
        for sequence in &self.batch.host {
            let heads_each = if self.are_few(sequence.tokens.len()) { self.hk.div_ceil(shares) } else { 1 };
            let visible = |token| self.params.visible(sequence.position(token), sequence.context_len);
            for heads in pieces(0..self.hk, heads_each) {
                // The last tokens, which see most, come first: then threads end together.
                let first = blocks.len();
                blocks.extend(pieces(sequence.tokens.clone(), rows.div_ceil(group)).map(|tokens| Block {
                    sequence,
                    heads: heads.clone(),
                    seen: tokens.clone().map(visible).collect(),
                    tokens,
                }));
                blocks[first..].reverse();
            }
        }
        blocks
    }

    /// Writes what the tokens of `block` have in some heads.
    fn write(&self, block: &Block, heads: Range<usize>, mix: &Mix, out: &Shared<T>) {
        dispatch(Write { attention: self, tokens: block.tokens.clone(), heads, mix, out });
    }

    /// Whether so many tokens of a sequence stream their keys; lanes are then whole in every row.
    fn are_few(&self, tokens: usize) -> bool {
        let group = if is_in_dots::<P>() { Dots::GROUP } else { Plain::GROUP };
        tokens * (self.hq / self.hk) <= FEW_ROWS && self.d.is_multiple_of(group)
    }
}

impl Block<'_> {
    /// Those that hold what the tokens see.
    fn chunks(&self) -> Range<usize> {
        self.seen[0].start / CHUNK..self.seen[self.seen.len() - 1].end.div_ceil(CHUNK)
    }
}

/// Whether keys and values take the form of [`Dots`].
fn is_in_dots<P: Stored>() -> bool {
    P::IS_BF16 && dots_are_fast()
}

/// A block over some chunks of keys.
struct Part<'a, T, P> {
    attention: &'a Attention<'a, T, P>,
    block: &'a Block<'a>,
    chunks: Range<usize>,
}

impl<T: Stored, P: Stored> Part<'_, T, P> {
    fn attend(&self) -> Mix {
        if is_in_dots::<P>() { self.attend_in::<Dots>() } else { self.attend_in::<Plain>() }
    }

    fn attend_in<F: Form>(&self) -> Mix {
        if self.attention.are_few(self.block.sequence.tokens.len()) {
            return F::dispatch(Few::<_, _, F>::new(self));
        }
        match instructions() {
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => self.attend_many::<F, Wide, 12, 32>(),
            _ => self.attend_many::<F, Narrow, 6, 16>(),
        }
    }

    fn attend_many<F: Form, M: Tile<R, O>, const R: usize, const O: usize>(&self) -> Mix {
        let mut scratch = SCRATCH.take();
        let mix = F::dispatch(Many::<T, P, F, M, R, O>::new(self, &mut scratch));
        SCRATCH.set(scratch);
        mix
    }

    /// Query heads that share a key head.
    fn group(&self) -> usize {
        self.attention.hq / self.attention.hk
    }

    /// Rows of each key head, by token and then by query head.
    fn rows(&self) -> usize {
        self.block.tokens.len() * self.group()
    }

    /// Row `row` of `head`.
    #[inline(always)]
    fn query(&self, head: usize, row: usize) -> &[T] {
        let Attention { ref q, d, .. } = *self.attention;
        q.head(self.block.tokens.start + row / self.group(), head * self.group() + row % self.group(), d)
    }

    /// The keys of `chunk` that `row` sees, within the chunk.
    fn bounds(&self, chunk: usize, row: usize) -> Range<usize> {
        let seen = &self.block.seen[row / self.group()];
        let clip = |position: usize| position.clamp(chunk * CHUNK, (chunk + 1) * CHUNK) - chunk * CHUNK;
        clip(seen.start)..clip(seen.end)
    }

    /// The keys of `chunk` that any row sees, within the chunk; `places` become the rows of the operands that hold them.
    fn find(&self, chunk: usize, places: &mut Vec<usize>) -> Range<usize> {
        let sequence = self.block.sequence;
        let range = self.bounds(chunk, 0).start..self.bounds(chunk, self.rows() - 1).end;
        let positions = chunk * CHUNK + range.start..chunk * CHUNK + range.end;
        places.clear();
        match self.attention.block_size {
            None => places.extend(positions.map(|position| sequence.tokens.start + position)),
            Some(size) => {
                let place = |position| sequence.blocks[position / size] as usize * size + position % size;
                places.extend(positions.map(place))
            }
        }
        range
    }
}

thread_local! {
    /// A thread's widened operands, kept between calls.
    static SCRATCH: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// What the rows of a block make of some keys.
#[derive(Default)]
struct Mix {
    /// Of the scores.
    max: Vec<f32>,
    /// Of `exp(score - max)`.
    sum: Vec<f32>,
    /// `[rows, d]` values weighted by `exp(score - max)`, `d` in lanes.
    values: Vec<[f32; LANES]>,
}

impl Mix {
    /// Of no keys.
    fn new(rows: usize, lanes: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; rows], sum: vec![0.0; rows], values: vec![[0.0; LANES]; rows * lanes] }
    }

    /// Of any content.
    fn resize(&mut self, rows: usize, lanes: usize) {
        self.max.resize(rows, 0.0);
        self.sum.resize(rows, 0.0);
        self.values.resize(rows * lanes, [0.0; LANES]);
    }

    /// What the rows of head `head` of `heads` make of all the keys that `parts` saw, the earliest first.
    fn merged(parts: &[Self], head: usize, heads: usize) -> Self {
        let rows = parts[0].sum.len() / heads;
        let mut mix = Self::new(rows, parts[0].values.len() / parts[0].sum.len());
        parts.iter().for_each(|part| mix.merge(part, head * rows));
        mix
    }

    /// Adds what the same rows, those from `first` on in `later`, make of later keys.
    fn merge(&mut self, later: &Self, first: usize) {
        let lanes = self.values.len() / self.sum.len();
        for (row, values) in self.values.chunks_exact_mut(lanes).enumerate() {
            let (later_max, later_sum) = (later.max[first + row], later.sum[first + row]);
            if later_sum == 0.0 {
                continue;
            }
            let later = &later.values[(first + row) * lanes..][..lanes];
            let [a, b] = merge_sums(&mut self.max[row], &mut self.sum[row], later_max, later_sum);
            for (x, y) in values.as_flattened_mut().iter_mut().zip(later.as_flattened()) {
                *x = *x * a + y * b;
            }
        }
    }
}

/// Adds the maximum and the sum of later keys; returns the factors of the values so far and of the later ones.
fn merge_sums(max: &mut f32, sum: &mut f32, later_max: f32, later_sum: f32) -> [f32; 2] {
    // Whichever has the greater maximum stays as it is.
    let factors @ [a, b] =
        if *max >= later_max { [1.0, (later_max - *max).exp()] } else { [(*max - later_max).exp(), 1.0] };
    *max = max.max(later_max);
    *sum = *sum * a + later_sum * b;
    factors
}

/// Caps the scores within `bounds`; returns the greatest. Their pairs have no score beyond the bounds then.
#[inline(always)]
fn greatest_score<V: Lanes>(scores: &mut [f32; CHUNK], bounds: &Range<usize>, softcap: Option<f32>) -> f32 {
    let all = pairs(bounds);
    if let Some(cap) = softcap {
        // tanh(x) = 2 sigmoid(2 x) - 1
        for scores in scores[all.clone()].as_chunks_mut::<PAIR>().0 {
            let sigmoid = load_pair::<V, f32>(scores).mul(V::Pair::splat(2.0 / cap)).sigmoid();
            store_pair::<V, f32>(sigmoid.mul_add(V::Pair::splat(2.0 * cap), V::Pair::splat(-cap)), scores);
        }
    }
    scores[all.start..bounds.start].fill(f32::NEG_INFINITY);
    scores[bounds.end..all.end].fill(f32::NEG_INFINITY);
    let mut max = V::Pair::splat(f32::NEG_INFINITY);
    for scores in scores[all].as_chunks::<PAIR>().0 {
        max = load_pair::<V, f32>(scores).max(max);
    }
    let [a, b] = V::halves(max);
    a.max(b).greatest()
}

/// Replaces scores by `exp(score - max)`, once [`greatest_score`] has found it, rounded if the form says so; returns
/// their sum.
#[inline(always)]
fn to_weights<V: Lanes, F: Form>(scores: &mut [f32; CHUNK], bounds: &Range<usize>, max: f32) -> f32 {
    let mut sum = V::splat(0.0);
    for scores in scores[pairs(bounds)].as_chunks_mut::<PAIR>().0 {
        let scores_below = load_pair::<V, f32>(scores).sub(V::Pair::splat(max));
        let weights = if F::IS_PAIRED { scores_below.exp_for_bf16().round_to_bf16() } else { scores_below.exp() };
        store_pair::<V, f32>(weights, scores);
        let [a, b] = V::halves(weights);
        sum = sum.add(a).add(b);
    }
    sum.sum()
}

/// The scores that fill the lanes of those within `bounds`.
#[inline(always)]
fn pairs(bounds: &Range<usize>) -> Range<usize> {
    bounds.start / PAIR * PAIR..bounds.end.next_multiple_of(PAIR)
}

/// Divides the mix of some heads by its sums and rounds it.
struct Write<'a, T, P> {
    attention: &'a Attention<'a, T, P>,
    tokens: Range<usize>,
    heads: Range<usize>,
    mix: &'a Mix,
    out: &'a Shared<'a, T>,
}

impl<T: Stored, P> Kernel for Write<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let &Attention { hq, hk, d, .. } = self.attention;
        let (group, lanes) = (hq / hk, d.div_ceil(LANES));
        let mut rows = self.mix.values.chunks_exact(lanes).zip(&self.mix.sum);
        for head in self.heads {
            for token in self.tokens.clone() {
                // SAFETY: no other block has these heads of these tokens.
                let out = unsafe { self.out.part((token * hq + head * group) * d, group * d) };
                for (out, (values, &sum)) in out.chunks_exact_mut(d).zip(&mut rows) {
                    let factor = V::splat(1.0 / sum);
                    for (values, out) in values.iter().zip(out.chunks_mut(LANES)) {
                        store(V::load(values).mul(factor), out);
                    }
                }
            }
        }
    }
}

/// Copies row `n` of `rows`, `[heads, d]`, to row `slots[n]` of `pages`, rounded if pages are of another dtype.
pub struct WriteRows<'a, T, P> {
    pub pages: &'a mut [P],
    pub rows: Operand<'a, T>,
    pub heads: usize,
    pub d: usize,
    pub slots: &'a [u32],
}

impl<T: Stored, P: Stored> Kernel for WriteRows<'_, T, P> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { pages, rows, heads, d, slots } = self;
        for (row, &slot) in slots.iter().enumerate() {
            let page = &mut pages[slot as usize * heads * d..][..heads * d];
            for (head, page) in page.chunks_exact_mut(d).enumerate() {
                for (source, target) in rows.head(row, head, d).chunks(LANES).zip(page.chunks_mut(LANES)) {
                    store(load::<V, T>(source), target);
                }
            }
        }
    }
}
