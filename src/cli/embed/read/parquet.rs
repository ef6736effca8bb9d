//! Parquet: two columns of each row group, a bounded number of rows at a time.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parquet::column::reader::{ColumnReader, ColumnReaderImpl};
use parquet::data_type::DataType;
use parquet::errors::ParquetError;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::super::super::{Error, Result};
use super::{Content, Fields, Item, Items, utf8};

/// Rows decoded at a time.
const STRETCH: usize = 1024;

pub fn rows(path: &Path, file: File, fields: &Fields, read: Arc<AtomicU64>) -> Result<Items> {
    let bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let reader = SerializedFileReader::new(file).map_err(fault(path))?;
    let schema = reader.metadata().file_metadata().schema_descr();
    let names: Vec<String> = schema.columns().iter().map(|column| column.path().string()).collect();
    let find = |name: &str| {
        let column = names.iter().position(|column| column == name)?;
        (schema.column(column).max_rep_level() == 0).then_some(column)
    };
    let missing =
        |name: &str| Error::Usage(format!("{}: no plain column {name:?}, only {}", path.display(), names.join(", ")));
    let text = find(&fields.text).ok_or_else(|| missing(&fields.text))?;
    let id = match (find(fields.id_name()), &fields.id) {
        (None, Some(id)) => return Err(missing(id)),
        (found, _) => found.filter(|id| *id != text),
    };
    let total = reader.metadata().file_metadata().num_rows().max(1) as u64;
    let rows = Rows { path: path.into(), reader, text, id, group: 0, columns: None, ready: VecDeque::new(), place: 0 };
    let mut shown = 0;
    Ok(Box::new(rows.inspect(move |row| {
        if let Ok(Item { place, .. }) = row {
            let now = (u128::from(bytes) * u128::from(*place) / u128::from(total)) as u64;
            read.fetch_add(now - shown, Ordering::Relaxed);
            shown = now;
        }
    })))
}

fn fault(path: &Path) -> impl Fn(ParquetError) -> Error + use<> {
    let path = path.display().to_string();
    move |error| Error::Usage(format!("{path}: {error}"))
}

struct Rows {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    text: usize,
    id: Option<usize>,
    group: usize,
    columns: Option<(Column, Option<Column>)>,
    ready: VecDeque<std::result::Result<Content, String>>,
    /// Rows given so far.
    place: u64,
}

impl Rows {
    /// Decodes more rows. False after the last.
    fn fill(&mut self) -> Result<bool> {
        while self.ready.is_empty() {
            if self.columns.is_none() {
                if self.group == self.reader.num_row_groups() {
                    return Ok(false);
                }
                let group = self.reader.get_row_group(self.group).map_err(fault(&self.path))?;
                let column = |index| -> Result<Column> {
                    Ok(Column { reader: group.get_column_reader(index).map_err(fault(&self.path))? })
                };
                self.columns = Some((column(self.text)?, self.id.map(column).transpose()?));
                self.group += 1;
            }
            let Some((text, id)) = &mut self.columns else { continue };
            let texts = text.read().map_err(fault(&self.path))?;
            let mut ids = id.as_mut().map(Column::read).transpose().map_err(fault(&self.path))?.into_iter().flatten();
            if texts.is_empty() {
                self.columns = None;
            }
            let with_id = self.id.is_some();
            self.ready.extend(texts.into_iter().map(|text| content(text, with_id.then(|| ids.next().flatten()))));
        }
        Ok(true)
    }
}

impl Iterator for Rows {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        match self.fill() {
            Ok(true) => {}
            Ok(false) => return None,
            Err(error) => return Some(Err(error)),
        }
        self.place += 1;
        self.ready.pop_front().map(|content| Ok(Item { place: self.place, content }))
    }
}

/// `id` is `None` without a column of ids, and `Some(None)` where that is null.
fn content(text: Option<Cell>, id: Option<Option<Cell>>) -> std::result::Result<Content, String> {
    let id = match id {
        None => None,
        Some(None) => return Err("the id is null".into()),
        Some(Some(Cell::Number(id))) => Some(id.into()),
        Some(Some(Cell::Bytes(id))) => Some(Value::String(utf8(id)?)),
    };
    match text {
        Some(Cell::Bytes(text)) => Ok(Content { id, text: utf8(text)? }),
        Some(Cell::Number(_)) => Err("the text is a number".into()),
        None => Err("the text is null".into()),
    }
}

enum Cell {
    Number(i64),
    Bytes(Vec<u8>),
}

struct Column {
    reader: ColumnReader,
}

impl Column {
    /// Some of the next values, `None` for null; nothing after the last.
    fn read(&mut self) -> parquet::errors::Result<Vec<Option<Cell>>> {
        match &mut self.reader {
            ColumnReader::ByteArrayColumnReader(reader) => cells(reader, |value| Cell::Bytes(value.data().to_vec())),
            ColumnReader::Int32ColumnReader(reader) => cells(reader, |value| Cell::Number(value.into())),
            ColumnReader::Int64ColumnReader(reader) => cells(reader, Cell::Number),
            _ => Err(ParquetError::General("a column of texts or ids is neither of strings nor of integers".into())),
        }
    }
}

fn cells<T: DataType>(
    reader: &mut ColumnReaderImpl<T>,
    cell: impl Fn(T::T) -> Cell,
) -> parquet::errors::Result<Vec<Option<Cell>>> {
    let (mut values, mut levels) = (vec![], vec![]);
    let (records, count, _) = reader.read_records(STRETCH, Some(&mut levels), None, &mut values)?;
    if levels.is_empty() || count == records {
        return Ok(values.into_iter().map(|value| Some(cell(value))).collect());
    }
    let deepest = levels.iter().copied().max().unwrap_or(0);
    let mut values = values.into_iter();
    // Nulls alone leave no value to tell their level by.
    let is_there = |level: &i16| count > 0 && *level == deepest;
    Ok(levels.iter().map(|level| if is_there(level) { values.next().map(&cell) } else { None }).collect())
}
