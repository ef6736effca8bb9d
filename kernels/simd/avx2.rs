//! Lanes of AVX2, with FMA and F16C, and pairs of them in one register of AVX-512.

use std::arch::x86_64::*;
use std::marker::PhantomData;
use std::mem::transmute;

use half::{bf16, f16};

use super::{Kernel, LANES, Lanes, PAIR, ROUND, Two, Vector, dot, narrow, spread, sums_of_halves};

/// The bits of a bf16 value within an f32.
const UPPER: i32 = 0xffff_0000_u32 as i32;

/// # Safety
///
/// The machine has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub unsafe fn run<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Eight<Apart>>()
}

/// # Safety
///
/// The machine has AVX2, FMA and F16C, and AVX-512 F.
#[target_feature(enable = "avx2,fma,f16c,avx512f")]
pub unsafe fn run_wide<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Eight<Together<false>>>()
}

/// # Safety
///
/// The machine has AVX2, FMA and F16C, and AVX-512 F, VL and BF16.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512vl,avx512bf16")]
pub unsafe fn run_dots<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<Eight<Together<true>>>()
}

/// Lanes in one register, whose pairs are as `P` says. Only [`run`] and its like name this type, so wherever a method is
/// called the features are there.
pub(super) struct Eight<P>(__m256, PhantomData<P>);

impl<P> Clone for Eight<P> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<P> Copy for Eight<P> {}

/// How sixteen values lie in registers.
pub(super) trait Pairs {
    type Pair: Vector;

    fn pair(first: __m256, second: __m256) -> Self::Pair;
    fn halves(pair: Self::Pair) -> [__m256; 2];
    /// As [`Lanes::bytes`].
    fn bytes(values: [Self::Pair; 4]) -> [i8; 4 * PAIR];
    /// As [`Lanes::sums_of_halves`].
    fn sums(four: [Self::Pair; 4]) -> __m256;
    /// As [`Lanes::spread`].
    fn spread(lanes: __m256) -> [Self::Pair; 4];
    /// As [`Lanes::narrow`].
    fn narrow(pair: Self::Pair) -> __m256;
    /// As [`Vector::dot`].
    fn dot(a: __m256, b: __m256, sum: __m256) -> __m256;
}

// SAFETY of every block below: the features are there, and loads and stores cover exactly the borrowed array.

/// In two registers.
pub(super) struct Apart;

impl Pairs for Apart {
    type Pair = Two<Eight<Self>>;

    #[inline(always)]
    fn pair(first: __m256, second: __m256) -> Self::Pair {
        Two(Eight::new(first), Eight::new(second))
    }
    #[inline(always)]
    fn halves(Two(first, second): Self::Pair) -> [__m256; 2] {
        [first.0, second.0]
    }
    #[inline(always)]
    fn bytes(values: [Self::Pair; 4]) -> [i8; 4 * PAIR] {
        let mut bytes = [0; 4 * PAIR];
        for (values, bytes) in values.as_chunks::<2>().0.iter().zip(bytes.as_chunks_mut::<32>().0) {
            let [Two(a, b), Two(c, d)] = values;
            unsafe {
                let mut lowest = [_mm256_setzero_si256(); 4];
                for (lowest, values) in lowest.iter_mut().zip([a, b, c, d]) {
                    let bits = _mm256_castps_si256(_mm256_add_ps(values.0, _mm256_set1_ps(ROUND)));
                    *lowest = _mm256_and_si256(bits, _mm256_set1_epi32(0xff));
                }
                let [a, b, c, d] = lowest;
                // Either half of a register gets four bytes of each value.
                let mixed = _mm256_packus_epi16(_mm256_packus_epi32(a, b), _mm256_packus_epi32(c, d));
                let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
                _mm256_storeu_si256(bytes.as_mut_ptr().cast(), _mm256_permutevar8x32_epi32(mixed, order))
            }
        }
        bytes
    }
    #[inline(always)]
    fn sums(four: [Self::Pair; 4]) -> __m256 {
        sums_of_halves::<Eight<Self>>(four).0
    }
    #[inline(always)]
    fn spread(lanes: __m256) -> [Self::Pair; 4] {
        spread(Eight::<Self>::new(lanes))
    }
    #[inline(always)]
    fn narrow(pair: Self::Pair) -> __m256 {
        narrow::<Eight<Self>>(pair).0
    }
    #[inline(always)]
    fn dot(a: __m256, b: __m256, sum: __m256) -> __m256 {
        dot(Eight::<Self>::new(a), Eight::new(b), Eight::new(sum)).0
    }
}

/// In one register of AVX-512, with AVX-512 BF16 if `BF16`.
pub(super) struct Together<const BF16: bool>;

impl<const BF16: bool> Pairs for Together<BF16> {
    type Pair = Sixteen<BF16>;

    #[inline(always)]
    fn pair(first: __m256, second: __m256) -> Self::Pair {
        let (first, second) = unsafe { (_mm256_castps_pd(first), _mm256_castps_pd(second)) };
        Sixteen(unsafe { _mm512_castpd_ps(_mm512_insertf64x4::<1>(_mm512_castpd256_pd512(first), second)) })
    }
    #[inline(always)]
    fn halves(Sixteen(pair): Self::Pair) -> [__m256; 2] {
        unsafe {
            let second = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(pair));
            [_mm512_castps512_ps256(pair), _mm256_castpd_ps(second)]
        }
    }
    #[inline(always)]
    fn bytes(values: [Self::Pair; 4]) -> [i8; 4 * PAIR] {
        let mut bytes = [0; 4 * PAIR];
        for (Sixteen(values), bytes) in values.iter().zip(bytes.as_chunks_mut::<PAIR>().0) {
            unsafe {
                let bits = _mm512_castps_si512(_mm512_add_ps(*values, _mm512_set1_ps(ROUND)));
                _mm_storeu_si128(bytes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(bits))
            }
        }
        bytes
    }
    #[inline(always)]
    fn sums([a, b, c, d]: [Self::Pair; 4]) -> __m256 {
        unsafe {
            // Of neighbours, in each quarter of the register.
            let add = |a, b| _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b));
            let quarters = add(add(a.0, b.0), add(c.0, d.0));
            let [first, second] = Self::halves(Sixteen(quarters));
            let even = _mm256_permute2f128_ps::<0x20>(first, second);
            _mm256_add_ps(even, _mm256_permute2f128_ps::<0x31>(first, second))
        }
    }
    #[inline(always)]
    fn spread(lanes: __m256) -> [Self::Pair; 4] {
        unsafe {
            let both = _mm512_castps256_ps512(lanes);
            let both = _mm512_shuffle_f32x4::<0x50>(both, both);
            [
                Sixteen(_mm512_permute_ps::<0x00>(both)),
                Sixteen(_mm512_permute_ps::<0x55>(both)),
                Sixteen(_mm512_permute_ps::<0xaa>(both)),
                Sixteen(_mm512_permute_ps::<0xff>(both)),
            ]
        }
    }
    #[inline(always)]
    fn narrow(pair: Self::Pair) -> __m256 {
        if !BF16 {
            return narrow::<Eight<Self>>(pair).0;
        }
        unsafe { transmute::<__m256bh, __m256>(_mm512_cvtneps_pbh(pair.0)) }
    }
    #[inline(always)]
    fn dot(a: __m256, b: __m256, sum: __m256) -> __m256 {
        if !BF16 {
            return dot(Eight::<Self>::new(a), Eight::new(b), Eight::new(sum)).0;
        }
        unsafe { _mm256_dpbf16_ps(sum, transmute::<__m256, __m256bh>(a), transmute::<__m256, __m256bh>(b)) }
    }
}

/// Sixteen values in one register.
#[derive(Clone, Copy)]
pub(super) struct Sixteen<const BF16: bool>(__m512);

impl<const BF16: bool> Vector for Sixteen<BF16> {
    const WIDTH: usize = PAIR;

    #[inline(always)]
    fn read(source: &[f32]) -> Self {
        Self(unsafe { _mm512_loadu_ps(source[..PAIR].as_ptr()) })
    }
    #[inline(always)]
    fn write(self, target: &mut [f32]) {
        unsafe { _mm512_storeu_ps(target[..PAIR].as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(value) })
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, sum.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    /// In one instruction, which rounds a subnormal result once, as the two products of [`Eight`] do.
    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        Self(unsafe { _mm512_scalef_ps(self.0, exponent.0) })
    }
    #[inline(always)]
    fn upper(self) -> Self {
        let upper = unsafe { _mm512_and_si512(_mm512_castps_si512(self.0), _mm512_set1_epi32(UPPER)) };
        Self(unsafe { _mm512_castsi512_ps(upper) })
    }
    #[inline(always)]
    fn lower(self) -> Self {
        Self(unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_castps_si512(self.0))) })
    }
    #[inline(always)]
    fn round_to_bf16(self) -> Self {
        if !BF16 {
            let [first, second] = Together::<BF16>::halves(self);
            let first = Eight::<Together<BF16>>::new(first).round_to_bf16();
            let second = Eight::<Together<BF16>>::new(second).round_to_bf16();
            return Together::<BF16>::pair(first.0, second.0);
        }
        unsafe {
            let rounded = transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(self.0));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(rounded))))
        }
    }
    #[inline(always)]
    fn dot(self, other: Self, sum: Self) -> Self {
        if !BF16 {
            return dot(self, other, sum);
        }
        let (a, b) = unsafe { (transmute::<__m512, __m512bh>(self.0), transmute::<__m512, __m512bh>(other.0)) };
        Self(unsafe { _mm512_dpbf16_ps(sum.0, a, b) })
    }
}

impl<P> Eight<P> {
    #[inline(always)]
    fn new(register: __m256) -> Self {
        Self(register, PhantomData)
    }

    /// Transposes the lower and the upper four columns of four rows, side by side.
    #[inline(always)]
    fn transpose_quarters([a, b, c, d]: [Self; 4]) -> [__m256; 4] {
        // SAFETY: the features are there.
        unsafe {
            let (ab, ab_high) = (_mm256_unpacklo_ps(a.0, b.0), _mm256_unpackhi_ps(a.0, b.0));
            let (cd, cd_high) = (_mm256_unpacklo_ps(c.0, d.0), _mm256_unpackhi_ps(c.0, d.0));
            [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
            ]
        }
    }
}

impl<P: Pairs> Vector for Eight<P> {
    const WIDTH: usize = LANES;

    #[inline(always)]
    fn read(source: &[f32]) -> Self {
        Self::new(unsafe { _mm256_loadu_ps(source[..LANES].as_ptr()) })
    }
    #[inline(always)]
    fn write(self, target: &mut [f32]) {
        unsafe { _mm256_storeu_ps(target[..LANES].as_mut_ptr(), self.0) }
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self::new(unsafe { _mm256_set1_ps(value) })
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        Self::new(unsafe { _mm256_fmadd_ps(self.0, factor.0, sum.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self::new(unsafe { _mm256_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        unsafe {
            let exponent = _mm256_cvtps_epi32(exponent.0);
            let half = _mm256_srai_epi32::<1>(exponent);
            let rest = _mm256_sub_epi32(exponent, half);
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias)));
            let high = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias)));
            Self::new(_mm256_mul_ps(_mm256_mul_ps(self.0, low), high))
        }
    }
    #[inline(always)]
    fn upper(self) -> Self {
        let upper = unsafe { _mm256_and_si256(_mm256_castps_si256(self.0), _mm256_set1_epi32(UPPER)) };
        Self::new(unsafe { _mm256_castsi256_ps(upper) })
    }
    #[inline(always)]
    fn lower(self) -> Self {
        Self::new(unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_castps_si256(self.0))) })
    }
    #[inline(always)]
    fn round_to_bf16(self) -> Self {
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let odd = _mm256_and_si256(_mm256_srli_epi32::<16>(bits), _mm256_set1_epi32(1));
            let rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
            // Rounding could carry a NaN into infinity: NaN is cut instead, and made quiet.
            let quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x0040_0000));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(self.0, self.0));
            Self::new(_mm256_castsi256_ps(_mm256_blendv_epi8(rounded, quiet, is_nan))).upper()
        }
    }
    #[inline(always)]
    fn dot(self, other: Self, sum: Self) -> Self {
        Self::new(P::dot(self.0, other.0, sum.0))
    }
}

impl<P: Pairs> Lanes for Eight<P> {
    type Pair = P::Pair;

    #[inline(always)]
    fn pair(self, next: Self) -> P::Pair {
        P::pair(self.0, next.0)
    }
    #[inline(always)]
    fn halves(pair: P::Pair) -> [Self; 2] {
        let [first, second] = P::halves(pair);
        [Self::new(first), Self::new(second)]
    }
    #[inline(always)]
    fn bytes(values: [P::Pair; 4]) -> [i8; 4 * PAIR] {
        P::bytes(values)
    }
    #[inline(always)]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self::new(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.as_ptr().cast())) })
    }
    #[inline(always)]
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        // A bf16 is the upper half of an f32.
        Self::new(unsafe {
            let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
        })
    }
    #[inline(always)]
    fn store_f16(self, target: &mut [f16; LANES]) {
        unsafe {
            let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            _mm_storeu_si128(target.as_mut_ptr().cast(), rounded)
        }
    }
    #[inline(always)]
    fn store_upper(self, target: &mut [bf16; LANES]) {
        unsafe {
            let upper = _mm256_srli_epi32::<16>(_mm256_castps_si256(self.0));
            let packed = _mm_packus_epi32(_mm256_castsi256_si128(upper), _mm256_extracti128_si256::<1>(upper));
            _mm_storeu_si128(target.as_mut_ptr().cast(), packed)
        }
    }
    #[inline(always)]
    fn join(upper: Self, lower: Self) -> Self {
        unsafe {
            let lower = _mm256_srli_epi32::<16>(_mm256_castps_si256(lower.0));
            Self::new(_mm256_or_ps(upper.upper().0, _mm256_castsi256_ps(lower)))
        }
    }
    #[inline(always)]
    fn narrow(pair: P::Pair) -> Self {
        Self::new(P::narrow(pair))
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        let [a, b, c, d, e, f, g, h] = rows;
        let upper = Self::transpose_quarters([a, b, c, d]);
        let lower = Self::transpose_quarters([e, f, g, h]);
        let mut columns = rows;
        for j in 0..4 {
            unsafe {
                columns[j] = Self::new(_mm256_permute2f128_ps::<0x20>(upper[j], lower[j]));
                columns[j + 4] = Self::new(_mm256_permute2f128_ps::<0x31>(upper[j], lower[j]));
            }
        }
        columns
    }
    #[inline(always)]
    fn sums([a, b, c, d]: [Self; 4]) -> [f32; 4] {
        unsafe {
            let quarters = _mm256_hadd_ps(_mm256_hadd_ps(a.0, b.0), _mm256_hadd_ps(c.0, d.0));
            let sums = _mm_add_ps(_mm256_castps256_ps128(quarters), _mm256_extractf128_ps::<1>(quarters));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }
    #[inline(always)]
    fn sums_of_halves(four: [P::Pair; 4]) -> Self {
        Self::new(P::sums(four))
    }
    #[inline(always)]
    fn spread(self) -> [P::Pair; 4] {
        P::spread(self.0)
    }
}
