//! The kernels for Metal: schedules and planted mistakes.

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated, is_thorough};

#[test]
fn paged_attention_is_the_reference() -> Result<()> {
    emulated(|| cases().into_iter().try_for_each(|case| run_paged_attention(case, &Device::Cpu)))
}

#[test]
fn attention_is_the_reference() -> Result<()> {
    emulated(|| cases().into_iter().step_by(3).try_for_each(|case| run_attention(case, &Device::Cpu)))
}

/// The cases of tensor cores, in turn paged and not; all of both are for thorough runs.
#[test]
fn tiles_are_the_reference() -> Result<()> {
    emulated(|| {
        for (i, case) in tensor_core_cases().into_iter().enumerate() {
            // With six kinds of masks in turn, five keep changing.
            let dtype = if i % 5 == 0 { DType::F32 } else { case.dtype };
            let case = Case { dtype, ..case };
            if is_thorough() || i % 4 == 0 {
                run_paged_attention(case, &Device::Cpu)?;
            }
            if is_thorough() || i % 4 == 2 {
                run_attention(case, &Device::Cpu)?;
            }
        }
        Ok(())
    })
}

/// Tiles whose rows end early, windows that begin within a tile, heads that share keys, and a short sequence beside.
fn tiles_smoke() -> Result<()> {
    let causal = AttentionParams::causal(0.2);
    let window = AttentionParams { window: Some(20), softcap: Some(0.7), ..causal };
    let ahead = AttentionParams { mask: Mask::Bidirectional, ..causal };
    let base = Case {
        dtype: DType::F32,
        hq: 4,
        hk: 2,
        d: 64,
        block_size: 8,
        sequences: &[(3, 1), (30, 21), (0, 17)],
        params: causal,
    };
    for params in [causal, window, ahead] {
        run_paged_attention(Case { params, ..base }, &Device::Cpu)?;
    }
    run_attention(Case { sequences: &[(0, 17), (0, 2)], ..base }, &Device::Cpu)?;
    run_paged_attention(Case { d: 256, hq: 2, hk: 1, sequences: &[(9, 16)], ..base }, &Device::Cpu)
}

#[test]
fn mutants_of_tiles_are_noticed() {
    let mutants = [
        ("threadgroup_barrier(mem_flags::mem_threadgroup); // the last", "// the last"),
        ("index, THREADS);\n    threadgroup_barrier(mem_flags::mem_threadgroup);", "index, THREADS);"),
        (
            "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (SHARES > 1)\n      for",
            "    if (SHARES > 1)\n      for",
        ),
        (
            "    threadgroup_barrier(mem_flags::mem_threadgroup);\n    UNROLL\n    for (uint c = 0; c < PARTS; c++) {\n      sums",
            "    UNROLL\n    for (uint c = 0; c < PARTS; c++) {\n      sums",
        ),
        ("start + key >= from && start", "start"),
        ("&& start + key < to", ""),
        ("past + first_row / heads", "past + first_row"),
        ("min(first_row + STRIPS * SIDE, rows) - 1", "first_row"),
        ("ulong(sequence) * sizes.max_blocks", "0"),
        ("inside ? row % heads : 0", "0"),
        ("visible(sizes, past + token, context);", "visible(sizes, token, context);"),
        ("from / KEYS * KEYS", "(from + KEYS - 1) / KEYS * KEYS"),
        ("own[n * SIDE + 1] = weights[n][1]", "own[n * SIDE + 1] = weights[n][0]"),
        ("(other * STRIPS + strip)", "(other * STRIPS)"),
        ("key >= seen.first && ", ""),
        ("key < seen.last", "key <= seen.last"),
        ("sums[c] *= kept", "sums[c] *= 1"),
        ("total * kept + row_sum(added)", "total * kept + added"),
        ("reached = row_max(reached)", "reached = max(reached, simd_shuffle_xor(reached, 1))"),
        ("(n * SIDE + part_x) * STRIDE", "(n * SIDE + part_y) * STRIDE"),
        ("* D + first_column + part_x", "* D + part_x"),
    ];
    assert_mutants_fail(&metal::TILES, &mutants, tiles_smoke);
}

#[test]
fn wrong_launches_of_tiles_are_noticed() {
    assert_wrong_launches_fail(tiles_smoke);
}

/// A few of the cases, where many mistakes are planted: whole and split contexts.
fn paged_attention_smoke() -> Result<()> {
    let causal = AttentionParams::causal(0.3);
    let window = AttentionParams { window: Some(20), softcap: Some(0.7), ..causal };
    let ahead = AttentionParams { mask: Mask::Bidirectional, ..causal };
    let base = Case { dtype: DType::F32, hq: 4, hk: 2, d: 64, block_size: 16, sequences: STEPS[2], params: causal };
    for params in [causal, window, ahead] {
        run_paged_attention(Case { params, ..base }, &Device::Cpu)?;
        run_paged_attention(Case { params, d: 33, ..base }, &Device::Cpu)?;
    }
    run_paged_attention(Case { sequences: STEPS[5], ..base }, &Device::Cpu)?;
    // A split context beside a prompt in tiles, which the merge leaves alone.
    run_paged_attention(Case { sequences: &[(1100, 1), (0, 17)], ..base }, &Device::Cpu)
}

#[test]
fn mutants_of_paged_attention_are_noticed() {
    let mutants = [
        ("  threadgroup_barrier(mem_flags::mem_threadgroup);\n  largest", "  largest"),
        ("cu_seqlens[middle] <= token", "cu_seqlens[middle] < token"),
        ("head * sizes.hk / sizes.hq", "head % sizes.hk"),
        ("context - (end - token), context", "context - (end - token) + 1, context"),
        ("position + 1 - sizes.window : 0", "position - sizes.window : 0"),
        ("sizes.is_causal != 0 ? position + 1", "sizes.is_causal != 0 ? position"),
        ("min(from + share, seen.last)", "from + share"),
        ("row_start(sizes.q, token, head)", "(ulong(token) * sizes.hq + head) * d"),
        ("ulong(sequence) * sizes.max_blocks", "sequence"),
        ("key % block_size", "key % 8"),
        ("row_start(sizes.v, at, shared_head)", "row_start(sizes.v, at, 0)"),
        ("sums[c] * kept", "sums[c]"),
        ("total * kept + weight", "total + weight"),
        ("weight_of(maxima[i], largest) * totals[i]", "totals[i]"),
        ("part == -INFINITY ? 0 : exp(part - largest)", "exp(part - largest)"),
        ("(row * sizes.splits + group.z) * (2 + d) + 2 + column", "row * (2 + d) + 2 + column"),
        ("weight_of(parts[i * stride], largest) * parts[i * stride + 1]", "parts[i * stride + 1]"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, paged_attention_smoke);
}

#[test]
fn wrong_launches_of_paged_attention_are_noticed() {
    assert_wrong_launches_fail(paged_attention_smoke);
}
