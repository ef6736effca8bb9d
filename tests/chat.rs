//! A conversation's verbs on the built-in model: what each leaves behind, what it reuses, and what a file keeps.
#![cfg(feature = "demo")]

use std::fs;
use std::path::Path;

use taper::{Chat, ChatStream, EngineOptions, Llm, Message, Options, Role, SamplingParams};

fn demo() -> Llm {
    Llm::demo(&Options::default()).expect("the demo is built in")
}

/// A greedy conversation with this many turns behind it.
fn chat(llm: &mut Llm, turns: usize) -> Chat<'_> {
    let mut chat = llm.chat();
    chat.params = SamplingParams { temperature: 0.0, max_tokens: 60, logprobs: Some(1), ..SamplingParams::default() };
    for question in QUESTIONS.iter().take(turns) {
        chat.send(*question).expect("a prompt").finish().expect("a reply");
    }
    chat
}

const QUESTIONS: [&str; 3] =
    ["What is the capital of France?", "What is its population?", "Name another city in that country."];

/// A reply to the bit: its text and its log-probabilities. With what was reused of its prompt.
fn exactly(mut stream: ChatStream) -> ((String, Vec<u32>), usize) {
    let mut bits = vec![];
    for piece in &mut stream {
        bits.extend(piece.expect("a piece").logprobs.map(|logprobs| logprobs.chosen.to_bits()));
    }
    ((stream.reply().content.clone(), bits), stream.usage().expect("it has run").reuse.reused)
}

fn contents<'a>(chat: &'a Chat) -> Vec<&'a str> {
    chat.messages.iter().map(|message| message.content.as_str()).collect()
}

#[test]
fn undo_takes_back_a_turn() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 2);
    let before = contents(&chat)[..2].join("|");
    assert_eq!(chat.undo().expect("a message").content, QUESTIONS[1]);
    assert_eq!(contents(&chat).join("|"), before);
    assert!(chat.undo().is_some() && chat.undo().is_none() && chat.messages.is_empty());
}

#[test]
fn a_reply_again_is_the_same_reply_and_reuses_its_prompt() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 2);
    let last = chat.messages[3].content.clone();
    let mut stream = chat.regenerate().expect("a prompt");
    while stream.usage().is_none() {
        stream.next().expect("a piece").expect("a piece");
    }
    let reuse = stream.usage().expect("it has run").reuse;
    // The opening of the reply runs again, and nothing before it.
    assert!(reuse.prompt - reuse.reused < 10, "{reuse:?}");
    assert_eq!(stream.finish().expect("a reply").content, last);
    assert_eq!(chat.messages.len(), 4);
}

#[test]
fn a_message_said_anew_replaces_what_came_after_it() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 3);
    let (reply, reused) = exactly(chat.edit(1, "Name another city in that country.").expect("a prompt"));
    assert!(reply.0.contains("Lyon") && reused > 10, "{reply:?}, {reused} reused");
    assert_eq!(chat.messages.len(), 4);
    let error = chat.edit(2, "Hello").map(drop).unwrap_err();
    assert_eq!(error.to_string(), "no message 3: there are 2");
}

#[test]
fn what_gets_no_reply_changes_nothing() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 2);
    let before = chat.messages.clone();
    drop(chat.regenerate().expect("a prompt"));
    drop(chat.edit(0, "What is the capital of Spain?").expect("a prompt"));
    assert_eq!(chat.messages, before);
    chat.params.temperature = -1.0;
    assert!(chat.regenerate().is_err() && chat.edit(0, "Hello").is_err() && chat.send("Hello").is_err());
    assert_eq!(chat.messages, before);
    chat.messages = vec![Message::system("Be brief.")];
    assert!(chat.regenerate().is_err() && chat.undo().is_none());
    assert_eq!(chat.messages.len(), 1);
}

#[test]
fn branches_part_and_stay() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 1);
    chat.fork("population").expect("a new name");
    chat.send(QUESTIONS[1]).expect("a prompt").finish().expect("a reply");
    assert_eq!((chat.branch(), chat.branches()), ("population", vec!["main", "population"]));
    chat.switch("main").expect("it is there");
    assert_eq!(chat.messages.len(), 2);
    let (reply, reused) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
    assert!(reply.0.contains("Lyon") && reused > 10, "{reply:?}, {reused} reused");
    chat.switch("population").expect("it is there");
    assert!(contents(&chat)[3].contains("2.1 million"));
    assert_eq!(chat.fork("main").unwrap_err().to_string(), "there is a branch main already");
    assert_eq!(chat.switch("spain").unwrap_err().to_string(), "no branch spain: there are main, population");
}

#[test]
fn thinking_is_not_run_again() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 0);
    chat.thinking = Some(true);
    let mut stream = chat.send(QUESTIONS[0]).expect("a prompt");
    stream.by_ref().for_each(|piece| drop(piece.expect("a piece")));
    let first = stream.usage().expect("it has run");
    assert!(!stream.reply().reasoning.is_empty());
    drop(stream);
    let mut stream = chat.send(QUESTIONS[1]).expect("a prompt");
    stream.by_ref().for_each(|piece| drop(piece.expect("a piece")));
    let reuse = stream.usage().expect("it has run").reuse;
    // All that the first prompt shares with the second: without its opening of the reply, `<think>` and its like.
    assert!(first.reuse.prompt - reuse.reused <= 6, "{reuse:?} after {first:?}");
    assert!(reuse.prompt - reuse.reused < first.generated_tokens + 20, "{reuse:?} after {first:?}");
}

/// A file saved in the middle of a conversation, and that conversation's next reply.
fn saved(folder: &Path) -> (std::path::PathBuf, (String, Vec<u32>)) {
    let path = folder.join("paris.taper");
    let mut llm = demo();
    let mut chat = chat(&mut llm, 1);
    chat.messages.insert(0, Message::system("Be brief."));
    chat.regenerate().expect("a prompt").finish().expect("a reply");
    chat.fork("population").expect("a new name");
    chat.send(QUESTIONS[1]).expect("a prompt").finish().expect("a reply");
    chat.params.seed = Some(7);
    chat.save(&path).expect("writable");
    let (next, _) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
    (path, next)
}

#[test]
fn a_saved_conversation_goes_on_where_it_stopped() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (path, next) = saved(folder.path());
    let entries = || fs::read_dir(folder.path()).expect("readable").count();
    assert_eq!(entries(), 1, "nothing is left beside the file");
    let mut llm = demo();
    let mut chat = llm.chat();
    let loaded = chat.load(&path).expect("a saved conversation");
    assert!(loaded.not_cached.is_none() && loaded.cached_tokens > 30, "{loaded:?}");
    assert_eq!((chat.branch(), chat.branches(), chat.params.seed), ("population", vec!["main", "population"], Some(7)));
    assert_eq!((chat.messages.len(), chat.messages[0].role), (5, Role::System));
    let (reply, reused) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
    assert_eq!(reply, next);
    assert_eq!(reused, loaded.cached_tokens);
    chat.switch("main").expect("it is there");
    let (_, reused) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
    assert!(reused > 10, "{reused}: the other branch was saved too");
    chat.save(&path).expect("a saved conversation may be replaced");
    assert_eq!(entries(), 1);
}

#[test]
fn a_cache_that_does_not_fit_is_said_and_done_without() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (path, next) = saved(folder.path());
    let blocks = EngineOptions { block_size: 16, ..EngineOptions::default() };
    let options = Options { engine: blocks, ..Options::default() };
    let other_dtype = Options { dtype: Some(candle_core::DType::BF16), ..Options::default() };
    for (options, reason) in [
        (options, "saved cache: blocks of 32 tokens, the engine has blocks of 16"),
        (other_dtype, "it was computed by taper 0.1.0 in f32 on the CPU, this is taper 0.1.0 in bf16 on the CPU"),
    ] {
        let mut llm = Llm::demo(&options).expect("the demo is built in");
        let mut chat = llm.chat();
        let loaded = chat.load(&path).expect("a saved conversation");
        assert_eq!((loaded.cached_tokens, loaded.not_cached.as_deref()), (0, Some(reason)));
        let (reply, reused) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
        assert_eq!((reply.0, reused), (next.0.clone(), 0));
    }
}

#[test]
fn too_small_a_cache_takes_what_it_can() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (path, next) = saved(folder.path());
    let engine = EngineOptions { max_checkpoints: 0, max_sequences: 1, ..EngineOptions::default() };
    let mut llm = Llm::demo(&Options { engine, ..Options::default() }).expect("the demo is built in");
    let mut chat = llm.chat();
    chat.load(&path).expect("a saved conversation");
    let (reply, _) = exactly(chat.send(QUESTIONS[2]).expect("a prompt"));
    assert_eq!(reply, next);
}

#[test]
fn a_damaged_file_is_refused_and_the_conversation_stays() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (path, _) = saved(folder.path());
    let whole = fs::read(&path).expect("readable");
    let mut llm = demo();
    let mut chat = chat(&mut llm, 1);
    let before = chat.messages.clone();
    let bad = folder.path().join("bad.taper");
    let mut check = |bytes: &[u8], what: &str| {
        fs::write(&bad, bytes).expect("writable");
        let error = chat.load(&bad).expect_err(what).to_string();
        assert!(error.contains("damaged or cut short"), "{what}: {error}");
        assert_eq!(chat.messages, before, "{what}");
    };
    for len in [0, 7, 8, 100, whole.len() / 2, whole.len() - 1] {
        check(&whole[..len], &format!("cut to {len} bytes"));
    }
    check(&[&whole[..], b"x"].concat(), "a byte too many");
    for position in (0..whole.len()).step_by(whole.len() / 97) {
        let mut altered = whole.clone();
        altered[position] ^= 0x55;
        check(&altered, &format!("byte {position} altered"));
    }
    let error = chat.load(folder.path().join("none")).expect_err("no file").to_string();
    assert!(error.contains("No such file") || error.contains("cannot find"), "{error}");
}

#[test]
fn only_a_saved_conversation_is_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("notes.txt");
    fs::write(&path, "mine").expect("writable");
    let mut llm = demo();
    let chat = chat(&mut llm, 1);
    let error = chat.save(&path).unwrap_err().to_string();
    assert!(
        error.ends_with("is there and is no saved conversation, so it stays as it is: choose another name"),
        "{error}"
    );
    assert_eq!(fs::read_to_string(&path).expect("readable"), "mine");
    assert!(chat.save(folder.path()).is_err() && chat.save(folder.path().join("no/such")).is_err());
}

#[test]
fn an_early_message_said_anew_resumes_before_it() {
    let mut llm = demo();
    let mut chat = chat(&mut llm, 0);
    chat.params.max_tokens = 12;
    let mut reused = vec![];
    for turn in 0..10 {
        reused.push(exactly(chat.send(QUESTIONS[turn % 3]).expect("a prompt")).1);
    }
    let mut stream = chat.edit(8, "What is the capital of Spain?").expect("a prompt");
    stream.by_ref().for_each(|piece| drop(piece.expect("a piece")));
    let reuse = stream.usage().expect("it has run").reuse;
    assert_eq!(reuse.reused, reused[8], "{reuse:?} {reused:?}");
}
