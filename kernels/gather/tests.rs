//! Rows of a table on every device present, by hand.

use candle_core::{Device, Tensor};

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated, emulator};
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
        if device.is_cpu() && emulator().is_none() {
            assert!(got.is_err());
        } else {
            assert_eq!(values(&got?)?, [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
        }
    }
    Ok(())
}

#[test]
fn metal_kernel_takes_the_same_rows() -> Result<()> {
    emulated(|| {
        rows_are_those_of_the_table()?;
        an_id_beyond_the_table_reads_nothing()
    })
}

/// Columns of a table, more of them than threads, by ids at an offset, one of which is beyond it.
fn smoke() -> Result<()> {
    let table = Random::new(1).tensor(&[7, 300], 1.0, DType::F32, &Device::Cpu)?;
    let ids = Tensor::new(&[9u32, 6, 0, 2, 2, 7, 5], &Device::Cpu)?.narrow(0, 1, 6)?;
    let got = values(&gather_columns(&table, 5..297, &ids)?)?;
    let rows = table.to_vec2::<f32>()?;
    let want: Vec<f32> = [6, 0, 2, 2, 7, 5]
        .iter()
        .flat_map(|&id| rows.get(id).map_or([0.0; 292].as_slice(), |row| &row[5..297]).to_vec())
        .collect();
    assert_eq!(got, want);
    Ok(())
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("ulong(id) * sizes.stride", "ulong(id) * sizes.width"),
        ("ulong(group.x) * sizes.width", "ulong(group.x) * sizes.stride"),
        ("i < sizes.width", "i + 1 < sizes.width"),
        ("i += threads.x", "i += threads.x + 1"),
        ("id < sizes.rows ?", "id <= sizes.rows ?"),
        ("ids[group.x]", "ids[0]"),
        ("uint i = index", "uint i = index + 1"),
        ("from[i] : T(0.0f)", "from[i] : from[0]"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}
