use std::cell::Cell;

use super::*;
use crate::testing::Random;

thread_local! {
    pub(crate) static INSTRUCTIONS: Cell<Option<Instructions>> = const { Cell::new(None) };
    pub(crate) static DOTS_ARE_FAST: Cell<Option<bool>> = const { Cell::new(None) };
}

/// Runs `f` on these instructions, in what it runs on this thread.
pub(crate) fn on<R>(instructions: Instructions, f: impl FnOnce() -> R) -> R {
    INSTRUCTIONS.set(Some(instructions));
    let result = f();
    INSTRUCTIONS.set(None);
    result
}

/// Runs `f` where no task of it runs on another thread: what [`on`] and its like choose, they choose for a thread.
pub(crate) fn alone<R: Send>(f: impl FnOnce() -> R + Send) -> R {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread can be started");
    pool.install(f)
}

/// Runs `f` as if [`Vector::dot`] were fast or not, in what it runs on this thread.
pub(crate) fn on_dots<R>(are_fast: bool, f: impl FnOnce() -> R) -> R {
    DOTS_ARE_FAST.set(Some(are_fast));
    let result = f();
    DOTS_ARE_FAST.set(None);
    result
}

/// Every instruction set of this machine.
pub(crate) fn available() -> impl Iterator<Item = Instructions> {
    let all = [
        Instructions::Portable,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2,
        #[cfg(target_arch = "x86_64")]
        Instructions::AvxVnni,
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512,
        #[cfg(target_arch = "aarch64")]
        Instructions::DotProduct,
    ];
    let widest = instructions();
    let is_there = |instructions| match instructions {
        // Machines with AVX-512 have it or not.
        #[cfg(target_arch = "x86_64")]
        Instructions::AvxVnni => is_x86_feature_detected!("avxvnni"),
        _ => true,
    };
    all.into_iter().filter(move |&instructions| instructions <= widest && is_there(instructions))
}

/// Runs `f` with the portable lanes, in what it runs on this thread.
pub(crate) fn portable<R>(f: impl FnOnce() -> R) -> R {
    on(Instructions::Portable, f)
}

struct Map<'a, F>(&'a [f32], F);

struct MapPairs<'a, F>(&'a [f32], F);

/// What is mapped over lanes; a trait because closures cannot be generic.
trait Function {
    fn of<V: Vector>(x: V) -> V;
}

impl<F: Function> Kernel for Map<'_, F> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f32> {
        let mut out = vec![0.0; self.0.len()];
        for (x, out) in self.0.chunks(LANES).zip(out.chunks_mut(LANES)) {
            store(F::of(load::<V, f32>(x)), out);
        }
        out
    }
}

impl<F: Function> Kernel for MapPairs<'_, F> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<f32> {
        let mut out = vec![0.0; self.0.len()];
        for (x, out) in self.0.chunks(PAIR).zip(out.chunks_mut(PAIR)) {
            store_pair::<V, f32>(F::of(load_pair::<V, f32>(x)), out);
        }
        out
    }
}

struct Exp;
impl Function for Exp {
    #[inline(always)]
    fn of<V: Vector>(x: V) -> V {
        x.exp()
    }
}

struct Sigmoid;
impl Function for Sigmoid {
    #[inline(always)]
    fn of<V: Vector>(x: V) -> V {
        x.sigmoid()
    }
}

/// The largest distance to `exact`, in units of the last place of its f32.
fn ulps(x: &[f32], got: &[f32], exact: impl Fn(f64) -> f64) -> f64 {
    let error = |(&x, &got): (&f32, &f32)| {
        let exact = exact(f64::from(x));
        let place = (exact as f32).next_up() - exact as f32;
        (f64::from(got) - exact).abs() / f64::from(place)
    };
    x.iter().zip(got).map(error).fold(0.0, f64::max)
}

#[test]
fn exp_and_sigmoid_are_as_exact_as_stated() {
    let grid: Vec<f32> = (-1_040_000..885_000).map(|i| i as f32 * 1e-4).collect();
    for got in [dispatch(Map(&grid, Exp)), portable(|| dispatch(Map(&grid, Exp)))] {
        let error = ulps(&grid, &got, f64::exp);
        assert!(error <= 2.0, "exp: {error} ulp");
    }
    let grid: Vec<f32> = (-870_000..1_000_000).map(|i| i as f32 * 1e-4).collect();
    for got in [dispatch(Map(&grid, Sigmoid)), portable(|| dispatch(Map(&grid, Sigmoid)))] {
        let error = ulps(&grid, &got, |x| 1.0 / (1.0 + (-x).exp()));
        assert!(error <= 4.0, "sigmoid: {error} ulp");
    }
}

#[test]
fn pairs_have_the_bits_of_their_halves() {
    let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
    let mut random = Random::new(2);
    // Of any size, and where the result is subnormal.
    let mut x: Vec<f32> = (0..200_003).map(|_| f32::from_bits(random.next_u64() as u32)).collect();
    x.extend((-1_060_000..-850_000).map(|i| i as f32 * 1e-4));
    for set in available() {
        on(set, || {
            assert_eq!(bits(dispatch(MapPairs(&x, Exp))), bits(dispatch(Map(&x, Exp))), "{set:?}");
            assert_eq!(bits(dispatch(MapPairs(&x, Sigmoid))), bits(dispatch(Map(&x, Sigmoid))), "{set:?}");
        })
    }
}

struct SumsOfHalves<'a>(&'a [f32; 4 * PAIR]);

impl Kernel for SumsOfHalves<'_> {
    type Output = ([f32; LANES], [[f32; PAIR]; 4]);

    /// The sums, and these spread.
    #[inline(always)]
    fn run<V: Lanes>(self) -> Self::Output {
        let (mut sums, mut spread) = ([0.0; LANES], [[0.0; PAIR]; 4]);
        let mut pairs = [V::Pair::splat(0.0); 4];
        for (pair, values) in pairs.iter_mut().zip(self.0.as_chunks::<PAIR>().0) {
            *pair = V::Pair::read(values);
        }
        let of_halves = V::sums_of_halves(pairs);
        of_halves.store(&mut sums);
        for (pair, spread) in of_halves.spread().into_iter().zip(&mut spread) {
            pair.write(spread);
        }
        (sums, spread)
    }
}

#[test]
fn halves_are_added_and_spread() {
    let mut random = Random::new(4);
    for set in available() {
        let x = std::array::from_fn(|_| random.normal(1.0));
        let (sums, spread) = on(set, || dispatch(SumsOfHalves(&x)));
        for (i, &sum) in sums.iter().enumerate() {
            let (pair, half) = (i % 4, i / 4 * LANES);
            let x = &x[pair * PAIR + half..][..LANES];
            assert_eq!(sum, ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])), "{set:?} {i}");
            assert_eq!(spread[pair][half..half + LANES], [sum; LANES], "{set:?} {i}");
        }
    }
}

/// Dot products of pairs of bf16 values with the next sixteen, onto the sixteen after these; and all as they were
/// rounded.
struct DotProducts<'a>(&'a [f32; 3 * PAIR]);

impl Kernel for DotProducts<'_> {
    type Output = ([f32; LANES], [f32; PAIR], [f32; 2 * PAIR]);

    #[inline(always)]
    fn run<V: Lanes>(self) -> Self::Output {
        let (mut lanes, mut pair, mut rounded) = ([0.0; LANES], [0.0; PAIR], [0.0; 2 * PAIR]);
        let [x, y, sum] = self.0.as_chunks::<PAIR>().0 else { unreachable!("three of them") };
        let both = [load_dots::<V, f32>(x), load_dots::<V, f32>(y)];
        both[0].dot(both[1], load::<V, f32>(sum)).store(&mut lanes);
        let [x_twice, y_twice] = [twice(both[0]), twice(both[1])];
        x_twice.dot(y_twice, V::Pair::read(sum)).write(&mut pair);
        V::Pair::read(x).round_to_bf16().write(&mut rounded);
        V::Pair::read(y).round_to_bf16().write(&mut rounded[PAIR..]);
        (lanes, pair, rounded)
    }
}

#[inline(always)]
fn twice<V: Lanes>(half: V) -> V::Pair {
    // What `join` takes of the lower halves is their upper ones.
    half.pair(V::join(half.upper(), half.lower()))
}

#[test]
fn dot_products_add_the_odd_one_first() {
    let mut random = Random::new(6);
    for _ in 0..1000 {
        let x: [f32; 3 * PAIR] = std::array::from_fn(|_| random.normal(1.0) * random.normal(3.0).exp());
        let rounded = x.map(|x| bf16::round(x).widen());
        let (x_rounded, y_rounded) = (&rounded[..PAIR], &rounded[PAIR..2 * PAIR]);
        for set in available() {
            let fused = |a: f32, b: f32, sum| match set {
                Instructions::Portable if cfg!(not(any(target_arch = "aarch64", target_feature = "fma"))) => {
                    a * b + sum
                }
                _ => a.mul_add(b, sum),
            };
            let want = |i: usize, sum| {
                let j = i % LANES * 2;
                fused(x_rounded[j], y_rounded[j], fused(x_rounded[j + 1], y_rounded[j + 1], sum))
            };
            for got in [on(set, || dispatch(DotProducts(&x))), on(set, || dispatch_dots(DotProducts(&x)))] {
                assert_eq!(got.0, std::array::from_fn(|i| want(i, x[2 * PAIR + i])), "{set:?}");
                assert_eq!(got.1, std::array::from_fn(|i| want(i, x[2 * PAIR + i])), "{set:?}");
                assert_eq!(got.2, rounded[..2 * PAIR], "{set:?}");
            }
        }
    }
}

#[test]
fn exp_at_its_ends() {
    let x = [0.0, -0.0, f32::NEG_INFINITY, -1e9, -104.0, 89.0, f32::INFINITY, f32::NAN];
    for got in [dispatch(Map(&x, Exp)), portable(|| dispatch(Map(&x, Exp)))] {
        assert_eq!(got[..7], [1.0, 1.0, 0.0, 0.0, 0.0, f32::INFINITY, f32::INFINITY]);
        assert!(got[7].is_nan());
    }
}

struct RoundTrip<'a, T>(&'a [f32], std::marker::PhantomData<T>);

impl<T: Stored> Kernel for RoundTrip<'_, T> {
    type Output = Vec<u32>;

    /// The bits of each value after rounding to `T` and widening again.
    #[inline(always)]
    fn run<V: Lanes>(self) -> Vec<u32> {
        let mut rounded = vec![T::round(0.0); self.0.len()];
        let mut out = vec![0.0; self.0.len()];
        for (x, rounded) in self.0.chunks(LANES).zip(rounded.chunks_mut(LANES)) {
            store(load::<V, f32>(x), rounded);
        }
        for (rounded, out) in rounded.chunks(LANES).zip(out.chunks_mut(LANES)) {
            store(load::<V, T>(rounded), out);
        }
        out.into_iter().map(f32::to_bits).collect()
    }
}

#[test]
fn rounding_is_that_of_the_half_crate() {
    fn check<T: Stored>(x: &[f32]) {
        let want: Vec<u32> = x.iter().map(|&x| T::round(x).widen().to_bits()).collect();
        assert_eq!(dispatch(RoundTrip::<T>(x, std::marker::PhantomData)), want);
    }
    let mut random = Random::new(1);
    let mut x: Vec<f32> = (0..100_003).map(|_| f32::from_bits(random.next_u64() as u32)).collect();
    // Ties, the edges of each range, and NaN that rounding would carry into infinity.
    x.extend([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 65504.0, 65519.9, 65520.0, 3.4e38, 6e-8, 2.9e-8, f32::INFINITY]);
    x.extend([0x7fff_ffff, 0xffff_ffff, 0x7f80_0001].map(f32::from_bits));
    check::<f16>(&x);
    check::<bf16>(&x);
}
