//! The comparison of an encoder with transformers: every text alone and all in one batch, every head.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use models::Checkpoint;
use serde::Deserialize;

use super::{Entry, Precision, Reference, Report, difference};
use crate::embedder::{Embedder, EmbedderOptions};
use crate::embedding::{Vectors, normalize};
use crate::{Embedding, Error, Result};

/// What the JSON file of an encoder's reference says.
#[derive(Deserialize)]
pub struct Texts {
    ids: Vec<Vec<u32>>,
    /// By token id, in decimal.
    #[serde(default)]
    sparse: Vec<BTreeMap<String, f32>>,
    #[serde(default, rename = "bf16w.sparse")]
    bf16w_sparse: Vec<BTreeMap<String, f32>>,
    #[serde(default, rename = "bf16.sparse")]
    bf16_sparse: Vec<BTreeMap<String, f32>>,
}

/// Largest difference of f32 arithmetic.
const LARGEST: f64 = 1e-4;
/// What the cosine of each vector of bf16 arithmetic may lack to one, and how far its length may be off, relatively.
/// What is not normalised may also be off by twice as much as transformers' own bf16 arithmetic is in the worst text:
/// the length of a list of weights is off by about as much as each of them is, however short the list.
const ANGLE: f64 = 5e-4;
const NORM: f64 = 1e-3;

pub fn verify(
    checkpoint: &Checkpoint,
    reference: &Reference,
    texts: &Texts,
    precision: Precision,
    dtype: DType,
    device: &Device,
) -> Result<Report> {
    // The reference may hold dense vectors as they were before they were normalised.
    let options = EmbedderOptions { dtype: Some(dtype), normalize: false, ..EmbedderOptions::default() };
    let embedder = Embedder::open_on(checkpoint, &options, device.clone())?;
    let ids: Vec<&[u32]> = texts.ids.iter().map(Vec::as_slice).collect();
    let alone = ids.iter().map(|ids| Ok(embedder.embed_ids(&[ids])?.remove(0))).collect::<Result<Vec<_>>>()?;
    let mut comparison = Comparison { reference, texts, precision, report: Report::default() };
    comparison.texts("", &alone)?;
    comparison.texts("batch.", &embedder.embed_ids(&ids)?)?;
    Ok(comparison.report)
}

struct Comparison<'a> {
    reference: &'a Reference,
    texts: &'a Texts,
    precision: Precision,
    report: Report,
}

impl<'a> Comparison<'a> {
    fn texts(&mut self, run: &str, embeddings: &[Embedding]) -> Result<()> {
        let (prefix, sparse) = self.exact();
        let [pooled_slack, sparse_slack] = self.slack()?;
        for (text, got) in embeddings.iter().enumerate() {
            let name = |head: &str| format!("{run}{text}.{prefix}{head}");
            if let Some(want) = self.row(text, &format!("{prefix}pooled"))? {
                self.compare(name("pooled"), Vectors::one(got.dense.clone()), &want, pooled_slack)?;
            }
            let mut dense = got.dense.clone();
            normalize(&mut dense);
            match self.row(text, &format!("{prefix}dense"))? {
                Some(want) => self.compare(name("dense"), Vectors::one(dense), &want, 0.0)?,
                None => return Err(self.fault(format!("no tensor {text}.{prefix}dense"))),
            }
            if let Some(want) = self.reference.tensors.get(&format!("{text}.{prefix}colbert")) {
                self.compare(name("colbert"), got.colbert.clone(), want, 0.0)?;
            }
            if let Some(want) = sparse.get(text) {
                let id = |id: &String| id.parse().map_err(|_| self.fault(format!("id {id:?}")));
                let want =
                    want.iter().map(|(key, weight)| Ok((id(key)?, *weight))).collect::<Result<BTreeMap<u32, _>>>()?;
                let got: BTreeMap<u32, f32> = got.sparse.iter().copied().collect();
                let ids: BTreeSet<u32> = want.keys().chain(got.keys()).copied().collect();
                let weights = |of: &BTreeMap<u32, f32>| -> Vec<f32> {
                    ids.iter().map(|id| of.get(id).copied().unwrap_or(0.0)).collect()
                };
                let want = Tensor::new(weights(&want), &Device::Cpu)?;
                self.compare(name("sparse"), Vectors::one(weights(&got)), &want, sparse_slack)?;
            }
        }
        Ok(())
    }

    /// The prefix of what was computed in f32 from the same weights, and of that the lexical weights.
    fn exact(&self) -> (&'static str, &'a [BTreeMap<String, f32>]) {
        let prefix = self.precision.exact_prefix();
        (prefix, if prefix.is_empty() { &self.texts.sparse } else { &self.texts.bf16w_sparse })
    }

    /// A text's row of an array of all texts, or its own array; `None` if there is neither.
    fn row(&self, text: usize, name: &str) -> Result<Option<Tensor>> {
        let tensors = &self.reference.tensors;
        match tensors.get(name) {
            Some(all) => Ok(Some(all.get(text)?)),
            None => Ok(tensors.get(&format!("{text}.{name}")).cloned()),
        }
    }

    /// Twice the greatest error that transformers' bf16 arithmetic makes in the lengths of what is not normalised: of
    /// dense vectors, of lexical weights.
    fn slack(&self) -> Result<[f64; 2]> {
        let (mut pooled, mut sparse) = (0.0f64, 0.0f64);
        let (prefix, exact_sparse) = self.exact();
        let exact_pooled = format!("{prefix}pooled");
        for text in 0..self.texts.ids.len() {
            if let (Some(theirs), Some(exact)) = (self.row(text, "bf16.pooled")?, self.row(text, &exact_pooled)?) {
                let [theirs, exact] = [theirs.to_vec1::<f32>()?, exact.to_vec1()?];
                pooled = pooled.max((length(theirs.iter()) - length(exact.iter())).abs());
            }
        }
        for (theirs, exact) in self.texts.bf16_sparse.iter().zip(exact_sparse) {
            sparse = sparse.max((length(theirs.values()) - length(exact.values())).abs());
        }
        Ok([2.0 * pooled, 2.0 * sparse])
    }

    fn fault(&self, message: String) -> Error {
        Error::Model { path: self.reference.path.clone(), message }
    }

    /// Compares vectors with `want` `[vectors, size]`, or `[size]` for one, whose length may be off by `slack` in bf16.
    fn compare(&mut self, name: String, got: Vectors, want: &Tensor, slack: f64) -> Result<()> {
        if got.is_empty() && want.elem_count() == 0 {
            return Ok(()); // the lexical weights of an empty text
        }
        let values = Tensor::new(&got.values[..], &Device::Cpu)?;
        let values = match want.dims() {
            [_] => values,
            _ => values.reshape(((), got.size))?,
        };
        let (rms, largest) = match values.dims() == want.dims() {
            true => difference(&values, want)?,
            false => (f64::NAN, f64::NAN),
        };
        let mut entry = |name: &str, largest: f64, limit: f64, what: &str| {
            let (name, limit, passed) = (name.to_string(), format!("{what} {limit:.1e}"), largest <= limit);
            self.report.entries.push(Entry { name, rms, largest, limit, passed });
        };
        match self.precision {
            Precision::F32 | Precision::Bf16Weights => entry(&name, largest, LARGEST, "largest"),
            Precision::Bf16 | Precision::Rounded => {
                let want: Vec<f32> = want.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
                let (angle, norm) = match largest.is_nan() {
                    true => (f64::NAN, f64::NAN),
                    false => deviation(&got, &want),
                };
                entry(&name, angle, ANGLE, "1 - cosine");
                entry(&format!("{name} norm"), norm, NORM.max(slack / length(want.iter())), "norm");
            }
        }
        self.report.computed.insert(name, values);
        Ok(())
    }
}

/// The greatest of what each vector's cosine to the wanted one lacks to one, and of the relative differences in length.
fn deviation(got: &Vectors, want: &[f32]) -> (f64, f64) {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let (mut angle, mut norm) = (0.0, 0.0);
    // `f64::max` would pass over NaN, which is what a vector of zeros has.
    let worst = |worst: f64, value: f64| if value > worst || value.is_nan() { value } else { worst };
    for (got, want) in got.iter().zip(want.chunks_exact(got.size)) {
        let (ours, theirs) = (length(got.iter()), length(want.iter()));
        angle = worst(angle, 1.0 - dot(got, want) / (ours * theirs));
        norm = worst(norm, (ours / theirs - 1.0).abs());
    }
    (angle, norm)
}

fn length<'a>(values: impl Iterator<Item = &'a f32>) -> f64 {
    values.map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}
