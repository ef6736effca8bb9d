//! The norms on every device present, against the reference and by hand.

use candle_core::Device;

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
use crate::simd::tests::portable;
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
const SIZES: [usize; 9] = [1, 7, 63, 64, 65, 100, 128, 1000, 1024];
const EPS: f64 = 1e-6;

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    rows: usize,
    d: usize,
    /// Size of the inputs: large enough, and a square no longer fits f16.
    deviation: f32,
    view: View,
}

/// Which part of a larger tensor of NaN an input is.
#[derive(Clone, Copy, Debug, PartialEq)]
enum View {
    Whole,
    Rows,
    Columns,
}

impl View {
    fn of(self, x: &Tensor) -> Result<Tensor> {
        let (rows, d) = x.dims2()?;
        let (dim, len) = match self {
            View::Whole => return Ok(x.clone()),
            View::Rows => (0, rows),
            View::Columns => (1, d),
        };
        let mut shape = [rows, d];
        shape[dim] = 3;
        let frame = poisoned(&shape, x.dtype(), x.device())?;
        Tensor::cat(&[&frame, x, &frame], dim)?.narrow(dim, 3, len)
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in DTYPES {
        for d in SIZES {
            for rows in [1, 5] {
                for view in [View::Whole, View::Rows, View::Columns] {
                    cases.push(Case { dtype, rows, d, deviation: 1.0, view });
                }
            }
        }
        for (rows, d) in [(300, 128), (2, 5001), (3, 20480)] {
            cases.push(Case { dtype, rows, d, deviation: 1.0, view: View::Whole });
        }
        cases.push(Case { dtype, rows: 3, d: 100, deviation: 1000.0, view: View::Whole });
        cases.push(Case { dtype, rows: 3, d: 100, deviation: 0.0, view: View::Whole });
    }
    cases
}

struct Inputs {
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    bias: Tensor,
}

fn inputs(case: Case, device: &Device) -> Result<Inputs> {
    let Case { dtype, rows, d, deviation, view } = case;
    let mut random = Random::new((rows * d) as u64);
    let x = view.of(&random.tensor(&[rows, d], deviation, dtype, device)?)?;
    let gate = view.of(&random.tensor(&[rows, d], 2.0, dtype, device)?)?;
    // Kernels that move 16 bytes at a time must see starts that allow it and starts that do not.
    let skip = if view == View::Columns { 3 } else { 4 };
    let weight = random.tensor(&[skip + d], 1.0, DType::F32, device)?.narrow(0, skip, d)?;
    let bias = random.tensor(&[skip + d], 1.0, DType::F32, device)?.narrow(0, skip, d)?;
    Ok(Inputs { x, gate, weight, bias })
}

fn check(name: &str, case: Case, device: &Device, got: &Tensor, want: &[f32]) -> Result<()> {
    assert_eq!((got.dims(), got.dtype()), (&[case.rows, case.d][..], case.dtype), "{name} {case:?}");
    assert_close(&format!("{name} {case:?} {device:?}"), &values(got)?, want, op_limit(case.dtype));
    Ok(())
}

fn run_rms_norm(case: Case, device: &Device) -> Result<()> {
    let Inputs { x, weight, .. } = inputs(case, device)?;
    let want = reference::rms_norm(&values(&x)?, &values(&weight)?, EPS as f32);
    check("rms_norm", case, device, &rms_norm(&x, &weight, EPS)?, &want)
}

fn run_rms_norm_gated(case: Case, device: &Device) -> Result<()> {
    let Inputs { x, gate, weight, .. } = inputs(case, device)?;
    let want = reference::rms_norm_gated(&values(&x)?, &values(&gate)?, &values(&weight)?, EPS as f32);
    check("rms_norm_gated", case, device, &rms_norm_gated(&x, &gate, &weight, EPS)?, &want)
}

fn run_add_layer_norm(case: Case, device: &Device) -> Result<()> {
    let Inputs { x, gate: residual, weight, bias } = inputs(case, device)?;
    let operands = (values(&x)?, values(&residual)?, values(&weight)?, values(&bias)?);
    let want = reference::add_layer_norm(&operands.0, &operands.1, &operands.2, &operands.3, EPS as f32);
    check("add_layer_norm", case, device, &add_layer_norm(&x, &residual, &weight, &bias, EPS)?, &want)
}

/// Against its parts, by factors of 16 bits, as checkpoints have them.
fn run_add_rms_norm(case: Case, device: &Device) -> Result<()> {
    let Inputs { x, gate: update, weight, .. } = inputs(case, device)?;
    let norm = Norm { weight: &weight, eps: EPS };
    for factor in [1.0, 0.34375] {
        let want = (add(&x, &norm.apply(&update)?)? * factor)?;
        let got = add_rms_norm(&x, &update, norm, factor)?;
        assert_eq!((got.dims(), got.dtype()), (x.dims(), x.dtype()), "{case:?}");
        assert_eq!(values(&got)?, values(&want)?, "{case:?} {factor} {device:?}");
    }
    Ok(())
}

#[test]
fn add_rms_norm_is_its_parts() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_add_rms_norm(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn rms_norm_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_rms_norm(case, &device)?;
        }
    }
    Ok(())
}

/// Heads of a merged projection, and halves of heads.
#[test]
fn rms_norm_reads_rows_that_lie_apart() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for d in [7, 64] {
                let mut random = Random::new(2);
                let all = random.tensor(&[5, 9, 3 * d], 1.0, dtype, &device)?;
                let weight = random.tensor(&[d], 1.0, DType::F32, &device)?;
                let odd = random.tensor(&[5, 3, d + 1], 1.0, dtype, &device)?;
                let parts =
                    [all.narrow(1, 2, 4)?.narrow(2, d, d), all.narrow(2, d, d)?.narrow(1, 4, 1), odd.narrow(2, 0, d)];
                for x in parts {
                    let x = x?;
                    let want = reference::rms_norm(&values(&x)?, &values(&weight)?, EPS as f32);
                    let got = values(&rms_norm(&x, &weight, EPS)?)?;
                    assert_close(&format!("{dtype:?} {d} {device:?}"), &got, &want, op_limit(dtype));
                }
            }
        }
    }
    Ok(())
}

#[test]
fn rms_norm_gated_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_rms_norm_gated(case, &device)?;
        }
    }
    Ok(())
}

/// What a projection gives beside others: a gate whose rows lie apart and are not split into heads.
#[test]
fn rms_norm_gated_splits_the_gate_like_x() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            for (heads, d) in [(3, 7), (2, 64)] {
                let mut random = Random::new(3);
                let x = random.tensor(&[5, heads, d], 1.0, dtype, &device)?;
                let gate = random.tensor(&[5, heads * d + 11], 2.0, dtype, &device)?.narrow(1, 8, heads * d)?;
                let weight = random.tensor(&[d], 1.0, DType::F32, &device)?;
                let want = reference::rms_norm_gated(&values(&x)?, &values(&gate)?, &values(&weight)?, EPS as f32);
                let got = rms_norm_gated(&x, &gate, &weight, EPS)?;
                assert_eq!(got.dims(), x.dims());
                assert_close(&format!("{dtype:?} {d} {device:?}"), &values(&got)?, &want, op_limit(dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn metal_kernels_are_the_reference() -> Result<()> {
    emulated(|| {
        rms_norm_is_the_reference()?;
        rms_norm_reads_rows_that_lie_apart()?;
        rms_norm_gated_is_the_reference()?;
        rms_norm_gated_splits_the_gate_like_x()?;
        add_rms_norm_is_its_parts()?;
        add_layer_norm_is_the_reference()
    })
}

fn layer_smoke() -> Result<()> {
    for (rows, d, view) in [(3, 100, View::Columns), (2, 1000, View::Rows)] {
        run_add_layer_norm(Case { dtype: DType::F32, rows, d, deviation: 1.0, view }, &Device::Cpu)?;
    }
    // A sum does not show which of its terms is which, unless they lie otherwise.
    let mut random = Random::new(4);
    let mut tensor = |shape: &[usize]| random.tensor(shape, 1.0, DType::F32, &Device::Cpu);
    let (x, residual) = (tensor(&[3, 60])?.narrow(1, 5, 40)?, tensor(&[3, 40])?);
    let (weight, bias) = (tensor(&[40])?, tensor(&[40])?);
    let want =
        reference::add_layer_norm(&values(&x)?, &values(&residual)?, &values(&weight)?, &values(&bias)?, EPS as f32);
    let got = values(&add_layer_norm(&x, &residual, &weight, &bias, EPS)?)?;
    assert_close("add_layer_norm of rows that lie otherwise", &got, &want, op_limit(DType::F32));
    Ok(())
}

#[test]
fn mutants_of_the_layer_norm_on_metal_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n  float sum = 0;", "  float sum = 0;"),
        ("i < simdgroups", "i + 1 < simdgroups"),
        ("row_start(sizes.x, row)", "ulong(row) * d"),
        ("row_start(sizes.residual, row)", "row_start(sizes.residual, 0)"),
        ("const float value = float(a[i]) + float(b[i]) - mean", "const float value = float(a[i]) + float(b[i])"),
        (" + bias[i]", ""),
        ("/ d + sizes.eps", "+ sizes.eps"),
    ];
    assert_mutants_fail(&metal::LAYER_SOURCE, &mutants, layer_smoke);
}

#[test]
fn wrong_launches_of_the_layer_norm_on_metal_are_noticed() {
    assert_wrong_launches_fail(layer_smoke);
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for (rows, d, view) in [(9, 100, View::Columns), (2, 1000, View::Rows)] {
        let case = Case { dtype: DType::F32, rows, d, deviation: 1.0, view };
        run_rms_norm(case, &Device::Cpu)?;
        run_rms_norm_gated(case, &Device::Cpu)?;
        run_add_rms_norm(case, &Device::Cpu)?;
    }
    Ok(())
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("    threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""),
        ("i < threads.x / LANES", "i + 1 < threads.x / LANES"),
        ("row < sizes.rows", "row <= sizes.rows"),
        ("x + row_start(sizes.x, inside ? row : 0)", "x + (inside ? row : 0) * d"),
        ("row_start(sizes.other, row)", "row_start(sizes.x, 0)"),
        ("exp(-with)", "exp(with)"),
        ("IS_GATED ? value", "!IS_GATED ? value"),
        ("T(with + float", "T(with - float"),
        (" * sizes.factor", ""),
        ("squares / d", "squares"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

#[test]
fn add_layer_norm_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_add_layer_norm(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    portable(|| {
        for case in cases() {
            run_rms_norm(case, &Device::Cpu)?;
            run_rms_norm_gated(case, &Device::Cpu)?;
            run_add_layer_norm(case, &Device::Cpu)?;
        }
        Ok(())
    })
}

#[test]
fn hand_computed() -> Result<()> {
    // mean(x^2) = 12.5 and 0.5; an eps of 3.5 makes the roots 4 and 2.
    let x = Tensor::new(&[[3f32, -4.0], [1.0, 0.0]], &Device::Cpu)?;
    let weight = Tensor::new(&[2f32, 0.5], &Device::Cpu)?;
    assert_close("rms_norm", &values(&rms_norm(&x, &weight, 3.5)?)?, &[1.5, -0.5, 1.0, 0.0], 1e-6);
    let gate = Tensor::new(&[[0f32, 3f32.ln()], [-(3f32.ln()), 7.0]], &Device::Cpu)?;
    // silu(ln 3) = 3/4 ln 3 and silu(-ln 3) = -1/4 ln 3.
    let want = [0.0, -0.375 * 3f32.ln(), -0.25 * 3f32.ln(), 0.0];
    assert_close("rms_norm_gated", &values(&rms_norm_gated(&x, &gate, &weight, 3.5)?)?, &want, 1e-6);
    // The sums 4, 0 and 2, 6 lie 2 on either side of their means; an eps of 5 makes the root 3.
    let residual = Tensor::new(&[[1f32, 4.0], [1.0, 6.0]], &Device::Cpu)?;
    let bias = Tensor::new(&[1f32, -1.0], &Device::Cpu)?;
    let want = [1.0 + 4.0 / 3.0, -1.0 - 1.0 / 3.0, 1.0 - 4.0 / 3.0, -1.0 + 1.0 / 3.0];
    assert_close("layer", &values(&add_layer_norm(&x, &residual, &weight, &bias, 5.0)?)?, &want, 1e-6);
    Ok(())
}

#[test]
fn refuses_operands_that_disagree() -> Result<()> {
    let x = Tensor::zeros((2, 4), DType::F16, &Device::Cpu)?;
    let weight = Tensor::zeros(4, DType::F32, &Device::Cpu)?;
    assert!(rms_norm(&x, &weight.narrow(0, 0, 3)?, EPS).is_err());
    assert!(rms_norm(&x, &weight.to_dtype(DType::F16)?, EPS).is_err());
    assert!(rms_norm_gated(&x, &x.narrow(0, 0, 1)?, &weight, EPS).is_err());
    assert!(rms_norm_gated(&x, &x.to_dtype(DType::F32)?, &weight, EPS).is_err());
    let norm = |weight| Norm { weight, eps: EPS };
    assert!(add_rms_norm(&x, &x.narrow(0, 0, 1)?, norm(&weight), 1.0).is_err());
    assert!(add_rms_norm(&x, &x, norm(&weight.narrow(0, 0, 3)?), 1.0).is_err());
    assert!(add_layer_norm(&x, &x.narrow(0, 0, 1)?, &weight, &weight, EPS).is_err());
    assert!(add_layer_norm(&x, &x, &weight, &weight.narrow(0, 0, 3)?, EPS).is_err());
    Ok(())
}
