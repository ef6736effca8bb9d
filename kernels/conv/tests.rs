use candle_core::{Device, Tensor};

use super::*;
use crate::Segment;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};
use crate::simd::tests::{alone, portable};
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

/// One step over packed sequences, each on its own slot, followed by one step of a single token each.
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    channels: usize,
    width: usize,
    sequences: &'static [Start],
    /// Rows before the operands and slots before the state in the tensors they are views of.
    offset: usize,
}

/// Tokens of a sequence in the first step, and whether it starts there.
#[derive(Clone, Copy, Debug)]
enum Start {
    Fresh(usize),
    Continued(usize),
}
use Start::{Continued, Fresh};

const BASE: Case = Case { dtype: DType::F32, channels: 40, width: 4, sequences: &[Fresh(5)], offset: 0 };

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for sequences in [&[Fresh(1)], &[Fresh(2)], &[Fresh(3)], &[Fresh(16)], &[Fresh(65)], &[Fresh(100)]] {
        cases.push(Case { sequences, ..BASE });
    }
    for channels in [1, 7, 8, 256, 300, 1024] {
        cases.push(Case { channels, sequences: &[Fresh(3), Continued(18)], ..BASE });
    }
    let packed: &[Start] = &[Continued(1), Fresh(65), Fresh(1), Continued(100), Continued(2), Fresh(64), Fresh(2)];
    let decode: &[Start] = &[Continued(1); 9];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for width in [2, 3, 4] {
            for (sequences, offset) in [(packed, 0), (packed, 3), (decode, 0)] {
                cases.push(Case { dtype, width, sequences, offset, ..BASE });
            }
        }
    }
    cases
}

fn run(case: &Case, device: &Device) -> Result<()> {
    let mut random = Random::new(1);
    let &Case { channels, width, offset, .. } = case;
    let slots = case.sequences.len() + 2;
    let order = random.permutation(slots);
    let window = channels * (width - 1);

    let mut want = vec![f32::NAN; slots * window];
    for (sequence, &slot) in case.sequences.iter().zip(&order) {
        if let Continued(_) = sequence {
            want[slot as usize * window..][..window].fill_with(|| random.normal(1.0));
        }
    }
    let whole = poisoned(&[offset + slots, channels, width - 1], DType::F32, device)?;
    whole.slice_set(&Tensor::from_slice(&want, (slots, channels, width - 1), device)?, 0, offset)?;
    let state = whole.narrow(0, offset, slots)?;

    step(case, case.sequences, &order, &state, &mut want, &mut random)?;
    let mut next = vec![Continued(1); case.sequences.len()];
    next[0] = Fresh(1); // the slot now belongs to another sequence
    step(case, &next, &order, &state, &mut want, &mut random)?;

    let before = values(&whole)?;
    let before = &before[..offset * window];
    assert!(before.iter().all(|s| s.is_nan()), "{case:?} {device:?}: wrote before the state");
    Ok(())
}

/// Runs one step on the tensor `state` and, by the reference, on `want`; compares both and the outputs.
fn step(
    case: &Case,
    sequences: &[Start],
    order: &[u32],
    state: &Tensor,
    want: &mut [f32],
    random: &mut Random,
) -> Result<()> {
    let &Case { dtype, channels, width, offset, .. } = case;
    let device = state.device();
    let parts: Vec<(u32, Start)> = order.iter().copied().zip(sequences.iter().copied()).collect();
    let batch = pack(&parts, device)?;
    let n = batch.num_tokens();
    let x = random.tensor(&[offset + n, channels], 1.0, dtype, device)?.narrow(0, offset, n)?;
    let weight = random.tensor(&[offset + channels, width], 0.5, dtype, device)?.narrow(0, offset, channels)?;
    let out = causal_conv1d(&x, &weight, state, &batch)?;

    assert_eq!((out.dims(), out.dtype()), ([n, channels].as_slice(), dtype), "{case:?} {device:?}");
    let (x, weight) = (values(&x)?, values(&weight)?);
    let want_out = reference::causal_conv1d(&x, &weight, want, &batch, channels, width);
    assert_close(&format!("{case:?} {device:?}: output"), &values(&out)?, &want_out, op_limit(dtype));
    for (i, (got, want)) in values(state)?.iter().zip(want.iter()).enumerate() {
        // Inputs are kept as they are; unused slots stay NaN.
        assert!(got == want || got.is_nan() && want.is_nan(), "{case:?} {device:?}: state {got} for {want} at {i}");
    }
    Ok(())
}

/// A batch of (slot, tokens).
fn pack(sequences: &[(u32, Start)], device: &Device) -> Result<Batch> {
    let tokens = [0; 128];
    let blocks: Vec<u32> = (0..sequences.len() as u32).collect();
    let segments: Vec<Segment> = sequences
        .iter()
        .enumerate()
        .map(|(i, &(slot, sequence))| {
            let (len, past) = match sequence {
                Fresh(len) => (len, 0),
                Continued(len) => (len, 7),
            };
            Segment { tokens: &tokens[..len], past, blocks: &blocks[i..=i], slot }
        })
        .collect();
    Batch::new(&segments, 256, device)
}

#[test]
fn agrees_with_the_reference() -> Result<()> {
    for device in devices() {
        for case in cases() {
            run(&case, &device)?;
        }
    }
    Ok(())
}

#[test]
fn metal_kernels_agree_with_the_reference() -> Result<()> {
    emulated(|| {
        agrees_with_the_reference()?;
        agrees_with_numbers_by_hand()?;
        reads_rows_that_lie_apart()
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for (width, offset) in [(4, 2), (2, 0)] {
        let sequences = &[Continued(2), Fresh(30), Continued(19), Continued(1)];
        run(&Case { width, offset, sequences, ..BASE }, &Device::Cpu)?;
    }
    reads_rows_that_lie_apart()
}

#[test]
fn metal_mutants_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_device);\n", ""),
        ("first + j >= begin + PAST", "first + j > begin + PAST"),
        ("inside && !fresh", "inside"),
        ("!fresh)\n      window[j] = slot[first + j - begin]", "!fresh)\n      window[j] = slot[j]"),
        ("channel < sizes.channels && first < end", "channel < sizes.channels"),
        ("channel < sizes.channels && first < end", "first < end"),
        ("row_start(sizes.x, token, 0)", "ulong(token) * sizes.channels"),
        ("  if (last == end)\n", ""),
        ("min(first + share, end)", "first + share"),
        ("sum / (1 + exp(-sum))", "sum"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_metal_launches_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

#[test]
fn portable_lanes_agree_with_the_reference() -> Result<()> {
    alone(|| portable(|| cases().iter().try_for_each(|case| run(case, &Device::Cpu))))
}

/// Two channels, three taps, by hand, with silu(0) = 0, silu(ln 3) = 3/4 ln 3 and silu(-ln 3) = -1/4 ln 3:
///
/// ```text
/// channel 0: taps 1 2 3, x 1 -2 2 times ln 3: sums 3, 2 - 6 = -4, 1 - 4 + 6 = 3
/// channel 1: taps 0 1 1, x 1 0 -2 times ln 3: sums 1, 1, -2
/// ```
#[test]
fn agrees_with_numbers_by_hand() -> Result<()> {
    let unit = 3f32.ln();
    // silu(n ln 3) = n ln 3 / (1 + 3^-n)
    let want = [3.0 * 27.0 / 28.0, 0.75, -4.0 / 82.0, 0.75, 3.0 * 27.0 / 28.0, -2.0 / 10.0].map(|y| y * unit);
    let want_state = [-2.0, 2.0, 0.0, -2.0].map(|x| x * unit);
    let (x, weight) = ([1.0, 1.0, -2.0, 0.0, 2.0, -2.0].map(|x| x * unit), [1.0, 2.0, 3.0, 0.0, 1.0, 1.0]);
    for device in devices() {
        let batch = pack(&[(0, Fresh(3))], &device)?;
        let state = poisoned(&[1, 2, 2], DType::F32, &device)?;
        let x_tensor = Tensor::from_slice(&x, (3, 2), &device)?;
        let out = causal_conv1d(&x_tensor, &Tensor::from_slice(&weight, (2, 3), &device)?, &state, &batch)?;
        assert_close("output", &values(&out)?, &want, 1e-6);
        assert_eq!(values(&state)?, want_state);

        let mut state = [f32::NAN; 4];
        let out = reference::causal_conv1d(&x, &weight, &mut state, &batch, 2, 3);
        assert_close("reference: output", &out, &want, 1e-6);
        assert_eq!(state, want_state);
    }
    Ok(())
}

/// The reference keeps a window; this sums over the whole sequence behind zeros, in f64.
#[test]
fn reference_agrees_with_a_direct_sum() -> Result<()> {
    const N: usize = 20;
    const C: usize = 5;
    for width in [2, 3, 4] {
        let mut random = Random::new(2);
        let x: Vec<f32> = (0..N * C).map(|_| random.normal(1.0)).collect();
        let weight: Vec<f32> = (0..C * width).map(|_| random.normal(0.5)).collect();
        let padded = [vec![0.0; (width - 1) * C], x.clone()].concat();
        let want: Vec<f32> = (0..N * C)
            .map(|i| {
                let (t, c) = (i / C, i % C);
                let terms = (0..width).map(|j| f64::from(weight[c * width + j]) * f64::from(padded[(t + j) * C + c]));
                let sum: f64 = terms.sum();
                (sum / (1.0 + (-sum).exp())) as f32
            })
            .collect();

        let mut state = vec![f32::NAN; C * (width - 1)];
        let batch = pack(&[(0, Fresh(N))], &Device::Cpu)?;
        let got = reference::causal_conv1d(&x, &weight, &mut state, &batch, C, width);
        assert_close(&format!("width {width}"), &got, &want, 1e-6);
        for (i, kept) in state.iter().enumerate() {
            let (c, j) = (i / (width - 1), i % (width - 1));
            assert_eq!(*kept, x[(N - (width - 1) + j) * C + c], "width {width}: channel {c}, input {j}");
        }
    }
    Ok(())
}

/// A token's bits depend on its own sequence alone: not on where the prompt was cut, what is packed beside it, the
/// slot, or the number of threads.
#[test]
fn bits_do_not_depend_on_company() -> Result<()> {
    const N: usize = 50;
    const C: usize = 300;
    for (dtype, width) in [(DType::F32, 2), (DType::BF16, 3), (DType::F32, 4), (DType::F16, 4)] {
        let mut random = Random::new(3);
        let x = random.tensor(&[N, C], 1.0, dtype, &Device::Cpu)?;
        let weight = random.tensor(&[C, width], 0.5, DType::F32, &Device::Cpu)?;
        let fresh_state = || poisoned(&[3, C, width - 1], DType::F32, &Device::Cpu);
        let bits = |out: &Tensor| -> Result<Vec<u32>> { Ok(values(out)?.iter().map(|x| x.to_bits()).collect()) };
        // The outputs and the window of the sequence, run in steps that end at `cuts` and at its end.
        let run = |cuts: &[usize]| -> Result<(Vec<u32>, Vec<u32>)> {
            let state = fresh_state()?;
            let mut outs = Vec::new();
            let mut start = 0;
            for &end in cuts.iter().chain([&N]) {
                let sequence = if start == 0 { Fresh(end) } else { Continued(end - start) };
                let batch = pack(&[(2, sequence)], &Device::Cpu)?;
                outs.push(causal_conv1d(&x.narrow(0, start, end - start)?, &weight, &state, &batch)?);
                start = end;
            }
            Ok((bits(&Tensor::cat(&outs, 0)?)?, bits(&state.narrow(0, 2, 1)?)?))
        };

        let whole = run(&[])?;
        let token_by_token: Vec<usize> = (1..N).collect();
        assert_eq!(run(&token_by_token)?, whole, "{dtype:?} width {width}: token by token");
        for cut in 1..N {
            assert_eq!(run(&[cut])?, whole, "{dtype:?} width {width}: cut at {cut}");
        }
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
            assert_eq!(pool.install(|| run(&[17]))?, whole, "{dtype:?} width {width}: {threads} threads");
        }

        let strangers = random.tensor(&[23, C], 1.0, dtype, &Device::Cpu)?;
        let packed = Tensor::cat(&[&strangers.narrow(0, 0, 21)?, &x, &strangers.narrow(0, 21, 2)?], 0)?;
        let state = fresh_state()?;
        let batch = pack(&[(2, Fresh(21)), (0, Fresh(N)), (1, Fresh(2))], &Device::Cpu)?;
        let out = causal_conv1d(&packed, &weight, &state, &batch)?.narrow(0, 21, N)?;
        assert_eq!((bits(&out)?, bits(&state.narrow(0, 0, 1)?)?), whole, "{dtype:?} width {width}: packed");
    }
    Ok(())
}

/// A column range of a wider matrix, as a merged projection leaves it.
#[test]
fn reads_rows_that_lie_apart() -> Result<()> {
    for device in devices() {
        let (n, channels, width) = (9, 24, 4);
        let mut random = Random::new(4);
        let x = random.tensor(&[n, 40], 1.0, DType::F32, &device)?.narrow(1, 5, channels)?;
        let weight = random.tensor(&[channels, width], 0.5, DType::F32, &device)?;
        let batch = pack(&[(0, Fresh(n))], &device)?;
        let state = poisoned(&[1, channels, width - 1], DType::F32, &device)?;
        let got = values(&causal_conv1d(&x, &weight, &state, &batch)?)?;
        let mut want_state = vec![f32::NAN; channels * (width - 1)];
        let (x, weight) = (values(&x)?, values(&weight)?);
        let want = reference::causal_conv1d(&x, &weight, &mut want_state, &batch, channels, width);
        assert_close(&format!("{device:?}: output"), &got, &want, op_limit(DType::F32));
        assert_eq!(values(&state)?, want_state, "{device:?}");
    }
    Ok(())
}

/// Each refusal names what it got and what it expected.
#[test]
fn refuses_what_does_not_fit() -> Result<()> {
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let (x, weight, state) = (zeros(&[3, 8])?, zeros(&[8, 4])?, zeros(&[1, 8, 3])?);
    let batch = pack(&[(0, Fresh(3))], &Device::Cpu)?;
    let refusal = |x: &Tensor, weight: &Tensor, state: &Tensor, slot: u32| -> Result<String> {
        let batch = if slot == 0 { &batch } else { &pack(&[(slot, Fresh(3))], &Device::Cpu)? };
        Ok(causal_conv1d(x, weight, state, batch).expect_err("must be refused").to_string())
    };
    let refusals = [
        (refusal(&zeros(&[2, 8])?, &weight, &state, 0)?, "the batch has 3 tokens"),
        (refusal(&x, &zeros(&[7, 4])?, &state, 0)?, "expected [8, K]"),
        (refusal(&x, &zeros(&[8, 1])?, &state, 0)?, "K of 2 to 4"),
        (refusal(&x, &zeros(&[8, 5])?, &state, 0)?, "K of 2 to 4"),
        (refusal(&x, &weight, &zeros(&[1, 8, 4])?, 0)?, "expected f32 [S, 8, 3]"),
        (refusal(&x, &weight, &state.to_dtype(DType::BF16)?, 0)?, "BF16"),
        (refusal(&x, &weight, &state, 1)?, "slot 1"),
        (refusal(&x.to_dtype(DType::U32)?, &weight, &state, 0)?, "U32"),
    ];
    for (message, part) in refusals {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    Ok(())
}
