//! The model's own chat template: messages in, prompt text out, to the byte what transformers renders.
//!
//! The engine calls it for every turn. Options and globals are those of
//! <https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/utils/chat_template_utils.py>.

mod python;
#[cfg(test)]
mod tests;

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, ErrorKind};
use models::Checkpoint;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::message::{Tool, parse_arguments, text_content};
use crate::tokenizer::{read_tokenizer_config, special_token};
use crate::{Error, Result};

/// A compiled template and what every rendering of it sees.
pub(crate) struct ChatTemplate {
    env: Environment<'static>,
    name: String,
    /// `bos_token`, `eos_token` and the like, as text.
    tokens: Map<String, Value>,
    /// Whether the template reads lists of content parts, or plain strings only.
    reads_parts: bool,
}

/// What a rendering depends on besides the messages.
#[derive(Default)]
pub(crate) struct RenderOptions<'a> {
    /// Tools that the model may call.
    pub tools: &'a [Tool],
    /// End with the opening of the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`.
    pub variables: Map<String, Value>,
}

/// Instructions that one rendering may take, two seconds or so. Templates take some hundreds for each message;
/// Gemma's, which scans all messages for each of them, gets through a conversation of two thousand.
const FUEL: u64 = 50_000_000;

/// Bytes that one rendering may give. Longer prompts exceed every context.
const MAX_OUTPUT: usize = 256 << 20;

impl ChatTemplate {
    /// The template of a model folder: `chat_template.jinja`, else `chat_template` of `tokenizer_config.json` (text,
    /// or a list of named templates of which the one named `default` is taken). None if the model has none.
    ///
    /// # Errors
    /// A file that cannot be read; a template that does not compile, with its file and line.
    pub fn load(checkpoint: &Checkpoint) -> Result<Option<Self>> {
        let config = read_tokenizer_config(checkpoint)?;
        if let Some(source) = checkpoint.read("chat_template.jinja")? {
            let path = checkpoint.path("chat_template.jinja");
            let source = String::from_utf8(source.into_owned())
                .map_err(|error| Error::Model { path: path.clone(), message: error.utf8_error().to_string() })?;
            return Self::from_source(&path.display().to_string(), source, &config).map(Some);
        }
        let name = format!("{}: chat_template", checkpoint.path("tokenizer_config.json").display());
        let source = match &config["chat_template"] {
            Value::String(source) => Some(source),
            Value::Array(named) => named.iter().find_map(|t| match (&t["name"], &t["template"]) {
                (Value::String(name), Value::String(source)) if name == "default" => Some(source),
                _ => None,
            }),
            _ => None,
        };
        source.map(|source| Self::from_source(&name, source.clone(), &config)).transpose()
    }

    /// Compiles `source`. Errors call it `name`; `config` is the content of `tokenizer_config.json`, whose
    /// `*_token` entries the template sees.
    ///
    /// # Errors
    /// A template that does not compile, with `name` and the line.
    pub fn from_source(name: &str, source: String, config: &Value) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        env.set_syntax(syntax.expect("the delimiters are the default ones"));
        env.set_auto_escape_callback(|_| AutoEscape::None);
        env.set_fuel(Some(FUEL));
        python::register(&mut env);
        env.add_template_owned(name.to_string(), source).map_err(|error| template_error(name, &error))?;

        let keys = config.as_object().into_iter().flat_map(Map::keys).filter(|key| key.ends_with("_token"));
        let tokens = keys.filter_map(|key| Some((key.clone(), json!(special_token(config, key)?)))).collect();
        let mut template = Self { env, name: name.to_string(), tokens, reads_parts: true };
        template.reads_parts = template.probe_parts();
        Ok(template)
    }

    /// Renders a conversation of [`Message`](crate::Message)s or of JSON objects of the same shape.
    ///
    /// # Errors
    /// [`Error::Request`] when there are no messages or one is not an object; [`Error::Template`] with the message of a
    /// template that raises, or with file and line of what fails in it, or when it does not end.
    pub fn render(&self, messages: &[impl Serialize], options: &RenderOptions) -> Result<String> {
        if messages.is_empty() {
            return Err(Error::Request("no messages".into()));
        }
        let messages =
            messages.iter().map(|message| normalise(message, self.reads_parts)).collect::<Result<Vec<_>>>()?;
        let mut variables = self.tokens.clone();
        variables.extend(options.variables.clone());
        variables.insert("messages".into(), Value::Array(messages));
        variables.insert("tools".into(), if options.tools.is_empty() { Value::Null } else { json!(options.tools) });
        variables.insert("documents".into(), Value::Null);
        variables.insert("add_generation_prompt".into(), options.add_generation_prompt.into());

        let fail = |error| template_error(&self.name, &error);
        let template = self.env.get_template(&self.name).map_err(fail)?;
        let mut output = Output(Vec::new());
        template.render_captured_to(Serde(&variables), &mut output).map_err(fail)?;
        String::from_utf8(output.0).map_err(|_| Error::Template(format!("{}: output is not UTF-8", self.name)))
    }

    /// Whether a message whose content is one text part renders like the same text as a string.
    fn probe_parts(&self) -> bool {
        let render = |content: Value| {
            let message = json!({ "role": "user", "content": content });
            self.render(&[message], &RenderOptions { add_generation_prompt: true, ..Default::default() })
        };
        match (render(json!("probe")), render(json!([{ "type": "text", "text": "probe" }]))) {
            (Ok(text), Ok(parts)) => text == parts,
            _ => false,
        }
    }
}

/// A message as templates expect it: `content` is there and text where the template reads only text, thinking is
/// `reasoning_content`, and tool-call arguments are mappings.
fn normalise(message: &impl Serialize, reads_parts: bool) -> Result<Value> {
    let mut message = match serde_json::to_value(message) {
        Ok(Value::Object(message)) => message,
        Ok(other) => return Err(Error::Request(format!("message: expected an object, got {other}"))),
        Err(error) => return Err(Error::Request(format!("message: {error}"))),
    };
    let content = message.entry("content").or_insert(Value::Null);
    let text = text_content(content).map_err(Error::Request)?;
    if !(reads_parts && content.is_array()) {
        *content = text.into();
    }
    let thinking = ["reasoning_content", "reasoning", "thinking"].iter().find_map(|name| message.get(*name)?.as_str());
    if let Some(thinking) = thinking.map(Value::from) {
        message.insert("reasoning_content".into(), thinking);
    }
    for call in message.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten() {
        let function = if call["function"].is_object() { &mut call["function"] } else { call };
        // Arguments that are not JSON stay as they are: the template decides.
        if let Some(arguments) = function.get("arguments").and_then(parse_arguments) {
            function["arguments"] = Value::Object(arguments);
        }
    }
    Ok(Value::Object(message))
}

fn template_error(name: &str, error: &minijinja::Error) -> Error {
    let mut source = Some(error as &(dyn std::error::Error + 'static));
    while let Some(error) = source {
        if let Some(raised) = error.downcast_ref::<python::Raised>() {
            return Error::Template(one_line(&raised.to_string()));
        }
        source = error.source();
    }
    let place = error.line().map_or(String::new(), |line| format!(":{line}"));
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("does not end within {FUEL} instructions"),
        (ErrorKind::WriteFailure, _) => format!("gives more than {MAX_OUTPUT} bytes"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    Error::Template(one_line(&format!("{name}{place}: {what}")))
}

fn one_line(text: &str) -> String {
    text.split(['\n', '\r']).map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A buffer that ends: fuel bounds the number of writes, not their size.
struct Output(Vec<u8>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
