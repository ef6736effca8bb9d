//! `taper generate`: continue a text as it stands.

use std::io::{self, Write};
use std::process::ExitCode;

use super::Result;
use super::chat::read_stdin;
use super::model::ModelArgs;
use super::reply::{Display, to_json};
use super::sampling::SamplingArgs;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The text to continue; stdin if absent
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Print the continuation as one JSON object, with numbers
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let prompt = match &args.prompt {
        Some(prompt) => prompt.clone(),
        None => read_stdin()?,
    };
    let mut llm = args.model.load()?;
    let params = args.sampling.over(llm.defaults());
    let mut stream = llm.generate(&prompt, params)?;
    let mut out = io::stdout().lock();
    let mut finish = None;
    for piece in &mut stream {
        let piece = piece?;
        finish = piece.finish;
        if !args.json {
            out.write_all(piece.text.as_bytes())?;
            out.flush()?;
        }
    }
    if args.json {
        writeln!(out, "{}", to_json(stream.reply(), finish, stream.usage()))?;
    } else {
        writeln!(out)?;
        Display::new(true).usage(stream.usage(), finish);
    }
    Ok(ExitCode::SUCCESS)
}
