//! Rows of activations rounded to bytes, in the order in which the product reads them.

use std::cell::Cell;
use std::ops::Range;

use super::cpu::MIN_TASK;
use super::dot::{self, Dot, Four};
use super::{GROUP, STEPS};
use crate::cpu::{Shared, share};
#[cfg(any(test, target_arch = "x86_64"))]
use crate::linear::tile::pieces;
#[cfg(any(test, target_arch = "x86_64"))]
use crate::simd::amx::ROWS;
use crate::simd::{Instructions, Kernel, Lanes, PAIR, Stored, Vector, dispatch, load_pair};

/// How rounded rows lie in memory.
#[derive(Clone, Copy)]
pub enum Order {
    /// In tiles of at most so many rows `R`, which have [`tiles`]: codes `[groups, STEPS, R]`, factors `[groups, R]`.
    BySteps(usize),
    /// In registers of sixteen rows, some missing: codes `[groups, 16, STEPS]`, factors `[groups, 16]`.
    #[cfg(any(test, target_arch = "x86_64"))]
    ByRows,
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
            return Self::ByRows;
        }
        #[cfg(not(any(test, target_arch = "x86_64")))]
        let _ = n;
        let mut rows = 1;
        dot::dispatch(instructions, Rows(&mut rows));
        Self::BySteps(rows)
    }

    /// Rows that are multiplied at once, at most.
    pub fn rows(self) -> usize {
        match self {
            Self::BySteps(rows) => rows,
            #[cfg(any(test, target_arch = "x86_64"))]
            Self::ByRows => ROWS,
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
    pub fn new<X: Stored>(x: &[X], inner: usize, order: Order) -> Self {
        let groups = inner.div_ceil(GROUP);
        let n = x.len() / inner;
        let places = match order {
            Order::BySteps(_) => n,
            #[cfg(any(test, target_arch = "x86_64"))]
            Order::ByRows => n.next_multiple_of(order.rows()),
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
            let x = &x[rows.start * inner..rows.end * inner];
            let strides = match order {
                Order::BySteps(_) => [1, places],
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::ByRows => [STEPS, 1],
            };
            dispatch(Round { x, inner, places, strides, codes, factors });
        };
        share(n.div_ceil(task), |index| {
            let rows = index * task..n.min((index + 1) * task);
            match order {
                Order::BySteps(most) => tiles(rows, most).for_each(|rows| round(rows.clone(), rows.len())),
                #[cfg(any(test, target_arch = "x86_64"))]
                Order::ByRows => pieces(rows, ROWS).for_each(|rows| round(rows, ROWS)),
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
    pub fn tile<const R: usize>(&self, row: usize) -> (&[[[Four; R]; STEPS]], &[[Factors; R]]) {
        let (start, count) = (row * self.groups, R * self.groups);
        let codes = self.codes()[start * STEPS..][..count * STEPS].as_chunks().0.as_chunks().0;
        (codes, self.memory.factors[start..][..count].as_chunks().0)
    }

    /// The codes and factors of some groups of the sixteen rows of a register, by rows.
    #[cfg(any(test, target_arch = "x86_64"))]
    #[inline(always)]
    pub fn register(&self, register: usize, groups: Range<usize>) -> (&[[[Four; STEPS]; ROWS]], &[[Factors; ROWS]]) {
        let groups = register * self.groups + groups.start..register * self.groups + groups.end;
        (&self.codes().as_chunks().0.as_chunks().0[groups.clone()], &self.memory.factors.as_chunks().0[groups])
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
        for (row, x) in self.x.chunks_exact(self.inner).enumerate() {
            for (group, x) in x.chunks(GROUP).enumerate() {
                let mut padded = [X::round(0.0); GROUP];
                let x = x.first_chunk().unwrap_or_else(|| {
                    padded[..x.len()].copy_from_slice(x);
                    &padded
                });
                let zero = V::Pair::splat(0.0);
                let (mut values, mut largest) = ([zero; GROUP / PAIR], zero);
                for (value, x) in values.iter_mut().zip(x.as_chunks::<PAIR>().0) {
                    *value = load_pair::<V, X>(x);
                    largest = value.max(zero.sub(*value)).max(largest);
                }
                let [a, b] = V::halves(largest);
                let scale = a.max(b).greatest() / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { scale.recip() };
                // Exact: integers below 2^24.
                let mut sum = zero;
                for value in &mut values {
                    *value = value.mul(V::Pair::splat(inverse));
                    sum = sum.add(value.nearest());
                }
                let [a, b] = V::halves(sum);
                let (codes, sum) = (V::bytes(values), a.add(b).sum());
                let factors = Factors { scale, sum: scale * sum, offset: -128 * sum as i32 };
                self.factors[group * self.places + row] = factors;
                let target = &mut self.codes[group * STEPS * self.places + row * self.strides[0]..];
                if self.strides[1] == 1 {
                    target[..STEPS].copy_from_slice(codes.as_chunks().0);
                    continue;
                }
                for (target, codes) in target.iter_mut().step_by(self.strides[1]).zip(codes.as_chunks().0) {
                    *target = *codes;
                }
            }
        }
    }
}
