//! NumPy's format for the dense vectors, `[rows, size]` in f32, and a file of their ids, a JSON value a line.
//!
//! Source: <https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html>, version 1.0.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::super::super::Result;
use super::super::read::at;
use super::{Part, Record, concatenate, create, sync, with_suffix};

pub struct Rows {
    path: PathBuf,
    rows: BufWriter<File>,
    ids: BufWriter<File>,
}

/// Where the ids of an array are.
pub fn ids_file(array: &Path) -> PathBuf {
    with_suffix(array, ".ids.jsonl")
}

impl Rows {
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self { path: path.into(), rows: create(path)?, ids: create(&ids_file(path))? })
    }
}

impl Part for Rows {
    fn write(&mut self, records: &[Record]) -> Result<()> {
        for Record { id, embedding, .. } in records {
            let mut row = Vec::with_capacity(4 * embedding.dense.len());
            row.extend(embedding.dense.iter().flat_map(|value| value.to_le_bytes()));
            self.rows.write_all(&row).map_err(at(&self.path))?;
            writeln!(self.ids, "{id}").map_err(at(&self.path))?;
        }
        Ok(())
    }

    fn close(self: Box<Self>) -> Result<()> {
        sync(&ids_file(&self.path), self.ids)?;
        sync(&self.path, self.rows)
    }
}

pub fn join(parts: &[PathBuf], rows: u64, size: usize, output: &Path) -> Result<()> {
    concatenate(b"", parts.iter().map(|part| ids_file(part)), &ids_file(output))?;
    concatenate(&header(rows, size), parts.iter().cloned(), output)
}

fn header(rows: u64, size: usize) -> Vec<u8> {
    const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
    const ALIGNMENT: usize = 64;
    let mut text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {size}), }}");
    let unpadded = MAGIC.len() + 2 + text.len() + 1;
    text.extend(std::iter::repeat_n(' ', unpadded.next_multiple_of(ALIGNMENT) - unpadded));
    text.push('\n');
    [MAGIC, &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
}
