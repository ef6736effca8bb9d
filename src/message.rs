//! Conversations as data: messages, tools and tool calls, in the JSON shape of the OpenAI chat API, which is also
//! what chat templates read.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value, json};

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Instructions for the whole conversation; reads `developer` too.
    #[serde(alias = "developer")]
    System,
    /// The person.
    User,
    /// The model.
    Assistant,
    /// What a tool that the model called gave back.
    Tool,
}

/// One message of a conversation.
///
/// ```
/// use taper::Message;
///
/// let conversation = [Message::system("Answer in one word."), Message::user("What is the capital of France?")];
/// assert_eq!(serde_json::to_string(&conversation[0]).unwrap(), r#"{"role":"system","content":"Answer in one word."}"#);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said. Reads `null`, a missing field (both empty) and a list of text parts (joined) too.
    pub content: String,
    /// The thinking before the answer. Reads `reasoning` and `thinking` too.
    #[serde(rename = "reasoning_content", skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    /// The tools that an assistant calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
    /// The call that a tool message answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<String>,
    /// The tool that a tool message comes from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
}

impl Message {
    /// Instructions for the whole conversation; most templates want them first.
    pub fn system(content: impl Into<String>) -> Self {
        Self::new(Role::System, content)
    }

    /// What the person says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::new(Role::User, content)
    }

    /// What the model said. Reasoning and tool calls are fields to set.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::new(Role::Assistant, content)
    }

    /// What the tool gave back for `call`.
    pub fn tool(call: &ToolCall, content: impl Into<String>) -> Self {
        Self { tool_call_id: call.id.clone(), name: Some(call.name.clone()), ..Self::new(Role::Tool, content) }
    }

    fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: content.into(), reasoning: None, tool_calls: Vec::new(), tool_call_id: None, name: None }
    }
}

impl<'de> Deserialize<'de> for Message {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Wire {
            role: Role,
            #[serde(default)]
            content: Value,
            // Servers write the same thinking under up to three names, so these are not aliases of one field.
            reasoning_content: Option<String>,
            reasoning: Option<String>,
            thinking: Option<String>,
            tool_calls: Option<Vec<ToolCall>>,
            tool_call_id: Option<String>,
            name: Option<String>,
        }
        let wire = Wire::deserialize(deserializer)?;
        Ok(Self {
            role: wire.role,
            content: text_content(&wire.content).map_err(D::Error::custom)?,
            reasoning: wire.reasoning_content.or(wire.reasoning).or(wire.thinking),
            tool_calls: wire.tool_calls.unwrap_or_default(),
            tool_call_id: wire.tool_call_id,
            name: wire.name,
        })
    }
}

/// The text of a message's `content`: a string, `null`, or a list of text parts, which are joined.
pub(crate) fn text_content(content: &Value) -> Result<String, String> {
    match content {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (&part["text"], &part["type"]) {
                (Value::String(text), _) => Ok(text.as_str()),
                (_, Value::String(kind)) => Err(format!("content: expected text parts, got one of type {kind}")),
                _ => Err(format!("content: expected text parts, got {part}")),
            })
            .collect(),
        other => Err(format!("content: expected a string or a list of text parts, got {other}")),
    }
}

/// A tool that the model wants run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ToolCall {
    /// What the tool's answer names as the call that it belongs to.
    pub id: Option<String>,
    /// The tool's name.
    pub name: String,
    /// Its arguments, in the order given.
    pub arguments: Map<String, Value>,
}

impl ToolCall {
    /// A call without an id.
    pub fn new(name: impl Into<String>, arguments: Map<String, Value>) -> Self {
        Self { id: None, name: name.into(), arguments }
    }
}

/// Writes `{"id", "type": "function", "function": {"name", "arguments"}}` with the arguments as a JSON string.
impl Serialize for ToolCall {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let arguments = Value::Object(self.arguments.clone()).to_string();
        let function = json!({ "name": self.name, "arguments": arguments });
        let call = match &self.id {
            Some(id) => json!({ "id": id, "type": "function", "function": function }),
            None => json!({ "type": "function", "function": function }),
        };
        call.serialize(serializer)
    }
}

/// Reads what [`Serialize`] writes, the inner object alone, and arguments as an object, a JSON string or none.
impl<'de> Deserialize<'de> for ToolCall {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Wire {
            id: Option<String>,
            function: Option<Function>,
            #[serde(flatten)]
            inner: Map<String, Value>,
        }
        #[derive(Deserialize)]
        struct Function {
            name: String,
            #[serde(default)]
            arguments: Value,
        }
        let wire = Wire::deserialize(deserializer)?;
        let function = match wire.function {
            Some(function) => function,
            None => serde_json::from_value(Value::Object(wire.inner)).map_err(D::Error::custom)?,
        };
        match parse_arguments(&function.arguments) {
            Some(arguments) => Ok(Self { id: wire.id, name: function.name, arguments }),
            None => Err(D::Error::custom(format!(
                "arguments of {}: expected an object, got {}",
                function.name, function.arguments
            ))),
        }
    }
}

/// Tool-call arguments as a mapping, whether they come as one, as JSON in a string, or not at all.
pub(crate) fn parse_arguments(arguments: &Value) -> Option<Map<String, Value>> {
    match arguments {
        Value::Null => Some(Map::new()),
        Value::Object(arguments) => Some(arguments.clone()),
        Value::String(text) if text.trim().is_empty() => Some(Map::new()),
        Value::String(text) => serde_json::from_str(text).ok(),
        _ => None,
    }
}

/// A tool that the model may call, as the JSON that the template shows to the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Tool(Value);

impl Tool {
    /// A function and the JSON schema of its arguments.
    pub fn new(name: impl Into<String>, description: impl Into<String>, parameters: Value) -> Self {
        Self(json!({
            "type": "function",
            "function": { "name": name.into(), "description": description.into(), "parameters": parameters },
        }))
    }

    /// The name that calls use.
    pub fn name(&self) -> &str {
        self.function()["name"].as_str().unwrap_or_default()
    }

    /// The JSON schema of the arguments, `null` when there is none.
    pub fn parameters(&self) -> &Value {
        &self.function()["parameters"]
    }

    fn function(&self) -> &Value {
        self.0.get("function").unwrap_or(&self.0)
    }
}

/// Reads `{"type": "function", "function": {"name", ...}}` or the inner object alone, and keeps every key.
impl<'de> Deserialize<'de> for Tool {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let tool = Self(Value::deserialize(deserializer)?);
        match tool.function()["name"].is_string() {
            true => Ok(tool),
            false => Err(D::Error::custom(format!("tool: expected an object with a name, got {}", tool.0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_shapes_that_clients_send() {
        let message: Message = serde_json::from_value(json!({
            "role": "assistant", "content": null, "reasoning": "hm", "refusal": null,
            "tool_calls": [
                { "id": "c1", "type": "function", "function": { "name": "f", "arguments": "{\"b\": 1, \"a\": [2]}" } },
                { "name": "g", "arguments": { "x": "é" } },
                { "function": { "name": "h", "arguments": "" } },
            ],
        }))
        .unwrap();
        assert_eq!((message.content.as_str(), message.reasoning.as_deref()), ("", Some("hm")));
        let calls: Vec<_> = message.tool_calls.iter().map(|c| (c.name.as_str(), json!(c.arguments))).collect();
        assert_eq!(calls, [("f", json!({ "b": 1, "a": [2] })), ("g", json!({ "x": "é" })), ("h", json!({}))]);
        assert_eq!(message.tool_calls[0].arguments.keys().collect::<Vec<_>>(), ["b", "a"]);

        let both = json!({ "role": "developer", "content": [{ "type": "text", "text": "a" }, { "type": "text", "text": "b" }], "tool_calls": null });
        assert_eq!(serde_json::from_value::<Message>(both).unwrap(), Message::system("ab"));
        let twice = json!({ "role": "assistant", "reasoning": "r", "reasoning_content": "r" });
        assert_eq!(serde_json::from_value::<Message>(twice).unwrap().reasoning.as_deref(), Some("r"));
    }

    #[test]
    fn writes_what_it_reads() {
        let mut call = ToolCall::new("f", Map::from_iter([("b".into(), json!(1.5)), ("a".into(), json!("x"))]));
        call.id = Some("c1".into());
        let mut message = Message::assistant("text");
        message.reasoning = Some("r".into());
        message.tool_calls.push(call.clone());
        let json = serde_json::to_value(&message).unwrap();
        assert_eq!(json["tool_calls"][0]["function"]["arguments"], json!(r#"{"b":1.5,"a":"x"}"#));
        assert_eq!(serde_json::from_value::<Message>(json).unwrap(), message);
        let answer = serde_json::to_string(&Message::tool(&call, "21")).unwrap();
        assert_eq!(answer, r#"{"role":"tool","content":"21","tool_call_id":"c1","name":"f"}"#);
    }

    #[test]
    fn says_what_it_cannot_read() {
        let error = |json: Value| serde_json::from_value::<Message>(json).unwrap_err().to_string();
        let image = json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] });
        assert_eq!(error(image), "content: expected text parts, got one of type image_url");
        let list = json!({ "role": "assistant", "tool_calls": [{ "name": "f", "arguments": [1] }] });
        assert_eq!(error(list), "arguments of f: expected an object, got [1]");
        assert!(serde_json::from_value::<Tool>(json!({ "type": "function" })).is_err());
    }

    #[test]
    fn a_tool_keeps_its_keys() {
        let json = json!({ "type": "function", "function": { "strict": true, "name": "f", "parameters": { "type": "object" } } });
        let tool: Tool = serde_json::from_value(json.clone()).unwrap();
        assert_eq!((tool.name(), tool.parameters()), ("f", &json!({ "type": "object" })));
        assert_eq!(serde_json::to_string(&tool).unwrap(), json.to_string());
        assert_eq!(Tool::new("g", "does g", json!({})).name(), "g");
    }
}
