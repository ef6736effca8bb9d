//! A conversation of ten turns: what each turn runs and how long its first token takes, with the cache and without.
//!
//! `cargo bench --bench conversation -- FOLDER` with a chat model's folder, such as `make_fullsize.py Qwen3.5-0.8B`
//! writes. Three conversations with the cache; their median counts. Without it each turn's prompt begins with a word
//! that no other has.

use std::time::Duration;

use taper::{Chat, ChatStream, Llm, Message, Options, Reuse, SamplingParams};

const TURNS: usize = 10;
const ROUNDS: usize = 3;
const REPLY: usize = 24;

type AnyError = Box<dyn std::error::Error>;

/// What a reply's prompt was, and when its first token came.
type Turn = (Reuse, Duration);

fn main() -> Result<(), AnyError> {
    let Some(folder) = std::env::args().skip(1).find(|arg| !arg.starts_with("--")) else {
        println!("no folder given: cargo bench --bench conversation -- FOLDER");
        return Ok(());
    };
    let mut llm = Llm::load(&folder, &Options::default())?;
    let mut rounds: Vec<Vec<Turn>> = vec![];
    let mut messages = vec![];
    for round in 0..ROUNDS {
        let mut chat = chat(&mut llm, &format!("Conversation {round}."));
        let mut turns = vec![];
        for turn in 0..TURNS {
            turns.push(first_token(chat.send(question(turn))?)?);
        }
        turns.push(first_token(chat.regenerate()?)?);
        turns.push(first_token(chat.edit(TURNS - 2, question(TURNS))?)?);
        messages = chat.messages.clone();
        rounds.push(turns);
    }
    let mut without = vec![];
    for turn in 0..TURNS - 1 {
        let mut chat = chat(&mut llm, &format!("Alone {turn}."));
        let said = chat.messages.len() + 2 * turn;
        chat.messages.extend_from_slice(&messages[1..said]);
        without.push(first_token(chat.send(question(turn))?)?);
    }

    println!(
        "{:<8} {:>7} {:>7} {:>4} {:>12} {:>16}",
        "turn", "prompt", "reused", "ran", "first token", "without cache"
    );
    let first_tokens: Vec<f64> =
        (0..TURNS + 2).map(|turn| median(rounds.iter().map(|turns| turns[turn].1.as_secs_f64()))).collect();
    for (turn, (reuse, _)) in rounds[0].iter().enumerate() {
        let name = match turn {
            TURNS => "again".to_string(),
            turn if turn > TURNS => "edit 9".to_string(),
            turn => (turn + 1).to_string(),
        };
        let alone = match turn {
            TURNS => None,
            turn if turn > TURNS => without.get(TURNS - 2),
            turn => without.get(turn),
        };
        println!(
            "{name:<8} {:>7} {:>7} {:>4} {:>10.2} s {:>16}",
            reuse.prompt,
            reuse.reused,
            reuse.prompt - reuse.reused,
            first_tokens[turn],
            alone.map_or("-".to_string(), |(reuse, time)| format!("{:.2} s for {}", time.as_secs_f64(), reuse.prompt))
        );
    }
    println!("first token of turn {TURNS} over that of turn 2: {:.2}", first_tokens[TURNS - 1] / first_tokens[1]);
    Ok(())
}

fn chat<'a>(llm: &'a mut Llm, system: &str) -> Chat<'a> {
    let mut chat = llm.chat();
    chat.params = SamplingParams { max_tokens: REPLY, ignore_eos: true, ..SamplingParams::default() };
    chat.thinking = Some(false);
    chat.messages.push(Message::system(system));
    chat
}

fn question(turn: usize) -> String {
    let topics =
        ["rivers", "trees", "bridges", "stars", "winds", "roads", "seas", "birds", "stones", "clocks", "boats"];
    let topic = topics[turn % topics.len()];
    format!("Tell me something about {topic} that most people do not know, in two or three sentences, please.")
}

fn first_token(mut stream: ChatStream) -> Result<Turn, AnyError> {
    for piece in &mut stream {
        piece?;
    }
    let usage = stream.usage().ok_or("no token")?;
    Ok((usage.reuse, usage.time_to_first_token))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
