//! The product of several rows on AMX: a group of 64 inputs is one step of its registers. 8-bit codes are read as they
//! are packed, those of 4 bits are unpacked once for all rows. Sums within a group are integers and what follows is that
//! of [`Dot`], so the bits are those of [`super::cpu`].

use std::cell::Cell;
use std::ops::Range;

use super::cpu::{Block, Panels, Rounded, Totals, Unpacked, fetch};
use super::dot::{self, Dot};
use super::{OUTS, STEPS};
use crate::linear::tile::pieces;
use crate::simd::Stored;
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};

/// Groups that all rows meet before the next.
const STRETCH: usize = 2;

/// Rows that are multiplied at once, where there are so many: those of two registers.
pub(super) const UNIT: usize = 2 * ROWS;

/// Whether so many rows are to run here.
pub(super) fn takes(rows: usize) -> bool {
    const LEAST: usize = 4;
    rows >= LEAST && amx::is_used()
}

/// Runs on registers.
pub(super) fn run<B: Block, X: Stored>(panels: Panels<B, X>) {
    amx::dispatch([WIDTH; 8], panels)
}

impl<B: Block, X: Stored> amx::Kernel for Panels<'_, B, X> {
    fn run<T: Tiles>(self, tiles: &mut T) {
        let mut scratch = SCRATCH.take();
        if scratch.totals.len() < self.rows.len() {
            scratch.blocks.resize(STRETCH, Unpacked::ZERO);
            scratch.sums.resize(2 * STRETCH * UNIT, Sums([0; OUTS]));
            scratch.totals.resize(self.rows.len(), Totals([0.0; OUTS]));
        }
        for panel in self.panels.clone() {
            let (panels, tiles, scratch) = (&self, &mut *tiles, &mut scratch);
            match self.product.n <= ROWS {
                true => dot::dispatch(self.product.instructions, Panel::<_, _, _, 1> { panels, panel, tiles, scratch }),
                false => {
                    dot::dispatch(self.product.instructions, Panel::<_, _, _, 2> { panels, panel, tiles, scratch })
                }
            }
        }
        SCRATCH.set(scratch);
    }
}

/// A row's sums of a group.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Sums([i32; OUTS]);

#[derive(Default)]
struct Scratch {
    /// `[STRETCH]`
    blocks: Vec<Unpacked>,
    /// `[2, STRETCH, UNIT]`: one unit is multiplied while the other is scaled.
    sums: Vec<Sums>,
    /// `[rows]`
    totals: Vec<Totals>,
}

thread_local! {
    /// A thread's, kept between calls.
    static SCRATCH: Cell<Scratch> =
        const { Cell::new(Scratch { blocks: Vec::new(), sums: Vec::new(), totals: Vec::new() }) };
}

/// A panel with some rows, `M` registers of them at a time.
struct Panel<'a, B, X, T, const M: usize> {
    panels: &'a Panels<'a, B, X>,
    panel: usize,
    tiles: &'a mut T,
    scratch: &'a mut Scratch,
}

impl<B: Block, X: Stored, T: Tiles, const M: usize> dot::Kernel for Panel<'_, B, X, T, M> {
    #[inline(always)]
    fn run<D: Dot>(mut self) {
        let Panels { product, ref rows, .. } = *self.panels;
        let groups = product.x.groups;
        self.scratch.totals[..rows.len()].fill(Totals([0.0; OUTS]));
        let whole = groups / STRETCH * STRETCH;
        for start in (0..whole).step_by(STRETCH) {
            self.stretch::<D, STRETCH>(start);
        }
        for start in whole..groups {
            self.stretch::<D, 1>(start);
        }
        for (row, totals) in rows.clone().zip(&self.scratch.totals) {
            product.write(row, self.panel, &totals.0);
        }
    }
}

impl<B: Block, X: Stored, T: Tiles, const M: usize> Panel<'_, B, X, T, M> {
    /// The `G` groups from `start` on.
    #[inline(always)]
    fn stretch<D: Dot, const G: usize>(&mut self, start: usize) {
        let Panels { product, blocks, ref rows, .. } = *self.panels;
        let Scratch { blocks: unpacked, sums, totals } = &mut *self.scratch;
        let ahead = &blocks[self.panel * product.x.groups..];
        let blocks: &[B; G] = &ahead[start..].as_chunks().0[0];
        let unpacked: &mut [Unpacked; G] = &mut unpacked.as_chunks_mut().0[0];
        for i in 0..G {
            fetch(ahead, start + i);
            blocks[i].prepare::<D>(&mut unpacked[i]);
        }
        let (mut sums, mut before) = sums.split_at_mut(STRETCH * UNIT);
        let mut units = pieces(0..rows.len(), M * ROWS);
        let mut last: Option<Range<usize>> = None;
        loop {
            let unit = units.next();
            for i in 0..G {
                if let Some(unit) = &unit {
                    let x = (rows.start + unit.start) / ROWS;
                    multiply::<T, M>(
                        self.tiles,
                        product.x,
                        x,
                        start + i,
                        blocks[i].bytes(&unpacked[i]),
                        &mut sums[i * UNIT..],
                    );
                }
                if let Some(last) = &last {
                    let share = last.start + last.len() * i / G..last.start + last.len() * (i + 1) / G;
                    for row in share {
                        let totals = &mut totals[row];
                        for part in 0..OUTS / D::WIDTH {
                            for j in 0..G {
                                let sums = D::load_sums(&before[j * UNIT + row - last.start].0, part);
                                let factors = product.x.factors(rows.start + row, start + j);
                                B::add_sums::<D>(&unpacked[j], sums, factors, part, totals);
                            }
                        }
                    }
                }
            }
            if unit.is_none() {
                break;
            }
            last = unit;
            std::mem::swap(&mut sums, &mut before);
        }
    }
}

/// The sums of a group of `M` registers of rows.
#[inline(always)]
fn multiply<T: Tiles, const M: usize>(
    tiles: &mut T,
    x: &Rounded,
    register: usize,
    group: usize,
    codes: &[u8],
    sums: &mut [Sums],
) {
    const HALF: usize = OUTS / 2;
    let rows = |i: usize| x.register(register + i, group);
    // SAFETY: a row of sums is as many integers.
    let sums = unsafe { std::slice::from_raw_parts_mut(sums.as_mut_ptr().cast::<i32>(), sums.len() * OUTS) };
    tiles.load::<6, _>(codes, 4 * OUTS);
    tiles.load::<7, _>(&codes[4 * HALF..], 4 * OUTS);
    tiles.load::<4, _>(rows(0), STEPS);
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.multiply_bytes::<0, 4, 6>();
    tiles.multiply_bytes::<1, 4, 7>();
    if M > 1 {
        tiles.load::<5, _>(rows(1), STEPS);
        tiles.zero::<2>();
        tiles.zero::<3>();
        tiles.multiply_bytes::<2, 5, 6>();
        tiles.multiply_bytes::<3, 5, 7>();
    }
    tiles.store::<0, _>(sums, OUTS);
    tiles.store::<1, _>(&mut sums[HALF..], OUTS);
    if M > 1 {
        tiles.store::<2, _>(&mut sums[ROWS * OUTS..], OUTS);
        tiles.store::<3, _>(&mut sums[ROWS * OUTS + HALF..], OUTS);
    }
}
