//! Decode steps that a GPU recorded and replays: one launch instead of hundreds.
//!
//! A recording is good for one number of sequences and for block tables up to some width, which grow by a factor, so
//! that a long reply is recorded a few times. Its batch keeps its addresses; each step writes over what it holds.

use candle_core::{Device, Result, Tensor};
use kernels::argmax::argmax;
use kernels::graph::Graph;
use kernels::{Batch, Segment};
use models::{Cache, CausalLm};

/// Recordings kept; the one that was used longest ago makes room.
const KEPT: usize = 32;
/// Block tables have this many columns, or a power of `GROWTH` times as many.
const LEAST_WIDTH: usize = 16;
const GROWTH: usize = 4;

/// What a step of one token for each sequence gives.
pub(crate) struct Step<'a> {
    /// `[B, V]`
    pub logits: &'a Tensor,
    /// `[B]`, as [`argmax`] of the tokens that may be sampled.
    pub most_likely: &'a Tensor,
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
    logits: Tensor,
    most_likely: Tensor,
    /// `None` in the last recording there will be: the step could not be recorded.
    graph: Option<Graph>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    sequences: usize,
    width: usize,
    /// Of the tables of layers with a window.
    window_width: usize,
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

    /// Runs a step in which each segment has one token; `tables` are those of layers with a window, if there are any.
    ///
    /// # Errors
    ///
    /// As the model's forward pass. A step that cannot be recorded is no error: it runs as it is, and so do those after
    /// it.
    pub fn step(&mut self, runner: Runner, segments: &[Segment], tables: &[&[u32]]) -> Result<Step<'_>> {
        let shape = Shape {
            sequences: segments.len(),
            width: roomy(segments.iter().map(|segment| segment.blocks.len())),
            window_width: roomy(tables.iter().map(|table| table.len())),
        };
        let block_size = runner.cache.config().block_size;
        match self.kept.iter().position(|recording| recording.shape == shape) {
            Some(index) => {
                let mut recording = self.kept.remove(index);
                recording.batch.refill(segments, tables, block_size)?;
                if let Some(graph) = &recording.graph {
                    graph.launch()?;
                }
                self.kept.push(recording);
            }
            None => {
                let recording = Recording::new(runner, shape, segments, tables)?;
                self.is_off |= recording.graph.is_none();
                if self.kept.len() == KEPT {
                    self.kept.remove(0);
                }
                self.kept.push(recording);
            }
        }
        let Recording { logits, most_likely, .. } = self.kept.last().expect("it was just pushed");
        Ok(Step { logits, most_likely })
    }
}

impl Recording {
    /// Runs the step as it is, then records it.
    fn new(runner: Runner, shape: Shape, segments: &[Segment], tables: &[&[u32]]) -> Result<Self> {
        let Runner { model, cache, sampled_vocab } = runner;
        let (block_size, device) = (cache.config().block_size, cache.config().device.clone());
        let mut batch = Batch::with_width(segments, block_size, shape.width, &device)?;
        if !tables.is_empty() {
            batch = batch.with_wide_windows(tables, block_size, shape.window_width)?;
        }
        let mut forward = || {
            let hidden = model.forward(&batch, cache)?;
            let logits = model.logits(&hidden)?;
            let most_likely = argmax(&logits, sampled_vocab)?;
            Ok((logits, most_likely))
        };
        let ((logits, most_likely), rehearsal) = Graph::rehearse(&device, &mut forward)?;
        let graph = Graph::record(&device, &rehearsal, || {
            let recorded = forward()?;
            logits.slice_set(&recorded.0, 0, 0)?;
            most_likely.slice_set(&recorded.1, 0, 0)
        });
        Ok(Self { shape, batch, logits, most_likely, graph: graph.ok() })
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
