//! A conversation: messages in, a streamed reply out, the reply remembered.

use crate::Result;
use crate::llm::{Llm, Piece, Prompt, Stream, Usage};
use crate::message::{Message, Tool};
use crate::reply::Reply;
use crate::sampler::SamplingParams;

/// A conversation with a model.
///
/// Only what is new since the last turn runs: the engine keeps what it computed before.
pub struct Chat<'a> {
    llm: &'a mut Llm,
    /// What was said, in order. Free to edit.
    pub messages: Vec<Message>,
    /// Tools that the model may call.
    pub tools: Vec<Tool>,
    /// Whether to think before answering; `None` leaves it to the model's template.
    pub thinking: Option<bool>,
    /// How replies are sampled; the model's own defaults at first.
    pub params: SamplingParams,
}

impl<'a> Chat<'a> {
    pub(crate) fn new(llm: &'a mut Llm) -> Self {
        let params = llm.defaults().clone();
        Self { llm, messages: vec![], tools: vec![], thinking: None, params }
    }

    /// The model.
    pub fn llm(&self) -> &Llm {
        self.llm
    }

    /// Says `text` and streams the reply.
    ///
    /// # Errors
    ///
    /// As [`Chat::reply`]; the message is then taken back.
    pub fn send(&mut self, text: impl Into<String>) -> Result<ChatStream<'_>> {
        self.messages.push(Message::user(text));
        self.start(true)
    }

    /// Streams a reply to the conversation as it stands, after a tool's answer for example.
    ///
    /// # Errors
    ///
    /// The template does not render these messages, the prompt exceeds the context, or a sampling parameter is out of
    /// range.
    pub fn reply(&mut self) -> Result<ChatStream<'_>> {
        self.start(false)
    }

    /// The text that the model would be given now.
    ///
    /// # Errors
    ///
    /// The template does not render these messages.
    pub fn render(&self) -> Result<String> {
        self.llm.render(&self.messages, &self.tools, self.thinking, true)
    }

    /// Begins a reply; if that fails and the last message was just `sent`, takes it back.
    fn start(&mut self, sent: bool) -> Result<ChatStream<'_>> {
        let prompt = Prompt::chat(self.llm, &self.messages, &self.tools, self.thinking);
        let Self { llm, messages, params, .. } = self;
        let stream = prompt.and_then(|prompt| llm.stream(vec![prompt], params));
        match stream {
            Ok(stream) => Ok(ChatStream { messages, stream: Stream::new(stream) }),
            Err(error) => {
                if sent {
                    messages.pop();
                }
                Err(error)
            }
        }
    }
}

/// A reply in a conversation, piece by piece. When it is dropped, finished or not, what was said becomes the
/// conversation's next message.
pub struct ChatStream<'a> {
    messages: &'a mut Vec<Message>,
    stream: Stream<'a>,
}

impl ChatStream<'_> {
    /// What has been said so far.
    pub fn reply(&self) -> &Reply {
        self.stream.reply()
    }

    /// What it took so far; `None` before the first token.
    pub fn usage(&self) -> Option<Usage> {
        self.stream.usage()
    }

    /// As [`Stream::poll`].
    pub fn poll(&mut self) -> Option<Result<Option<Piece>>> {
        self.stream.poll()
    }
}

impl Iterator for ChatStream<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.stream.next()
    }
}

impl Drop for ChatStream<'_> {
    fn drop(&mut self) {
        let reply = self.stream.reply();
        if *reply != Reply::default() {
            self.messages.push(reply.clone().into_message());
        }
    }
}
