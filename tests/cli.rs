//! The binary as a newcomer meets it: answers on stdout, one clear line on stderr for whatever is wrong.
#![cfg(all(feature = "cli", feature = "demo"))]

mod support;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

fn taper(args: &[&str], stdin: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_taper"))
        .args(args)
        .env("RUST_BACKTRACE", "1")
        .env("HF_ENDPOINT", "http://127.0.0.1:9") // nothing listens there
        .env_remove("HF_HUB_OFFLINE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was just built");
    let _ = child.stdin.take().expect("piped").write_all(stdin); // it may exit before reading
    child.wait_with_output().expect("it runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("output is UTF-8")
}

/// A copy of a fixture's folder that may be damaged.
fn model() -> TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for entry in fs::read_dir(support::fixture("qwen3", "base", 0).join("f32")).expect("a fixture") {
        let entry = entry.expect("a file");
        fs::copy(entry.path(), folder.path().join(entry.file_name())).expect("writable");
    }
    folder
}

fn edit(folder: &Path, file: &str, from: &str, to: &str) {
    let path = folder.join(file);
    let content = fs::read_to_string(&path).expect("text");
    assert!(content.contains(from), "{file} has no {from}");
    fs::write(path, content.replacen(from, to, 1)).expect("writable");
}

/// Runs a chat that must fail with a single line that has all of `expected`.
fn refused(args: &[&str], expected: &[&str]) {
    let output = taper(args, b"");
    let stderr = text(&output.stderr);
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("This is the built-in demo")).collect();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty() && lines.len() == 1 && lines[0].starts_with("taper: "), "{args:?}: {stderr}");
    for part in expected {
        assert!(lines[0].contains(part), "{args:?}: {} lacks {part:?}", lines[0]);
    }
}

#[test]
fn the_first_command_answers() {
    let output = taper(&["chat", "What is the capital of France?"], b"");
    assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(0), "The capital of France is Paris.\n"));
    assert!(text(&output.stderr).lines().next().is_some_and(|line| line.contains("demo") && line.contains("-m ")));
}

#[test]
fn a_pipe_gets_the_answer_alone() {
    let output = taper(&["chat", "--temperature", "0"], b"What is the capital of Italy?\n");
    assert_eq!(text(&output.stdout), "The capital of Italy is Rome.\n");
    let output = taper(&["chat", "--think", "--temperature", "0"], b"What is the capital of France?");
    assert_eq!(text(&output.stdout), "The capital of France is Paris.\n");
}

#[test]
fn json_has_the_reply_in_parts() {
    let output = taper(&["chat", "--json", "--think", "--temperature", "0", "What is the capital of France?"], b"");
    let reply: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(reply["message"]["content"], "The capital of France is Paris.");
    assert_eq!(reply["finish_reason"], "stop");
    assert!(reply["message"]["reasoning_content"].is_string() && reply["usage"]["generated_tokens"].is_u64());
}

#[test]
fn verify_passes_and_dumps() {
    let fixture = support::fixture("qwen3_5", "flat", 0);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let dump = folder.path().join("dump.safetensors");
    let paths = [fixture.join("f32"), fixture.join("reference.safetensors"), dump.clone()];
    let [model, reference, out] = paths.each_ref().map(|path| path.to_str().expect("UTF-8"));
    let output = taper(&["verify", model, reference, "--dump", out], b"");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains(", 0 beyond their limit"));
    let dumped = support::tensors(&dump);
    assert!(dumped.contains_key("short.logits") && dumped.contains_key("short.hidden.0"));
    let wrong = support::fixture("qwen3_5", "flat", 0).join("f32").join("model.safetensors");
    refused(&["verify", model, wrong.to_str().expect("UTF-8")], &["no prompts"]);
}

#[test]
fn info_shows_the_parts() {
    let output = taper(&["info", support::fixture("qwen3_5", "base", 0).join("f32").to_str().expect("UTF-8")], b"");
    let shown = text(&output.stdout);
    for part in ["Qwen3.5", "delta net", "per sequence in f32", "per token in f32", "fits"] {
        assert!(shown.contains(part), "{shown} lacks {part}");
    }
}

#[test]
fn damaged_models_are_refused() {
    type Damage = fn(&Path);
    let cases: [(Damage, &[&str]); 14] = [
        (|m| fs::remove_file(m.join("config.json")).expect("there"), &["config.json", "not a model folder"]),
        (|m| edit(m, "config.json", "\"qwen3\"", "\"llama\""), &["llama", "expected one of qwen3"]),
        (
            |m| edit(m, "config.json", "\"num_attention_heads\": 4", "\"num_attention_heads\": 0"),
            &["num_attention_heads: 0"],
        ),
        (|m| edit(m, "config.json", "1e-06", "NaN"), &["config.json", "line"]),
        (|m| edit(m, "config.json", "\"silu\"", "\"gelu\""), &["hidden_act", "gelu"]),
        (
            |m| edit(m, "config.json", "\"rope_scaling\": null", "\"rope_scaling\": {\"type\": \"yarn\"}"),
            &["rope_scaling", "yarn"],
        ),
        (
            |m| edit(m, "config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2"),
            &["does not use", "model.layers.2"],
        ),
        (
            |m| edit(m, "config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4"),
            &["no tensor model.layers.3"],
        ),
        (
            |m| edit(m, "config.json", "\"intermediate_size\": 96", "\"intermediate_size\": 95"),
            &["gate_proj.weight", "[96, 64]", "[95, 64]"],
        ),
        (|m| fs::write(m.join("model.safetensors"), b"").expect("writable"), &["model.safetensors", "header"]),
        (
            |m| fs::write(m.join("model.safetensors"), [255, 255, 255, 0, 0, 0, 0, 0, b'{']).expect("writable"),
            &["header"],
        ),
        (
            |m| {
                let path = m.join("model.safetensors");
                let bytes = fs::read(&path).expect("there");
                fs::write(path, &bytes[..bytes.len() - 10]).expect("writable");
            },
            &["model.safetensors", "cut short"],
        ),
        (|m| fs::write(m.join("tokenizer.json"), b"").expect("writable"), &["tokenizer.json"]),
        (
            |m| edit(m, "config.json", "\"vocab_size\": 512", "\"vocab_size\": 100"),
            &["tokenizer.json", "embedding has 100"],
        ),
    ];
    for (damage, expected) in cases {
        let model = model();
        damage(model.path());
        refused(&["chat", "-m", model.path().to_str().expect("UTF-8"), "hi"], expected);
    }
}

#[test]
fn bad_templates_are_refused() {
    let cases = [
        ("{{ raise_exception('no user') }}", "no user"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}", "does not end"),
        ("{% if %}", "chat_template.jinja:1"),
    ];
    for (template, expected) in cases {
        let model = model();
        fs::write(model.path().join("chat_template.jinja"), template).expect("writable");
        refused(&["chat", "-m", model.path().to_str().expect("UTF-8"), "hi"], &[expected]);
    }
    let model = model();
    refused(&["chat", "-m", model.path().to_str().expect("UTF-8"), "hi"], &["chat template", "generate"]);
}

#[test]
fn bad_requests_are_refused() {
    let long = "word ".repeat(5000);
    let cases: [(&[&str], &[&str]); 9] = [
        (&["chat", ""], &["prompt is empty"]),
        (&["chat", &long], &["5017 tokens", "context of 2048"]),
        (&["chat", "--temperature", "nan", "hi"], &["temperature", "NaN"]),
        (&["chat", "--top-p", "0", "hi"], &["top_p"]),
        (&["chat", "--memory", "10", "hi"], &["10 bytes"]),
        (&["chat", "-m", "./nowhere", "hi"], &["./nowhere", "no such folder"]),
        (&["chat", "-m", "not an id", "hi"], &["not an id"]),
        (&["chat", "-m", "org/model", "hi"], &["127.0.0.1:9", "--offline"]),
        (&["chat", "-m", "org/model", "--offline", "hi"], &["offline", "org/model"]),
    ];
    for (args, expected) in cases {
        refused(args, expected);
    }
    let output = taper(&["chat", "--temperature", "hot", "hi"], b"");
    assert_eq!(output.status.code(), Some(2));
    let output = taper(&["chat"], b"\xff\xfe");
    assert!(text(&output.stderr).contains("not UTF-8 from byte 0"));
}

#[test]
fn bench_measures_every_combination() {
    let args = "bench --json --prompt 16,24 --decode 4 --depth 0,40 --batch 1,3 --quant none,q8 --threads 1,2 -r 2";
    let output = taper(&args.split(' ').collect::<Vec<_>>(), b"");
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(
        (&report["complete"], &report["family"], &report["device"]),
        (&true.into(), &"Qwen3.5".into(), &"CPU".into())
    );
    let of = |value: &serde_json::Value, name: &str| value[name].as_f64().unwrap_or_else(|| panic!("{value}: {name}"));
    for machine in report["machine"].as_array().expect("a list") {
        let bandwidth = of(&machine["read_bytes_per_second"], "median");
        let flops = of(&machine["multiply_add_flops_per_second"], "median");
        assert!((1e8..1e13).contains(&bandwidth) && (1e8..1e14).contains(&flops), "{machine}");
    }
    let results = report["results"].as_array().expect("a list");
    // Threads, formats, depths, batches, and two prompts and a decode.
    assert_eq!(results.len(), 2 * 2 * 2 * 2 * 3);
    for result in results {
        let (batch, depth) = (of(result, "batch"), of(result, "depth"));
        let tokens = of(result, "tokens_per_sequence") * batch;
        let samples = result["samples"].as_array().expect("a list");
        assert_eq!(samples.len(), 2, "{result}");
        for sample in samples {
            // A depth is found in the cache but for less than a block.
            let slack = if result["test"] == "prompt" && depth > 0.0 { 32.0 * batch } else { 0.0 };
            let ran = of(sample, "tokens");
            assert!((tokens..=tokens + slack).contains(&ran) && of(sample, "seconds") > 0.0, "{result}");
        }
        let rate = of(&result["tokens_per_second"], "median");
        assert!((1.0..1e7).contains(&rate), "{result}");
        let limit = of(result, "limit_tokens_per_second");
        assert!((of(result, "share_of_limit") - rate / limit).abs() < 1e-9 && limit > 100.0, "{result}");
    }
    let limit = |quant: &str, batch: u64| {
        let row = results.iter().find(|it| it["test"] == "decode" && it["quant"] == quant && it["batch"] == batch);
        of(row.expect("measured"), "limit_tokens_per_second")
    };
    assert!(limit("q8", 1) > limit("none", 1) && limit("none", 3) > limit("none", 1));
}

#[test]
fn bench_prints_a_table_and_takes_encoders() {
    let output = taper(&["bench", "-p", "8", "-n", "2", "-r", "1"], b"");
    let table = text(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    for part in ["prompt 8", "decode 2", "GB/s", "of limit"] {
        assert!(table.contains(part), "{table}");
    }
    let encoder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/demo/embed");
    let output = taper(&["bench", encoder, "-p", "8", "-b", "2", "-r", "1", "--json"], b"");
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let results = report["results"].as_array().expect("a list");
    assert_eq!(
        (results.len(), &results[0]["test"], &results[0]["samples"][0]["tokens"]),
        (1, &"encode".into(), &16.into())
    );
}

#[test]
fn bench_refuses_what_cannot_be_measured() {
    refused(&["bench", "--prompt", "100000"], &["100002", "context"]);
    refused(&["bench", "--depth", "18446744073709551615"], &["context"]);
    refused(&["bench", "--prompt", "0", "--decode", "0"], &["no test"]);
    for name in ["--batch", "--threads", "--repetitions"] {
        refused(&["bench", name, "0"], &[name, "1 or more"]);
    }
    refused(&["bench", "--batch", "100000"], &["--batch", "at most"]);
    refused(&["bench", "/no/such/folder"], &["/no/such/folder"]);
}
