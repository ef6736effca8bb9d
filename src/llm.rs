//! A loaded model with its tokenizer and template: text in, text out, as a stream of pieces.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use candle_core::DType;
use models::{Checkpoint, Config};
use serde_json::{Map, Value};

use crate::chat::Chat;
use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::device::{DeviceChoice, default_dtype};
use crate::engine::{Engine, EngineOptions, FinishReason, ModelLimits, Request, Token};
use crate::hub::{self, HubOptions, Progress};
use crate::message::{Message, Tool, ToolCall};
use crate::reply::{Channel, Reply, ReplyFormat, ReplyParser, ReplyPiece};
use crate::sampler::{Logprobs, SamplingParams};
use crate::sequence::{Reuse, SequenceId};
use crate::tokenizer::{DecodeStream, Tokenizer};
use crate::{Error, Result};

/// How to load and run a model. The default takes the Hub's settings from the environment.
#[derive(Clone, Debug)]
pub struct Options {
    pub device: DeviceChoice,
    /// Dtype of activations, keys and values. Default: f32 on the CPU, bf16 elsewhere. Weights stay as they are stored
    /// on the CPU, whatever this says.
    pub dtype: Option<DType>,
    pub engine: EngineOptions,
    /// Where models that are not folders come from.
    pub hub: HubOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self { device: DeviceChoice::Auto, dtype: None, engine: EngineOptions::default(), hub: HubOptions::from_env() }
    }
}

/// A model that generates text.
///
/// ```no_run
/// use taper::{Llm, Options};
///
/// # fn main() -> taper::Result<()> {
/// let mut llm = Llm::load("Qwen/Qwen3-0.6B", &Options::default())?;
/// let mut chat = llm.chat();
/// for piece in chat.send("What is the capital of France?")? {
///     print!("{}", piece?.text);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Llm {
    engine: Engine,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: SamplingParams,
}

impl Llm {
    /// Loads a model by Hub id or folder, fetching what is missing.
    ///
    /// # Errors
    ///
    /// The model cannot be had, is not supported, or is damaged; the device does not exist or has not enough memory.
    pub fn load(model: &str, options: &Options) -> Result<Self> {
        Self::load_with(model, options, &mut ())
    }

    /// As [`Llm::load`], reporting downloads to `progress`.
    ///
    /// # Errors
    ///
    /// As [`Llm::load`].
    pub fn load_with(model: &str, options: &Options, progress: &mut dyn Progress) -> Result<Self> {
        let folder = hub::resolve(model, &options.hub, progress)?;
        Self::open(&Checkpoint::Folder(folder), options)
    }

    /// The demo model that is built in: 4.4 M parameters, a few hundred facts.
    ///
    /// # Errors
    ///
    /// The device does not exist or has not enough memory.
    #[cfg(feature = "demo")]
    pub fn demo(options: &Options) -> Result<Self> {
        Self::open(&Checkpoint::Memory("demo", taper_demo::CHAT), options)
    }

    /// Loads a checkpoint.
    ///
    /// # Errors
    ///
    /// As [`Llm::load`].
    pub fn open(checkpoint: &Checkpoint, options: &Options) -> Result<Self> {
        let config = Config::read(checkpoint)?;
        let tokenizer = Tokenizer::load(checkpoint)?;
        let template = ChatTemplate::load(checkpoint)?;
        let generation = GenerationConfig::read(checkpoint)?;
        let description = config.describe();
        if tokenizer.vocab_size() > description.vocab_size {
            let message =
                format!("{} tokens, the model's embedding has {}", tokenizer.vocab_size(), description.vocab_size);
            return Err(Error::Model { path: checkpoint.path("tokenizer.json"), message });
        }
        let mut stop_ids = description.eos_token_ids;
        stop_ids.extend(tokenizer.eos_ids());
        stop_ids.extend(generation.stop_ids);
        let limits = ModelLimits {
            vocab_size: description.vocab_size,
            sampled_vocab: tokenizer.vocab_size(),
            max_positions: description.max_positions,
            stop_ids,
        };
        let device = options.device.open()?;
        let dtype = options.dtype.unwrap_or_else(|| default_dtype(&device));
        let model = config.load(checkpoint, dtype, &device)?;
        let engine = Engine::new(model, limits, dtype, &device, &options.engine)?;
        Ok(Self { engine, tokenizer, template, defaults: generation.params })
    }

    /// The sampling that the model's `generation_config.json` asks for.
    pub fn defaults(&self) -> &SamplingParams {
        &self.defaults
    }

    /// The engine, for its numbers.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// An empty conversation. The model keeps what it computed for earlier ones.
    pub fn chat(&mut self) -> Chat<'_> {
        Chat::new(self)
    }

    /// Continues a text as it stands, without a template.
    ///
    /// # Errors
    ///
    /// The prompt is empty or too long, or a parameter out of range.
    pub fn generate(&mut self, prompt: &str, params: SamplingParams) -> Result<Stream<'_>> {
        let streams = self.generate_all(&[prompt], &params)?;
        Ok(Stream(streams))
    }

    /// Continues many texts at once. The iterator gives pieces with the index of their prompt, in the order in which
    /// they are generated. A reply does not depend on the others.
    ///
    /// # Errors
    ///
    /// As [`Llm::generate`], for any of the prompts.
    pub fn generate_all(&mut self, prompts: &[&str], params: &SamplingParams) -> Result<Streams<'_>> {
        let requests = prompts
            .iter()
            .map(|text| Ok(Prompt { tokens: self.tokenizer.encode(text)?, stable_len: 0, tools: None }))
            .collect::<Result<Vec<_>>>()?;
        self.stream(requests, params)
    }

    /// Answers many conversations at once, as [`Llm::generate_all`] continues texts.
    ///
    /// # Errors
    ///
    /// As [`Chat::reply`], for any of the conversations.
    pub fn reply_all(&mut self, conversations: &[Vec<Message>], params: &SamplingParams) -> Result<Streams<'_>> {
        let requests =
            conversations.iter().map(|messages| Prompt::chat(self, messages, &[], None)).collect::<Result<Vec<_>>>()?;
        self.stream(requests, params)
    }

    /// Renders a conversation as the model's template wants it.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        tools: &[Tool],
        thinking: Option<bool>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let Some(template) = &self.template else {
            let message = "the model has none, so it continues texts but does not chat: use generate";
            return Err(Error::Template(message.into()));
        };
        let mut variables = Map::new();
        if let Some(thinking) = thinking {
            variables.insert("enable_thinking".into(), Value::Bool(thinking));
        }
        template.render(messages, &RenderOptions { tools, add_generation_prompt, variables })
    }

    pub(crate) fn stream(&mut self, prompts: Vec<Prompt>, params: &SamplingParams) -> Result<Streams<'_>> {
        let mut streams = Streams { llm: self, active: vec![], ready: VecDeque::new() };
        for Prompt { tokens, stable_len, tools } in prompts {
            let tokenizer = &streams.llm.tokenizer;
            let parser = tools.map(|tools| ReplyParser::new(ReplyFormat::of(tokenizer), tokenizer, tools, &tokens));
            let request = Request { prompt: tokens, stable_len, params: params.clone() };
            let id = streams.llm.engine.add(request)?;
            streams.active.push(Generation::new(id, parser));
        }
        Ok(streams)
    }
}

/// A prompt ready to run.
pub(crate) struct Prompt {
    tokens: Vec<u32>,
    /// How many of the tokens the next prompt of the conversation will begin with.
    stable_len: usize,
    /// For a chat, the tools that a reply may call. `None` for a raw completion, whose reply has no parts.
    tools: Option<Vec<Tool>>,
}

impl Prompt {
    /// The prompt of a conversation. Its stable part is the rendering without the opening of the reply, whose markers
    /// for thinking are gone from the next rendering.
    pub fn chat(llm: &Llm, messages: &[Message], tools: &[Tool], thinking: Option<bool>) -> Result<Self> {
        let tokens = llm.tokenizer.encode_rendered(&llm.render(messages, tools, thinking, true)?)?;
        let stable = match llm.render(messages, tools, thinking, false) {
            Ok(text) => llm.tokenizer.encode_rendered(&text)?,
            Err(_) => vec![], // some templates insist on the opening; then nothing is known to be stable
        };
        let stable_len = tokens.iter().zip(&stable).take_while(|(a, b)| a == b).count();
        Ok(Self { tokens, stable_len, tools: Some(tools.to_vec()) })
    }
}

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

/// The pieces of one reply. Dropping it ends the generation.
pub struct Stream<'a>(Streams<'a>);

impl<'a> Stream<'a> {
    pub(crate) fn new(streams: Streams<'a>) -> Self {
        Self(streams)
    }

    /// What has been said so far.
    pub fn reply(&self) -> &Reply {
        &self.0.active[0].reply
    }

    /// What it took so far; `None` before the first token.
    pub fn usage(&self) -> Option<Usage> {
        self.0.active[0].usage()
    }

    /// As `next`, but returns after one step of the engine at most: `Some(Ok(None))` if it gave no piece. A long prompt
    /// takes many steps, between which a caller may want to do something else.
    pub fn poll(&mut self) -> Option<Result<Option<Piece>>> {
        self.0.poll().map(|piece| piece.map(|piece| piece.map(|(_, piece)| piece)))
    }
}

impl Iterator for Stream<'_> {
    type Item = Result<Piece>;

    fn next(&mut self) -> Option<Self::Item> {
        self.0.next().map(|piece| piece.map(|(_, piece)| piece))
    }
}

/// The pieces of many replies. Dropping it ends their generation.
pub struct Streams<'a> {
    llm: &'a mut Llm,
    active: Vec<Generation>,
    ready: VecDeque<Result<(usize, Piece)>>,
}

impl Streams<'_> {
    /// What has been said so far to the prompt at `index`.
    pub fn reply(&self, index: usize) -> &Reply {
        &self.active[index].reply
    }

    /// What the reply at `index` took so far; `None` before its first token.
    pub fn usage(&self, index: usize) -> Option<Usage> {
        self.active[index].usage()
    }
}

impl Streams<'_> {
    /// As `next`, but returns after one step of the engine at most: `Some(Ok(None))` if it gave no piece.
    pub fn poll(&mut self) -> Option<Result<Option<(usize, Piece)>>> {
        if self.ready.is_empty() {
            if self.active.iter().all(|generation| generation.done) {
                return None;
            }
            self.step();
        }
        self.ready.pop_front().map_or(Some(Ok(None)), |piece| Some(piece.map(Some)))
    }

    fn step(&mut self) {
        let outputs = match self.llm.engine.step() {
            Ok(outputs) => outputs,
            Err(error) => {
                self.active.iter_mut().for_each(|generation| generation.done = true);
                return self.ready.push_back(Err(error));
            }
        };
        for output in outputs {
            let Some(index) = self.active.iter().position(|generation| generation.id == output.id) else { continue };
            let generation = &mut self.active[index];
            match output.token {
                Ok(token) => {
                    let pieces = generation.take(token, &self.llm.tokenizer);
                    self.ready.extend(pieces.into_iter().map(|piece| Ok((index, piece))));
                }
                Err(error) => {
                    generation.done = true;
                    self.ready.push_back(Err(error));
                }
            }
        }
    }
}

impl Iterator for Streams<'_> {
    type Item = Result<(usize, Piece)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match self.poll()? {
                Ok(None) => {}
                Ok(Some(piece)) => return Some(Ok(piece)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

impl Drop for Streams<'_> {
    fn drop(&mut self) {
        for generation in self.active.iter().filter(|generation| !generation.done) {
            self.llm.engine.cancel(generation.id);
        }
    }
}

/// One reply in the making.
struct Generation {
    id: SequenceId,
    decode: DecodeStream,
    /// Absent for raw completions, whose text is all content.
    parser: Option<ReplyParser>,
    reply: Reply,
    started: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
    reuse: Option<Reuse>,
    generated: usize,
    done: bool,
}

impl Generation {
    fn new(id: SequenceId, parser: Option<ReplyParser>) -> Self {
        Self {
            id,
            decode: DecodeStream::default(),
            parser,
            reply: Reply::default(),
            started: Instant::now(),
            first_token: None,
            last_token: None,
            reuse: None,
            generated: 0,
            done: false,
        }
    }

    fn usage(&self) -> Option<Usage> {
        let (first, last) = (self.first_token?, self.last_token?);
        Some(Usage {
            reuse: self.reuse?,
            generated_tokens: self.generated,
            time_to_first_token: first - self.started,
            generation_time: last - first,
        })
    }

    fn take(&mut self, token: Token, tokenizer: &Tokenizer) -> Vec<Piece> {
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

/// What `generation_config.json` says.
struct GenerationConfig {
    params: SamplingParams,
    stop_ids: Vec<u32>,
}

impl GenerationConfig {
    fn read(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path("generation_config.json");
        let Some(bytes) = checkpoint.read("generation_config.json")? else {
            return Ok(Self { params: SamplingParams::default(), stop_ids: vec![] });
        };
        let params = SamplingParams::parse_generation_config(&path, &bytes)?;
        let config: Value = serde_json::from_slice(&bytes)
            .map_err(|error| Error::Model { path: path.clone(), message: error.to_string() })?;
        let ids = match &config["eos_token_id"] {
            Value::Null => vec![],
            Value::Array(ids) => ids.clone(),
            id => vec![id.clone()],
        };
        let stop_ids = serde_json::from_value(Value::Array(ids))
            .map_err(|error| Error::Model { path, message: format!("eos_token_id: {error}") })?;
        Ok(Self { params, stop_ids })
    }
}
