//! Embeddings to files. A file is written in parts, each of which is whole once it is closed, and put together at the
//! end without computing anything again.

mod jsonl;
mod npy;
mod parquet;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde_json::Value;
use taper::{Embedding, Heads};

use super::super::{Error, Result};
use super::read::at;

pub use jsonl::write_line;
pub use npy::ids_file;

/// How an output is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// A JSON object a line
    Jsonl,
    /// A NumPy array of the dense vectors, and their ids in a file beside it
    Npy,
    Parquet,
}

/// An embedded text.
pub struct Record {
    pub id: Value,
    /// Present if texts are kept.
    pub text: Option<String>,
    /// Those that were asked for, whether or not they found anything.
    pub heads: Heads,
    pub embedding: Embedding,
}

/// What every record of an output has.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub heads: Heads,
    pub dense_size: usize,
    pub keep_text: bool,
}

/// A part that is being written.
pub trait Part {
    fn write(&mut self, records: &[Record]) -> Result<()>;

    /// Brings everything to the disk.
    fn close(self: Box<Self>) -> Result<()>;
}

impl OutputFormat {
    /// The format that the file's name ends in.
    pub fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("jsonl" | "ndjson") => Ok(Self::Jsonl),
            Some("npy") => Ok(Self::Npy),
            Some("parquet") => Ok(Self::Parquet),
            _ => Err(Error::Usage(format!("{}: expected .jsonl, .npy or .parquet", path.display()))),
        }
    }

    /// Begins a part at `path`, replacing what is there.
    pub fn part(self, path: &Path, shape: Shape) -> Result<Box<dyn Part>> {
        Ok(match self {
            Self::Jsonl => Box::new(jsonl::Lines::create(path)?),
            Self::Npy => Box::new(npy::Rows::create(path)?),
            Self::Parquet => Box::new(parquet::RowGroups::create(path, shape)?),
        })
    }

    /// Puts `parts`, which hold `rows` rows, together to the files of `output`, each whole or not at all.
    pub fn join(self, parts: &[PathBuf], rows: u64, shape: Shape, output: &Path) -> Result<()> {
        match self {
            Self::Jsonl => jsonl::join(parts, output),
            Self::Npy => npy::join(parts, rows, shape.dense_size, output),
            Self::Parquet => parquet::join(parts, shape, output),
        }
    }
}

fn create(path: &Path) -> Result<BufWriter<File>> {
    Ok(BufWriter::with_capacity(1 << 18, File::create(path).map_err(at(path))?))
}

fn sync(path: &Path, writer: BufWriter<File>) -> Result<()> {
    let file = writer.into_inner().map_err(|error| at(path)(error.into_error()))?;
    file.sync_all().map_err(at(path))
}

/// Writes `head` and then the content of `parts` to `output`, whole or not at all.
fn concatenate(head: &[u8], parts: impl Iterator<Item = PathBuf>, output: &Path) -> Result<()> {
    let partial = partial(output);
    let mut writer = create(&partial)?;
    writer.write_all(head).map_err(at(&partial))?;
    for part in parts {
        let mut reader = BufReader::new(File::open(&part).map_err(at(&part))?);
        io::copy(&mut reader, &mut writer).map_err(at(&partial))?;
    }
    sync(&partial, writer)?;
    std::fs::rename(&partial, output).map_err(at(output))
}

/// Where a file is written before it is whole.
pub fn partial(path: &Path) -> PathBuf {
    with_suffix(path, ".partial")
}

/// The path with `suffix` behind its name.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
