//! The product of several rows on AMX: a group of 64 inputs is one step of its registers. 8-bit codes are read as they
//! are packed, those of 4 bits are unpacked once for all rows. Sums within a group are integers and what follows is that
//! of [`Dot`], so the bits are those of [`super::cpu`].
//!
//! Sums reach the vector registers through memory. What follows is as much work as the product: both go on at once, on
//! different groups.

use std::cell::Cell;

use super::cpu::{Block, Factors, Panels, Totals, Unpacked, fetch};
use super::dot::{self, Dot, Four, HALF};
use super::{OUTS, STEPS};
use crate::linear::tile::pieces;
use crate::simd::Stored;
use crate::simd::amx::{self, ROWS, Tiles, WIDTH};

/// Groups that all rows meet before the next: codes of a panel and of a register of rows take 24 KiB, which stay in the
/// first-level cache.
const STRETCH: usize = 8;

/// Groups whose sums are on the way: their products take about as long as what follows those of two others.
const AHEAD: usize = 2;

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
                fetch(ahead, group);
                block.prepare::<D>(unpacked);
            }
            for (register, totals) in (first..).zip(&mut *totals) {
                let (codes, factors) = x.register(register, groups.clone());
                for half in 0..2 {
                    let half = Half { blocks, unpacked, codes, factors, half };
                    half.add::<D, T>(tiles, &mut ring, totals);
                }
            }
        }
        for (row, totals) in rows.clone().zip(totals.as_flattened()) {
            product.write(row, panel, &totals.0);
        }
    }
}

/// The sums of four groups in turn, a register of rows and half a panel each. Those that are read and those on the way
/// never lie at the same distance from a page, where the machine would take one for the other.
#[repr(C, align(4096))]
struct Ring([[[i32; HALF]; ROWS]; 4]);

impl Ring {
    const ZERO: Self = Self([[[0; HALF]; ROWS]; 4]);
}

/// Half a panel with a register of rows, in the groups of a stretch.
struct Half<'a, B> {
    blocks: &'a [B],
    unpacked: &'a [Unpacked],
    /// `[groups, ROWS, STEPS]`
    codes: &'a [[[Four; STEPS]; ROWS]],
    /// `[groups, ROWS]`
    factors: &'a [[Factors; ROWS]],
    half: usize,
}

impl<B: Block> Half<'_, B> {
    #[inline(always)]
    fn add<D: Dot, T: Tiles>(&self, tiles: &mut T, ring: &mut Ring, totals: &mut [Totals; ROWS]) {
        let Self { blocks, unpacked, half, .. } = *self;
        let mut sums = [D::load_half(&totals[0].0.as_chunks().0[half]); ROWS];
        for row in 1..ROWS {
            sums[row] = D::load_half(&totals[row].0.as_chunks().0[half]);
        }
        for group in 0..blocks.len() + AHEAD {
            match group % 4 {
                _ if group >= blocks.len() => {}
                0 => self.multiply::<T, 0, 4, 6>(tiles, group, &mut ring.0[0]),
                1 => self.multiply::<T, 1, 5, 7>(tiles, group, &mut ring.0[1]),
                2 => self.multiply::<T, 2, 4, 6>(tiles, group, &mut ring.0[2]),
                _ => self.multiply::<T, 3, 5, 7>(tiles, group, &mut ring.0[3]),
            }
            if let Some(group) = group.checked_sub(AHEAD) {
                let Unpacked { scales, minima, .. } = &unpacked[group];
                let of_block = [D::load_half(&scales.as_chunks().0[half]), D::load_half(&minima.as_chunks().0[half])];
                let (products, factors) = (&ring.0[group % 4], &self.factors[group]);
                for row in 0..ROWS {
                    sums[row] = B::add_half::<D>(of_block, &products[row], &factors[row], sums[row]);
                }
            }
        }
        for row in 0..ROWS {
            D::store_half(sums[row], &mut totals[row].0.as_chunks_mut().0[half]);
        }
    }

    /// The sums of a group.
    #[inline(always)]
    fn multiply<T: Tiles, const SUMS: usize, const X: usize, const W: usize>(
        &self,
        tiles: &mut T,
        group: usize,
        sums: &mut [[i32; HALF]; ROWS],
    ) {
        let codes = self.blocks[group].bytes(&self.unpacked[group]);
        tiles.load::<W, _>(&codes[self.half * 4 * HALF..], 4 * OUTS);
        tiles.load::<X, _>(self.codes[group].as_flattened(), STEPS);
        tiles.zero::<SUMS>();
        tiles.multiply_bytes::<SUMS, X, W>();
        tiles.store::<SUMS, _>(sums.as_flattened_mut(), HALF);
    }
}
