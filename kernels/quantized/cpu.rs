//! The product on the CPU: panels of weights times rows of `x` rounded to bytes. Lanes are outputs, so nothing is ever
//! added across them.
//!
//! A row alone meets the weights as they are packed. Several meet them unpacked, a tile of rows at a time: the first
//! tile unpacks each block on its way, the others find the panel in a cache. Sums within a group are exact, and what
//! follows is the same either way, so a row's bits do not depend on the tile that it is in.

use std::cell::Cell;
use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

#[cfg(any(test, target_arch = "x86_64"))]
use super::dot::HALF;
use super::dot::{self, Affine, Dot, Four};
use super::{Blocks, Codes, GROUP, OUTS, Q4Block, Q8Block, QuantizedMatrix, STEPS};
use crate::cpu::Shared;
use crate::linear::cpu::write_rounded;
use crate::linear::tile::pieces;
#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::amx::ROWS;
use crate::simd::{Instructions, Kernel, LANES, Lanes, Stored, dispatch, instructions, load, prefetch};

/// `x` `[n, inner]`, `bias` `[outer]`; returns `[n, outer]`.
pub fn linear<X: Stored>(x: &[X], weight: &QuantizedMatrix, bias: Option<&[f32]>) -> Vec<X> {
    let QuantizedMatrix { outer, inner, ref blocks } = *weight;
    if inner == 0 {
        return vec![X::round(0.0); x.len()];
    }
    let n = x.len() / inner;
    let mut out = Vec::with_capacity(n * outer);
    let shared = Shared::new(&mut out.spare_capacity_mut()[..n * outer]);
    let instructions = instructions();
    let x = Rounded::new(x, inner, Order::of(n, instructions));
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
const MIN_TASK: usize = 1 << 17;

/// How rounded rows lie in memory.
#[derive(Clone, Copy)]
enum Order {
    /// In tiles of at most so many rows `R`, which have [`tiles`]: codes `[groups, STEPS, R]`, factors `[groups, R]`.
    BySteps(usize),
    /// In registers of sixteen rows, some missing: codes `[groups, 16, STEPS]`, factors `[groups, 16]`.
    #[cfg(any(test, target_arch = "x86_64"))]
    ByRows,
}

impl Order {
    /// For the product of `n` rows.
    fn of(n: usize, instructions: Instructions) -> Self {
        struct Rows<'a>(&'a mut usize);
        impl dot::Kernel for Rows<'_> {
            fn run<D: Dot>(self) {
                *self.0 = D::ROWS
            }
        }
        #[cfg(any(test, target_arch = "x86_64"))]
        if super::amx::takes(n) {
            return Self::ByRows;
        }
        #[cfg(not(any(test, target_arch = "x86_64")))]
        let _ = n;
        let mut rows = 1;
        dot::dispatch(instructions, Rows(&mut rows));
        Self::BySteps(rows)
    }

    /// Rows that are multiplied at once, at most.
    fn rows(self) -> usize {
        match self {
            Self::BySteps(rows) => rows,
            #[cfg(any(test, target_arch = "x86_64"))]
            Self::ByRows => ROWS,
        }
    }
}

/// `rows` in tiles of at most `most`, each of a size that there is a kernel for.
fn tiles(rows: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = rows.start;
    std::iter::from_fn(move || {
        let left = most.min(rows.end - start);
        let size = [12, 8, 6, 4, 3, 2, 1].into_iter().find(|&size| size <= left)?;
        start += size;
        Some(start - size..start)
    })
}

/// Rows of `x` rounded to bytes.
pub(super) struct Rounded {
    /// What is missing from the last group is zero.
    codes: Vec<Four>,
    /// Of `codes`, before the first on a cache line.
    skip: usize,
    factors: Vec<Factors>,
    pub(super) groups: usize,
    order: Order,
}

/// Of a group of a row.
#[derive(Clone, Copy, Default)]
pub(super) struct Factors {
    /// `x = scale * code`.
    scale: f32,
    /// What the codes add up to, times `scale`.
    sum: f32,
    /// What the codes add up to, times -128.
    offset: i32,
}

impl Rounded {
    fn new<X: Stored>(x: &[X], inner: usize, order: Order) -> Self {
        let groups = inner.div_ceil(GROUP);
        let n = x.len() / inner;
        let places = match order {
            Order::BySteps(_) => n,
            #[cfg(any(test, target_arch = "x86_64"))]
            Order::ByRows => n.next_multiple_of(order.rows()),
        };
        let mut codes = vec![[0; 4]; (places * groups + 1) * STEPS];
        let skip = codes.as_ptr().align_offset(GROUP) % STEPS;
        let mut factors = vec![Factors::default(); places * groups];
        let (shared_codes, shared_factors) = (Shared::new(&mut codes[skip..]), Shared::new(&mut factors));
        let task = (MIN_TASK / 16 / inner).next_multiple_of(order.rows());
        let round = |rows: Range<usize>, places: usize| {
            let (start, count) = (rows.start * groups, places * groups);
            // SAFETY: no two tiles have a row in common.
            let (codes, factors) =
                unsafe { (shared_codes.part(start * STEPS, count * STEPS), shared_factors.part(start, count)) };
            let x = &x[rows.start * inner..rows.end * inner];
            let strides = match order {
                Order::BySteps(_) => [1, places],
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::ByRows => [STEPS, 1],
            };
            dispatch(Round { x, inner, places, strides, codes, factors });
        };
        (0..n.div_ceil(task)).into_par_iter().for_each(|index| {
            let rows = index * task..n.min((index + 1) * task);
            match order {
                Order::BySteps(most) => tiles(rows, most).for_each(|rows| round(rows.clone(), rows.len())),
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::ByRows => pieces(rows, ROWS).for_each(|rows| round(rows, ROWS)),
            }
        });
        Self { codes, skip, factors, groups, order }
    }

    fn codes(&self) -> &[Four] {
        &self.codes[self.skip..]
    }

    /// The codes and factors of some groups of the sixteen rows of a register, by rows.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    pub(super) fn register(
        &self,
        register: usize,
        groups: Range<usize>,
    ) -> (&[[[Four; STEPS]; ROWS]], &[[Factors; ROWS]]) {
        let groups = register * self.groups + groups.start..register * self.groups + groups.end;
        (&self.codes().as_chunks().0.as_chunks().0[groups.clone()], &self.factors.as_chunks().0[groups])
    }
}

/// A tile.
struct Round<'a, X> {
    x: &'a [X],
    inner: usize,
    /// Rows that there is place for.
    places: usize,
    /// From the codes of one row to those of the next, and from one step to the next.
    strides: [usize; 2],
    codes: &'a mut [Four],
    factors: &'a mut [Factors],
}

impl<X: Stored> Kernel for Round<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        // Adding 1.5 * 2^23 leaves the nearest integer in the lower bits.
        const ROUND: f32 = 12_582_912.0;
        for (row, x) in self.x.chunks_exact(self.inner).enumerate() {
            for (group, x) in x.chunks(GROUP).enumerate() {
                let mut values = [0.0; GROUP];
                let mut largest = V::splat(0.0);
                for (x, values) in x.chunks(LANES).zip(values.as_chunks_mut::<LANES>().0) {
                    let x: V = load(x);
                    largest = x.max(V::splat(0.0).sub(x)).max(largest);
                    x.store(values);
                }
                let scale = largest.greatest() / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
                for values in values.as_chunks_mut::<LANES>().0 {
                    V::load(values).mul(V::splat(inverse)).add(V::splat(ROUND)).store(values);
                }
                let (mut codes, mut sum) = ([0; GROUP], 0);
                for i in 0..GROUP {
                    codes[i] = values[i].to_bits() as i8;
                    sum += i32::from(codes[i]);
                }
                let factors = Factors { scale, sum: scale * sum as f32, offset: -128 * sum };
                self.factors[group * self.places + row] = factors;
                let target = &mut self.codes[group * STEPS * self.places + row * self.strides[0]..];
                for (target, codes) in target.iter_mut().step_by(self.strides[1]).zip(codes.as_chunks().0) {
                    *target = *codes;
                }
            }
        }
    }
}

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
        let tile = self.x.order.rows();
        let parts = (4 * threads).div_ceil(panels.max(1)).min(self.n.div_ceil(tile)).max(1);
        let rows = self.n.div_ceil(parts).next_multiple_of(tile);
        let task = panels.div_ceil(8 * threads).max(MIN_TASK / (rows.min(self.n).max(1) * self.inner * OUTS)).max(1);
        let tasks = panels.div_ceil(task);
        (0..self.n.div_ceil(rows.max(1)) * tasks).into_par_iter().for_each(|index| {
            let (part, first) = (index / tasks, index % tasks * task);
            let panels = first..panels.min(first + task);
            let rows = part * rows..self.n.min((part + 1) * rows);
            let part = Panels { product: self, blocks, panels, rows };
            match self.x.order {
                Order::BySteps(_) => part.sweep(),
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::ByRows => super::amx::run(part),
            }
        });
    }

    /// Rounds the outputs of a panel in row `row`, and their bias if there is one.
    #[inline(always)]
    pub fn write(&self, row: usize, panel: usize, totals: &[f32; OUTS]) {
        let first = panel * OUTS;
        // SAFETY: every task has outputs and rows of its own.
        let out = unsafe { self.out.part(row * self.outer + first, OUTS.min(self.outer - first)) };
        write_rounded(out, totals, self.bias.map(|bias| &bias[first..]));
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

/// A block as several rows meet it.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Unpacked {
    codes: [Codes; STEPS],
    pub scales: [f32; OUTS],
    /// Undefined where the format has none.
    pub minima: [f32; OUTS],
}

impl Unpacked {
    pub const ZERO: Self = Self { codes: [[[0; 4]; OUTS]; STEPS], scales: [0.0; OUTS], minima: [0.0; OUTS] };
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
const AHEAD: usize = 4 << 10;

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
            return self.row::<D>(self.rows.start);
        }
        self.scratch.totals[..self.rows.len()].fill(Totals([0.0; OUTS]));
        for groups in pieces(0..self.blocks.len(), STRETCH) {
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
        for (row, totals) in self.rows.clone().zip(&self.scratch.totals) {
            self.product.write(row, self.panel, &totals.0);
        }
    }
}

impl<'a, B: Block, X: Stored> Sweep<'a, B, X> {
    #[inline(always)]
    fn row<D: Dot>(&self, row: usize) {
        let (x, factors) = self.operands::<1>(row);
        let mut totals = [0.0; OUTS];
        for (group, block) in self.blocks.iter().enumerate() {
            fetch(self.ahead, group);
            block.add::<D>(&x[group], factors[group][0], &mut totals);
        }
        self.product.write(row, self.panel, &totals);
    }

    #[inline(always)]
    fn tile<D: Dot, const R: usize>(&mut self, row: usize, groups: Range<usize>) {
        let (x, factors) = self.operands::<R>(row);
        let first = row - self.rows.start;
        let Scratch { blocks, totals } = &mut *self.scratch;
        let totals: &mut [Totals; R] = &mut totals[first..].as_chunks_mut().0[0];
        for (group, block) in groups.zip(blocks) {
            if first == 0 {
                fetch(self.ahead, group);
                self.blocks[group].unpack::<D>(block);
            }
            // The compiler would keep totals in registers that the sums need.
            B::add_unpacked::<D, R>(block, &x[group], &factors[group], black_box(&mut *totals));
        }
    }

    /// The groups of the tile of `R` rows from `row` on.
    #[inline(always)]
    fn operands<const R: usize>(&self, row: usize) -> (&'a [[[Four; R]; STEPS]], &'a [[Factors; R]]) {
        let Rounded { factors, groups, .. } = self.x;
        let (start, count) = (row * groups, R * groups);
        let codes = self.x.codes()[start * STEPS..][..count * STEPS].as_chunks().0.as_chunks().0;
        (codes, factors[start..][..count].as_chunks().0)
    }
}

#[inline(always)]
pub(super) fn fetch<B>(blocks: &[B], group: usize) {
    if let Some(ahead) = blocks.get(group + AHEAD.div_ceil(size_of::<B>())) {
        prefetch(std::slice::from_ref(ahead));
    }
}

/// A block of a packed weight.
pub(super) trait Block: Sync {
    /// Adds its products with one row.
    fn add<D: Dot>(&self, x: &[[Four; 1]; STEPS], factors: Factors, totals: &mut [f32; OUTS]);
    /// Adds the sums of a row's products, scaled.
    fn add_sums<D: Dot>(block: &Unpacked, sums: D::Sums, factors: &Factors, part: usize, totals: &mut Totals);
    /// As [`Block::add_sums`], of half a panel, the one that the factors of the block are of.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn add_half<D: Dot>(
        scales_and_minima: [D::Half; 2],
        sums: &[i32; HALF],
        factors: &Factors,
        totals: D::Half,
    ) -> D::Half;
    /// Unpacks what [`Block::bytes`] and [`Block::add_half`] need.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn prepare<D: Dot>(&self, target: &mut Unpacked);
    /// The codes as signed bytes, once they are prepared: `[STEPS, OUTS, 4]`.
    #[cfg(any(test, target_arch = "x86_64"))]
    fn bytes<'a>(&'a self, unpacked: &'a Unpacked) -> &'a [u8];
    fn unpack<D: Dot>(&self, target: &mut Unpacked);
    /// Adds the products of an unpacked block with `R` rows.
    fn add_unpacked<D: Dot, const R: usize>(
        block: &Unpacked,
        x: &[[Four; R]; STEPS],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    );
}

impl Block for Q8Block {
    #[inline(always)]
    fn add<D: Dot>(&self, x: &[[Four; 1]; STEPS], factors: Factors, totals: &mut [f32; OUTS]) {
        let scales = widen(&self.scales);
        for part in 0..OUTS / D::WIDTH {
            let mut sums = [D::unbiased(factors.offset)];
            for (codes, x) in self.codes.iter().zip(x) {
                D::add(&mut sums, D::signed(D::load(codes, part)), x);
            }
            D::add_scaled(sums[0], factors.scale, &scales, part, totals);
        }
    }
    #[inline(always)]
    fn unpack<D: Dot>(&self, target: &mut Unpacked) {
        for part in 0..OUTS / D::WIDTH {
            for step in 0..STEPS {
                D::store(D::signed(D::load(&self.codes[step], part)), part, &mut target.codes[step]);
            }
        }
        target.scales = widen(&self.scales);
    }
    #[inline(always)]
    fn add_unpacked<D: Dot, const R: usize>(
        block: &Unpacked,
        x: &[[Four; R]; STEPS],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        for part in 0..OUTS / D::WIDTH {
            let mut sums = [D::unbiased(0); R];
            for r in 0..R {
                sums[r] = D::unbiased(factors[r].offset);
            }
            for (codes, x) in block.codes.iter().zip(x) {
                D::add(&mut sums, D::load(codes, part), x);
            }
            for r in 0..R {
                Self::add_sums::<D>(block, sums[r], &factors[r], part, &mut totals[r]);
            }
        }
    }
    #[inline(always)]
    fn add_sums<D: Dot>(block: &Unpacked, sums: D::Sums, factors: &Factors, part: usize, totals: &mut Totals) {
        D::add_scaled(sums, factors.scale, &block.scales, part, &mut totals.0);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn add_half<D: Dot>([scales, _]: [D::Half; 2], sums: &[i32; HALF], factors: &Factors, totals: D::Half) -> D::Half {
        D::half_scaled(sums, factors.scale, scales, totals)
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn prepare<D: Dot>(&self, target: &mut Unpacked) {
        target.scales = widen(&self.scales);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn bytes<'a>(&'a self, _: &'a Unpacked) -> &'a [u8] {
        self.codes.as_flattened().as_flattened()
    }
}

impl Block for Q4Block {
    #[inline(always)]
    fn add<D: Dot>(&self, x: &[[Four; 1]; STEPS], factors: Factors, totals: &mut [f32; OUTS]) {
        let (scales, minima) = (&widen(&self.scales), &widen(&self.minima));
        let affine = Affine { factor: factors.scale, sum: factors.sum, scales, minima };
        for part in 0..OUTS / D::WIDTH {
            let mut halves = [[D::small()]; 2];
            for half in 0..2 {
                if half == 1 {
                    halves[1][0] = D::second(halves[0][0]);
                }
                for pair in half * STEPS / 4..(half + 1) * STEPS / 4 {
                    let [lower, upper] = D::nibbles(D::load(&self.codes[pair], part));
                    D::add_small(&mut halves[half], lower, &x[2 * pair]);
                    D::add_small(&mut halves[half], upper, &x[2 * pair + 1]);
                }
            }
            D::add_affine(D::total([halves[0][0], halves[1][0]]), affine, part, totals);
        }
    }
    #[inline(always)]
    fn unpack<D: Dot>(&self, target: &mut Unpacked) {
        for part in 0..OUTS / D::WIDTH {
            for pair in 0..STEPS / 2 {
                let [lower, upper] = D::nibbles(D::load(&self.codes[pair], part));
                D::store(lower, part, &mut target.codes[2 * pair]);
                D::store(upper, part, &mut target.codes[2 * pair + 1]);
            }
        }
        (target.scales, target.minima) = (widen(&self.scales), widen(&self.minima));
    }
    #[inline(always)]
    fn add_unpacked<D: Dot, const R: usize>(
        block: &Unpacked,
        x: &[[Four; R]; STEPS],
        factors: &[Factors; R],
        totals: &mut [Totals; R],
    ) {
        for part in 0..OUTS / D::WIDTH {
            let mut first = [D::small(); R];
            for (codes, x) in block.codes.iter().zip(x).take(STEPS / 2) {
                D::add_small(&mut first, D::load(codes, part), x);
            }
            let mut second = first;
            for r in 0..R {
                second[r] = D::second(first[r]);
            }
            for (codes, x) in block.codes.iter().zip(x).skip(STEPS / 2) {
                D::add_small(&mut second, D::load(codes, part), x);
            }
            for r in 0..R {
                let sums = D::total([first[r], second[r]]);
                Self::add_sums::<D>(block, sums, &factors[r], part, &mut totals[r]);
            }
        }
    }
    #[inline(always)]
    fn add_sums<D: Dot>(block: &Unpacked, sums: D::Sums, factors: &Factors, part: usize, totals: &mut Totals) {
        let &Factors { scale, sum, .. } = factors;
        let affine = Affine { factor: scale, sum, scales: &block.scales, minima: &block.minima };
        D::add_affine(sums, affine, part, &mut totals.0);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn add_half<D: Dot>(
        [scales, minima]: [D::Half; 2],
        sums: &[i32; HALF],
        factors: &Factors,
        totals: D::Half,
    ) -> D::Half {
        D::half_shifted(factors.sum, minima, D::half_scaled(sums, factors.scale, scales, totals))
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn prepare<D: Dot>(&self, target: &mut Unpacked) {
        self.unpack::<D>(target);
    }
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    fn bytes<'a>(&'a self, unpacked: &'a Unpacked) -> &'a [u8] {
        unpacked.codes.as_flattened().as_flattened()
    }
}

#[inline(always)]
fn widen(values: &[bf16; OUTS]) -> [f32; OUTS] {
    let mut wide = [0.0; OUTS];
    for (value, wide) in values.iter().zip(&mut wide) {
        // Not a NaN, which `to_f32` would look for.
        *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
    }
    wide
}
