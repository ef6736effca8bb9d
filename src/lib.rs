//! Taper runs Qwen3, Qwen3.5, Gemma 4 E2B and bge-m3 on your own machine.

mod blocks;
mod chat;
mod chat_template;
mod device;
mod engine;
mod error;
pub mod hub;
mod llm;
mod message;
mod prefix_cache;
mod reply;
mod sampler;
mod scheduler;
mod sequence;
#[cfg(test)]
mod testing;
mod tokenizer;
pub mod verify;

pub use chat::{Chat, ChatStream};
pub use device::{DeviceChoice, available_memory, default_dtype};
pub use engine::{Engine, EngineOptions, FinishReason, ModelLimits, Output, Request, Stats, Token};
pub use error::{Error, Result};
pub use llm::{Llm, Options, Piece, Stream, Streams, Usage};
pub use message::{Message, Role, Tool, ToolCall};
pub use reply::{Channel, Reply};
pub use sampler::{Logprobs, Sampled, Sampler, SamplingParams};
pub use sequence::{Reuse, SequenceId, Shortfall};
