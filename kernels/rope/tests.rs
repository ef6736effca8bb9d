//! The rotation against the reference, by hand, and by the properties that it is for.

use candle_core::Device;

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
use crate::simd::tests::portable;
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    n: usize,
    heads: usize,
    d: usize,
    half: usize,
}

fn run(case: Case, device: &Device) -> Result<()> {
    let Case { dtype, n, heads, d, half } = case;
    let mut random = Random::new((n * d + half) as u64);
    let x = random.tensor(&[n, heads, d], 1.0, dtype, device)?;
    // Tables that start anywhere; as angles need not be real, neither need these be.
    let tables = random.tensor(&[2 * n + 1, half], 1.0, DType::F32, device)?;
    let (cos, sin) = (tables.narrow(0, 1, n)?, tables.narrow(0, n + 1, n)?);
    let mut want = values(&x)?;
    reference::rope(&mut want, &values(&cos)?, &values(&sin)?, heads, d, half);
    let frame = poisoned(&[n, 2, d], dtype, device)?;
    let view = Tensor::cat(&[&frame, &x, &frame], 1)?.narrow(1, 2, heads)?;
    for x in [x, view] {
        let got = rope(&x, &cos, &sin)?;
        assert_eq!((got.dims(), got.dtype()), (x.dims(), dtype));
        assert_close(&format!("rope {case:?} {device:?}"), &values(&got)?, &want, op_limit(dtype));
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (d, half) in [(2, 1), (7, 3), (64, 32), (63, 20), (100, 50), (128, 64), (256, 32), (512, 256), (8, 0)] {
            for (n, heads) in [(1, 1), (1, 16), (5, 3), (65, 4)] {
                cases.push(Case { dtype, n, heads, d, half });
            }
        }
    }
    cases
}

#[test]
fn rope_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn metal_kernels_are_the_reference() -> Result<()> {
    emulated(|| {
        rope_is_the_reference()?;
        rotations_are_cosines_and_sines_of_positions()
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for (n, heads, d, half) in [(5, 3, 63, 20), (3, 2, 600, 300)] {
        run(Case { dtype: DType::F32, n, heads, d, half }, &Device::Cpu)?;
    }
    rotations_are_cosines_and_sines_of_positions()
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("row >= sizes.rows", "row > sizes.rows"),
        ("row_start(sizes.x, row)", "ulong(row) * d"),
        ("row / sizes.x.heads", "row"),
        ("i < d - pairs", "i < d - pairs - 1"),
        ("i += threads.x", "i += threads.x + 1"),
        ("if (i >= pairs)", "if (i > pairs)"),
        ("a * c - b * s", "a * c + b * s"),
        ("at.x >= count", "at.x > count"),
        ("at.x % sizes.pairs", "at.x / sizes.pairs"),
        ("both[count + at.x] = precise::sin", "both[count + at.x] = precise::cos"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    portable(|| cases().into_iter().try_for_each(|case| run(case, &Device::Cpu)))
}

#[test]
fn hand_computed() -> Result<()> {
    // R = 4 of D = 5: pair (1, 3) by a quarter turn, pair (2, 4) by cos 0.6 and sin 0.8.
    let x = Tensor::new(&[[[1f32, 2.0, 3.0, 4.0, 5.0]]], &Device::Cpu)?;
    let cos = Tensor::new(&[[0f32, 0.6]], &Device::Cpu)?;
    let sin = Tensor::new(&[[1f32, 0.8]], &Device::Cpu)?;
    assert_close("rope", &values(&rope(&x, &cos, &sin)?)?, &[-3.0, -2.0, 1.0, 4.0, 5.0], 1e-6);
    Ok(())
}

/// Tables for `positions` at the frequencies of base 10000, those from `rotating` on zero.
fn tables(positions: &[f32], half: usize, rotating: usize) -> Result<(Tensor, Tensor)> {
    let frequency = |i: usize| if i < rotating { 10000f32.powf(-(i as f32) / half as f32) } else { 0.0 };
    let angles: Vec<f32> = positions.iter().flat_map(|p| (0..half).map(move |i| p * frequency(i))).collect();
    let angles = Tensor::from_vec(angles, (positions.len(), half), &Device::Cpu)?;
    Ok((angles.cos()?, angles.sin()?))
}

#[test]
fn rotations_are_cosines_and_sines_of_positions() -> Result<()> {
    for device in devices() {
        for (n, half) in [(1, 1), (3, 32), (70, 50)] {
            let positions: Vec<u32> = (0..n as u32).map(|i| i * i * 37).collect();
            let inv_freq: Vec<f32> = (0..half).map(|i| 10000f32.powf(-(i as f32) / half as f32)).collect();
            let angles: Vec<f32> =
                positions.iter().flat_map(|&p| inv_freq.iter().map(move |&f| p as f32 * f)).collect();
            let frame = Tensor::new(&[9u32][..], &device)?;
            let positions = Tensor::cat(&[&frame, &Tensor::new(&positions[..], &device)?], 0)?.narrow(0, 1, n)?;
            let (cos, sin) = rotations(&positions, &Tensor::new(&inv_freq[..], &device)?)?;
            assert_eq!((cos.dims(), sin.dims()), (&[n, half][..], &[n, half][..]));
            let want = |f: fn(f32) -> f32| angles.iter().map(|&a| f(a)).collect::<Vec<f32>>();
            assert_close("cos", &values(&cos)?, &want(f32::cos), 1e-6);
            assert_close("sin", &values(&sin)?, &want(f32::sin), 1e-6);
        }
    }
    Ok(())
}

#[test]
fn zero_frequencies_leave_their_pairs_as_they_are() -> Result<()> {
    let (d, rotating) = (64, 8);
    let x = Random::new(1).tensor(&[3, 2, d], 1.0, DType::BF16, &Device::Cpu)?;
    let (cos, sin) = tables(&[0.0, 7.0, 1000.0], d / 2, rotating)?;
    let y = rope(&x, &cos, &sin)?;
    let (x, y) = (values(&x)?, values(&y)?);
    for (i, (x, y)) in x.iter().zip(&y).enumerate() {
        let (token, pair) = (i / (2 * d), i % (d / 2));
        assert_eq!(x == y, token == 0 || pair >= rotating, "at {i}: {x} became {y}");
    }
    Ok(())
}

#[test]
fn rotation_keeps_norms_and_sees_relative_positions() -> Result<()> {
    let d = 128;
    let mut random = Random::new(2);
    let q = random.tensor(&[1, 1, d], 1.0, DType::F32, &Device::Cpu)?;
    let k = random.tensor(&[1, 1, d], 1.0, DType::F32, &Device::Cpu)?;
    let at = |x: &Tensor, position: f32| -> Result<Vec<f32>> {
        let (cos, sin) = tables(&[position], d / 2, d / 2)?;
        values(&rope(x, &cos, &sin)?)
    };
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let norm = dot(&values(&q)?, &values(&q)?);
    let score = dot(&at(&q, 12.0)?, &at(&k, 3.0)?);
    for shift in [1.0, 50.0, 1000.0] {
        let (q, k) = (at(&q, 12.0 + shift)?, at(&k, 3.0 + shift)?);
        assert!((dot(&q, &q) - norm).abs() < 1e-4 * norm);
        assert!((dot(&q, &k) - score).abs() < 1e-4 * norm, "shift {shift}: {} for {score}", dot(&q, &k));
    }
    let closer = dot(&at(&q, 12.0)?, &at(&k, 4.0)?);
    assert!((closer - score).abs() > 1e-2 * norm, "another distance, the same score {score}");
    Ok(())
}

#[test]
fn refuses_tables_of_another_shape() -> Result<()> {
    let x = Tensor::zeros((3, 2, 8), DType::F32, &Device::Cpu)?;
    let table = |n, half, dtype| Tensor::zeros((n, half), dtype, &Device::Cpu);
    let good = table(3, 4, DType::F32)?;
    rope(&x, &good, &good)?;
    for bad in [table(2, 4, DType::F32)?, table(3, 5, DType::F32)?, table(3, 4, DType::F16)?] {
        assert!(rope(&x, &bad, &bad).is_err());
        assert!(rope(&x, &good, &bad).is_err());
    }
    Ok(())
}
