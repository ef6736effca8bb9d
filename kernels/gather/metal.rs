//! Rows of a table on Metal.

use candle_core::{Result, Tensor};

use crate::cpu::Operand;
use crate::metal::{self, Argument, Backend, Launch, Source, float, source};

pub(super) static SOURCE: Source = source!("gather");

const LANES: usize = 32;
/// Of a threadgroup, at most.
const MAX_THREADS: usize = 256;

/// `table` `[V, D]` in rows, `ids` `[N]` contiguous.
pub fn gather<B: Backend>(backend: &B, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let ((rows, d), n, dtype) = (table.dims2()?, ids.elem_count(), table.dtype());
    let (table, ids) = (Operand::new(table), Operand::new(ids));
    metal::output(backend, (n, d), dtype, |y| {
        let (table, places) = table.metal_rows::<B>()?;
        backend.launch(Launch {
            source: &SOURCE,
            kernel: "gather",
            variant: float(dtype)?,
            constants: vec![],
            threadgroups: [n, 1, 1],
            threads: [d.next_multiple_of(LANES).min(MAX_THREADS), 1, 1],
            arguments: vec![
                Argument::Write(y, 0),
                table,
                ids.metal::<B>()?,
                Argument::Words(vec![places.strides[0], rows as u32, d as u32]),
            ],
        })
    })
}
