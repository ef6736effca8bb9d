//! `taper chat`: a conversation, or one reply.

use std::io::{self, IsTerminal, Read};
use std::process::ExitCode;
use std::sync::atomic::AtomicBool;

use taper::Message;

use super::model::ModelArgs;
use super::reply::{Display, to_json};
use super::sampling::SamplingArgs;
use super::{Error, Result, repl};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to say; without it a conversation starts, or stdin is read if it is not a terminal
    prompt: Option<String>,
    #[command(flatten)]
    model: ModelArgs,
    /// Instructions for the whole conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Think before answering
    #[arg(long, overrides_with = "no_think")]
    think: bool,
    /// Answer at once
    #[arg(long, overrides_with = "think")]
    no_think: bool,
    /// Do not show the thinking
    #[arg(long)]
    hide_thinking: bool,
    /// Print the reply as one JSON object, with thinking, tool calls and numbers
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let prompt = match &args.prompt {
        Some(prompt) => Some(prompt.clone()),
        None if io::stdin().is_terminal() => None,
        None => Some(read_stdin()?),
    };
    if args.json && prompt.is_none() {
        return Err(Error::Usage("--json needs a prompt, as an argument or on stdin".into()));
    }
    if prompt.as_ref().is_some_and(|prompt| prompt.trim().is_empty()) {
        return Err(Error::Usage("the prompt is empty".into()));
    }
    let mut llm = args.model.load()?;
    let mut chat = llm.chat();
    chat.params = args.sampling.over(&chat.params);
    chat.params.validate()?;
    chat.thinking = match (args.think, args.no_think) {
        (true, _) => Some(true),
        (_, true) => Some(false),
        _ => None,
    };
    chat.messages.extend(args.system.as_deref().map(Message::system));
    let display = Display::new(args.hide_thinking);
    let Some(prompt) = prompt else { return repl::run(chat, display) };
    let mut stream = chat.send(prompt)?;
    if args.json {
        let mut finish = None;
        for piece in &mut stream {
            finish = piece?.finish;
        }
        println!("{}", to_json(stream.reply(), finish, stream.usage()));
    } else {
        let finish = display.stream(&mut stream, &AtomicBool::new(false))?;
        display.usage(stream.usage(), finish);
    }
    Ok(ExitCode::SUCCESS)
}

/// All of stdin, without the line break that ends it.
pub fn read_stdin() -> Result<String> {
    let mut bytes = vec![];
    io::stdin().read_to_end(&mut bytes)?;
    let text = String::from_utf8(bytes).map_err(|error| {
        Error::Usage(format!("stdin is not UTF-8 from byte {} on", error.utf8_error().valid_up_to()))
    })?;
    Ok(text.trim_end_matches(['\r', '\n']).to_string())
}
