//! Text to token ids and back, for whole texts and for ids that come one at a time.
//!
//! The engine encodes prompts and decodes replies with it, the embedder encodes texts. `tokenizer.json` is read by
//! the `tokenizers` crate; `tokenizer_config.json` names the tokens that begin and end a text.

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::Path;

use models::Checkpoint;
use serde_json::Value;
use tokenizers::{Decoder, DecoderWrapper};

use crate::{Error, Result};

/// A model's tokenizer.
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
    special: HashSet<u32>,
    bytes: TokenBytes,
    bos: Option<u32>,
    eos_ids: Vec<u32>,
}

/// How a token stands for bytes, which need not be whole characters.
enum TokenBytes {
    /// Each character of the token is one byte (GPT-2's byte-level BPE).
    ByteLevel(HashMap<char, u8>),
    /// `<0x0A>` is a byte; other tokens are text, which the decoder turns into its final form one by one.
    Text,
}

impl Tokenizer {
    /// Reads `tokenizer.json` and, if it is there, `tokenizer_config.json`.
    ///
    /// # Errors
    /// A file that is missing, cannot be read or is not a tokenizer.
    pub fn load(checkpoint: &Checkpoint) -> Result<Self> {
        let path = checkpoint.path("tokenizer.json");
        let Some(json) = checkpoint.read("tokenizer.json")? else {
            return Err(Error::Model { path, message: "no such file".into() });
        };
        Self::from_bytes(&path, &json, &read_tokenizer_config(checkpoint)?)
    }

    /// Makes a tokenizer of the contents of both files. Errors name `path`.
    ///
    /// # Errors
    /// `json` is not a tokenizer; `config` names a token that the tokenizer lacks.
    pub fn from_bytes(path: &Path, json: &[u8], config: &Value) -> Result<Self> {
        let fail = |message: String| Error::Model { path: path.to_path_buf(), message };
        let mut inner = tokenizers::Tokenizer::from_bytes(json)
            .map_err(|error| fail(format!("expected a tokenizer, got {} bytes: {error}", json.len())))?;
        // Some files carry the lengths that the model was trained with; how long a text may be is not decided here.
        inner.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        inner.with_padding(None);

        let id_of = |key: &str| match special_token(config, key) {
            None => Ok(None),
            Some(token) => match inner.token_to_id(token) {
                Some(id) => Ok(Some(id)),
                None => Err(fail(format!("expected the {key} {token:?} of tokenizer_config.json, got no such token"))),
            },
        };
        let (bos, eos_ids) = (id_of("bos_token")?, id_of("eos_token")?.into_iter().collect());
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let added = inner.get_added_tokens_decoder();
        let special = added.into_iter().filter(|(_, token)| token.special).map(|(id, _)| id).collect();
        let bytes = match inner.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => TokenBytes::ByteLevel(byte_level_alphabet()),
            _ => TokenBytes::Text,
        };
        Ok(Self { inner, vocab_size, special, bytes, bos, eos_ids })
    }

    /// The ids of a text to continue, with the special tokens that the tokenizer puts around one, and never a second
    /// BOS when the text begins with one.
    ///
    /// # Errors
    /// Text with characters that the vocabulary has no token for, not even an unknown one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let mut ids = self.encode_whole(text)?;
        if let Some(bos) = self.bos
            && ids.starts_with(&[bos, bos])
        {
            ids.remove(0);
        }
        Ok(ids)
    }

    /// The ids of a text to embed, with the special tokens that the tokenizer puts around one, whatever it begins with:
    /// what stands in a text is none of ours, and transformers gives the same.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, true)
    }

    /// The ids of a rendered chat template, which writes all special tokens itself.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>> {
        self.ids(text, false)
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding = self.inner.encode_fast(text, add_special_tokens);
        Ok(encoding.map_err(|error| Error::Request(format!("tokenizer: {error}")))?.get_ids().to_vec())
    }

    /// The text of `ids` without special tokens.
    #[cfg(test)]
    fn decode(&self, ids: &[u32]) -> Result<String> {
        self.inner.decode(ids, true).map_err(|error| Error::Request(format!("tokenizer: {error}")))
    }

    /// The largest id plus one: the rows that an embedding must have at least.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The id of a token given as written, such as `<think>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The tokens that end a turn by `tokenizer_config.json`; the model's configs may name more.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    fn token_bytes(&self, id: u32) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id).filter(|_| !self.special.contains(&id)) else {
            return Vec::new();
        };
        match &self.bytes {
            TokenBytes::ByteLevel(alphabet) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| alphabet.get(&c).copied()).collect();
                // Added tokens are written as themselves, with spaces and all.
                bytes.unwrap_or_else(|| token.into_bytes())
            }
            TokenBytes::Text => {
                let byte = token.strip_prefix("<0x").and_then(|hex| hex.strip_suffix('>'));
                match byte.filter(|hex| hex.len() == 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
                    Some(byte) => vec![byte],
                    None => match self.inner.get_decoder() {
                        Some(decoder) => decoder.decode(vec![token.clone()]).unwrap_or(token).into_bytes(),
                        None => token.into_bytes(),
                    },
                }
            }
        }
    }
}

/// Turns ids into text one at a time. What it gives is always whole characters: bytes of a character that is not
/// complete wait, three at most; bytes that no character begins with become U+FFFD.
#[derive(Debug, Clone, Default)]
pub(crate) struct DecodeStream {
    pending: Vec<u8>,
}

impl DecodeStream {
    /// The text that `id` completes, often empty.
    pub fn step(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.pending.extend(tokenizer.token_bytes(id));
        let (mut text, mut incomplete) = (String::new(), Vec::new());
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text += chunk.valid();
            let rest = chunk.invalid();
            let is_cut = str::from_utf8(rest).is_err_and(|error| error.error_len().is_none());
            if is_cut && chunks.peek().is_none() {
                incomplete = rest.to_vec();
            } else if !rest.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending = incomplete;
        text
    }

    /// What is left when no more ids come: U+FFFD for a character that was never completed.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

/// `tokenizer_config.json` of a model folder, `null` if there is none.
///
/// # Errors
/// A file that cannot be read or is not JSON.
pub(crate) fn read_tokenizer_config(checkpoint: &Checkpoint) -> Result<Value> {
    match checkpoint.read("tokenizer_config.json")? {
        Some(json) => serde_json::from_slice(&json).map_err(|error| Error::Model {
            path: checkpoint.path("tokenizer_config.json"),
            message: error.to_string(),
        }),
        None => Ok(Value::Null),
    }
}

/// The text of a token that `tokenizer_config.json` names, written as a string or as `{"content": ..}`.
pub(crate) fn special_token<'a>(config: &'a Value, key: &str) -> Option<&'a str> {
    config[key].as_str().or_else(|| config[key]["content"].as_str())
}

/// The character that byte-level BPE writes for each byte: itself when it is printable, else the next one from U+0100.
///
/// Source: <https://github.com/openai/gpt-2/blob/9b63575ef42771a015060c964af2c3da4cf7c8ab/src/encoder.py>, `bytes_to_unicode`.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut shifted = (0x100..).filter_map(char::from_u32);
    let is_printable = |byte| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut character = |byte| if is_printable(byte) { Some(char::from(byte)) } else { shifted.next() };
    (0..=u8::MAX).filter_map(|byte| Some((character(byte)?, byte))).collect()
}
