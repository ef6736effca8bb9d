//! A loaded model with its tokenizer and template: text in, text out, as a stream of pieces.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::DType;
use models::{Checkpoint, Config, PackCache, Packing, Quantization};

use crate::chat::Chat;
use crate::device::{DeviceChoice, default_dtype, kv_dtype};
use crate::engine::{Engine, EngineOptions, ModelLimits};
use crate::generation::{Generation, Piece, Usage};
use crate::hub::{self, HubOptions, Progress};
use crate::message::Message;
use crate::reply::Reply;
use crate::sampler::SamplingParams;
use crate::sequence::SequenceId;
use crate::service::{Service, ServiceOptions};
use crate::session::Origin;
use crate::text::{Prompt, Text};
use crate::{Error, Result};

/// How to load and run a model. The default takes the Hub's settings from the environment.
#[derive(Clone, Debug)]
pub struct Options {
    pub device: DeviceChoice,
    /// Dtype of activations, keys and values. Default: f32 on the CPU, bf16 elsewhere. Weights stay as they are stored
    /// on the CPU, whatever this says, and beside packed weights keys and values have 16 bits there instead of 32.
    pub dtype: Option<DType>,
    /// Packs the matrices of linear layers and embeddings while they are read. Default: they stay as they are stored.
    pub quantization: Option<Quantization>,
    /// Where packed matrices are kept for the next start. Default: [`PackCache::from_env`]; `None` keeps nothing.
    pub pack_cache: Option<PackCache>,
    pub engine: EngineOptions,
    /// Where models that are not folders come from.
    pub hub: HubOptions,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            dtype: None,
            quantization: None,
            pack_cache: Some(PackCache::from_env()),
            engine: EngineOptions::default(),
            hub: HubOptions::from_env(),
        }
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
    text: Arc<Text>,
    origin: Origin,
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
        let mut llm = Self::open(&Checkpoint::Folder(folder), options)?;
        llm.origin.model = model.to_string();
        Ok(llm)
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
        let text = Text::load(checkpoint)?;
        let description = config.describe();
        let sampled_vocab = text.tokenizer.vocab_size();
        if sampled_vocab > description.vocab_size {
            let message = format!("{sampled_vocab} tokens, the model's embedding has {}", description.vocab_size);
            return Err(Error::Model { path: checkpoint.path("tokenizer.json"), message });
        }
        let mut stop_ids = description.eos_token_ids;
        stop_ids.extend(text.tokenizer.eos_ids());
        stop_ids.extend(&text.stop_ids);
        let limits = ModelLimits {
            vocab_size: description.vocab_size,
            sampled_vocab,
            max_positions: description.max_positions,
            stop_ids,
        };
        let device = options.device.open()?;
        let dtype = options.dtype.unwrap_or_else(|| default_dtype(&device));
        let packing = Packing { quantization: options.quantization, cache: options.pack_cache.clone() };
        let model = config.load_quantized(checkpoint, dtype, &device, packing)?;
        let kv_dtype = kv_dtype(&device, dtype, options.quantization);
        let engine = Engine::new(model, limits, kv_dtype, &device, &options.engine)?;
        let origin = Origin::new(checkpoint, dtype, options.quantization, &device)?;
        Ok(Self { engine, text: Arc::new(text), origin })
    }

    /// The sampling that the model's `generation_config.json` asks for.
    pub fn defaults(&self) -> &SamplingParams {
        &self.text.defaults
    }

    /// The engine, for its numbers.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub(crate) fn engine_mut(&mut self) -> &mut Engine {
        &mut self.engine
    }

    pub(crate) fn text(&self) -> &Text {
        &self.text
    }

    pub(crate) fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Moves the model to a thread of its own, which serves requests from any number of others.
    pub fn serve(self, options: &ServiceOptions) -> Service {
        Service::new(self.engine, self.text, options)
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
        let prompts = prompts.iter().map(|text| self.text.continuation(text)).collect::<Result<Vec<_>>>()?;
        self.stream(&prompts, params)
    }

    /// Answers many conversations at once, as [`Llm::generate_all`] continues texts.
    ///
    /// # Errors
    ///
    /// As [`Chat::reply`], for any of the conversations.
    pub fn reply_all(&mut self, conversations: &[Vec<Message>], params: &SamplingParams) -> Result<Streams<'_>> {
        let prompt = |messages: &Vec<Message>| self.text.conversation(messages, &[], None);
        let prompts = conversations.iter().map(prompt).collect::<Result<Vec<_>>>()?;
        self.stream(&prompts, params)
    }

    pub(crate) fn stream(&mut self, prompts: &[Prompt], params: &SamplingParams) -> Result<Streams<'_>> {
        let mut streams = Streams { llm: self, active: vec![], ready: VecDeque::new() };
        for prompt in prompts {
            let generation = Generation::new(&streams.llm.text, prompt);
            let id = streams.llm.engine.add(prompt.request(params))?;
            streams.active.push((id, generation));
        }
        Ok(streams)
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
        &self.0.active[0].1.reply
    }

    /// What it took so far; `None` before the first token.
    pub fn usage(&self) -> Option<Usage> {
        self.0.active[0].1.usage()
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
    active: Vec<(SequenceId, Generation)>,
    ready: VecDeque<Result<(usize, Piece)>>,
}

impl Streams<'_> {
    /// What has been said so far to the prompt at `index`.
    pub fn reply(&self, index: usize) -> &Reply {
        &self.active[index].1.reply
    }

    /// What the reply at `index` took so far; `None` before its first token.
    pub fn usage(&self, index: usize) -> Option<Usage> {
        self.active[index].1.usage()
    }
}

impl Streams<'_> {
    /// As `next`, but returns after one step of the engine at most: `Some(Ok(None))` if it gave no piece.
    pub fn poll(&mut self) -> Option<Result<Option<(usize, Piece)>>> {
        if self.ready.is_empty() {
            if self.active.iter().all(|(_, generation)| generation.done) {
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
                self.active.iter_mut().for_each(|(_, generation)| generation.done = true);
                return self.ready.push_back(Err(error));
            }
        };
        for output in outputs {
            let Some(index) = self.active.iter().position(|(id, _)| *id == output.id) else { continue };
            let (_, generation) = &mut self.active[index];
            match output.token {
                Ok(token) => {
                    let pieces = generation.take(token, &self.llm.text.tokenizer);
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
        for (id, _) in self.active.iter().filter(|(_, generation)| !generation.done) {
            self.llm.engine.cancel(*id);
        }
    }
}
