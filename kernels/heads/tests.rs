//! The step in one pass against its parts, each of which is tested against its own reference, on every device.

use candle_core::{DType, Device};

use super::*;
use crate::Segment;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    /// Of the pages.
    stored: DType,
    hq: usize,
    hk: usize,
    d: usize,
    half: usize,
    /// Query heads lie beside gates of their size, and values in rows of their own.
    gated: bool,
    norm_values: bool,
    writes: bool,
    /// Of the second sequence.
    tokens: usize,
}

const BLOCK_SIZE: usize = 4;

/// [`norm_rope_write`], or [`by_parts`].
type Way = fn(&Tensor, Norm, Option<KeyValueHeads>, (&Tensor, &Tensor), &Tensor, &Batch) -> Result<Tensor>;

/// The query and the pages.
fn run(case: Case, device: &Device, way: Way) -> Result<(Vec<f32>, Vec<f32>)> {
    let Case { dtype, stored, hq, hk, d, half, gated, norm_values, writes, tokens } = case;
    let mut random = Random::new((hq * d + half) as u64);
    let num_blocks = 5 + tokens.div_ceil(BLOCK_SIZE);
    let (blocks, n) = (random.permutation(num_blocks), 1 + tokens);
    let ids = vec![0; tokens];
    let segments = [
        Segment { tokens: &ids[..1], past: 5, blocks: &blocks[..2], slot: 0 },
        Segment { tokens: &ids, past: 2, blocks: &blocks[2..num_blocks - 2], slot: 1 },
    ];
    let batch = Batch::new(&segments, BLOCK_SIZE, device)?;
    let kinds = if gated { 2 } else { 1 };
    let qkv = random.tensor(&[n, (kinds * hq + 2 * hk) * d], 1.0, dtype, device)?;
    let heads = |start: usize, count: usize| qkv.reshape((n, kinds * hq + 2 * hk, d))?.narrow(1, start, count);
    let q = heads(0, kinds * hq)?.reshape((n, hq, kinds * d))?.narrow(2, 0, d)?;
    let (k, v) = (heads(kinds * hq, hk)?, heads(kinds * hq + hk, hk)?);
    let v = if gated { v.contiguous()? } else { v };
    let mut weight = || random.tensor(&[d], 1.0, DType::F32, device);
    let weights = [weight()?, weight()?, weight()?];
    let norm = |i: usize| Norm { weight: &weights[i], eps: 1e-6 };
    let (cos, sin) =
        (random.tensor(&[n, half], 1.0, DType::F32, device)?, random.tensor(&[n, half], 1.0, DType::F32, device)?);
    let pages = poisoned(&[2, num_blocks, BLOCK_SIZE, hk, d], stored, device)?;
    let kv = KeyValueHeads { k: &k, v: &v, k_norm: norm(1), v_norm: norm_values.then(|| norm(2)) };
    let q = way(&q, norm(0), writes.then_some(kv), (&cos, &sin), &pages, &batch)?;
    assert_eq!((q.dims(), q.dtype()), (&[n, hq, d][..], dtype));
    Ok((values(&q)?, values(&pages)?))
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for (hq, hk, d, half) in
            [(1, 1, 2, 1), (3, 1, 7, 2), (1, 1, 64, 32), (2, 1, 256, 32), (2, 2, 512, 256), (16, 8, 128, 64)]
        {
            for (gated, norm_values, writes, tokens) in [
                (false, false, true, 7),
                (true, false, true, 7),
                (false, true, true, 7),
                (false, false, false, 7),
                (true, false, true, 70),
                (false, true, true, 70),
            ] {
                cases.push(Case { dtype, stored: dtype, hq, hk, d, half, gated, norm_values, writes, tokens });
            }
        }
    }
    cases
}

/// By parts, on the CPU.
fn want(case: Case) -> Result<(Vec<f32>, Vec<f32>)> {
    run(case, &Device::Cpu, by_parts)
}

fn check(case: Case, device: &Device, (want_q, want_pages): &(Vec<f32>, Vec<f32>)) -> Result<()> {
    let (got_q, got_pages) = run(case, device, norm_rope_write)?;
    assert_close(&format!("q {case:?} {device:?}"), &got_q, want_q, op_limit(case.dtype));
    // What no token owns stays as it was.
    let unwritten = |pages: &[f32]| pages.iter().map(|x| x.is_nan()).collect::<Vec<_>>();
    assert_eq!(unwritten(&got_pages), unwritten(want_pages), "{case:?} {device:?}");
    let written = |pages: &[f32]| pages.iter().copied().filter(|x| !x.is_nan()).collect::<Vec<_>>();
    let name = format!("pages {case:?} {device:?}");
    assert_close(&name, &written(&got_pages), &written(want_pages), op_limit(case.dtype));
    Ok(())
}

#[test]
fn is_its_parts_on_every_device() -> Result<()> {
    for device in devices().into_iter().filter(|device| !device.is_cpu()) {
        for case in cases() {
            check(case, &device, &want(case)?)?;
        }
    }
    Ok(())
}

/// To the last bit.
#[test]
fn is_its_parts_on_the_cpu() -> Result<()> {
    let rounded = cases().into_iter().filter(|case| case.dtype == DType::F32);
    let rounded = rounded.flat_map(|case| [DType::F16, DType::BF16].map(|stored| Case { stored, ..case }));
    for case in cases().into_iter().chain(rounded) {
        let bits = |(q, pages): (Vec<f32>, Vec<f32>)| q.into_iter().chain(pages).map(f32::to_bits).collect::<Vec<_>>();
        let got = run(case, &Device::Cpu, |q, norm, kv, angles, pages, batch| {
            let q = cpu::norm_rope_write(q, norm, kv, angles, pages, batch)?;
            Ok(q.expect("operands that fit"))
        })?;
        assert!(bits(got) == bits(want(case)?), "{case:?}");
    }
    Ok(())
}

#[test]
fn metal_kernel_is_its_parts() -> Result<()> {
    let wants = cases().into_iter().map(want).collect::<Result<Vec<_>>>()?;
    emulated(|| {
        cases().into_iter().zip(&wants).try_for_each(|(case, want)| check(case, &Device::Cpu, want))?;
        on_the_cpu_it_is_norm_rope_and_write()
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> impl Fn() -> Result<()> {
    let base = Case {
        dtype: DType::F32,
        stored: DType::F32,
        hq: 3,
        hk: 2,
        d: 70,
        half: 20,
        gated: true,
        norm_values: true,
        writes: true,
        tokens: 7,
    };
    let cases = [base, Case { norm_values: false, half: 35, ..base }, Case { writes: false, ..base }];
    let wants = cases.map(|case| want(case).expect("runs on the cpu"));
    move || cases.iter().zip(&wants).try_for_each(|(case, want)| check(*case, &Device::Cpu, want))
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("HAS_KEYS ? sizes.k.heads : 0", "sizes.k.heads"),
        ("row_start(sizes.q, token, head)", "(ulong(token) * hq + head) * d"),
        ("head < hq + hk;", "head <= hq + hk;"),
        ("row_start(sizes.v, token, head)", "row_start(sizes.k, token, head)"),
        ("is_key ? 0 : ulong(sizes.slots)", "0"),
        ("slot_mapping[token]", "token"),
        ("weight = is_key ? k_weight : v_weight", "weight = k_weight"),
        ("pairs = is_key ? pairs : 0", "pairs = pairs"),
        ("is_normed = is_key || NORMS_VALUES", "is_normed = true"),
        ("simd_sum(squares) / d", "simd_sum(squares)"),
        ("i < d - pairs", "i < d - pairs - 1"),
        ("ulong(token) * sizes.pairs", "ulong(token) * pairs + 1"),
        ("b * c + a * s", "b * c - a * s"),
        ("weight[i + pairs])), c", "weight[i])), c"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke());
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke());
}

#[test]
fn on_the_cpu_it_is_norm_rope_and_write() -> Result<()> {
    // One token, one head of two values, a quarter turn: (3, 4) normed to (3, 4) / sqrt(12.5) becomes (-4, 3) /
    // sqrt(12.5).
    let device = Device::Cpu;
    let batch = Batch::new(&[Segment { tokens: &[0], past: 0, blocks: &[0], slot: 0 }], 1, &device)?;
    let head = Tensor::new(&[[[3f32, 4.0]]], &device)?;
    let (cos, sin) = (Tensor::new(&[[0f32]], &device)?, Tensor::new(&[[1f32]], &device)?);
    let ones = Tensor::ones(2, DType::F32, &device)?;
    let norm = Norm { weight: &ones, eps: 0.0 };
    let pages = poisoned(&[2, 1, 1, 1, 2], DType::F32, &device)?;
    let kv = KeyValueHeads { k: &head, v: &head, k_norm: norm, v_norm: None };
    let q = norm_rope_write(&head, norm, Some(kv), (&cos, &sin), &pages, &batch)?;
    let turned = [-4.0 / 12.5f32.sqrt(), 3.0 / 12.5f32.sqrt()];
    assert_close("q", &values(&q)?, &turned, 1e-6);
    assert_close("pages", &values(&pages)?, &[turned[0], turned[1], 3.0, 4.0], 1e-6);
    Ok(())
}

/// Steps of one token a sequence, which a GPU takes in one kernel, with splits of long contexts: the pages and the
/// mixed values of the two ops by themselves.
#[test]
fn attending_is_its_parts() -> Result<()> {
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (hq, hk, d, half, window) in [
                (2, 1, 64, 32, None),
                (16, 8, 128, 64, None),
                (10, 1, 128, 64, None),
                (8, 2, 256, 32, None),
                (8, 1, 256, 128, Some(20)),
                (8, 1, 512, 256, None),
                (2, 2, 128, 3, None),
                (2, 1, 40, 20, None),
            ] {
                // Short contexts, whose keys are fetched at once, and one with many turns.
                let lengths: [&[usize]; 2] = [&[0, 5, 37, 700], &[2900]];
                for (pasts, writes) in lengths.into_iter().flat_map(|pasts| [(pasts, true), (pasts, false)]) {
                    let mut random = Random::new((hq * d + half) as u64);
                    let tables: Vec<Vec<u32>> = {
                        let blocks = random.permutation(pasts.iter().map(|past| past / BLOCK_SIZE + 1).sum());
                        let mut rest = blocks.as_slice();
                        let mut take = |len: usize| {
                            let (table, behind) = rest.split_at(len);
                            rest = behind;
                            table.to_vec()
                        };
                        pasts.iter().map(|past| take(past / BLOCK_SIZE + 1)).collect()
                    };
                    let num_blocks = tables.iter().map(Vec::len).sum::<usize>();
                    let segments: Vec<Segment> = (0..pasts.len())
                        .map(|i| Segment { tokens: &[0], past: pasts[i], blocks: &tables[i], slot: i as u32 })
                        .collect();
                    let batch = Batch::new(&segments, BLOCK_SIZE, &device)?;
                    let n = pasts.len();
                    let qkv = random.tensor(&[n, (hq + 2 * hk) * d], 1.0, dtype, &device)?;
                    let qkv = qkv.reshape((n, hq + 2 * hk, d))?;
                    let (q, k, v) = (qkv.narrow(1, 0, hq)?, qkv.narrow(1, hq, hk)?, qkv.narrow(1, hq + hk, hk)?);
                    let weight = random.tensor(&[d], 1.0, DType::F32, &device)?;
                    let norm = Norm { weight: &weight, eps: 1e-6 };
                    let mut angles = || random.tensor(&[n, half], 1.0, DType::F32, &device);
                    let (cos, sin) = (angles()?, angles()?);
                    let pages = random.tensor(&[2, num_blocks, BLOCK_SIZE, hk, d], 1.0, dtype, &device)?;
                    let (ours, theirs) = (pages.copy()?, pages.copy()?);
                    let kv = writes.then_some(KeyValueHeads { k: &k, v: &v, k_norm: norm, v_norm: None });
                    let params = AttentionParams { window, ..AttentionParams::causal((d as f32).powf(-0.5)) };
                    let got = norm_rope_attend(&q, norm, kv, (&cos, &sin), &ours, &batch, params)?;
                    let entered = norm_rope_write(&q, norm, kv, (&cos, &sin), &theirs, &batch)?;
                    let want = paged_attention(&entered, &theirs, &batch, params)?;
                    let name = format!("{hq} {hk} {d} {half} {window:?} {writes} {dtype:?} {device:?}");
                    assert_close(&name, &values(&got)?, &values(&want)?, op_limit(dtype));
                    assert_close(&format!("pages {name}"), &values(&ours)?, &values(&theirs)?, op_limit(dtype));
                }
            }
        }
    }
    Ok(())
}
