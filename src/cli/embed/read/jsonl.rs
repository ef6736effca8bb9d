//! JSON lines: an object a line. Blank lines are no rows.

use serde_json::Value;

use super::super::super::Result;
use super::{Content, Fields, Item, Lines, utf8};

pub fn rows(mut lines: Lines, fields: Fields) -> impl Iterator<Item = Result<Item>> {
    std::iter::from_fn(move || {
        loop {
            let (place, bytes) = match lines.next().transpose()? {
                Ok(line) => line,
                Err(error) => return Some(Err(error)),
            };
            if !bytes.iter().all(u8::is_ascii_whitespace) {
                let content = utf8(bytes).and_then(|line| content(&line, &fields));
                return Some(Ok(Item { place, content }));
            }
        }
    })
}

fn content(line: &str, fields: &Fields) -> std::result::Result<Content, String> {
    let mut object = match serde_json::from_str(line) {
        Ok(Value::Object(object)) => object,
        Ok(_) => return Err("expected a JSON object".into()),
        Err(error) => return Err(format!("not JSON: {error}")),
    };
    let id = match object.get(fields.id_name()) {
        Some(id @ (Value::String(_) | Value::Number(_))) => Some(id.clone()),
        Some(_) => return Err(format!("field {:?} is neither a string nor a number", fields.id_name())),
        None if fields.id.is_some() => return Err(format!("no field {:?}", fields.id_name())),
        None => None,
    };
    match object.remove(&fields.text) {
        Some(Value::String(text)) => Ok(Content { id, text }),
        Some(Value::Null) => Err(format!("field {:?} is null", fields.text)),
        Some(_) => Err(format!("field {:?} is not a string", fields.text)),
        None => Err(format!("no field {:?}", fields.text)),
    }
}
