//! A conversation: messages in, a streamed reply out, the reply remembered. Any part of it can be taken back, said
//! anew, forked, saved and loaded; the engine's cache makes each of these cheap.

use std::collections::BTreeMap;
use std::path::Path;

use crate::generation::{Piece, Usage};
use crate::llm::{Llm, Stream};
use crate::message::{Message, Role, Tool};
use crate::reply::Reply;
use crate::sampler::SamplingParams;
use crate::session::{self, Session};
use crate::{Error, Result};

/// A conversation with a model.
///
/// Only what is new since the last turn runs: the engine keeps what it computed before, and comes back to it after
/// [`Chat::undo`], [`Chat::regenerate`], [`Chat::edit`] and [`Chat::switch`] as well.
///
/// ```
/// # #[cfg(feature = "demo")]
/// # fn main() -> taper::Result<()> {
/// # let mut llm = taper::Llm::demo(&taper::Options::default())?;
/// let mut chat = llm.chat();
/// chat.send("What is the capital of France?")?.finish()?;
/// chat.fork("spain")?;
/// let reply = chat.edit(0, "What is the capital of Spain?")?.finish()?;
/// assert_eq!(reply.content, "The capital of Spain is Madrid.");
/// chat.switch("main")?;
/// assert_eq!(chat.messages[1].content, "The capital of France is Paris.");
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "demo"))]
/// # fn main() {}
/// ```
pub struct Chat<'a> {
    llm: &'a mut Llm,
    /// What was said on the current branch, in order. Free to edit.
    pub messages: Vec<Message>,
    /// Tools that the model may call.
    pub tools: Vec<Tool>,
    /// Whether to think before answering; `None` leaves it to the model's template.
    pub thinking: Option<bool>,
    /// How replies are sampled; the model's own defaults at first.
    pub params: SamplingParams,
    branch: String,
    /// The other branches.
    branches: BTreeMap<String, Vec<Message>>,
}

/// What [`Chat::load`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Tokens of the current branch that need not run again.
    pub cached_tokens: usize,
    /// Why that is none of them, if the cache in the file is of no use here.
    pub not_cached: Option<String>,
}

impl<'a> Chat<'a> {
    pub(crate) fn new(llm: &'a mut Llm) -> Self {
        let params = llm.defaults().clone();
        let (branch, branches) = ("main".to_string(), BTreeMap::new());
        Self { llm, messages: vec![], tools: vec![], thinking: None, params, branch, branches }
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
        self.start(self.messages.len(), Some(Message::user(text)))
    }

    /// Streams a reply to the conversation as it stands, after a tool's answer for example.
    ///
    /// # Errors
    ///
    /// The template does not render these messages, the prompt exceeds the context, or a sampling parameter is out of
    /// range.
    pub fn reply(&mut self) -> Result<ChatStream<'_>> {
        self.start(self.messages.len(), None)
    }

    /// Takes back the person's last message and everything after it. Returns that message, `None` if there is none.
    pub fn undo(&mut self) -> Option<Message> {
        let index = self.messages.iter().rposition(|message| message.role == Role::User)?;
        self.messages.drain(index..).next()
    }

    /// Streams another reply in place of the last one. A fixed seed or greedy sampling gives the same one again.
    ///
    /// # Errors
    ///
    /// As [`Chat::reply`], and if nothing was said that could be answered; the conversation is then as before.
    pub fn regenerate(&mut self) -> Result<ChatStream<'_>> {
        let answered = |message: &Message| matches!(message.role, Role::User | Role::Tool);
        match self.messages.iter().rposition(answered) {
            Some(index) => self.start(index + 1, None),
            None => Err(Error::Request("nothing was said yet that could be answered".into())),
        }
    }

    /// Says `text` in place of the person's message number `turn`, counted from 0, and streams the reply. What came
    /// after that message is gone once a reply begins.
    ///
    /// # Errors
    ///
    /// As [`Chat::reply`], and if there is no such message; the conversation is then as before.
    pub fn edit(&mut self, turn: usize, text: impl Into<String>) -> Result<ChatStream<'_>> {
        let users = || self.messages.iter().enumerate().filter(|(_, message)| message.role == Role::User);
        match users().nth(turn) {
            Some((index, _)) => self.start(index, Some(Message::user(text))),
            None => Err(Error::Request(format!("no message {}: there are {}", turn + 1, users().count()))),
        }
    }

    /// Goes on under a new name; the branch as it stands stays as it is.
    ///
    /// # Errors
    ///
    /// The name is empty or taken.
    pub fn fork(&mut self, name: &str) -> Result<()> {
        if name.is_empty() {
            return Err(Error::Request("a branch needs a name".into()));
        }
        if name == self.branch || self.branches.contains_key(name) {
            return Err(Error::Request(format!("there is a branch {name} already")));
        }
        let left = std::mem::replace(&mut self.branch, name.to_string());
        self.branches.insert(left, self.messages.clone());
        Ok(())
    }

    /// Goes on with another branch.
    ///
    /// # Errors
    ///
    /// There is no branch of that name.
    pub fn switch(&mut self, name: &str) -> Result<()> {
        if name == self.branch {
            return Ok(());
        }
        let Some(messages) = self.branches.remove(name) else {
            return Err(Error::Request(format!("no branch {name}: there are {}", self.branches().join(", "))));
        };
        let left = (std::mem::replace(&mut self.branch, name.into()), std::mem::replace(&mut self.messages, messages));
        self.branches.extend([left]);
        Ok(())
    }

    /// The name of the current branch, `main` at first.
    pub fn branch(&self) -> &str {
        &self.branch
    }

    /// The names of all branches, in alphabetical order.
    pub fn branches(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.branches.keys().map(String::as_str).chain([&*self.branch]).collect();
        names.sort_unstable();
        names
    }

    /// Writes the conversation to a file: every branch, the settings, and what the cache holds of them. A saved
    /// conversation that is there is replaced; the file appears whole or not at all.
    ///
    /// # Errors
    ///
    /// The file cannot be written, or something else is there under that name.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut branches = self.branches.clone();
        branches.insert(self.branch.clone(), self.messages.clone());
        let current_first = [&self.messages].into_iter().chain(self.branches.values());
        let histories = current_first.map(|messages| self.llm.text().history(messages, &self.tools, self.thinking));
        let snapshot = self.llm.engine().snapshot(&histories.collect::<Result<Vec<_>>>()?)?;
        let session = Session {
            origin: self.llm.origin().clone(),
            branch: self.branch.clone(),
            branches,
            tools: self.tools.clone(),
            thinking: self.thinking,
            params: self.params.clone(),
        };
        session::save(path.as_ref(), session, snapshot)
    }

    /// Goes on with a conversation that [`Chat::save`] wrote, in place of this one. With the same model its history
    /// does not run again; another model reads it anew.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or is not what was written; this conversation then stays.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<Loaded> {
        let path = path.as_ref();
        let fail = |message: String| Error::Session { path: path.into(), message };
        let (mut session, snapshot) = session::load(path)?;
        session.params.validate().map_err(|error| fail(error.to_string()))?;
        let Some(messages) = session.branches.remove(&session.branch) else {
            return Err(fail(format!("there is no branch {}", session.branch)));
        };
        let mut not_cached = session.origin.differs_from(self.llm.origin());
        let mut cached_tokens = 0;
        if not_cached.is_none() {
            match self.llm.engine_mut().restore(&snapshot) {
                Ok(tokens) => cached_tokens = tokens.first().copied().unwrap_or(0),
                Err(error) => not_cached = Some(error.to_string()),
            }
        }
        let Session { branch, branches, tools, thinking, params, .. } = session;
        (self.branch, self.branches, self.messages) = (branch, branches, messages);
        (self.tools, self.thinking, self.params) = (tools, thinking, params);
        Ok(Loaded { cached_tokens, not_cached })
    }

    /// The text that the model would be given now.
    ///
    /// # Errors
    ///
    /// The template does not render these messages.
    pub fn render(&self) -> Result<String> {
        self.llm.text().render(&self.messages, &self.tools, self.thinking, true)
    }

    /// Begins a reply to the first `keep` messages and `message`. If that fails, the messages are as before.
    fn start(&mut self, keep: usize, message: Option<Message>) -> Result<ChatStream<'_>> {
        let replaced = self.messages.split_off(keep);
        self.messages.extend(message);
        let prompt = self.llm.text().conversation(&self.messages, &self.tools, self.thinking);
        let Self { llm, messages, params, .. } = self;
        match prompt.and_then(|prompt| llm.stream(&[prompt], params)) {
            Ok(stream) => Ok(ChatStream { messages, stream: Stream::new(stream), keep, replaced }),
            Err(error) => {
                messages.truncate(keep);
                messages.extend(replaced);
                Err(error)
            }
        }
    }
}

/// A reply in a conversation, piece by piece. When it is dropped, finished or not, what was said becomes the
/// conversation's next message; if nothing was said, messages that were to be replaced stay.
pub struct ChatStream<'a> {
    messages: &'a mut Vec<Message>,
    stream: Stream<'a>,
    /// Where the messages stood that this reply replaces.
    keep: usize,
    replaced: Vec<Message>,
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

    /// Waits for the whole reply.
    ///
    /// # Errors
    ///
    /// The computation failed.
    pub fn finish(mut self) -> Result<Reply> {
        for piece in &mut self {
            piece?;
        }
        Ok(self.reply().clone())
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
        } else if !self.replaced.is_empty() {
            self.messages.truncate(self.keep);
            self.messages.append(&mut self.replaced);
        }
    }
}
