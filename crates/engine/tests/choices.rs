//! Answers chosen by likelihood, against transformers.

use serde::Deserialize;
use sparsam_engine::{Choices, Engine, Error, Options, Per, choose_among, likeliest};
use std::ops::ControlFlow;

#[derive(Deserialize)]
struct Golden {
    questions: Vec<Question>,
}

#[derive(Deserialize)]
struct Question {
    question: String,
    choices: Vec<String>,
    likelihoods: Vec<One>,
}

#[derive(Deserialize)]
struct One {
    log: f64,
    tokens: usize,
}

fn choices(question: &Question) -> Choices {
    Choices { context: format!("Question: {}\nAnswer:", question.question), texts: question.choices.clone() }
}

#[test]
fn likelihoods_are_those_of_transformers() {
    let golden: Golden = serde_json::from_str(include_str!("golden/choices.json")).unwrap();
    let Some(file) = sparsam_testkit::smollm2() else { return };
    let engine = Engine::load(&file, &Options { exact: true, ..Options::default() }).unwrap();
    let questions: Vec<Choices> = golden.questions.iter().map(choices).collect();
    let mut seen = 0;
    let got = choose_among(&engine, &questions, &mut |i, answers| {
        assert_eq!((i, answers.len()), (seen, questions[i].texts.len()));
        seen += 1;
        ControlFlow::Continue(())
    })
    .unwrap();
    for (want, got) in golden.questions.iter().zip(&got) {
        for (want, got) in want.likelihoods.iter().zip(got) {
            assert_eq!(got.tokens, want.tokens);
            // Sums in f32 in another order: a few 1e-5 of each logit, and logits are up to 40.
            assert!((got.log - want.log).abs() < 2e-3, "{} for {}", got.log, want.log);
        }
        let best = (0..got.len()).max_by(|&a, &b| {
            let per = |i: usize| want.likelihoods[i].log / want.choices[i].chars().count() as f64;
            per(a).total_cmp(&per(b)).then(b.cmp(&a))
        });
        assert_eq!(Some(likeliest(got, Per::Character)), best);
    }
    // It may be ended, and what cannot be measured is named.
    let first = choose_among(&engine, &questions, &mut |_, _| ControlFlow::Break(())).unwrap();
    assert_eq!(first, got[..1]);
    let refused = |context: &str, text: &str| {
        let bad = Choices { context: context.into(), texts: vec![text.into()] };
        let both = [questions[0].clone(), bad];
        choose_among(&engine, &both, &mut |_, _| ControlFlow::Continue(())).unwrap_err()
    };
    let Error::Context { what } = refused("", "b") else { panic!() };
    assert!(what.contains("question 2: nothing stands before"), "{what}");
    let Error::Context { what } = refused(&"word ".repeat(9000), "b") else { panic!() };
    assert!(what.contains("question 2") && what.contains("beyond the context of 8192"), "{what}");
}
