//! The activations against the reference, by hand, and at extreme inputs.

use candle_core::{DType, Device};

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
use crate::simd::tests::portable;
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    n: usize,
    width: usize,
    activation: Activation,
}

fn run(case: Case, device: &Device) -> Result<()> {
    let Case { dtype, n, width, activation } = case;
    let x = Random::new((n * width) as u64).tensor(&[n, 2 * width], 3.0, dtype, device)?;
    let want = reference::gated_activation(&values(&x)?, width, activation);
    let frame = poisoned(&[n, 3], dtype, device)?;
    let view = Tensor::cat(&[&frame, &x, &frame], 1)?.narrow(1, 3, 2 * width)?;
    for x in [x, view] {
        let got = gated_activation(&x, activation)?;
        assert_eq!((got.dims(), got.dtype()), (&[n, width][..], dtype));
        assert_close(&format!("gated_activation {case:?} {device:?}"), &values(&got)?, &want, op_limit(dtype));
        let apart = gated_by(&x.narrow(1, 0, width)?, &x.narrow(1, width, width)?.contiguous()?, activation)?;
        assert_eq!(values(&apart)?, values(&got)?, "{case:?} {device:?}");
    }
    Ok(())
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for (n, width) in [(1, 1), (1, 7), (3, 63), (2, 64), (5, 100), (1, 1000), (33, 1024), (300, 65)] {
                cases.push(Case { dtype, n, width, activation });
            }
        }
    }
    cases
}

#[test]
fn gated_activation_is_the_reference() -> Result<()> {
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
        gated_activation_is_the_reference()?;
        hand_computed()?;
        extreme_inputs_saturate()?;
        run_sigmoids(&Device::Cpu)?;
        run_gelus(&Device::Cpu)
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        run(Case { dtype: DType::F32, n: 3, width: 300, activation }, &Device::Cpu)?;
    }
    run_sigmoid_gated(DType::F32, 3, 2, 300, &Device::Cpu)?;
    run_gelu(DType::F32, 3, 300, 2.0, &Device::Cpu)
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("i >= sizes.width", "i > sizes.width"),
        ("row_start(sizes.a, row)", "ulong(row) * sizes.width"),
        ("row_start(sizes.b, row)", "row_start(sizes.a, row)"),
        ("row_start(sizes.b, row) + i", "row_start(sizes.b, row)"),
        ("gate / (1 + exp(-gate)) * up", "gate / (1 + exp(gate)) * up"),
        ("0.044715f * gate * gate", "0.044715f * gate"),
        ("exp(-2 * u)", "exp(-u)"),
        ("exp(-2 * u)) * up", "exp(-2 * u))"),
        ("x / (1 + exp(-gate))", "x / (1 + exp(gate))"),
        ("at.x < sizes.count", "at.x + 1 < sizes.count"),
        ("max(x, 0.0f) -", "x -"),
        ("fma(-0.5f * x, x, exponent)", "fma(0.5f * x, x, exponent)"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

fn run_sigmoid_gated(dtype: DType, n: usize, heads: usize, d: usize, device: &Device) -> Result<()> {
    let mut random = Random::new((n * d) as u64);
    let x = random.tensor(&[n, heads, d], 3.0, dtype, device)?;
    // Beside each head's query lies its gate.
    let merged = random.tensor(&[n, heads, 2 * d], 3.0, dtype, device)?;
    let gate = merged.narrow(2, d, d)?;
    let want = reference::sigmoid_gated(&values(&x)?, &values(&gate)?);
    let got = sigmoid_gated(&x, &gate)?;
    assert_eq!((got.dims(), got.dtype()), (&[n, heads, d][..], dtype));
    assert_close(&format!("sigmoid_gated {dtype:?} {n} {heads} {d}"), &values(&got)?, &want, op_limit(dtype));
    Ok(())
}

fn run_sigmoids(device: &Device) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (n, heads, d) in [(1, 1, 1), (3, 2, 7), (5, 3, 64), (300, 2, 100)] {
            run_sigmoid_gated(dtype, n, heads, d, device)?;
        }
    }
    Ok(())
}

#[test]
fn sigmoid_gated_is_the_reference() -> Result<()> {
    devices().iter().try_for_each(run_sigmoids)?;
    let x = Tensor::new(&[2f32, 2.0, 2.0], &Device::Cpu)?;
    let gate = Tensor::new(&[3f32.ln(), 1e30, -1e30], &Device::Cpu)?;
    assert_close("sigmoid_gated", &values(&sigmoid_gated(&x, &gate)?)?, &[1.5, 2.0, 0.0], 1e-6);
    assert!(sigmoid_gated(&x, &gate.narrow(0, 0, 2)?).is_err());
    Ok(())
}

fn run_gelu(dtype: DType, n: usize, d: usize, deviation: f32, device: &Device) -> Result<()> {
    let x = Random::new((n * d) as u64).tensor(&[n, d], deviation, dtype, device)?;
    let want = reference::gelu(&values(&x)?);
    let frame = poisoned(&[n, 3], dtype, device)?;
    let view = Tensor::cat(&[&frame, &x, &frame], 1)?.narrow(1, 3, d)?;
    for x in [x, view] {
        let got = gelu(&x)?;
        assert_eq!((got.dims(), got.dtype()), (&[n, d][..], dtype));
        assert_close(&format!("gelu {dtype:?} {n} {d} {deviation}"), &values(&got)?, &want, op_limit(dtype));
    }
    Ok(())
}

fn run_gelus(device: &Device) -> Result<()> {
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (n, d) in [(1, 1), (1, 7), (3, 63), (2, 64), (5, 100), (1, 1000), (33, 1024), (300, 65)] {
            for deviation in [0.01, 1.0, 4.0] {
                run_gelu(dtype, n, d, deviation, device)?;
            }
        }
    }
    Ok(())
}

#[test]
fn gelu_is_the_reference() -> Result<()> {
    devices().iter().try_for_each(run_gelus)
}

/// Relative to each value, not to the largest: small ones come from a difference.
#[test]
fn gelu_is_exact_everywhere() -> Result<()> {
    let x: Vec<f32> = (-50_000..80_000).map(|i| i as f32 * 1e-4).collect();
    let want = reference::gelu(&x);
    let got = values(&gelu(&Tensor::new(x.as_slice(), &Device::Cpu)?)?)?;
    for ((x, got), want) in x.iter().zip(got).zip(want) {
        // Left of zero the value is the tail alone, with a rounded square in its exponent.
        let limit = 5e-7 + 1e-7 * x.min(0.0).powi(2);
        assert!((got - want).abs() <= limit * want.abs(), "{x}: {got}, expected {want}");
    }
    Ok(())
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    portable(|| {
        cases().into_iter().try_for_each(|case| run(case, &Device::Cpu))?;
        run_sigmoids(&Device::Cpu)?;
        run_gelus(&Device::Cpu)
    })
}

fn of(gate: &[f32], activation: Activation) -> Result<Vec<f32>> {
    let gate_up: Vec<f32> = gate.iter().flat_map(|&gate| [gate, 1.0]).collect();
    values(&gated_activation(&Tensor::from_vec(gate_up, (gate.len(), 2), &Device::Cpu)?, activation)?)
}

#[test]
fn hand_computed() -> Result<()> {
    // sigmoid(+-ln 3) is 3/4 and 1/4.
    let ln_3 = 3f32.ln();
    let got = of(&[0.0, ln_3, -ln_3], Activation::Silu)?;
    assert_close("silu", &got, &[0.0, 0.75 * ln_3, -0.25 * ln_3], 1e-6);
    // By the formula in 30 digits.
    let got = of(&[0.0, 1.0, -1.0, 0.5, 3.0, -3.0], Activation::GeluTanh)?;
    let want = [0.0, 0.841_192, -0.158_808, 0.345_714_02, 2.996_362_6, -0.003_637_392];
    assert_close("gelu", &got, &want, 1e-6);
    let x = Tensor::new(&[0f32, 1.0, -1.0, 0.5, 3.0, -3.0], &Device::Cpu)?;
    let want = [0.0, 0.841_344_8, -0.158_655_25, 0.345_731_23, 2.995_950_3, -0.004_049_694];
    assert_close("gelu", &values(&gelu(&x)?)?, &want, 1e-6);
    let up = Tensor::new(&[[ln_3, 0.0, -2.0, 5.0]], &Device::Cpu)?;
    assert_close("up", &values(&gated_activation(&up, Activation::Silu)?)?, &[-1.5 * ln_3, 0.0], 1e-6);
    Ok(())
}

#[test]
fn extreme_inputs_saturate() -> Result<()> {
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let got = of(&[100.0, -100.0, 1e30, -1e30, f32::MAX, f32::MIN], activation)?;
        assert_eq!(got, [100.0, 0.0, 1e30, 0.0, f32::MAX, 0.0], "{activation:?}");
        assert!(of(&[f32::NAN], activation)?[0].is_nan());
    }
    let x = Tensor::new(&[100.0, -100.0, 1e30, -1e30, f32::MAX, f32::MIN], &Device::Cpu)?;
    assert_eq!(values(&gelu(&x)?)?, [100.0, 0.0, 1e30, 0.0, f32::MAX, 0.0]);
    assert!(values(&gelu(&Tensor::new(&[f32::NAN], &Device::Cpu)?)?)?[0].is_nan());
    Ok(())
}

#[test]
fn refuses_an_odd_width() -> Result<()> {
    assert!(gated_activation(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?, Activation::Silu).is_err());
    Ok(())
}
