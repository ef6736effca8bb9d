//! Parquet with the list columns that arrow reads: `dense` list of float, `sparse_ids` list of u32 beside
//! `sparse_weights` list of float, `colbert` list of lists of float. What is written at once is a row group.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::column::writer::ColumnCloseResult;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use serde_json::Value;
use taper::Embedding;

use super::super::super::{Error, Result};
use super::super::read::at;
use super::{Part, Record, Shape, partial};

pub struct RowGroups {
    path: PathBuf,
    writer: SerializedFileWriter<File>,
    shape: Shape,
}

impl RowGroups {
    pub fn create(path: &Path, shape: Shape) -> Result<Self> {
        let file = File::create(path).map_err(at(path))?;
        let writer = writer(file, shape).map_err(fault(path))?;
        Ok(Self { path: path.into(), writer, shape })
    }

    fn write_group(&mut self, records: &[Record]) -> parquet::errors::Result<()> {
        let mut group = self.writer.next_row_group()?;
        let heads = self.shape.heads;
        let embeddings = || records.iter().map(|record| &record.embedding);
        bytes(&mut group, records.iter().map(|record| id(&record.id)))?;
        if self.shape.keep_text {
            bytes(&mut group, records.iter().map(|record| record.text.as_deref().unwrap_or_default().into()))?;
        }
        if heads.dense {
            floats(&mut group, embeddings().map(|embedding| embedding.dense.iter().copied()))?;
        }
        if heads.sparse {
            ids(&mut group, embeddings())?;
            floats(&mut group, embeddings().map(|embedding| embedding.sparse.iter().map(|(_, weight)| *weight)))?;
        }
        if heads.colbert {
            vectors(&mut group, embeddings())?;
        }
        group.close()?;
        Ok(())
    }
}

impl Part for RowGroups {
    fn write(&mut self, records: &[Record]) -> Result<()> {
        let path = self.path.clone();
        self.write_group(records).map_err(fault(&path))
    }

    fn close(self: Box<Self>) -> Result<()> {
        let file = self.writer.into_inner().map_err(fault(&self.path))?;
        file.sync_all().map_err(at(&self.path))
    }
}

/// Copies the row groups of `parts` as they are.
pub fn join(parts: &[PathBuf], shape: Shape, output: &Path) -> Result<()> {
    let partial = partial(output);
    let file = File::create(&partial).map_err(at(&partial))?;
    let mut joined = writer(file, shape).map_err(fault(&partial))?;
    for part in parts {
        append(&mut joined, part).map_err(fault(part))?;
    }
    let file = joined.into_inner().map_err(fault(&partial))?;
    file.sync_all().map_err(at(&partial))?;
    std::fs::rename(&partial, output).map_err(at(output))
}

fn append(joined: &mut SerializedFileWriter<File>, part: &Path) -> parquet::errors::Result<()> {
    let file = File::open(part)?;
    let reader = SerializedFileReader::new(file.try_clone()?)?;
    for source in reader.metadata().row_groups() {
        let mut group = joined.next_row_group()?;
        for column in source.columns() {
            let chunk = ColumnCloseResult {
                bytes_written: column.compressed_size() as u64,
                rows_written: source.num_rows() as u64,
                metadata: column.clone(),
                bloom_filter: None,
                column_index: None,
                offset_index: None,
            };
            group.append_column(&file, chunk)?;
        }
        group.close()?;
    }
    Ok(())
}

fn writer(file: File, shape: Shape) -> parquet::errors::Result<SerializedFileWriter<File>> {
    let list =
        |name: &str, element: &str| format!("required group {name} (LIST) {{ repeated group list {{ {element} }} }}\n");
    let mut schema = "required binary id (STRING);\n".to_string();
    if shape.keep_text {
        schema += "required binary text (STRING);\n";
    }
    if shape.heads.dense {
        schema += &list("dense", "required float element;");
    }
    if shape.heads.sparse {
        schema += &list("sparse_ids", "required int32 element (INTEGER(32,false));");
        schema += &list("sparse_weights", "required float element;");
    }
    if shape.heads.colbert {
        schema += &list("colbert", &list("element", "required float element;"));
    }
    let schema = Arc::new(parse_message_type(&format!("message embeddings {{ {schema} }}"))?);
    let properties = WriterProperties::builder()
        .set_compression(Compression::UNCOMPRESSED) // floats of embeddings are noise to a compressor
        .set_dictionary_enabled(false)
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    SerializedFileWriter::new(file, schema, Arc::new(properties))
}

fn fault(path: &Path) -> impl Fn(ParquetError) -> Error + use<> {
    let path = path.display().to_string();
    move |error| Error::Usage(format!("{path}: {error}"))
}

fn id(id: &Value) -> ByteArray {
    match id {
        Value::String(id) => id.as_str().into(),
        other => other.to_string().as_str().into(),
    }
}

type Group<'a> = SerializedRowGroupWriter<'a, File>;

fn bytes(group: &mut Group, values: impl Iterator<Item = ByteArray>) -> parquet::errors::Result<()> {
    let values: Vec<ByteArray> = values.collect();
    column::<ByteArrayType>(group, &values, None)
}

fn floats<I: Iterator<Item = f32>>(group: &mut Group, lists: impl Iterator<Item = I>) -> parquet::errors::Result<()> {
    let mut flat = Flat::default();
    lists.for_each(|list| flat.push(list));
    column::<FloatType>(group, &flat.values, Some(&flat.levels))
}

fn ids<'a>(group: &mut Group, embeddings: impl Iterator<Item = &'a Embedding>) -> parquet::errors::Result<()> {
    let mut flat = Flat::default();
    embeddings.for_each(|embedding| flat.push(embedding.sparse.iter().map(|(id, _)| id.cast_signed())));
    column::<Int32Type>(group, &flat.values, Some(&flat.levels))
}

fn vectors<'a>(group: &mut Group, embeddings: impl Iterator<Item = &'a Embedding>) -> parquet::errors::Result<()> {
    let mut flat = Flat::default();
    for embedding in embeddings {
        let before = flat.values.len();
        for vector in embedding.colbert.iter() {
            let start = flat.values.len();
            flat.values.extend_from_slice(vector);
            let outer = if start == before { 0 } else { 1 };
            flat.levels.push(2, outer, 2, vector.len());
        }
        if flat.values.len() == before {
            flat.levels.push(0, 0, 0, 1);
        }
    }
    column::<FloatType>(group, &flat.values, Some(&flat.levels))
}

/// Lists one after the other, with the levels that tell where each begins.
struct Flat<T> {
    values: Vec<T>,
    levels: Levels,
}

impl<T> Default for Flat<T> {
    fn default() -> Self {
        Self { values: vec![], levels: Levels::default() }
    }
}

impl<T> Flat<T> {
    fn push(&mut self, list: impl Iterator<Item = T>) {
        let before = self.values.len();
        self.values.extend(list);
        match self.values.len() - before {
            0 => self.levels.push(0, 0, 0, 1),
            len => self.levels.push(1, 0, 1, len),
        }
    }
}

#[derive(Default)]
struct Levels {
    definition: Vec<i16>,
    repetition: Vec<i16>,
}

impl Levels {
    /// A list of `len` entries defined to `depth`, the first of which begins at level `first`, the others at `rest`.
    fn push(&mut self, depth: i16, first: i16, rest: i16, len: usize) {
        self.definition.extend(std::iter::repeat_n(depth, len));
        self.repetition.extend((0..len).map(|entry| if entry == 0 { first } else { rest }));
    }
}

fn column<T: DataType>(group: &mut Group, values: &[T::T], levels: Option<&Levels>) -> parquet::errors::Result<()> {
    let Some(mut column) = group.next_column()? else {
        return Err(ParquetError::General("more columns than the schema has".into()));
    };
    let definition = levels.map(|levels| levels.definition.as_slice());
    let repetition = levels.map(|levels| levels.repetition.as_slice());
    column.typed::<T>().write_batch(values, definition, repetition)?;
    column.close()
}
