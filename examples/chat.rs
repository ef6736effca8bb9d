//! Streams one reply: `cargo run --release --example chat -- [MODEL]`, the built-in demo without a model.

use std::io::Write;

use taper::{Llm, Options};

fn main() -> taper::Result<()> {
    let options = Options::default();
    let mut llm = match std::env::args().nth(1) {
        Some(model) => Llm::load(&model, &options)?,
        None => Llm::demo(&options)?,
    };
    let mut chat = llm.chat();
    for piece in chat.send("What is the capital of France?")? {
        print!("{}", piece?.text);
        let _ = std::io::stdout().flush();
    }
    println!();
    Ok(())
}
