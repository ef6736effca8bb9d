//! Decode steps that a GPU recorded and replays: one launch instead of hundreds.
//!
//! A recording is good for one number of sequences, for block tables up to some width, which grow by a factor, so that a
//! long reply is recorded a few times, and for one way to choose tokens. Its batch keeps its addresses; each step writes
//! over what it holds.

use candle_core::{Device, Result, Tensor};
use kernels::graph::Graph;
use kernels::sampling::{Draw, Draws, argmax, sample};
use kernels::{Batch, Segment};
use models::{Cache, CausalLm};

/// Recordings kept; the one that was used longest ago makes room.
const KEPT: usize = 32;
/// Block tables have this many columns, or a power of `GROWTH` times as many.
const LEAST_WIDTH: usize = 16;
const GROWTH: usize = 4;

/// A step of one token for each sequence.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a> {
    pub segments: &'a [Segment<'a>],
    /// Those of layers with a window, if there are any.
    pub tables: &'a [&'a [u32]],
    /// In place of the segments' tokens `[B]`, where the device has chosen them and the host does not know them yet.
    pub tokens: Option<&'a Tensor>,
    /// How the next tokens are chosen, if they are not the most likely ones.
    pub draws: Option<&'a [Draw]>,
}

/// What a step gives.
pub(crate) struct Step<'a> {
    /// `[B, V]`
    pub logits: &'a Tensor,
    /// `[B]`, among the tokens that may be sampled.
    pub chosen: &'a Tensor,
}

/// The recordings of an engine.
pub(crate) struct Recordings {
    /// By last use, the latest last.
    kept: Vec<Recording>,
    is_off: bool,
}

struct Recording {
    shape: Shape,
    batch: Batch,
    draws: Option<Draws>,
    logits: Tensor,
    chosen: Tensor,
    /// `None` in the last recording there will be: the step could not be recorded.
    graph: Option<Graph>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    sequences: usize,
    width: usize,
    /// Of the tables of layers with a window.
    window_width: usize,
    is_drawn: bool,
}

/// What a step runs on.
pub(crate) struct Runner<'a> {
    pub model: &'a mut dyn CausalLm,
    pub cache: &'a mut Cache,
    /// Tokens that may be sampled.
    pub sampled_vocab: usize,
}

impl Recordings {
    pub fn new(is_on: bool) -> Self {
        Self { kept: vec![], is_off: !is_on }
    }

    /// Whether steps on `device` are recorded.
    pub fn are_used(&self, device: &Device) -> bool {
        !self.is_off && Graph::is_available(device)
    }

    /// Runs a step.
    ///
    /// # Errors
    ///
    /// As the model's forward pass. A step that cannot be recorded is no error: it runs as it is, and so do those after
    /// it.
    pub fn step(&mut self, runner: Runner, inputs: Inputs) -> Result<Step<'_>> {
        let Inputs { segments, tables, tokens, draws } = inputs;
        let shape = Shape {
            sequences: segments.len(),
            width: roomy(segments.iter().map(|segment| segment.blocks.len())),
            window_width: roomy(tables.iter().map(|table| table.len())),
            is_drawn: draws.is_some(),
        };
        let block_size = runner.cache.config().block_size;
        match self.kept.iter().position(|recording| recording.shape == shape) {
            Some(index) => {
                let mut recording = self.kept.remove(index);
                recording.batch.refill(segments, tables, block_size)?;
                if let Some(tokens) = tokens {
                    recording.batch.tokens.slice_set(tokens, 0, 0)?;
                }
                if let (Some(draws), Some(host)) = (&mut recording.draws, draws) {
                    draws.refill(host)?;
                }
                if let Some(graph) = &recording.graph {
                    graph.launch()?;
                }
                self.kept.push(recording);
            }
            None => {
                let recording = Recording::new(runner, shape, inputs)?;
                self.is_off |= recording.graph.is_none();
                if self.kept.len() == KEPT {
                    self.kept.remove(0);
                }
                self.kept.push(recording);
            }
        }
        let Recording { logits, chosen, .. } = self.kept.last().expect("it was just pushed");
        Ok(Step { logits, chosen })
    }
}

impl Recording {
    /// Runs the step as it is, then records it.
    fn new(runner: Runner, shape: Shape, inputs: Inputs) -> Result<Self> {
        let Inputs { segments, tables, tokens, draws } = inputs;
        let Runner { model, cache, sampled_vocab } = runner;
        let (block_size, device) = (cache.config().block_size, cache.config().device.clone());
        let mut batch = Batch::with_width(segments, block_size, shape.width, &device)?;
        if !tables.is_empty() {
            batch = batch.with_wide_windows(tables, block_size, shape.window_width)?;
        }
        if let Some(tokens) = tokens {
            batch.tokens.slice_set(tokens, 0, 0)?;
        }
        let draws = draws.map(|draws| Draws::new(draws, &device)).transpose()?;
        let mut forward = || {
            let hidden = model.forward(&batch, cache)?;
            let logits = model.logits(&hidden)?;
            let chosen = match &draws {
                Some(draws) => sample(&logits, sampled_vocab, draws)?,
                None => argmax(&logits, sampled_vocab)?,
            };
            Ok((logits, chosen))
        };
        let ((logits, chosen), rehearsal) = Graph::rehearse(&device, &mut forward)?;
        let mut record = || {
            Graph::record(&device, &rehearsal, || {
                let recorded = forward()?;
                logits.slice_set(&recorded.0, 0, 0)?;
                chosen.slice_set(&recorded.1, 0, 0)
            })
        };
        // Another thread that closes the GPU waits for all of its streams, and so ends what one of them records.
        let graph = record().or_else(|_| record());
        Ok(Self { shape, batch, draws, logits, chosen, graph: graph.ok() })
    }
}

/// Columns of a block table with room for the longest of `lens`.
fn roomy(lens: impl Iterator<Item = usize>) -> usize {
    let most = lens.max().unwrap_or(0);
    let mut width = LEAST_WIDTH;
    while width < most {
        width *= GROWTH;
    }
    width
}

#[cfg(test)]
mod tests {
    use super::roomy;

    #[test]
    fn tables_grow_by_a_factor() {
        let widths = [0, 1, 16, 17, 64, 65, 1000].map(|len| roomy([1, len].into_iter()));
        assert_eq!(widths, [16, 16, 16, 64, 64, 256, 1024]);
    }
}
