//! `taper pull`: download a model for later.

use std::process::ExitCode;

use super::Result;
use super::model::SourceArgs;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hub id such as Qwen/Qwen3-0.6B
    model: String,
    #[command(flatten)]
    source: SourceArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    println!("{}", args.source.resolve(&args.model)?.display());
    Ok(ExitCode::SUCCESS)
}
