//! Taper's kernels: one free function per operation, tensors in, tensor out.
//!
//! Every op works on *packed* sequences: the tokens of all sequences of a step stand one after the other in
//! one dimension, and [`Batch`] says where each sequence begins, where its keys and values live (pages) and
//! where its recurrent state lives (slots). There is no padding, no mask, and no separate decode phase.
//!
//! An op lives in a folder: `mod.rs` documents and checks, `reference.rs` is the definition in plain f32 loops,
//! `cpu.rs` (where the reference is too slow), `cuda.rs` and `metal.rs` run it, `tests.rs` holds one table of
//! cases that every device present must pass against the reference.
//!
//! # Shape vocabulary
//!
//! | letter | meaning |
//! | --- | --- |
//! | `N` | tokens in the step, over all sequences |
//! | `B` | sequences in the step |
//! | `H` | hidden size |
//! | `Hq Hk Hv` | query, key and value heads |
//! | `D` | attention head size |
//! | `K V` | key and value size of a recurrent head |
//! | `C` | channels of a convolution |
//! | `E` | experts of a sparse MLP |
//! | `S` | recurrent state slots |
//!
//! # Ops that write in place
//!
//! Cache tensors (pages, convolution windows, recurrent states) are written where they lie, under candle's
//! write lock: the op is an [`InplaceOp1`](candle_core::InplaceOp1) on the cache tensor, borrows its other
//! operands, and leaves its result in a `OnceCell` that the public function empties. An input must therefore
//! never be a view of the cache tensor that the op writes: taking both locks on one storage would deadlock.
//!
//! # Determinism
//!
//! On the CPU a token's result depends on its own sequence alone: no reduction order depends on how many
//! tokens or sequences share the step, how the prompt was cut into chunks, or the number of threads.

/// Returns `run` from the function around it where `tensor` lies on a Metal device, or in tests while the emulator stands
/// in for one.
macro_rules! on_metal {
    ($tensor:expr, $backend:ident => $run:expr) => {
        #[cfg(any(test, feature = "emulator"))]
        if let Some($backend) = &crate::metal::emulator::emulator() {
            return $run;
        }
        #[cfg(feature = "metal")]
        if let candle_core::Device::Metal($backend) = $tensor.device() {
            return $run;
        }
    };
}

pub mod activation;
pub mod attention;
pub mod conv;
pub mod device;
pub mod gated_delta;
pub mod gather;
pub mod graph;
pub mod heads;
pub mod linear;
pub mod memory;
pub mod moe;
pub mod norm;
pub mod quantized;
pub mod residual;
pub mod rope;
pub mod sampling;
pub mod softcap;

mod batch;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "metal", feature = "emulator"))]
mod metal;
#[doc(hidden)]
pub mod probe;
mod simd;
#[doc(hidden)]
pub mod testing;

pub use batch::{Batch, NO_BLOCK, Segment};
pub use cpu::on_pool;
