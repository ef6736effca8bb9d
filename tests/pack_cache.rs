//! Packed weights on disk: a second start answers as the first, and a changed model is packed anew.
#![cfg(feature = "demo")]

use std::fs::{self, File};
use std::path::Path;
use std::time::{Duration, SystemTime};

use taper::{Embedder, EmbedderOptions, Llm, Options, PackCache, Quantization, SamplingParams};
use tempfile::TempDir;

/// A copy of one of the demo's checkpoints.
fn checkpoint(name: &str) -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/demo").join(name);
    for entry in fs::read_dir(demo).expect("the demo") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("writable");
    }
    folder
}

fn cache(folder: &TempDir) -> Option<PackCache> {
    let warn = |message: &str| panic!("{message}");
    Some(PackCache { folder: folder.path().join("packed"), min_bytes: 0, warn, ..PackCache::from_env() })
}

fn count(folder: &TempDir) -> usize {
    fs::read_dir(folder.path().join("packed")).map_or(0, |entries| entries.count())
}

#[test]
fn a_second_start_gives_the_same_answer() {
    let (model, kept) = (checkpoint("chat"), tempfile::tempdir().expect("a temporary folder"));
    let answer = |quantization: Quantization| {
        let options = Options { quantization: Some(quantization), pack_cache: cache(&kept), ..Options::default() };
        let mut llm = Llm::load(&model.path().to_string_lossy(), &options).expect("the demo");
        let params = SamplingParams { max_tokens: 24, logprobs: Some(3), ..SamplingParams::default() };
        let pieces = llm.generate("The capital of France is", params).expect("a prompt");
        format!("{:?}", pieces.map(|piece| piece.expect("it runs")).collect::<Vec<_>>())
    };
    let first = answer(Quantization::Q4);
    assert_eq!(count(&kept), 1);
    assert_eq!(answer(Quantization::Q4), first);
    assert_eq!(count(&kept), 1);
    assert_ne!(answer(Quantization::Q8), first);
    assert_eq!(count(&kept), 2);

    let weights = model.path().join("model.safetensors");
    let earlier = SystemTime::now() - Duration::from_secs(3600);
    File::options().write(true).open(&weights).and_then(|file| file.set_modified(earlier)).expect("ours");
    assert_eq!(answer(Quantization::Q4), first);
    assert_eq!(count(&kept), 3, "a file of another time is another source");

    let mut bytes = fs::read(&weights).expect("readable");
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("eight")) as usize;
    bytes[header..header + 64].fill(0);
    fs::write(&weights, bytes).expect("writable");
    File::options().write(true).open(&weights).and_then(|file| file.set_modified(earlier)).expect("ours");
    answer(Quantization::Q4);
    assert_eq!(count(&kept), 4, "other bytes of the same time and size are another source");
}

#[test]
fn an_encoder_too() {
    let (model, kept) = (checkpoint("embed"), tempfile::tempdir().expect("a temporary folder"));
    let embed = || {
        let quantization = Some(Quantization::Q8);
        let options = EmbedderOptions { quantization, pack_cache: cache(&kept), ..EmbedderOptions::default() };
        let embedder = Embedder::load(&model.path().to_string_lossy(), &options).expect("the demo");
        let embeddings = embedder.embed(&["Paris is the capital of France."]).expect("it runs");
        assert_eq!(count(&kept), 1);
        format!("{:?}", embeddings[0].dense)
    };
    assert_eq!(embed(), embed());
}

#[test]
fn what_is_built_in_is_not_kept() {
    let kept = tempfile::tempdir().expect("a temporary folder");
    let quantization = Some(Quantization::Q8);
    Llm::demo(&Options { quantization, pack_cache: cache(&kept), ..Options::default() }).expect("it is built in");
    assert_eq!(count(&kept), 0);
}
