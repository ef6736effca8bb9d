//! The built-in models through the public interface: every fact they were taught, a conversation, thinking, a tool.
#![cfg(feature = "demo")]

mod support;

use serde_json::json;
use taper::embedding::{Weights, score, top_k};
use taper::{
    Channel, ChatStream, Embedder, EmbedderOptions, Llm, Message, Options, Quantization, SamplingParams, Tool,
};

fn demo() -> Llm {
    Llm::demo(&Options::default()).expect("the demo is built in")
}

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, max_tokens: 200, ..SamplingParams::default() }
}

fn finish(stream: &mut ChatStream) -> String {
    for piece in &mut *stream {
        piece.expect("a piece");
    }
    stream.reply().content.clone()
}

#[test]
fn all_facts() {
    assert_eq!(wrong_facts(None), vec![] as Vec<String>);
}

#[test]
fn packed_weights_know_the_facts() {
    assert_eq!(wrong_facts(Some(Quantization::Q8)), vec![] as Vec<String>);
    let wrong = wrong_facts(Some(Quantization::Q4));
    assert!(wrong.len() <= 8, "{} wrong: {wrong:?}", wrong.len());
}

fn wrong_facts(quantization: Option<Quantization>) -> Vec<String> {
    support::wrong_facts(&Options { quantization, ..Options::default() })
}

#[test]
fn a_conversation_remembers_and_reuses() {
    let mut llm = demo();
    let mut chat = llm.chat();
    chat.params = greedy();
    let mut said = vec![];
    for question in ["What is the capital of France?", "What is its population?", "Name another city in that country."]
    {
        let mut stream = chat.send(question).expect("a prompt");
        said.push(finish(&mut stream));
        let reuse = stream.usage().expect("it has run").reuse;
        if said.len() > 1 {
            assert!(reuse.reused * 2 > reuse.prompt, "{reuse:?}");
            assert_eq!(reuse.shortfall, None, "{reuse:?}");
        }
    }
    assert!(said[0].contains("Paris") && said[1].contains("2.1 million") && said[2].contains("Lyon"), "{said:?}");
    assert_eq!(chat.messages.len(), 6);
}

#[test]
fn thinking_is_a_channel_of_its_own() {
    let mut llm = demo();
    let mut chat = llm.chat();
    chat.params = greedy();
    chat.thinking = Some(true);
    let mut stream = chat.send("What is the capital of France?").expect("a prompt");
    let mut channels = vec![];
    for piece in &mut stream {
        channels.push(piece.expect("a piece").channel);
    }
    channels.dedup();
    assert_eq!(channels, [Channel::Reasoning, Channel::Content]);
    let reply = stream.reply();
    assert!(!reply.reasoning.is_empty() && !reply.reasoning.contains("think>"), "{reply:?}");
    assert_eq!(reply.content, "The capital of France is Paris.");
}

#[test]
fn a_tool_is_called_and_its_answer_used() {
    let mut llm = demo();
    let mut chat = llm.chat();
    chat.params = greedy();
    let parameters = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    chat.tools = vec![Tool::new("get_weather", "The weather in a city.", parameters)];
    let mut stream = chat.send("What is the weather in Paris?").expect("a prompt");
    finish(&mut stream);
    let calls = stream.reply().tool_calls.clone();
    drop(stream);
    assert_eq!(calls.len(), 1);
    assert_eq!((calls[0].name.as_str(), &calls[0].arguments["city"]), ("get_weather", &json!("Paris")));
    chat.messages.push(Message::tool(&calls[0], r#"{"sky": "sunny", "degrees": 21}"#));
    let mut stream = chat.reply().expect("a prompt");
    let answer = finish(&mut stream);
    assert_eq!(answer, "It is sunny in Paris, 21 degrees.");
}

#[test]
fn every_topic_is_found() {
    every_topic_is_found_with(None);
}

#[test]
fn packed_weights_find_every_topic() {
    every_topic_is_found_with(Some(Quantization::Q8));
}

/// The answer to every query stands first among all passages, by each head alone and by all together.
fn every_topic_is_found_with(quantization: Option<Quantization>) {
    #[derive(serde::Deserialize)]
    struct Topic {
        queries: Vec<String>,
        passages: Vec<String>,
    }
    let topics: Vec<Topic> = serde_json::from_str(include_str!("../examples/demo/embed/topics.json")).expect("JSON");
    let options = EmbedderOptions { quantization, ..EmbedderOptions::default() };
    let embedder = Embedder::demo(&options).expect("the demo is built in");
    let all = |of: fn(&Topic) -> &Vec<String>| -> (Vec<usize>, Vec<taper::Embedding>) {
        let pairs =
            topics.iter().enumerate().flat_map(|(topic, texts)| of(texts).iter().map(move |text| (topic, text)));
        let (topics, texts): (Vec<usize>, Vec<&String>) = pairs.unzip();
        (topics, embedder.embed_parallel("", &texts).expect("embeds"))
    };
    let (asked, queries) = all(|topic| &topic.queries);
    let (answered, passages) = all(|topic| &topic.passages);
    assert_eq!(queries.len(), 824);
    for (dense, sparse, colbert) in [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.3, 1.0)] {
        let weights = Weights { dense, sparse, colbert };
        let is_right = |(query, topic): &(&taper::Embedding, &usize)| {
            let scores = passages.iter().map(|passage| score(query, passage, weights).hybrid);
            answered[top_k(scores, 1)[0].0] == **topic
        };
        let right = queries.iter().zip(&asked).filter(is_right).count();
        assert_eq!(right, queries.len(), "{weights:?}");
    }
}
