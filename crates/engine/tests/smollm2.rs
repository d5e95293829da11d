//! The real model: what transformers says of it, and what the engine promises.

use serde::Deserialize;
use sparsam_dtype::DType;
use sparsam_engine::{
    Batcher, Engine, Error, Feed, Finish, Generated, Message, Options, Protocol, Request, Sampling,
    Speculator, Want, Windows, generate, perplexity,
};
use std::ops::ControlFlow;

#[derive(Deserialize)]
struct Golden {
    continuations: Vec<Continuation>,
    text_tokens: usize,
    perplexity_512: f64,
    scored_512: usize,
    perplexity_512_stride_256: f64,
    scored_512_stride_256: usize,
}

#[derive(Deserialize)]
struct Continuation {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
    prompt_ids: Vec<u32>,
    next_ids: Vec<u32>,
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/smollm2.json")).unwrap()
}

/// The real model; `None` if the user wants no tests on it, which the test kit says.
fn engine(options: Options) -> Option<Engine> {
    Some(Engine::load(&sparsam_testkit::smollm2()?, &options).unwrap())
}

fn exact() -> Options {
    Options { exact: true, ..Options::default() }
}

fn answer(engine: &Engine, request: &Request) -> Generated {
    let mut runner = engine.runner(1).unwrap();
    let mut sequence = runner.sequence();
    let mut streamed = String::new();
    let mut on_text = |piece: &str| {
        streamed += piece;
        ControlFlow::Continue(())
    };
    let answer =
        generate(&mut runner, &mut sequence, engine.tokenizer().unwrap(), request, &mut on_text).unwrap();
    assert_eq!(answer.text, streamed);
    answer
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let Some(engine) = engine(exact()) else { return };
    for c in golden().continuations {
        let prompt = match (&c.prompt, &c.messages) {
            (Some(text), _) => engine.encode(text).unwrap(),
            (None, messages) => engine.encode_dialogue(messages.as_ref().unwrap()).unwrap(),
        };
        assert_eq!(prompt, c.prompt_ids, "{:?}", c.prompt);
        let n = c.next_ids.len();
        let request = Request { prompt, max_tokens: Some(n), ignore_end: true, ..Request::default() };
        assert_eq!(answer(&engine, &request).tokens, c.next_ids, "{:?}", c.prompt);
    }
}

fn measure(engine: &Engine, windows: Windows) -> sparsam_engine::Perplexity {
    let text = include_str!("golden/shakespeare-head.txt");
    let tokens = engine.encode(text).unwrap();
    assert_eq!(tokens.len(), golden().text_tokens);
    let protocol = Protocol { context: 512, windows, chunks: None };
    perplexity(engine, &tokens, &protocol, &mut |_, _, _| ControlFlow::Continue(())).unwrap()
}

#[test]
fn exact_perplexity_is_that_of_pytorch() {
    let Some(engine) = engine(exact()) else { return };
    let golden = golden();
    for (windows, want, scored) in [
        (Windows::SideBySide, golden.perplexity_512, golden.scored_512),
        (Windows::Sliding(256), golden.perplexity_512_stride_256, golden.scored_512_stride_256),
    ] {
        let got = measure(&engine, windows);
        assert_eq!(got.tokens_scored, scored);
        // Sums in f32 in another order: a few 1e-6 of each logit.
        assert!((got.perplexity / want - 1.0).abs() < 1e-4, "{windows:?}: {got:?}, not {want}");
    }
}

#[test]
fn fast_perplexity_is_at_most_half_a_percent_above() {
    let Some(engine) = engine(Options::default()) else { return };
    let (got, want) = (measure(&engine, Windows::SideBySide), golden().perplexity_512);
    let loss = got.perplexity / want - 1.0;
    assert!((-0.005..0.005).contains(&loss), "{got:?}, {want} exact");
}

/// Keys and values in blocks of 8 bits, all else exact: a quarter of the memory of f32.
#[test]
fn a_cache_of_8_bits_costs_next_to_nothing() {
    let Some(engine) = engine(Options { cache: Some(DType::Q8_0), ..exact() }) else { return };
    let (got, want) = (measure(&engine, Windows::SideBySide), golden().perplexity_512);
    let loss = got.perplexity / want - 1.0;
    assert!((-0.005..0.005).contains(&loss) && loss != 0.0, "{got:?}, {want} exact");
}

/// Logits after each of `tokens`, fed in parts of these sizes.
fn logits(engine: &Engine, tokens: &[u32], parts: &[usize]) -> Vec<f32> {
    let mut runner = engine.runner_with(1, 512).unwrap();
    let mut sequence = runner.sequence();
    let (mut all, mut rest) = (Vec::new(), tokens);
    for &n in parts {
        let (now, later) = rest.split_at(n);
        let feed = Feed { sequence: &mut sequence, tokens: now, want: Want::From(0) };
        all.extend_from_slice(runner.run(&mut [feed]).unwrap());
        rest = later;
    }
    assert!(rest.is_empty());
    all
}

#[test]
fn how_a_text_is_cut_and_what_runs_beside_it_changes_no_bit() {
    let blocks = Options { cache: Some(DType::Q8_0), ..Options::default() };
    for options in [Options::default(), exact(), blocks] {
        let Some(engine) = engine(options) else { return };
        let tokens = engine.encode("One two three four five six seven eight nine ten.").unwrap();
        let whole = logits(&engine, &tokens, &[tokens.len()]);
        let ones = vec![1; tokens.len()];
        assert!(logits(&engine, &tokens, &ones) == whole, "token by token");
        assert!(logits(&engine, &tokens, &[3, tokens.len() - 3]) == whole, "in two parts");

        let other = engine.encode("Something else altogether").unwrap();
        let mut runner = engine.runner_with(2, 512).unwrap();
        let (mut a, mut b) = (runner.sequence(), runner.sequence());
        let both = runner
            .run(&mut [
                Feed { sequence: &mut b, tokens: &other, want: Want::Last },
                Feed { sequence: &mut a, tokens: &tokens, want: Want::From(0) },
            ])
            .unwrap();
        assert!(both[runner_row(&engine)..] == whole[..], "beside another text");

        runner.append(&mut a, &other).unwrap();
        runner.truncate(&mut a, 4);
        let feed = Feed { sequence: &mut a, tokens: &tokens[4..], want: Want::From(0) };
        let again = runner.run(&mut [feed]).unwrap();
        assert!(*again == whole[4 * runner_row(&engine)..], "rolled back and read again");
    }
}

/// Numbers in a row of logits.
fn runner_row(engine: &Engine) -> usize {
    engine.model().facts().vocab_size
}

#[test]
fn eager_and_compiled_agree() {
    let Some(compiled) = engine(exact()) else { return };
    let Some(eager) = engine(Options { eager: true, ..exact() }) else { return };
    let tokens = compiled.encode("The sea was calm that evening.").unwrap();
    let (a, b) = (logits(&compiled, &tokens, &[tokens.len()]), logits(&eager, &tokens, &[tokens.len()]));
    let (at, off) = sparsam_testkit::max_abs_diff(&a, &b);
    // Logits are up to 40; 30 layers of sums in f32 that differ in order.
    assert!(off < 2e-3, "logit {at}: {} compiled, {} eager", a[at], b[at]);
}

#[test]
fn answers_end_where_they_should() {
    let Some(engine) = engine(Options::default()) else { return };
    let prompt = engine.encode("The first ten numbers are 1, 2, 3, 4,").unwrap();
    let request = Request { prompt, max_tokens: Some(24), ..Request::default() };
    let whole = answer(&engine, &request);
    assert_eq!((whole.finish, whole.tokens.len()), (Finish::Length, 24));

    let cut = answer(&engine, &Request { stops: vec![" 6".into(), "never".into()], ..request.clone() });
    assert_eq!(cut.finish, Finish::Stop);
    assert_eq!(cut.text, whole.text[..whole.text.find(" 6").unwrap()]);

    let sampled = |seed| {
        let sampling = Sampling { temperature: 1.5, seed, ..Sampling::default() };
        answer(&engine, &Request { sampling, ..request.clone() }).text
    };
    assert_eq!(sampled(1), sampled(1));
    assert_ne!(sampled(1), sampled(2));
}

#[test]
fn a_chat_reads_only_what_is_new() {
    let Some(engine) = engine(Options::default()) else { return };
    let mut runner = engine.runner(1).unwrap();
    let mut sequence = runner.sequence();
    let mut dialogue = vec![Message::new("user", "Name a colour.")];
    let mut ask = |dialogue: &[Message]| {
        let prompt = engine.encode_dialogue(dialogue).unwrap();
        let request = Request { prompt: prompt.clone(), max_tokens: Some(16), ..Request::default() };
        let tokenizer = engine.tokenizer().unwrap();
        let answer =
            generate(&mut runner, &mut sequence, tokenizer, &request, &mut |_| ControlFlow::Continue(()))
                .unwrap();
        (prompt.len(), answer)
    };
    let (_, first) = ask(&dialogue);
    dialogue.push(Message::new("assistant", first.text));
    dialogue.push(Message::new("user", "And another."));
    let (length, second) = ask(&dialogue);
    assert!(second.prompt_tokens < length / 2, "{} of {length} read again", second.prompt_tokens);
    let prompt = engine.encode_dialogue(&dialogue).unwrap();
    let fresh = answer(&engine, &Request { prompt, max_tokens: Some(16), ..Request::default() });
    assert_eq!(second.tokens, fresh.tokens);
}

#[test]
fn what_does_not_fit_is_refused_with_the_numbers() {
    let Some(engine) = engine(Options { context: Some(32), ..Options::default() }) else { return };
    let mut runner = engine.runner(1).unwrap();
    let mut sequence = runner.sequence();
    let tokens = vec![1; 33];
    let e = runner.append(&mut sequence, &tokens).unwrap_err();
    assert!(matches!(e, Error::TooLong { tokens: 33, room: 32, context: 32, made_for: 8192 }), "{e}");
    assert!(matches!(runner.append(&mut sequence, &[]).unwrap_err(), Error::EmptyPrompt));
    assert!(matches!(runner.append(&mut sequence, &[49152]).unwrap_err(), Error::TokenId { id: 49152, .. }));
    assert!(sequence.tokens().is_empty(), "a refused prompt leaves nothing behind");

    // Full to the last token, and then the answer says why it ended.
    let request = Request { prompt: tokens[..30].to_vec(), ignore_end: true, ..Request::default() };
    let tokenizer = engine.tokenizer().unwrap();
    let full = generate(&mut runner, &mut sequence, tokenizer, &request, &mut |_| ControlFlow::Continue(()))
        .unwrap();
    assert_eq!((full.finish, full.tokens.len()), (Finish::Context, 3));

    let beyond = Options { context: Some(9000), ..Options::default() };
    let path = sparsam_testkit::smollm2().unwrap();
    assert!(Engine::load(&path, &beyond).err().unwrap().to_string().contains("made for 8192"));
}

#[test]
fn answers_together_are_those_alone() {
    let Some(engine) = engine(Options { context: Some(256), ..Options::default() }) else { return };
    let system = "You are a helpful assistant who answers questions about the world, its rivers, mountains, towns and people, in one short sentence that a child of eight can understand without help from anybody else, and without any long words at all. If you do not know the answer, say so at once, and name somebody who may know it, such as a teacher, a librarian or a parent.";
    let ask = |question: &str| {
        engine.encode_dialogue(&[Message::new("system", system), Message::new("user", question)]).unwrap()
    };
    let questions = ["What is a river?", "Where is Paris?", "How high is Everest?", "What is rain?"];
    let requests: Vec<Request> = questions
        .iter()
        .zip(0..)
        .map(|(q, seed)| Request {
            prompt: ask(q),
            sampling: Sampling { temperature: 0.7, seed, ..Sampling::default() },
            max_tokens: Some(12 + seed as usize),
            ..Request::default()
        })
        .collect();
    // Two places for four requests: two wait, and find the system message in the cache.
    let mut batcher = Batcher::new(&engine, 2).unwrap();
    let ids: Vec<_> = requests.iter().map(|r| batcher.submit(r.clone(), Some(3)).unwrap()).collect();
    let lost =
        batcher.submit(Request { prompt: ask("Never answered."), ..Request::default() }, None).unwrap();
    batcher.cancel(lost);
    let mut answers = vec![(String::new(), Vec::new(), None); ids.len()];
    let mut reused = 0;
    while batcher.load() != (0, 0) {
        for output in batcher.step().unwrap() {
            let i = ids.iter().position(|&id| id == output.id).unwrap();
            let (text, tokens, finish) = &mut answers[i];
            *text += &output.text;
            tokens.extend(output.token);
            *finish = output.finish;
            reused += output.reused.unwrap_or(0);
            let logprob = output.logprob.unwrap();
            assert!(logprob.top.len() == 3 && logprob.top[0].1 >= logprob.logprob && logprob.logprob < 0.0);
        }
    }
    assert!(reused >= 2 * 64, "{reused} tokens found in the cache");
    for (request, (text, tokens, finish)) in requests.iter().zip(answers) {
        let alone = answer(&engine, request);
        assert_eq!((text, tokens, finish), (alone.text, alone.tokens, Some(alone.finish)));
    }
    // All pages but those of kept texts come back.
    let (free, all) = batcher.cache();
    assert!(free < all && free > 0, "{free} of {all}");
    assert!(batcher.submit(Request::default(), None).is_err());
    let long = Request { prompt: vec![1; 256], ..Request::default() };
    assert!(matches!(batcher.submit(long, None), Err(Error::TooLong { tokens: 256, context: 256, .. })));
}

#[test]
fn a_draft_changes_the_speed_but_not_the_text() {
    let Some(engine) = engine(exact()) else { return };
    // The same file with rounded activations: nearly always of the same opinion, but not always. Its context ends
    // within the longest answers: behind it, the model goes on alone.
    let Some(draft) = self::engine(Options { context: Some(70), ..Options::default() }) else { return };
    let mut go_on = |_: &str| ControlFlow::Continue(());
    for (prompt, draft_tokens) in [("The three primary colours are", 1), ("def fibonacci(n):\n", 5)] {
        let prompt = engine.encode(prompt).unwrap();
        let request = |max| Request { prompt: prompt.clone(), max_tokens: Some(max), ..Request::default() };
        let alone = answer(&engine, &request(80));
        let mut speculator = Speculator::new(&engine, &draft, draft_tokens).unwrap();
        for max_tokens in [80, 1, 2, 40] {
            let (together, told) = speculator.generate(&engine, &request(max_tokens), &mut go_on).unwrap();
            let same = max_tokens.min(alone.tokens.len());
            assert_eq!(together.tokens, alone.tokens[..same]);
            assert!(told.checks + told.accepted + 1 >= same, "{told:?}");
            if max_tokens == 80 {
                assert_eq!((&together.text, together.finish), (&alone.text, alone.finish));
            }
            if max_tokens == 40 && draft_tokens > 1 {
                assert!(told.acceptance().unwrap() > 0.5 && told.checks < 30, "{told:?}");
            }
        }
    }
    let warm =
        Request { sampling: Sampling { temperature: 1.0, ..Sampling::default() }, ..Request::default() };
    let mut speculator = Speculator::new(&engine, &draft, 4).unwrap();
    let refused = speculator.generate(&engine, &warm, &mut go_on);
    assert!(refused.unwrap_err().to_string().contains("must be 0"));
}
