use candle_core::{DType, Device};

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated, suspended};
use crate::norm::Norm;
use crate::simd::Instructions;
use crate::simd::amx::tests::with_tiles;
use crate::simd::tests::{alone, available, on};
use crate::testing::{Random, assert_close, devices, poisoned, values};

const FORMATS: [Quantization; 2] = [Quantization::Q8, Quantization::Q4];

/// A weight with its values after packing.
fn packed(
    format: Quantization,
    [outer, inner]: [usize; 2],
    random: &mut Random,
) -> (Vec<f32>, QuantizedMatrix, Vec<f32>) {
    let weight: Vec<f32> = (0..outer * inner).map(|_| random.normal(0.05)).collect();
    let row = |o: usize, values: &mut [f32]| values.copy_from_slice(&weight[o * inner..][..inner]);
    let matrix = QuantizedMatrix::pack(format, [outer, inner], row).expect("finite");
    let ids = Tensor::arange(0, outer as u32, &Device::Cpu).expect("ids");
    let unpacked = values(&matrix.rows(&ids).expect("rows")).expect("f32");
    (weight, matrix, unpacked)
}

fn bits(tensor: &Tensor) -> Vec<u32> {
    values(tensor).expect("a float tensor").into_iter().map(f32::to_bits).collect()
}

#[test]
fn hand_computed() -> Result<()> {
    let row = |_: usize, values: &mut [f32]| values.copy_from_slice(&[1.27, -0.635, 0.0, 1.0]);
    let matrix = QuantizedMatrix::pack(Quantization::Q8, [1, 4], row)?;
    // 1.27 / 127 lies between the bf16 0.0099487 and 0.010010.
    let scale = 0.010_009_766;
    let first = Tensor::new(&[0u32], &Device::Cpu)?;
    assert_eq!(matrix.rows(&first)?.to_vec2::<f32>()?, [[127.0 * scale, -63.0 * scale, 0.0, 100.0 * scale]]);
    let row = |_: usize, values: &mut [f32]| values.copy_from_slice(&[-1.0, 0.0, 0.5, 14.0]);
    let matrix = QuantizedMatrix::pack(Quantization::Q4, [1, 4], row)?;
    assert_eq!(matrix.rows(&first)?.to_vec2::<f32>()?, [[-1.0, 0.0, 1.0, 14.0]]);
    let x = Tensor::new(&[[127f32, 1.0, 0.4, -2.0]], &Device::Cpu)?;
    assert_eq!(linear(&x, &matrix)?.to_vec2::<f32>()?, [[-127.0 - 28.0]]);
    Ok(())
}

#[test]
fn a_new_packing_has_a_new_version() {
    let row = |o: usize, values: &mut [f32]| {
        values.iter_mut().enumerate().for_each(|(i, value)| *value = ((i * 31 + o * 17) % 97) as f32 * 0.37 - 20.0);
    };
    let hash = |format| {
        let matrix = QuantizedMatrix::pack(format, [70, 200], row).expect("finite");
        let fnv = |hash: u64, &byte: &u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        matrix.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, fnv)
    };
    assert_eq!((PACKING_VERSION, FORMATS.map(hash)), (2, [4_803_288_813_395_506_485, 2_321_739_149_130_981_245]));
}

#[test]
fn the_error_of_a_weight_is_as_stated() {
    for (format, limit) in [(Quantization::Q8, 0.007), (Quantization::Q4, 0.09)] {
        let (weight, matrix, unpacked) = packed(format, [64, 1024], &mut Random::new(1));
        assert_close(&format!("{format:?}"), &unpacked, &weight, limit);
        assert_eq!(matrix.bytes(), format.bytes([64, 1024]));
        let bits = matrix.bytes() as f64 * 8.0 / weight.len() as f64;
        assert_eq!(bits, if format == Quantization::Q8 { 8.25 } else { 4.5 });
    }
}

#[test]
fn no_weight_is_cut_and_zero_stays() {
    let row = |o: usize, values: &mut [f32]| {
        values.iter_mut().enumerate().for_each(|(i, value)| *value = ((i + o) as f32 - 20.0) * 0.37);
        let first = values[0];
        values[..32].fill(if o == 3 { 0.0 } else { first });
    };
    for format in FORMATS {
        let matrix = QuantizedMatrix::pack(format, [9, 100], row).expect("finite");
        let mut want = [0.0; 100];
        for o in 0..9 {
            row(o, &mut want);
            let mut got = [0.0; 100];
            matrix.unpack(o, &mut got);
            for (group, (got, want)) in got.chunks(GROUP).zip(want.chunks(GROUP)).enumerate() {
                let range =
                    want.iter().fold(0f32, |m, w| m.max(w.abs())) * if format == Quantization::Q8 { 1.0 } else { 2.0 };
                let step = range / if format == Quantization::Q8 { 127.0 } else { 15.0 };
                let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f32::max);
                assert!(worst <= step * 0.52, "{format:?} row {o} group {group}: off by {worst}, a step is {step}");
            }
        }
    }
}

#[test]
fn products_are_the_reference() -> Result<()> {
    let mut random = Random::new(2);
    for format in FORMATS {
        for (n, inner, outer) in [
            (1, 1, 1),
            (2, 7, 3),
            (3, 32, 8),
            (4, 33, 9),
            (5, 64, 17),
            (6, 65, 129),
            (7, 128, 32),
            (9, 100, 33),
            (67, 1000, 40),
        ] {
            let (_, matrix, unpacked) = packed(format, [outer, inner], &mut random);
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let x = random.tensor(&[n, inner], 1.0, dtype, &Device::Cpu)?;
                let want = reference::linear(&values(&x)?, &unpacked, inner, outer);
                let limit = crate::testing::op_limit(dtype);
                let name = format!("{format:?} [{n}, {inner}] {dtype:?} by [{outer}, {inner}]");
                for instructions in available() {
                    let got = on(instructions, || linear(&x, &matrix))?;
                    assert_eq!((got.dims(), got.dtype()), (&[n, outer][..], dtype));
                    assert_close(&format!("{name} on {instructions:?}"), &values(&got)?, &want, limit);
                }
            }
        }
    }
    Ok(())
}

/// The bias is added before the one rounding.
#[test]
fn a_bias_is_added_to_the_product() -> Result<()> {
    let mut random = Random::new(6);
    for format in FORMATS {
        let (_, matrix, _) = packed(format, [70, 100], &mut random);
        for n in [1, 5] {
            let x = random.tensor(&[n, 100], 1.0, DType::F32, &Device::Cpu)?;
            let bias = random.tensor(&[70], 1.0, DType::F32, &Device::Cpu)?;
            let with_bias = |bias: &Tensor| linear_around(&x, &matrix, Some(bias), Around::default());
            let want = bits(&linear(&x, &matrix)?.broadcast_add(&bias)?);
            assert_eq!(bits(&with_bias(&bias)?), want, "{format:?}, {n} rows");
            assert!(with_bias(&bias.narrow(0, 0, 69)?).is_err());
            assert!(with_bias(&bias.to_dtype(DType::BF16)?).is_err());
        }
    }
    Ok(())
}

/// To the last bit, whatever reads the rows.
#[test]
fn what_comes_before_a_product_is_the_op_by_itself() -> Result<()> {
    let mut random = Random::new(7);
    for (format, inner) in FORMATS.into_iter().flat_map(|format| [(format, 192), (format, 100), (format, 7)]) {
        let (_, matrix, _) = packed(format, [70, inner], &mut random);
        let weight = random.tensor(&[inner], 1.0, DType::F32, &Device::Cpu)?;
        let norm = Norm { weight: &weight, eps: 1e-6 };
        let bias = random.tensor(&[70], 1.0, DType::F32, &Device::Cpu)?;
        for (n, dtype) in [1, 5, 50].into_iter().flat_map(|n| [DType::F32, DType::F16, DType::BF16].map(|d| (n, d))) {
            let x = random.tensor(&[n, 2 * inner], 2.0, dtype, &Device::Cpu)?;
            let (onto, bias) = (random.tensor(&[n, 70], 1.0, dtype, &Device::Cpu)?, bias.to_dtype(dtype)?);
            let (bias, onto) = (Some(&bias), Some(&onto));
            let check = || {
                for activation in [Activation::Silu, Activation::GeluTanh] {
                    let got = linear_gated(&x, activation, &matrix, bias, onto)?;
                    let gated = gated_activation(&x, activation)?;
                    let want = linear_around(&gated, &matrix, bias, Around { onto, ..Around::default() })?;
                    assert!(bits(&got) == bits(&want), "{format:?} [{n}, 2 x {inner}] {dtype:?} {activation:?}");
                }
                let x = x.narrow(1, 0, inner)?;
                let normed = Around { norm: Some(norm), onto, ..Around::default() };
                let got = linear_around(&x, &matrix, bias, normed)?;
                let want = linear_around(&norm.apply(&x)?, &matrix, bias, Around { onto, ..Around::default() })?;
                assert!(bits(&got) == bits(&want), "{format:?} [{n}, {inner}] {dtype:?} normed");
                Result::Ok(())
            };
            alone(|| available().into_iter().try_for_each(|instructions| on(instructions, check)))?;
            alone(|| with_tiles(check))?;
        }
    }
    Ok(())
}

/// A product and a look-up on Metal, where activations are not rounded, by a part of a weight of NaN's neighbours.
fn run_on_metal(
    format: Quantization,
    (n, inner, outer): (usize, usize, usize),
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let mut random = Random::new((n * inner + outer) as u64);
    let (_, matrix, unpacked) = suspended(|| packed(format, [outer, inner], &mut random));
    let matrix = matrix.uploaded(device)?;
    let frame = poisoned(&[n, 3], dtype, device)?;
    let x = random.tensor(&[n, inner], 1.0, dtype, device)?;
    let x = Tensor::cat(&[&frame, &x, &frame], 1)?.narrow(1, 3, inner)?;
    let want: Vec<f32> = values(&x)?
        .chunks(inner)
        .flat_map(|x| unpacked.chunks(inner).map(move |w| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>()))
        .collect();
    let got = linear(&x, &matrix)?;
    assert_eq!((got.dims(), got.dtype()), (&[n, outer][..], dtype));
    let name = format!("{format:?} [{n}, {inner}] {dtype:?} by [{outer}, {inner}]");
    assert_close(&name, &values(&got)?, &want, crate::testing::op_limit(dtype));
    let ids: Vec<u32> = (0..2 * outer as u32).map(|i| (i * 7 + 3) % outer as u32).collect();
    let rows = matrix.rows(&Tensor::from_vec(ids.clone(), 2 * outer, device)?.narrow(0, 1, 2 * outer - 1)?)?;
    let want: Vec<f32> = ids[1..].iter().flat_map(|&id| &unpacked[id as usize * inner..][..inner]).copied().collect();
    assert_eq!(values(&rows)?, want, "rows of {name}");
    Ok(())
}

#[test]
fn metal_products_are_those_of_unpacked_weights() -> Result<()> {
    let shapes =
        [(1, 1, 1), (2, 7, 3), (3, 32, 8), (4, 33, 9), (5, 64, 17), (8, 65, 129), (9, 100, 33), (67, 300, 140)];
    let run = |device: &Device| {
        for format in FORMATS {
            for (i, shape) in shapes.into_iter().enumerate() {
                run_on_metal(format, shape, DType::F32, device)?;
                run_on_metal(format, shape, if i % 2 == 0 { DType::F16 } else { DType::BF16 }, device)?;
            }
        }
        Ok(())
    };
    devices().iter().filter(|device| device.is_metal()).try_for_each(run)?;
    emulated(|| run(&Device::Cpu))
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for format in FORMATS {
        run_on_metal(format, (3, 650, 70), DType::F32, &Device::Cpu)?;
        run_on_metal(format, (1, 100, 33), DType::F32, &Device::Cpu)?;
    }
    Ok(())
}

/// More rows than one pass serves: tiles.
fn tiles_smoke() -> Result<()> {
    FORMATS.into_iter().try_for_each(|format| run_on_metal(format, (35, 100, 70), DType::F32, &Device::Cpu))
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n  const uint out", "  const uint out"),
        ("g += QUANTIZED_SIMDGROUPS", "g += QUANTIZED_SIMDGROUPS + 1"),
        ("first + 4 * i + j < inner", "true"),
        ("W::minimum(block, lane) * totals[r]", "0"),
        ("W::scale(block, lane) * products[r]", "products[r]"),
        ("i < QUANTIZED_SIMDGROUPS", "i + 1 < QUANTIZED_SIMDGROUPS"),
        ("min(first_row + r, sizes.rows - 1)", "first_row"),
        ("out < sizes.outer && first_row", "first_row"),
        ("ids[at.y]", "at.y"),
        ("(i % 2 * 4)", "(i % 2)"),
        ("factor(block + 8 * PANEL, PANEL + lane)", "factor(block + 8 * PANEL, lane)"),
        ("as_type<char4>", "as_type<uchar4>"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn mutants_of_tiles_on_metal_are_noticed() {
    let mutants = [
        ("step += STEP) {\n    threadgroup_barrier(mem_flags::mem_threadgroup);", "step += STEP) {"),
        ("= four[j];\n    }\n    threadgroup_barrier(mem_flags::mem_threadgroup);", "= four[j];\n    }"),
        ("step + column < inner) {", "true) {"),
        ("first_out + out < outer && step", "step"),
        ("simdgroup / 2 * ROW_PARTS", "simdgroup % 2 * ROW_PARTS"),
        ("row >= end", "row > end"),
        ("if (out < outer)", "if (out <= outer)"),
        ("c < STEP; c += SIDE", "c < STEP; c += 2 * SIDE"),
        ("(own_out + o * SIDE + part_x)", "(own_out + o * SIDE + part_y)"),
        ("group.x * TILE_OUTS", "0"),
    ];
    assert_mutants_fail(&crate::linear::metal::PRODUCTS, &mutants, tiles_smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
    assert_wrong_launches_fail(tiles_smoke);
}

/// Activations and codes at their limits: sums of products must not overflow.
#[test]
fn the_largest_codes_add_up() -> Result<()> {
    for format in FORMATS {
        for sign in [1.0, -1.0] {
            let row = |_: usize, values: &mut [f32]| {
                values.iter_mut().enumerate().for_each(|(i, value)| *value = if i == 0 { 0.0 } else { sign })
            };
            let matrix = QuantizedMatrix::pack(format, [8, 128], row)?;
            let x = Tensor::full(-1f32, (4, 128), &Device::Cpu)?;
            let mut unpacked = [0.0; 128];
            matrix.unpack(0, &mut unpacked);
            let want = -unpacked.iter().sum::<f32>();
            for instructions in available() {
                let got = on(instructions, || linear(&x, &matrix))?;
                assert_close(&format!("{format:?} on {instructions:?}"), &values(&got)?, &[want; 32], 1e-5);
            }
        }
    }
    Ok(())
}

#[test]
fn a_group_of_zeros_adds_nothing() -> Result<()> {
    let mut random = Random::new(5);
    for format in FORMATS {
        let (_, matrix, unpacked) = packed(format, [40, 2 * GROUP], &mut random);
        let mut x = vec![0f32; 3 * 2 * GROUP];
        x[2 * GROUP + GROUP] = 1.0;
        let x = Tensor::from_vec(x, (3, 2 * GROUP), &Device::Cpu)?;
        for instructions in available() {
            let got = values(&on(instructions, || linear(&x, &matrix))?)?;
            let want = |o: usize| unpacked[o * 2 * GROUP + GROUP];
            for o in 0..40 {
                assert_eq!((got[o], got[80 + o]), (0.0, 0.0), "{format:?} on {instructions:?}");
                assert!((got[40 + o] - want(o)).abs() <= 1e-5, "{format:?} on {instructions:?}");
            }
        }
    }
    Ok(())
}

/// Sums of products are integers and the rest is fused alike.
#[test]
fn instruction_sets_that_fuse_agree_to_the_bit() -> Result<()> {
    let mut random = Random::new(5);
    for format in FORMATS {
        let (_, matrix, _) = packed(format, [70, 300], &mut random);
        let x = random.tensor(&[3, 300], 1.0, DType::F32, &Device::Cpu)?;
        let fused = available().filter(|&instructions| instructions > Instructions::Portable);
        let results: Vec<_> = fused.map(|set| Ok(bits(&on(set, || linear(&x, &matrix))?))).collect::<Result<_>>()?;
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{format:?}");
    }
    Ok(())
}

/// Sums within a group are integers there too.
#[test]
fn amx_agrees_to_the_bit() -> Result<()> {
    let mut random = Random::new(8);
    let widest = available().last().expect("there is one");
    for format in FORMATS {
        for (inner, outer) in [(300, 70), (64, 3), (513, 33)] {
            let (_, matrix, _) = packed(format, [outer, inner], &mut random);
            for rows in [31, 32, 33, 48, 90] {
                let x = random.tensor(&[rows, inner], 1.0, DType::F32, &Device::Cpu)?;
                let want = bits(&on(widest, || linear(&x, &matrix))?);
                for threads in [1, 3] {
                    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                    let got = bits(&pool.install(|| with_tiles(|| linear(&x, &matrix)))?);
                    assert_eq!(got, want, "{format:?} [{rows}, {inner}] by {outer}, {threads} threads");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_row_does_not_depend_on_the_others_or_on_threads() -> Result<()> {
    let mut random = Random::new(3);
    for format in FORMATS {
        let (_, matrix, _) = packed(format, [70, 300], &mut random);
        let x = random.tensor(&[40, 300], 1.0, DType::F32, &Device::Cpu)?;
        let alone: Vec<Vec<u32>> =
            (0..40).map(|row| Ok(bits(&linear(&x.narrow(0, row, 1)?, &matrix)?))).collect::<Result<_>>()?;
        for rows in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 40] {
            for threads in [1, 3] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
                let got = bits(&pool.install(|| linear(&x.narrow(0, 40 - rows, rows)?, &matrix))?);
                assert_eq!(got, alone[40 - rows..].concat(), "{format:?}, {rows} rows, {threads} threads");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (_, matrix, _) = packed(Quantization::Q8, [4, 5], &mut Random::new(4));
    let x = Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?;
    let error = linear(&x, &matrix).expect_err("3 is not 5").to_string();
    assert!(error.contains("quantized linear: weight is [4, 5], expected [O, 3]"), "{error}");
    let gated = |width: usize| {
        let x = Tensor::zeros((2, width), DType::F32, &Device::Cpu)?;
        linear_gated(&x, Activation::Silu, &matrix, None, None)
    };
    assert!(gated(10).is_ok());
    let error = gated(11).expect_err("no half of 11").to_string();
    assert!(error.contains("x is [2, 11], expected [N, 2 I]"), "{error}");
    let error = gated(12).expect_err("6 is not 5").to_string();
    assert!(error.contains("weight is [4, 5], expected [O, 6]"), "{error}");
    let weight = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    let norm = Some(Norm { weight: &weight, eps: 0.0 });
    let x = Tensor::zeros((2, 5), DType::F32, &Device::Cpu)?;
    let error = linear_around(&x, &matrix, None, Around { norm, ..Around::default() });
    let error = error.expect_err("a weight for 4").to_string();
    assert!(error.contains("quantized linear: weight is [4]"), "{error}");
    let error = matrix.rows(&Tensor::new(&[4u32], &Device::Cpu)?).expect_err("4 rows").to_string();
    assert!(error.contains("row 4, there are 4"), "{error}");
    let nan = |_: usize, values: &mut [f32]| values.fill(f32::NAN);
    assert!(QuantizedMatrix::pack(Quantization::Q8, [4, 5], nan).is_err());
    Ok(())
}

/// On a GPU activations are not rounded: beside the product with the weight that packing leaves.
#[test]
fn products_on_a_gpu_are_those_of_the_unpacked_weight() -> Result<()> {
    let mut random = Random::new(6);
    for device in devices().into_iter().filter(Device::is_cuda) {
        for format in FORMATS {
            for (inner, outer) in [(1, 1), (8, 3), (64, 32), (72, 33), (100, 40), (1000, 70), (3072, 100), (12288, 40)]
            {
                let (_, matrix, unpacked) = packed(format, [outer, inner], &mut random);
                let weight = Tensor::from_vec(unpacked, (outer, inner), &Device::Cpu)?;
                let matrix = matrix.to_device(&device)?;
                assert_eq!((matrix.dims(), matrix.format()), ([outer, inner], format));
                let ids = Tensor::new(&[0u32, outer as u32 - 1, outer as u32 / 2], &device)?;
                let want = weight.index_select(&ids.to_device(&Device::Cpu)?, 0)?;
                assert_eq!(values(&matrix.rows(&ids)?)?, values(&want)?, "{format:?} [{outer}, {inner}]");
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    for rows in [1, 2, 3, 7, 8, 9, 16, 17, 64, 65] {
                        let x = random.tensor(&[rows, inner + 16], 1.0, dtype, &device)?.narrow(1, 8, inner)?;
                        let bias = random.tensor(&[outer], 1.0, dtype, &device)?;
                        let onto = random.tensor(&[rows, outer], 1.0, dtype, &device)?;
                        let exact = |x: &Tensor| x.to_device(&Device::Cpu)?.to_dtype(DType::F32);
                        let plain = exact(&x)?.matmul(&weight.t()?)?;
                        let name = format!("{format:?} [{rows}, {inner}] {dtype:?} by {outer}");
                        let limit = crate::testing::op_limit(dtype);
                        assert_close(&name, &values(&linear(&x, &matrix)?)?, &values(&plain)?, limit);
                        let around = Around { onto: Some(&onto), ..Around::default() };
                        let got = linear_around(&x, &matrix, Some(&bias), around)?;
                        let want = (plain.broadcast_add(&exact(&bias)?)? + exact(&onto)?)?;
                        assert_close(&name, &values(&got)?, &values(&want)?, limit);
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_surrounds_a_product_on_a_gpu_is_as_on_the_cpu() -> Result<()> {
    let mut random = Random::new(7);
    for device in devices().into_iter().filter(Device::is_cuda) {
        // Halves that end within a panel, few panels, more than there are multiprocessors, with more and fewer groups than
        // warps.
        let shapes = [(80, 64), (128, 1600), (12800, 136)];
        for (i, (rows, (outer, inner))) in [1, 5, 13, 20].into_iter().flat_map(|n| shapes.map(|s| (n, s))).enumerate() {
            let (_, matrix, unpacked) = packed(FORMATS[i / shapes.len() % 2], [outer, inner], &mut random);
            let dense = Tensor::from_vec(unpacked, (outer, inner), &device)?.to_dtype(DType::BF16)?;
            let matrix = matrix.to_device(&device)?;
            let x = random.tensor(&[rows, inner], 1.0, DType::BF16, &device)?;
            let weight = random.tensor(&[inner], 1.0, DType::F32, &device)?;
            let (wide, narrow) = (
                random.tensor(&[rows, outer], 1.0, DType::BF16, &device)?,
                random.tensor(&[rows, outer / 2], 1.0, DType::BF16, &device)?,
            );
            for (gate, onto) in [(None, &wide), (Some(crate::activation::Activation::Silu), &narrow)] {
                let norm = Some(crate::norm::Norm { weight: &weight, eps: 1e-6 });
                let around = Around { norm, gate, onto: Some(onto) };
                let got = values(&linear_around(&x, &matrix, None, around)?)?;
                let want = values(&around.apply(&x, |x| x.matmul(&dense.t()?))?)?;
                assert_close(&format!("{rows} rows of {inner} by {outer}, {gate:?}"), &got, &want, 1e-2);
            }
        }
    }
    Ok(())
}
