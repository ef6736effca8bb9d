use candle_core::{Device, Tensor};

use super::*;
use crate::Segment;
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
    for sizes in sizes {
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
    let &Case { dtype, heads: (hk, hv), sizes: (kd, vd), offset, .. } = case;
    let device = state.device();
    let tokens = [0; 100];
    let blocks: Vec<u32> = (0..sequences.len() as u32).collect();
    let segments: Vec<Segment> = sequences
        .iter()
        .enumerate()
        .map(|(i, sequence)| {
            let (len, past) = match *sequence {
                Fresh(len) => (len, 0),
                Continued(len) => (len, 7),
            };
            Segment { tokens: &tokens[..len], past, blocks: &blocks[i..=i], slot: order[i] }
        })
        .collect();
    let batch = Batch::new(&segments, 128, device)?;

    let n = batch.num_tokens();
    let q = random.tensor(&[offset + n, hk, kd], 1.0, dtype, device)?.narrow(0, offset, n)?;
    let k = random.tensor(&[offset + n, hk, kd], 1.0, dtype, device)?.narrow(0, offset, n)?;
    let v = random.tensor(&[offset + n, hv, vd], 1.0, dtype, device)?.narrow(0, offset, n)?;
    let mut gate = |sample: fn(Gates, &mut Random) -> f32| -> Result<Tensor> {
        let values: Vec<f32> = (0..(offset + n) * hv).map(|_| sample(case.gates, random)).collect();
        Tensor::from_vec(values, (offset + n, hv), device)?.narrow(0, offset, n)
    };
    let g = gate(|gates, random| match gates {
        Gates::Typical => -3.0 * (random.normal(0.5).abs()).powi(3).min(1.0),
        Gates::Extreme => [0.0, -0.01, -20.0][random.below(3)],
        Gates::Constant(g, _) => g,
    })?;
    let beta = gate(|gates, random| match gates {
        Gates::Typical => (1.0 + random.normal(1.0).exp()).recip(),
        Gates::Extreme => [0.0, 1.0][random.below(2)],
        Gates::Constant(_, beta) => beta,
    })?;
    let out = gated_delta_rule(&q, &k, &v, &g, &beta, state, &batch)?;

    assert_eq!((out.dims(), out.dtype()), ([n, hv, vd].as_slice(), dtype), "{case:?} {device:?}");
    let (q, k, v, g, beta) = (values(&q)?, values(&k)?, values(&v)?, values(&g)?, values(&beta)?);
    let inputs = reference::Inputs { q: &q, k: &k, v: &v, g: &g, beta: &beta, hk, hv, kd, vd };
    let want_out = reference::recurrent(&inputs, want, &batch);
    assert_close(&format!("{case:?} {device:?}: output"), &values(&out)?, &want_out, op_limit(dtype));

    let got = values(state)?;
    for (slot, (got, want)) in got.chunks(hv * vd * kd).zip(want.chunks(hv * vd * kd)).enumerate() {
        if order[..sequences.len()].contains(&(slot as u32)) {
            // In f32 whatever the operands' dtype.
            assert_close(&format!("{case:?} {device:?}: slot {slot}"), got, want, op_limit(DType::F32));
        } else {
            assert!(got.iter().all(|s| s.is_nan()), "{case:?} {device:?}: wrote unused slot {slot}");
        }
    }
    Ok(())
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
