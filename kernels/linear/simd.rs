//! The eight-lane arithmetic of the product, once per instruction set.
//!
//! One output is one register of eight f32 lanes: lane `l` sums the products at `i = l, l + 8, l + 16, ..` in that
//! order, an inner dimension that is no multiple of eight is padded with zeros, and [`Tile::sums`] adds the lanes in
//! one fixed tree. Whatever register tile an output is computed in, it sees the same operations, so its bits do not
//! depend on its neighbours. They do depend on the instruction set: AVX2 fuses multiply and add, the portable form
//! only where the target always has the fused instruction.

use half::{bf16, f16};

use crate::cpu::Element;

/// f32 values in one accumulator.
pub const LANES: usize = 8;

/// The most outputs and the most accumulators of any [`Tile`].
pub const MAX_OUTS: usize = 8;
pub const MAX_TILE: usize = 12;

/// The instruction sets that this machine may run.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Isa {
    Portable,
    /// AVX2, FMA and F16C.
    #[cfg(target_arch = "x86_64")]
    Avx2,
}

impl Isa {
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            return Self::Avx2;
        }
        Self::Portable
    }

    /// The register tile for `rows` rows of `x`. The shapes keep the accumulators, the fewer of rows and outputs, and
    /// one of the others within the sixteen registers of AVX2.
    pub fn tile<W: Stored>(self, rows: usize) -> Tile<W> {
        match rows {
            1 => self.tile_of::<W, 1, 8>(),
            2 => self.tile_of::<W, 2, 6>(),
            3 => self.tile_of::<W, 3, 3>(),
            4 => self.tile_of::<W, 4, 3>(),
            _ => unreachable!("tiles have one to four rows"),
        }
    }

    fn tile_of<W: Stored, const R: usize, const Q: usize>(self) -> Tile<W> {
        const { assert!(Q <= MAX_OUTS && R * Q <= MAX_TILE) };
        match self {
            Self::Portable => {
                Tile { rows: R, outs: Q, run: run::<[f32; LANES], W, R, Q>, sums: sums::<[f32; LANES], R, Q> }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => Tile { rows: R, outs: Q, run: avx2::run::<W, R, Q>, sums: avx2::sums::<R, Q> },
        }
    }

    /// Widens `src` to f32 and writes its `k`-th group of eight at `dst[k * stride]`, the last one padded with zeros.
    pub fn widen<T: Stored>(self, src: &[T], dst: &mut [f32], stride: usize) {
        let (whole, rest) = src.as_chunks::<LANES>();
        let groups = src.len().div_ceil(LANES);
        assert!(groups == 0 || dst.len() >= (groups - 1) * stride + LANES, "destination shorter than the source");
        // SAFETY: the assertion bounds every write; `Avx2` exists only where it was detected.
        unsafe {
            match self {
                Self::Portable => widen::<[f32; LANES], T>(whole, dst.as_mut_ptr(), stride),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => avx2::widen(whole, dst.as_mut_ptr(), stride),
            }
        }
        if !rest.is_empty() {
            let last = &mut dst[whole.len() * stride..][..LANES];
            last.fill(0.0);
            last.iter_mut().zip(rest).for_each(|(d, s)| *d = s.widen());
        }
    }
}

/// A register tile: `rows * outs` accumulators that advance together along the inner dimension.
pub struct Tile<W> {
    pub rows: usize,
    pub outs: usize,
    run: unsafe fn(&Run<W>, *mut f32),
    sums: unsafe fn(*const f32, *mut f32, usize),
}

/// A stretch of the inner dimension for one or more tiles of rows and the weights of `outs` outputs.
pub struct Run<'a, W> {
    /// `[tiles, x_stride]`, of each tile the first `groups * rows * 8`: `[groups, rows, 8]`.
    pub x: &'a [f32],
    pub x_stride: usize,
    pub tiles: usize,
    pub groups: usize,
    /// For each output groups of eight elements, `w_stride` apart.
    pub weights: [&'a [W]; MAX_OUTS],
    pub w_stride: usize,
    /// Whether the stretch is the first one.
    pub first: bool,
}

impl<W: Stored> Tile<W> {
    /// Floats in the accumulators of this tile.
    pub fn len(&self) -> usize {
        self.rows * self.outs * LANES
    }

    /// Adds, or on the first stretch stores, `sum over k of x[t, k, r] * weights[q][k]`, each factor a group of eight
    /// lanes, at `accumulators[t, r, q]`.
    pub fn accumulate(&self, run: &Run<W>, accumulators: &mut [f32]) {
        if run.tiles == 0 || run.groups == 0 {
            return;
        }
        let x_len = (run.tiles - 1) * run.x_stride + run.groups * self.rows * LANES;
        let w_len = (run.groups - 1) * run.w_stride + LANES;
        assert!(
            run.x.len() >= x_len && run.weights[..self.outs].iter().all(|w| w.len() >= w_len),
            "operands too short"
        );
        assert!(accumulators.len() >= run.tiles * self.len(), "fewer accumulators than the tiles have");
        // SAFETY: the assertions bound every access; an AVX2 `run` exists only where AVX2 was detected.
        unsafe { (self.run)(run, accumulators.as_mut_ptr()) }
    }

    /// Writes the sum of the lanes of `accumulators[r, q]` at `sums[r * stride + q]`.
    pub fn sums(&self, accumulators: &[f32], sums: &mut [f32], stride: usize) {
        assert!(
            accumulators.len() >= self.len() && sums.len() >= (self.rows - 1) * stride + self.outs,
            "tile too short"
        );
        // SAFETY: the assertion bounds every access; an AVX2 `sums` exists only where AVX2 was detected.
        unsafe { (self.sums)(accumulators.as_ptr(), sums.as_mut_ptr(), stride) }
    }
}

/// An element type that vectors can be loaded from.
pub trait Stored: Element {
    /// # Safety
    ///
    /// Eight elements are readable.
    unsafe fn load(source: *const Self) -> [f32; LANES] {
        // SAFETY: promised by the caller; the array has the alignment of its element.
        unsafe { *source.cast::<[Self; LANES]>() }.map(Self::widen)
    }

    /// # Safety
    ///
    /// Eight elements are readable, and AVX2 and F16C were detected.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load_avx2(source: *const Self) -> std::arch::x86_64::__m256;
}

impl Stored for f32 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_avx2(source: *const Self) -> std::arch::x86_64::__m256 {
        // SAFETY: promised by the caller.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(source) }
    }
}

impl Stored for f16 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_avx2(source: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: promised by the caller.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.cast())) }
    }
}

impl Stored for bf16 {
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn load_avx2(source: *const Self) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::*;
        // SAFETY: promised by the caller. A bf16 is the upper half of an f32.
        unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        }
    }
}

/// Eight f32 lanes.
///
/// # Safety
///
/// Of every method: eight elements are accessible behind the pointer, and the instruction set was detected.
trait Vector: Copy {
    unsafe fn load<T: Stored>(source: *const T) -> Self;
    unsafe fn store(self, target: *mut f32);
    unsafe fn mul_add(self, factor: Self, sum: Self) -> Self;
    /// `((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7))` of each of four.
    unsafe fn sums(four: [Self; 4]) -> [f32; 4];
    /// Asks for the cache line at any address.
    #[inline(always)]
    unsafe fn prefetch<T>(_: *const T) {}
    #[inline(always)]
    unsafe fn prefetch2<T>(a: *const T) {
        unsafe {
            #[cfg(feature = "t1")]
            std::arch::x86_64::_mm_prefetch::<2>(a.cast());
            #[cfg(not(feature = "t1"))]
            std::arch::x86_64::_mm_prefetch::<3>(a.cast());
        }
    }
}

impl Vector for [f32; LANES] {
    #[inline(always)]
    unsafe fn load<T: Stored>(source: *const T) -> Self {
        // SAFETY: promised by the caller.
        unsafe { T::load(source) }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: promised by the caller; the array has the alignment of its element.
        unsafe { *target.cast() = self }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, mut sum: Self) -> Self {
        for l in 0..LANES {
            sum[l] = if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                self[l].mul_add(factor[l], sum[l])
            } else {
                sum[l] + self[l] * factor[l]
            };
        }
        sum
    }

    #[inline(always)]
    unsafe fn sums(four: [Self; 4]) -> [f32; 4] {
        four.map(|l| ((l[0] + l[1]) + (l[2] + l[3])) + ((l[4] + l[5]) + (l[6] + l[7])))
    }
}

/// # Safety
///
/// As [`Tile::accumulate`] asserts for `rows` = `R` and `outs` = `Q`, and the instruction set of `V` was detected.
#[inline(always)]
unsafe fn run<V: Vector, W: Stored, const R: usize, const Q: usize>(run: &Run<W>, accumulators: *mut f32) {
    // SAFETY: promised by the caller.
    unsafe {
        let weights = run.weights.map(|w| w.as_ptr());
        for t in 0..run.tiles {
            let x = run.x.as_ptr().add(t * run.x_stride);
            let accumulators = accumulators.add(t * R * Q * LANES);
            let mut acc = [[V::load([0f32; LANES].as_ptr()); Q]; R];
            if !run.first {
                for r in 0..R {
                    for q in 0..Q {
                        acc[r][q] = V::load(accumulators.add((r * Q + q) * LANES));
                    }
                }
            }
            // Where tiles of weights lie end to end: the next one, shared out among the tiles of rows.
            let next = weights[0].wrapping_add(run.groups * (run.w_stride + t * LANES));
            for k in 0..run.groups {
                if cfg!(feature = "pf") && run.w_stride == LANES {
                    for line in 0..(Q * LANES * size_of::<W>()).div_ceil(64) {
                        V::prefetch2(
                            weights[0]
                                .wrapping_add(Q * run.groups * LANES + k * Q * LANES + line * (64 / size_of::<W>())),
                        );
                    }
                } else {
                    V::prefetch(next.wrapping_add(k * LANES));
                }
                let x = x.add(k * R * LANES);
                let offset = k * run.w_stride;
                // Whichever is fewer stays in registers while the other is loaded one by one.
                if R <= Q {
                    let mut column = [V::load(x); R];
                    for r in 1..R {
                        column[r] = V::load(x.add(r * LANES));
                    }
                    for q in 0..Q {
                        let weight = V::load(weights[q].add(offset));
                        for r in 0..R {
                            acc[r][q] = column[r].mul_add(weight, acc[r][q]);
                        }
                    }
                } else {
                    let mut column = [V::load(weights[0].add(offset)); Q];
                    for q in 1..Q {
                        column[q] = V::load(weights[q].add(offset));
                    }
                    for r in 0..R {
                        let x = V::load(x.add(r * LANES));
                        for q in 0..Q {
                            acc[r][q] = x.mul_add(column[q], acc[r][q]);
                        }
                    }
                }
            }
            for r in 0..R {
                for q in 0..Q {
                    acc[r][q].store(accumulators.add((r * Q + q) * LANES));
                }
            }
        }
    }
}

/// # Safety
///
/// As [`Tile::sums`] asserts for `rows` = `R` and `outs` = `Q`, and the instruction set of `V` was detected.
#[inline(always)]
unsafe fn sums<V: Vector, const R: usize, const Q: usize>(accumulators: *const f32, sums: *mut f32, stride: usize) {
    for first in (0..R * Q).step_by(4) {
        // SAFETY: promised by the caller.
        unsafe {
            // A tile that is no multiple of four sums its last output again.
            let four = V::sums([0, 1, 2, 3].map(|i| V::load(accumulators.add((first + i).min(R * Q - 1) * LANES))));
            for (i, sum) in four.into_iter().enumerate().take(R * Q - first) {
                *sums.add((first + i) / Q * stride + (first + i) % Q) = sum;
            }
        }
    }
}

/// # Safety
///
/// `dst` reaches `(src.len() - 1) * stride + 8` elements, and the instruction set of `V` was detected.
#[inline(always)]
unsafe fn widen<V: Vector, T: Stored>(src: &[[T; LANES]], dst: *mut f32, stride: usize) {
    for (k, group) in src.iter().enumerate() {
        // SAFETY: promised by the caller.
        unsafe { V::load(group.as_ptr()).store(dst.add(k * stride)) }
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{LANES, Run, Stored, Vector};

    impl Vector for __m256 {
        #[inline(always)]
        unsafe fn load<T: Stored>(source: *const T) -> Self {
            // SAFETY: promised by the caller.
            unsafe { T::load_avx2(source) }
        }

        #[inline(always)]
        unsafe fn store(self, target: *mut f32) {
            // SAFETY: promised by the caller.
            unsafe { _mm256_storeu_ps(target, self) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, sum: Self) -> Self {
            // SAFETY: promised by the caller.
            unsafe { _mm256_fmadd_ps(self, factor, sum) }
        }

        #[inline(always)]
        unsafe fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
            // SAFETY: promised by the caller; the store stays within `sums`.
            unsafe {
                let halves = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
                let total = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves));
                let mut sums = [0.0; 4];
                _mm_storeu_ps(sums.as_mut_ptr(), total);
                sums
            }
        }

        #[inline(always)]
        unsafe fn prefetch<T>(address: *const T) {
            // SAFETY: a prefetch of any address is allowed.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) }
        }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn run<W: Stored, const R: usize, const Q: usize>(run: &Run<W>, accumulators: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { super::run::<__m256, W, R, Q>(run, accumulators) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn sums<const R: usize, const Q: usize>(accumulators: *const f32, sums: *mut f32, stride: usize) {
        // SAFETY: promised by the caller.
        unsafe { super::sums::<__m256, R, Q>(accumulators, sums, stride) }
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub unsafe fn widen<T: Stored>(src: &[[T; LANES]], dst: *mut f32, stride: usize) {
        // SAFETY: promised by the caller.
        unsafe { super::widen::<__m256, T>(src, dst, stride) }
    }
}
