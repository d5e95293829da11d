//! Probe dialogues: a few texts with the ids that they had when a model was trained, kept with it and replayed when it is
//! opened.
//!
//! A model that was adapted to one chat template answers worse, and silently, if another one is put in its place, or if
//! the tokenizer splits text differently: after a conversion by another program, an edit, a newer version of a library.
//! A folder has them as `probes.json`, a GGUF file under the key `sparsam.probes`.

use crate::Error;
use serde::{Deserialize, Serialize};
use sparsam_tokenizer::{Message, RenderOptions, Specials, Tokenizer};
use std::path::Path;
use std::time::{Duration, SystemTime};

/// The name of the file in a folder.
pub const PROBES_FILE: &str = "probes.json";
/// The key in GGUF metadata.
pub(crate) const PROBES_KEY: &str = "sparsam.probes";

/// A text as the template writes it, and its ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Probe {
    /// The dialogue; none: plain text.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    messages: Vec<Message>,
    /// Whether the assistant's turn is opened behind it.
    #[serde(default)]
    opened: bool,
    text: String,
    ids: Vec<u32>,
}

/// The probes of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Probes {
    probes: Vec<Probe>,
}

/// Plain texts: words, numbers, scripts, spaces, line breaks, code.
const TEXTS: [&str; 3] = [
    "The 3 quick brown foxes don't jump over 1,234.5 lazy dogs.",
    "Grüße aus Köln – naïve café, Ελλάδα, Москва, 東京, 🦊👍🏽",
    "fn main() {\n    let x = [1, 22, 333];\n\n\tprintln!(\"{x:?}\");  // two  spaces\n}",
];

/// The day on which templates that write dates are rendered: 2024-07-26, as Llama 3.2's own default.
const DAY: Duration = Duration::from_secs(1_721_952_000);

impl Probes {
    /// The ids that `tokenizer` gives now.
    ///
    /// # Errors
    /// If a text cannot be encoded.
    pub fn of(tokenizer: &Tokenizer) -> Result<Probes, sparsam_tokenizer::Error> {
        let mut probes = Vec::new();
        for text in TEXTS {
            let ids = tokenizer.encode(text, Specials { add: true, parse: false })?;
            probes.push(Probe { messages: Vec::new(), opened: false, text: text.into(), ids });
        }
        let m = Message::new;
        let dialogues = [
            (vec![m("user", TEXTS[0])], true),
            (vec![m("user", "What is 7 + 5?"), m("assistant", "7 + 5 = 12.")], false),
            (
                vec![
                    m("system", "Be brief."),
                    m("user", TEXTS[1]),
                    m("assistant", TEXTS[2]),
                    m("user", "  And now? "),
                ],
                true,
            ),
        ];
        for (messages, opened) in dialogues {
            // A template may refuse a role; then there is no such dialogue to be kept.
            let Some(text) = rendered(tokenizer, &messages, opened) else { continue };
            let ids = tokenizer.encode(&text, Specials { add: false, parse: true })?;
            probes.push(Probe { messages, opened, text, ids });
        }
        Ok(Probes { probes })
    }

    /// As JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("texts and numbers")
    }

    /// Replays the probes of `json`, which `place` holds, with `tokenizer`.
    ///
    /// # Errors
    /// If it is damaged, or a probe comes out differently: the message shows both forms.
    pub fn replay(json: &str, place: &Path, tokenizer: &Tokenizer) -> Result<(), Error> {
        let bad = |what: String| Error::Vocabulary { file: place.to_path_buf(), what };
        let kept: Probes =
            serde_json::from_str(json).map_err(|e| bad(format!("its probe dialogues are damaged: {e}")))?;
        for probe in &kept.probes {
            let plain = probe.messages.is_empty();
            let text = match plain {
                true => Some(probe.text.clone()),
                false => rendered(tokenizer, &probe.messages, probe.opened),
            };
            let Some(text) = text else {
                return Err(bad(
                    "it was adapted with a chat template, but now there is none that writes its probe dialogues; \
                     put the template back that it was trained with"
                        .into(),
                ));
            };
            if text != probe.text {
                return Err(bad(format!(
                    "the chat template writes a dialogue differently than when the model was adapted:\n{}\nput the \
                     template back that it was trained with",
                    lines_that_differ(&probe.text, &text)
                )));
            }
            let ids = tokenizer
                .encode(&text, Specials { add: plain, parse: !plain })
                .map_err(|e| bad(format!("a probe cannot be encoded: {e}")))?;
            if ids != probe.ids {
                return Err(bad(format!(
                    "the tokenizer splits {text:?} differently than when the model was adapted:\n{}\nput the \
                     tokenizer back that it was trained with",
                    ids_that_differ(&probe.ids, &ids, tokenizer)
                )));
            }
        }
        Ok(())
    }
}

fn rendered(tokenizer: &Tokenizer, messages: &[Message], opened: bool) -> Option<String> {
    let options = RenderOptions {
        add_generation_prompt: opened,
        now: SystemTime::UNIX_EPOCH.checked_add(DAY),
        ..RenderOptions::default()
    };
    tokenizer.chat_template()?.render(messages, &options).ok()
}

/// The lines in which two texts differ: from the first to the last.
fn lines_that_differ(before: &str, now: &str) -> String {
    let [a, b]: [Vec<&str>; 2] = [before, now].map(|t| t.split('\n').collect());
    let same = a.iter().zip(&b).take_while(|(a, b)| a == b).count();
    let most = a.len().min(b.len()) - same;
    let tail = a.iter().rev().zip(b.iter().rev()).take(most).take_while(|(a, b)| a == b).count();
    let part = |sign: char, lines: &[&str]| -> Vec<String> {
        lines[same..lines.len() - tail].iter().map(|l| format!("{sign} {l:?}")).collect()
    };
    [part('-', &a), part('+', &b)].concat().join("\n")
}

/// The ids in which two lists differ, with their tokens.
fn ids_that_differ(before: &[u32], now: &[u32], tokenizer: &Tokenizer) -> String {
    let same = before.iter().zip(now).take_while(|(a, b)| a == b).count();
    let most = before.len().min(now.len()) - same;
    let tail = before.iter().rev().zip(now.iter().rev()).take(most).take_while(|(a, b)| a == b).count();
    let part = |sign: char, ids: &[u32]| {
        let shown: Vec<String> = ids[same..ids.len() - tail]
            .iter()
            .map(|&id| format!("{id} {:?}", tokenizer.token(id).unwrap_or_else(|| "(none)".into())))
            .collect();
        format!("{sign} {}", shown.join(", "))
    };
    format!("behind {same} tokens:\n{}\n{}", part('-', before), part('+', now))
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_tokenizer::train::byte_vocabulary;

    const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    fn bytes(template: Option<&str>) -> Tokenizer {
        let files = byte_vocabulary();
        let t = Tokenizer::from_json(&files.tokenizer, Some(&files.config)).unwrap();
        template.map_or(t.clone(), |source| t.with_chat_template(source.into()))
    }

    #[test]
    fn what_is_as_it_was_passes_and_a_difference_is_shown() {
        let place = Path::new("model");
        let t = bytes(Some(TEMPLATE));
        let probes = Probes::of(&t).unwrap();
        assert_eq!(probes.probes.len(), 6);
        let json = probes.to_json();
        Probes::replay(&json, place, &t).unwrap();

        let said = |json: &str, t: &Tokenizer| Probes::replay(json, place, t).unwrap_err().to_string();
        let other = TEMPLATE.replace("<assistant>", "<model>");
        let e = said(&json, &bytes(Some(&other)));
        assert!(e.contains("- \"<assistant>\"\n+ \"<model>\"") && e.contains("chat template"), "{e}");
        assert!(said(&json, &bytes(None)).contains("now there is none"));
        assert!(said("{", &t).contains("damaged"));

        // Another id in the middle of the first text.
        let mut changed = probes.clone();
        changed.probes[0].ids[4] += 1;
        let e = said(&changed.to_json(), &t);
        assert!(e.contains("behind 4 tokens") && e.lines().any(|l| l.starts_with("- ")), "{e}");
        // Without a template only the plain texts are kept.
        let plain = Probes::of(&bytes(None)).unwrap();
        assert_eq!(plain.probes.len(), 3);
        Probes::replay(&plain.to_json(), place, &t).unwrap();
    }
}
