//! The most likely token on every device: ties, limits, and rows that leave nothing to choose from.

use candle_core::Device;

use super::*;
use crate::testing::{Random, devices};

fn of(rows: &[&[f32]], limit: usize, dtype: DType, device: &Device) -> Result<Vec<u32>> {
    let width = rows[0].len();
    let x = Tensor::from_vec(rows.concat(), (rows.len(), width), device)?.to_dtype(dtype)?;
    argmax(&x, limit)?.to_vec1()
}

#[test]
fn hand_computed() -> Result<()> {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let rows: [&[f32]; 7] = [
                &[0.0, -1.0, 2.0, 2.0, 9.0],
                &[-3.0, -1.0, -2.0, -inf, 9.0],
                &[-0.0, -inf, -inf, -inf, 9.0],
                &[0.0, nan, 2.0, 1.0, 9.0],
                &[0.0, inf, 2.0, 1.0, 9.0],
                &[-inf, -inf, -inf, -inf, 9.0],
                &[0.0, 1.0, 2.0, 1.0, nan],
            ];
            let want = [2, 1, 0, NOTHING, NOTHING, NOTHING, 2];
            assert_eq!(of(&rows, 4, dtype, &device)?, want, "{dtype:?} {device:?}");
        }
    }
    Ok(())
}

#[test]
fn long_rows_and_their_limit() -> Result<()> {
    let mut random = Random::new(1);
    for device in devices() {
        for width in [1, 31, 257, 5000, 200_000] {
            let rows: Vec<Vec<f32>> = (0..3).map(|_| (0..width).map(|_| random.normal(1.0)).collect()).collect();
            for limit in [1, width / 2 + 1, width] {
                let want: Vec<u32> = rows.iter().map(|row| largest(&row[..limit])).collect();
                let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
                assert_eq!(of(&rows, limit, DType::F32, &device)?, want, "{limit} of {width} {device:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn limits_outside_the_row_are_refused() -> Result<()> {
    let x = Tensor::zeros((1, 4), DType::F32, &Device::Cpu)?;
    assert!(argmax(&x, 0).is_err() && argmax(&x, 5).is_err() && argmax(&x.to_dtype(DType::U32)?, 4).is_err());
    Ok(())
}
