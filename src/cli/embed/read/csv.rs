//! Comma-separated values after RFC 4180, with a record of names first.

use std::io::BufRead;

use csv_core::{ReadRecordResult, Reader};
use serde_json::Value;

use super::super::super::{Error, Result};
use super::{Content, Fields, Item, Lines, at, utf8};

pub fn rows(lines: Lines, fields: &Fields) -> Result<impl Iterator<Item = Result<Item>> + use<>> {
    let mut records = Records { lines, reader: Reader::new() };
    let Some((_, names)) = records.next()? else {
        let name = records.lines.name.display();
        return Err(Error::Usage(format!("{name}: empty, expected a line with the columns' names")));
    };
    let find = |name: &str| names.iter().position(|field| field == name.as_bytes());
    let missing = |name: &str| {
        // Anything may stand there, if this is no CSV at all.
        let names: Vec<_> = names.iter().map(|name| String::from_utf8_lossy(name)).collect();
        let shown: String = names.join(", ").escape_debug().take(200).collect();
        Error::Usage(format!("{}:1: no column {name:?}, only {shown}", records.lines.name.display()))
    };
    let text = find(&fields.text).ok_or_else(|| missing(&fields.text))?;
    let id = match (find(fields.id_name()), &fields.id) {
        (None, Some(id)) => return Err(missing(id)),
        (found, _) => found,
    };
    let columns = names.len();
    Ok(std::iter::from_fn(move || {
        let record = records.next().transpose()?;
        Some(record.map(|(place, record)| Item { place, content: content(record, columns, text, id) }))
    }))
}

fn content(
    mut record: Vec<Vec<u8>>,
    columns: usize,
    text: usize,
    id: Option<usize>,
) -> std::result::Result<Content, String> {
    if record.len() != columns {
        return Err(format!("{} fields, expected {columns}", record.len()));
    }
    let mut field = |column: usize| utf8(std::mem::take(&mut record[column]));
    let id = id.filter(|id| *id != text).map(&mut field).transpose()?;
    Ok(Content { id: id.map(Value::String), text: field(text)? })
}

struct Records {
    lines: Lines,
    reader: Reader,
}

impl Records {
    /// The fields of the next record, with the line that it begins on.
    fn next(&mut self) -> Result<Option<(u64, Vec<Vec<u8>>)>> {
        let (mut output, mut ends) = (vec![0; 1 << 10], vec![0; 16]);
        let (mut used, mut fields) = (0, 0);
        let line = self.reader.line();
        loop {
            let input = self.lines.source.fill_buf().map_err(at(&self.lines.name))?;
            let (result, read, written, ended) =
                self.reader.read_record(input, &mut output[used..], &mut ends[fields..]);
            self.lines.source.consume(read);
            used += written;
            fields += ended;
            match result {
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => output.resize(2 * output.len(), 0),
                ReadRecordResult::OutputEndsFull => ends.resize(2 * ends.len(), 0),
                ReadRecordResult::End => return Ok(None),
                ReadRecordResult::Record => {
                    let starts = std::iter::once(0).chain(ends.iter().copied());
                    let fields = starts.zip(&ends[..fields]).map(|(start, &end)| output[start..end].to_vec()).collect();
                    return Ok(Some((line, fields)));
                }
            }
        }
    }
}
