//! The command line: one file per subcommand, and what they share.

mod bench;
mod chat;
mod embed;
mod generate;
mod info;
mod model;
mod progress;
mod pull;
mod repl;
mod reply;
mod sampling;
mod search;
mod verify;

use std::io;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Run language models on your own machine.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  taper chat                                    talk with the built-in demo model
  taper chat -m Qwen/Qwen3-0.6B                 talk with a model from the Hugging Face Hub
  taper chat -m ./folder \"Why is the sky blue?\"  one question, one answer
  taper embed -i texts.jsonl -o vectors.parquet  vectors for every row of a file
  taper info Qwen/Qwen3.5-2B                    what a model needs, before downloading it";

#[derive(Debug, Subcommand)]
enum Command {
    /// Talk with a model: a conversation, or one reply if a prompt is given
    Chat(chat::Args),
    /// Continue a text as it stands, without a chat template
    Generate(generate::Args),
    /// Turn texts into vectors, from files of any size
    Embed(embed::Args),
    /// Find the texts of an embedded file that answer a query
    Search(search::Args),
    /// Download a model for later
    Pull(pull::Args),
    /// Show a model's parts and the memory that they take
    Info(info::Args),
    /// Measure how fast a model runs here
    Bench(bench::Args),
    /// Compare a model with reference outputs from transformers
    Verify(verify::Args),
}

/// Runs the chosen subcommand.
pub fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Chat(args) => chat::run(&args),
        Command::Generate(args) => generate::run(&args),
        Command::Embed(args) => embed::run(&args),
        Command::Search(args) => search::run(&args),
        Command::Pull(args) => pull::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Verify(args) => verify::run(&args),
    }
}

/// What a subcommand fails with: printed on one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Taper(#[from] taper::Error),
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Usage(String),
}

type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the reader of our output went away, which is no failure.
    pub fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Taper(error.into())
    }
}

impl From<taper::hub::HubError> for Error {
    fn from(error: taper::hub::HubError) -> Self {
        Self::Taper(error.into())
    }
}
