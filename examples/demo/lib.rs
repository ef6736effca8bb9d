//! The checkpoints that Taper uses when no model is named: a 4.4 M parameter Qwen3.5-style hybrid that chats and a
//! 1.1 M parameter bge-m3-style encoder, in Hugging Face layout, trained on a few hundred facts by the scripts beside
//! this file.

/// The files of the chat checkpoint, by name.
pub static CHAT: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("chat/config.json")),
    ("generation_config.json", include_bytes!("chat/generation_config.json")),
    ("model.safetensors", include_bytes!("chat/model.safetensors")),
    ("tokenizer.json", include_bytes!("chat/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("chat/tokenizer_config.json")),
    ("chat_template.jinja", include_bytes!("chat/chat_template.jinja")),
];

/// The files of the encoder's checkpoint, by name.
pub static EMBED: &[(&str, &[u8])] = &[
    ("config.json", include_bytes!("embed/config.json")),
    ("model.safetensors", include_bytes!("embed/model.safetensors")),
    ("sparse_linear.pt", include_bytes!("embed/sparse_linear.pt")),
    ("colbert_linear.pt", include_bytes!("embed/colbert_linear.pt")),
    ("tokenizer.json", include_bytes!("embed/tokenizer.json")),
    ("tokenizer_config.json", include_bytes!("embed/tokenizer_config.json")),
];
