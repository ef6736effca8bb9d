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
