//! `taper embed`: texts from arguments, stdin and files of any size to vectors in a file or on stdout.

mod bar;
pub mod model;
mod parts;
mod read;
mod write;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::ValueEnum;
use serde_json::{Value, json};
use taper::{Embedder, Heads};

use self::bar::Bar;
use self::model::{EncoderArgs, parse_heads, prompt};
use self::parts::{Parts, Progress};
use self::read::{Fields, Input, InputFormat, Row, Rows};
use self::write::{OutputFormat, Record, Shape, write_line};
use super::{Error, Result};

pub use self::write::ids_file;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Texts to embed; without these and without --input, every line of stdin
    texts: Vec<String>,
    /// File to read, .txt, .jsonl, .csv or .parquet, or a pattern such as 'data/*.jsonl'; - is stdin; may be repeated
    #[arg(short, long, value_name = "FILE", num_args = 1.., help_heading = "Input")]
    input: Vec<String>,
    /// What the inputs are, if their names do not say
    #[arg(long, value_enum, help_heading = "Input")]
    format: Option<InputFormat>,
    /// Field or column with the text
    #[arg(long, value_name = "NAME", default_value = "text", help_heading = "Input")]
    field: String,
    /// Field or column with the id [default: id if there is one, else the row's number from 0]
    #[arg(long, value_name = "NAME", help_heading = "Input")]
    id: Option<String>,
    /// What to do about a row that is not UTF-8, has no text or is otherwise broken
    #[arg(long, value_enum, default_value = "fail", help_heading = "Input")]
    on_error: OnError,
    /// File to write, .jsonl, .npy or .parquet [default: JSON lines on stdout]
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    output: Option<PathBuf>,
    /// Begin anew even if the output or parts of it are there
    #[arg(long, help_heading = "Output")]
    overwrite: bool,
    /// Seconds of work that an interruption may cost: how often what is done is brought to the disk
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "10", help_heading = "Output")]
    save_every: f64,
    /// Keep the texts beside their vectors, in .jsonl and .parquet
    #[arg(long, help_heading = "Output")]
    keep_text: bool,
    /// Some of dense,sparse,colbert
    #[arg(long, value_parser = parse_heads, default_value = "dense", help_heading = "Output")]
    heads: Heads,
    /// Whether dense vectors have length one
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set, help_heading = "Output")]
    normalize: bool,
    /// Text to put before each, or the name of a prompt of the model, such as query
    #[arg(long, value_name = "TEXT", help_heading = "Model")]
    prompt: Option<String>,
    #[command(flatten)]
    model: EncoderArgs,
}

/// The values of `--on-error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum OnError {
    Fail,
    Skip,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let inputs = inputs(args)?;
    let bytes = inputs.iter().map(size).sum::<Option<u64>>();
    let rows = Rows::new(inputs.clone(), args.format, Fields { text: args.field.clone(), id: args.id.clone() })?;
    let format = args.output.as_deref().map(OutputFormat::of).transpose()?;
    if format == Some(OutputFormat::Npy) && (args.heads != Heads::DENSE || args.keep_text) {
        return Err(Error::Usage(".npy holds dense vectors alone: write .jsonl or .parquet".into()));
    }
    let (embedder, model) = args.model.load(Some(args.heads), args.normalize)?;
    let prompt = args.prompt.as_deref().map_or(String::new(), |name| prompt(&embedder, name));
    let parts = match (&args.output, format) {
        (Some(output), Some(format)) => {
            let shape = Shape { heads: args.heads, dense_size: embedder.dense_size(), keep_text: args.keep_text };
            let command = command(args, model, &prompt, &inputs);
            Some(Parts::open(output, format, shape, command, args.overwrite)?)
        }
        _ => None,
    };
    let bar = Bar::new(bytes, rows.bytes_read());
    let run = Run { args, embedder, prompt, rows, parts, bar, progress: Progress::default() };
    run.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// What the output depends on. Batches are left out, because results do not depend on them.
fn command(args: &Args, model: Value, prompt: &str, inputs: &[Input]) -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model,
        "heads": format!("{:?}", args.heads),
        "normalize": args.normalize,
        "prompt": prompt,
        "keep_text": args.keep_text,
        "inputs": inputs.iter().map(|input| json!([format!("{input:?}"), size(input)])).collect::<Vec<_>>(),
        "format": format!("{:?}", args.format),
        "field": args.field,
        "id": args.id,
    })
}

fn inputs(args: &Args) -> Result<Vec<Input>> {
    let mut inputs = vec![];
    if !args.texts.is_empty() {
        inputs.push(Input::Arguments(args.texts.clone()));
    }
    for name in &args.input {
        let is_pattern = name.contains(['*', '?', '[']) && !Path::new(name).exists();
        match name.as_str() {
            "-" => inputs.push(Input::Stdin),
            pattern if is_pattern => {
                let paths = glob::glob(pattern).map_err(|error| Error::Usage(format!("{pattern}: {error}")))?;
                let before = inputs.len();
                for path in paths {
                    inputs.push(Input::File(path.map_err(|error| Error::Io(error.into()))?));
                }
                if inputs.len() == before {
                    return Err(Error::Usage(format!("{pattern}: no file has such a name")));
                }
            }
            folder if Path::new(folder).is_dir() => {
                return Err(Error::Usage(format!("{folder} is a folder: name its files, such as '{folder}/*.jsonl'")));
            }
            file => inputs.push(Input::File(file.into())),
        }
    }
    if inputs.is_empty() {
        inputs.push(Input::Stdin);
    }
    Ok(inputs)
}

fn parse_seconds(text: &str) -> std::result::Result<f64, String> {
    match text.parse() {
        Ok(seconds) if seconds >= 0.0 => Ok(seconds),
        _ => Err("expected a number of seconds".into()),
    }
}

/// Bytes, where they are known beforehand.
fn size(input: &Input) -> Option<u64> {
    match input {
        Input::File(path) => std::fs::metadata(path).ok().map(|metadata| metadata.len()),
        Input::Arguments(_) => Some(0),
        Input::Stdin => None,
    }
}

struct Run<'a> {
    args: &'a Args,
    embedder: Embedder,
    prompt: String,
    rows: Rows,
    /// Of the output, if that is a file and not stdout.
    parts: Option<Parts>,
    bar: Bar,
    progress: Progress,
}

/// Rows that are read, embedded and written at once: at most so many, and not many more bytes of text. Windows depend
/// on the input alone, so that a file's row groups do, wherever runs began and ended.
const WINDOW_ROWS: usize = 4096;
const WINDOW_BYTES: usize = 128 << 10;

impl Run<'_> {
    fn finish(mut self) -> Result<()> {
        if let Some(parts) = &self.parts {
            self.progress = parts.progress().clone();
            for _ in 0..self.progress.read {
                self.rows.next()?;
            }
            self.bar.resume(&self.progress);
        }
        let mut saved = Instant::now();
        loop {
            let window = self.window()?;
            let is_last = window.is_empty();
            self.embed(window)?;
            if let Some(parts) = &mut self.parts
                && (is_last || saved.elapsed().as_secs_f64() >= self.args.save_every)
            {
                parts.close_part(&self.progress)?;
                saved = Instant::now();
            }
            if is_last {
                break;
            }
        }
        self.bar.finish(&self.progress);
        self.report();
        self.parts.map_or(Ok(()), Parts::finish)
    }

    /// The next rows; none after the last.
    fn window(&mut self) -> Result<Vec<Row>> {
        let (mut window, mut bytes) = (vec![], 0);
        while window.len() < WINDOW_ROWS && bytes < WINDOW_BYTES {
            match self.rows.next()? {
                None => break,
                Some(Ok(row)) => {
                    bytes += row.text.len();
                    window.push(row);
                }
                Some(Err(fault)) if self.args.on_error == OnError::Skip => {
                    self.progress.skipped += 1;
                    self.bar.say(&format!("taper: skipped {fault}"));
                }
                Some(Err(fault)) => return Err(Error::Usage(format!("{fault} (--on-error skip goes on without it)"))),
            }
            self.progress.read += 1;
        }
        Ok(window)
    }

    fn embed(&mut self, window: Vec<Row>) -> Result<()> {
        let texts: Vec<&str> = window.iter().map(|row| row.text.as_str()).collect();
        let embeddings = self.embedder.embed_parallel(&self.prompt, &texts)?;
        for (row, embedding) in window.iter().zip(&embeddings) {
            self.progress.written += 1;
            self.progress.tokens += embedding.tokens as u64;
            if embedding.truncated > 0 {
                self.progress.truncated += 1;
                self.progress.first_truncated.get_or_insert_with(|| row.place.clone());
            }
        }
        let text = |text: String| self.args.keep_text.then_some(text);
        let heads = self.args.heads;
        let records = window.into_iter().zip(embeddings);
        let records: Vec<Record> =
            records.map(|(row, embedding)| Record { id: row.id, text: text(row.text), heads, embedding }).collect();
        match &mut self.parts {
            _ if records.is_empty() => {}
            Some(parts) => parts.write(&records)?,
            None => {
                let mut out = io::BufWriter::new(io::stdout().lock());
                records.iter().try_for_each(|record| write_line(&mut out, record))?;
                out.flush()?;
            }
        }
        self.bar.show(&self.progress);
        Ok(())
    }

    /// Says what did not go as one might think.
    fn report(&self) {
        let Progress { read, written, skipped, truncated, first_truncated, .. } = &self.progress;
        if let Some(first) = first_truncated {
            let limit = self.embedder.max_tokens();
            eprintln!("taper: {truncated} of {written} texts were cut to {limit} tokens, the first at {first}");
        }
        if *read == 0 {
            eprintln!("taper: there was nothing to embed");
        }
        if *skipped > 0 {
            eprintln!("taper: {skipped} of {read} rows were skipped");
        }
    }
}
