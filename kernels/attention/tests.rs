//! Attention and the page writes on every device that has them.

use candle_core::{DType, Device};

use super::*;
use crate::Segment;
use crate::testing::{Random, devices, poisoned, values};

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// A step over pages of NaN in random order.
#[derive(Clone, Copy, Debug)]
struct Case {
    dtype: DType,
    hk: usize,
    d: usize,
    block_size: usize,
    /// Past and new tokens of each sequence.
    sequences: &'static [(usize, usize)],
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

/// `write_kv` moves bits: what it writes is compared exactly, and all else must still be NaN.
fn run_write_kv(case: Case, device: &Device) -> Result<()> {
    let Case { dtype, hk, d, block_size, sequences } = case;
    let mut random = Random::new((hk * d) as u64);
    let pages = Pages::new(case, &mut random);
    let batch = pages.batch(case, device)?;
    let n = batch.num_tokens();
    // As a merged projection leaves them: rows strided, starts offset.
    let qkv = random.tensor(&[n, 4 * hk, d], 1.0, dtype, device)?;
    let (k, v) = (qkv.narrow(1, 2 * hk, hk)?, qkv.narrow(1, 3 * hk, hk)?);
    let all = poisoned(&[6, pages.num_blocks, block_size, hk, d], dtype, device)?;
    write_kv(&all.narrow(0, 2, 2)?, &k, &v, &batch)?;

    let row = hk * d;
    let plane = pages.num_blocks * block_size * row;
    let mut want = vec![f32::NAN; 6 * plane];
    let (k, v) = (values(&k)?, values(&v)?);
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
        assert!(same, "write_kv {case:?} {device:?}: at {i} got {got}, expected {want}");
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
                        run_write_kv(Case { dtype, hk, d, block_size, sequences }, &device)?;
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn write_kv_refuses_operands_that_disagree() -> Result<()> {
    let batch = Batch::new(&[Segment { tokens: &[0, 0], past: 0, blocks: &[2], slot: 0 }], 4, &Device::Cpu)?;
    let kv = |blocks, dtype| Tensor::zeros((2, blocks, 4, 1, 8), dtype, &Device::Cpu);
    let rows = |n, dtype| Tensor::zeros((n, 1, 8), dtype, &Device::Cpu);
    let (f32, f16) = (DType::F32, DType::F16);
    write_kv(&kv(3, f32)?, &rows(2, f32)?, &rows(2, f32)?, &batch)?;
    assert!(write_kv(&kv(2, f32)?, &rows(2, f32)?, &rows(2, f32)?, &batch).is_err());
    assert!(write_kv(&kv(3, f16)?, &rows(2, f32)?, &rows(2, f32)?, &batch).is_err());
    assert!(write_kv(&kv(3, f32)?, &rows(1, f32)?, &rows(2, f32)?, &batch).is_err());
    assert!(write_kv(&kv(3, f32)?, &rows(2, f32)?, &rows(1, f32)?, &batch).is_err());
    Ok(())
}
