use candle_core::{DType, Device};

use super::*;
use crate::simd::Instructions;
use crate::simd::tests::{available, on};
use crate::testing::{Random, assert_close, values};

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
            let want = bits(&linear(&x, &matrix)?.broadcast_add(&bias)?);
            assert_eq!(bits(&linear_with_bias(&x, &matrix, &bias)?), want, "{format:?}, {n} rows");
            assert!(linear_with_bias(&x, &matrix, &bias.narrow(0, 0, 69)?).is_err());
            assert!(linear_with_bias(&x, &matrix, &bias.to_dtype(DType::BF16)?).is_err());
        }
    }
    Ok(())
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
    let error = matrix.rows(&Tensor::new(&[4u32], &Device::Cpu)?).expect_err("4 rows").to_string();
    assert!(error.contains("row 4, there are 4"), "{error}");
    let nan = |_: usize, values: &mut [f32]| values.fill(f32::NAN);
    assert!(QuantizedMatrix::pack(Quantization::Q8, [4, 5], nan).is_err());
    Ok(())
}
