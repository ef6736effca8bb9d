//! Encoders through the public interface: transformers' numbers from texts, every layout of weights, batches that do
//! not matter, limits that are kept and said.

mod support;

use std::fs;
use std::path::Path;

use models::Checkpoint;
use serde_json::Value;
use taper::embedding::{dot, lexical};
use taper::verify::verify;
use taper::{Embedder, EmbedderOptions, Embedding, Heads, Quantization, instruct};
use tempfile::TempDir;

fn options() -> EmbedderOptions {
    EmbedderOptions::default()
}

fn open(folder: &Path, options: &EmbedderOptions) -> Embedder {
    Embedder::open(&Checkpoint::Folder(folder.into()), options).unwrap_or_else(|error| panic!("{error}"))
}

fn refused(folder: &Path, options: &EmbedderOptions) -> String {
    match Embedder::open(&Checkpoint::Folder(folder.into()), options) {
        Ok(_) => panic!("{} loads", folder.display()),
        Err(error) => error.to_string(),
    }
}

fn reference(family: &str) -> (std::path::PathBuf, Value) {
    let fixture = support::fixture(family, "base", 0);
    let json = fs::read(fixture.join("reference.json")).expect("a fixture");
    (fixture.join("f32"), serde_json::from_slice(&json).expect("a fixture"))
}

fn texts(reference: &Value) -> Vec<&str> {
    reference["texts"].as_array().expect("texts").iter().map(|text| text.as_str().expect("a text")).collect()
}

/// A copy of a fixture's checkpoint, with its folders.
fn copy(folder: &Path) -> TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder");
    for folder in [folder.to_path_buf(), folder.join("1_Pooling")].iter().filter(|folder| folder.is_dir()) {
        let target = if folder.ends_with("1_Pooling") { copy.path().join("1_Pooling") } else { copy.path().into() };
        fs::create_dir_all(&target).expect("writable");
        for entry in fs::read_dir(folder).expect("a fixture") {
            let file = entry.expect("a file").path();
            if file.is_file() {
                fs::copy(&file, target.join(file.file_name().expect("a file"))).expect("writable");
            }
        }
    }
    copy
}

fn assert_near(name: &str, got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len(), "{name}");
    let largest = got.iter().zip(want).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
    assert!(largest <= 1e-4, "{name}: off by {largest}");
}

#[test]
fn texts_give_what_transformers_gives() {
    for family in ["bge_m3", "qwen3_embedding"] {
        let (folder, reference) = reference(family);
        let embedder = open(&folder, &options());
        let texts = texts(&reference);
        let arrays = support::reference(folder.parent().expect("a fixture"));
        for (run, got) in [embedder.embed(&texts), embedder.embed_parallel("", &texts)].into_iter().enumerate() {
            let got = got.expect("embeds");
            let want = arrays["batch.dense"].to_vec2::<f32>().expect("dense");
            for (index, (got, want)) in got.iter().zip(want).enumerate() {
                let name = format!("{family} {run} {index}");
                assert_near(&name, &got.dense, &want);
                assert_eq!(got.tokens, reference["ids"][index].as_array().expect("ids").len(), "{name}");
                if let Some(want) = reference["sparse"][index].as_object() {
                    let ids: Vec<String> = got.sparse.iter().map(|(id, _)| id.to_string()).collect();
                    assert_eq!(ids.len(), want.len(), "{name}");
                    let want: Vec<f32> = ids.iter().map(|id| want[id].as_f64().expect("a weight") as f32).collect();
                    let got: Vec<f32> = got.sparse.iter().map(|(_, weight)| *weight).collect();
                    assert_near(&name, &got, &want);
                    let want = arrays[&format!("{index}.colbert")].flatten_all().expect("colbert");
                    assert_near(
                        &name,
                        &embedder.embed(&texts[index..=index]).expect("embeds")[0].colbert.values,
                        &want.to_vec1().expect("f32"),
                    );
                }
            }
        }
    }
}

#[test]
fn scores_are_those_of_the_reference() {
    let (folder, reference) = reference("bge_m3");
    let both = open(&folder, &options()).embed(&texts(&reference)[..2]).expect("embeds");
    let scores = taper::embedding::score(&both[0], &both[1], Default::default());
    let got = [scores.dense, scores.sparse, scores.colbert];
    let want =
        ["dense", "sparse", "colbert"].map(|head| reference["scores_0_1"][head].as_f64().expect("a score") as f32);
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-4 * want.abs().max(1.0), "{got}, expected {want}");
    }
    assert!((scores.hybrid - (want[0] + 0.3 * want[1] + want[2]) / 2.3).abs() < 1e-4);
}

#[test]
fn every_layout_of_weights_loads() {
    let fixture = support::fixture("bge_m3", "base", 0);
    let folder = fixture.join("f32");
    let (_, json) = reference("bge_m3");
    let want = open(&folder, &options()).embed(&texts(&json)).expect("embeds");
    let prefixed = support::derive_renamed(&folder, |name| format!("roberta.{name}"));
    let plain = support::derive_renamed(&folder, |name| name);
    let sharded = support::derive_sharded(&folder, 3);
    for derived in [prefixed, plain, sharded] {
        assert_eq!(open(derived.path(), &options()).embed(&texts(&json)).expect("embeds"), want);
    }
    let stray = support::derive_renamed(&folder, |name| name.replace("layer.2.output.dense.bias", "layer.9.bias"));
    assert!(refused(stray.path(), &options()).contains("encoder.layer.2.output.dense.bias"));

    let folder = support::fixture("qwen3_embedding", "base", 0).join("f32");
    let (_, json) = reference("qwen3_embedding");
    let want = open(&folder, &options()).embed(&texts(&json)).expect("embeds");
    let prefixed = support::derive_renamed(&folder, |name| format!("model.{name}"));
    assert!(refused(prefixed.path(), &options()).contains("a language model"));
    fs::write(prefixed.path().join("modules.json"), "[]").expect("writable");
    assert_eq!(open(prefixed.path(), &options()).embed(&texts(&json)).expect("embeds"), want);
}

/// The weights under another pickle: nothing of it is run, and nothing of it is believed.
#[test]
fn a_pickle_with_code_is_refused() {
    let folder = copy(&support::fixture("bge_m3", "base", 0).join("f32"));
    let path = folder.path().join("sparse_linear.pt");
    let mut bytes = fs::read(&path).expect("a fixture");
    let call = b"ctorch._utils\n_rebuild_tensor_v2\n";
    let at = bytes.windows(call.len()).position(|window| window == call).expect("a tensor");
    bytes[at..at + call.len()].copy_from_slice(b"cbuiltins\nexec__________________\n");
    fs::write(&path, bytes).expect("writable");
    let error = refused(folder.path(), &options());
    assert!(error.contains("sparse_linear.pt"), "{error}");
}

fn bits(embedding: &Embedding) -> Vec<u32> {
    let sparse = embedding.sparse.iter().flat_map(|(id, weight)| [*id, weight.to_bits()]);
    embedding.dense.iter().chain(&embedding.colbert.values).map(|value| value.to_bits()).chain(sparse).collect()
}

#[test]
fn a_text_does_not_depend_on_its_batch() {
    for family in ["bge_m3", "qwen3_embedding"] {
        let (folder, reference) = reference(family);
        let texts: Vec<&str> = texts(&reference).repeat(5);
        let of = |tokens: usize| open(&folder, &EmbedderOptions { batch_tokens: Some(tokens), ..options() });
        let want: Vec<_> = of(1).embed(&texts).expect("embeds").iter().map(bits).collect();
        for batch_tokens in [7, 100, 4096] {
            let embedder = of(batch_tokens);
            let got = embedder.embed(&texts).expect("embeds");
            assert_eq!(got.iter().map(bits).collect::<Vec<_>>(), want, "{family} {batch_tokens}");
            let got = embedder.embed_parallel("", &texts).expect("embeds");
            assert_eq!(got.iter().map(bits).collect::<Vec<_>>(), want, "{family} {batch_tokens}");
            let got = embedder.embed_iter(&texts).map(|text| bits(&text.expect("embeds")));
            assert_eq!(got.collect::<Vec<_>>(), want, "{family} {batch_tokens}");
        }
    }
}

/// Vectors from packed weights point where those from the weights as they are stored do. The fixtures are narrow, with
/// random weights: of a trained model more is left.
#[test]
fn packed_weights_give_almost_the_same() {
    for (quantization, least) in [(Quantization::Q8, 0.998), (Quantization::Q4, 0.85)] {
        for family in ["bge_m3", "qwen3_embedding"] {
            let (folder, reference) = reference(family);
            let texts = texts(&reference);
            let want = open(&folder, &options()).embed(&texts).expect("embeds");
            let packed = open(&folder, &EmbedderOptions { quantization: Some(quantization), ..options() });
            let got = packed.embed(&texts).expect("embeds");
            assert_ne!(got, want, "nothing was packed");
            let alone: Vec<_> = texts.iter().map(|text| packed.embed(&[text]).expect("embeds").remove(0)).collect();
            assert_eq!(got.iter().map(bits).collect::<Vec<_>>(), alone.iter().map(bits).collect::<Vec<_>>());
            let mut worst = f32::INFINITY;
            for (got, want) in got.iter().zip(&want) {
                let colbert = got.colbert.iter().zip(want.colbert.iter()).map(|(got, want)| dot(got, want));
                worst = colbert.chain([dot(&got.dense, &want.dense)]).fold(worst, f32::min);
                if !want.sparse.is_empty() {
                    let length = |weights: &[(u32, f32)]| lexical(weights, weights).sqrt();
                    worst = worst.min(lexical(&got.sparse, &want.sparse) / length(&got.sparse) / length(&want.sparse));
                }
            }
            println!("{family} {quantization:?}: cosines from {worst}");
            assert!(worst > least, "{family} {quantization:?}: {worst}");
        }
    }
}

/// As transformers does: what stands in a text is none of the tokens around it.
#[test]
fn a_text_may_begin_with_a_special_token() {
    let (folder, _) = reference("bge_m3");
    let embedder = open(&folder, &options());
    let ids = |text: &str| {
        let tokenizer = tokenizers::Tokenizer::from_file(folder.join("tokenizer.json")).expect("a fixture");
        tokenizer.encode(text, true).expect("encodes").get_ids().to_vec()
    };
    let doubled = ids("<s>token");
    assert_eq!((&doubled[..2], doubled.len()), (&[0, 0][..], ids("token").len() + 1));
    let want = embedder.embed_tokens(vec![doubled]).expect("embeds");
    assert_eq!(embedder.embed(&["<s>token"]).expect("embeds"), want);
}

#[test]
fn heads_are_those_asked_for() {
    let (folder, reference) = reference("bge_m3");
    let texts = texts(&reference);
    let all = open(&folder, &options()).embed(&texts).expect("embeds");
    for mask in 0..8 {
        let heads = Heads { dense: mask & 1 > 0, sparse: mask & 2 > 0, colbert: mask & 4 > 0 };
        let some = open(&folder, &EmbedderOptions { heads: Some(heads), ..options() }).embed(&texts).expect("embeds");
        for (all, some) in all.iter().zip(&some) {
            assert_eq!(some.dense, if heads.dense { all.dense.clone() } else { vec![] });
            assert_eq!(some.sparse, if heads.sparse { all.sparse.clone() } else { vec![] });
            assert_eq!(some.colbert.values, if heads.colbert { all.colbert.values.clone() } else { vec![] });
        }
    }
    let bare = copy(&folder);
    fs::remove_file(bare.path().join("sparse_linear.pt")).expect("there");
    let heads = Some(Heads { sparse: true, ..Heads::DENSE });
    assert!(refused(bare.path(), &EmbedderOptions { heads, ..options() }).contains("no sparse head"));
    assert!(!open(bare.path(), &options()).heads().sparse);
}

#[test]
fn long_texts_are_cut_and_say_so() {
    for family in ["bge_m3", "qwen3_embedding"] {
        let (folder, reference) = reference(family);
        let short = open(&folder, &EmbedderOptions { max_tokens: Some(9), ..options() });
        let text = "The quick brown fox jumps over the lazy dog.";
        let got = &short.embed(&[text, "a"]).expect("embeds");
        let whole = &open(&folder, &options()).embed(&[text]).expect("embeds")[0];
        assert_eq!((got[0].tokens, got[0].tokens + got[0].truncated), (9, whole.tokens), "{family}");
        assert_eq!((got[1].truncated, whole.truncated), (0, 0), "{family}");
        assert_ne!(got[0].dense, whole.dense);
        for max_tokens in [1, 1 << 20] {
            let error = refused(&folder, &EmbedderOptions { max_tokens: Some(max_tokens), ..options() });
            assert!(error.contains("max_tokens"), "{error}");
        }
        if let Some(limit) = reference["max_tokens"].as_u64() {
            assert_eq!(open(&folder, &options()).max_tokens(), limit as usize);
        }
    }
}

#[test]
fn dimensions_are_for_models_that_were_trained_for_them() {
    let (folder, reference) = reference("qwen3_embedding");
    let texts = texts(&reference);
    let whole = open(&folder, &options()).embed(&texts).expect("embeds");
    let cut = open(&folder, &EmbedderOptions { dimensions: Some(24), ..options() });
    for (whole, cut) in whole.iter().zip(cut.embed(&texts).expect("embeds")) {
        let length = whole.dense[..24].iter().map(|value| value * value).sum::<f32>().sqrt();
        let want: Vec<f32> = whole.dense[..24].iter().map(|value| value / length).collect();
        assert_near("cut", &cut.dense, &want);
    }
    let error = refused(&folder, &EmbedderOptions { dimensions: Some(65), ..options() });
    assert!(error.contains("65 dimensions, expected 1 to the model's 64"), "{error}");
    let bge = support::fixture("bge_m3", "base", 0).join("f32");
    let error = refused(&bge, &EmbedderOptions { dimensions: Some(24), ..options() });
    assert!(error.contains("not trained"), "{error}");
}

#[test]
fn queries_have_their_prompt() {
    let (folder, _) = reference("qwen3_embedding");
    let embedder = open(&folder, &options());
    let prompt = instruct("Given a web search query, retrieve relevant passages that answer the query");
    assert_eq!(embedder.prompt("query"), Some(prompt.as_str()));
    let text = "What is the weather like today?";
    let want = embedder.embed(&[format!("{prompt}{text}")]).expect("embeds");
    assert_eq!(embedder.embed_queries(&[text]).expect("embeds"), want);
    let named = copy(&folder);
    let config = r#"{ "prompts": { "query": "find: ", "document": "" } }"#;
    fs::write(named.path().join("config_sentence_transformers.json"), config).expect("writable");
    assert_eq!(open(named.path(), &options()).prompt("query"), Some("find: "));
}

#[test]
fn other_models_are_refused() {
    let language = support::fixture("qwen3", "base", 0).join("f32");
    assert!(refused(&language, &options()).contains("a language model"));
    let bge = support::fixture("bge_m3", "base", 0).join("f32");
    let mean = copy(&bge);
    let pooling = r#"{ "pooling_mode_cls_token": false, "pooling_mode_mean_tokens": true }"#;
    fs::write(mean.path().join("1_Pooling/config.json"), pooling).expect("writable");
    let error = refused(mean.path(), &options());
    assert!(error.contains("pooling_mode_mean_tokens is not supported"), "{error}");
    let checkpoint = Checkpoint::Folder(bge);
    let error = taper::Llm::open(&checkpoint, &taper::Options::default()).err().expect("refused").to_string();
    assert!(error.contains("an encoder"), "{error}");
}

/// Against everything for encoders that `make_reference.py` left in the folder that `TAPER_REFERENCE` names.
#[test]
fn all_references_agree() {
    let Some(root) = std::env::var_os("TAPER_REFERENCE") else {
        println!("skipped: TAPER_REFERENCE names no folder that make_reference.py wrote");
        return;
    };
    use candle_core::{DType, Device};
    let mut compared = 0;
    for folder in support::folders(Path::new(&root)) {
        let name = folder.file_name().and_then(|name| name.to_str()).expect("a name");
        if !name.starts_with("bge_m3") && !name.starts_with("qwen3_embedding") {
            continue;
        }
        let reference = folder.join("reference.safetensors");
        let runs = [("f32", DType::F32), ("f32-sharded", DType::F32), ("bf16", DType::F32), ("bf16", DType::BF16)];
        for (weights, dtype) in runs {
            let report = verify(&Checkpoint::Folder(folder.join(weights)), &reference, dtype, &Device::Cpu)
                .unwrap_or_else(|error| panic!("{name} {weights}: {error}"));
            let failed: Vec<_> = report.entries.iter().filter(|entry| !entry.passed).collect();
            assert!(report.passed(), "{name} {weights} {dtype:?}: {failed:#?}");
            let worst = report.entries.iter().map(|entry| entry.rms).fold(0.0, f64::max);
            println!("{name} {weights} {dtype:?}: {} arrays, worst rms {worst:.1e}", report.entries.len());
            compared += report.entries.len();
        }
    }
    assert!(compared > 0, "nothing to compare in {}", Path::new(&root).display());
}
