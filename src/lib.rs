//! Taper runs Qwen3, Qwen3.5 and Gemma 4 on your own machine, and embeds texts with bge-m3 and Qwen3-Embedding.
//!
//! [`Llm`] loads a model and streams text; [`Chat`] is a conversation with it. Below them [`Engine`] runs token
//! requests in steps, many at once, and keeps what they computed for later prompts with the same beginning.
//! [`Embedder`] turns texts into what they are searched by.
//!
//! ```
//! # #[cfg(feature = "demo")]
//! # fn main() -> taper::Result<()> {
//! let mut llm = taper::Llm::demo(&taper::Options::default())?;
//! let mut chat = llm.chat();
//! let mut said = String::new();
//! for piece in chat.send("What is the capital of France?")? {
//!     said += &piece?.text;
//! }
//! assert_eq!(said, "The capital of France is Paris.");
//! # Ok(())
//! # }
//! # #[cfg(not(feature = "demo"))]
//! # fn main() {}
//! ```

mod atomic;
mod blocks;
mod chat;
mod chat_template;
mod device;
mod embedder;
pub mod embedding;
mod engine;
mod error;
mod generation;
pub mod hub;
mod llm;
mod message;
mod prefix_cache;
mod recorded;
mod reply;
mod sampler;
mod scheduler;
mod sequence;
mod service;
mod session;
mod sizes;
mod snapshot;
#[cfg(test)]
mod testing;
mod text;
mod tokenizer;
pub mod verify;

pub use chat::{Chat, ChatStream, Loaded};
pub use device::{DeviceChoice, available_memory, default_dtype, default_step, kv_dtype};
pub use embedder::{Embedder, EmbedderOptions, instruct};
pub use embedding::Embedding;
pub use engine::{Engine, EngineOptions, FinishReason, ModelLimits, Output, Request, Stats, Token};
pub use error::{Error, Result};
pub use generation::{Piece, Usage};
pub use llm::{Llm, Options, Stream, Streams};
pub use message::{Message, Role, Tool, ToolCall};
pub use models::{Heads, PackCache, Quantization};
pub use reply::{Channel, Reply};
pub use sampler::{Logprobs, Sampled, Sampler, SamplingParams};
pub use sequence::{Reuse, SequenceId, Shortfall};
pub use service::{ReplyStream, Service, ServiceOptions};
