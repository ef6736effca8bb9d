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

fn random_draw(random: &mut Random) -> Draw {
    let mut uniform = || random.below(1000) as f32 / 1000.0;
    Draw {
        temperature: 0.2 + 2.0 * uniform(),
        top_k: 1 + (uniform() * MAX_K as f32) as usize,
        top_p: if uniform() < 0.3 { 1.0 } else { 0.05 + 0.95 * uniform() },
        min_p: if uniform() < 0.5 { 0.0 } else { 0.3 * uniform() },
        position: uniform(),
    }
}

#[test]
fn draws_by_hand() -> Result<()> {
    let row = [3.0f32.ln(), 0.0, 2.0f32.ln(), f32::NEG_INFINITY, 3.0f32.ln()]; // weights 1, 1/3, 2/3, 0, 1
    let all = Draw { temperature: 1.0, top_k: MAX_K, top_p: 1.0, min_p: 0.0, position: 0.0 };
    let cases = [
        (all, 0),
        (Draw { position: 0.32, ..all }, 0),
        (Draw { position: 0.34, ..all }, 1),
        (Draw { position: 0.45, ..all }, 2),
        (Draw { position: 0.67, ..all }, 4),
        (Draw { position: 0.999, ..all }, 4),
        (Draw { top_k: 1, position: 0.999, ..all }, 0),
        (Draw { top_k: 2, position: 0.51, ..all }, 4),
        (Draw { top_k: 3, position: 0.4, ..all }, 2),
        (Draw { top_p: 0.3, position: 0.999, ..all }, 0),
        (Draw { top_p: 0.5, position: 0.49, ..all }, 0),
        (Draw { top_p: 0.5, position: 0.51, ..all }, 4),
        (Draw { min_p: 0.5, position: 0.39, ..all }, 2),
        (Draw { min_p: 0.34, position: 0.36, ..all }, 0),
        (Draw { temperature: 0.5, min_p: 0.5, position: 0.51, ..all }, 4),
        (Draw::MOST_LIKELY, 0),
    ];
    for device in devices() {
        let x = Tensor::from_vec(row.repeat(cases.len()), (cases.len(), row.len()), &device)?;
        let draws = Draws::new(&cases.map(|(draw, _)| draw), &device)?;
        assert_eq!(sample(&x, row.len(), &draws)?.to_vec1::<u32>()?, cases.map(|(_, token)| token), "{device:?}");
    }
    Ok(())
}

/// A device's exponential may move a draw that falls next to an edge: rarely, and no further than to a neighbour.
#[test]
fn draws_are_those_of_the_host() -> Result<()> {
    const ROWS: usize = 40;
    let mut random = Random::new(5);
    for device in devices() {
        for dtype in [DType::F32, DType::BF16] {
            for (width, limit) in [(3, 3), (64, 63), (4096, 4000), (5000, 4097), (152_000, 151_936), (262_144, 262_144)]
            {
                let x = random.tensor(&[ROWS, width], 3.0, dtype, &device)?;
                let host: Vec<Draw> = (0..ROWS).map(|_| random_draw(&mut random)).collect();
                let mut draws = Draws::new(&[Draw::MOST_LIKELY; ROWS], &device)?;
                let got: Vec<u32> = sample(&x, limit, &draws)?.to_vec1()?;
                assert_eq!(got, argmax(&x, limit)?.to_vec1::<u32>()?, "{limit} of {width} {device:?}");
                draws.refill(&host)?;
                let got: Vec<u32> = sample(&x, limit, &draws)?.to_vec1()?;
                let want: Vec<u32> = rows(&x, limit)?.iter().zip(&host).map(|(row, draw)| drawn(row, draw)).collect();
                let others = got.iter().zip(&want).filter(|(got, want)| got != want).count();
                assert!(others <= 1, "{others} of {ROWS} differ: {limit} of {width} {dtype:?} {device:?}");
            }
        }
    }
    Ok(())
}

#[test]
fn rows_without_a_choice_draw_nothing() -> Result<()> {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    for device in devices() {
        let x = Tensor::new(&[[0f32, nan, 1.0], [inf, 0.0, 1.0], [-inf, -inf, -inf], [-inf, -1.0, -inf]], &device)?;
        let all = Draw { top_k: MAX_K, position: 0.5, ..Draw::MOST_LIKELY };
        let draws = Draws::new(&[all; 4], &device)?;
        assert_eq!(sample(&x, 3, &draws)?.to_vec1::<u32>()?, [NOTHING, NOTHING, NOTHING, 1], "{device:?}");
        assert!(sample(&x, 3, &Draws::new(&[all; 3], &device)?).is_err());
    }
    assert!(Draws::new(&[Draw { top_k: MAX_K + 1, ..Draw::MOST_LIKELY }], &Device::Cpu).is_err());
    Ok(())
}
