//! `taper search`: score every record of an embedded file for a query, and show the best.

mod index;

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;
use taper::Heads;
use taper::embedding::{Scores, Weights, score};

use self::index::Entry;
use super::embed::model::{EncoderArgs, prompt};
use super::{Error, Result};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// File that taper embed wrote: .jsonl, .npy or .parquet
    index: PathBuf,
    /// What to look for
    query: String,
    /// How many to show
    #[arg(short, default_value_t = 10)]
    k: usize,
    /// How much the dense, sparse and ColBERT scores count; heads that the file lacks count nothing
    #[arg(long, value_parser = parse_weights, default_value = "1,0.3,1")]
    weights: Weights,
    /// Text to put before the query, or the name of a prompt of the model
    #[arg(long, value_name = "TEXT", default_value = "query", help_heading = "Model")]
    prompt: String,
    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
    /// The model that the file was made with
    #[command(flatten)]
    model: EncoderArgs,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let (heads, entries) = index::open(&args.index)?;
    let weights = Weights {
        dense: if heads.dense { args.weights.dense } else { 0.0 },
        sparse: if heads.sparse { args.weights.sparse } else { 0.0 },
        colbert: if heads.colbert { args.weights.colbert } else { 0.0 },
    };
    let wanted = Heads { dense: weights.dense != 0.0, sparse: weights.sparse != 0.0, colbert: weights.colbert != 0.0 };
    if wanted == (Heads { dense: false, sparse: false, colbert: false }) {
        return Err(Error::Usage(format!("{}: no head that has a weight", args.index.display())));
    }
    let (embedder, _) = args.model.load(Some(wanted), true)?;
    let prompt = prompt(&embedder, &args.prompt);
    let query = embedder.embed_prompted(&prompt, &[&args.query])?.remove(0);
    let mut best: Vec<(Scores, Entry)> = vec![];
    for entry in entries {
        let entry = entry?;
        let sizes = [
            (wanted.dense, "dense", entry.embedding.dense.len(), query.dense.len()),
            (
                wanted.colbert && entry.embedding.colbert.size > 0,
                "colbert",
                entry.embedding.colbert.size,
                query.colbert.size,
            ),
        ];
        if let Some((_, head, has, size)) = sizes.into_iter().find(|(wanted, _, has, size)| *wanted && has != size) {
            return Err(Error::Usage(format!(
                "{}: {head} vectors of {has} elements, the model's have {size}: name its model with -m",
                args.index.display()
            )));
        }
        let scores = score(&query, &entry.embedding, weights);
        let place = best.partition_point(|(other, _)| other.hybrid >= scores.hybrid);
        if place < args.k {
            best.insert(place, (scores, entry));
            best.truncate(args.k);
        }
    }
    if !args.json {
        println!("{:>4} {:>8} {:>8} {:>8} {:>8}  id", "", "score", "dense", "sparse", "colbert");
    }
    for (rank, (scores, entry)) in (1..).zip(&best) {
        let Scores { hybrid, dense, sparse, colbert } = scores;
        if args.json {
            let (id, text) = (&entry.id, &entry.text);
            println!(
                "{}",
                json!({ "id": id, "score": hybrid, "dense": dense, "sparse": sparse, "colbert": colbert, "text": text })
            );
        } else {
            let id = entry.id.as_str().map_or_else(|| entry.id.to_string(), str::to_string);
            let text = entry.text.as_deref().map(|text| format!("  {text}")).unwrap_or_default();
            println!("{rank:>4} {hybrid:>8.4} {dense:>8.4} {sparse:>8.4} {colbert:>8.4}  {id}{text}");
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn parse_weights(text: &str) -> std::result::Result<Weights, String> {
    let numbers: Vec<f32> = text.split(',').filter_map(|number| number.trim().parse().ok()).collect();
    match numbers[..] {
        [dense, sparse, colbert] if numbers.iter().all(|weight| weight.is_finite() && *weight >= 0.0) => {
            Ok(Weights { dense, sparse, colbert })
        }
        _ => Err("expected three numbers from 0 up, such as 1,0.3,1".into()),
    }
}
