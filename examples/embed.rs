//! Finds the passage that answers a question: `cargo run --release --example embed -- [MODEL]`, the built-in demo
//! without a model.

use taper::embedding::{Weights, score, top_k};
use taper::{Embedder, EmbedderOptions};

fn main() -> taper::Result<()> {
    let options = EmbedderOptions::default();
    let embedder = match std::env::args().nth(1) {
        Some(model) => Embedder::load(&model, &options)?,
        None => Embedder::demo(&options)?,
    };
    let passages = ["Paris is the capital of France.", "The euro is the currency of France.", "Oslo lies in Norway."];
    let embedded = embedder.embed(&passages)?;
    let query = &embedder.embed_queries(&["What is the capital of France?"])?[0];
    let scores: Vec<_> = embedded.iter().map(|passage| score(query, passage, Weights::default())).collect();
    for (index, hybrid) in top_k(scores.iter().map(|scores| scores.hybrid), 3) {
        let heads = scores[index];
        println!(
            "{hybrid:.3}  {}  (dense {:.3}, sparse {:.3}, colbert {:.3})",
            passages[index], heads.dense, heads.sparse, heads.colbert
        );
    }
    Ok(())
}
