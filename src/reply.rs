//! What a model's reply is made of: thinking, the answer, and tool calls.
//!
//! The engine feeds every generated token to a [`ReplyParser`] and passes on what comes out. Markers are recognised
//! by token id alone, so a reply that quotes one letter by letter is not taken apart.

#[cfg(test)]
mod tests;
mod tool_call;

use crate::message::{Message, Tool, ToolCall};
use crate::tokenizer::Tokenizer;

/// The part of a reply that a piece of text belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Channel {
    /// The thinking before the answer.
    Reasoning,
    /// The answer.
    Content,
    /// A tool call in the making, as the model writes it. If it turns out not to be one, the same text comes again
    /// as content.
    ToolCall,
}

/// How a family marks the parts of a reply.
pub(crate) struct ReplyFormat {
    /// The tokens around thinking.
    pub think: [&'static str; 2],
    /// What follows the first of them, before the thinking.
    pub label: &'static str,
    /// The tokens around a tool call.
    pub tool_call: [&'static str; 2],
    /// The token that stands for a quotation mark in a tool call.
    pub quote: Option<&'static str>,
    /// The token that begins a turn of the conversation.
    pub turn: &'static str,
    /// Reads what stands between the tokens of a tool call.
    pub parse: fn(&str, &[Tool]) -> Option<ToolCall>,
}

/// Qwen3 and Qwen3.5. Their calls differ, JSON there and tags here, but cannot be mistaken for each other.
pub(crate) const QWEN: ReplyFormat = ReplyFormat {
    think: ["<think>", "</think>"],
    label: "",
    tool_call: ["<tool_call>", "</tool_call>"],
    quote: None,
    turn: "<|im_start|>",
    parse: tool_call::parse_qwen,
};

/// Gemma 4.
pub(crate) const GEMMA: ReplyFormat = ReplyFormat {
    think: ["<|channel>", "<channel|>"],
    label: "thought\n",
    tool_call: ["<|tool_call>", "<tool_call|>"],
    quote: Some(tool_call::GEMMA_QUOTE),
    turn: "<|turn>",
    parse: tool_call::parse_gemma,
};

impl ReplyFormat {
    /// The format whose markers the tokenizer has.
    pub fn of(tokenizer: &Tokenizer) -> &'static Self {
        if tokenizer.token_id(GEMMA.turn).is_some() { &GEMMA } else { &QWEN }
    }
}

/// What a [`ReplyParser`] makes of the tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum ReplyPiece {
    /// More text of a channel.
    Text(Channel, String),
    /// A tool call is complete.
    ToolCall(ToolCall),
}

/// Splits one reply into channels while it is generated.
///
/// Line breaks at the seams belong to the format, not to the text: those after a marker, before the end of thinking
/// and around a tool call are left out, as templates write them again.
pub(crate) struct ReplyParser {
    format: &'static ReplyFormat,
    tools: Vec<Tool>,
    think: [Option<u32>; 2],
    tool_call: [Option<u32>; 2],
    quote: Option<u32>,
    channel: Channel,
    /// What may become the label of the thinking that has just begun.
    label: Option<String>,
    /// Nothing but line breaks has come since a marker; they are dropped.
    at_start: bool,
    /// Line breaks that are text if more text follows in this channel.
    held: String,
    /// Text of the channel has been given out, by channel.
    has_text: [bool; 3],
    /// What a tool call consists of so far.
    call: String,
    calls: usize,
}

impl ReplyParser {
    /// A parser for what follows `prompt`, which decides whether the reply begins inside of thinking: it does if the
    /// last thinking marker of the last turn is an opening one.
    pub fn new(format: &'static ReplyFormat, tokenizer: &Tokenizer, tools: Vec<Tool>, prompt: &[u32]) -> Self {
        let [think, tool_call] = [format.think, format.tool_call].map(|pair| pair.map(|name| tokenizer.token_id(name)));
        // Turns before the last one may quote markers.
        let turn = tokenizer.token_id(format.turn);
        let mut last_turn = prompt.iter().rev().take_while(|&&id| Some(id) != turn);
        let is_thinking = last_turn.find(|&&id| think.contains(&Some(id))).is_some_and(|&id| Some(id) == think[0]);
        Self {
            format,
            tools,
            think,
            tool_call,
            quote: format.quote.and_then(|name| tokenizer.token_id(name)),
            label: None,
            channel: if is_thinking { Channel::Reasoning } else { Channel::Content },
            at_start: is_thinking,
            held: String::new(),
            has_text: [false; 3],
            call: String::new(),
            calls: 0,
        }
    }

    /// Takes a token and the text that it completed.
    pub fn push(&mut self, id: u32, text: &str) -> Vec<ReplyPiece> {
        let ([think, end_think], [call, end_call]) = (self.think, self.tool_call);
        let id = Some(id);
        match self.channel {
            Channel::Reasoning if id == end_think => {
                let pieces = self.end_label();
                self.switch(Channel::Content);
                return pieces;
            }
            Channel::Content if id == think => {
                self.switch(Channel::Reasoning);
                self.label = Some(String::new()).filter(|_| !self.format.label.is_empty());
            }
            // Neither `held` nor `at_start` changes before it is known whether this is a call.
            Channel::Content if id == call => self.channel = Channel::ToolCall,
            Channel::ToolCall if id == call => {
                let pieces = self.give_back("");
                self.channel = Channel::ToolCall;
                return pieces;
            }
            Channel::ToolCall if id == end_call => return self.end_call(),
            // The text of a special token is empty.
            Channel::ToolCall if self.quote.is_some() && id == self.quote && text.is_empty() => {
                return self.text(self.format.quote.unwrap_or_default());
            }
            Channel::Reasoning if self.label.is_some() => return self.label(text),
            _ => return self.text(text),
        }
        Vec::new()
    }

    /// Takes the text that is left when no more tokens come. A tool call without an end is content.
    pub fn finish(&mut self, text: &str) -> Vec<ReplyPiece> {
        let mut pieces = if self.label.is_some() { self.label(text) } else { self.text(text) };
        pieces.extend(self.end_label());
        if self.channel == Channel::ToolCall {
            pieces.extend(self.give_back(""));
        }
        let held = std::mem::take(&mut self.held);
        if self.channel == Channel::Content && !self.at_start && !held.is_empty() {
            pieces.push(ReplyPiece::Text(Channel::Content, held));
        }
        pieces
    }

    fn text(&mut self, mut text: &str) -> Vec<ReplyPiece> {
        let mut given = String::new();
        if self.channel == Channel::ToolCall {
            self.call += text;
            given += text;
        } else {
            if self.at_start {
                text = text.trim_start_matches('\n');
            }
            let body = text.trim_end_matches('\n');
            if !body.is_empty() {
                given = std::mem::take(&mut self.held) + body;
                self.at_start = false;
                self.has_text[self.channel as usize] = true;
            }
            self.held += &text[body.len()..];
        }
        if given.is_empty() { Vec::new() } else { vec![ReplyPiece::Text(self.channel, given)] }
    }

    /// Takes text of thinking whose label has not come yet, and leaves the label out.
    fn label(&mut self, text: &str) -> Vec<ReplyPiece> {
        let begun = self.label.take().unwrap_or_default() + text;
        if begun.len() < self.format.label.len() && self.format.label.starts_with(&begun) {
            self.label = Some(begun);
            return Vec::new();
        }
        self.text(begun.strip_prefix(self.format.label).unwrap_or(&begun))
    }

    /// Gives what began like a label as text when the thinking ends. A label without its line break is still one.
    fn end_label(&mut self) -> Vec<ReplyPiece> {
        let begun = self.label.take().filter(|begun| begun != self.format.label.trim_end());
        begun.map_or_else(Vec::new, |begun| self.text(&begun))
    }

    fn switch(&mut self, channel: Channel) {
        self.channel = channel;
        self.at_start = true;
        // What a channel says before and after a tool call or more thinking stays on lines of its own.
        self.held = if self.has_text[channel as usize] { "\n".into() } else { String::new() };
    }

    fn end_call(&mut self) -> Vec<ReplyPiece> {
        let Some(mut call) = (self.format.parse)(&self.call, &self.tools) else {
            return self.give_back(self.format.tool_call[1]);
        };
        call.id = Some(format!("call_{}", self.calls));
        self.calls += 1;
        self.call.clear();
        self.switch(Channel::Content);
        vec![ReplyPiece::ToolCall(call)]
    }

    /// What began like a tool call, as content.
    fn give_back(&mut self, close: &str) -> Vec<ReplyPiece> {
        let text = [self.format.tool_call[0], &std::mem::take(&mut self.call), close].concat();
        self.channel = Channel::Content;
        self.text(&text)
    }
}

/// A whole reply.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reply {
    /// The answer.
    pub content: String,
    /// The thinking before it, empty if there was none.
    pub reasoning: String,
    /// The tools to call, in order.
    pub tool_calls: Vec<ToolCall>,
}

impl Reply {
    /// The message to continue the conversation with.
    pub fn into_message(self) -> Message {
        let mut message = Message::assistant(self.content);
        message.reasoning = Some(self.reasoning).filter(|reasoning| !reasoning.is_empty());
        message.tool_calls = self.tool_calls;
        message
    }
}

impl Extend<ReplyPiece> for Reply {
    fn extend<T: IntoIterator<Item = ReplyPiece>>(&mut self, pieces: T) {
        for piece in pieces {
            match piece {
                ReplyPiece::Text(Channel::Reasoning, text) => self.reasoning += &text,
                ReplyPiece::Text(Channel::Content, text) => self.content += &text,
                ReplyPiece::Text(Channel::ToolCall, _) => {}
                ReplyPiece::ToolCall(call) => self.tool_calls.push(call),
            }
        }
    }
}
