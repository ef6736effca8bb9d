//! The page writes: to the bit, on every device, and the kernel for Metal.

use super::*;
use crate::metal::emulator::{assert_mutants_fail, assert_wrong_launches_fail, emulated};

fn run_write_kv(case: Case, device: &Device) -> Result<()> {
    page_dtypes(case.dtype, device).iter().try_for_each(|&dtype| write_kv_to(dtype, case, device))
}

/// `write_kv` moves bits, or rounds: what it writes is compared exactly, and all else must still be NaN.
fn write_kv_to(page_dtype: DType, case: Case, device: &Device) -> Result<()> {
    let Case { dtype, hk, d, block_size, sequences, .. } = case;
    let mut random = Random::new((hk * d) as u64);
    let pages = Pages::new(case, &mut random);
    let batch = pages.batch(case, device)?;
    let n = batch.num_tokens();
    // As a merged projection leaves them: rows strided, starts offset.
    let qkv = random.tensor(&[n, 4 * hk, d], 1.0, dtype, device)?;
    let (k, v) = (qkv.narrow(1, 2 * hk, hk)?, qkv.narrow(1, 3 * hk, hk)?);
    let all = poisoned(&[6, pages.num_blocks, block_size, hk, d], page_dtype, device)?;
    write_kv(&all.narrow(0, 2, 2)?, &k, &v, &batch)?;

    let row = hk * d;
    let plane = pages.num_blocks * block_size * row;
    let mut want = vec![f32::NAN; 6 * plane];
    let (k, v) = (values(&k.to_dtype(page_dtype)?)?, values(&v.to_dtype(page_dtype)?)?);
    let mut token = 0;
    for (&(past, new), blocks) in sequences.iter().zip(&pages.blocks) {
        for position in past..past + new {
            let page = blocks[position / block_size] as usize * block_size + position % block_size;
            want[2 * plane + page * row..][..row].copy_from_slice(&k[token * row..][..row]);
            want[3 * plane + page * row..][..row].copy_from_slice(&v[token * row..][..row]);
            token += 1;
        }
    }
    for (i, (got, want)) in values(&all)?.into_iter().zip(want).enumerate() {
        let same = got == want || (got.is_nan() && want.is_nan());
        assert!(same, "write_kv {case:?} {page_dtype:?} {device:?}: at {i} got {got}, expected {want}");
    }
    Ok(())
}

#[test]
fn write_kv_writes_its_rows_and_nothing_else() -> Result<()> {
    let steps: [&[(usize, usize)]; 4] =
        [&[(0, 1)], &[(15, 1), (0, 33), (16, 1)], &[(7, 130)], &[(100, 1), (31, 2), (63, 1), (5, 1)]];
    for device in devices() {
        for dtype in DTYPES {
            for (hk, d) in [(1, 1), (1, 7), (3, 63), (2, 100), (8, 128), (1, 1000)] {
                for block_size in [1, 16, 32] {
                    for sequences in steps {
                        let params = AttentionParams::causal(1.0);
                        run_write_kv(Case { dtype, hq: hk, hk, d, block_size, sequences, params }, &device)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Heads that would allow the widest copies, were the first or the second of them not where it is.
#[test]
fn write_kv_honours_any_start() -> Result<()> {
    for device in devices() {
        for dtype in DTYPES {
            let batch = Batch::new(&[Segment { tokens: &[0, 0], past: 3, blocks: &[1, 0], slot: 0 }], 4, &device)?;
            // More heads than a block of threads takes at once; k and v in different strides.
            let mut random = Random::new(1);
            let (k, v) =
                (random.tensor(&[2, 7, 65], 1.0, dtype, &device)?, random.tensor(&[2, 9, 97], 1.0, dtype, &device)?);
            let part = |rows: &Tensor, start| rows.narrow(1, 1, 6)?.narrow(2, start, 64);
            let size = 2 * 2 * 4 * 6 * 64;
            let kv = poisoned(&[1 + size], dtype, &device)?.narrow(0, 1, size)?.reshape((2, 2, 4, 6, 64))?;
            let aligned = poisoned(&[2, 2, 4, 6, 64], dtype, &device)?;
            for (kv, start) in [(kv, 1), (aligned, 0)] {
                let (k, v) = (part(&k, start)?, part(&v, start)?);
                write_kv(&kv, &k, &v, &batch)?;
                let pages = kv.reshape((2, 8, 6 * 64))?;
                for (plane, rows) in [(0, &k), (1, &v)] {
                    // Position 3 ends block 1, position 4 begins block 0.
                    let written = pages.get(plane)?.index_select(&Tensor::new(&[7u32, 0], &device)?, 0)?;
                    assert_eq!(values(&written)?, values(rows)?, "{dtype:?} {device:?}: plane {plane}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn write_kv_on_metal_writes_its_rows_and_nothing_else() -> Result<()> {
    emulated(|| {
        write_kv_writes_its_rows_and_nothing_else()?;
        write_kv_honours_any_start()
    })
}

/// A few of the cases, where many mistakes are planted.
fn write_kv_smoke() -> Result<()> {
    let params = AttentionParams::causal(1.0);
    let case = Case { dtype: DType::F32, hq: 3, hk: 3, d: 65, block_size: 16, sequences: &[(15, 1), (0, 18)], params };
    run_write_kv(case, &Device::Cpu)?;
    run_write_kv(Case { d: 8, dtype: DType::F16, ..case }, &Device::Cpu)?;
    write_kv_honours_any_start()
}

#[test]
fn mutants_of_write_kv_on_metal_are_noticed() {
    let mutants = [
        ("ulong(plane) * sizes.slots", "ulong(plane)"),
        ("slot_mapping[token]", "token"),
        ("row_start(sizes.k, token, head)", "row_start(sizes.k, 0, head)"),
        ("row_start(sizes.v, token, head)", "row_start(sizes.v, token, 0)"),
        ("head += threads.y", "head += threads.y + 1"),
        ("i < d; i += threads.x", "i + 1 < d; i += threads.x"),
        ("to[head * d + i]", "to[head + i]"),
    ];
    assert_mutants_fail(&metal::SOURCE, &mutants, write_kv_smoke);
}

#[test]
fn wrong_launches_of_write_kv_on_metal_are_noticed() {
    assert_wrong_launches_fail(write_kv_smoke);
}
