//! The kernels for Metal: schedules, planted mistakes, and prompts that they take in chunks.

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated, is_thorough};

#[test]
fn recurrence_agrees_with_the_reference() -> Result<()> {
    emulated(|| {
        agrees_with_the_reference()?;
        agrees_with_numbers_by_hand()?;
        reads_rows_that_lie_apart()?;
        honours_any_start()
    })
}

/// A few of the cases, where many mistakes are planted.
fn smoke() -> Result<()> {
    for sizes in [(64, 20), (33, 7)] {
        let sequences = &[Continued(2), Fresh(3), Continued(1)];
        run(&Case { sizes, sequences, offset: 1, ..BASE }, &Device::Cpu)?;
    }
    reads_rows_that_lie_apart()?;
    honours_any_start()
}

#[test]
fn mutants_of_the_recurrence_are_noticed() {
    let mutants = [
        ("head * sizes.hk / hv", "head * sizes.hk / hv * 0"),
        ("row < vd;", "row <= vd;"),
        ("context_lens[sequence] != end - begin", "context_lens[sequence] == end - begin"),
        ("state_slots[sequence]", "sequence"),
        ("row_start(sizes.q, token, shared_head)", "ulong(token * sizes.hk + shared_head) * kd"),
        ("row_start(sizes.k, token, shared_head)", "row_start(sizes.q, token, shared_head)"),
        ("row_start(sizes.v, token, head)", "(token * hv + head) * vd"),
        ("step = PARTS / 2", "step = PARTS / 4"),
        ("decay * (sums[2] * k_scale)", "sums[2] * k_scale"),
        ("EXACT || column + j < kd", "true"),
        ("inside && part == 0", "part == 0"),
        ("cu_seqlens[sequence + 1]", "cu_seqlens[sequence + 1] - 1"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, smoke);
}

#[test]
fn wrong_launches_of_the_recurrence_are_noticed() {
    assert_wrong_launches_fail(smoke);
}

/// Prompts that go by chunks on Metal, whole and in part, fresh and continued, beside sequences that do not.
fn chunks_smoke() -> Result<()> {
    let sequences = &[Continued(3), Fresh(70), Continued(24)];
    let case = Case { heads: (1, 2), sizes: (128, 64), sequences, offset: 1, ..BASE };
    run(&case, &Device::Cpu)?;
    run(&Case { gates: Gates::Extreme, sequences: &[Continued(65)], ..case }, &Device::Cpu)?;
    any_start(30, 128, &Device::Cpu)?;

    // Small gates behind large ones: a sum in f32 would lose their digits.
    let case = Case { heads: (1, 1), sizes: (128, 32), ..BASE };
    let mut operands = Operands::random(&case, 64, &mut Random::new(12), &Device::Cpu)?;
    let gates: Vec<f32> = (0..64).map(|token| if token < 32 { -77.7 } else { -0.01 }).collect();
    operands.g = Tensor::from_vec(gates, (64, 1), &Device::Cpu)?;
    let batch = pack(&[(0, Fresh(64))], &Device::Cpu)?;
    let state = poisoned(&[1, 1, 32, 128], DType::F32, &Device::Cpu)?;
    let got = operands.run(&state, &batch)?;
    let want = operands.define(reference::recurrent, &mut vec![f32::NAN; 32 * 128], &batch)?;
    assert_close("small gates", &values(&got)?, &want, op_limit(DType::F32));
    Ok(())
}

#[test]
fn chunks_agree_with_the_reference() -> Result<()> {
    emulated(|| {
        chunks_smoke()?;
        if is_thorough() {
            return mixed_steps_agree_with_the_reference();
        }
        let sequences = &[Fresh(150), Continued(1), Continued(128), Fresh(23)];
        for (dtype, gates) in [(DType::F16, Gates::Typical), (DType::BF16, Gates::Extreme)] {
            run(&Case { dtype, heads: (1, 2), sizes: (128, 32), sequences, gates, offset: 0 }, &Device::Cpu)?;
        }
        // Gates that a sum of f32 would lose beside the large ones before them.
        for gates in [Gates::Constant(0.0, 1.0), Gates::Constant(-0.01, 1.0), Gates::Constant(-20.0, 1.0)] {
            let case = Case { heads: (1, 1), sizes: (128, 32), sequences: &[Fresh(100)], gates, ..BASE };
            run(&case, &Device::Cpu)?;
        }
        Ok(())
    })
}

#[test]
fn mutants_of_chunks_are_noticed() {
    let barrier = "threadgroup_barrier(mem_flags::mem_threadgroup);\n";
    let dropped = |before: &str, after: &str| (format!("{before}{barrier}{after}"), format!("{before}{after}"));
    let barriers = [
        dropped("stage += STAGE) {\n    ", "    for (uint i = index"),
        dropped("stage + c]) : 0;\n    }\n    ", ""),
        dropped("hv + head];\n  ", "  UNROLL\n  for (uint i = 0; i < 2; i++) {\n    const uint y"),
        dropped("exp(last + last_rest);\n  }\n  ", ""),
        dropped("= x[y];\n    }\n  }\n  ", ""),
        dropped("length - first, CHUNK);\n    ", "    // v - "),
        dropped("chunk.to_output[row];\n      }\n    }\n    ", ""),
        dropped("", "    UNROLL\n    for (uint i = 0; i < 2; i++) {\n      const uint row = own_part"),
        dropped("= x[i][n][1];\n      }\n    }\n    ", ""),
    ];
    let barriers: Vec<(&str, &str)> = barriers.iter().map(|(from, to)| (from.as_str(), to.as_str())).collect();
    let mutants = [
        ("cu_seqlens[sequence] / CHUNK + sequence + chunk", "cu_seqlens[sequence] / CHUNK + chunk"),
        ("CHUNK_PARTS - 1 - simdgroup", "CHUNK_PARTS - 2 - simdgroup"),
        ("token <= min(index, tokens - 1)", "token < min(index, tokens - 1)"),
        ("index < tokens ? beta[ulong(begin + index)", "index < tokens ? beta[ulong(begin)"),
        ("rest += (sum - (next - taken)) + (gate - taken)", "rest += 0"),
        ("x <= y ? exp(", "x < y ? exp("),
        ("k_scales[y] * k_scales[x]", "k_scales[y] * k_scales[y]"),
        ("decay * betas[y] * k_scales[y]", "decay * k_scales[y]"),
        ("decay * q_scales[y] * k_scales[x]", "decay * q_scales[y] * k_scales[y]"),
        ("out.from_state[index] = decay *", "out.from_state[index] ="),
        ("(last_rest - rests[index])) * k_scales", "(last_rest - rests[index]))  * q_scales"),
        ("j < y; j++)\n        x[y]", "j + 1 < y; j++)\n        x[y]"),
        ("-diagonal, sum", "diagonal, sum"),
        ("t[y][n] * betas[x]", "t[y][n] * betas[y]"),
        ("context_lens[sequence] != length", "context_lens[sequence] == length"),
        ("state_slots[sequence]", "sequence"),
        ("value - chunk.from_state[row] * memory[n]", "value - memory[n]"),
        ("out[i][n] *= chunk.to_output[row]", "out[i][n] *= 1"),
        ("s[r][c] *= chunk.decay[0]", "s[r][c] *= 1"),
        ("first_k + c * SIDE + part_x, row < tokens", "first_k + c * SIDE + part_x, true"),
        ("row_start(sizes.k, begin + token, shared_head) + c", "row_start(sizes.q, begin + token, shared_head) + c"),
    ];
    assert_mutants_fail(&metal::CHUNKS, &[&barriers[..], &mutants].concat(), chunks_smoke);
}

#[test]
fn wrong_launches_of_chunks_are_noticed() {
    assert_wrong_launches_fail(chunks_smoke);
}
