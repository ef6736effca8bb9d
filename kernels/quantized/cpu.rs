//! The product on the CPU: panels of weights times rows of `x` rounded to bytes. Lanes are outputs, so nothing is ever
//! added across them.
//!
//! Up to two tiles of rows meet the weights as they are packed. More meet them unpacked: the first unpacks each block
//! on its way, the others find the panel in a cache. Sums within a group are exact, and what follows is the same either
//! way, so a row's bits do not depend on the tile that it is in.

use std::cell::Cell;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::block::{Ahead, Block, Streamed, Unpacked};
use super::dot::{self, Dot, Row};
pub use super::rounded::Before;
use super::rounded::{Factors, Order, Rounded, tiles};
use super::{Blocks, OUTS, QuantizedMatrix};
use crate::cpu::{Shared, reads, share};
use crate::linear::cpu::{STREAMED_ROWS, write_rounded};
use crate::linear::tile::pieces;
use crate::simd::{Instructions, Stored, instructions, prefetch_far_at};

/// `x` `[n, inner]`, or wider as `before` needs it, `bias` `[outer]`; returns `[n, outer]`.
pub fn linear<X: Stored>(x: &[X], before: Before, weight: &QuantizedMatrix, bias: Option<&[f32]>) -> Vec<X> {
    let QuantizedMatrix { outer, inner, ref blocks } = *weight;
    if inner == 0 {
        return vec![X::round(0.0); x.len()];
    }
    let n = x.len() / before.width(inner);
    let mut out = Vec::with_capacity(n * outer);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..n * outer]);
    let instructions = instructions();
    let x = Rounded::new(x, before, inner, Order::of(n, instructions));
    let product = Product { x: &x, bias, n, inner, outer, instructions, out: shared };
    match blocks {
        Blocks::Q8(blocks) => product.run(blocks),
        Blocks::Q4(blocks) => product.run(blocks),
        Blocks::OnDevice(..) => unreachable!("the callers multiply on the CPU"),
    }
    // SAFETY: every output of every row was written.
    unsafe { out.set_len(n * outer) };
    out
}

/// Products of which a thread should have at least so many, or waking it costs more than it does.
pub(super) const MIN_TASK: usize = 1 << 17;

pub(super) struct Product<'a, X> {
    pub x: &'a Rounded,
    bias: Option<&'a [f32]>,
    pub n: usize,
    inner: usize,
    outer: usize,
    pub instructions: Instructions,
    out: Shared<'a, MaybeUninit<X>>,
}

impl<X: Stored> Product<'_, X> {
    fn run<B: Block>(&self, blocks: &[B]) {
        let panels = self.outer.div_ceil(OUTS);
        let threads = rayon::current_num_threads();
        // A narrow weight has too few panels for all threads: then they share its rows as well.
        let tile = self.x.order().rows();
        let parts = (4 * threads).div_ceil(panels.max(1)).min(self.n.div_ceil(tile)).max(1);
        let rows = self.n.div_ceil(parts).next_multiple_of(tile);
        let task = panels.div_ceil(8 * threads).max(MIN_TASK / (rows.min(self.n).max(1) * self.inner * OUTS)).max(1);
        let tasks = panels.div_ceil(task);
        if self.n <= STREAMED_ROWS {
            reads(blocks);
        }
        share(self.n.div_ceil(rows.max(1)) * tasks, |index| {
            let (part, first) = (index / tasks, index % tasks * task);
            let panels = first..panels.min(first + task);
            let rows = part * rows..self.n.min((part + 1) * rows);
            let part = Panels { product: self, blocks, panels, rows };
            match self.x.order() {
                Order::Tiles(_) => part.sweep(),
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::Registers => super::amx::run(part),
            }
        });
    }

    /// Rounds the outputs of a panel in row `row`, and their bias if there is one.
    #[inline(always)]
    pub fn write(&self, row: usize, panel: usize, totals: &[f32; OUTS]) {
        let outs = self.outs(row, panel);
        // SAFETY: every task has outputs and rows of its own.
        let out = unsafe { self.out.part(outs.start, outs.len()) };
        write_rounded(out, totals, self.bias.map(|bias| &bias[panel * OUTS..]));
    }

    /// Asks for the place of what [`Product::write`] will write.
    #[inline(always)]
    pub fn fetch(&self, row: usize, panel: usize) {
        self.out.fetch(self.outs(row, panel));
    }

    #[inline(always)]
    fn outs(&self, row: usize, panel: usize) -> Range<usize> {
        row * self.outer + panel * OUTS..row * self.outer + self.outer.min((panel + 1) * OUTS)
    }
}

/// Some panels with some rows.
pub(super) struct Panels<'a, B, X> {
    pub product: &'a Product<'a, X>,
    /// Of all panels.
    pub blocks: &'a [B],
    pub panels: Range<usize>,
    pub rows: Range<usize>,
}

impl<B: Block, X: Stored> Panels<'_, B, X> {
    fn sweep(&self) {
        let &Self { product, blocks, ref panels, ref rows } = self;
        let mut scratch = SCRATCH.take();
        scratch.resize(rows.len());
        let groups = product.x.groups;
        for panel in panels.clone() {
            let (blocks, ahead) = (&blocks[panel * groups..(panel + 1) * groups], &blocks[panel * groups..]);
            let (rows, scratch) = (rows.clone(), &mut scratch);
            let sweep = Sweep { product, x: product.x, blocks, ahead, panel, rows, scratch };
            dot::dispatch(product.instructions, sweep);
        }
        SCRATCH.set(scratch);
    }
}

/// Groups of a panel that all rows meet before the next: unpacked they take 18 KiB, which stay in the first-level cache.
const STRETCH: usize = 8;

/// A row's outputs of a panel, on cache lines: no vector straddles two.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Totals(pub [f32; OUTS]);

/// What several rows need of a panel.
#[derive(Default)]
struct Scratch {
    /// `[STRETCH]`
    blocks: Vec<Unpacked>,
    /// `[rows]`
    totals: Vec<Totals>,
}

impl Scratch {
    fn resize(&mut self, rows: usize) {
        if self.totals.len() < rows {
            self.blocks.resize(STRETCH, Unpacked::ZERO);
            self.totals.resize(rows, Totals([0.0; OUTS]));
        }
    }
}

thread_local! {
    /// A thread's, kept between calls.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch { blocks: Vec::new(), totals: Vec::new() }) };
}

/// Bytes that are asked for ahead of use: about as many as memory delivers within its latency.
pub(super) const AHEAD: usize = 4 << 10;

/// A panel with some rows.
struct Sweep<'a, B, X> {
    product: &'a Product<'a, X>,
    x: &'a Rounded,
    blocks: &'a [B],
    /// The blocks and what lies behind them, to be brought near in time.
    ahead: &'a [B],
    panel: usize,
    rows: Range<usize>,
    scratch: &'a mut Scratch,
}

impl<B: Block, X: Stored> dot::Kernel for Sweep<'_, B, X> {
    #[inline(always)]
    fn run<D: Dot>(mut self) {
        if self.rows.len() == 1 {
            return match B::asks_for_all::<D>(1) {
                true => self.row::<D, true>(self.rows.start),
                false => self.row::<D, false>(self.rows.start),
            };
        }
        let stretch = if self.is_few::<D>() { self.blocks.len() } else { STRETCH };
        for groups in pieces(0..self.blocks.len(), stretch) {
            for rows in tiles(self.rows.clone(), D::ROWS) {
                match rows.len() {
                    12 if D::ROWS >= 12 => self.tile::<D, 12>(rows.start, groups.clone()),
                    8 if D::ROWS >= 8 => self.tile::<D, 8>(rows.start, groups.clone()),
                    6 if D::ROWS >= 6 => self.tile::<D, 6>(rows.start, groups.clone()),
                    4 if D::ROWS >= 4 => self.tile::<D, 4>(rows.start, groups.clone()),
                    3 if D::ROWS >= 3 => self.tile::<D, 3>(rows.start, groups.clone()),
                    2 => self.tile::<D, 2>(rows.start, groups.clone()),
                    _ => self.tile::<D, 1>(rows.start, groups.clone()),
                }
            }
        }
    }
}

impl<'a, B: Block, X: Stored> Sweep<'a, B, X> {
    #[inline(always)]
    fn row<D: Dot, const ALL: bool>(&self, row: usize) {
        let (x, factors) = self.operands::<1>(row);
        let mut totals = [0.0; OUTS];
        for (group, block) in self.blocks.iter().enumerate() {
            block.add::<D, ALL>(&x[group], factors[group][0], &mut totals, self.ahead(group));
        }
        self.product.write(row, self.panel, &totals);
    }

    /// Whether unpacked blocks would serve two tiles at most: not worth writing them down.
    #[inline(always)]
    fn is_few<D: Dot>(&self) -> bool {
        self.rows.len() <= 2 * D::ROWS
    }

    /// What is asked for while `group` is at work.
    #[inline(always)]
    fn ahead<const ALL: bool>(&self, group: usize) -> Ahead<'a, B, ALL> {
        Ahead(self.ahead.get(group + AHEAD.div_ceil(size_of::<B>())).unwrap_or(&self.blocks[group]))
    }

    /// With the whole panel, as it is packed.
    #[inline(always)]
    fn packed_tile<D: Dot, const R: usize, const ALL: bool>(&self, row: usize) {
        let (x, factors) = self.operands::<R>(row);
        let mut totals = [Totals([0.0; OUTS]); R];
        for (group, block) in self.blocks.iter().enumerate() {
            let source = Streamed { block, ahead: self.ahead::<ALL>(group) };
            // The compiler would keep totals in registers that the sums need.
            B::add_rows::<D, R>(&source, &x[group], &factors[group], black_box(&mut totals));
        }
        for (row, totals) in (row..).zip(&totals) {
            self.product.write(row, self.panel, &totals.0);
        }
    }

    #[inline(always)]
    fn tile<D: Dot, const R: usize>(&mut self, row: usize, groups: Range<usize>) {
        if self.is_few::<D>() {
            return match B::asks_for_all::<D>(R) {
                true => self.packed_tile::<D, R, true>(row),
                false => self.packed_tile::<D, R, false>(row),
            };
        }
        let (x, factors) = self.operands::<R>(row);
        let first = row - self.rows.start;
        let Scratch { blocks, totals } = &mut *self.scratch;
        let totals: &mut [Totals; R] = &mut totals[first..].as_chunks_mut().0[0];
        if groups.start == 0 {
            *totals = [Totals([0.0; OUTS]); R];
        }
        let is_last = groups.end == self.blocks.len();
        let next = &self.ahead[groups.end..self.ahead.len().min(groups.end + STRETCH)];
        for ((group, block), done) in groups.zip(blocks).zip(0..) {
            // Requests are spread evenly, or the sums would wait behind them for operands of their own.
            prefetch_part(next, first * STRETCH + done * R, R, self.rows.len() * STRETCH);
            if is_last {
                for r in (R * done).div_ceil(STRETCH)..(R * (done + 1)).div_ceil(STRETCH) {
                    self.product.fetch(row + r, self.panel);
                }
            }
            if first == 0 {
                self.blocks[group].unpack::<D>(block);
            }
            // The compiler would keep totals in registers that the sums need.
            B::add_rows::<D, R>(block, &x[group], &factors[group], black_box(&mut *totals));
        }
        if is_last {
            for (row, totals) in (row..).zip(&*totals) {
                self.product.write(row, self.panel, &totals.0);
            }
        }
    }

    /// The groups of the tile of `R` rows from `row` on.
    #[inline(always)]
    fn operands<const R: usize>(&self, row: usize) -> (&'a [[Row; R]], &'a [[Factors; R]]) {
        self.x.tile(row)
    }
}

/// Asks for the lines of `data` that are `count` of `all` equal parts, from part `first` on.
#[inline(always)]
fn prefetch_part<T>(data: &[T], first: usize, count: usize, all: usize) {
    let line = |part: usize| part * size_of_val(data) / all / 64 * 64;
    prefetch_far_at(data.as_ptr().cast::<u8>().wrapping_add(line(first)), line(first + count) - line(first));
}
