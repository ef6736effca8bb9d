//! Attention and the page writes: against the reference, by hand, by a second definition, and against itself
//! however a prompt is cut, packed and paged.

mod on_metal;
mod write_kv;

use candle_core::{DType, Device};

use super::*;
use crate::simd::Instructions;
use crate::simd::tests::{alone, available, on, on_dots, portable};
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};
use crate::{NO_BLOCK, Segment};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A step over pages of NaN in random order.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    hq: usize,
    hk: usize,
    d: usize,
    block_size: usize,
    /// Past and new tokens of each sequence.
    sequences: &'static [(usize, usize)],
    params: AttentionParams,
}

/// The page tables of a case: as many blocks as each sequence needs and one to spare, from a permuted pool.
struct Pages {
    tokens: Vec<Vec<u32>>,
    blocks: Vec<Vec<u32>>,
    num_blocks: usize,
}

impl Pages {
    fn new(case: Case, random: &mut Random) -> Self {
        let needed = |past: usize, new: usize| (past + new).div_ceil(case.block_size) + 1;
        let num_blocks = case.sequences.iter().map(|&(past, new)| needed(past, new)).sum::<usize>() + 2;
        let mut pool = random.permutation(num_blocks);
        let mut take = |len| pool.drain(..len).collect();
        Self {
            tokens: case.sequences.iter().map(|&(_, new)| vec![0; new]).collect(),
            blocks: case.sequences.iter().map(|&(past, new)| take(needed(past, new))).collect(),
            num_blocks,
        }
    }

    fn batch(&self, case: Case, device: &Device) -> Result<Batch> {
        let segments: Vec<Segment> = (0..self.blocks.len())
            .map(|i| Segment {
                tokens: &self.tokens[i],
                past: case.sequences[i].0,
                blocks: &self.blocks[i],
                slot: i as u32,
            })
            .collect();
        Batch::new(&segments, case.block_size, device)
    }
}

/// Dtypes of pages that take rows of `dtype`.
fn page_dtypes(dtype: DType, device: &Device) -> &'static [DType] {
    let rounds = device.is_cpu() && crate::metal::emulator::emulator().is_none();
    match dtype {
        DType::F32 if rounds => &[DType::F32, DType::F16, DType::BF16],
        DType::F32 => &[DType::F32],
        DType::F16 => &[DType::F16],
        _ => &[DType::BF16],
    }
}

fn run_paged_attention(case: Case, device: &Device) -> Result<()> {
    page_dtypes(case.dtype, device).iter().try_for_each(|&dtype| attend_to(dtype, case, device))
}

/// Pages hold NaN wherever no query of the step looks.
fn attend_to(page_dtype: DType, case: Case, device: &Device) -> Result<()> {
    let Case { dtype, hq, hk, d, block_size, sequences, params } = case;
    let mut random = Random::new((hq * d + hk) as u64);
    let pages = Pages::new(case, &mut random);
    let batch = pages.batch(case, device)?;
    let q = random.tensor(&[batch.num_tokens(), 2 * hq, d], 1.0, dtype, device)?.narrow(1, hq, hq)?;
    let row = hk * d;
    let plane = pages.num_blocks * block_size * row;
    let place = |sequence: usize, position: usize| {
        let block = pages.blocks[sequence][position / block_size] as usize;
        (block * block_size + position % block_size) * row
    };
    let mut kv = vec![f32::NAN; 2 * plane];
    for (sequence, &(past, new)) in sequences.iter().enumerate() {
        for position in params.visible(past, past + new).start..past + new {
            for start in [place(sequence, position), plane + place(sequence, position)] {
                kv[start..][..row].fill_with(|| random.normal(1.0));
            }
        }
    }
    let kv = Tensor::from_vec(kv, (2, pages.num_blocks, block_size, hk, d), &Device::Cpu)?;
    let kv = kv.to_dtype(page_dtype)?.to_device(device)?;
    let frame = poisoned(&[1, pages.num_blocks, block_size, hk, d], page_dtype, device)?;
    let got = paged_attention(&q, &Tensor::cat(&[&frame, &kv, &frame], 0)?.narrow(0, 1, 2)?, &batch, params)?;
    assert_eq!((got.dims(), got.dtype()), (q.dims(), dtype));

    let (kv, heads) = (values(&kv)?, reference::Heads { hq, hk, d });
    let want = reference::attention(&values(&q)?, &kv[..plane], &kv[plane..], place, heads, &batch, params);
    assert_close(
        &format!("paged_attention {case:?} {page_dtype:?} {device:?}"),
        &values(&got)?,
        &want,
        // Over pages in bf16, queries and weights are rounded as well.
        op_limit(dtype).max(if page_dtype == DType::BF16 { op_limit(page_dtype) } else { 0.0 }),
    );
    Ok(())
}

/// Every sequence on its own, nothing in pages.
fn run_attention(case: Case, device: &Device) -> Result<()> {
    let Case { dtype, hq, hk, d, sequences, params, .. } = case;
    let tokens: Vec<Vec<u32>> = sequences.iter().map(|&(_, new)| vec![0; new]).collect();
    let batch = Batch::uncached(&tokens.iter().map(Vec::as_slice).collect::<Vec<_>>(), device)?;
    let qkv = Random::new((hq * d) as u64).tensor(&[batch.num_tokens(), hq + 2 * hk, d], 1.0, dtype, device)?;
    let [q, k, v] = [(0, hq), (hq, hk), (hq + hk, hk)].map(|(start, heads)| qkv.narrow(1, start, heads));
    let (q, k, v) = (q?, k?, v?);
    let got = attention(&q, &k, &v, &batch, params)?;
    assert_eq!((got.dims(), got.dtype()), (q.dims(), dtype));

    let place = |sequence: usize, position: usize| (batch.host[sequence].tokens.start + position) * hk * d;
    let heads = reference::Heads { hq, hk, d };
    let want = reference::attention(&values(&q)?, &values(&k)?, &values(&v)?, place, heads, &batch, params);
    assert_close(&format!("attention {case:?} {device:?}"), &values(&got)?, &want, op_limit(dtype));
    Ok(())
}

/// Steps whose contexts end within, at and past the edges of pages of 16 and of the CPU's chunks of 128; the last is
/// long enough to be shared by threadgroups on Metal.
const STEPS: [&[(usize, usize)]; 6] = [
    &[(0, 1)],
    &[(0, 35)],
    &[(127, 1), (0, 17), (128, 1), (14, 3)],
    &[(100, 60)],
    &[(255, 1), (256, 1), (299, 1), (3, 1)],
    &[(1100, 1), (3, 2), (513, 1)],
];

fn cases() -> Vec<Case> {
    let causal = AttentionParams::causal(0.3);
    let window = |window| AttentionParams { window: Some(window), ..causal };
    let mut cases = Vec::new();
    let base = Case { dtype: DType::F32, hq: 4, hk: 2, d: 16, block_size: 16, sequences: &[], params: causal };
    for sequences in STEPS {
        let base = Case { sequences, ..base };
        let windows = [1, 2, 3, 16, 17, 35, 36, 128, 160, 1000].map(window);
        let softcap = AttentionParams { softcap: Some(0.7), ..causal };
        let capped = AttentionParams { softcap: Some(0.7), ..window(20) };
        let ahead = AttentionParams { mask: Mask::Bidirectional, ..causal };
        let capped_ahead = AttentionParams { softcap: Some(0.7), ..ahead };
        for params in windows.into_iter().chain([causal, softcap, capped, ahead, capped_ahead]) {
            cases.push(Case { params, ..base });
        }
        for (hq, hk) in [(1, 1), (3, 3), (4, 2), (6, 2), (8, 2), (8, 1), (24, 2)] {
            for params in [causal, window(9)] {
                cases.push(Case { hq, hk, params, ..base });
            }
        }
        for d in [1, 7, 32, 63, 64, 100, 128, 256, 512] {
            for dtype in DTYPES {
                let params = AttentionParams { scale: (d as f32).powf(-0.5), ..causal };
                cases.push(Case { d, dtype, params, ..base });
            }
        }
        for block_size in [1, 3, 32, 512] {
            cases.push(Case { block_size, ..base });
        }
    }
    cases
}

/// For kernels on tensor cores: steps at the edges of tiles of 64 and 128 queries and of 16 to 128 keys, with and
/// without sequences of one token.
fn tensor_core_cases() -> Vec<Case> {
    let steps: [&[(usize, usize)]; 4] = [
        &[(0, 129), (63, 2), (64, 1), (0, 1)],
        &[(120, 70), (0, 33)],
        &[(15, 1), (16, 1), (300, 1), (0, 1)],
        &[(700, 3), (2, 1)],
    ];
    let mut cases = Vec::new();
    for d in [64, 128, 256, 512] {
        let causal = AttentionParams::causal((d as f32).powf(-0.5));
        let window = |window| AttentionParams { window: Some(window), ..causal };
        let capped = AttentionParams { softcap: Some(0.7), ..window(65) };
        let ahead = AttentionParams { mask: Mask::Bidirectional, ..causal };
        for (i, sequences) in steps.into_iter().enumerate() {
            for (j, params) in [causal, window(1), window(20), window(130), capped, ahead].into_iter().enumerate() {
                let (hq, hk) = [(4, 2), (8, 1), (3, 3), (20, 2)][(i + j) % 4];
                // 24 is no power of two, as tensor copies need.
                let block_size = [16, 32, 8, 512, 24][(i + j) % 5];
                let dtype = if (i + j) % 2 == 0 { DType::BF16 } else { DType::F16 };
                cases.push(Case { dtype, hq, hk, d, block_size, sequences, params });
            }
        }
    }
    cases
}

#[test]
fn paged_attention_on_tensor_cores_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in tensor_core_cases() {
            run_paged_attention(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn attention_on_tensor_cores_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in tensor_core_cases() {
            run_attention(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn paged_attention_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_paged_attention(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn attention_is_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run_attention(case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn portable_lanes_are_the_reference() -> Result<()> {
    alone(|| portable(|| cases().into_iter().try_for_each(|case| run_paged_attention(case, &Device::Cpu))))
}

#[test]
fn hand_computed() -> Result<()> {
    let rows = |a: f32, b: f32| Tensor::from_vec(vec![a, b], (2, 1, 1), &Device::Cpu);
    // The second query weighs the keys 3 to 1; the first weighs all alike.
    let (q, k, v) = (rows(0.0, 3f32.ln())?, rows(1.0, 0.0)?, rows(8.0, 4.0)?);
    let batch = Batch::uncached(&[&[0, 0]], &Device::Cpu)?;
    let causal = AttentionParams::causal(1.0);
    // tanh(ln 3) = 4/5.
    let capped = 4.0 + 4.0 / (1.0 + (-0.8f32).exp());
    for (params, want) in [
        (causal, [8.0, 7.0]),
        (AttentionParams { mask: Mask::Bidirectional, ..causal }, [6.0, 7.0]),
        (AttentionParams { window: Some(1), ..causal }, [8.0, 4.0]),
        (AttentionParams { window: Some(2), ..causal }, [8.0, 7.0]),
        (AttentionParams { softcap: Some(1.0), ..causal }, [8.0, capped]),
        (AttentionParams { scale: 2.0, ..causal }, [8.0, 7.6]),
    ] {
        let got = values(&attention(&q, &k, &v, &batch, params)?)?;
        assert_close(&format!("{params:?}"), &got, &want, 1e-6);
    }
    Ok(())
}

/// Attention of one sequence by matrices: all scores, a mask added, a softmax over rows.
fn dense(q: &Tensor, k: &Tensor, v: &Tensor, params: AttentionParams) -> Result<Tensor> {
    let (n, hq, d) = q.dims3()?;
    let group = hq / k.dim(1)?;
    let heads = |x: &Tensor| x.unsqueeze(2)?.expand((n, hq / group, group, d))?.reshape((n, hq, d))?.transpose(0, 1);
    let mut scores = (q.transpose(0, 1)?.contiguous()?.matmul(&heads(k)?.t()?)? * f64::from(params.scale))?;
    if let Some(cap) = params.softcap {
        scores = ((scores / f64::from(cap))?.tanh()? * f64::from(cap))?;
    }
    let seen = |t: usize, s: usize| match params.mask {
        Mask::Causal => s <= t && params.window.is_none_or(|window| t - s < window),
        Mask::Bidirectional => true,
    };
    let mask: Vec<f32> = (0..n * n).map(|i| if seen(i / n, i % n) { 0.0 } else { f32::NEG_INFINITY }).collect();
    let scores = scores.broadcast_add(&Tensor::from_vec(mask, (1, n, n), &Device::Cpu)?)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(2)?)?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(2)?)?;
    weights.matmul(&heads(v)?.contiguous()?)?.transpose(0, 1)
}

#[test]
fn attention_is_a_masked_softmax() -> Result<()> {
    let causal = AttentionParams::causal(0.2);
    let window = AttentionParams { window: Some(33), ..causal };
    let capped = AttentionParams { softcap: Some(1.5), ..window };
    let ahead = AttentionParams { mask: Mask::Bidirectional, ..causal };
    for (hq, hk, d) in [(2, 2, 64), (8, 2, 20), (4, 1, 33)] {
        for n in [1, 65, 150] {
            let mut random = Random::new(n as u64);
            let mut rows = |heads| random.tensor(&[n, heads, d], 1.0, DType::F32, &Device::Cpu);
            let (q, k, v) = (rows(hq)?, rows(hk)?, rows(hk)?);
            let batch = Batch::uncached(&[&vec![0; n]], &Device::Cpu)?;
            for params in [causal, window, capped, ahead] {
                let got = attention(&q, &k, &v, &batch, params)?;
                let want = values(&dense(&q, &k, &v, params)?)?;
                assert_close(&format!("{hq} over {hk}, {n} tokens, {params:?}"), &values(&got)?, &want, 1e-5);
            }
        }
    }
    Ok(())
}

/// A sequence whose results must be the same to the bit however it is run. Rows are f32, so that no rounding of results hides a difference.
struct Sequence {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: DType,
    params: AttentionParams,
}

impl Sequence {
    fn new(
        seed: u64,
        tokens: usize,
        (hq, hk, d): (usize, usize, usize),
        pages: DType,
        params: AttentionParams,
    ) -> Result<Self> {
        let mut random = Random::new(seed);
        let mut rows = |heads| random.tensor(&[tokens, heads, d], 1.0, DType::F32, &Device::Cpu);
        Ok(Self { q: rows(hq)?, k: rows(hk)?, v: rows(hk)?, pages, params })
    }

    fn len(&self) -> usize {
        self.q.dims()[0]
    }
}

/// Runs `sequences` side by side in steps of at most `step` tokens of each; returns the results of each.
fn run_in_steps(sequences: &[&Sequence], step: usize, block_size: usize, seed: u64) -> Result<Vec<Vec<f32>>> {
    let (_, hk, d) = sequences[0].k.dims3()?;
    let blocks_each = sequences.iter().map(|s| s.len().div_ceil(block_size)).max().unwrap_or(0);
    let pool = Random::new(seed).permutation(blocks_each * sequences.len());
    let kv = poisoned(&[2, pool.len(), block_size, hk, d], sequences[0].pages, &Device::Cpu)?;
    let mut results = vec![Vec::new(); sequences.len()];
    let longest = sequences.iter().map(|s| s.len()).max().unwrap_or(0);
    for past in (0..longest).step_by(step) {
        let active: Vec<usize> = (0..sequences.len()).filter(|&i| past < sequences[i].len()).collect();
        let news: Vec<Vec<u32>> = active.iter().map(|&i| vec![0; step.min(sequences[i].len() - past)]).collect();
        let segments: Vec<Segment> = active
            .iter()
            .zip(&news)
            .map(|(&i, tokens)| Segment {
                tokens,
                past,
                blocks: &pool[i * blocks_each..][..blocks_each],
                slot: i as u32,
            })
            .collect();
        let batch = Batch::new(&segments, block_size, &Device::Cpu)?;
        let rows = |of: fn(&Sequence) -> &Tensor| {
            let rows = active.iter().zip(&news).map(|(&i, new)| of(sequences[i]).narrow(0, past, new.len()));
            Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)
        };
        write_kv(&kv, &rows(|s| &s.k)?, &rows(|s| &s.v)?, &batch)?;
        let out = paged_attention(&rows(|s| &s.q)?, &kv, &batch, sequences[0].params)?;
        let mut start = 0;
        for (&i, new) in active.iter().zip(&news) {
            results[i].extend(values(&out.narrow(0, start, new.len())?)?);
            start += new.len();
        }
    }
    Ok(results)
}

#[test]
fn results_depend_on_the_sequence_alone() -> Result<()> {
    let causal = AttentionParams::causal(0.2);
    // Heads of 24 fill the lanes of rows in f16 and f32, and no pairs of lanes.
    for (dtype, d) in [(DType::F16, 24), (DType::BF16, 24), (DType::BF16, 32)] {
        for (hq, hk) in [(4, 4), (4, 2), (8, 1)] {
            for window in [None, Some(1), Some(50), Some(200)] {
                let params = AttentionParams { window, ..causal };
                let new = |seed, tokens| Sequence::new(seed, tokens, (hq, hk, d), dtype, params);
                let (sequence, strangers) = (new(1, 290)?, [new(2, 170)?, new(3, 300)?]);
                let name = format!("{hq} over {hk} of {d} in {dtype:?}, {params:?}");
                let whole = &run_in_steps(&[&sequence], 290, 16, 1)?[0];
                assert!(whole.iter().all(|x| x.is_finite()));
                for (step, block_size) in [(1, 16), (7, 16), (64, 16), (129, 16), (290, 1), (290, 5), (50, 256)] {
                    let got = &run_in_steps(&[&sequence], step, block_size, step as u64)?[0];
                    assert!(got == whole, "{name}: steps of {step}, blocks of {block_size}");
                }
                for step in [1, 33, 300] {
                    let together = run_in_steps(&[&strangers[0], &sequence, &strangers[1]], step, 16, 9)?;
                    assert!(&together[1] == whole, "{name}: with strangers, steps of {step}");
                }
            }
        }
    }
    Ok(())
}

/// In prompts, token by token and in between, with dot products of bf16 and without.
#[test]
fn instruction_sets_that_fuse_agree_to_the_bit() -> Result<()> {
    for (dtype, d, are_fast) in
        [(DType::F16, 40, false), (DType::BF16, 40, false), (DType::BF16, 64, true), (DType::BF16, 40, true)]
    {
        for window in [None, Some(51)] {
            let params = AttentionParams { window, ..AttentionParams::causal(0.2) };
            let sequence = Sequence::new(4, 200, (6, 2, d), dtype, params)?;
            let mut results = Vec::new();
            for set in available().filter(|&set| set > Instructions::Portable) {
                for step in [200, 1, 9] {
                    let run = || on(set, || on_dots(are_fast, || run_in_steps(&[&sequence], step, 16, 1)));
                    results.push(alone(run)?);
                }
            }
            assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{dtype:?}, heads of {d}, {params:?}");
        }
    }
    Ok(())
}

#[test]
fn portable_dots_are_the_reference() -> Result<()> {
    let cases = || cases().into_iter().filter(|case| case.dtype != DType::F16);
    let run = || cases().try_for_each(|case| attend_to(DType::BF16, case, &Device::Cpu));
    alone(|| portable(|| on_dots(true, run)))
}

/// Not even times zero.
#[test]
fn what_is_not_seen_leaves_no_trace() -> Result<()> {
    const TOKENS: usize = 40;
    for dtype in DTYPES {
        let sequence = Sequence::new(1, TOKENS, (4, 2, 32), dtype, AttentionParams::causal(0.2))?;
        let run = |sequence: &Sequence| run_in_steps(&[sequence], TOKENS, 16, 1);
        let whole = run(&sequence)?.concat();
        for token in 1..TOKENS {
            let gone = |rows: &Tensor| {
                let rest = TOKENS - token;
                let nan = Tensor::full(f32::NAN, (rest, 2, 32), &Device::Cpu)?;
                Tensor::cat(&[&rows.narrow(0, 0, token)?, &nan], 0)
            };
            let (q, params) = (sequence.q.clone(), sequence.params);
            let cut = Sequence { q, k: gone(&sequence.k)?, v: gone(&sequence.v)?, pages: dtype, params };
            let (got, seen) = (run(&cut)?.concat(), token * 4 * 32);
            assert!(got[..seen] == whole[..seen], "{dtype:?}: before {token}");
            assert!(got[seen..].iter().all(|x| x.is_nan()), "{dtype:?}: from {token}");
        }
    }
    Ok(())
}

#[test]
fn results_do_not_depend_on_threads() -> Result<()> {
    let run = |threads, step| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a pool of threads");
        let sequence = Sequence::new(1, 1300, (8, 2, 32), DType::BF16, AttentionParams::causal(0.2))?;
        pool.install(|| run_in_steps(&[&sequence], step, 16, 1))
    };
    let whole = run(1, 1300)?;
    for (threads, step) in [(4, 1300), (4, 650), (1, 1299), (4, 1299)] {
        assert!(run(threads, step)? == whole, "{threads} threads, steps of {step}");
    }
    Ok(())
}

#[test]
fn uncached_is_paged() -> Result<()> {
    let params = AttentionParams { window: Some(60), ..AttentionParams::causal(0.2) };
    for dtype in DTYPES {
        let new = |seed, tokens| {
            let Sequence { q, k, v, .. } = Sequence::new(seed, tokens, (4, 2, 32), dtype, params)?;
            let [q, k, v] = [q, k, v].map(|rows| rows.to_dtype(dtype));
            Ok::<_, candle_core::Error>(Sequence { q: q?, k: k?, v: v?, pages: dtype, params })
        };
        let sequences = [new(1, 200)?, new(2, 33)?];
        let rows = |of: fn(&Sequence) -> &Tensor| Tensor::cat(&[of(&sequences[0]), of(&sequences[1])], 0);
        let batch = Batch::uncached(&[&[0; 200], &[0; 33]], &Device::Cpu)?;
        let got = attention(&rows(|s| &s.q)?, &rows(|s| &s.k)?, &rows(|s| &s.v)?, &batch, params)?;
        assert!(values(&got)? == run_in_steps(&[&sequences[0], &sequences[1]], 200, 16, 1)?.concat(), "{dtype:?}");
    }
    Ok(())
}

/// A table of its own, without the blocks that the window has passed, gives the same; one block fewer is refused.
#[test]
fn a_window_needs_no_block_behind_it() -> Result<()> {
    const BLOCK_SIZE: usize = 4;
    let (past, new, window) = (30, 5, 9);
    let params = AttentionParams { window: Some(window), ..AttentionParams::causal(0.3) };
    let mut random = Random::new(5);
    let mut tensor = |shape: &[usize]| random.tensor(shape, 1.0, DType::F32, &Device::Cpu);
    let (q, kv) = (tensor(&[new, 4, 16])?, tensor(&[2, 12, BLOCK_SIZE, 2, 16])?);
    let full: Vec<u32> = (0..9).rev().collect();
    let mut windowed = full.clone();
    let tokens = vec![0; new];
    let batch = |blocks| Batch::new(&[Segment { tokens: &tokens, past, blocks, slot: 0 }], BLOCK_SIZE, &Device::Cpu);
    let elsewhere: Vec<u32> = (3..12).collect();
    let step = |table: &[u32]| batch(&elsewhere)?.with_windows(&[table], BLOCK_SIZE);
    let want = paged_attention(&q, &kv, &batch(&full)?, params)?;
    let first = (past + 1 - window) / BLOCK_SIZE;
    windowed[..first].fill(NO_BLOCK);
    let sliding = step(&windowed)?;
    assert!(values(&paged_attention(&q, &kv, sliding.windowed(), params)?)? == values(&want)?);
    assert_eq!(sliding.windowed().block_tables.flatten_all()?.to_vec1::<u32>()?[..first], vec![0; first]);
    // Likewise for the last token alone.
    let last = sliding.last_tokens(&[0])?;
    let got = paged_attention(&q.narrow(0, new - 1, 1)?, &kv, last.windowed(), params)?;
    assert!(values(&got)? == values(&want.narrow(0, new - 1, 1)?)?);

    windowed[first] = NO_BLOCK;
    assert!(paged_attention(&q, &kv, step(&windowed)?.windowed(), params).is_err());
    windowed[8] = NO_BLOCK;
    assert!(step(&windowed).is_err());
    assert!(step(&windowed[..8]).is_err());
    Ok(())
}

#[test]
fn refuses_operands_that_disagree() -> Result<()> {
    let batch = Batch::new(&[Segment { tokens: &[0, 0], past: 0, blocks: &[2], slot: 0 }], 4, &Device::Cpu)?;
    let pages = |blocks, dtype| Tensor::zeros((2, blocks, 4, 2, 8), dtype, &Device::Cpu);
    let rows = |n, heads, dtype| Tensor::zeros((n, heads, 8), dtype, &Device::Cpu);
    let (f32, f16) = (DType::F32, DType::F16);

    let (kv, k) = (pages(3, f32)?, rows(2, 2, f32)?);
    write_kv(&kv, &k, &k, &batch)?;
    assert!(write_kv(&pages(2, f32)?, &k, &k, &batch).is_err());
    write_kv(&pages(3, f16)?, &k, &k, &batch)?;
    write_kv(&pages(3, DType::BF16)?, &k, &k, &batch)?;
    assert!(write_kv(&pages(3, DType::BF16)?, &rows(2, 2, f16)?, &rows(2, 2, f16)?, &batch).is_err());
    assert!(write_kv(&kv, &rows(2, 2, f16)?, &rows(2, 2, f16)?, &batch).is_err());
    assert!(write_kv(&kv, &rows(1, 2, f32)?, &k, &batch).is_err());
    assert!(write_kv(&kv, &k, &rows(2, 1, f32)?, &batch).is_err());

    let params = AttentionParams::causal(1.0);
    let q = rows(2, 4, f32)?;
    paged_attention(&q, &kv, &batch, params)?;
    assert!(paged_attention(&q, &pages(2, f32)?, &batch, params).is_err());
    paged_attention(&q, &pages(3, f16)?, &batch, params)?;
    paged_attention(&q, &pages(3, DType::BF16)?, &batch, params)?;
    assert!(paged_attention(&rows(2, 4, f16)?, &pages(3, DType::BF16)?, &batch, params).is_err());
    assert!(paged_attention(&rows(2, 4, f16)?, &kv, &batch, params).is_err());
    assert!(paged_attention(&rows(2, 3, f32)?, &kv, &batch, params).is_err());
    assert!(paged_attention(&rows(1, 4, f32)?, &kv, &batch, params).is_err());

    attention(&q, &k, &k, &batch, params)?;
    assert!(attention(&q, &k, &rows(2, 1, f32)?, &batch, params).is_err());
    assert!(attention(&q, &k, &rows(2, 2, f16)?, &batch, params).is_err());
    assert!(attention(&rows(2, 3, f32)?, &k, &k, &batch, params).is_err());

    let none = AttentionParams { window: Some(0), ..params };
    let ahead = AttentionParams { window: Some(4), mask: Mask::Bidirectional, ..params };
    for params in [none, ahead] {
        assert!(paged_attention(&q, &kv, &batch, params).is_err());
        assert!(attention(&q, &k, &k, &batch, params).is_err());
    }
    Ok(())
}
