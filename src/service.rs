//! A model on a thread of its own, serving requests from any number of others.
//!
//! One thread owns the engine and does nothing but steps. Texts become tokens on the thread that asks, and tokens
//! become text on the thread that reads; between them stands a queue per request. A reply can be read as a blocking
//! iterator or, in any async runtime, as a [`futures_core::Stream`].

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread;

use crate::engine::{Engine, Request, Stats, Token};
use crate::generation::{Generation, Piece, Usage};
use crate::message::{Message, Tool};
use crate::reply::Reply;
use crate::sampler::SamplingParams;
use crate::sequence::SequenceId;
use crate::text::{Prompt, Text};
use crate::{Error, Result};

/// How much a service takes on.
#[derive(Clone, Debug)]
pub struct ServiceOptions {
    /// Requests that may wait or run at the same time; one more is refused. Default 4096.
    pub max_requests: usize,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self { max_requests: 4096 }
    }
}

/// A model that serves many threads or tasks at once. Share it behind an [`Arc`]; made by [`Llm::serve`].
///
/// Requests run together, each with the reply that it would have alone. The memory of what waits is bounded: a service
/// takes `max_requests`, and an unread reply holds at most its `max_tokens` tokens.
///
/// ```
/// # #[cfg(feature = "demo")]
/// # fn main() -> taper::Result<()> {
/// use taper::{Llm, Message, Options, ServiceOptions};
///
/// let service = Llm::demo(&Options::default())?.serve(&ServiceOptions::default());
/// let params = service.defaults().clone();
/// let replies: Vec<_> = ["France", "Spain"]
///     .map(|country| Message::user(format!("What is the capital of {country}?")))
///     .into_iter()
///     .map(|message| service.reply(&[message], &[], None, &params))
///     .collect::<taper::Result<_>>()?;
/// for reply in replies {
///     println!("{}", reply.finish()?.content);
/// }
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "demo"))]
/// # fn main() {}
/// ```
///
/// [`Llm::serve`]: crate::Llm::serve
pub struct Service {
    commands: Sender<Command>,
    text: Arc<Text>,
    max_requests: usize,
    requests: Arc<AtomicUsize>,
    next_key: AtomicU64,
    stats: Arc<Mutex<Stats>>,
}

impl Service {
    pub(crate) fn new(engine: Engine, text: Arc<Text>, options: &ServiceOptions) -> Self {
        let (commands, receiver) = mpsc::channel();
        let stats = Arc::new(Mutex::new(engine.stats()));
        let driver = Driver { engine, sinks: HashMap::new(), ids: HashMap::new(), stats: Arc::clone(&stats) };
        thread::Builder::new()
            .name("taper engine".into())
            .spawn(move || driver.run(&receiver))
            .expect("the system has a thread to spare");
        Self {
            commands,
            text,
            max_requests: options.max_requests,
            requests: Arc::default(),
            next_key: AtomicU64::new(0),
            stats,
        }
    }

    /// The sampling that the model's `generation_config.json` asks for.
    pub fn defaults(&self) -> &SamplingParams {
        &self.text.defaults
    }

    /// Continues a text as it stands, without a template.
    ///
    /// # Errors
    ///
    /// [`Error::Busy`] if the service has enough to do. What is wrong with the request itself, a prompt beyond the
    /// context for example, is the stream's first item.
    pub fn generate(&self, prompt: &str, params: &SamplingParams) -> Result<ReplyStream> {
        self.submit(&self.text.continuation(prompt)?, params)
    }

    /// Replies to a conversation. `thinking` of `None` leaves it to the model's template.
    ///
    /// # Errors
    ///
    /// As [`Service::generate`], and if the template does not render these messages.
    pub fn reply(
        &self,
        messages: &[Message],
        tools: &[Tool],
        thinking: Option<bool>,
        params: &SamplingParams,
    ) -> Result<ReplyStream> {
        self.submit(&self.text.conversation(messages, tools, thinking)?, params)
    }

    /// What the engine held and did after its last step.
    pub fn stats(&self) -> Stats {
        *lock(&self.stats)
    }

    fn submit(&self, prompt: &Prompt, params: &SamplingParams) -> Result<ReplyStream> {
        let more = |count| (count < self.max_requests).then_some(count + 1);
        if let Err(waiting) = self.requests.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            return Err(Error::Busy { waiting });
        }
        let queue = Arc::<Queue>::default();
        let sink = Sink { queue: QueueEnd(Arc::clone(&queue)), seat: Seat(Arc::clone(&self.requests)) };
        let key = self.next_key.fetch_add(1, Ordering::Relaxed);
        let generation = Generation::new(&self.text, prompt);
        // Should the engine's thread be gone, the sink is dropped with the command and the reader learns of it.
        let _ = self.commands.send(Command::Add { key, request: prompt.request(params), sink });
        let (commands, text) = (self.commands.clone(), Arc::clone(&self.text));
        Ok(ReplyStream { key, commands, queue, generation, text, ready: VecDeque::new(), failed: false })
    }
}

/// The pieces of one reply: a blocking iterator, and an async stream. Dropping it ends the generation.
pub struct ReplyStream {
    key: u64,
    commands: Sender<Command>,
    queue: Arc<Queue>,
    generation: Generation,
    text: Arc<Text>,
    ready: VecDeque<Piece>,
    failed: bool,
}

impl ReplyStream {
    /// What has been read so far.
    pub fn reply(&self) -> &Reply {
        &self.generation.reply
    }

    /// What it took so far; `None` before the first token.
    pub fn usage(&self) -> Option<Usage> {
        self.generation.usage()
    }

    /// Waits for the whole reply.
    ///
    /// # Errors
    ///
    /// The request was not valid, or the computation failed.
    pub fn finish(mut self) -> Result<Reply> {
        for piece in &mut self {
            piece?;
        }
        Ok(self.reply().clone())
    }

    fn is_done(&self) -> bool {
        self.ready.is_empty() && (self.generation.done || self.failed)
    }

    /// Turns a token into pieces; `Some` if it was an error.
    fn accept(&mut self, token: Result<Token>) -> Option<Error> {
        match token {
            Ok(token) => {
                self.ready.extend(self.generation.take(token, &self.text.tokenizer));
                None
            }
            Err(error) => {
                self.failed = true;
                Some(error)
            }
        }
    }
}

impl Iterator for ReplyStream {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.is_done() {
                return None;
            }
            if let Some(piece) = self.ready.pop_front() {
                return Some(Ok(piece));
            }
            let token = self.queue.wait();
            if let Some(error) = self.accept(token) {
                return Some(Err(error));
            }
        }
    }
}

impl futures_core::Stream for ReplyStream {
    type Item = Result<Piece>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.is_done() {
                return Poll::Ready(None);
            }
            if let Some(piece) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(piece)));
            }
            let Poll::Ready(token) = self.queue.poll(context.waker()) else { return Poll::Pending };
            if let Some(error) = self.accept(token) {
                return Poll::Ready(Some(Err(error)));
            }
        }
    }
}

impl Drop for ReplyStream {
    fn drop(&mut self) {
        if !self.generation.done && !self.failed {
            let _ = self.commands.send(Command::Cancel { key: self.key }); // nobody to tell if the thread is gone
        }
    }
}

enum Command {
    Add { key: u64, request: Request, sink: Sink },
    Cancel { key: u64 },
}

/// The engine's thread. It ends when nobody can send requests any more and none is left.
struct Driver {
    engine: Engine,
    sinks: HashMap<SequenceId, (u64, Sink)>,
    ids: HashMap<u64, SequenceId>,
    stats: Arc<Mutex<Stats>>,
}

impl Driver {
    fn run(mut self, commands: &Receiver<Command>) {
        loop {
            if self.engine.is_idle() {
                match commands.recv() {
                    Ok(command) => self.obey(command),
                    Err(_) => return,
                }
            }
            while let Ok(command) = commands.try_recv() {
                self.obey(command);
            }
            self.step();
            *lock(&self.stats) = self.engine.stats();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Add { key, request, sink } => match self.engine.add(request) {
                Ok(id) => {
                    self.ids.insert(key, id);
                    self.sinks.insert(id, (key, sink));
                }
                Err(error) => sink.end(Err(error)),
            },
            Command::Cancel { key } => {
                if let Some(id) = self.ids.remove(&key) {
                    self.engine.cancel(id);
                    self.sinks.remove(&id);
                }
            }
        }
    }

    fn step(&mut self) {
        match self.engine.step() {
            Ok(outputs) => {
                for output in outputs {
                    let ended = output.token.as_ref().map_or(true, |token| token.finish.is_some());
                    if ended {
                        self.end(output.id, output.token);
                    } else if let Some((_, sink)) = self.sinks.get(&output.id) {
                        sink.queue.0.push(output.token);
                    }
                }
            }
            Err(error) => {
                let lost: Vec<SequenceId> =
                    self.sinks.keys().filter(|id| !self.engine.is_active(**id)).copied().collect();
                for id in lost {
                    self.end(id, Err(Error::Compute(candle_core::Error::Msg(error.to_string()))));
                }
            }
        }
    }

    fn end(&mut self, id: SequenceId, token: Result<Token>) {
        if let Some((key, sink)) = self.sinks.remove(&id) {
            self.ids.remove(&key);
            sink.end(token);
        }
    }
}

/// The engine's end of a request.
struct Sink {
    queue: QueueEnd,
    seat: Seat,
}

impl Sink {
    /// Gives the last token. By the time that it is read, the request no longer counts.
    fn end(self, token: Result<Token>) {
        drop(self.seat);
        self.queue.0.push(token);
    }
}

/// One of the requests that a service takes, until it is dropped.
struct Seat(Arc<AtomicUsize>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Where tokens go in. When it is dropped, the queue ends.
struct QueueEnd(Arc<Queue>);

impl Drop for QueueEnd {
    fn drop(&mut self) {
        self.0.change(|state| state.closed = true);
    }
}

/// Tokens on their way from the engine to the reader.
#[derive(Default)]
struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
}

#[derive(Default)]
struct QueueState {
    tokens: VecDeque<Result<Token>>,
    closed: bool,
    waker: Option<Waker>,
}

impl Queue {
    fn push(&self, token: Result<Token>) {
        self.change(|state| state.tokens.push_back(token));
    }

    fn change(&self, change: impl FnOnce(&mut QueueState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        let waker = state.waker.take();
        drop(state);
        self.changed.notify_one();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// The next token, when there is one.
    fn wait(&self) -> Result<Token> {
        let mut state = lock(&self.state);
        loop {
            if let Some(token) = state.next() {
                return token;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The next token if there is one; else `waker` is woken when there may be.
    fn poll(&self, waker: &Waker) -> Poll<Result<Token>> {
        let mut state = lock(&self.state);
        match state.next() {
            Some(token) => Poll::Ready(token),
            None => {
                state.waker = Some(waker.clone());
                Poll::Pending
            }
        }
    }
}

impl QueueState {
    fn next(&mut self) -> Option<Result<Token>> {
        let ended = || Err(Error::Request("the engine's thread ended before the reply".into()));
        self.tokens.pop_front().or_else(|| self.closed.then(ended))
    }
}

/// A lock whatever a thread that panicked with it left behind: each change here is whole in itself.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
