//! Few rows: vectors of pairs stream the weights as they are stored, each lane a step of the registers.

use std::cell::Cell;
use std::ops::Range;

use half::bf16;

use super::{BLOCK, Product, RUN, RUNS, parts};
use crate::cpu::{reads, share_pieces};
use crate::linear::cpu::{MIN_TASK, aligned, write_rounded};
use crate::linear::tile::pieces;
use crate::simd::{Kernel, LANES, Lanes, Stored, dispatch, prefetch_far};

/// Up to this many rows, weights are read from memory faster than registers are filled with them.
pub const MOST: usize = 3;

impl<X: Stored> Product<'_, X> {
    pub fn few(&self, n: usize) {
        let &Self { inner, outer, .. } = self;
        let row = inner.div_ceil(RUN) * X::PARTS * RUN;
        let mut scratch = WIDENED.take();
        let x = aligned(&mut scratch, n * row);
        x.chunks_exact_mut(row).zip(self.x.chunks_exact(inner)).for_each(|(target, x)| dispatch(Widen { x, target }));
        let x = &*x;
        reads(self.weight);
        let task = outer.div_ceil(4 * rayon::current_num_threads()).max(MIN_TASK / (n * inner));
        share_pieces(0..outer, task.next_multiple_of(LANES), |outs| {
            for outs in pieces(outs, LANES) {
                let mut sums = [[0.0; LANES]; MOST];
                dispatch(Few { product: self, x, outs: outs.clone(), sums: &mut sums[..n] });
                for (row, sums) in sums[..n].iter().enumerate() {
                    // SAFETY: every task has outputs of its own.
                    let out = unsafe { self.out.part(row * outer + outs.start, outs.len()) };
                    write_rounded(out, sums, self.bias.map(|bias| &bias[outs.start..]));
                }
            }
        });
        WIDENED.set(scratch);
    }
}

thread_local! {
    /// A thread's widened rows, kept between calls.
    static WIDENED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// The parts of a row as [`Few`] takes them: `[runs, PARTS, 2, RUNS]`, the first of each pair and then the second.
struct Widen<'a, X> {
    x: &'a [X],
    target: &'a mut [f32],
}

impl<X: Stored> Kernel for Widen<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (x, target) in self.x.chunks(RUN).zip(self.target.chunks_exact_mut(X::PARTS * RUN)) {
            for (part, target) in parts::<V, X>(x).iter().zip(target.chunks_exact_mut(RUN)) {
                for (i, pair) in part.as_chunks::<2>().0.iter().enumerate() {
                    (target[i], target[RUNS + i]) = (pair[0].to_f32(), pair[1].to_f32());
                }
            }
        }
    }
}

/// Up to eight outputs of few rows.
struct Few<'a, X> {
    product: &'a Product<'a, X>,
    /// Of each row, [`Widen`].
    x: &'a [f32],
    outs: Range<usize>,
    /// Of each row.
    sums: &'a mut [[f32; LANES]],
}

/// Of an output in a block, by part and step.
type Terms = [[f32; RUNS]; 3];

impl<X: Stored> Kernel for Few<'_, X> {
    type Output = ();

    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { product: &Product { weight, inner, .. }, x, outs, sums } = self;
        // Beyond the last output it is computed again.
        let row = |out: usize| &weight[(outs.start + out).min(outs.end - 1) * inner..][..inner];
        let mut next = weight[outs.end * inner..].chunks(4 * BLOCK);
        let row_of_x = x.len() / sums.len();
        let mut totals = [V::splat(0.0); MOST];
        for block in pieces(0..inner, BLOCK) {
            for row_index in 0..sums.len() {
                let x = &x[row_index * row_of_x + block.start * X::PARTS..(row_index + 1) * row_of_x];
                let mut terms = [[[0.0; RUNS]; 3]; LANES];
                for (four, terms) in terms.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    let mut weights = [&weight[..0]; 4];
                    for (i, weights) in weights.iter_mut().enumerate() {
                        *weights = &row(4 * four + i)[block.clone()];
                    }
                    let next = if row_index == 0 { next.next().unwrap_or_default() } else { &[] };
                    let four = Four { weights, next, terms };
                    match X::PARTS {
                        1 => four.run::<1>(x),
                        2 => four.run::<2>(x),
                        _ => four.run::<3>(x),
                    }
                }
                for half in 0..RUNS / LANES {
                    let mut columns = [[V::splat(0.0); LANES]; 3];
                    for part in 0..X::PARTS {
                        for out in 0..LANES {
                            columns[part][out] = V::load(&terms[out][part].as_chunks().0[half]);
                        }
                        columns[part] = V::transpose(columns[part]);
                    }
                    for step in 0..LANES {
                        for terms in columns[..X::PARTS].iter().rev() {
                            totals[row_index] = totals[row_index].add(terms[step]);
                        }
                    }
                }
            }
        }
        for (sums, total) in sums.iter_mut().zip(totals) {
            total.store(sums);
        }
    }
}

/// Four outputs with a block of `x`.
struct Four<'a> {
    weights: [&'a [bf16]; 4],
    /// What will be wanted next.
    next: &'a [bf16],
    terms: &'a mut [Terms; 4],
}

impl Four<'_> {
    fn run<const PARTS: usize>(self, x: &[f32]) {
        let x = x.as_chunks().0.as_chunks().0;
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just found.
            return unsafe { self.run_avx512::<PARTS>(x) };
        }
        self.run_portable::<PARTS>(x)
    }

    /// Wherever there are registers there is AVX-512: this is for tests.
    fn run_portable<const PARTS: usize>(self, x: &[[[f32; RUNS]; 2]]) {
        prefetch_far(self.next);
        for (weights, terms) in self.weights.into_iter().zip(self.terms) {
            let mut sums = [[[0f32; RUNS]; 2]; PARTS];
            for (weights, x) in weights.chunks(RUN).zip(x.as_chunks::<PARTS>().0) {
                for (sums, x) in sums.iter_mut().zip(x) {
                    for (i, weight) in weights.iter().enumerate() {
                        let sum = &mut sums[i % 2][i / 2];
                        *sum = x[i % 2][i / 2].mul_add(weight.to_f32(), *sum);
                    }
                }
            }
            for (terms, [first, second]) in terms.iter_mut().zip(sums) {
                *terms = std::array::from_fn(|i| first[i] + second[i]);
            }
        }
    }

    /// # Safety
    ///
    /// The machine has AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f")]
    unsafe fn run_avx512<const PARTS: usize>(self, x: &[[[f32; RUNS]; 2]]) {
        use std::arch::x86_64::{_mm512_add_ps, _mm512_setzero_ps, _mm512_storeu_ps};
        let Self { weights, next, terms } = self;
        let (runs, rest) = (weights[0].len() / RUN, weights[0].len() % RUN);
        let mut whole: [&[[bf16; RUN]]; 4] = [&[]; 4];
        for (whole, weights) in whole.iter_mut().zip(weights) {
            *whole = &weights.as_chunks().0[..runs];
        }
        let mut sums = [[[_mm512_setzero_ps(); 2]; PARTS]; 4];
        let (xs, _) = x.as_chunks::<PARTS>();
        let mut next = next.as_chunks::<{ 4 * RUN }>().0.iter();
        for run in 0..runs {
            prefetch_far(next.next().map_or(&[][..], |next| next));
            // SAFETY: the feature is there.
            unsafe { multiply([&whole[0][run], &whole[1][run], &whole[2][run], &whole[3][run]], &xs[run], &mut sums) };
        }
        if rest > 0 {
            let mut padded = [[bf16::ZERO; RUN]; 4];
            for (padded, weights) in padded.iter_mut().zip(weights) {
                padded[..rest].copy_from_slice(&weights[runs * RUN..]);
            }
            // SAFETY: the feature is there.
            unsafe { multiply([&padded[0], &padded[1], &padded[2], &padded[3]], &xs[runs], &mut sums) };
        }
        for out in 0..4 {
            for part in 0..PARTS {
                let [first, second] = sums[out][part];
                // SAFETY: the store covers exactly an array.
                unsafe { _mm512_storeu_ps(terms[out][part].as_mut_ptr(), _mm512_add_ps(first, second)) };
            }
        }
    }
}

/// Adds the products of a run: 24 sums, the three parts' pair of `x` and the weights are as many registers as there are.
///
/// # Safety
///
/// The machine has AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn multiply<const PARTS: usize>(
    weights: [&[bf16; RUN]; 4],
    x: &[[[f32; RUNS]; 2]; PARTS],
    sums: &mut [[[std::arch::x86_64::__m512; 2]; PARTS]; 4],
) {
    use std::arch::x86_64::{
        _mm512_and_si512, _mm512_castsi512_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
        _mm512_slli_epi32,
    };
    let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for out in 0..4 {
        // SAFETY: loads here and below cover exactly an array.
        let weights = unsafe { _mm512_loadu_si512(weights[out].as_ptr().cast()) };
        let first = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(weights));
        let second = _mm512_castsi512_ps(_mm512_and_si512(weights, upper));
        for part in 0..PARTS {
            let [a, b] = &x[part];
            let (a, b) = unsafe { (_mm512_loadu_ps(a.as_ptr()), _mm512_loadu_ps(b.as_ptr())) };
            sums[out][part][0] = _mm512_fmadd_ps(a, first, sums[out][part][0]);
            sums[out][part][1] = _mm512_fmadd_ps(b, second, sums[out][part][1]);
        }
    }
}
