//! A model's text side, without its weights: tokenizer, chat template, defaults of sampling. Conversations and texts
//! become prompts here. It is shared by every thread that talks to one engine.

use models::Checkpoint;
use serde_json::{Map, Value};

use crate::chat_template::{ChatTemplate, RenderOptions};
use crate::engine::Request;
use crate::message::{Message, Tool};
use crate::sampler::SamplingParams;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// What turns messages into tokens and tokens into text.
pub(crate) struct Text {
    pub tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    /// The sampling that `generation_config.json` asks for.
    pub defaults: SamplingParams,
    /// The tokens that it says end a reply.
    pub stop_ids: Vec<u32>,
}

impl Text {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, the chat template and `generation_config.json`.
    ///
    /// # Errors
    ///
    /// There is no tokenizer, or one of the files is not what it should be.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let GenerationConfig { params: defaults, stop_ids } = GenerationConfig::read(checkpoint)?;
        let (tokenizer, template) = (Tokenizer::load(checkpoint)?, ChatTemplate::load(checkpoint)?);
        Ok(Self { tokenizer, template, defaults, stop_ids })
    }

    /// Renders a conversation as the model's template wants it.
    pub fn render(
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

    /// The prompt of a text that is continued as it stands.
    pub fn continuation(&self, text: &str) -> Result<Prompt> {
        Ok(Prompt { tokens: self.tokenizer.encode(text)?, stable_len: 0, tools: None })
    }

    /// The prompt of a conversation. Its stable part is the rendering without the opening of the reply, whose markers
    /// for thinking are gone from the next rendering.
    pub fn conversation(&self, messages: &[Message], tools: &[Tool], thinking: Option<bool>) -> Result<Prompt> {
        let tokens = self.tokenizer.encode_rendered(&self.render(messages, tools, thinking, true)?)?;
        let stable = self.history(messages, tools, thinking)?;
        let stable_len = tokens.iter().zip(&stable).take_while(|(a, b)| a == b).count();
        Ok(Prompt { tokens, stable_len, tools: Some(tools.to_vec()) })
    }

    /// The tokens of a conversation as far as the next prompt is likely to repeat them. None if the template does not
    /// render these messages without the opening of a reply.
    pub fn history(&self, messages: &[Message], tools: &[Tool], thinking: Option<bool>) -> Result<Vec<u32>> {
        match self.render(messages, tools, thinking, false) {
            Ok(text) => self.tokenizer.encode_rendered(&text),
            Err(_) => Ok(vec![]),
        }
    }
}

/// A prompt ready to run.
pub(crate) struct Prompt {
    pub tokens: Vec<u32>,
    /// How many of the tokens the next prompt of the conversation will begin with.
    stable_len: usize,
    /// For a chat, the tools that a reply may call. `None` for a raw completion, whose reply has no parts.
    pub tools: Option<Vec<Tool>>,
}

impl Prompt {
    /// The engine's request for it.
    pub fn request(&self, params: &SamplingParams) -> Request {
        Request { prompt: self.tokens.clone(), stable_len: self.stable_len, params: params.clone() }
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
