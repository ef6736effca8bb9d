//! Texts from files, stdin and arguments, one row at a time: memory does not grow with the input.

mod csv;
mod jsonl;
mod parquet;
mod txt;

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use clap::ValueEnum;
use serde_json::Value;

use super::super::{Error, Result};

/// How an input is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    /// A text a line
    Txt,
    /// A JSON object a line
    Jsonl,
    /// Comma-separated with a line of names
    Csv,
    Parquet,
}

/// Which parts of a row are the text and its id.
#[derive(Clone, Debug)]
pub struct Fields {
    pub text: String,
    /// `None`: the field `id` where there is one, else the row's number.
    pub id: Option<String>,
}

impl Fields {
    fn id_name(&self) -> &str {
        self.id.as_deref().unwrap_or("id")
    }
}

/// A text to embed.
#[derive(Clone, Debug)]
pub struct Row {
    /// A string or a number.
    pub id: Value,
    pub text: String,
    /// Where it comes from, for messages.
    pub place: String,
}

/// A row of one input: its place there, and what it holds or why it holds nothing.
struct Item {
    place: u64,
    content: std::result::Result<Content, String>,
}

struct Content {
    id: Option<Value>,
    text: String,
}

type Items = Box<dyn Iterator<Item = Result<Item>>>;

/// The rows of all inputs.
pub struct Rows {
    inputs: VecDeque<(Input, Option<InputFormat>)>,
    fields: Fields,
    current: Option<(String, Items)>,
    number: u64,
    read: Arc<AtomicU64>,
}

/// Where rows come from.
#[derive(Clone, Debug)]
pub enum Input {
    File(PathBuf),
    Stdin,
    Arguments(Vec<String>),
}

/// A row, or a message with its place about one that is none.
pub type RowOrFault = std::result::Result<Row, String>;

impl Rows {
    pub fn new(inputs: Vec<Input>, format: Option<InputFormat>, fields: Fields) -> Result<Self> {
        for input in &inputs {
            if let Input::File(path) = input {
                format_of(path, format)?;
            }
        }
        let inputs = inputs.into_iter().map(|input| (input, format)).collect();
        Ok(Self { inputs, fields, current: None, number: 0, read: Arc::default() })
    }

    /// Bytes of input read so far, shared with who shows them.
    pub fn bytes_read(&self) -> Arc<AtomicU64> {
        self.read.clone()
    }

    /// The next row or fault; `None` after the last input.
    pub fn next(&mut self) -> Result<Option<RowOrFault>> {
        loop {
            if let Some((name, items)) = &mut self.current {
                if let Some(item) = items.next() {
                    let number = self.number;
                    self.number += 1;
                    let Item { place, content } = item?;
                    let place = format!("{name}:{place}");
                    return Ok(Some(match content {
                        Ok(Content { id, text }) => Ok(Row { id: id.unwrap_or_else(|| number.into()), text, place }),
                        Err(message) => Err(format!("{place}: {message}")),
                    }));
                }
                self.current = None;
            }
            let Some((input, format)) = self.inputs.pop_front() else { return Ok(None) };
            self.current = Some(self.open(input, format)?);
        }
    }

    fn open(&self, input: Input, format: Option<InputFormat>) -> Result<(String, Items)> {
        let (name, format, source): (_, _, Box<dyn Read>) = match input {
            Input::Arguments(texts) => {
                let items =
                    (1..).zip(texts).map(|(place, text)| Ok(Item { place, content: Ok(Content { id: None, text }) }));
                return Ok(("argument".into(), Box::new(items)));
            }
            Input::Stdin => ("stdin".to_string(), format.unwrap_or(InputFormat::Txt), Box::new(io::stdin())),
            Input::File(path) => {
                let format = format_of(&path, format)?;
                let file = File::open(&path).map_err(at(&path))?;
                if format == InputFormat::Parquet {
                    let name = path.display().to_string();
                    return Ok((name, parquet::rows(&path, file, &self.fields, self.read.clone())?));
                }
                (path.display().to_string(), format, Box::new(file))
            }
        };
        let source = Lines::new(&name, Counted { source, read: self.read.clone() });
        let items: Items = match format {
            InputFormat::Txt => Box::new(txt::rows(source)),
            InputFormat::Jsonl => Box::new(jsonl::rows(source, self.fields.clone())),
            InputFormat::Csv => Box::new(csv::rows(source, &self.fields)?),
            InputFormat::Parquet => return Err(Error::Usage("parquet is read from files, not from stdin".into())),
        };
        Ok((name, items))
    }
}

/// The format that is asked for, or that the file's name ends in.
fn format_of(path: &Path, format: Option<InputFormat>) -> Result<InputFormat> {
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match (format, extension) {
        (Some(format), _) => Ok(format),
        (None, "txt") => Ok(InputFormat::Txt),
        (None, "jsonl" | "ndjson") => Ok(InputFormat::Jsonl),
        (None, "csv") => Ok(InputFormat::Csv),
        (None, "parquet") => Ok(InputFormat::Parquet),
        (None, _) => Err(Error::Usage(format!(
            "{}: expected .txt, .jsonl, .csv or .parquet, or --format to say what it is",
            path.display()
        ))),
    }
}

/// An I/O error with its file.
pub fn at(path: &Path) -> impl Fn(io::Error) -> Error + use<> {
    let path = path.to_path_buf();
    move |source| Error::Taper(taper::Error::Io { path: path.clone(), source })
}

/// Lines of any length, as bytes.
struct Lines {
    name: PathBuf,
    source: BufReader<Counted>,
    line: u64,
}

impl Lines {
    fn new(name: &str, source: Counted) -> Self {
        Self { name: name.into(), source: BufReader::with_capacity(1 << 16, source), line: 0 }
    }

    /// The next line with its number, without its end and without a byte order mark.
    fn next(&mut self) -> Result<Option<(u64, Vec<u8>)>> {
        let mut bytes = vec![];
        if self.source.read_until(b'\n', &mut bytes).map_err(at(&self.name))? == 0 {
            return Ok(None);
        }
        if bytes.ends_with(b"\n") {
            bytes.pop();
            if bytes.ends_with(b"\r") {
                bytes.pop();
            }
        }
        if self.line == 0 && bytes.starts_with(b"\xef\xbb\xbf") {
            bytes.drain(..3);
        }
        self.line += 1;
        Ok(Some((self.line, bytes)))
    }
}

fn utf8(bytes: Vec<u8>) -> std::result::Result<String, String> {
    String::from_utf8(bytes).map_err(|error| format!("not UTF-8 from byte {}", error.utf8_error().valid_up_to()))
}

/// A source that counts what is read of it.
struct Counted {
    source: Box<dyn Read>,
    read: Arc<AtomicU64>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}
