//! `taper embed` and `taper search` as they are used: every input and output, broken rows, runs that are killed.
#![cfg(all(feature = "cli", feature = "demo"))]

mod support;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use taper::{Embedder, EmbedderOptions, Embedding};
use tempfile::TempDir;

fn command(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_taper"));
    command.args(args).current_dir(folder).env("HF_ENDPOINT", "http://127.0.0.1:9"); // nothing listens there
    command
}

fn run(folder: &Path, args: &[&str], stdin: &[u8]) -> Output {
    let mut child = command(folder, args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary was just built");
    let _ = child.stdin.take().expect("piped").write_all(stdin); // it may exit before reading
    child.wait_with_output().expect("it runs")
}

/// What it prints, after success.
fn output(folder: &Path, args: &[&str], stdin: &[u8]) -> (String, String) {
    let output = run(folder, args, stdin);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(output.status.success(), "{args:?}: {err}");
    (out, err)
}

/// The one line that it fails with.
fn failure(folder: &Path, args: &[&str]) -> String {
    let output = run(folder, args, b"");
    let text = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    text.lines().last().unwrap_or_default().to_string()
}

fn folder() -> TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn write(folder: &TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = folder.path().join(name);
    fs::write(&path, content).expect("writable");
    path
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

fn embed(texts: &[&str]) -> Vec<Embedding> {
    Embedder::demo(&EmbedderOptions::default()).expect("built in").embed(texts).expect("embeds")
}

fn dense(line: &Value) -> Vec<f32> {
    line["dense"].as_array().expect("dense").iter().map(|value| value.as_f64().expect("a number") as f32).collect()
}

const TEXTS: [&str; 3] = ["Paris is the capital of France.", "a, \"quoted\" text", "Norway"];

#[test]
fn the_first_command_embeds() {
    let folder = folder();
    let (out, err) = output(folder.path(), &["embed"], b"What is the capital of France?\n");
    let got = lines(&out);
    assert_eq!((got.len(), &got[0]["id"]), (1, &json!(0)));
    assert_eq!(dense(&got[0]), embed(&["What is the capital of France?"])[0].dense);
    assert!(err.contains("demo") && err.contains("-m BAAI/bge-m3"), "{err}");
    let (out, _) = output(folder.path(), &["embed", TEXTS[0], TEXTS[2], "--keep-text"], b"");
    let got = lines(&out);
    assert_eq!((got[1]["id"].clone(), got[1]["text"].clone()), (json!(1), json!("Norway")));
    let (out, _) = output(folder.path(), &["embed", "--heads", "sparse,colbert", TEXTS[0]], b"");
    let (got, want) = (&lines(&out)[0], &embed(&TEXTS[..1])[0]);
    assert!(got.get("dense").is_none());
    assert_eq!(got["sparse"].as_object().expect("an object").len(), want.sparse.len());
    assert_eq!(got["colbert"].as_array().expect("an array").len(), want.colbert.len());
}

#[test]
fn every_input_gives_the_same() {
    let folder = folder();
    write(&folder, "a.txt", TEXTS.join("\r\n"));
    let line = |(id, text): (usize, &&str)| json!({ "key": format!("k{id}"), "body": text }).to_string();
    write(&folder, "b.jsonl", TEXTS.iter().enumerate().map(line).collect::<Vec<_>>().join("\n\n"));
    let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
    let rows: String = TEXTS.iter().enumerate().map(|(id, text)| format!("k{id},{}\n", quoted(text))).collect();
    write(&folder, "c.csv", format!("key,body\n{rows}"));
    let fields = ["--field", "body", "--id", "key"];
    let (text, _) = output(folder.path(), &["embed", "-i", "a.txt"], b"");
    let (stdin, _) = output(folder.path(), &["embed", "-i", "-"], TEXTS.join("\n").as_bytes());
    let (json_lines, _) = output(folder.path(), &[&["embed", "-i", "b.jsonl"], &fields[..]].concat(), b"");
    let (csv, _) = output(folder.path(), &[&["embed", "-i", "c.csv"], &fields[..]].concat(), b"");
    assert_eq!(text, stdin);
    assert_eq!(json_lines, csv);
    // What embed writes to parquet, it reads from there.
    output(folder.path(), &[&["embed", "--keep-text", "-i", "c.csv", "-o", "d.parquet"], &fields[..]].concat(), b"");
    let (parquet, _) = output(folder.path(), &["embed", "-i", "d.parquet"], b"");
    assert_eq!(parquet, csv);
    let want: Vec<Vec<f32>> = embed(&TEXTS).into_iter().map(|embedding| embedding.dense).collect();
    for (format, out) in [("txt", &text), ("csv", &csv)] {
        assert_eq!(lines(out).iter().map(dense).collect::<Vec<_>>(), want, "{format}");
    }
    assert_eq!(lines(&csv)[2]["id"], "k2");
    // Patterns are sorted, and rows are numbered on.
    write(&folder, "e1.txt", "one\n");
    write(&folder, "e2.txt", "two\n");
    let (out, _) = output(folder.path(), &["embed", "-i", "e?.txt", "a.txt", "--keep-text"], b"");
    let texts: Vec<Value> = lines(&out).iter().map(|line| line["text"].clone()).collect();
    assert_eq!(texts[..3], [json!("one"), json!("two"), json!(TEXTS[0])]);
    assert_eq!(lines(&out)[4]["id"], 4);
}

#[test]
fn every_output_has_the_same() {
    let folder = folder();
    write(&folder, "a.txt", TEXTS.join("\n"));
    let heads = ["--heads", "dense,sparse,colbert"];
    for file in ["o.jsonl", "o.parquet"] {
        output(folder.path(), &[&["embed", "-i", "a.txt", "-o", file], &heads[..]].concat(), b"");
    }
    output(folder.path(), &["embed", "-i", "a.txt", "-o", "o.npy"], b"");
    let want = embed(&TEXTS);
    let array = fs::read(folder.path().join("o.npy")).expect("written");
    let header = String::from_utf8_lossy(&array[10..128]).into_owned();
    assert!(array.starts_with(b"\x93NUMPY\x01\x00") && header.contains("'<f4'") && header.contains("(3, 128)"));
    assert_eq!(u16::from_le_bytes([array[8], array[9]]), 118);
    let values: Vec<f32> = array[128..].as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert_eq!(values, want.iter().flat_map(|embedding| embedding.dense.clone()).collect::<Vec<_>>());
    assert_eq!(fs::read_to_string(folder.path().join("o.npy.ids.jsonl")).expect("written"), "0\n1\n2\n");
    // All of them are searched with the same scores.
    let search = |file: &str, weights: &str| {
        let args = ["search", file, "Paris is the capital", "--json", "-k", "3", "--weights", weights];
        let found = lines(&output(folder.path(), &args, b"").0);
        found
            .iter()
            .map(|line| (line["id"].to_string().replace('"', ""), line["score"].as_f64().map(|s| s as f32)))
            .collect::<Vec<_>>()
    };
    let query = &embed(&["Paris is the capital"])[0];
    let scores = want.iter().map(|passage| taper::embedding::score(query, passage, Default::default()).hybrid);
    let best = taper::embedding::top_k(scores, 3);
    let best: Vec<_> = best.into_iter().map(|(index, score)| (index.to_string(), Some(score))).collect();
    assert_eq!(search("o.jsonl", "1,0.3,1"), best);
    assert_eq!(search("o.parquet", "1,0.3,1"), best);
    assert_eq!(search("o.npy", "1,0.3,1"), search("o.parquet", "1,0,0"));
    assert!(failure(folder.path(), &["search", "o.npy", "x", "--weights", "0,1,0"]).contains("no head"));
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 5, "nothing but input and outputs is left");
}

#[test]
fn broken_rows_are_named() {
    let folder = folder();
    write(&folder, "bad.jsonl", b"{\"text\": \"good\"}\n{\"text\": null}\n{\"other\": 1}\n{\"text\": \"\xff\"}\n[]\n{\"te\n{\"text\": 5}\n{\"text\": \"good\"}\n");
    write(&folder, "bad.txt", b"good\n\xfe\n");
    write(&folder, "bad.csv", "id,text\n1,\"two\nlines\"\n2\n3,good\n");
    assert!(failure(folder.path(), &["embed", "-i", "bad.jsonl"]).contains("bad.jsonl:2: field \"text\" is null"));
    assert!(failure(folder.path(), &["embed", "-i", "bad.txt"]).contains("bad.txt:2: not UTF-8 from byte 0"));
    assert!(failure(folder.path(), &["embed", "-i", "bad.csv"]).contains("bad.csv:4: 1 fields, expected 2"));
    let skip = ["--on-error", "skip", "-i", "bad.jsonl", "bad.txt", "bad.csv"];
    let (out, err) = output(folder.path(), &[&["embed", "-o", "o.jsonl"], &skip[..]].concat(), b"");
    assert!(out.is_empty());
    let got = lines(&fs::read_to_string(folder.path().join("o.jsonl")).expect("written"));
    let ids: Vec<Value> = got.into_iter().map(|mut line| line["id"].take()).collect();
    assert_eq!(ids, [json!(0), json!(7), json!(8), json!("1"), json!("3")]);
    for place in [
        "bad.jsonl:3: no field",
        "bad.jsonl:4: not UTF-8",
        "bad.jsonl:5: expected a JSON object",
        "bad.jsonl:6: not JSON",
        "bad.jsonl:7: field \"text\" is not a string",
        "8 of 13 rows were skipped",
    ] {
        assert!(err.contains(place), "{err} lacks {place}");
    }
}

#[test]
fn what_is_cut_off_is_said() {
    let folder = folder();
    write(&folder, "a.txt", format!("short\n{}\n", "long ".repeat(50)));
    let (out, err) = output(folder.path(), &["embed", "-i", "a.txt", "--max-length", "20"], b"");
    assert!(err.contains("1 of 2 texts were cut to 20 tokens, the first at a.txt:2"), "{err}");
    assert!(lines(&out)[0].get("truncated_tokens").is_none() && lines(&out)[1]["truncated_tokens"].as_u64() > Some(20));
}

#[test]
fn mistakes_are_refused() {
    let folder = folder();
    write(&folder, "a.txt", "one\n");
    write(&folder, "a.csv", "id,body\n1,one\n");
    write(&folder, "a.parquet", "not parquet");
    let cases: [(&[&str], &str); 9] = [
        (&["-i", "nowhere.txt"], "nowhere.txt"),
        (&["-i", "*.dat"], "no file has such a name"),
        (&["-i", "a.csv"], "a.csv:1: no column \"text\", only id, body"),
        (&["-i", "a.parquet"], "a.parquet"),
        (&["-i", "a.txt", "-o", "o.bin"], "expected .jsonl, .npy or .parquet"),
        (&["-i", "a.txt", "-o", "o.npy", "--heads", "dense,sparse"], "dense vectors alone"),
        (&["-i", "a.txt", "--dim", "64"], "not trained"),
        (&["-i", "a.txt", "--max-length", "1000"], "the model's 512"),
        (&["-i", "a.txt", "-o", "nowhere/o.jsonl"], "nowhere/o.jsonl"),
    ];
    for (args, expected) in cases {
        let error = failure(folder.path(), &[&["embed"], args].concat());
        assert!(error.starts_with("taper: ") && error.contains(expected), "{args:?}: {error} lacks {expected}");
    }
    output(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl"], b"");
    assert!(failure(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl"]).contains("--overwrite"));
    output(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl", "--overwrite"], b"");
}

/// Killed twice, and once more between parts of another command: the same bytes as a run in one piece.
#[test]
fn a_killed_run_goes_on() {
    let folder = folder();
    let texts: String = (0..17_000).map(|i| format!("{}\n", i % 977)).collect();
    write(&folder, "a.txt", texts);
    for file in ["o.parquet", "o.npy"] {
        let args = ["embed", "-i", "a.txt", "-o", file, "--max-length", "4", "--save-every", "0"];
        let manifest = folder.path().join(format!("{file}.parts/manifest.json"));
        let parts = || match fs::read(&manifest) {
            Ok(bytes) => {
                serde_json::from_slice::<Value>(&bytes).expect("whole")["parts"].as_array().expect("parts").len()
            }
            Err(_) => 0,
        };
        for stop in [1, 2] {
            let mut child = command(folder.path(), &args).stderr(Stdio::null()).spawn().expect("it runs");
            while parts() < stop && child.try_wait().expect("it runs").is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
            child.kill().expect("it runs"); // SIGKILL
            child.wait().expect("it ends");
            assert_eq!(parts(), stop, "{file}: killed too late to test anything");
        }
        let other = [&args[..], &["--normalize", "false"]].concat();
        assert!(failure(folder.path(), &other).contains("parts of another command"));
        let (_, err) = output(folder.path(), &args, b"");
        assert!(err.contains("goes on after"), "{err}");
        let resumed = fs::read(folder.path().join(file)).expect("written");
        output(folder.path(), &[&args[..], &["--overwrite"]].concat(), b"");
        assert!(resumed == fs::read(folder.path().join(file)).expect("written"), "{file} differs");
    }
}
