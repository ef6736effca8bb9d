//! What one forward step runs: packed tokens, and where each sequence's cache lies.

use std::ops::Range;

use candle_core::{CpuStorage, Device, InplaceOp1, Layout, Result, Tensor, bail};

use crate::device::numbers;

/// Stands in a block table for a block that a window has left behind and that holds nothing any more.
pub const NO_BLOCK: u32 = u32::MAX;

/// One sequence's share of a forward step.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Tokens to run, in order. Never empty.
    pub tokens: &'a [u32],
    /// Tokens of this sequence already in the cache. Zero starts the sequence: its recurrent state is taken
    /// as zero whatever the slot holds.
    pub past: usize,
    /// Pages of the sequence in order: token `p` lies in `blocks[p / block_size]`.
    pub blocks: &'a [u32],
    /// Slot of the sequence's recurrent state. Unused by models without recurrent layers.
    pub slot: u32,
}

/// The one description of a step, on the device: every array is `u32`.
///
/// All arrays are views of a single upload, so kernels must honour a view's start offset.
#[derive(Debug)]
pub struct Batch {
    /// `[N]` token ids.
    pub tokens: Tensor,
    /// `[N]` position of each token in its sequence.
    pub positions: Tensor,
    /// `[N]` `block * block_size + offset` where a token's keys and values go.
    pub slot_mapping: Tensor,
    /// `[B + 1]` first token of each sequence; the last entry is `N`.
    pub cu_seqlens: Tensor,
    /// `[B]` tokens in the cache after this step.
    pub context_lens: Tensor,
    /// `[B, max_blocks]`; entries past a sequence's own blocks are never read.
    pub block_tables: Tensor,
    /// `[B]` recurrent state slot.
    pub state_slots: Tensor,
    /// `[B]` index of each sequence's last token.
    pub last: Tensor,
    /// The upload.
    arrays: Tensor,
    pub(crate) host: Vec<Sequence>,
    pub(crate) host_slot_mapping: Vec<u32>,
    host_tokens: Vec<u32>,
    windowed: Option<Box<Batch>>,
}

/// The host's copy of one sequence's entries, for CPU kernels.
#[derive(Clone, Debug)]
pub(crate) struct Sequence {
    /// The sequence's tokens within the step.
    pub tokens: Range<usize>,
    /// Tokens in the cache after this step.
    pub context_len: usize,
    pub blocks: Vec<u32>,
    pub slot: usize,
}

impl Sequence {
    /// Whether this step holds the first token of the sequence.
    pub fn is_fresh(&self) -> bool {
        self.context_len == self.tokens.len()
    }

    /// Position in the sequence of its first token in the step.
    pub fn past(&self) -> usize {
        self.context_len - self.tokens.len()
    }

    /// Position in the sequence of the step's token `token`.
    pub fn position(&self, token: usize) -> usize {
        self.context_len - (self.tokens.end - token)
    }
}

impl Batch {
    /// Packs `segments` into one step.
    ///
    /// # Errors
    ///
    /// A segment is empty, its blocks do not hold its tokens, two segments share a slot, or two tokens go to one place of
    /// a page.
    pub fn new(segments: &[Segment], block_size: usize, device: &Device) -> Result<Self> {
        Self::with_width(segments, block_size, 1, device)
    }

    /// As [`Batch::new`], with block tables of at least `width` columns: room for the sequences to grow in when the batch
    /// is [refilled](Batch::refill).
    ///
    /// # Errors
    ///
    /// As [`Batch::new`].
    pub fn with_width(segments: &[Segment], block_size: usize, width: usize, device: &Device) -> Result<Self> {
        Arrays::paged(segments, block_size)?.upload(width, device)
    }

    /// Puts other segments in place of the ones the batch was made of, at the same addresses on the device, with tables
    /// for layers with a window if it has them. What a kernel was told of the old ones must hold for the new.
    ///
    /// # Errors
    ///
    /// As [`Batch::new`] and [`Batch::with_windows`]; also if there are other numbers of tokens or sequences than before,
    /// or block tables are longer than there is room for.
    pub fn refill(&mut self, segments: &[Segment], tables: &[&[u32]], block_size: usize) -> Result<()> {
        self.replace(Arrays::paged(segments, block_size)?)?;
        match self.windowed.as_mut() {
            Some(windowed) => windowed.replace(Arrays::windowed(segments, tables, block_size)?),
            None => Ok(()),
        }
    }

    fn replace(&mut self, arrays: Arrays) -> Result<()> {
        let (_, width) = self.block_tables.dims2()?;
        if arrays.tokens.len() != self.num_tokens()
            || arrays.sequences.len() != self.num_sequences()
            || arrays.width() > width
        {
            bail!(
                "batch: {} tokens of {} sequences with {} blocks, recorded for {}, {} and {width}",
                arrays.tokens.len(),
                arrays.sequences.len(),
                arrays.width(),
                self.num_tokens(),
                self.num_sequences()
            )
        }
        self.arrays.inplace_op1(&Overwrite(arrays.concatenated(width)))?;
        let Arrays { tokens, slot_mapping, sequences, .. } = arrays;
        (self.host, self.host_slot_mapping, self.host_tokens) = (sequences, slot_mapping, tokens);
        Ok(())
    }

    /// Gives layers with a window block tables of their own, one for each sequence: see [`Batch::windowed`]. Blocks
    /// behind the window may be [`NO_BLOCK`].
    ///
    /// # Errors
    ///
    /// Other than one table for each sequence, one whose blocks do not hold the sequence's tokens, or two tokens that go to
    /// one place of a page.
    pub fn with_windows(self, tables: &[&[u32]], block_size: usize) -> Result<Self> {
        self.with_wide_windows(tables, block_size, 1)
    }

    /// As [`Batch::with_windows`], with block tables of at least `width` columns.
    ///
    /// # Errors
    ///
    /// As [`Batch::with_windows`].
    pub fn with_wide_windows(mut self, tables: &[&[u32]], block_size: usize, width: usize) -> Result<Self> {
        let segments: Vec<Segment> = self
            .host
            .iter()
            .map(|sequence| Segment {
                tokens: &self.host_tokens[sequence.tokens.clone()],
                past: sequence.past(),
                blocks: &sequence.blocks,
                slot: sequence.slot as u32,
            })
            .collect();
        let windowed = Arrays::windowed(&segments, tables, block_size)?.upload(width, self.tokens.device())?;
        self.windowed = Some(Box::new(windowed));
        Ok(self)
    }

    /// The same step over the pages of layers with a window.
    pub fn windowed(&self) -> &Self {
        self.windowed.as_deref().unwrap_or(self)
    }

    /// Packs whole sequences that keep no cache, as encoders do.
    ///
    /// # Errors
    ///
    /// A sequence is empty.
    pub fn uncached(sequences: &[&[u32]], device: &Device) -> Result<Self> {
        let mut arrays = Arrays::default();
        for (index, tokens) in sequences.iter().enumerate() {
            if tokens.is_empty() {
                bail!("batch: sequence {index} has no tokens")
            }
            arrays.push(tokens, 0, &[], index as u32);
            arrays.slot_mapping.extend(std::iter::repeat_n(0, tokens.len()));
        }
        arrays.upload(1, device)
    }

    /// The last tokens of some sequences, by index, as a step of their own: queries over the same pages, for layers
    /// that read what others wrote.
    ///
    /// # Errors
    ///
    /// No sequences, one beyond the batch, or one twice.
    pub fn last_tokens(&self, sequences: &[u32]) -> Result<Self> {
        let mut arrays = Arrays::default();
        for (i, &index) in sequences.iter().enumerate() {
            let Some(sequence) = self.host.get(index as usize) else {
                bail!("batch: sequence {index} of {}", self.host.len())
            };
            if sequences[..i].contains(&index) {
                bail!("batch: sequence {index} twice")
            }
            let last = sequence.tokens.end - 1;
            let token = &self.host_tokens[last..=last];
            arrays.push(token, sequence.context_len - 1, &sequence.blocks, sequence.slot as u32);
            arrays.slot_mapping.push(self.host_slot_mapping[last]);
        }
        let mut last = arrays.upload(1, self.tokens.device())?;
        if let Some(windowed) = &self.windowed {
            last.windowed = Some(Box::new(windowed.last_tokens(sequences)?));
        }
        Ok(last)
    }

    /// Where the last tokens of some sequences, by index, stand in the step.
    ///
    /// # Errors
    ///
    /// A sequence beyond the batch.
    pub fn last_rows(&self, sequences: &[u32]) -> Result<Tensor> {
        self.last.index_select(&Tensor::new(sequences, self.last.device())?, 0)
    }

    /// The host's copy of `tokens`.
    pub fn token_ids(&self) -> &[u32] {
        &self.host_tokens
    }

    /// Tokens in the step, `N`.
    pub fn num_tokens(&self) -> usize {
        self.host_slot_mapping.len()
    }

    /// `[B]` index of each sequence's first token.
    ///
    /// # Errors
    ///
    /// None in practice: the batch holds them.
    pub fn first(&self) -> Result<Tensor> {
        self.cu_seqlens.narrow(0, 0, self.num_sequences())
    }

    /// Sequences in the step, `B`.
    pub fn num_sequences(&self) -> usize {
        self.host.len()
    }

    /// Checks that every sequence's slot lies below `num_slots`, for ops that index by slot.
    pub(crate) fn check_slots(&self, op: &str, num_slots: usize) -> Result<()> {
        match self.host.iter().find(|sequence| sequence.slot >= num_slots) {
            Some(sequence) => bail!("{op}: slot {} in the batch, the state has {num_slots}", sequence.slot),
            None => Ok(()),
        }
    }

    /// Checks, for ops over pages, that the pages hold every sequence and that those from position `first` of it on lie
    /// below `num_blocks`.
    pub(crate) fn check_blocks(
        &self,
        op: &str,
        num_blocks: usize,
        block_size: usize,
        first: impl Fn(&Sequence) -> usize,
    ) -> Result<()> {
        for sequence in &self.host {
            if sequence.blocks.len() * block_size < sequence.context_len {
                bail!(
                    "{op}: {} tokens of context, {} blocks of {block_size}",
                    sequence.context_len,
                    sequence.blocks.len()
                )
            }
            let used = &sequence.blocks[first(sequence) / block_size..];
            if let Some(block) = used.iter().find(|&&block| block as usize >= num_blocks) {
                bail!("{op}: block {block} in the batch, the cache has {num_blocks}")
            }
        }
        Ok(())
    }
}

/// Writes over a whole tensor of u32.
pub(crate) struct Overwrite(pub Vec<u32>);

impl InplaceOp1 for Overwrite {
    fn name(&self) -> &'static str {
        "overwrite"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
        match storage {
            CpuStorage::U32(values) => values.copy_from_slice(&self.0),
            _ => bail!("overwrite: expected u32"),
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, storage: &mut candle_core::CudaStorage, _: &Layout) -> Result<()> {
        crate::cuda::overwrite(&self.0, storage)
    }
}

#[derive(Default)]
struct Arrays {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slot_mapping: Vec<u32>,
    sequences: Vec<Sequence>,
}

impl Arrays {
    fn push(&mut self, tokens: &[u32], past: usize, blocks: &[u32], slot: u32) {
        let start = self.tokens.len();
        self.tokens.extend_from_slice(tokens);
        self.positions.extend((past..past + tokens.len()).map(|position| position as u32));
        self.sequences.push(Sequence {
            tokens: start..self.tokens.len(),
            context_len: past + tokens.len(),
            blocks: blocks.to_vec(),
            slot: slot as usize,
        });
    }

    fn push_paged(&mut self, index: usize, segment: &Segment, block_size: usize) -> Result<()> {
        let Segment { tokens, past, blocks, slot } = *segment;
        let end = past + tokens.len();
        if tokens.is_empty() {
            bail!("batch: segment {index} has no tokens")
        }
        if blocks.len() * block_size < end {
            bail!(
                "batch: segment {index} needs {end} tokens of cache, its {} blocks of {block_size} hold fewer",
                blocks.len()
            )
        }
        self.push(tokens, past, blocks, slot);
        for position in past..end {
            let block = blocks[position / block_size];
            if block == NO_BLOCK {
                bail!("batch: segment {index} has no block for the token at {position}")
            }
            self.slot_mapping.push(block * block_size as u32 + (position % block_size) as u32);
        }
        Ok(())
    }

    fn paged(segments: &[Segment], block_size: usize) -> Result<Self> {
        let mut arrays = Self::default();
        for (index, segment) in segments.iter().enumerate() {
            if segments[..index].iter().any(|other| other.slot == segment.slot) {
                bail!("batch: segment {index} shares state slot {} with an earlier segment", segment.slot)
            }
            arrays.push_paged(index, segment, block_size)?;
        }
        arrays.apart(block_size)
    }

    /// The segments over other blocks.
    fn windowed(segments: &[Segment], tables: &[&[u32]], block_size: usize) -> Result<Self> {
        if tables.len() != segments.len() {
            bail!("batch: {} window tables for {} sequences", tables.len(), segments.len())
        }
        let mut arrays = Self::default();
        for (index, (segment, blocks)) in segments.iter().zip(tables).enumerate() {
            arrays.push_paged(index, &Segment { blocks, ..*segment }, block_size)?;
        }
        arrays.apart(block_size)
    }

    /// Themselves, if every token has a place of its own: threads write them side by side.
    fn apart(self, block_size: usize) -> Result<Self> {
        let mut places = self.slot_mapping.clone();
        places.sort_unstable();
        match places.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => {
                let (block, offset) = (pair[0] as usize / block_size, pair[0] as usize % block_size);
                bail!("batch: two tokens go to place {offset} of block {block}")
            }
            None => Ok(self),
        }
    }

    /// Blocks of the sequence that has most, at least one.
    fn width(&self) -> usize {
        self.sequences.iter().map(|s| s.blocks.len()).max().unwrap_or(0).max(1)
    }

    /// The arrays one after the other, block tables of `width` columns last.
    fn concatenated(&self, width: usize) -> Vec<u32> {
        let (n, b) = (self.tokens.len(), self.sequences.len());
        let mut all = Vec::with_capacity(3 * n + (b + 1) + b * (3 + width));
        all.extend_from_slice(&self.tokens);
        all.extend_from_slice(&self.positions);
        all.extend_from_slice(&self.slot_mapping);
        all.push(0);
        all.extend(self.sequences.iter().map(|s| s.tokens.end as u32));
        all.extend(self.sequences.iter().map(|s| s.context_len as u32));
        all.extend(self.sequences.iter().map(|s| s.slot as u32));
        all.extend(self.sequences.iter().map(|s| s.tokens.end as u32 - 1));
        for sequence in &self.sequences {
            all.extend(sequence.blocks.iter().map(|&block| if block == NO_BLOCK { 0 } else { block }));
            all.extend(std::iter::repeat_n(0, width - sequence.blocks.len()));
        }
        all
    }

    fn upload(self, width: usize, device: &Device) -> Result<Batch> {
        let (n, b) = (self.tokens.len(), self.sequences.len());
        if b == 0 {
            bail!("batch: no sequences")
        }
        let width = self.width().max(width);
        let all = self.concatenated(width);
        let all = numbers(all, device)?;
        let mut start = 0;
        let mut view = |len: usize| -> Result<Tensor> {
            start += len;
            all.narrow(0, start - len, len)
        };
        Ok(Batch {
            tokens: view(n)?,
            positions: view(n)?,
            slot_mapping: view(n)?,
            cu_seqlens: view(b + 1)?,
            context_lens: view(b)?,
            state_slots: view(b)?,
            last: view(b)?,
            block_tables: view(b * width)?.reshape((b, width))?,
            arrays: all,
            host: self.sequences,
            host_slot_mapping: self.slot_mapping,
            host_tokens: self.tokens,
            windowed: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment<'a>(tokens: &'a [u32], past: usize, blocks: &'a [u32], slot: u32) -> Segment<'a> {
        Segment { tokens, past, blocks, slot }
    }

    #[test]
    fn nothing_is_written_twice() -> Result<()> {
        let refused = |segments: &[Segment]| match Batch::new(segments, 2, &Device::Cpu) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        let first = segment(&[1, 2], 1, &[4, 7], 0);
        assert_eq!(refused(&[first, segment(&[3], 2, &[4, 5], 1)]), "", "a page that both read");
        assert!(refused(&[first, segment(&[3], 2, &[4, 7], 1)]).contains("place 0 of block 7"));
        assert!(refused(&[segment(&[1, 2, 3], 0, &[4, 4], 0)]).contains("place 0 of block 4"));
        assert!(refused(&[first, segment(&[3], 2, &[4, 5], 0)]).contains("shares state slot 0"));

        let batch = Batch::new(&[first, segment(&[3], 2, &[4, 5], 1)], 2, &Device::Cpu)?;
        assert_eq!(batch.last_tokens(&[1, 0])?.num_tokens(), 2);
        let twice = batch.last_tokens(&[1, 0, 1]).expect_err("a slot for two").to_string();
        assert!(twice.contains("sequence 1 twice"), "{twice}");
        let tables: [&[u32]; 2] = [&[0, 3], &[NO_BLOCK, 3]];
        let windowed = batch.with_windows(&tables, 2).expect_err("a place for two").to_string();
        assert!(windowed.contains("place 0 of block 3"), "{windowed}");
        Ok(())
    }
}
