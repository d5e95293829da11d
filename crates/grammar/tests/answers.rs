//! Answers of the real model that keep to a schema.

use serde_json::{Value, json};
use sparsam_engine::{
    Batcher, Engine, Finish, Message, Options, Request, Rule, Sampling, Speculator, generate,
};
use sparsam_grammar::{Grammar, Grammars};
use std::ops::ControlFlow;

fn engine() -> Option<Engine> {
    let options = Options { context: Some(512), ..Options::default() };
    Some(Engine::load(&sparsam_testkit::smollm2()?, &options).unwrap())
}

fn schema() -> Grammar {
    Grammar::JsonSchema(json!({
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 20},
            "inhabitants": {"type": "integer", "minimum": 1, "maximum": 99999999}
        },
        "required": ["city", "inhabitants"],
        "additionalProperties": false
    }))
}

fn request(engine: &Engine, temperature: f32, seed: u64, rule: Option<Box<dyn Rule>>) -> Request {
    let dialogue = [Message::new("user", "Tell me about the capital of France as JSON.")];
    let sampling = Sampling { temperature, seed, ..Sampling::default() };
    let prompt = engine.encode_dialogue(&dialogue).unwrap();
    Request { prompt, sampling, rule, max_tokens: Some(60), ..Request::default() }
}

fn answer(engine: &Engine, request: &Request) -> (String, Finish) {
    let mut runner = engine.runner(1).unwrap();
    let mut sequence = runner.sequence();
    let tokenizer = engine.tokenizer().unwrap();
    let on_text = &mut |_: &str| ControlFlow::Continue(());
    let got = generate(&mut runner, &mut sequence, tokenizer, request, on_text).unwrap();
    (got.text, got.finish)
}

#[test]
fn a_schema_is_kept_to_alone_in_a_batch_and_with_a_draft() {
    let Some(engine) = engine() else { return };
    let words = Grammars::new(engine.tokenizer().unwrap(), engine.model().facts().vocab_size).unwrap();
    let rule = words.compile(&schema()).unwrap();
    let requests = [
        request(&engine, 0.0, 0, Some(rule.clone())),
        request(&engine, 1.5, 1, Some(rule.clone())),
        request(&engine, 1.5, 2, None),
        request(&engine, 1.5, 3, Some(rule)),
    ];
    let alone: Vec<(String, Finish)> = requests.iter().map(|r| answer(&engine, r)).collect();
    for (i, (text, finish)) in alone.iter().enumerate().filter(|(i, _)| *i != 2) {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{i}: {e}: {text}"));
        assert!(value["city"].is_string() && value["inhabitants"].is_u64(), "{text}");
        assert_eq!((value.as_object().unwrap().len(), *finish), (2, Finish::Stop), "{text}");
    }

    let mut batcher = Batcher::new(&engine, 4).unwrap();
    let ids: Vec<_> = requests.iter().map(|r| batcher.submit(r.clone(), None).unwrap()).collect();
    let mut texts = vec![String::new(); ids.len()];
    let mut open = ids.len();
    while open > 0 {
        for output in batcher.step().unwrap() {
            let i = ids.iter().position(|id| *id == output.id).unwrap();
            texts[i] += &output.text;
            open -= usize::from(output.finish.is_some());
        }
    }
    let alone: Vec<&String> = alone.iter().map(|a| &a.0).collect();
    assert_eq!(texts.iter().collect::<Vec<_>>(), alone);

    let mut speculator = Speculator::new(&engine, &engine, 4).unwrap();
    let (drafted, _) =
        speculator.generate(&engine, &requests[0], &mut |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(&drafted.text, alone[0]);
}
