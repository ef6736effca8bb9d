//! The conversation at a terminal: lines in, replies out, commands that begin with a slash.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::DefaultHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Context, Editor, Helper};
use taper::{Chat, ChatStream, Message, Role, SamplingParams};

use super::info::bytes_of;
use super::reply::Display;
use super::{Error, Result};

const HELP: &str = "\
/history              what was said, your messages numbered
/undo                 take back your last message and its reply
/regen                another reply to your last message
/edit N [TEXT]        say message N anew; what came after it goes
/fork NAME            go on under a new name; this branch stays as it is
/switch [NAME]        go on with another branch; without a name, list them
/save FILE            write the conversation to a file, with what was computed for it
/load FILE            go on with a saved conversation in place of this one
/clear                forget the conversation, keep the system message
/system TEXT          set the system message, or show it
/think on|off|auto    think before answering, or leave it to the model
/set NAME VALUE       temperature, top-k, top-p, min-p, max-tokens, seed; without a value, show them
/stats                what the engine holds
/help                 this list
/exit                 leave; so does Ctrl-D

A line that ends in \\ goes on; so does everything between two lines of \"\"\". Ctrl-C stops a reply.";

const COMMANDS: [&str; 15] = [
    "/history", "/undo", "/regen", "/edit", "/fork", "/switch", "/save", "/load", "/clear", "/system", "/think",
    "/set", "/stats", "/help", "/exit",
];

/// Talks until the person leaves.
pub fn run(chat: Chat, display: Display) -> Result<ExitCode> {
    let stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGINT, Arc::clone(&stop))?;
    let mut editor = Editor::<Input, DefaultHistory>::new().map_err(readline_error)?;
    editor.set_helper(Some(Input));
    let history = history_file();
    if let Some(path) = &history {
        let _ = editor.load_history(path); // there is none the first time
    }
    display.note("/help lists the commands, Ctrl-D leaves.");
    let mut repl = Repl { chat, display, stop };
    let mut initial = String::new();
    loop {
        let prompt = match repl.chat.branch() {
            "main" => "> ".to_string(),
            branch => format!("{branch}> "),
        };
        let line = match editor.readline_with_initial(&prompt, (&std::mem::take(&mut initial), "")) {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(readline_error(error)),
        };
        let text = unquote(&line);
        if text.is_empty() {
            continue;
        }
        let _ = editor.add_history_entry(line.as_str());
        if let Some(path) = &history {
            let _ = editor.append_history(path); // a conversation is worth more than its history file
        }
        repl.stop.store(false, Ordering::Relaxed);
        match repl.obey(text) {
            Ok(Outcome::Stay) => {}
            Ok(Outcome::Leave) => break,
            Ok(Outcome::Type(text)) => initial = text,
            Err(error) if error.is_broken_pipe() => return Err(error),
            Err(error) => eprintln!("{error}"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What follows a line.
enum Outcome {
    Stay,
    Leave,
    /// The next line begins with this text, for the person to change.
    Type(String),
}

struct Repl<'a> {
    chat: Chat<'a>,
    display: Display,
    /// Set by Ctrl-C.
    stop: Arc<AtomicBool>,
}

impl Repl<'_> {
    fn obey(&mut self, line: String) -> Result<Outcome> {
        let Self { chat, display, stop } = self;
        if !line.starts_with('/') {
            return answer(chat.send(line)?, *display, stop);
        }
        let (name, rest) = line.split_once(char::is_whitespace).unwrap_or((&line, ""));
        let rest = rest.trim();
        match name {
            "/history" => history(chat, *display),
            "/undo" => match chat.undo() {
                Some(message) => display.note(&format!("taken back: {}", first_line(&message.content))),
                None => display.note("nothing was said yet"),
            },
            "/regen" => return answer(chat.regenerate()?, *display, stop),
            "/edit" => return self.edit(rest),
            "/fork" => {
                let from = chat.branch().to_string();
                chat.fork(rest)?;
                display.note(&format!("on {rest} now; /switch {from} goes back"));
            }
            "/switch" if rest.is_empty() => list_branches(chat),
            "/switch" => {
                chat.switch(rest)?;
                let last = chat.messages.iter().rfind(|message| message.role == Role::User);
                let last = last.map_or("nothing was said yet", |message| first_line(&message.content));
                display.note(&format!("on {rest}: {last}"));
            }
            "/save" => {
                let path = file(rest, name)?;
                chat.save(&path)?;
                let bytes = std::fs::metadata(&path)?.len();
                display.note(&format!("saved to {}: {}", path.display(), bytes_of(bytes)));
            }
            "/load" => {
                let path = file(rest, name)?;
                let loaded = chat.load(&path)?;
                let count = chat.messages.iter().filter(|message| message.role == Role::User).count();
                let cache = match loaded.not_cached {
                    None => format!("{} tokens need not run again", loaded.cached_tokens),
                    Some(reason) => format!("its tokens run again: {reason}"),
                };
                display.note(&format!("on {}, {count} messages of yours; {cache}", chat.branch()));
            }
            "/clear" => {
                chat.messages.retain(|message| message.role == Role::System);
                display.note("forgotten");
            }
            "/system" if rest.is_empty() => match chat.messages.first() {
                Some(message) if message.role == Role::System => eprintln!("{}", message.content),
                _ => display.note("no system message"),
            },
            "/system" => {
                chat.messages.retain(|message| message.role != Role::System);
                chat.messages.insert(0, Message::system(rest));
            }
            "/think" => match rest {
                "on" => chat.thinking = Some(true),
                "off" => chat.thinking = Some(false),
                "auto" => chat.thinking = None,
                _ => return usage("/think takes on, off or auto"),
            },
            "/set" => {
                chat.params = set(&chat.params, rest).map_err(Error::Usage)?;
                if rest.is_empty() {
                    show(&chat.params);
                }
            }
            "/stats" => {
                let stats = chat.llm().engine().stats();
                eprintln!(
                    "{} blocks: {} free, {} with reusable prefixes; {} checkpoints of recurrent state; context {} tokens",
                    stats.num_blocks,
                    stats.free_blocks,
                    stats.cached_blocks,
                    stats.checkpoints,
                    chat.llm().engine().max_context()
                );
            }
            "/help" => eprintln!("{HELP}"),
            "/exit" | "/quit" | "/bye" => return Ok(Outcome::Leave),
            _ => return usage(&format!("no command {name}: /help lists them")),
        }
        Ok(Outcome::Stay)
    }

    /// `/edit N TEXT`; without the text, message N comes back on the line, behind the command.
    fn edit(&mut self, rest: &str) -> Result<Outcome> {
        let (number, text) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let number = match number.parse::<usize>() {
            Ok(number) if number > 0 => number,
            _ => return usage("/edit takes the number of one of your messages: /history shows them"),
        };
        let text = text.trim();
        if !text.is_empty() {
            return answer(self.chat.edit(number - 1, text)?, self.display, &self.stop);
        }
        let said = self.chat.messages.iter().filter(|message| message.role == Role::User).nth(number - 1);
        match said {
            Some(message) => Ok(Outcome::Type(format!("/edit {number} {}", message.content.replace('\n', "\\\n")))),
            None => usage(&format!("no message {number}: /history shows them")),
        }
    }
}

fn answer(mut stream: ChatStream, display: Display, stop: &AtomicBool) -> Result<Outcome> {
    let finish = display.stream(&mut stream, stop)?;
    display.usage(stream.usage(), finish);
    Ok(Outcome::Stay)
}

fn usage<T>(message: &str) -> Result<T> {
    Err(Error::Usage(message.into()))
}

/// Prints the conversation, the person's messages numbered for `/edit`.
fn history(chat: &Chat, display: Display) {
    let mut number = 0;
    for message in &chat.messages {
        let who = match message.role {
            Role::System => "system".to_string(),
            Role::User => {
                number += 1;
                format!("{number:>2} you")
            }
            Role::Assistant => "   model".to_string(),
            Role::Tool => "   tool".to_string(),
        };
        eprintln!("{who:<9} {}", message.content.replace('\n', "\n          "));
    }
    if number == 0 {
        display.note("nothing was said yet");
    }
}

fn list_branches(chat: &Chat) {
    for name in chat.branches() {
        eprintln!("{} {name}", if name == chat.branch() { "*" } else { " " });
    }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or_default()
}

/// The file that a command names; `~` is the home folder.
fn file(name: &str, command: &str) -> Result<PathBuf> {
    if name.is_empty() {
        return usage(&format!("{command} needs a file name"));
    }
    let home = name.strip_prefix("~/").and_then(|rest| Some(std::env::home_dir()?.join(rest)));
    Ok(home.unwrap_or_else(|| PathBuf::from(name)))
}

/// The parameters with one of them changed.
fn set(params: &SamplingParams, setting: &str) -> std::result::Result<SamplingParams, String> {
    let mut params = params.clone();
    let Some((name, value)) = setting.split_once(char::is_whitespace) else {
        return if setting.is_empty() { Ok(params) } else { Err(format!("/set {setting} needs a value")) };
    };
    let value = value.trim();
    let bad = |_| format!("{name}: {value:?} is not a number");
    let real = || value.parse::<f32>().map_err(|_| bad(()));
    let whole = || value.parse::<usize>().map_err(|_| bad(()));
    match name.replace('_', "-").as_str() {
        "temperature" => params.temperature = real()?,
        "top-k" => params.top_k = Some(whole()?).filter(|&k| k > 0),
        "top-p" => params.top_p = real()?,
        "min-p" => params.min_p = real()?,
        "repetition-penalty" => params.repetition_penalty = real()?,
        "presence-penalty" => params.presence_penalty = real()?,
        "max-tokens" => params.max_tokens = whole()?,
        "seed" => params.seed = Some(value.parse().map_err(|_| bad(()))?),
        _ => return Err(format!("no setting {name}: temperature, top-k, top-p, min-p, max-tokens, seed")),
    }
    params.validate().map_err(|error| error.to_string())?;
    Ok(params)
}

fn show(params: &SamplingParams) {
    let or = |value: Option<String>, other: &str| value.unwrap_or_else(|| other.to_string());
    eprintln!(
        "temperature {}, top-k {}, top-p {}, min-p {}, max-tokens {}, seed {}",
        params.temperature,
        or(params.top_k.map(|k| k.to_string()), "off"),
        params.top_p,
        params.min_p,
        params.max_tokens,
        or(params.seed.map(|seed| seed.to_string()), "random")
    );
}

/// What was typed, without the marks that let it span lines.
fn unquote(line: &str) -> String {
    let line = line.trim();
    match line.strip_prefix("\"\"\"").and_then(|rest| rest.strip_suffix("\"\"\"")) {
        Some(block) => block.trim().to_string(),
        None => line.replace("\\\n", "\n"),
    }
}

/// Where lines typed are kept from one session to the next.
fn history_file() -> Option<PathBuf> {
    let state = std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
    let folder = state.or_else(|| Some(std::env::home_dir()?.join(".local").join("state")))?.join("taper");
    std::fs::create_dir_all(&folder).ok()?;
    Some(folder.join("history"))
}

fn readline_error(error: ReadlineError) -> Error {
    match error {
        ReadlineError::Io(error) => Error::Io(error),
        other => Error::Usage(format!("reading the line: {other}")),
    }
}

/// Line editing: which input is complete, and the commands' names.
struct Input;

impl Validator for Input {
    fn validate(&self, context: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        let input = context.input();
        let block = input.trim_start().starts_with("\"\"\"") && input.matches("\"\"\"").count() < 2;
        let complete = !block && !input.ends_with('\\');
        Ok(if complete { ValidationResult::Valid(None) } else { ValidationResult::Incomplete })
    }
}

impl Completer for Input {
    type Candidate = String;

    fn complete(&self, line: &str, position: usize, _: &Context) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..position];
        let candidates = COMMANDS.iter().filter(|name| typed.starts_with('/') && name.starts_with(typed));
        Ok((0, candidates.map(|name| format!("{name} ")).collect()))
    }
}

impl Hinter for Input {
    type Hint = String;
}

impl Highlighter for Input {}
impl Helper for Input {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn input_over_several_lines() {
        assert_eq!(unquote("\"\"\"\na\nb\n\"\"\""), "a\nb");
        assert_eq!(unquote("a\\\nb"), "a\nb");
        assert_eq!(unquote("  a \"\"\" b "), "a \"\"\" b");
    }

    #[test]
    fn settings() {
        let params = SamplingParams::default();
        assert_eq!(set(&params, "temperature 0.5").unwrap().temperature, 0.5);
        assert_eq!(set(&params, "top-k 0").unwrap().top_k, None);
        assert_eq!(set(&params, "seed 7").unwrap().seed, Some(7));
        for bad in ["temperature", "temperature hot", "temperature -1", "warmth 3", "top-p nan"] {
            assert!(set(&params, bad).is_err(), "{bad}");
        }
    }
}
