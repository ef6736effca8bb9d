//! Rows of a table on every device present, by hand.

use candle_core::Tensor;

use super::*;
use crate::testing::{Random, devices, values};

#[test]
fn rows_are_those_of_the_table() -> Result<()> {
    const ROWS: usize = 11;
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for d in [1, 2, 7, 64, 1000, 4104] {
                let table = Random::new(d as u64).tensor(&[ROWS, d + 8], 1.0, dtype, &device)?;
                for start in [0, 3, 8] {
                    let all = values(&table.narrow(1, start, d)?)?;
                    for ids in [&[0u32, 10, 3, 3, 7][..], &[5]] {
                        let got = gather_columns(&table, start..start + d, &Tensor::new(ids, &device)?)?;
                        assert_eq!((got.dims(), got.dtype()), (&[ids.len(), d][..], dtype));
                        let want: Vec<f32> = ids.iter().flat_map(|&id| &all[id as usize * d..][..d]).copied().collect();
                        assert_eq!(values(&got)?, want, "{dtype:?} {d} from {start} {device:?}");
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_id_beyond_the_table_reads_nothing() -> Result<()> {
    for device in devices() {
        let table = Tensor::ones((3, 4), DType::F32, &device)?;
        let got = gather(&table, &Tensor::new(&[1u32, 3], &device)?);
        if device.is_cpu() {
            assert!(got.is_err());
        } else if device.is_cuda() {
            assert_eq!(values(&got?)?, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        }
    }
    Ok(())
}
