//! One reply in the making: tokens in, pieces of text out, and what it took.

use std::time::{Duration, Instant};

use crate::engine::{FinishReason, Token};
use crate::message::{Tool, ToolCall};
use crate::reply::{Channel, Reply, ReplyFormat, ReplyParser, ReplyPiece};
use crate::sampler::Logprobs;
use crate::sequence::Reuse;
use crate::text::{Prompt, Text};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// Part of a reply.
#[derive(Clone, Debug)]
pub struct Piece {
    pub channel: Channel,
    /// Whole characters; empty if a token completes none.
    pub text: String,
    /// A tool call that is now complete.
    pub tool_call: Option<ToolCall>,
    /// Present if asked for, with the token that this piece comes from.
    pub logprobs: Option<Logprobs>,
    /// Present with the last piece.
    pub finish: Option<FinishReason>,
}

/// What a reply took.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// The prompt's tokens, and how many came from the cache.
    pub reuse: Reuse,
    pub generated_tokens: usize,
    /// From the request to its first token.
    pub time_to_first_token: Duration,
    /// From the first token to the last.
    pub generation_time: Duration,
}

impl Usage {
    /// Prompt tokens that ran, per second until the first token.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        (self.reuse.prompt - self.reuse.reused) as f64 / self.time_to_first_token.as_secs_f64()
    }

    /// Tokens per second after the first one; `None` if there was only one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = self.generation_time.as_secs_f64();
        (self.generated_tokens > 1 && seconds > 0.0).then(|| (self.generated_tokens - 1) as f64 / seconds)
    }
}

/// One reply in the making.
pub(crate) struct Generation {
    decode: DecodeStream,
    /// Absent for raw completions, whose text is all content.
    parser: Option<ReplyParser>,
    pub reply: Reply,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    reuse: Option<Reuse>,
    generated: usize,
    /// Whether the last piece was given out.
    pub done: bool,
}

impl Generation {
    /// What follows `prompt`.
    pub fn new(text: &Text, prompt: &Prompt) -> Self {
        let format = ReplyFormat::of(&text.tokenizer);
        let parser = |tools: &Vec<Tool>| ReplyParser::new(format, &text.tokenizer, tools.clone(), &prompt.tokens);
        Self {
            decode: DecodeStream::default(),
            parser: prompt.tools.as_ref().map(parser),
            reply: Reply::default(),
            started: Instant::now(),
            first_token: None,
            last_token: None,
            reuse: None,
            generated: 0,
            done: false,
        }
    }

    /// What it took so far; `None` before the first token.
    pub fn usage(&self) -> Option<Usage> {
        let (first, last) = (self.first_token?, self.last_token?);
        Some(Usage {
            reuse: self.reuse?,
            generated_tokens: self.generated,
            time_to_first_token: first - self.started,
            generation_time: last - first,
        })
    }

    /// The pieces that a token completes.
    pub fn take(&mut self, token: Token, tokenizer: &Tokenizer) -> Vec<Piece> {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.reuse = Some(token.reuse);
        self.generated += 1;
        let mut parts = vec![];
        if token.finish != Some(FinishReason::Stop) {
            let text = self.decode.step(tokenizer, token.id);
            parts = match &mut self.parser {
                Some(parser) => parser.push(token.id, &text),
                None => vec![ReplyPiece::Text(Channel::Content, text)],
            };
        }
        if token.finish.is_some() {
            self.done = true;
            let rest = self.decode.finish();
            match &mut self.parser {
                Some(parser) => parts.extend(parser.finish(&rest)),
                None => parts.push(ReplyPiece::Text(Channel::Content, rest)),
            }
        }
        self.reply.extend(parts.iter().cloned());
        let mut pieces: Vec<Piece> = parts.into_iter().map(Piece::from).collect();
        if pieces.is_empty() && (token.logprobs.is_some() || token.finish.is_some()) {
            pieces.push(Piece::from(ReplyPiece::Text(Channel::Content, String::new())));
        }
        if let Some(first) = pieces.first_mut() {
            first.logprobs = token.logprobs;
        }
        if let Some(last) = pieces.last_mut() {
            last.finish = token.finish;
        }
        pieces
    }
}

impl From<ReplyPiece> for Piece {
    fn from(piece: ReplyPiece) -> Self {
        let (channel, text, tool_call) = match piece {
            ReplyPiece::Text(channel, text) => (channel, text, None),
            ReplyPiece::ToolCall(call) => (Channel::ToolCall, String::new(), Some(call)),
        };
        Self { channel, text, tool_call, logprobs: None, finish: None }
    }
}
