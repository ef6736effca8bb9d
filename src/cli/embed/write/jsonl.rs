//! JSON lines: `{"id": .., "dense": [..], "sparse": {"token id": weight}, "colbert": [[..]]}`.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::ser::{Serialize, SerializeMap, Serializer};
use taper::embedding::Vectors;

use super::super::super::Result;
use super::super::read::at;
use super::{Part, Record, concatenate, create, sync};

pub struct Lines {
    path: PathBuf,
    writer: BufWriter<File>,
}

impl Lines {
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self { path: path.into(), writer: create(path)? })
    }
}

impl Part for Lines {
    fn write(&mut self, records: &[Record]) -> Result<()> {
        records.iter().try_for_each(|record| write_line(&mut self.writer, record)).map_err(at(&self.path))
    }

    fn close(self: Box<Self>) -> Result<()> {
        sync(&self.path, self.writer)
    }
}

pub fn join(parts: &[PathBuf], output: &Path) -> Result<()> {
    concatenate(b"", parts.iter().cloned(), output)
}

/// Writes a record as a line.
pub fn write_line(writer: &mut impl Write, record: &Record) -> io::Result<()> {
    serde_json::to_writer(&mut *writer, record)?;
    writer.write_all(b"\n")
}

impl Serialize for Record {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let Self { id, text, heads, embedding } = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("id", id)?;
        if let Some(text) = text {
            map.serialize_entry("text", text)?;
        }
        if embedding.truncated > 0 {
            map.serialize_entry("truncated_tokens", &embedding.truncated)?;
        }
        if heads.dense {
            map.serialize_entry("dense", &embedding.dense)?;
        }
        if heads.sparse {
            map.serialize_entry("sparse", &Weights(&embedding.sparse))?;
        }
        if heads.colbert {
            map.serialize_entry("colbert", &Lists(&embedding.colbert))?;
        }
        map.end()
    }
}

struct Weights<'a>(&'a [(u32, f32)]);

impl Serialize for Weights<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().copied())
    }
}

struct Lists<'a>(&'a Vectors);

impl Serialize for Lists<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter())
    }
}
