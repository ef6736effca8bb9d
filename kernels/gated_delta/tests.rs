//! The delta rule: against the recurrence, by hand, by a second definition, and against itself however a prompt is cut
//! and packed.

mod gates;
mod on_metal;

use candle_core::{Device, Tensor};

use super::*;
use crate::Segment;
use crate::simd::Instructions;
use crate::simd::tests::{alone, available, on, portable};
use crate::testing::{Random, assert_close, devices, op_limit, poisoned, values};

/// One step over packed sequences, each on its own slot, followed by one step of a single token each.
#[derive(Clone, Debug)]
struct Case {
    dtype: DType,
    /// Hk, Hv.
    heads: (usize, usize),
    /// K, V.
    sizes: (usize, usize),
    sequences: &'static [Start],
    gates: Gates,
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

#[derive(Clone, Copy, Debug)]
enum Gates {
    /// What a trained layer sees: decays from 0.05 to nearly 1, beta within (0, 1).
    Typical,
    /// g of 0, -0.01 or -20 and beta of 0 or 1, at random.
    Extreme,
    /// The same g and beta for all.
    Constant(f32, f32),
}

const BASE: Case = Case {
    dtype: DType::F32,
    heads: (2, 4),
    sizes: (32, 32),
    sequences: &[Fresh(5)],
    gates: Gates::Typical,
    offset: 0,
};

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for sequences in [&[Fresh(1)], &[Fresh(2)], &[Fresh(63)], &[Fresh(64)], &[Fresh(65)], &[Fresh(100)]] {
        cases.push(Case { sequences, ..BASE });
    }
    for sequences in [&[Continued(1)], &[Continued(64)], &[Continued(100)]] {
        cases.push(Case { sequences, sizes: (128, 128), ..BASE });
    }
    let sizes =
        [(16, 16), (24, 24), (48, 48), (64, 64), (128, 128), (16, 64), (24, 16), (48, 32), (64, 128), (128, 24)];
    for sizes in sizes.into_iter().chain([(7, 5), (200, 33), (256, 32)]) {
        cases.push(Case { sizes, sequences: &[Fresh(3), Continued(66)], ..BASE });
    }
    for heads in [(1, 1), (3, 3), (1, 2), (2, 6), (1, 3)] {
        cases.push(Case { heads, sizes: (64, 32), ..BASE });
    }
    let packed: &[Start] = &[Continued(1), Fresh(65), Fresh(1), Continued(100), Continued(2), Fresh(64), Continued(1)];
    let decode: &[Start] = &[Continued(1); 9];
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        for sequences in [packed, decode] {
            for (sizes, offset) in [((128, 128), 0), ((64, 48), 3)] {
                cases.push(Case { dtype, sizes, sequences, offset, ..BASE });
            }
        }
        cases.push(Case { dtype, sequences: packed, gates: Gates::Extreme, ..BASE });
    }
    for gates in [(0.0, 1.0), (0.0, 0.0), (-0.01, 1.0), (-0.01, 0.0), (-20.0, 1.0)] {
        let gates = Gates::Constant(gates.0, gates.1);
        cases.push(Case { gates, sequences: &[Fresh(65), Continued(100)], ..BASE });
    }
    // Without beta this gate leaves nothing above the smallest normal number after five tokens.
    cases.push(Case { gates: Gates::Constant(-20.0, 0.0), sequences: &[Fresh(2), Continued(2)], ..BASE });
    cases
}

fn run(case: &Case, device: &Device) -> Result<()> {
    let mut random = Random::new(1);
    let slots = case.sequences.len() + 2;
    let order = random.permutation(slots);
    let &Case { heads: (_, hv), sizes: (kd, vd), .. } = case;

    let mut want = vec![f32::NAN; slots * hv * vd * kd];
    for (sequence, &slot) in case.sequences.iter().zip(&order) {
        if let Continued(_) = sequence {
            want[slot as usize * hv * vd * kd..][..hv * vd * kd].fill_with(|| random.normal(0.5));
        }
    }
    let whole = poisoned(&[case.offset + slots, hv, vd, kd], DType::F32, device)?;
    whole.slice_set(&Tensor::from_slice(&want, (slots, hv, vd, kd), device)?, 0, case.offset)?;
    let state = whole.narrow(0, case.offset, slots)?;

    step(case, case.sequences, &order, &state, &mut want, &mut random)?;
    let mut next = vec![Continued(1); case.sequences.len()];
    next[0] = Fresh(1); // the slot now belongs to another sequence
    step(case, &next, &order, &state, &mut want, &mut random)?;

    let before = values(&whole.narrow(0, 0, case.offset.max(1))?)?;
    assert!(case.offset == 0 || before.iter().all(|s| s.is_nan()), "{case:?} {device:?}: wrote before the state");
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
    let &Case { dtype, heads: (_, hv), sizes: (kd, vd), .. } = case;
    let device = state.device();
    let parts: Vec<(u32, Start)> = order.iter().copied().zip(sequences.iter().copied()).collect();
    let batch = pack(&parts, device)?;
    let operands = Operands::random(case, batch.num_tokens(), random, device)?;
    let out = operands.run(state, &batch)?;

    assert_eq!((out.dims(), out.dtype()), (operands.v.dims(), dtype), "{case:?} {device:?}");
    let want_out = operands.define(reference::recurrent, want, &batch)?;
    assert_close(&format!("{case:?} {device:?}: output"), &values(&out)?, &want_out, op_limit(dtype));

    // In f32 whatever the operands' dtype, except on tensor cores, whose operands are what the caller's are.
    let is_chunked = device.is_cuda() && (kd, vd) == (128, 128);
    let state_limit = op_limit(if is_chunked { dtype } else { DType::F32 });
    let got = values(state)?;
    for (slot, (got, want)) in got.chunks(hv * vd * kd).zip(want.chunks(hv * vd * kd)).enumerate() {
        if order[..sequences.len()].contains(&(slot as u32)) {
            assert_close(&format!("{case:?} {device:?}: slot {slot}"), got, want, state_limit);
        } else {
            assert!(got.iter().all(|s| s.is_nan()), "{case:?} {device:?}: wrote unused slot {slot}");
        }
    }
    Ok(())
}

/// A batch of (slot, tokens).
fn pack(sequences: &[(u32, Start)], device: &Device) -> Result<Batch> {
    let tokens = [0; 512];
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
    Batch::new(&segments, 1024, device)
}

struct Operands {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
}

impl Operands {
    fn random(case: &Case, n: usize, random: &mut Random, device: &Device) -> Result<Self> {
        let &Case { dtype, heads: (hk, hv), sizes: (kd, vd), offset, gates, .. } = case;
        let q = random.tensor(&[offset + n, hk, kd], 1.0, dtype, device)?;
        let k = random.tensor(&[offset + n, hk, kd], 1.0, dtype, device)?;
        let v = random.tensor(&[offset + n, hv, vd], 1.0, dtype, device)?;
        let mut gate = |sample: fn(Gates, &mut Random) -> f32| {
            let values: Vec<f32> = (0..(offset + n) * hv).map(|_| sample(gates, random)).collect();
            Tensor::from_vec(values, (offset + n, hv), device)
        };
        let g = gate(|gates, random| match gates {
            Gates::Typical => -3.0 * random.normal(0.5).abs().powi(3).min(1.0),
            Gates::Extreme => [0.0, -0.01, -20.0][random.below(3)],
            Gates::Constant(g, _) => g,
        })?;
        let beta = gate(|gates, random| match gates {
            Gates::Typical => (1.0 + random.normal(1.0).exp()).recip(),
            Gates::Extreme => [0.0, 1.0][random.below(2)],
            Gates::Constant(_, beta) => beta,
        })?;
        Self { q, k, v, g, beta }.tokens(offset, n)
    }

    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { q: f(&self.q)?, k: f(&self.k)?, v: f(&self.v)?, g: f(&self.g)?, beta: f(&self.beta)? })
    }

    fn tokens(&self, start: usize, len: usize) -> Result<Self> {
        self.map(|operand| operand.narrow(0, start, len))
    }

    fn run(&self, state: &Tensor, batch: &Batch) -> Result<Tensor> {
        gated_delta_rule(&self.q, &self.k, &self.v, &self.g, &self.beta, state, batch)
    }

    fn define(&self, definition: reference::Definition, state: &mut [f32], batch: &Batch) -> Result<Vec<f32>> {
        let ((_, hk, kd), (_, hv, vd)) = (self.q.dims3()?, self.v.dims3()?);
        let [q, k, v, g, beta] = [&self.q, &self.k, &self.v, &self.g, &self.beta].map(values);
        let (q, k, v, g, beta) = (q?, k?, v?, g?, beta?);
        let inputs = reference::Inputs { q: &q, k: &k, v: &v, g: &g, beta: &beta, hk, hv, kd, vd };
        Ok(definition(&inputs, state, batch))
    }
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
fn portable_lanes_agree_with_the_reference() -> Result<()> {
    alone(|| portable(|| cases().iter().try_for_each(|case| run(case, &Device::Cpu))))
}

/// The groups of rows are others with AVX-512, and must not show.
#[test]
fn instruction_sets_that_fuse_agree_to_the_bit() -> Result<()> {
    for sizes in [(128, 128), (40, 21)] {
        let case = Case { sizes, ..BASE };
        let operands = Operands::random(&case, 130, &mut Random::new(10), &Device::Cpu)?;
        let run = || -> Result<Vec<f32>> {
            let state = poisoned(&[1, case.heads.1, sizes.1, sizes.0], DType::F32, &Device::Cpu)?;
            let out = operands.run(&state, &pack(&[(0, Fresh(130))], &Device::Cpu)?)?;
            Ok([values(&out)?, values(&state)?].concat())
        };
        let fused = available().filter(|&instructions| instructions > Instructions::Portable);
        let results: Vec<_> = fused.map(|set| alone(|| on(set, run))).collect::<Result<_>>()?;
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]), "{sizes:?}");
    }
    Ok(())
}

/// Two tokens of one head, by hand:
///
/// ```text
/// k1 = [.6 .8 0 0]  S1 = beta1 v1 k1^T = .5 [1 2]^T k1 = [.3 .4 0 0; .6 .8 0 0]     q1 = [0 .5 0 0]  y1 = [.2 .4]
/// k2 = [1 0 0 0]    S1 / 2 = [.15 .2 0 0; .3 .4 0 0]  memory = [.15 .3]
///                   beta2 (v2 - memory) = [1 0]  S2 = [1.15 .2 0 0; .3 .4 0 0]      q2 = [.5 0 0 0]  y2 = [.575 .15]
/// ```
#[test]
fn agrees_with_numbers_by_hand() -> Result<()> {
    for device in devices() {
        let tensor = |values: &[f32], shape: &[usize]| Tensor::from_slice(values, shape, &device);
        let operands = Operands {
            q: tensor(&[0.0, 5.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0], &[2, 1, 4])?,
            k: tensor(&[3.0, 4.0, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0], &[2, 1, 4])?,
            v: tensor(&[1.0, 2.0, 1.15, 0.3], &[2, 1, 2])?,
            g: tensor(&[-9.0, 0.5f32.ln()], &[2, 1])?,
            beta: tensor(&[0.5, 1.0], &[2, 1])?,
        };
        let state = poisoned(&[1, 1, 2, 4], DType::F32, &device)?;
        let batch = pack(&[(0, Fresh(2))], &device)?;
        let out = operands.run(&state, &batch)?;
        assert_close("output", &values(&out)?, &[0.2, 0.4, 0.575, 0.15], 1e-6);
        assert_close("state", &values(&state)?, &[1.15, 0.2, 0.0, 0.0, 0.3, 0.4, 0.0, 0.0], 1e-6);

        let mut state = [f32::NAN; 8];
        let out = operands.define(reference::recurrent, &mut state, &batch)?;
        assert_close("reference: output", &out, &[0.2, 0.4, 0.575, 0.15], 1e-6);
        assert_close("reference: state", &state, &[1.15, 0.2, 0.0, 0.0, 0.3, 0.4, 0.0, 0.0], 1e-6);
    }
    Ok(())
}

/// Two definitions that share no step: a mistake in either shows.
#[test]
fn recurrent_and_chunked_definitions_agree() -> Result<()> {
    let mut random = Random::new(2);
    for sequence in [Fresh(1), Fresh(63), Fresh(64), Fresh(65), Continued(200)] {
        for gates in [Gates::Typical, Gates::Extreme, Gates::Constant(0.0, 1.0), Gates::Constant(-20.0, 1.0)] {
            let case = Case { sizes: (24, 16), gates, ..BASE };
            let batch = pack(&[(1, sequence)], &Device::Cpu)?;
            let operands = Operands::random(&case, batch.num_tokens(), &mut random, &Device::Cpu)?;
            let mut one: Vec<f32> = (0..2 * 4 * 16 * 24).map(|_| random.normal(0.5)).collect();
            let mut other = one.clone();
            let want = operands.define(reference::recurrent, &mut one, &batch)?;
            let got = operands.define(reference::chunked, &mut other, &batch)?;
            assert_close(&format!("{sequence:?} {gates:?}: output"), &got, &want, 1e-5);
            assert_close(&format!("{sequence:?} {gates:?}: state"), &other, &one, 1e-5);
        }
    }
    Ok(())
}

/// A token's bits depend on its own sequence alone: not on where the prompt was cut, what is packed beside it, the
/// slot, or the number of threads.
#[test]
fn bits_do_not_depend_on_company() -> Result<()> {
    const N: usize = 130;
    let kinds = [(DType::F32, (64, 64)), (DType::BF16, (24, 20)), (DType::F16, (12, 7))];
    for (device, (dtype, sizes)) in devices().iter().flat_map(|device| kinds.map(|kind| (device, kind))) {
        let case = Case { dtype, sizes, ..BASE };
        let mut random = Random::new(3);
        let operands = Operands::random(&case, N, &mut random, device)?;
        let fresh_state = || poisoned(&[3, case.heads.1, sizes.1, sizes.0], DType::F32, device);
        let bits = |out: &Tensor| -> Result<Vec<u32>> { Ok(values(out)?.iter().map(|x| x.to_bits()).collect()) };
        // The outputs and the state of the sequence, run in steps that end at `cuts` and at its end.
        let run = |cuts: &[usize]| -> Result<(Vec<u32>, Vec<u32>)> {
            let state = fresh_state()?;
            let mut outs = Vec::new();
            let mut start = 0;
            for &end in cuts.iter().chain([&N]) {
                let sequence = if start == 0 { Fresh(end) } else { Continued(end - start) };
                let batch = pack(&[(2, sequence)], device)?;
                outs.push(operands.tokens(start, end - start)?.run(&state, &batch)?);
                start = end;
            }
            Ok((bits(&Tensor::cat(&outs, 0)?)?, bits(&state.narrow(0, 2, 1)?)?))
        };

        let whole = run(&[])?;
        let token_by_token: Vec<usize> = (1..N).collect();
        assert_eq!(run(&token_by_token)?, whole, "{case:?} {device:?}: token by token");
        for cut in 1..N {
            assert_eq!(run(&[cut])?, whole, "{case:?} {device:?}: cut at {cut}");
        }
        for threads in [1, 3, 16] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads can be started");
            assert_eq!(pool.install(|| run(&[65]))?, whole, "{case:?} {device:?}: {threads} threads");
        }

        let strangers = Operands::random(&case, 70, &mut random, device)?;
        let (front, back) = (strangers.tokens(0, 66)?, strangers.tokens(66, 4)?);
        let cat = |f: fn(&Operands) -> &Tensor| Tensor::cat(&[f(&front), f(&operands), f(&back)], 0);
        let packed = Operands {
            q: cat(|o| &o.q)?,
            k: cat(|o| &o.k)?,
            v: cat(|o| &o.v)?,
            g: cat(|o| &o.g)?,
            beta: cat(|o| &o.beta)?,
        };
        let state = fresh_state()?;
        let batch = pack(&[(2, Fresh(66)), (0, Fresh(N)), (1, Fresh(4))], device)?;
        let out = packed.run(&state, &batch)?.narrow(0, 66, N)?;
        assert_eq!((bits(&out)?, bits(&state.narrow(0, 0, 1)?)?), whole, "{case:?} {device:?}: packed");
    }
    Ok(())
}

/// Column ranges of one matrix, as a projection leaves them.
#[test]
fn reads_rows_that_lie_apart() -> Result<()> {
    for device in devices() {
        let (n, hk, hv, d) = (9, 2, 4, 32);
        let batch = pack(&[(1, Fresh(n))], &device)?;
        let mut random = Random::new(4);
        let all = random.tensor(&[n, 2 * hk + hv, d], 1.0, DType::F32, &device)?;
        let gates = random.tensor(&[n, 2 * hv], 0.2, DType::F32, &device)?.abs()?;
        let apart = Operands {
            q: all.narrow(1, 0, hk)?,
            k: all.narrow(1, hk, hk)?,
            v: all.narrow(1, 2 * hk, hv)?,
            g: gates.narrow(1, 0, hv)?.neg()?,
            beta: gates.narrow(1, hv, hv)?,
        };
        let state = poisoned(&[2, hv, d, d], DType::F32, &device)?;
        let out = apart.run(&state, &batch)?;
        let mut want_state = vec![f32::NAN; 2 * hv * d * d];
        let want = apart.define(reference::recurrent, &mut want_state, &batch)?;
        assert_close(&format!("{device:?}: output"), &values(&out)?, &want, op_limit(DType::F32));
        let (got, want) = (values(&state.get(1)?)?, &want_state[hv * d * d..]);
        assert_close(&format!("{device:?}: state"), &got, want, op_limit(DType::F32));
    }
    Ok(())
}

#[test]
fn honours_any_start() -> Result<()> {
    devices().iter().try_for_each(|device| any_start(9, 32, device))
}

/// No start or stride here is a multiple of more than one value, where others let kernels move several at once. `n`
/// tokens of two heads, K and V `d`.
fn any_start(n: usize, d: usize, device: &Device) -> Result<()> {
    let batch = pack(&[(1, Fresh(n))], device)?;
    let mut random = Random::new(8);
    let gate = |value: f32| Tensor::full(value, 2 * n + 1, device)?.narrow(0, 1, 2 * n)?.reshape((n, 2));
    let mut part =
        |i: usize| random.tensor(&[n, 6 + i, d + 1 + 2 * i], 1.0, DType::F32, device)?.narrow(1, 2, 2)?.narrow(2, 1, d);
    let operands = Operands { q: part(0)?, k: part(1)?, v: part(2)?, g: gate(-0.1)?, beta: gate(0.5)? };
    let state = poisoned(&[1 + 4 * d * d], DType::F32, device)?.narrow(0, 1, 4 * d * d)?.reshape((2, 2, d, d))?;
    let out = operands.run(&state, &batch)?;
    let mut want_state = vec![f32::NAN; 4 * d * d];
    let want = operands.define(reference::recurrent, &mut want_state, &batch)?;
    assert_close(&format!("{device:?}: output"), &values(&out)?, &want, op_limit(DType::F32));
    let got = values(&state.get(1)?)?;
    assert_close(&format!("{device:?}: state"), &got, &want_state[2 * d * d..], op_limit(DType::F32));
    Ok(())
}

/// Rounding the inputs to bf16 costs about its 2^-9, and no more after 512 steps than after the first 64.
#[test]
fn bf16_inputs_do_not_drift() -> Result<()> {
    for device in devices() {
        let case = Case { sizes: (64, 64), ..BASE };
        let operands = Operands::random(&case, 512, &mut Random::new(5), &device)?;
        let round = |x: &Tensor| x.to_dtype(DType::BF16);
        let rounded = Operands {
            q: round(&operands.q)?,
            k: round(&operands.k)?,
            v: round(&operands.v)?,
            g: operands.g.clone(),
            beta: operands.beta.clone(),
        };
        let batch = pack(&[(0, Fresh(512))], &device)?;
        let state = poisoned(&[1, 4, 64, 64], DType::F32, &device)?;
        let rounded_state = state.copy()?;
        let (want, got) = (operands.run(&state, &batch)?, rounded.run(&rounded_state, &batch)?);
        for (start, len) in [(0, 64), (448, 64)] {
            let [got, want] = [&got, &want].map(|out| values(&out.narrow(0, start, len)?));
            assert_close(&format!("{device:?}: tokens from {start}"), &got?, &want?, 5e-3);
        }
        assert_close(&format!("{device:?}: state"), &values(&rounded_state)?, &values(&state)?, 5e-3);
    }
    Ok(())
}

/// Prompts of several chunks and parts of one, beside sequences too short for any.
#[test]
fn mixed_steps_agree_with_the_reference() -> Result<()> {
    let sequences = &[Fresh(300), Continued(1), Continued(129), Fresh(23), Continued(24), Fresh(128)];
    for device in devices() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (heads, gates) in [((2, 4), Gates::Extreme), ((3, 3), Gates::Typical), ((1, 2), Gates::Typical)] {
                run(&Case { dtype, heads, sizes: (128, 128), sequences, gates, offset: 0 }, &device)?;
            }
        }
    }
    Ok(())
}

/// A long prompt in chunks: its last tokens are as close as its first.
#[test]
fn long_prompts_do_not_drift() -> Result<()> {
    const N: usize = 1500;
    for device in devices() {
        let case = Case { dtype: DType::BF16, heads: (1, 2), sizes: (128, 128), ..BASE };
        let operands = Operands::random(&case, N, &mut Random::new(10), &device)?;
        let batch = Batch::new(&[Segment { tokens: &[0; N], past: 0, blocks: &[0], slot: 0 }], N, &device)?;
        let state = poisoned(&[1, 2, 128, 128], DType::F32, &device)?;
        let got = values(&operands.run(&state, &batch)?)?;
        let mut want_state = vec![f32::NAN; 2 * 128 * 128];
        let want = operands.define(reference::recurrent, &mut want_state, &batch)?;
        for (part, (got, want)) in got.chunks(500 * 2 * 128).zip(want.chunks(500 * 2 * 128)).enumerate() {
            assert_close(&format!("{device:?}: third {part}"), got, want, op_limit(DType::BF16));
        }
        assert_close(&format!("{device:?}: state"), &values(&state)?, &want_state, op_limit(DType::BF16));
    }
    Ok(())
}

/// A captured step is replayed with fewer sequences: the others have no context, and no slot of their own.
#[test]
fn padding_writes_no_state() -> Result<()> {
    for (device, d) in devices().into_iter().filter(Device::is_cuda).flat_map(|d| [(d.clone(), 128), (d, 32)]) {
        let case = Case { sizes: (d, d), ..BASE };
        let operands = Operands::random(&case, 2, &mut Random::new(11), &device)?;
        let mut batch = pack(&[(1, Continued(1)), (0, Continued(1))], &device)?;
        batch.context_lens = Tensor::new(&[8u32, 0], &device)?;
        let state = poisoned(&[2, 4, d, d], DType::F32, &device)?;
        state.slice_set(&Tensor::zeros((1, 4, d, d), DType::F32, &device)?, 0, 1)?;
        operands.run(&state, &batch)?;
        let got = values(&state)?;
        let (padding, live) = got.split_at(got.len() / 2);
        assert!(padding.iter().all(|s| s.is_nan()), "{device:?} {d}: padding wrote its slot");
        assert!(live.iter().all(|s| s.is_finite()), "{device:?} {d}");
    }
    Ok(())
}

#[test]
fn cuda_refuses_large_keys() -> Result<()> {
    for device in devices().into_iter().filter(Device::is_cuda) {
        let case = Case { sizes: (257, 16), ..BASE };
        let operands = Operands::random(&case, 1, &mut Random::new(9), &device)?;
        let state = poisoned(&[1, 4, 16, 257], DType::F32, &device)?;
        let error = operands.run(&state, &pack(&[(0, Fresh(1))], &device)?).expect_err("must be refused");
        assert!(error.to_string().contains("K is 257"), "{error}");
    }
    Ok(())
}

/// Each refusal names what it got and what it expected.
#[test]
fn refuses_what_does_not_fit() -> Result<()> {
    let batch = pack(&[(0, Fresh(3))], &Device::Cpu)?;
    let operands = Operands::random(&BASE, 3, &mut Random::new(7), &Device::Cpu)?;
    let state = poisoned(&[1, 4, 32, 32], DType::F32, &Device::Cpu)?;
    let refusal = |operands: Operands, state: &Tensor, batch: &Batch| {
        operands.run(state, batch).expect_err("must be refused").to_string()
    };
    let with = |f: fn(&mut Operands)| {
        let mut operands = operands.map(|x| Ok(x.clone()))?;
        f(&mut operands);
        Result::Ok(operands)
    };
    let refusals = [
        (refusal(operands.tokens(0, 2)?, &state, &batch), "the batch has 3 tokens"),
        (refusal(with(|o| o.v = o.v.narrow(1, 0, 3).expect("3 of 4"))?, &state, &batch), "a multiple of Hk"),
        (refusal(with(|o| o.k = o.k.narrow(2, 0, 24).expect("24 of 32"))?, &state, &batch), "k is [3, 2, 24]"),
        (refusal(with(|o| o.g = o.g.narrow(1, 0, 2).expect("2 of 4"))?, &state, &batch), "expected f32 [3, 4]"),
        (refusal(with(|_| ())?, &state.narrow(2, 0, 16)?, &batch), "expected f32 [S, 4, 32, 32]"),
        (refusal(with(|_| ())?, &state, &pack(&[(1, Fresh(3))], &Device::Cpu)?), "slot 1"),
    ];
    for (message, part) in refusals {
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    Ok(())
}
