//! Reads the tool calls that models write.

use serde_json::{Map, Value};

use crate::message::{Tool, ToolCall};

/// A call of Qwen3, a JSON object with `name` and `arguments`, or of Qwen3.5:
///
/// ```text
/// <function=NAME>
/// <parameter=KEY>
/// VALUE
/// </parameter>
/// </function>
/// ```
pub(super) fn parse_qwen(text: &str, tools: &[Tool]) -> Option<ToolCall> {
    let text = text.trim();
    let call = if text.starts_with('{') { serde_json::from_str(text).ok() } else { parse_tags(text, tools) };
    call.filter(|call| !call.name.is_empty())
}

/// The token around strings in a call of Gemma 4.
pub(super) const GEMMA_QUOTE: &str = "<|\"|>";

/// A call of Gemma 4, `call:NAME{key:value,..}`. Values are `<|"|>text<|"|>`, `{key:value,..}`, `[value,..]`, numbers,
/// `true`, `false` and `null`; anything else without quotation marks is text too.
pub(super) fn parse_gemma(text: &str, _tools: &[Tool]) -> Option<ToolCall> {
    let (name, rest) = text.trim().strip_prefix("call:")?.split_once('{')?;
    let (arguments, rest) = gemma_map(rest, 0)?;
    let name = name.trim();
    (rest.trim().is_empty() && !name.is_empty()).then(|| ToolCall::new(name, arguments))
}

/// A map behind its opening brace, and what follows it.
fn gemma_map(text: &str, depth: usize) -> Option<(Map<String, Value>, &str)> {
    let mut map = Map::new();
    let mut rest = text.trim_start();
    while !rest.starts_with('}') {
        let (key, after_key) = match rest.strip_prefix(GEMMA_QUOTE) {
            Some(quoted) => quoted.split_once(GEMMA_QUOTE).map(|(key, rest)| (key, rest.trim_start()))?,
            None => rest.split_at(rest.find(':')?),
        };
        let (value, after_value) = gemma_value(after_key.strip_prefix(':')?, depth + 1)?;
        map.insert(key.trim().to_string(), value);
        rest = gemma_next(after_value, '}')?;
    }
    Some((map, &rest[1..]))
}

fn gemma_value(text: &str, depth: usize) -> Option<(Value, &str)> {
    const MAX_DEPTH: usize = 64;
    let text = text.trim_start();
    if depth > MAX_DEPTH {
        return None;
    }
    if let Some(quoted) = text.strip_prefix(GEMMA_QUOTE) {
        return quoted.split_once(GEMMA_QUOTE).map(|(text, rest)| (text.into(), rest));
    }
    if let Some(map) = text.strip_prefix('{') {
        return gemma_map(map, depth).map(|(map, rest)| (map.into(), rest));
    }
    if let Some(list) = text.strip_prefix('[') {
        let (mut values, mut rest) = (vec![], list.trim_start());
        while !rest.starts_with(']') {
            let (value, after_value) = gemma_value(rest, depth + 1)?;
            values.push(value);
            rest = gemma_next(after_value, ']')?;
        }
        return Some((values.into(), &rest[1..]));
    }
    let (bare, rest) = text.split_at(text.find([',', '}', ']'])?);
    let bare = bare.trim_end();
    if bare.is_empty() {
        return None;
    }
    Some((serde_json::from_str(bare).unwrap_or_else(|_| bare.into()), rest))
}

/// What follows a value: the text behind a comma, or the end of the list or map that it stands in.
fn gemma_next(text: &str, end: char) -> Option<&str> {
    let text = text.trim_start();
    match text.strip_prefix(',') {
        Some(rest) => Some(rest.trim_start()),
        None => text.starts_with(end).then_some(text),
    }
}

fn parse_tags(text: &str, tools: &[Tool]) -> Option<ToolCall> {
    const END: &str = "</parameter>";
    let (name, mut rest) = text.strip_prefix("<function=")?.strip_suffix("</function>")?.split_once('>')?;
    let properties = tools.iter().find(|tool| tool.name() == name).map(|tool| &tool.parameters()["properties"]);
    let mut arguments = Map::new();
    while !rest.trim().is_empty() {
        let (key, after_key) = rest.trim_start().strip_prefix("<parameter=")?.split_once('>')?;
        // A value may quote the tag that ends it; what ends it is followed by the next parameter or by nothing.
        let (end, _) = after_key.match_indices(END).find(|(at, _)| {
            let next = after_key[at + END.len()..].trim_start();
            next.is_empty() || next.starts_with("<parameter=")
        })?;
        let value = &after_key[..end];
        let value = value.strip_prefix('\n').unwrap_or(value);
        let value = value.strip_suffix('\n').unwrap_or(value);
        let schema = properties.map_or(&Value::Null, |properties| &properties[key]);
        arguments.insert(key.to_string(), typed(value, &schema["type"]));
        rest = &after_key[end + END.len()..];
    }
    Some(ToolCall::new(name, arguments))
}

/// A value of the type or one of the types that a JSON schema declares; of the type that it looks like if there is
/// none, except that a quoted text and `null` stay text. What does not fit stays text too.
fn typed(text: &str, declared: &Value) -> Value {
    let declares = |name| declared == name || declared.as_array().is_some_and(|names| names.iter().any(|n| n == name));
    let parsed = || serde_json::from_str::<Value>(text).ok();
    let value = if declared.is_null() {
        parsed().filter(|value| !value.is_string() && !value.is_null())
    } else {
        // Templates write these three as Python does.
        match text.to_ascii_lowercase().as_str() {
            "true" if declares("boolean") => Some(Value::Bool(true)),
            "false" if declares("boolean") => Some(Value::Bool(false)),
            "null" | "none" if declares("null") => Some(Value::Null),
            _ if declares("string") => None,
            _ => parsed(),
        }
    };
    value.unwrap_or_else(|| text.into())
}
