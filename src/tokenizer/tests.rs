use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::testing::{self, demo, fixtures, generated_references};

static DEMO: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::load(&demo()).unwrap());

/// Pieces of text and bytes, as in Gemma's tokenizer, which puts `<bos>` before a text.
static WITH_BYTE_TOKENS: LazyLock<Tokenizer> = LazyLock::new(|| {
    let mut vocab = json!({ "<unk>": 0, "<bos>": 1, "a": 2, "▁": 3, "<0x>": 4 });
    for byte in 0..=u8::MAX {
        vocab[format!("<0x{byte:02X}>")] = json!(5 + u32::from(byte));
    }
    let token = json!({ "id": 1, "content": "<bos>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true });
    let bos = json!({ "SpecialToken": { "id": "<bos>", "type_id": 0 } });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [token],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [bos, { "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<bos>": { "id": "<bos>", "ids": [1], "tokens": ["<bos>"] } },
        },
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
        ] },
        "model": { "type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": true },
    });
    let config = json!({ "bos_token": { "content": "<bos>" }, "eos_token": null });
    Tokenizer::from_bytes(Path::new("tokenizer.json"), tokenizer.to_string().as_bytes(), &config).unwrap()
});

fn stream(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = DecodeStream::default();
    let mut text = String::new();
    for &id in ids {
        text += &stream.step(tokenizer, id);
        assert!(stream.pending.len() <= 3);
    }
    text + &stream.finish()
}

/// Ids and texts as the Python `tokenizers` give them.
fn check_reference(checkpoint: &Checkpoint, reference: &Value) {
    let tokenizer = Tokenizer::load(checkpoint).unwrap();
    for case in reference["tokenizer_cases"].as_array().unwrap() {
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(case[key].clone()).unwrap();
        let (text, decoded) = (case["text"].as_str().unwrap(), case["decoded"].as_str().unwrap());
        assert_eq!(tokenizer.encode(text).unwrap(), ids("ids"), "{checkpoint:?}: {text:?}");
        assert_eq!(tokenizer.encode_rendered(text).unwrap(), ids("ids_no_special"), "{checkpoint:?}: {text:?}");
        assert_eq!(tokenizer.decode(&ids("ids")).unwrap(), decoded, "{checkpoint:?}");
        // Encoders have no replies to stream.
        if reference["family"] != "bge_m3" {
            assert_eq!(stream(&tokenizer, &ids("ids")), decoded, "{checkpoint:?}");
        }
    }
}

#[test]
fn the_fixtures_tokenizers() {
    for family in ["qwen3", "qwen3_5"] {
        let fixtures = fixtures(family);
        assert!(!fixtures.is_empty());
        fixtures.iter().for_each(|(checkpoint, reference)| check_reference(checkpoint, reference));
    }
}

#[test]
fn all_reference_tokenizers() {
    for family in ["qwen3", "qwen3_5", "gemma4", "bge_m3"] {
        for (checkpoint, reference) in generated_references("all_reference_tokenizers", family).into_iter().flatten() {
            check_reference(&checkpoint, &reference);
        }
    }
}

#[test]
fn the_demo_tokenizer() {
    let tokenizer = &*DEMO;
    assert_eq!((tokenizer.bos, tokenizer.eos_ids()), (None, [2004].as_slice()));
    assert_eq!((tokenizer.token_id("<think>"), tokenizer.token_id("<nope>")), (Some(2007), None));
    assert_eq!(tokenizer.vocab_size(), 2013);
    let prompt = "<|im_start|>user\nHi<|im_end|>\n<think>";
    let ids = tokenizer.encode_rendered(prompt).unwrap();
    assert_eq!((ids[0], ids.last()), (2006, Some(&2007)));
    assert_eq!(tokenizer.encode(prompt).unwrap(), ids);
    // Special tokens have no text, the markers of thinking do.
    assert_eq!(tokenizer.decode(&ids).unwrap(), "user\nHi\n<think>");
    assert_eq!(stream(tokenizer, &ids), "user\nHi\n<think>");
    assert_eq!(stream(tokenizer, &[9_999_999]), "");
}

#[test]
fn half_characters_wait() {
    for tokenizer in [&*DEMO, &WITH_BYTE_TOKENS] {
        for text in ["日本語", "😀👩‍👩‍👧", "é", "naïve 日a😀"] {
            let ids = tokenizer.encode_rendered(text).unwrap();
            let mut decoder = DecodeStream::default();
            let pieces: Vec<String> = ids.iter().map(|&id| decoder.step(tokenizer, id)).collect();
            assert_eq!((pieces.concat().as_str(), decoder.finish().as_str()), (text, ""));
            assert!(pieces.len() > text.chars().count(), "{text} is not made of bytes: {pieces:?}");
        }
        let ids = tokenizer.encode_rendered("日").unwrap();
        let mut decoder = DecodeStream::default();
        assert_eq!(decoder.step(tokenizer, ids[0]), "");
        assert_eq!((decoder.finish().as_str(), decoder.finish().as_str()), ("\u{FFFD}", ""));
        // A character that is broken off does not take the next one with it.
        let a = tokenizer.encode_rendered("a").unwrap();
        assert_eq!(stream(tokenizer, &[&ids[..2], &a].concat()), "\u{FFFD}a");
        assert_eq!(stream(tokenizer, &[&ids[2..], &ids, &ids[..1]].concat()), "\u{FFFD}日\u{FFFD}");
    }
}

#[test]
fn never_a_second_bos() {
    let tokenizer = &*WITH_BYTE_TOKENS;
    assert_eq!((tokenizer.bos, tokenizer.eos_ids().len()), (Some(1), 0));
    assert_eq!(tokenizer.encode("a a").unwrap(), [1, 2, 3, 2]);
    assert_eq!(tokenizer.encode("<bos>a").unwrap(), [1, 2]);
    assert_eq!(tokenizer.encode("").unwrap(), [1]);
    assert_eq!(tokenizer.encode_rendered("<bos>a").unwrap(), [1, 2]);
    assert_eq!(tokenizer.encode_rendered("a").unwrap(), [2]);
    assert_eq!(stream(tokenizer, &[1, 2, 3, 2, 4]), "a a<0x>");
}

#[test]
fn what_is_not_a_tokenizer() {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::Folder(folder.path().to_path_buf());
    let error = || Tokenizer::load(&checkpoint).err().unwrap().to_string();
    assert!(error().contains("tokenizer.json: no such file"), "{}", error());
    for json in
        ["", "{", "[]", "null", r#"{"model": {"type": "BPE"}}"#, r#"{"model": {"vocab": {"a": -1}, "merges": []}}"#]
    {
        std::fs::write(folder.path().join("tokenizer.json"), json).unwrap();
        let expected = format!("tokenizer.json: expected a tokenizer, got {} bytes: ", json.len());
        assert!(error().contains(&expected) && !error().contains('\n'), "{json}: {}", error());
    }
    std::fs::copy(demo().path("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    assert!(Tokenizer::load(&checkpoint).unwrap().eos_ids().is_empty());
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<end>"}"#).unwrap();
    assert!(error().contains(r#"expected the eos_token "<end>" of tokenizer_config.json, got no such token"#));
}

proptest! {
    #![proptest_config(testing::proptest_config())]

    #[test]
    fn a_stream_gives_the_whole_text(text in any::<String>()) {
        for tokenizer in [&*DEMO, &WITH_BYTE_TOKENS] {
            let ids = tokenizer.encode_rendered(&text).unwrap();
            prop_assert_eq!(stream(tokenizer, &ids), tokenizer.decode(&ids).unwrap());
        }
    }

    /// Whatever a model that has lost its way may give, broken characters included.
    #[test]
    fn a_stream_of_any_ids(ids in prop::collection::vec(0u32..2100, 0..40)) {
        let tokenizer = &*DEMO;
        prop_assert_eq!(stream(tokenizer, &ids), tokenizer.decode(&ids).unwrap());
    }
}
