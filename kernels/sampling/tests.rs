//! The choice of tokens on every device: ties, limits, draws, and rows that leave nothing to choose from.

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
        long_rows_and_their_limit()?;
        draws_by_hand()?;
        rows_without_a_choice_draw_nothing()?;
        let sizes = [(3, 3), (64, 63), (513, 512), (5000, 4097), (20_000, 19_000)];
        draws_agree(12, &sizes, &Device::Cpu)?;
        draws_agree(2, &[(262_144, 262_144)], &Device::Cpu)
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
        ("key.x > 0x007fffff", "true"),
        ("ulong(group.x) * threadgroups * 2", "0"),
    ];
    assert_mutants_fail(&metal::ARGMAX, &mutants, smoke);
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

#[test]
fn draws_are_those_of_the_host() -> Result<()> {
    let sizes = [(3, 3), (64, 63), (4096, 4000), (5000, 4097), (152_000, 151_936), (262_144, 262_144)];
    devices().iter().try_for_each(|device| draws_agree(40, &sizes, device))
}

/// For rows of which so many values take part. A device's exponential may move a draw that falls next to an edge:
/// rarely, and no further than to a neighbour.
fn draws_agree(rows: usize, sizes: &[(usize, usize)], device: &Device) -> Result<()> {
    let mut random = Random::new(5);
    for dtype in [DType::F32, DType::BF16] {
        for &(width, limit) in sizes {
            let x = random.tensor(&[rows, width], 3.0, dtype, device)?;
            let host: Vec<Draw> = (0..rows).map(|_| random_draw(&mut random)).collect();
            let mut draws = Draws::new(&vec![Draw::MOST_LIKELY; rows], device)?;
            let got: Vec<u32> = sample(&x, limit, &draws)?.to_vec1()?;
            assert_eq!(got, argmax(&x, limit)?.to_vec1::<u32>()?, "{limit} of {width} {device:?}");
            // Metal records nothing whose draws change.
            draws = if device.is_metal() { Draws::new(&host, device)? } else { draws.refill(&host).map(|()| draws)? };
            let got: Vec<u32> = sample(&x, limit, &draws)?.to_vec1()?;
            let want: Vec<u32> = self::rows(&x, limit)?.iter().zip(&host).map(|(row, draw)| drawn(row, draw)).collect();
            let others = got.iter().zip(&want).filter(|(got, want)| got != want).count();
            assert!(others <= 1, "{others} of {rows} differ: {limit} of {width} {dtype:?} {device:?}");
        }
    }
    Ok(())
}

/// Asserts that draws of `x` `[n, V]` in f32 are those of the host, whose exponential the emulator has.
fn assert_drawn(x: &Tensor, limit: usize, draws: &[Draw]) -> Result<()> {
    let want: Vec<u32> = rows(x, limit)?.iter().zip(draws).map(|(row, draw)| drawn(row, draw)).collect();
    assert_eq!(
        sample(x, limit, &Draws::new(draws, &Device::Cpu)?)?.to_vec1::<u32>()?,
        want,
        "{limit} of {:?}",
        x.dims()
    );
    Ok(())
}

/// Rows at an offset that several threadgroups share, in turns and not, with the largest value behind the limit; draws
/// at the edges of what is kept; weights that are lost in a sum of floats.
fn smoke_of_draws() -> Result<()> {
    let mut random = Random::new(7);
    for (n, width, limit) in [(16, 1200, 1100), (3, 9000, 8990), (6, 70, 64), (6, 50, 40)] {
        let x = random.tensor(&[n + 1, limit], 2.0, DType::F32, &Device::Cpu)?;
        let behind = Tensor::full(30f32, (n + 1, width - limit), &Device::Cpu)?;
        let draws: Vec<Draw> = (0..n).map(|_| random_draw(&mut random)).collect();
        assert_drawn(&Tensor::cat(&[x, behind], 1)?.narrow(0, 1, n)?, limit, &draws)?;
    }
    let all = Draw { temperature: 1.0, top_k: MAX_K, top_p: 1.0, min_p: 0.0, position: 0.0 };
    // One simdgroup has all of the best, and behind 32 of them another finds one: in its next turn, or in the last run.
    for last in [8240, 8150] {
        let value = |i| if i < 64 { i as f32 * -0.1 } else { -20.0 - i as f32 * 1e-3 };
        let x = (0..9000).map(|i| if i == last { -5.0 } else { value(i) }).collect();
        let even = Draw { temperature: 100.0, position: 0.999, ..all };
        assert_drawn(&Tensor::from_vec(x, (1, 9000), &Device::Cpu)?, 9000, &[even])?;
    }
    let mut edges =
        vec![Draw { min_p: 1.0, ..all }, Draw { position: 0.5, top_k: 2, ..all }, Draw { top_p: 0.0, ..all }];
    // A weight of one and 63 of 2^-25, in steps of two of them.
    edges.extend((1..30).map(|step| Draw { position: 1.0 - step as f32 * f32::EPSILON / 2.0, ..all }));
    edges.extend((1..30).map(|step| Draw {
        top_p: 1.0 - step as f32 * f32::EPSILON / 2.0,
        position: 0.9999999,
        ..all
    }));
    let lost = |i: usize| if i == 0 { 0.0 } else { -25.0 * std::f32::consts::LN_2 };
    let mut x: Vec<f32> = (0..edges.len() * 64).map(|i| lost(i % 64)).collect();
    x[64..66].fill(1.0);
    assert_drawn(&Tensor::from_vec(x, (edges.len(), 64), &Device::Cpu)?, 64, &edges)?;
    let nothing = Tensor::full(f32::NEG_INFINITY, (1, 70), &Device::Cpu)?;
    assert_drawn(&nothing, 70, &[all])
}

#[test]
fn mutants_of_draws_on_metal_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""),
        ("= index_of(own[n]);\n  }\n  simdgroup_barrier(mem_flags::mem_threadgroup);", "= index_of(own[n]);\n  }"),
        ("  simdgroup_barrier(mem_flags::mem_threadgroup); // all", "  // all"),
        ("= kept[n];\n  simdgroup_barrier(mem_flags::mem_threadgroup);", "= kept[n];"),
        ("(lane & distance) == 0) == falls", "(lane & distance) == 0)"),
        ("run.back = is_greater(run.front, back) ? back : run.front", "run.back = back"),
        ("(lane & size) == 0", "true"),
        ("((lane + LANES) & size) == 0", "(lane & size) == 0"),
        ("size <= LANES", "size < LANES"),
        ("distance = LANES / 2", "distance = LANES / 4"),
        ("simd_shuffle_xor(run.back", "simd_shuffle_xor(run.front"),
        ("simd_shuffle_xor(run.front, ushort(LANES - 1))", "run.front"),
        ("i < count ? key_of", "i <= count ? key_of"),
        ("ulong(group.y) * sizes.stride", "ulong(group.y) * sizes.count"),
        ("start += sizes.runs * BEST", "start += (sizes.runs + 1) * BEST"),
        ("|| is_greater(run.back, least)", ""),
        ("simd_shuffle(best.back, ushort(LANES - 1))", "simd_shuffle(best.front, ushort(LANES - 1))"),
        ("at < runs * BEST", "at + BEST < runs * BEST"),
        ("at < SIMDGROUPS * BEST", "at + BEST < SIMDGROUPS * BEST"),
        ("row[at + LANES]", "row[at]"),
        ("merged[at + LANES]", "merged[at]"),
        ("ulong(group.x) * runs * BEST", "0"),
        ("key.x > 0x007fffff", "true"),
        ("key.x >> 31 != 0 ? key.x ^ 0x80000000 : ~key.x", "key.x ^ 0x80000000"),
        ("i < draw.top_k", "i <= draw.top_k"),
        ("/ draw.temperature", ""),
        ("draws[group.x]", "draws[0]"),
        ("i < n * LANES + lane ?", "i <= n * LANES + lane ?"),
        ("times(rounded(total), draw.top_p)", "rounded(total)"),
        ("i == 0 || is_less", "is_less"),
        ("weights[i] >= draw.min_p", "weights[i] > draw.min_p"),
        ("tokens[i] <= index_of(own[n])", "tokens[i] < index_of(own[n])"),
        ("is_less(target, rounded(reached[n]))", "!is_less(rounded(reached[n]), target)"),
        ("sum.low + (x - (high - sum.high))", "sum.low"),
        ("fma(sum.high, x, -high) + ", ""),
        ("+ sum.low * x", ""),
        ("a.high == b.high && a.low < b.low", "false"),
        ("first = simd_min(first);\n", ""),
        ("ulong(group.y) * sizes.runs", "0"),
        ("+ number) * BEST", ") * BEST"),
        ("group.x * SIMDGROUPS + simdgroup", "group.x + simdgroup"),
        ("to[lane + LANES] = best.back", "to[lane + LANES] = best.front"),
        ("run.front = greater(run.front, back);", ""),
        ("size / 2; distance > 0", "size / 2; distance > 1"),
        ("sum.low - (high - sum.high)", "sum.low"),
        ("at += SIMDGROUPS * BEST", "at += (SIMDGROUPS + 1) * BEST"),
        ("ushort(0)", "ushort(1)"),
        ("(value_of(own[n]) - value_of(most))", "value_of(own[n])"),
        ("is_wanted && ", ""),
        ("min(first, index_of(own[n]))", "index_of(own[n])"),
        ("indices[group.x]", "indices[0]"),
    ];
    assert_mutants_fail(&metal::SAMPLING, &mutants, smoke_of_draws);
}

#[test]
fn wrong_launches_of_draws_on_metal_are_noticed() {
    assert_wrong_launches_fail(smoke_of_draws);
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
