use candle_core::{DType, Device};

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail_but, emulated, suspended};
use crate::simd::Instructions;
use crate::simd::amx::tests::with_tiles;
use crate::simd::tests::{available, on};
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

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
    pairs_are_the_reference(&[(1, 1, 1), (2, 7, 3), (3, 8, 5), (5, 9, 129), (4, 63, 17), (65, 100, 33), (7, 1000, 10)])
}

/// Few and many rows, several blocks of inputs and of outputs.
#[test]
fn products_on_amx_are_the_reference() -> Result<()> {
    with_tiles(|| {
        pairs_are_the_reference(&[(1, 1, 1), (5, 9, 129), (1, 1100, 150), (16, 64, 64), (4, 700, 10), (37, 600, 100)])
    })
}

/// Scratch is kept between products: what is missing from a register must not be what the one before had there.
#[test]
fn nothing_of_a_product_is_in_the_next() -> Result<()> {
    with_tiles(|| {
        let weight = Tensor::zeros((64, 1024), DType::BF16, &Device::Cpu)?;
        linear(&poisoned(&[40, 1024], DType::F32, &Device::Cpu)?, &weight)?;
        pairs_are_the_reference(&[(37, 230, 100), (4, 10, 3)])
    })
}

fn pairs_are_the_reference(shapes: &[(usize, usize, usize)]) -> Result<()> {
    let mut random = Random::new(1);
    for &(n, inner, outer) in shapes {
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
    FLOATS
        .into_iter()
        .try_for_each(|w_dtype| rows_are_alone(w_dtype, 300, &[1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 100], linear))
}

/// More rows, as long as that takes, than share one turn of the weights.
#[test]
fn rows_beyond_those_turned_at_once_are_products_too() -> Result<()> {
    let (rows, inner) = (cpu::MAX_ROWS + 2, cpu::MAX_ELEMENTS / cpu::MAX_ROWS);
    let mut random = Random::new(9);
    let x = random.tensor(&[rows, inner], 1.0, DType::F32, &Device::Cpu)?;
    let weight = random.tensor(&[33, inner], 1.0, DType::F32, &Device::Cpu)?;
    let all = linear(&x, &weight)?;
    for row in [0, cpu::MAX_ROWS - 1, cpu::MAX_ROWS, rows - 1] {
        let alone = linear(&x.narrow(0, row, 1)?, &weight)?;
        assert!(bits(&all.narrow(0, row, 1)?) == bits(&alone), "row {row}");
    }
    Ok(())
}

#[test]
fn a_row_on_amx_does_not_depend_on_the_others_or_on_threads() -> Result<()> {
    let on_amx = |x: &Tensor, weight: &Tensor| with_tiles(|| linear(x, weight));
    [512, 610, 30]
        .into_iter()
        .try_for_each(|inner| rows_are_alone(DType::BF16, inner, &[1, 2, 3, 4, 16, 17, 40], on_amx))
}

fn rows_are_alone(
    w_dtype: DType,
    inner: usize,
    counts: &[usize],
    linear: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Sync,
) -> Result<()> {
    let mut random = Random::new(2);
    let most = counts[counts.len() - 1];
    let x = random.tensor(&[most, inner], 1.0, DType::F32, &Device::Cpu)?;
    let weight = random.tensor(&[70, inner], 1.0, w_dtype, &Device::Cpu)?;
    let alone: Vec<Vec<u32>> =
        (0..most).map(|row| Ok(bits(&linear(&x.narrow(0, row, 1)?, &weight)?))).collect::<Result<_>>()?;
    for &rows in counts {
        for threads in [1, 2, 3, 5] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            let got = bits(&pool.install(|| linear(&x.narrow(0, most - rows, rows)?, &weight))?);
            assert_eq!(got, alone[most - rows..].concat(), "{rows} rows, {threads} threads, {w_dtype:?}");
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

/// What surrounds a product, in every combination that models have, beside its parts in f32 on the CPU.
#[test]
fn around_is_its_parts_on_every_device() -> Result<()> {
    let shapes = [(64, 32), (1024, 40), (96, 5000), (1000, 17), (7, 3), (3072, 1024), (12288, 24)];
    for device in devices() {
        for dtype in FLOATS {
            for rows in [1, 2, 3, 5, 8, 9, 16, 17] {
                for (inner, outer) in shapes {
                    around_is_its_parts((rows, inner, outer), dtype, &device)?;
                }
            }
            for (inner, outer) in [(64, 32), (96, 5000), (1000, 17), (7, 3)] {
                around_is_its_parts((300, inner, outer), dtype, &device)?;
            }
        }
    }
    Ok(())
}

fn around_is_its_parts((rows, inner, outer): (usize, usize, usize), dtype: DType, device: &Device) -> Result<()> {
    let mut random = Random::new((rows * inner + outer) as u64);
    let mut tensor = |shape: &[usize], deviation, dtype| random.tensor(shape, deviation, dtype, device);
    // Rows of a merged projection.
    let frame = poisoned(&[rows, 16], dtype, device)?;
    let x = Tensor::cat(&[&frame, &tensor(&[rows, inner], 1.0, dtype)?, &frame], 1)?.narrow(1, 16, inner)?;
    let weight = tensor(&[2 * outer, inner], (inner as f32).powf(-0.5), dtype)?;
    let (factors, bias) = (tensor(&[inner], 1.0, DType::F32)?, tensor(&[outer], 1.0, dtype)?);
    let residual = tensor(&[rows, outer], 1.0, dtype)?;
    let exact = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
    let (x_exact, weight_exact) = (exact(&x)?, exact(&weight)?);
    let (factors_exact, bias_exact, residual_exact) = (exact(&factors)?, exact(&bias)?, exact(&residual)?);
    for (is_normed, gate, has_bias, is_onto) in [
        (false, None, false, false),
        (true, None, false, false),
        (false, None, true, false),
        (true, Some(Activation::Silu), false, false),
        (false, Some(Activation::GeluTanh), false, false),
        (false, None, false, true),
        (true, None, true, true),
    ] {
        let norm = |weight| is_normed.then_some(Norm { weight, eps: 1e-6 });
        let around = Around { norm: norm(&factors), gate, onto: is_onto.then_some(&residual) };
        let rows_of = |weight: &Tensor| weight.narrow(0, 0, if gate.is_some() { 2 * outer } else { outer });
        let got = linear_around(&x, &rows_of(&weight)?, has_bias.then_some(&bias), around)?;
        let exactly = Around { norm: norm(&factors_exact), gate, onto: is_onto.then_some(&residual_exact) };
        let weight = rows_of(&weight_exact)?;
        let want = suspended(|| linear_around(&x_exact, &weight, has_bias.then_some(&bias_exact), exactly))?;
        assert_eq!((got.dims(), got.dtype()), (&[rows, outer][..], dtype));
        let name =
            format!("[{rows}, {inner}] by {outer} {dtype:?} {is_normed} {gate:?} {has_bias} {is_onto} {device:?}");
        assert_close(&name, &values(&got)?, &values(&want)?, 1.5 * op_limit(dtype));
    }
    Ok(())
}

/// By the kernel that does both in one pass, whether or not it is the faster way.
#[cfg(feature = "cuda")]
#[test]
fn activated_products_are_their_parts() -> Result<()> {
    use super::wgmma::{Activated, activated};
    let mut random = Random::new(11);
    for device in devices() {
        let Device::Cuda(cuda) = &device else { continue };
        for (rows, inner, outer) in [(1, 64, 8), (65, 8, 520), (300, 200, 136), (1000, 328, 1032), (4100, 128, 256)] {
            for dtype in [DType::F16, DType::BF16] {
                let mut tensor = |shape: &[usize], deviation| random.tensor(shape, deviation, dtype, &device);
                // Rows of a merged projection; behind the last output of a weight another begins.
                let frame = poisoned(&[rows, 16], dtype, &device)?;
                let x = Tensor::cat(&[&frame, &tensor(&[rows, inner], 1.0)?, &frame], 1)?.narrow(1, 16, inner)?;
                let weights = [
                    tensor(&[2 * outer, inner], 3.0 * (inner as f32).powf(-0.5))?,
                    poisoned(&[64, inner], dtype, &device)?,
                ];
                let weight = Tensor::cat(&weights, 0)?.narrow(0, 0, 2 * outer)?;
                let bias = tensor(&[outer], 1.0)?;
                let exact = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
                for activation in [None, Some(Activation::Silu), Some(Activation::GeluTanh)] {
                    let name = format!("[{rows}, {inner}] by {outer} {dtype:?} {activation:?}");
                    let (got, want) = match activation {
                        Some(gate) => {
                            let around = Around { gate: Some(gate), ..Around::default() };
                            let want = linear_around(&exact(&x)?, &exact(&weight)?, None, around)?;
                            (activated(cuda, &x, &weight, None, Activated::Gate(gate))?, want)
                        }
                        None => {
                            let weight = weight.narrow(0, 0, outer)?;
                            let want = linear_gelu(&exact(&x)?, &exact(&weight)?, Some(&exact(&bias)?))?;
                            (activated(cuda, &x, &weight, Some(&bias), Activated::Gelu)?, want)
                        }
                    };
                    match got {
                        Some(got) => assert_close(&name, &values(&got)?, &values(&want)?, 1.5 * op_limit(dtype)),
                        None => eprintln!("skipped: {name}: needs compute capability 9.0"),
                    }
                }
            }
        }
    }
    Ok(())
}

/// What the public function makes of many rows, and of few.
#[test]
fn gelu_of_a_product_is_its_parts() -> Result<()> {
    let mut random = Random::new(12);
    for device in devices() {
        for dtype in FLOATS {
            for (rows, inner, outer) in [(3, 40, 24), (1000, 72, 4088)] {
                let mut tensor = |shape: &[usize]| random.tensor(shape, 0.5, dtype, &device);
                let (x, weight, bias) = (tensor(&[rows, inner])?, tensor(&[outer, inner])?, tensor(&[outer])?);
                let got = linear_gelu(&x, &weight, Some(&bias))?;
                let want = gelu(&linear_with_bias(&x, &weight, &bias)?)?;
                let name = format!("[{rows}, {inner}] by {outer} {dtype:?} {device:?}");
                assert_close(&name, &values(&got)?, &values(&want)?, 1.5 * op_limit(dtype));
            }
        }
    }
    Ok(())
}

#[test]
fn metal_kernels_are_their_parts() -> Result<()> {
    emulated(|| {
        for dtype in FLOATS {
            for (i, rows) in [1, 2, 3, 5, 8].into_iter().enumerate() {
                for (j, shape) in [(64, 32), (512, 40), (96, 130), (1000, 17), (7, 3)].into_iter().enumerate() {
                    if dtype == DType::F32 || (i + j) % 2 == 0 {
                        around_is_its_parts((rows, shape.0, shape.1), dtype, &Device::Cpu)?;
                    }
                }
            }
        }
        Ok(())
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for shape in [(1, 160, 33), (3, 64, 18), (2, 33, 5)] {
        around_is_its_parts(shape, DType::F32, &Device::Cpu)?;
    }
    Ok(())
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("min(first_row + r, sizes.rows - 1)", "first_row"),
        ("column += 4 * LANES", "column += 8 * LANES"),
        ("half_ * outer", "half_"),
        ("half_ == 1 && !IS_GATED", "half_ == 1"),
        ("column + i < inner)\n      values", "true)\n      values"),
        ("out >= outer || row", "row"),
        ("IS_GELU ? -2 * u : -x", "-x"),
        ("sum += float(extra[out])", "sum += float(extra[o])"),
        ("residual[ulong(row) * outer + out]", "residual[out]"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    // The bias and the residual sum of a single row.
    assert_wrong_launches_fail_but(&[("linear_1_f32", 4, 5)], smoke);
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
        let mut results = Vec::new();
        for instructions in available().filter(|&instructions| instructions > Instructions::Portable) {
            let linear = |x: &Tensor| on(instructions, || linear(x, &weight));
            let alone: Vec<Vec<u32>> =
                (0..n).map(|row| Ok(bits(&linear(&x.narrow(0, row, 1)?)?))).collect::<Result<_>>()?;
            let got = bits(&linear(&x)?);
            assert_eq!(got, alone.concat(), "[{n}, {inner}] by [{outer}, {inner}] on {instructions:?}");
            results.push(got);
        }
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "[{n}, {inner}] by [{outer}, {inner}]");
    }
    Ok(())
}
