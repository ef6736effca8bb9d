//! `taper info` of a model that stays at the Hub: the headers of its weights say what it takes.
#![cfg(feature = "cli")]

use std::{fs, process::Command};

use serde_json::Value;

use super::server::{ID, Repo};
use super::{Cache, support};

fn info(model: &str, endpoint: &str, cache: &Cache) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_taper"))
        .args(["info", "--json", model])
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HUB_CACHE", cache.0.path())
        .env_remove("HF_HUB_OFFLINE")
        .output()
        .expect("the binary was just built");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

#[test]
fn shards_are_added_up_before_the_download() {
    let fixture = support::fixture("qwen3_5_moe", "base", 4).join("f32");
    let sharded = support::derive_sharded(&fixture, 3);
    let mut repo = Repo::new().without("model.safetensors");
    for entry in fs::read_dir(sharded.path()).expect("derived").map(|entry| entry.expect("a file")) {
        repo = repo.with(&entry.file_name().into_string().expect("UTF-8"), fs::read(entry.path()).expect("a file"));
    }
    let (server, cache) = (repo.start(), Cache::new());
    let (remote, local) = (info(ID, &server.url(), &cache), info(fixture.to_str().expect("UTF-8"), "", &cache));
    assert!(cache.files().iter().all(|file| !file.ends_with(".safetensors")), "{:?}", cache.files());
    for field in ["parameters", "active_parameters", "bytes_by_part", "packed_bytes", "weight_bytes"] {
        assert!(!local[field].is_null());
        assert_eq!(remote[field], local[field], "{field}");
    }
    let (all, active) = (local["parameters"].as_u64(), local["active_parameters"].as_u64());
    // Three of eight experts in four layers, and a head beside the embedding.
    let spared = 4 * 5 * 3 * 16 * 48 + 512 * 48;
    assert_eq!(active.map(|active| active + spared), all);
}
