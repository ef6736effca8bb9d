//! The records of a file that `taper embed` wrote, one at a time.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, List, ListAccessor, Row};
use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;
use taper::embedding::Vectors;
use taper::{Embedding, Heads};

use super::super::embed::ids_file;
use super::super::{Error, Result};

/// A text as it was embedded.
pub struct Entry {
    pub id: Value,
    pub text: Option<String>,
    pub embedding: Embedding,
}

pub type Entries = Box<dyn Iterator<Item = Result<Entry>>>;

/// The heads that the file has, and its records.
pub fn open(path: &Path) -> Result<(Heads, Entries)> {
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("jsonl" | "ndjson") => jsonl(path),
        Some("npy") => npy(path),
        Some("parquet") => parquet(path),
        _ => Err(fault(path, "expected .jsonl, .npy or .parquet")),
    }
}

fn fault(path: &Path, message: impl std::fmt::Display) -> Error {
    Error::Usage(format!("{}: {message}", path.display()))
}

fn file(path: &Path) -> Result<File> {
    File::open(path).map_err(|source| Error::Taper(taper::Error::Io { path: path.into(), source }))
}

#[derive(Deserialize)]
struct Line {
    id: Value,
    text: Option<String>,
    dense: Option<Vec<f32>>,
    sparse: Option<BTreeMap<u32, f32>>,
    colbert: Option<Vec<Vec<f32>>>,
}

fn jsonl(path: &Path) -> Result<(Heads, Entries)> {
    let owned = path.to_path_buf();
    let lines = (1..).zip(BufReader::new(file(path)?).lines()).map(move |(number, line)| {
        let line = line.map_err(|error| fault(&owned, format_args!("{number}: {error}")))?;
        serde_json::from_str::<Line>(&line).map_err(|error| fault(&owned, format_args!("{number}: {error}")))
    });
    let mut lines = lines.peekable();
    let heads = match lines.peek() {
        Some(Ok(line)) => {
            Heads { dense: line.dense.is_some(), sparse: line.sparse.is_some(), colbert: line.colbert.is_some() }
        }
        Some(Err(_)) => return Err(lines.next().and_then(|line| line.err()).unwrap_or_else(|| fault(path, "damaged"))),
        None => return Err(fault(path, "no records")),
    };
    let entry = |line: Line| {
        let colbert = line.colbert.unwrap_or_default();
        let size = colbert.first().map_or(0, Vec::len);
        let embedding = Embedding {
            dense: line.dense.unwrap_or_default(),
            sparse: line.sparse.into_iter().flatten().collect(),
            colbert: Vectors { size, values: colbert.into_iter().flatten().collect() },
            ..Embedding::default()
        };
        Entry { id: line.id, text: line.text, embedding }
    };
    Ok((heads, Box::new(lines.map(move |line| line.map(entry)))))
}

fn npy(path: &Path) -> Result<(Heads, Entries)> {
    let mut rows = BufReader::new(file(path)?);
    let damaged = |error: std::io::Error| match error.kind() {
        ErrorKind::UnexpectedEof => fault(path, "cut short"),
        _ => fault(path, error),
    };
    let mut head = [0; 10];
    rows.read_exact(&mut head).map_err(damaged)?;
    let mut header = vec![0; usize::from(u16::from_le_bytes([head[8], head[9]]))];
    rows.read_exact(&mut header).map_err(damaged)?;
    let header = String::from_utf8_lossy(&header).into_owned();
    let shape = header.split_once("'shape': (").and_then(|(_, shape)| shape.split_once(')'));
    let size = shape.and_then(|(shape, _)| shape.split_once(", ")?.1.parse::<usize>().ok());
    let (Some(size), true) = (size, head.starts_with(b"\x93NUMPY\x01") && header.contains("'<f4'")) else {
        return Err(fault(path, "not an array that taper embed wrote"));
    };
    let ids = ids_file(path);
    let (owned, lines) = (path.to_path_buf(), BufReader::new(file(&ids)?).lines());
    let entries = lines.map(move |line| {
        let id = line.map_err(|error| fault(&ids, error))?;
        let id = serde_json::from_str(&id).map_err(|error| fault(&ids, error))?;
        let mut row = vec![0; 4 * size];
        rows.read_exact(&mut row).map_err(|error| fault(&owned, error))?;
        let dense = row.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Ok(Entry { id, text: None, embedding: Embedding { dense, ..Embedding::default() } })
    });
    Ok((Heads::DENSE, Box::new(entries)))
}

fn parquet(path: &Path) -> Result<(Heads, Entries)> {
    let reader = SerializedFileReader::new(file(path)?).map_err(|error| fault(path, error))?;
    let schema = reader.metadata().file_metadata().schema();
    let has = |name: &str| schema.get_fields().iter().any(|field| field.name() == name);
    let heads = Heads { dense: has("dense"), sparse: has("sparse_ids"), colbert: has("colbert") };
    let path: PathBuf = path.into();
    let entries = reader.into_iter().map(move |row| {
        let row = row.map_err(|error| fault(&path, error))?;
        entry(&row).ok_or_else(|| fault(&path, "a column of another type than taper embed writes"))
    });
    Ok((heads, Box::new(entries)))
}

fn entry(row: &Row) -> Option<Entry> {
    let (mut id, mut text, mut ids, mut weights) = (Value::Null, None, vec![], vec![]);
    let mut embedding = Embedding::default();
    for (name, field) in row.get_column_iter() {
        match (name.as_str(), field) {
            ("id", Field::Str(value)) => id = Value::String(value.clone()),
            ("text", Field::Str(value)) => text = Some(value.clone()),
            ("dense", Field::ListInternal(list)) => embedding.dense = floats(list)?,
            ("sparse_ids", Field::ListInternal(list)) => {
                ids = (0..list.len()).map(|index| list.get_uint(index).ok()).collect::<Option<_>>()?;
            }
            ("sparse_weights", Field::ListInternal(list)) => weights = floats(list)?,
            ("colbert", Field::ListInternal(list)) => {
                for index in 0..list.len() {
                    let vector = floats(list.get_list(index).ok()?)?;
                    embedding.colbert.size = vector.len();
                    embedding.colbert.values.extend(vector);
                }
            }
            _ => return None,
        }
    }
    embedding.sparse = ids.into_iter().zip(weights).collect();
    Some(Entry { id, text, embedding })
}

fn floats(list: &List) -> Option<Vec<f32>> {
    (0..list.len()).map(|index| list.get_float(index).ok()).collect()
}
