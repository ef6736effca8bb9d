//! A loaded encoder with its tokenizer: texts in, embeddings out.
//!
//! Texts are sorted by length and packed, without padding, to batches of a bounded number of tokens; results come back
//! in the order of the texts. On the CPU a text's result is the same to the bit whatever shares its batch.

use std::ops::Range;

use candle_core::{DType, Device};
use kernels::Batch;
use kernels::device::Download;
use models::{Checkpoint, Config, Encoder, EncoderTraits, Heads, PackCache, Packing, Quantization};
use rayon::prelude::*;
use serde_json::Value;

use crate::device::{DeviceChoice, default_dtype};
use crate::embedding::{Embedding, Vectors, normalize};
use crate::hub::{self, HubOptions, Progress};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// How to load and run an encoder. The default takes the Hub's settings from the environment.
#[derive(Clone, Debug)]
pub struct EmbedderOptions {
    pub device: DeviceChoice,
    /// Dtype of activations. Default: f32 on the CPU, bf16 elsewhere.
    pub dtype: Option<DType>,
    /// Pack the weights while loading; the sparse and ColBERT heads stay as they are.
    pub quantization: Option<Quantization>,
    /// Where packed weights are kept for the next start. Default: [`PackCache::from_env`]; `None` keeps nothing.
    pub pack_cache: Option<PackCache>,
    /// Where models that are not folders come from.
    pub hub: HubOptions,
    /// Default: every head that the model has.
    pub heads: Option<Heads>,
    /// Longest text in tokens, special ones included, if less than the model allows. The rest is cut off and counted
    /// in [`Embedding::truncated`].
    pub max_tokens: Option<usize>,
    /// Tokens of a batch. A longer text has a batch of its own. Default: 4096 on the CPU, 16384 elsewhere.
    pub batch_tokens: Option<usize>,
    /// Keep this many leading dimensions of a dense vector.
    pub dimensions: Option<usize>,
    /// Whether dense vectors are scaled to length one. Those of ColBERT always are.
    pub normalize: bool,
}

impl Default for EmbedderOptions {
    fn default() -> Self {
        Self {
            device: DeviceChoice::Auto,
            dtype: None,
            quantization: None,
            pack_cache: Some(PackCache::from_env()),
            hub: HubOptions::from_env(),
            heads: None,
            max_tokens: None,
            batch_tokens: None,
            dimensions: None,
            normalize: true,
        }
    }
}

/// A model that embeds texts.
///
/// ```no_run
/// use taper::{Embedder, EmbedderOptions, embedding};
///
/// # fn main() -> taper::Result<()> {
/// let embedder = Embedder::load("BAAI/bge-m3", &EmbedderOptions::default())?;
/// let passages = embedder.embed(&["Paris is the capital of France.", "The euro is a currency."])?;
/// let query = &embedder.embed_queries(&["What is the capital of France?"])?[0];
/// let scores = passages.iter().map(|passage| embedding::score(query, passage, Default::default()).hybrid);
/// assert_eq!(embedding::top_k(scores, 1)[0].0, 0);
/// # Ok(())
/// # }
/// ```
pub struct Embedder {
    model: Box<dyn Encoder>,
    traits: EncoderTraits,
    tokenizer: Tokenizer,
    /// A token to append where the tokenizer does not.
    end_id: Option<u32>,
    prompts: Vec<(String, String)>,
    options: EmbedderOptions,
    heads: Heads,
    max_tokens: usize,
    device: Device,
}

impl Embedder {
    /// Loads a model by Hub id or folder, fetching what is missing.
    ///
    /// # Errors
    ///
    /// The model cannot be had, is not an encoder that is supported, or is damaged; the device does not exist or has
    /// not enough memory; or the model does not have what the options ask for.
    pub fn load(model: &str, options: &EmbedderOptions) -> Result<Self> {
        Self::load_with(model, options, &mut ())
    }

    /// As [`Embedder::load`], reporting downloads to `progress`.
    ///
    /// # Errors
    ///
    /// As [`Embedder::load`].
    pub fn load_with(model: &str, options: &EmbedderOptions, progress: &mut dyn Progress) -> Result<Self> {
        let folder = hub::resolve(model, &options.hub, progress)?;
        Self::open(&Checkpoint::Folder(folder), options)
    }

    /// The demo encoder that is built in: 1.1 M parameters, all three heads.
    ///
    /// # Errors
    ///
    /// As [`Embedder::open`].
    #[cfg(feature = "demo")]
    pub fn demo(options: &EmbedderOptions) -> Result<Self> {
        Self::open(&Checkpoint::Memory("demo", taper_demo::EMBED), options)
    }

    /// Loads a checkpoint.
    ///
    /// # Errors
    ///
    /// As [`Embedder::load`].
    pub fn open(checkpoint: &Checkpoint, options: &EmbedderOptions) -> Result<Self> {
        Self::open_on(checkpoint, options, options.device.open()?)
    }

    pub(crate) fn open_on(checkpoint: &Checkpoint, options: &EmbedderOptions, device: Device) -> Result<Self> {
        let config = Config::read(checkpoint)?;
        let tokenizer = Tokenizer::load(checkpoint)?;
        let dtype = options.dtype.unwrap_or_else(|| default_dtype(&device));
        let packing = Packing { quantization: options.quantization, cache: options.pack_cache.clone() };
        let model = config.load_encoder_quantized(checkpoint, dtype, &device, packing)?;
        let traits = model.traits();
        if tokenizer.vocab_size() > traits.vocab_size {
            let message = format!("{} tokens, the model's embedding has {}", tokenizer.vocab_size(), traits.vocab_size);
            return Err(Error::Model { path: checkpoint.path("tokenizer.json"), message });
        }
        let end_id = match traits.end_token {
            Some(end) if tokenizer.encode_whole("")?.last().copied() != tokenizer.token_id(end) => {
                let message = format!("expected the token {end:?}, which ends every text");
                let path = checkpoint.path("tokenizer.json");
                Some(tokenizer.token_id(end).ok_or(Error::Model { path, message })?)
            }
            _ => None,
        };
        let heads = heads(&traits, options)?;
        let longest = max_sequence_length(checkpoint)?.unwrap_or(usize::MAX).min(traits.max_tokens);
        let max_tokens = options.max_tokens.unwrap_or(longest);
        if !(2..=longest).contains(&max_tokens) {
            return Err(Error::Request(format!("max_tokens is {max_tokens}, expected 2 to the model's {longest}")));
        }
        let prompts = prompts(checkpoint, &traits)?;
        let options = options.clone();
        Ok(Self { model, traits, tokenizer, end_id, prompts, options, heads, max_tokens, device })
    }

    /// What the model gives and takes.
    pub fn traits(&self) -> &EncoderTraits {
        &self.traits
    }

    /// The heads that embeddings have.
    pub fn heads(&self) -> Heads {
        self.heads
    }

    /// Elements of a dense vector.
    pub fn dense_size(&self) -> usize {
        self.options.dimensions.unwrap_or(self.traits.dense_size)
    }

    /// Longest text in tokens before it is cut off.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// The text that the model wants before a kind of text, such as `query`; `None` for a kind it does not know.
    pub fn prompt(&self, name: &str) -> Option<&str> {
        self.prompts.iter().find(|(known, _)| known == name).map(|(_, prompt)| prompt.as_str())
    }

    /// Embeds texts as they are, one batch at a time.
    ///
    /// # Errors
    ///
    /// A text that the tokenizer has no tokens for, or the computation itself fails.
    pub fn embed<T: AsRef<str> + Sync>(&self, texts: &[T]) -> Result<Vec<Embedding>> {
        self.embed_prompted("", texts)
    }

    /// Embeds queries, with the prompt that the model has for them, if any.
    ///
    /// # Errors
    ///
    /// As [`Embedder::embed`].
    pub fn embed_queries<T: AsRef<str> + Sync>(&self, queries: &[T]) -> Result<Vec<Embedding>> {
        self.embed_prompted(self.prompt("query").unwrap_or(""), queries)
    }

    /// Embeds texts with `prompt` before each.
    ///
    /// # Errors
    ///
    /// As [`Embedder::embed`].
    pub fn embed_prompted<T: AsRef<str> + Sync>(&self, prompt: &str, texts: &[T]) -> Result<Vec<Embedding>> {
        self.embed_texts(&self.tokenize(prompt, texts)?)
    }

    /// Embeds texts that are token ids already, special ones included. Nothing is cut off.
    ///
    /// # Errors
    ///
    /// A text that is empty or longer than the model's positions, a token beyond the vocabulary, or the computation
    /// itself fails.
    pub fn embed_tokens(&self, texts: Vec<Vec<u32>>) -> Result<Vec<Embedding>> {
        let texts: Vec<Text> = texts.into_iter().map(|ids| Text { ids, truncated: 0 }).collect();
        if let Some(text) = texts.iter().find(|text| !(1..=self.traits.max_tokens).contains(&text.ids.len())) {
            let (tokens, limit) = (text.ids.len(), self.traits.max_tokens);
            return Err(Error::Request(format!("a text of {tokens} tokens, expected 1 to {limit}")));
        }
        self.embed_texts(&texts)
    }

    /// A device has the next batch while the host finishes one.
    fn embed_texts(&self, texts: &[Text]) -> Result<Vec<Embedding>> {
        let batches = self.pack(texts);
        let (mut done, mut under_way) = (Vec::with_capacity(batches.len()), None);
        for batch in &batches {
            let next = self.launch(ids(batch, texts))?;
            done.extend(under_way.replace(next).map(|before| self.land(before)).transpose()?);
        }
        done.extend(under_way.map(|last| self.land(last)).transpose()?);
        Ok(in_order(&batches, done, texts))
    }

    /// As [`Embedder::embed_prompted`], with a batch on every thread: faster for small models on the CPU, for as many
    /// times the memory. Results are the same to the bit.
    ///
    /// # Errors
    ///
    /// As [`Embedder::embed`].
    pub fn embed_parallel<T: AsRef<str> + Sync>(&self, prompt: &str, texts: &[T]) -> Result<Vec<Embedding>> {
        if !self.device.is_cpu() {
            return self.embed_prompted(prompt, texts);
        }
        let texts = self.tokenize(prompt, texts)?;
        let batches = self.pack(&texts);
        let done = batches.par_iter().map(|batch| self.land(self.launch(ids(batch, &texts))?));
        Ok(in_order(&batches, done.collect::<Result<_>>()?, &texts))
    }

    /// Embeds any number of texts as they come, a bounded number at a time. After an error there are no more.
    pub fn embed_iter<T: AsRef<str> + Sync>(
        &self,
        texts: impl IntoIterator<Item = T>,
    ) -> impl Iterator<Item = Result<Embedding>> {
        const WINDOW: usize = 256;
        let mut texts = texts.into_iter();
        let mut failed = false;
        std::iter::from_fn(move || {
            let window: Vec<T> = texts.by_ref().take(if failed { 0 } else { WINDOW }).collect();
            if window.is_empty() {
                return None;
            }
            Some(match self.embed(&window) {
                Ok(embeddings) => embeddings.into_iter().map(Ok).collect::<Vec<_>>(),
                Err(error) => {
                    failed = true;
                    vec![Err(error)]
                }
            })
        })
        .flatten()
    }

    fn tokenize<T: AsRef<str> + Sync>(&self, prompt: &str, texts: &[T]) -> Result<Vec<Text>> {
        texts.par_iter().map(|text| self.text(prompt, text.as_ref())).collect()
    }

    fn text(&self, prompt: &str, text: &str) -> Result<Text> {
        let mut ids = match prompt {
            "" => self.tokenizer.encode_whole(text)?,
            _ => self.tokenizer.encode_whole(&format!("{prompt}{text}"))?,
        };
        ids.extend(self.end_id);
        let truncated = ids.len().saturating_sub(self.max_tokens);
        if truncated > 0 {
            // The last token is the one that ends the text, and stays.
            ids.drain(self.max_tokens - 1..ids.len() - 1);
        }
        match ids.is_empty() {
            true => Err(Error::Request("an empty text, which the tokenizer gives no tokens for".into())),
            false => Ok(Text { ids, truncated }),
        }
    }

    /// Indices of texts, the longest first, in batches.
    fn pack(&self, texts: &[Text]) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&index| std::cmp::Reverse(texts[index].ids.len()));
        let batch_tokens = self.options.batch_tokens.unwrap_or(if self.device.is_cpu() { 4096 } else { 16384 });
        let (mut batches, mut tokens): (Vec<Vec<usize>>, _) = (vec![], 0);
        for index in order {
            let len = texts[index].ids.len();
            match batches.last_mut() {
                Some(batch) if tokens + len <= batch_tokens => batch.push(index),
                _ => {
                    batches.push(vec![index]);
                    tokens = 0;
                }
            }
            tokens += len;
        }
        batches
    }

    /// Embeds token sequences in one batch.
    pub(crate) fn embed_ids(&self, sequences: &[&[u32]]) -> Result<Vec<Embedding>> {
        self.land(self.launch(sequences.to_vec())?)
    }

    fn launch<'a>(&self, sequences: Vec<&'a [u32]>) -> Result<UnderWay<'a>> {
        kernels::device::step(&self.device, || {
            let batch = Batch::uncached(&sequences, &self.device)?;
            let encoded = self.model.encode(&batch, self.heads)?;
            let [dense, sparse, colbert] = [encoded.dense, encoded.sparse, encoded.colbert]
                .map(|values| values.map(|values| Download::new(&values.to_dtype(DType::F32)?)).transpose());
            Ok(UnderWay { sequences, dense: dense?, sparse: sparse?, colbert: colbert? })
        })
    }

    fn land(&self, batch: UnderWay) -> Result<Vec<Embedding>> {
        let sequences = batch.sequences;
        let [dense, sparse, colbert] =
            [batch.dense, batch.sparse, batch.colbert].map(|values| values.map_or(Ok(vec![]), Download::wait));
        let (dense, sparse, colbert) = (dense?, sparse?, colbert?);
        let tokens: usize = sequences.iter().map(|ids| ids.len()).sum();
        let colbert_size = colbert.len() / tokens.max(1);
        let mut end = 0;
        let places: Vec<Range<usize>> = sequences
            .iter()
            .map(|ids| {
                end += ids.len();
                end - ids.len()..end
            })
            .collect();
        let embedding = |(index, ids): (usize, &&[u32])| {
            let tokens = places[index].clone();
            Embedding {
                dense: match dense.get(index * self.traits.dense_size..(index + 1) * self.traits.dense_size) {
                    Some(row) => self.dense(row),
                    None => vec![],
                },
                sparse: match sparse.get(tokens.clone()) {
                    Some(weights) => token_weights(ids, weights, &self.traits.special_ids),
                    None => vec![],
                },
                colbert: match colbert.get((tokens.start + 1) * colbert_size..tokens.end * colbert_size) {
                    Some(values) if colbert_size > 0 => unit_vectors(values, colbert_size),
                    _ => Vectors::default(),
                },
                tokens: ids.len(),
                truncated: 0,
            }
        };
        Ok(sequences.par_iter().enumerate().map(embedding).collect())
    }

    fn dense(&self, row: &[f32]) -> Vec<f32> {
        let mut dense = row[..self.dense_size()].to_vec();
        if self.options.normalize {
            normalize(&mut dense);
        }
        dense
    }
}

/// A text's tokens, and how many were cut off.
struct Text {
    ids: Vec<u32>,
    truncated: usize,
}

/// A batch that the device was given, and what comes back.
struct UnderWay<'a> {
    sequences: Vec<&'a [u32]>,
    dense: Option<Download<f32>>,
    sparse: Option<Download<f32>>,
    colbert: Option<Download<f32>>,
}

fn ids<'a>(batch: &[usize], texts: &'a [Text]) -> Vec<&'a [u32]> {
    batch.iter().map(|&index| texts[index].ids.as_slice()).collect()
}

/// The results of `batches`, each of which holds indices of `texts`, in the order of the texts.
fn in_order(batches: &[Vec<usize>], done: Vec<Vec<Embedding>>, texts: &[Text]) -> Vec<Embedding> {
    let mut ordered: Vec<_> = batches.iter().flatten().copied().zip(done.into_iter().flatten()).collect();
    ordered.sort_by_key(|(index, _)| *index);
    ordered.into_iter().map(|(index, embedding)| Embedding { truncated: texts[index].truncated, ..embedding }).collect()
}

/// The largest weight of each id that has a positive one and is not special, ascending by id.
fn token_weights(ids: &[u32], weights: &[f32], special_ids: &[u32]) -> Vec<(u32, f32)> {
    let mut pairs: Vec<(u32, f32)> = ids.iter().copied().zip(weights.iter().copied()).collect();
    pairs.retain(|(id, weight)| *weight > 0.0 && !special_ids.contains(id));
    pairs.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.total_cmp(&a.1)));
    pairs.dedup_by_key(|(id, _)| *id);
    pairs
}

fn unit_vectors(values: &[f32], size: usize) -> Vectors {
    let mut vectors = Vectors { size, values: values.to_vec() };
    vectors.values.chunks_exact_mut(size).for_each(normalize);
    vectors
}

/// The heads that `options` ask for, if the model has them.
fn heads(traits: &EncoderTraits, options: &EmbedderOptions) -> Result<Heads> {
    let heads = options.heads.unwrap_or(traits.heads);
    for (name, wanted, has) in [
        ("dense", heads.dense, traits.heads.dense),
        ("sparse", heads.sparse, traits.heads.sparse),
        ("colbert", heads.colbert, traits.heads.colbert),
    ] {
        if wanted && !has {
            return Err(Error::Request(format!("this {} checkpoint has no {name} head", traits.family)));
        }
    }
    if let Some(dimensions) = options.dimensions {
        if !traits.has_nested_sizes {
            return Err(Error::Request(format!(
                "{} was not trained for vectors cut to {dimensions} dimensions, expected its {}",
                traits.family, traits.dense_size
            )));
        }
        if !(1..=traits.dense_size).contains(&dimensions) {
            let size = traits.dense_size;
            return Err(Error::Request(format!("{dimensions} dimensions, expected 1 to the model's {size}")));
        }
    }
    Ok(heads)
}

/// The limit that sentence-transformers would keep.
fn max_sequence_length(checkpoint: &Checkpoint) -> Result<Option<usize>> {
    let config = json(checkpoint, "sentence_bert_config.json")?;
    Ok(config["max_seq_length"].as_u64().map(|length| length as usize))
}

/// The prompts that `config_sentence_transformers.json` names; without it, those that the family is used with.
fn prompts(checkpoint: &Checkpoint, traits: &EncoderTraits) -> Result<Vec<(String, String)>> {
    /// The one that Qwen3-Embedding's model card gives for search.
    const TASK: &str = "Given a web search query, retrieve relevant passages that answer the query";
    let config = json(checkpoint, "config_sentence_transformers.json")?;
    let named = config["prompts"].as_object().into_iter().flatten();
    let mut prompts: Vec<(String, String)> =
        named.filter_map(|(name, prompt)| Some((name.clone(), prompt.as_str()?.to_string()))).collect();
    let query = if traits.end_token.is_some() { instruct(TASK) } else { String::new() };
    for (name, prompt) in [("query", query), ("document", String::new())] {
        if !prompts.iter().any(|(known, _)| known == name) {
            prompts.push((name.into(), prompt));
        }
    }
    Ok(prompts)
}

/// The prompt of a query for models that take a task in words, such as Qwen3-Embedding.
pub fn instruct(task: &str) -> String {
    format!("Instruct: {task}\nQuery:")
}

/// A small JSON file of a checkpoint, `null` if there is none.
fn json(checkpoint: &Checkpoint, name: &str) -> Result<Value> {
    match checkpoint.read(name)? {
        Some(bytes) => serde_json::from_slice(&bytes)
            .map_err(|error| Error::Model { path: checkpoint.path(name), message: error.to_string() }),
        None => Ok(Value::Null),
    }
}
