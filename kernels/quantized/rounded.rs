//! Rows of activations rounded to bytes, in the order in which the product reads them.

use std::cell::Cell;
use std::ops::Range;

use super::cpu::MIN_TASK;
use super::dot::{self, Dot, Four, Row};
use super::{GROUP, STEPS};
use crate::activation::{self, Activation};
use crate::cpu::{Shared, share};
#[cfg(any(test, target_arch = "x86_64"))]
use crate::linear::tile::pieces;
use crate::norm;
#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::amx::ROWS;
use crate::simd::{Instructions, Kernel, LANES, Lanes, PAIR, Stored, Vector, dispatch, load_pair};

/// How rounded rows lie in memory.
#[derive(Clone, Copy)]
pub enum Order {
    /// In tiles of at most so many rows `R`, which have [`tiles`]: codes `[groups, R, STEPS]`, factors `[groups, R]`.
    Tiles(usize),
    /// In registers of sixteen rows, some missing: codes `[groups, 16, STEPS]`, factors `[groups, 16]`.
    #[cfg(any(test, target_arch = "x86_64"))]
    Registers,
}

impl Order {
    /// For the product of `n` rows.
    pub fn of(n: usize, instructions: Instructions) -> Self {
        struct Rows<'a>(&'a mut usize);
        impl dot::Kernel for Rows<'_> {
            fn run<D: Dot>(self) {
                *self.0 = D::ROWS
            }
        }
        #[cfg(any(test, target_arch = "x86_64"))]
        if super::amx::takes(n) {
            return Self::Registers;
        }
        #[cfg(not(any(test, target_arch = "x86_64")))]
        let _ = n;
        let mut rows = 1;
        dot::dispatch(instructions, Rows(&mut rows));
        Self::Tiles(rows)
    }

    /// Rows that are multiplied at once, at most.
    pub fn rows(self) -> usize {
        match self {
            Self::Tiles(rows) => rows,
            #[cfg(any(test, target_arch = "x86_64"))]
            Self::Registers => ROWS,
        }
    }
}

/// `rows` in tiles of at most `most`, each of a size that there is a kernel for.
pub fn tiles(rows: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = rows.start;
    std::iter::from_fn(move || {
        let left = most.min(rows.end - start);
        let size = [12, 8, 6, 4, 3, 2, 1].into_iter().find(|&size| size <= left)?;
        start += size;
        Some(start - size..start)
    })
}

/// What is done with a row before it is rounded.
#[derive(Clone, Copy)]
pub enum Before<'a> {
    Nothing,
    /// An RMS norm, of this weight and epsilon.
    Norm(&'a [f32], f32),
    /// The row is a gate and what it multiplies, side by side.
    Gate(Activation),
}

impl Before<'_> {
    /// Of a row that becomes one of `inner` values.
    pub fn width(self, inner: usize) -> usize {
        match self {
            Self::Nothing | Self::Norm(..) => inner,
            Self::Gate(_) => 2 * inner,
        }
    }
}

/// Rows of `x` rounded to bytes.
pub struct Rounded {
    memory: Memory,
    /// Of the codes, before the first on a cache line.
    skip: usize,
    pub groups: usize,
    order: Order,
}

/// Of any content where there are no rows.
#[derive(Default)]
struct Memory {
    /// What is missing from the last group is zero.
    codes: Vec<Four>,
    factors: Vec<Factors>,
}

thread_local! {
    /// A thread's, kept between calls.
    static MEMORY: Cell<Memory> = const { Cell::new(Memory { codes: Vec::new(), factors: Vec::new() }) };
}

/// Of a group of a row.
#[derive(Clone, Copy, Default)]
pub struct Factors {
    /// `x = scale * code`.
    pub scale: f32,
    /// What the codes add up to, times `scale`.
    pub sum: f32,
    /// What the codes add up to, times -128.
    pub offset: i32,
}

impl Rounded {
    /// `x` in rows of [`Before::width`].
    pub fn new<X: Stored>(x: &[X], before: Before, inner: usize, order: Order) -> Self {
        let groups = inner.div_ceil(GROUP);
        let width = before.width(inner);
        let n = x.len() / width;
        let places = match order {
            Order::Tiles(_) => n,
            #[cfg(any(test, target_arch = "x86_64"))]
            Order::Registers => n.next_multiple_of(order.rows()),
        };
        let mut memory = MEMORY.take();
        let Memory { codes, factors } = &mut memory;
        codes.resize(codes.len().max((places * groups + 1) * STEPS), [0; 4]);
        factors.resize(factors.len().max(places * groups), Factors::default());
        let skip = codes.as_ptr().align_offset(GROUP) % STEPS;
        let (shared_codes, shared_factors) = (Shared::new(&mut codes[skip..]), Shared::new(factors));
        let task = (MIN_TASK / 16 / inner).next_multiple_of(order.rows());
        let round = |rows: Range<usize>, places: usize| {
            let (start, count) = (rows.start * groups, places * groups);
            // SAFETY: no two tiles have a row in common.
            let (codes, factors) =
                unsafe { (shared_codes.part(start * STEPS, count * STEPS), shared_factors.part(start, count)) };
            let x = &x[rows.start * width..rows.end * width];
            dispatch(Round { x, before, inner, places, codes, factors });
        };
        share(n.div_ceil(task), |index| {
            let rows = index * task..n.min((index + 1) * task);
            match order {
                Order::Tiles(most) => tiles(rows, most).for_each(|rows| round(rows.clone(), rows.len())),
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::Registers => pieces(rows, ROWS).for_each(|rows| round(rows, ROWS)),
            }
        });
        Self { memory, skip, groups, order }
    }

    pub fn order(&self) -> Order {
        self.order
    }

    fn codes(&self) -> &[Four] {
        &self.memory.codes[self.skip..]
    }

    /// The codes and factors of the groups of the tile of `R` rows from `row` on.
    #[inline(always)]
    pub fn tile<const R: usize>(&self, row: usize) -> (&[[Row; R]], &[[Factors; R]]) {
        let (start, count) = (row * self.groups, R * self.groups);
        let codes = self.codes()[start * STEPS..][..count * STEPS].as_chunks().0.as_chunks().0;
        (codes, self.memory.factors[start..][..count].as_chunks().0)
    }
}

impl Drop for Rounded {
    fn drop(&mut self) {
        MEMORY.set(std::mem::take(&mut self.memory));
    }
}

/// A tile.
struct Round<'a, X> {
    x: &'a [X],
    before: Before<'a>,
    inner: usize,
    /// Rows that there is place for.
    places: usize,
    codes: &'a mut [Four],
    factors: &'a mut [Factors],
}

impl<X: Stored> Kernel for Round<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let mut padded = [X::round(0.0); GROUP];
        let mut entering = match self.before {
            Before::Nothing => vec![],
            Before::Norm(..) | Before::Gate(_) => vec![X::round(0.0); self.inner],
        };
        for (row, x) in self.x.chunks_exact(self.before.width(self.inner)).enumerate() {
            let out = &mut entering[..];
            let x = match self.before {
                Before::Nothing => x,
                Before::Norm(weight, eps) => {
                    norm::cpu::Row { x, gate: None, weight, eps, out }.run::<V>();
                    &entering
                }
                Before::Gate(activation) => {
                    let (gate, up) = x.split_at(self.inner);
                    activation::cpu::Row { gate, up, activation, out }.run::<V>();
                    &entering
                }
            };
            for (eight, x) in x.chunks(LANES * GROUP).enumerate() {
                // Eight groups share what is done across lanes, and the divisions.
                let mut largest = [V::splat(0.0); LANES];
                for (largest, x) in largest.iter_mut().zip(x.chunks(GROUP)) {
                    *largest = largest_of::<V, X>(whole(x, &mut padded));
                }
                let [a, b, c, d, e, f, g, h] = V::transpose(largest);
                let largest = a.max(b).max(c.max(d)).max(e.max(f).max(g.max(h)));
                let (mut scales, mut inverses) = ([0.0; LANES], [0.0; LANES]);
                let scale = largest.div(V::splat(127.0));
                scale.store(&mut scales);
                V::splat(1.0).div(scale).store(&mut inverses);

                let mut sums = [V::splat(0.0); LANES];
                for (i, x) in x.chunks(GROUP).enumerate() {
                    let inverse = if scales[i] == 0.0 { 0.0 } else { inverses[i] };
                    let (codes, sum) = codes_of::<V, X>(whole(x, &mut padded), inverse);
                    sums[i] = sum;
                    let at = (eight * LANES + i) * self.places + row;
                    self.codes[at * STEPS..][..STEPS].copy_from_slice(codes.as_chunks().0);
                }
                let [a, b, c, d, e, f, g, h] = sums;
                let sums = [V::sums([a, b, c, d]), V::sums([e, f, g, h])];
                let factors = self.factors[eight * LANES * self.places + row..].iter_mut().step_by(self.places);
                for ((factors, scale), sum) in factors.zip(scales).zip(sums.as_flattened()) {
                    *factors = Factors { scale, sum: scale * sum, offset: -128 * *sum as i32 };
                }
            }
        }
    }
}

/// All of a group, in `padded` if `x` has less; what lies beyond is zero there.
#[inline(always)]
fn whole<'a, X: Copy>(x: &'a [X], padded: &'a mut [X; GROUP]) -> &'a [X; GROUP] {
    match x.first_chunk() {
        Some(x) => x,
        None => {
            padded[..x.len()].copy_from_slice(x);
            padded
        }
    }
}

/// The largest magnitude, in some lane.
#[inline(always)]
fn largest_of<V: Lanes, X: Stored>(x: &[X; GROUP]) -> V {
    let zero = V::Pair::splat(0.0);
    let mut largest = zero;
    for x in x.as_chunks::<PAIR>().0 {
        let value = load_pair::<V, X>(x);
        largest = value.max(zero.sub(value)).max(largest);
    }
    let [a, b] = V::halves(largest);
    a.max(b)
}

/// The codes, and what they add up to over all lanes.
#[inline(always)]
fn codes_of<V: Lanes, X: Stored>(x: &[X; GROUP], inverse: f32) -> ([i8; GROUP], V) {
    let (inverse, mut values) = (V::Pair::splat(inverse), [V::Pair::splat(0.0); GROUP / PAIR]);
    // Exact: integers below 2^24.
    let mut sum = V::Pair::splat(0.0);
    for (value, x) in values.iter_mut().zip(x.as_chunks::<PAIR>().0) {
        *value = load_pair::<V, X>(x).mul(inverse);
        sum = sum.add(value.nearest());
    }
    let [a, b] = V::halves(sum);
    (V::bytes(values), a.add(b))
}
