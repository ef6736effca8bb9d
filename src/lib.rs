//! Taper runs Qwen3, Qwen3.5, Gemma 4 E2B and bge-m3 on your own machine.

mod chat_template;
mod error;
pub mod hub;
mod message;
mod reply;
mod sampler;
mod tokenizer;

pub use error::{Error, Result};
