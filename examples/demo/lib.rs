//! The checkpoint that Taper answers with when no model is named: a 4.4 M parameter Qwen3.5-style hybrid in
//! Hugging Face layout, trained on a few hundred facts by the scripts beside this file.

/// The files of the chat checkpoint, by name.
pub static CHAT: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("chat/config.json")),
    ("generation_config.json", include_bytes!("chat/generation_config.json")),
    ("model.safetensors", include_bytes!("chat/model.safetensors")),
    ("tokenizer.json", include_bytes!("chat/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("chat/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("chat/chat_template.jinja")),
];
