//! Lanes of the baseline instruction set.

use half::{bf16, f16};

use super::{LANES, Lanes, PAIR, ROUND, Two, Vector};
use crate::cpu::Element;

/// The bits of a bf16 value within an f32.
const UPPER: u32 = 0xffff_0000;

/// Eight values in a form that compilers turn into vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Vector for Portable {
    const WIDTH: usize = LANES;

    #[inline(always)]
    fn read(source: &[f32]) -> Self {
        Self(std::array::from_fn(|i| source[i]))
    }
    #[inline(always)]
    fn write(self, target: &mut [f32]) {
        target[..LANES].copy_from_slice(&self.0);
    }
    #[inline(always)]
    fn splat(value: f32) -> Self {
        Self([value; LANES])
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    #[inline(always)]
    fn mul_add(self, factor: Self, sum: Self) -> Self {
        // Without the instruction `f32::mul_add` is a call.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            Self(std::array::from_fn(|i| self.0[i].mul_add(factor.0[i], sum.0[i])))
        } else {
            self.mul(factor).add(sum)
        }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn scale(self, exponent: Self) -> Self {
        let power = |e: i32| f32::from_bits(((e + 127) << 23) as u32);
        self.zip(exponent, |x, e| {
            let e = e as i32;
            x * power(e >> 1) * power(e - (e >> 1))
        })
    }
    #[inline(always)]
    fn upper(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits() & UPPER)))
    }
    #[inline(always)]
    fn lower(self) -> Self {
        Self(self.0.map(|x| f32::from_bits(x.to_bits() << 16)))
    }
    #[inline(always)]
    fn round_to_bf16(self) -> Self {
        Self(self.0.map(|x| bf16::round(x).widen()))
    }
}

impl Lanes for Portable {
    type Pair = Two<Self>;

    #[inline(always)]
    fn pair(self, next: Self) -> Two<Self> {
        Two(self, next)
    }
    #[inline(always)]
    fn halves(Two(a, b): Two<Self>) -> [Self; 2] {
        [a, b]
    }
    #[inline(always)]
    fn load_f16(source: &[f16; LANES]) -> Self {
        Self(source.map(f16::widen))
    }
    #[inline(always)]
    fn load_bf16(source: &[bf16; LANES]) -> Self {
        Self(source.map(bf16::widen))
    }
    #[inline(always)]
    fn store_f16(self, target: &mut [f16; LANES]) {
        *target = self.0.map(f16::round)
    }
    #[inline(always)]
    fn store_upper(self, target: &mut [bf16; LANES]) {
        *target = self.0.map(|x| bf16::from_bits((x.to_bits() >> 16) as u16))
    }
    #[inline(always)]
    fn bytes(values: [Two<Self>; 4]) -> [i8; 4 * PAIR] {
        let mut bytes = [0; 4 * PAIR];
        for (value, byte) in values.iter().flat_map(|Two(a, b)| [a.0, b.0]).flatten().zip(&mut bytes) {
            *byte = (value + ROUND).to_bits() as i8;
        }
        bytes
    }
    #[inline(always)]
    fn join(upper: Self, lower: Self) -> Self {
        upper.zip(lower, |a, b| f32::from_bits(a.to_bits() & UPPER | b.to_bits() >> 16))
    }
    #[inline(always)]
    fn transpose(rows: [Self; LANES]) -> [Self; LANES] {
        std::array::from_fn(|j| Self(std::array::from_fn(|i| rows[i].0[j])))
    }
    #[inline(always)]
    fn sums(four: [Self; 4]) -> [f32; 4] {
        four.map(|Self(x)| ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])))
    }
}
