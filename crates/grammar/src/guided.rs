//! The library and what stands around it.

use crate::{Error, Grammar};
use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use sparsam_engine::Rule;
use sparsam_tokenizer::Tokenizer;
use std::fmt;
use std::sync::Arc;

/// A vocabulary made ready for grammars; made once for a model, in some ten milliseconds.
pub struct Grammars {
    factory: ParserFactory,
}

/// Most states of a lexer, of 1 to 2 KiB each: a hostile grammar takes some 100 MiB at worst.
const MAX_LEXER_STATES: usize = 50_000;

impl Grammars {
    /// For a model with `vocab_size` logits, of which `tokenizer` may know fewer.
    ///
    /// # Errors
    /// If the vocabulary is none that the library can use.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize) -> Result<Grammars, Error> {
        let word = |id: u32| {
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            // No text can hold the marker, so no grammar allows what stands for no text.
            let marker = if tokenizer.is_special(id) { &[TokTrie::SPECIAL_TOKEN_MARKER][..] } else { &[] };
            [marker, &bytes].concat()
        };
        let words: Vec<Vec<u8>> = (0..vocab_size as u32).map(word).collect();
        let ends: Vec<u32> =
            tokenizer.stop_ids().iter().copied().filter(|&id| (id as usize) < vocab_size).collect();
        let info = TokRxInfo::new(vocab_size as u32, ends.first().copied().unwrap_or(INVALID_TOKEN));
        let mut trie = TokTrie::from(&info, &words);
        if !ends.is_empty() {
            trie = trie.with_eos_tokens(&ends);
        }
        let env = Arc::new(ApproximateTokEnv::new(trie));
        let refused = |e| Error { what: "the vocabulary", why: one_line(&e) };
        let mut factory = ParserFactory::new_simple(&(env as _)).map_err(refused)?;
        *factory.quiet().limits_mut() = ParserLimits {
            max_lexer_states: MAX_LEXER_STATES,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Grammars { factory })
    }

    /// Makes `grammar` ready for answers.
    ///
    /// # Errors
    /// If it is not valid, cannot be fulfilled, uses what the library does not know, or is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Rule>, Error> {
        let what = match grammar {
            Grammar::JsonSchema(_) => "the JSON schema",
            Grammar::Lark(_) => "the grammar",
        };
        let refused = |e| Error { what, why: one_line(&e) };
        let top = match grammar {
            Grammar::JsonSchema(schema) => {
                let mut schema = schema.clone();
                if let Value::Object(fields) = &mut schema {
                    let separators =
                        json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "});
                    fields.entry("x-guidance").or_insert(separators);
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        };
        let mut matcher = Matcher::new(Ok(self.factory.create_parser(top).map_err(refused)?));
        // What no token can begin is better said now than at the first token.
        matcher.compute_mask_or_eos().map_err(refused)?;
        Ok(Box::new(Guided { grammar: Arc::new(grammar.clone()), matcher }))
    }
}

/// The library's own words without the lines that it puts around them.
fn one_line(e: &dyn fmt::Display) -> String {
    let text = format!("{e:#}");
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("<state>"));
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ")
}

/// A grammar and how far a text has come in it.
struct Guided {
    grammar: Arc<Grammar>,
    matcher: Matcher,
}

impl fmt::Debug for Guided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.grammar.fmt(f)
    }
}

impl Rule for Guided {
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String> {
        let mask = self.matcher.compute_mask().map_err(|e| one_line(&e))?;
        mask.iter_unset_entries(|id| {
            if let Some(logit) = logits.get_mut(id) {
                *logit = f32::NEG_INFINITY;
            }
        });
        Ok(())
    }

    fn take(&mut self, token: u32) -> Result<(), String> {
        self.matcher.consume_token(token).map_err(|e| one_line(&e))
    }

    fn ended(&self) -> bool {
        self.matcher.is_stopped()
    }

    fn fork(&self) -> Box<dyn Rule> {
        Box::new(Guided { grammar: self.grammar.clone(), matcher: self.matcher.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_engine::{Sampler, Sampling};
    use std::collections::BTreeSet;

    struct Words {
        tokenizer: Tokenizer,
        size: usize,
        grammars: Grammars,
    }

    /// The real model's vocabulary.
    fn words() -> Option<Words> {
        let opened = sparsam_engine::open(&sparsam_testkit::smollm2()?).unwrap();
        let size = opened.model.facts().vocab_size;
        let tokenizer = opened.tokenizer.unwrap();
        let grammars = Grammars::new(&tokenizer, size).unwrap();
        Some(Words { tokenizer, size, grammars })
    }

    impl Words {
        /// What a model without any sense writes: random logits, drawn from as they are, until the grammar ends.
        fn write(&self, rule: &dyn Rule, seed: u64) -> String {
            let mut rule = rule.fork();
            let sampling = Sampling { temperature: 1.0, seed, ..Sampling::default() };
            let mut sampler = Sampler::new(&sampling).unwrap();
            let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
            let mut random = || {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 40) as f32 / (1u64 << 22) as f32
            };
            let mut tokens = Vec::new();
            while !rule.ended() {
                let mut logits: Vec<f32> = (0..self.size).map(|_| random()).collect();
                rule.restrict(&mut logits).unwrap();
                let token = sampler.choose(&logits, &[]).unwrap();
                rule.take(token).unwrap();
                tokens.push(token);
                assert!(tokens.len() < 1000, "no end: {:?}", self.tokenizer.decode(&tokens, true));
            }
            self.tokenizer.decode(&tokens, true)
        }
    }

    #[test]
    fn whatever_the_seed_the_json_fits_the_schema() {
        let Some(words) = words() else { return };
        let schema = json!({
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 12},
                "age": {"type": "integer", "minimum": 0, "maximum": 130},
                "kind": {"enum": ["cat", "dog"]},
                "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
                "left": {"$ref": "#/$defs/maybe"}
            },
            // Bounded, since JSON allows numbers that no f64 holds.
            "$defs": {"maybe": {"anyOf": [{"type": "number", "minimum": -99, "maximum": 99}, {"type": "null"}]}},
            "required": ["name", "age", "kind", "tags"],
            "additionalProperties": false
        });
        let rule = words.grammars.compile(&Grammar::JsonSchema(schema)).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..60 {
            let text = words.write(&*rule, seed);
            let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
            let fields = value.as_object().unwrap();
            let known = ["name", "age", "kind", "tags", "left"];
            assert!(fields.keys().all(|k| known.contains(&k.as_str())), "{text}");
            assert!(value["name"].as_str().unwrap().chars().count() <= 12, "{text}");
            assert!((0..=130).contains(&value["age"].as_i64().unwrap()), "{text}");
            assert!(value["kind"] == "cat" || value["kind"] == "dog", "{text}");
            let tags = value["tags"].as_array().unwrap();
            assert!((1..=3).contains(&tags.len()) && tags.iter().all(Value::is_boolean), "{text}");
            assert!(fields.get("left").is_none_or(|x| x.is_number() || x.is_null()), "{text}");
            seen.insert((value["kind"].to_string(), tags.len(), fields.contains_key("left")));
        }
        // It is free where the schema leaves it so.
        assert!(seen.len() > 6, "{seen:?}");
    }

    #[test]
    fn a_text_ends_with_its_grammar() {
        let Some(words) = words() else { return };
        let grammar = Grammar::Lark("start: \"yes\" | \"no\" (\", \" /[0-9]{3}/)?".into());
        let rule = words.grammars.compile(&grammar).unwrap();
        let mut seen = BTreeSet::new();
        for seed in 0..40 {
            let text = words.write(&*rule, seed);
            let number = text.strip_prefix("no, ").is_some_and(|n| n.len() == 3 && n.parse::<u32>().is_ok());
            assert!(text == "yes" || text == "no" || number, "{text}");
            seen.insert(text);
        }
        assert!(seen.len() > 2, "{seen:?}");
    }

    #[test]
    fn bad_grammars_are_refused_in_one_line() {
        let Some(words) = words() else { return };
        let nothing = json!({"type": "integer", "minimum": 3, "maximum": 2});
        for (grammar, says) in [
            (Grammar::JsonSchema(json!({"type": "colour"})), "colour"),
            (Grammar::JsonSchema(json!(7)), "schema"),
            (Grammar::JsonSchema(nothing), "nsatisfiable"),
            (Grammar::JsonSchema(json!({"$ref": "http://example.com/a.json"})), "$ref"),
            (Grammar::JsonSchema(json!({"type": "string", "pattern": "("})), "("),
            (Grammar::Lark("start: unknown".into()), "unknown"),
            (Grammar::Lark(String::new()), "start"),
        ] {
            let e = words.grammars.compile(&grammar).unwrap_err().to_string();
            assert!(
                e.contains("cannot be used") && e.contains(says) && !e.contains('\n'),
                "{grammar:?}: {e}"
            );
        }
    }
}
