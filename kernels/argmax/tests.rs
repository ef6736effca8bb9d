//! The most likely token on every device: ties, limits, and rows that leave nothing to choose from.

use candle_core::Device;

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
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
fn metal_kernels_agree() -> Result<()> {
    emulated(|| {
        hand_computed()?;
        long_rows_and_their_limit()
    })
}

/// Rows of several threadgroups, one of which lies at an offset.
fn smoke() -> Result<()> {
    let mut random = Random::new(2);
    let (n, width) = (3, 9000);
    let rows = random.tensor(&[n + 1, width], 1.0, DType::F32, &Device::Cpu)?;
    let rows = (rows + 5.0)?.narrow(0, 1, n)?;
    let want: Vec<u32> = rows.narrow(1, 0, width - 1)?.to_vec2()?.iter().map(|row| largest(row)).collect();
    assert_eq!(argmax(&rows, width - 1)?.to_vec1::<u32>()?, want);
    // By the last simdgroup of a threadgroup.
    let peak: Vec<f32> = (0..2 * width).map(|i| if i % width == 255 { 9.0 } else { 0.0 }).collect();
    assert_eq!(argmax(&Tensor::from_vec(peak, (2, width), &Device::Cpu)?, width)?.to_vec1::<u32>()?, [255; 2]);
    // The largest is the last that counts, in the last threadgroup.
    let ends = Tensor::from_vec((0..2 * width).map(|i| i as f32).collect(), (2, width), &Device::Cpu)?;
    assert_eq!(argmax(&ends, width - 1)?.to_vec1::<u32>()?, [width as u32 - 2; 2]);
    for (value, last) in [(0.0, 0.0), (f32::NEG_INFINITY, f32::NAN)] {
        let equal =
            Tensor::cat(&[Tensor::full(value, (1, 40), &Device::Cpu)?, Tensor::full(last, (1, 1), &Device::Cpu)?], 1)?;
        let want = if value == 0.0 { 0 } else { NOTHING };
        assert_eq!(argmax(&equal, 41)?.to_vec1::<u32>()?, [want]);
        assert_eq!(argmax(&equal, 40)?.to_vec1::<u32>()?, [want]);
    }
    Ok(())
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n  if (index", "  if (index"),
        ("uint2(ordered, ~index)", "uint2(ordered, index)"),
        ("bits >> 31 != 0 ? 0xffffffff : 0x80000000", "0x80000000"),
        ("isnan(value) || value == INFINITY", "value == INFINITY"),
        ("ulong(group.y) * sizes.stride", "ulong(group.y) * sizes.count"),
        ("i < sizes.count", "i + 1 < sizes.count"),
        ("i < threads.x / LANES", "i + 1 < threads.x / LANES"),
        ("step = LANES / 2", "step = LANES / 4"),
        ("best.x > 0x007fffff", "true"),
        ("ulong(group.x) * threadgroups * 2", "0"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

#[test]
fn limits_outside_the_row_are_refused() -> Result<()> {
    let x = Tensor::zeros((1, 4), DType::F32, &Device::Cpu)?;
    assert!(argmax(&x, 0).is_err() && argmax(&x, 5).is_err() && argmax(&x.to_dtype(DType::U32)?, 4).is_err());
    Ok(())
}
