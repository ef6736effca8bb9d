//! The gated activation on Metal.

use candle_core::backend::BackendStorage;
use candle_core::{Layout, Result};

use super::Activation;
use crate::metal::{Argument, Backend, Launch, Rows, Source, float, source};

pub(super) static SOURCE: Source = source!("activation");

/// Of a threadgroup.
const THREADS: usize = 256;

/// `gate_up` `[N, 2 I]` in rows.
pub fn gated_activation<B: Backend>(
    backend: &B,
    gate_up: &B::Storage,
    layout: &Layout,
    activation: Activation,
) -> Result<B::Storage> {
    let (n, width) = layout.shape().dims2()?;
    let (dtype, width) = (gate_up.dtype(), width / 2);
    let rows = Rows::new(dtype, layout)?;
    let mut out = backend.allocate(n * width, dtype)?;
    backend.launch(Launch {
        source: &SOURCE,
        kernel: "gated_activation",
        variant: float(dtype)?,
        constants: vec![activation == Activation::GeluTanh],
        threadgroups: [width.div_ceil(THREADS), n, 1],
        threads: [THREADS, 1, 1],
        arguments: vec![
            Argument::Write(&mut out, 0),
            Argument::Read(gate_up, rows.start),
            Argument::Words([&rows.words()[..], &[width as u32]].concat()),
        ],
    })?;
    Ok(out)
}
