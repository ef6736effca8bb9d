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
    write(&folder, "empty.csv", "");
    write(&folder, "binary.csv", b"\x00\x1b[31m\x07,\r\n\"\n");
    write(&folder, "empty.npy", "");
    fs::create_dir(folder.path().join("folder.jsonl")).expect("writable");
    let cases: [(&[&str], &str); 13] = [
        (&["-i", "nowhere.txt"], "nowhere.txt"),
        (&["-i", "*.dat"], "no file has such a name"),
        (&["-i", "a.csv"], "a.csv:1: no column \"text\", only id, body"),
        (&["-i", "a.parquet"], "a.parquet"),
        (&["-i", "a.txt", "-o", "o.bin"], "expected .jsonl, .npy or .parquet"),
        (&["-i", "a.txt", "-o", "o.npy", "--heads", "dense,sparse"], "dense vectors alone"),
        (&["-i", "a.txt", "--dim", "64"], "not trained"),
        (&["-i", "a.txt", "--max-length", "1000"], "the model's 512"),
        (&["-i", "a.txt", "-o", "nowhere/o.jsonl"], "nowhere/o.jsonl"),
        (&["-i", "empty.csv"], "empty.csv: empty, expected a line with the columns' names"),
        (&["-i", "binary.csv"], "no column \"text\", only \\0\\u{1b}[31m\\u{7}, "),
        (&["-i", "folder.jsonl"], "is a folder: name its files"),
        (&["-i", "a.txt", "-o", "folder.jsonl"], "is a folder, expected a file to write"),
    ];
    for (args, expected) in cases {
        let error = failure(folder.path(), &[&["embed"], args].concat());
        assert!(error.starts_with("taper: ") && error.contains(expected), "{args:?}: {error} lacks {expected}");
    }
    assert!(failure(folder.path(), &["search", "empty.npy", "one"]).contains("empty.npy: cut short"));
    assert!(output(folder.path(), &["embed"], b"").1.contains("there was nothing to embed"));
    assert_eq!(run(folder.path(), &["embed", "one", "--save-every", "nan"], b"").status.code(), Some(2));
    output(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl"], b"");
    assert!(failure(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl"]).contains("--overwrite"));
    output(folder.path(), &["embed", "-i", "a.txt", "-o", "o.jsonl", "--overwrite"], b"");
}

/// The end of a run, cut short after each of its steps: the same command ends it, or finds it ended, and tidies up.
#[test]
fn the_end_of_a_run_may_be_cut_short() {
    let folder = folder();
    write(&folder, "a.txt", "one\ntwo\n");
    for file in ["o.jsonl", "o.npy", "o.parquet"] {
        let path = |suffix: &str| folder.path().join(format!("{file}{suffix}"));
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).expect("there").map(|entry| entry.expect("readable").file_name());
            let mut names: Vec<String> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        let args = ["embed", "-i", "a.txt", "-o", file, "--save-every", "0"];
        output(folder.path(), &args, b"");
        let (whole, before) = (fs::read(path("")).expect("written"), names(folder.path()));
        let remove = || {
            before.iter().filter(|name| name.starts_with(file)).for_each(|name| {
                fs::remove_file(folder.path().join(name)).expect("there");
            })
        };
        remove();
        // A folder in the way of the joined file stops the run when all parts are closed.
        fs::create_dir(path(".partial")).expect("writable");
        assert!(failure(folder.path(), &args).contains(".partial"));
        fs::remove_dir(path(".partial")).expect("empty");
        let parts: Vec<(String, Vec<u8>)> = names(&path(".parts"))
            .into_iter()
            .map(|name| (name.clone(), fs::read(path(".parts").join(name)).expect("a part")))
            .collect();
        fs::remove_dir_all(path(".parts")).expect("there");
        assert!(parts.len() >= 3, "{parts:?}"); // part, manifest, lock
        let is_pending = |name: &str| name == "manifest.json";
        // What a kill leaves: the joined file half written or whole, and of the folder everything, everything but the
        // manifest, fewer files yet, or the empty folder.
        for (is_joined, kept) in [(false, parts.len()), (true, parts.len()), (true, 2), (true, 1), (true, 0)] {
            let left = parts.iter().filter(|(name, _)| kept == parts.len() || !is_pending(name)).take(kept);
            fs::create_dir(path(".parts")).expect("writable");
            left.for_each(|(name, bytes)| fs::write(path(".parts").join(name), bytes).expect("writable"));
            fs::write(path(if is_joined { "" } else { ".partial" }), if is_joined { &whole[..] } else { b"half" })
                .expect("writable");
            if is_joined && file == "o.npy" {
                fs::write(path(".ids.jsonl"), "0\n1\n").expect("writable");
            }
            let place = format!("{file}: joined {is_joined}, {kept} files left");
            if kept == parts.len() {
                output(folder.path(), &args, b"");
            } else {
                assert!(failure(folder.path(), &args).contains("exists: --overwrite replaces it"), "{place}");
            }
            assert_eq!(names(folder.path()), before, "{place}");
            assert!(fs::read(path("")).expect("written") == whole, "{place}");
            remove();
        }
        // A folder with the name of a part stops the run while it tidies up: the manifest is gone by then.
        fs::create_dir_all(path(".parts").join("999999")).expect("writable");
        assert!(failure(folder.path(), &args).contains(".parts"));
        assert!(fs::read(path("")).expect("written") == whole && !path(".parts").join("manifest.json").exists());
        fs::remove_dir(path(".parts").join("999999")).expect("empty");
        assert!(failure(folder.path(), &args).contains("exists: --overwrite replaces it"));
        assert_eq!(names(folder.path()), before);
        remove();
        // Files of others in the folder stay.
        fs::create_dir(path(".parts")).expect("writable");
        fs::write(path(".parts").join("notes"), "mine").expect("writable");
        output(folder.path(), &args, b"");
        assert_eq!(names(&path(".parts")), ["notes"]);
        fs::remove_dir_all(path(".parts")).expect("there");
        remove();
    }
}

#[test]
fn one_run_at_a_time_writes_an_output() {
    let folder = folder();
    let args = ["embed", "-o", "o.jsonl"];
    let mut first = command(folder.path(), &args).stdin(Stdio::piped()).stderr(Stdio::null()).spawn().expect("it runs");
    while !folder.path().join("o.jsonl.parts/lock").exists() {
        assert!(first.try_wait().expect("it runs").is_none(), "it waits for its input");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(50)); // from making the file to locking it
    assert!(failure(folder.path(), &args).contains("another run writes this output"));
    assert!(failure(folder.path(), &[&args[..], &["--overwrite"]].concat()).contains("another run"));
    first.stdin.take().expect("piped").write_all(b"one\n").expect("it reads");
    assert!(first.wait().expect("it ends").success());
    assert_eq!(lines(&fs::read_to_string(folder.path().join("o.jsonl")).expect("written")).len(), 1);
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
