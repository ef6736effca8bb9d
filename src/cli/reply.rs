//! A reply as it appears: text on stdout while it comes, what it took on stderr after it.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use taper::{Channel, ChatStream, FinishReason, Piece, Reply, Usage};

use super::Result;

const DIM: &str = "\x1b[2m";
const RESET: &str = "\x1b[0m";

/// How replies are shown.
#[derive(Clone, Copy, Debug)]
pub struct Display {
    /// Whether thinking is shown, dimmed.
    pub thinking: bool,
    stdout_styled: bool,
    stderr_styled: bool,
}

impl Display {
    /// For the terminal, pipe or file that the output goes to. Thinking is shown to people only.
    pub fn new(hide_thinking: bool) -> Self {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let terminal = io::stdout().is_terminal();
        Self {
            thinking: terminal && !hide_thinking,
            stdout_styled: terminal && !plain,
            stderr_styled: io::stderr().is_terminal() && !plain,
        }
    }

    /// Prints a reply as it comes, until it ends or `stop` is set.
    pub fn stream(&self, stream: &mut ChatStream, stop: &AtomicBool) -> Result<Option<FinishReason>> {
        let mut out = Printer { display: *self, channel: Channel::Content, at_line_start: true, out: io::stdout() };
        let mut finish = None;
        while let Some(piece) = stream.poll() {
            if let Some(piece) = piece? {
                finish = piece.finish;
                out.piece(&piece)?;
            }
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        out.end()?;
        Ok(finish)
    }

    /// Prints what the reply took: one dim line on stderr.
    pub fn usage(&self, usage: Option<Usage>, finish: Option<FinishReason>) {
        let Some(usage) = usage else { return };
        let mut parts = vec![
            format!("{} prompt tokens, reused {}", usage.reuse.prompt, usage.reuse.reused),
            format!("{:.0} tok/s", usage.prompt_tokens_per_second()),
            format!("first token {:.2} s", usage.time_to_first_token.as_secs_f64()),
            format!("{} generated", usage.generated_tokens),
        ];
        parts.extend(usage.tokens_per_second().map(|rate| format!("{rate:.1} tok/s")));
        parts.extend(usage.reuse.shortfall.map(|reason| format!("not more reused: {reason}")));
        if finish == Some(FinishReason::Length) {
            parts.push("cut off: --max-tokens or the context is used up".into());
        }
        self.note(&parts.join(" · "));
    }

    /// Prints a dim line on stderr.
    pub fn note(&self, text: &str) {
        if self.stderr_styled {
            eprintln!("{DIM}{text}{RESET}");
        } else {
            eprintln!("{text}");
        }
    }
}

/// A reply as one JSON object.
pub fn to_json(reply: &Reply, finish: Option<FinishReason>, usage: Option<Usage>) -> Value {
    let finish = finish.map(|reason| match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
    });
    let usage = usage.map(|usage| {
        json!({
            "prompt_tokens": usage.reuse.prompt,
            "reused_tokens": usage.reuse.reused,
            "generated_tokens": usage.generated_tokens,
            "time_to_first_token_seconds": usage.time_to_first_token.as_secs_f64(),
            "prompt_tokens_per_second": usage.prompt_tokens_per_second(),
            "generated_tokens_per_second": usage.tokens_per_second(),
        })
    });
    json!({ "message": reply.clone().into_message(), "finish_reason": finish, "usage": usage })
}

struct Printer<W> {
    display: Display,
    channel: Channel,
    at_line_start: bool,
    out: W,
}

impl<W: Write> Printer<W> {
    fn piece(&mut self, piece: &Piece) -> io::Result<()> {
        if piece.channel != self.channel {
            self.switch(piece.channel)?;
        }
        match (piece.channel, &piece.tool_call) {
            (_, Some(call)) => {
                let arguments = Value::Object(call.arguments.clone());
                self.print(&format!("[{} {arguments}]", call.name))
            }
            (Channel::Content, None) => self.print(&piece.text),
            (Channel::Reasoning, None) if self.display.thinking => self.print(&piece.text),
            (Channel::Reasoning | Channel::ToolCall, None) => Ok(()),
        }
    }

    fn switch(&mut self, channel: Channel) -> io::Result<()> {
        let was_visible = self.channel != Channel::Reasoning || self.display.thinking;
        if was_visible && !self.at_line_start {
            self.print("\n")?;
        }
        if self.channel == Channel::Reasoning && self.display.thinking {
            self.style(RESET)?;
            self.print("\n")?;
        }
        self.channel = channel;
        if channel == Channel::Reasoning && self.display.thinking {
            self.style(DIM)?;
        }
        Ok(())
    }

    fn print(&mut self, text: &str) -> io::Result<()> {
        if let Some(last) = text.chars().last() {
            self.at_line_start = last == '\n';
        }
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }

    fn style(&mut self, code: &str) -> io::Result<()> {
        if self.display.stdout_styled { self.out.write_all(code.as_bytes()) } else { Ok(()) }
    }

    fn end(&mut self) -> io::Result<()> {
        if self.channel == Channel::Reasoning && self.display.thinking {
            self.style(RESET)?;
        }
        if self.at_line_start { self.out.flush() } else { self.print("\n") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(thinking: bool, pieces: &[(Channel, &str)]) -> String {
        let display = Display { thinking, stdout_styled: true, stderr_styled: false };
        let mut printer = Printer { display, channel: Channel::Content, at_line_start: true, out: vec![] };
        for &(channel, text) in pieces {
            let piece = Piece { channel, text: text.into(), tool_call: None, logprobs: None, finish: None };
            printer.piece(&piece).unwrap();
        }
        printer.end().unwrap();
        String::from_utf8(printer.out).unwrap()
    }

    #[test]
    fn thinking_is_dim_and_apart_or_not_there() {
        let pieces = [(Channel::Reasoning, "Hm."), (Channel::Content, "Paris"), (Channel::Content, ".")];
        assert_eq!(printed(true, &pieces), "\x1b[2mHm.\n\x1b[0m\nParis.\n");
        assert_eq!(printed(false, &pieces), "Paris.\n");
    }
}
