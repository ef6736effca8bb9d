use candle_core::{DType, Device};

use super::*;
use crate::simd::Instructions;
use crate::simd::tests::{available, on};
use crate::testing::{Random, assert_close, op_limit, values};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).expect("a float tensor").into_iter().map(f32::to_bits).collect()
}

#[test]
fn hand_computed() -> Result<()> {
    let x = Tensor::new(&[[1f32, 2.0, 3.0], [0.0, -1.0, 0.5]], &Device::Cpu)?;
    let weight = Tensor::new(&[[1f32, 0.0, -1.0], [0.5, 0.25, 2.0]], &Device::Cpu)?;
    assert_eq!(linear(&x, &weight)?.to_vec2::<f32>()?, [[-2.0, 7.0], [-0.5, 0.75]]);
    Ok(())
}

#[test]
fn every_pair_of_dtypes_is_the_reference() -> Result<()> {
    let mut random = Random::new(1);
    for (n, inner, outer) in [(1, 1, 1), (2, 7, 3), (3, 8, 5), (5, 9, 129), (4, 63, 17), (65, 100, 33), (7, 1000, 10)] {
        for x_dtype in FLOATS {
            for w_dtype in FLOATS {
                let x = random.tensor(&[n, inner], 1.0, x_dtype, &Device::Cpu)?;
                let weight = random.tensor(&[outer, inner], 1.0, w_dtype, &Device::Cpu)?;
                let got = linear(&x, &weight)?;
                assert_eq!((got.dims(), got.dtype()), (&[n, outer][..], x_dtype));
                let want = reference::linear(&values(&x)?, &values(&weight)?, inner, outer);
                let name = format!("{x_dtype:?} [{n}, {inner}] by {w_dtype:?} [{outer}, {inner}]");
                assert_close(&name, &values(&got)?, &want, op_limit(x_dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_does_not_depend_on_the_others_or_on_threads() -> Result<()> {
    let mut random = Random::new(2);
    let (inner, outer) = (300, 70);
    for w_dtype in FLOATS {
        let x = random.tensor(&[100, inner], 1.0, DType::F32, &Device::Cpu)?;
        let weight = random.tensor(&[outer, inner], 1.0, w_dtype, &Device::Cpu)?;
        let alone: Vec<Vec<u32>> =
            (0..100).map(|row| Ok(bits(&linear(&x.narrow(0, row, 1)?, &weight)?))).collect::<Result<_>>()?;
        for rows in [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 100] {
            for threads in [1, 2, 3, 5] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                let got = bits(&pool.install(|| linear(&x.narrow(0, 100 - rows, rows)?, &weight))?);
                assert_eq!(got, alone[100 - rows..].concat(), "{rows} rows, {threads} threads, {w_dtype:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_bias_is_added_before_the_rounding() -> Result<()> {
    let mut random = Random::new(4);
    for dtype in FLOATS {
        for (n, inner, outer) in [(1, 7, 3), (3, 8, 50), (40, 100, 129)] {
            let x = random.tensor(&[n, inner], 1.0, dtype, &Device::Cpu)?;
            let weight = random.tensor(&[outer, inner], 1.0, DType::BF16, &Device::Cpu)?;
            let bias = random.tensor(&[outer], 5.0, dtype, &Device::Cpu)?;
            let sums = linear(&x.to_dtype(DType::F32)?, &weight)?;
            let want = sums.broadcast_add(&bias.to_dtype(DType::F32)?)?.to_dtype(dtype)?;
            assert_eq!(bits(&linear_with_bias(&x, &weight, &bias)?), bits(&want));
        }
    }
    Ok(())
}

#[test]
fn views_at_an_offset() -> Result<()> {
    let mut random = Random::new(3);
    let x = random.tensor(&[9, 40], 1.0, DType::F32, &Device::Cpu)?;
    let weight = random.tensor(&[20, 40], 1.0, DType::BF16, &Device::Cpu)?;
    let got = linear(&x.narrow(0, 4, 3)?, &weight.narrow(0, 5, 11)?)?;
    let want = linear(&x, &weight)?.narrow(0, 4, 3)?.narrow(1, 5, 11)?;
    assert_eq!(bits(&got), bits(&want));
    Ok(())
}

#[test]
fn shapes_that_do_not_fit_are_refused() -> Result<()> {
    let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let error = linear(&x, &Tensor::zeros((4, 5), DType::F32, &Device::Cpu)?).expect_err("3 is not 5").to_string();
    assert!(error.contains("linear: weight is [4, 5], expected [O, 3]"), "{error}");
    let (weight, bias) =
        (Tensor::zeros((4, 3), DType::F32, &Device::Cpu)?, Tensor::zeros(5, DType::F32, &Device::Cpu)?);
    let error = linear_with_bias(&x, &weight, &bias).expect_err("5 is not 4").to_string();
    assert!(error.contains("linear: bias is [5] F32, expected F32 [4]"), "{error}");
    Ok(())
}

/// The tile for many rows is another one with AVX-512, and must not show.
#[test]
fn instruction_sets_that_fuse_agree_to_the_bit() -> Result<()> {
    let mut random = Random::new(7);
    for (n, inner, outer) in [(17, 64, 16), (40, 300, 70), (131, 2100, 33)] {
        let x = random.tensor(&[n, inner], 1.0, DType::F32, &Device::Cpu)?;
        let weight = random.tensor(&[outer, inner], 1.0, DType::BF16, &Device::Cpu)?;
        let alone: Vec<Vec<u32>> =
            (0..n).map(|row| Ok(bits(&linear(&x.narrow(0, row, 1)?, &weight)?))).collect::<Result<_>>()?;
        for instructions in available().filter(|&instructions| instructions > Instructions::Portable) {
            let got = bits(&on(instructions, || linear(&x, &weight))?);
            assert_eq!(got, alone.concat(), "[{n}, {inner}] by [{outer}, {inner}] on {instructions:?}");
        }
    }
    Ok(())
}
