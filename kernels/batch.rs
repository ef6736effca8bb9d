//! What one forward step runs: packed tokens, and where each sequence's cache lies.

use std::ops::Range;

use candle_core::{Device, Result, Tensor, bail};

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
    /// A segment is empty, its blocks do not hold its tokens, or two segments share a slot or a page that
    /// both write.
    pub fn new(segments: &[Segment], block_size: usize, device: &Device) -> Result<Self> {
        let mut arrays = Arrays::default();
        for (index, segment) in segments.iter().enumerate() {
            if segments[..index].iter().any(|other| other.slot == segment.slot) {
                bail!("batch: segment {index} shares state slot {} with an earlier segment", segment.slot)
            }
            arrays.push_paged(index, segment, block_size)?;
        }
        arrays.upload(device)
    }

    /// Gives layers with a window block tables of their own, one for each sequence: see [`Batch::windowed`]. Blocks
    /// behind the window may be [`NO_BLOCK`].
    ///
    /// # Errors
    ///
    /// Other than one table for each sequence, or one whose blocks do not hold the sequence's tokens.
    pub fn with_windows(mut self, tables: &[&[u32]], block_size: usize) -> Result<Self> {
        if tables.len() != self.host.len() {
            bail!("batch: {} window tables for {} sequences", tables.len(), self.host.len())
        }
        let mut arrays = Arrays::default();
        for (index, (sequence, blocks)) in self.host.iter().zip(tables).enumerate() {
            let tokens = &self.host_tokens[sequence.tokens.clone()];
            let (past, blocks) = (sequence.past(), *blocks);
            arrays.push_paged(index, &Segment { tokens, past, blocks, slot: sequence.slot as u32 }, block_size)?;
        }
        self.windowed = Some(Box::new(arrays.upload(self.tokens.device())?));
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
        arrays.upload(device)
    }

    /// The last tokens of some sequences, by index, as a step of their own: queries over the same pages, for layers
    /// that read what others wrote.
    ///
    /// # Errors
    ///
    /// No sequences, or one beyond the batch.
    pub fn last_tokens(&self, sequences: &[u32]) -> Result<Self> {
        let mut arrays = Arrays::default();
        for &index in sequences {
            let Some(sequence) = self.host.get(index as usize) else {
                bail!("batch: sequence {index} of {}", self.host.len())
            };
            let last = sequence.tokens.end - 1;
            let token = &self.host_tokens[last..=last];
            arrays.push(token, sequence.context_len - 1, &sequence.blocks, sequence.slot as u32);
            arrays.slot_mapping.push(self.host_slot_mapping[last]);
        }
        let mut last = arrays.upload(self.tokens.device())?;
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

    fn upload(self, device: &Device) -> Result<Batch> {
        let (n, b) = (self.tokens.len(), self.sequences.len());
        if b == 0 {
            bail!("batch: no sequences")
        }
        let width = self.sequences.iter().map(|s| s.blocks.len()).max().unwrap_or(0).max(1);
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
        let len = all.len();
        let all = Tensor::from_vec(all, len, device)?;
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
            host: self.sequences,
            host_slot_mapping: self.slot_mapping,
            host_tokens: self.tokens,
            windowed: None,
        })
    }
}
