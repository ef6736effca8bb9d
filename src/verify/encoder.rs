//! The comparison of an encoder with transformers: every text alone and all in one batch, every head.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use models::Checkpoint;
use serde::Deserialize;

use super::{Entry, Precision, Reference, Report, difference};
use crate::embedder::{Embedder, EmbedderOptions};
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
}

/// Largest difference of f32 arithmetic, and the least cosine of bf16.
const LARGEST: f64 = 1e-4;
const COSINE: f64 = 0.9995;

pub fn verify(
    checkpoint: &Checkpoint,
    reference: &Reference,
    texts: &Texts,
    precision: Precision,
    dtype: DType,
    device: &Device,
) -> Result<Report> {
    let options = EmbedderOptions { dtype: Some(dtype), ..EmbedderOptions::default() };
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

impl Comparison<'_> {
    fn texts(&mut self, run: &str, embeddings: &[Embedding]) -> Result<()> {
        // The reference has no run in bf16 arithmetic: there its exact arithmetic on the same weights is compared with.
        let (prefix, sparse) = match self.precision {
            Precision::F32 => ("", &self.texts.sparse),
            Precision::Bf16Weights | Precision::Bf16 => ("bf16w.", &self.texts.bf16w_sparse),
        };
        for (text, got) in embeddings.iter().enumerate() {
            let name = |head: &str| format!("{run}{text}.{prefix}{head}");
            let want = match self.reference.tensors.get(&format!("{prefix}dense")) {
                Some(all) => all.get(text)?,
                None => self.reference.tensor(&format!("{text}.{prefix}dense"))?.clone(),
            };
            self.compare(name("dense"), vector(&got.dense)?, &want)?;
            if let Some(want) = self.reference.tensors.get(&format!("{text}.{prefix}colbert")) {
                let colbert = Tensor::new(&got.colbert.values[..], &Device::Cpu)?.reshape(((), got.colbert.size))?;
                self.compare(name("colbert"), colbert, want)?;
            }
            if let Some(want) = sparse.get(text) {
                let path = || self.reference.path.with_extension("json");
                let id =
                    |id: &String| id.parse().map_err(|_| Error::Model { path: path(), message: format!("id {id:?}") });
                let want =
                    want.iter().map(|(key, weight)| Ok((id(key)?, *weight))).collect::<Result<BTreeMap<u32, _>>>()?;
                let got: BTreeMap<u32, f32> = got.sparse.iter().copied().collect();
                let ids: BTreeSet<u32> = want.keys().chain(got.keys()).copied().collect();
                let weights = |of: &BTreeMap<u32, f32>| -> Vec<f32> {
                    ids.iter().map(|id| of.get(id).copied().unwrap_or(0.0)).collect()
                };
                self.compare(name("sparse"), vector(&weights(&got))?, &vector(&weights(&want))?)?;
            }
        }
        Ok(())
    }

    fn compare(&mut self, name: String, got: Tensor, want: &Tensor) -> Result<()> {
        if got.elem_count() == 0 && want.elem_count() == 0 {
            return Ok(()); // the lexical weights of an empty text
        }
        let (rms, largest) = match got.dims() == want.dims() {
            true => difference(&got, want)?,
            false => (f64::NAN, f64::NAN),
        };
        let (passed, limit) = match self.precision {
            Precision::F32 | Precision::Bf16Weights => (largest <= LARGEST, format!("largest {LARGEST:.0e}")),
            // For vectors of length one the squared distance is twice what the cosine lacks to one.
            Precision::Bf16 => (rms <= (2.0 * (1.0 - COSINE)).sqrt(), format!("cosine {COSINE}")),
        };
        self.report.entries.push(Entry { name: name.clone(), rms, largest, limit, passed });
        self.report.computed.insert(name, got);
        Ok(())
    }
}

fn vector(values: &[f32]) -> Result<Tensor> {
    Ok(Tensor::new(values, &Device::Cpu)?)
}
