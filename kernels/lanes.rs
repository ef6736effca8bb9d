//! f32 vectors for CPU kernels, chosen at run time: a kernel is written once over [`Lanes`] and [`run`] picks the
//! widest vectors that the machine has. The order of every sum is fixed by the number of lanes, so a result depends
//! on the machine, but on nothing else.

/// A kernel, generic over its vectors.
pub(crate) trait Kernel {
    /// To be marked `#[inline(always)]`, as is what it calls: only so is it compiled for the instructions of `V`.
    ///
    /// # Safety
    ///
    /// The machine has the instructions of `V`.
    unsafe fn run<V: Lanes>(self);
}

/// Runs `kernel` with the widest vectors of this machine.
pub(crate) fn run(kernel: impl Kernel) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn avx2(kernel: impl Kernel) {
            // SAFETY: the caller has checked for both.
            unsafe { kernel.run::<std::arch::x86_64::__m256>() }
        }
        // SAFETY: both features were just detected.
        return unsafe { avx2(kernel) };
    }
    // SAFETY: arrays need no instructions beyond the target's own.
    unsafe { kernel.run::<[f32; 8]>() }
}

/// A vector of `N` f32.
///
/// # Safety
///
/// Of all methods: the machine has the instructions of the type, and pointers reach `N` values.
pub(crate) trait Lanes: Copy {
    const N: usize;

    /// Whether [`fma`] rounds once.
    const FUSED: bool;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(source: *const f32) -> Self;
    unsafe fn store(self, target: *mut f32);
    unsafe fn mul(self, factor: Self) -> Self;
    /// `self * factor + term`.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    unsafe fn sum(self) -> f32;
}

/// `a * b + c` in the scalar parts of a kernel over `V`, and in loops left to the compiler's vectoriser.
#[inline(always)]
pub(crate) fn fma<V: Lanes>(a: f32, b: f32, c: f32) -> f32 {
    // Without the instruction `mul_add` is a call.
    if V::FUSED { a.mul_add(b, c) } else { a * b + c }
}

/// `e^x` to within 2 ulp; below -87 and above 88 that of the bound. NaN stays.
#[inline(always)]
pub(crate) fn exp<V: Lanes>(x: f32) -> f32 {
    // ln 2 in two parts, the first with so few bits that its products with whole numbers are exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Added to a number below 2^22, leaves it as an integer in the low bits.
    const ROUND: f32 = 12_582_912.0;

    let x = x.clamp(-87.0, 88.0);
    let shifted = fma::<V>(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = fma::<V>(n, -LN_2_LOW, fma::<V>(n, -LN_2_HIGH, x));
    // Taylor's next term is below 2^-27 for |r| <= ln 2 / 2.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = fma::<V>(sum, r, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    sum * power
}

impl Lanes for f32 {
    const N: usize = 1;
    const FUSED: bool = cfg!(any(target_arch = "aarch64", target_feature = "fma"));

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: promised by the caller.
        unsafe { *source }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: promised by the caller.
        unsafe { *target = self }
    }

    #[inline(always)]
    unsafe fn mul(self, factor: Self) -> Self {
        self * factor
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        fma::<Self>(self, factor, term)
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        self
    }
}

impl Lanes for [f32; 8] {
    const N: usize = 8;
    const FUSED: bool = f32::FUSED;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(source: *const f32) -> Self {
        // SAFETY: promised by the caller; an array is aligned like its elements.
        unsafe { *source.cast() }
    }

    #[inline(always)]
    unsafe fn store(self, target: *mut f32) {
        // SAFETY: as in `load`.
        unsafe { *target.cast() = self }
    }

    #[inline(always)]
    unsafe fn mul(self, factor: Self) -> Self {
        std::array::from_fn(|l| self[l] * factor[l])
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        std::array::from_fn(|l| fma::<Self>(self[l], factor[l], term[l]))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let half: [f32; 4] = std::array::from_fn(|l| self[l] + self[l + 4]);
        (half[0] + half[2]) + (half[1] + half[3])
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::Lanes;

    // SAFETY of all blocks: promised by the caller.
    impl Lanes for __m256 {
        const N: usize = 8;
        const FUSED: bool = true;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { _mm256_set1_ps(value) }
        }

        #[inline(always)]
        unsafe fn load(source: *const f32) -> Self {
            unsafe { _mm256_loadu_ps(source) }
        }

        #[inline(always)]
        unsafe fn store(self, target: *mut f32) {
            unsafe { _mm256_storeu_ps(target, self) }
        }

        #[inline(always)]
        unsafe fn mul(self, factor: Self) -> Self {
            unsafe { _mm256_mul_ps(self, factor) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
            unsafe { _mm256_fmadd_ps(self, factor, term) }
        }

        #[inline(always)]
        unsafe fn sum(self) -> f32 {
            unsafe {
                let half = _mm_add_ps(_mm256_castps256_ps128(self), _mm256_extractf128_ps::<1>(self));
                let quarter = _mm_add_ps(half, _mm_movehl_ps(half, half));
                _mm_cvtss_f32(_mm_add_ss(quarter, _mm_movehdup_ps(quarter)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors must agree with one another only to rounding, but with `f64` within the stated error.
    #[test]
    fn exp_is_within_two_ulp() {
        fn check<V: Lanes>() {
            for bits in (0..=u32::MAX).step_by(1013) {
                let x = f32::from_bits(bits);
                let (got, want) = (exp::<V>(x), f64::from(x.clamp(-87.0, 88.0)).exp());
                let ulp = f64::from((want as f32).next_up()) - f64::from(want as f32);
                let close = x.is_nan() && got.is_nan() || (f64::from(got) - want).abs() <= 2.0 * ulp;
                assert!(close, "exp({x:e}) is {got:e}, expected {want:e}");
            }
        }
        check::<f32>();
        #[cfg(target_arch = "x86_64")]
        check::<std::arch::x86_64::__m256>();
    }

    /// Sums, products and their order in every vector of this machine, against one lane at a time.
    #[test]
    fn vectors_agree() {
        struct Dot<'a>(&'a [f32], &'a [f32], &'a mut f32);
        impl Kernel for Dot<'_> {
            #[inline(always)]
            unsafe fn run<V: Lanes>(self) {
                // SAFETY: eight values behind each pointer, and no type here has more lanes.
                unsafe {
                    let mut sum = V::splat(0.0);
                    for j in (0..8).step_by(V::N) {
                        let product = V::load(self.0.as_ptr().add(j)).mul(V::splat(2.0));
                        sum = product.mul_add(V::load(self.1.as_ptr().add(j)), sum);
                    }
                    let mut stored = [0.0; 8];
                    sum.store(stored.as_mut_ptr());
                    *self.2 = if stored[..V::N].iter().sum::<f32>() == sum.sum() { sum.sum() } else { f32::NAN };
                }
            }
        }
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [8.0, 1.0, -2.0, 4.0, 0.5, 3.0, -1.0, 2.0]);
        let (mut widest, mut array, mut single) = (0.0, 0.0, 0.0);
        run(Dot(&a, &b, &mut widest));
        // SAFETY: neither needs special instructions.
        unsafe {
            Dot(&a, &b, &mut array).run::<[f32; 8]>();
            Dot(&a, &b, &mut single).run::<f32>();
        }
        assert_eq!([widest, array, single], [99.0; 3]);
    }
}
