//! The product of several rows on AMX: a group of 64 inputs is one step of its registers. 8-bit codes are read as they
//! are packed, those of 4 bits are unpacked once for all rows. Sums within a group are integers and what follows is that
//! of [`Dot`], so the bits are those of [`super::cpu`].
//!
//! Sums reach the vector registers through memory. What follows is as much work as the product: both go on at once, on
//! different rows. A product has ended long before its sums are stored, and they are stored long before they are read.

use std::cell::Cell;

use super::block::{Block, Unpacked};
use super::cpu::{AHEAD, Panels, Totals};
use super::dot::{self, Dot, HALF, Row};
use super::rounded::Factors;
use super::{OUTS, STEPS};
use crate::linear::tile::pieces;
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};
use crate::simd::{Stored, prefetch};

/// Groups that all rows meet before the next: codes of a panel and of a register of rows take 24 KiB, which stay in the
/// first-level cache.
const STRETCH: usize = 8;

/// Whether so many rows are to run here.
pub(super) fn takes(rows: usize) -> bool {
    const LEAST: usize = 32;
    rows >= LEAST && amx::is_used()
}

/// Runs on registers.
pub(super) fn run<B: Block, X: Stored>(panels: Panels<B, X>) {
    amx::dispatch([WIDTH; 8], panels)
}

impl<B: Block, X: Stored> amx::Kernel for Panels<'_, B, X> {
    fn run<T: Tiles>(self, tiles: &mut T) {
        let mut scratch = SCRATCH.take();
        let registers = self.rows.len().div_ceil(ROWS);
        if scratch.totals.len() < registers {
            scratch.blocks.resize(STRETCH, Unpacked::ZERO);
            scratch.totals.resize(registers, [Totals([0.0; OUTS]); ROWS]);
        }
        for panel in self.panels.clone() {
            let panel = Panel { panels: &self, panel, tiles: &mut *tiles, scratch: &mut scratch };
            dot::dispatch(self.product.instructions, panel);
        }
        SCRATCH.set(scratch);
    }
}

#[derive(Default)]
struct Scratch {
    /// `[STRETCH]`
    blocks: Vec<Unpacked>,
    /// `[registers]`
    totals: Vec<[Totals; ROWS]>,
}

thread_local! {
    /// A thread's, kept between calls.
    static SCRATCH: Cell<Scratch> = const { Cell::new(Scratch { blocks: Vec::new(), totals: Vec::new() }) };
}

/// A panel with some rows.
struct Panel<'a, B, X, T> {
    panels: &'a Panels<'a, B, X>,
    panel: usize,
    tiles: &'a mut T,
    scratch: &'a mut Scratch,
}

impl<B: Block, X: Stored, T: Tiles> dot::Kernel for Panel<'_, B, X, T> {
    #[inline(always)]
    fn run<D: Dot>(self) {
        let Self { panels, panel, tiles, scratch: Scratch { blocks: unpacked, totals } } = self;
        let Panels { product, blocks, ref rows, .. } = *panels;
        let (x, first) = (product.x, rows.start / ROWS);
        let ahead = &blocks[panel * x.groups..];
        let totals = &mut totals[..rows.len().div_ceil(ROWS)];
        let mut ring = Ring::ZERO;
        totals.fill([Totals([0.0; OUTS]); ROWS]);
        for groups in pieces(0..x.groups, STRETCH) {
            let blocks = &ahead[groups.clone()];
            for ((group, block), unpacked) in groups.clone().zip(blocks).zip(&mut *unpacked) {
                if let Some(block) = ahead.get(group + AHEAD.div_ceil(size_of::<B>())) {
                    prefetch(std::slice::from_ref(block));
                }
                block.prepare::<D>(unpacked);
            }
            let halves = 2 * totals.len();
            let half = |index: usize| {
                let (codes, factors) = x.tile((first + index / 2) * ROWS);
                let (codes, factors) = (&codes[groups.clone()], &factors[groups.clone()]);
                Half { blocks, unpacked, codes, factors, half: index % 2 }
            };
            let mut behind = None;
            for index in 0..=halves {
                let current = (index < halves).then(|| half(index));
                let register = index.saturating_sub(1) / 2;
                add::<B, D, T>(tiles, &mut ring, current.as_ref(), behind.as_ref(), &mut totals[register]);
                if groups.end == x.groups {
                    let rows = rows.start + register * ROWS..rows.end.min(rows.start + (register + 1) * ROWS);
                    match index % 2 {
                        1 => rows.for_each(|row| product.fetch(row, panel)),
                        _ if index > 0 => {
                            rows.zip(&totals[register]).for_each(|(row, totals)| product.write(row, panel, &totals.0))
                        }
                        _ => {}
                    }
                }
                behind = current;
            }
        }
    }
}

/// The sums of the groups of a stretch, a register of rows and half a panel each.
#[repr(C, align(4096))]
struct Ring([[[i32; HALF]; ROWS]; STRETCH]);

impl Ring {
    const ZERO: Self = Self([[[0; HALF]; ROWS]; STRETCH]);
}

/// Half a panel with a register of rows, in the groups of a stretch.
struct Half<'a, B> {
    blocks: &'a [B],
    unpacked: &'a [Unpacked],
    /// `[groups, ROWS, STEPS]`
    codes: &'a [[Row; ROWS]],
    /// `[groups, ROWS]`
    factors: &'a [[Factors; ROWS]],
    half: usize,
}

/// Multiplies `current`, and adds the sums of `behind`, whose products were the ones before, to its rows' totals. Four
/// groups of each take turns, as many as there are registers for sums.
#[inline(always)]
fn add<B: Block, D: Dot, T: Tiles>(
    tiles: &mut T,
    ring: &mut Ring,
    current: Option<&Half<B>>,
    behind: Option<&Half<B>>,
    totals: &mut [Totals; ROWS],
) {
    let half = behind.map_or(0, |behind| behind.half);
    let mut sums = [D::load_half(&totals[0].0.as_chunks().0[half]); ROWS];
    for row in 1..ROWS {
        sums[row] = D::load_half(&totals[row].0.as_chunks().0[half]);
    }
    for four in (0..STRETCH).step_by(4) {
        if let Some(current) = current {
            current.multiply::<T, 0, 4, 6>(tiles, four);
            current.multiply::<T, 1, 5, 7>(tiles, four + 1);
            current.multiply::<T, 2, 4, 6>(tiles, four + 2);
            current.multiply::<T, 3, 5, 7>(tiles, four + 3);
        }
        if let Some(behind) = behind {
            for group in four..behind.blocks.len().min(four + 4) {
                let Unpacked { scales, minima, .. } = &behind.unpacked[group];
                let of_block = [D::load_half(&scales.as_chunks().0[half]), D::load_half(&minima.as_chunks().0[half])];
                let (products, factors) = (&ring.0[group], &behind.factors[group]);
                for row in 0..ROWS {
                    sums[row] = B::add_half::<D>(of_block, &products[row], &factors[row], sums[row]);
                }
            }
        }
        if current.is_some() {
            tiles.store::<0, _>(ring.0[four].as_flattened_mut(), HALF);
            tiles.store::<1, _>(ring.0[four + 1].as_flattened_mut(), HALF);
            tiles.store::<2, _>(ring.0[four + 2].as_flattened_mut(), HALF);
            tiles.store::<3, _>(ring.0[four + 3].as_flattened_mut(), HALF);
        }
    }
    for row in 0..ROWS {
        D::store_half(sums[row], &mut totals[row].0.as_chunks_mut().0[half]);
    }
}

impl<B: Block> Half<'_, B> {
    /// The sums of a group, if there is one.
    #[inline(always)]
    fn multiply<T: Tiles, const SUMS: usize, const X: usize, const W: usize>(&self, tiles: &mut T, group: usize) {
        let Some(block) = self.blocks.get(group) else { return };
        let codes = block.bytes(&self.unpacked[group]);
        tiles.load::<W, _>(&codes[self.half * 4 * HALF..], 4 * OUTS);
        tiles.load::<X, _>(self.codes[group].as_flattened(), STEPS);
        tiles.zero::<SUMS>();
        tiles.multiply_bytes::<SUMS, X, W>();
    }
}
