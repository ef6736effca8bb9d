//! The gates: against their definition, by hand, and the kernel for Metal.

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};

#[test]
fn gates_agree_with_their_definition() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            gates_of(dtype, &device)?;
        }
    }
    Ok(())
}

fn gates_of(dtype: DType, device: &Device) -> Result<()> {
    let (n, hv) = (150, 3);
    let mut random = Random::new(6);
    // Column ranges, from far below to far above where softplus and sigmoid bend.
    let all = random.tensor(&[n, 2 * hv + 1], 20.0, dtype, device)?;
    let (a, b) = (all.narrow(1, 1, hv)?, all.narrow(1, hv + 1, hv)?);
    let a_log = random.tensor(&[hv], 1.0, DType::F32, device)?;
    let dt_bias = random.tensor(&[hv], 1.0, DType::F32, device)?;
    let want = reference::gates(&values(&a)?, &values(&b)?, &values(&a_log)?, &values(&dt_bias)?);
    let (g, beta) = gates(&a, &b, &a_log, &dt_bias)?;
    assert_eq!((g.dims(), g.dtype()), ([n, hv].as_slice(), DType::F32));
    assert_close(&format!("{device:?} {dtype:?}: g"), &values(&g)?, &want.0, op_limit(DType::F32));
    assert_close(&format!("{device:?} {dtype:?}: beta"), &values(&beta)?, &want.1, op_limit(DType::F32));
    Ok(())
}

/// softplus(0) = ln 2, softplus(ln 3) = ln 4, softplus(30) = 30; sigmoid(0) = 1/2, sigmoid(ln 3) = 3/4.
#[test]
fn gates_agree_with_numbers_by_hand() -> Result<()> {
    for device in devices() {
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &device);
        let three = 3f32.ln();
        let a = tensor(&[-1.0, three, 29.0, -200.0], &[2, 2])?;
        let b = tensor(&[0.0, three, 100.0, -100.0], &[2, 2])?;
        let (g, beta) = gates(&a, &b, &tensor(&[0.0, 2f32.ln()], &[2])?, &tensor(&[1.0, 0.0], &[2])?)?;
        assert_close("g", &values(&g)?, &[-(2f32.ln()), -2.0 * 4f32.ln(), -30.0, 0.0], 1e-6);
        assert_close("beta", &values(&beta)?, &[0.5, 0.75, 1.0, 0.0], 1e-6);
    }
    Ok(())
}

#[test]
fn metal_gates_agree_with_their_definition() -> Result<()> {
    emulated(|| {
        gates_agree_with_their_definition()?;
        gates_agree_with_numbers_by_hand()
    })
}

#[test]
fn mutants_of_metal_gates_are_noticed() {
    let mutants = [
        ("row >= sizes.rows", "row > sizes.rows"),
        ("a[row_start(sizes.a, row) + head]", "a[at.x]"),
        ("b[row_start(sizes.b, row) + head]", "b[at.x]"),
        ("at.x % sizes.heads", "0"),
        ("x > 20 ? x", "x > 2 ? x"),
        ("sizes.rows * sizes.heads + at.x", "sizes.heads + at.x"),
    ];
    assert_mutants_fail(&crate::gated_delta::gates::metal::SOURCE, &mutants, gates_smoke);
}

/// One dtype of the table: a mutant is compiled without the others.
fn gates_smoke() -> Result<()> {
    gates_of(DType::F32, &Device::Cpu)
}

#[test]
fn wrong_launches_of_metal_gates_are_noticed() {
    assert_wrong_launches_fail(gates_smoke);
}
