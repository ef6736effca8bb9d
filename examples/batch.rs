//! Answers many questions at once: `cargo run --release --example batch -- [MODEL]`.

use taper::{Llm, Message, Options};

fn main() -> taper::Result<()> {
    let options = Options::default();
    let mut llm = match std::env::args().nth(1) {
        Some(model) => Llm::load(&model, &options)?,
        None => Llm::demo(&options)?,
    };
    let countries =
        ["France", "Germany", "Italy", "Spain", "Portugal", "Austria", "Norway", "Sweden", "Japan", "Egypt"];
    let conversations: Vec<Vec<Message>> =
        countries.iter().map(|country| vec![Message::user(format!("What is the capital of {country}?"))]).collect();
    let params = llm.defaults().clone();
    let mut replies = llm.reply_all(&conversations, &params)?;
    for piece in &mut replies {
        let (index, piece) = piece?;
        if piece.finish.is_some() {
            println!("{:<10} is answered", countries[index]);
        }
    }
    for (index, country) in countries.iter().enumerate() {
        println!("{country}: {}", replies.reply(index).content);
    }
    Ok(())
}
