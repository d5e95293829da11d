//! Pre-tokenisers: how text is cut into words before merging, so that no token spans two words.
//!
//! A pre-tokeniser is a sequence of patterns. Each cuts every piece that the one before it left
//! into its matches and what lies between them. The patterns are the published ones of each
//! family of models; where llama.cpp rewrote one for its own pattern engine, the original is
//! used here. Matching is linear in the text: the engine has no backtracking, and the one
//! construct that needs it, `\s+(?!\S)` ("white space, but leave its last character to the word
//! that follows"), is done by hand in [`Stage::cut`].

use crate::Error;
use regex::Regex;

/// What `\s+(?!\S)|\s+` at the end of a pattern becomes: `\s+`, and this rule.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spaces {
    /// The pattern has no such alternative.
    Plain,
    /// A run of white space before a word leaves its last character to it.
    LeaveLast,
    /// The same, but a run that ends in a line break is kept whole (patterns with an alternative
    /// `\s*[\r\n]+` before that one).
    LeaveLastUnlessBreak,
}

struct Stage {
    pattern: Regex,
    spaces: Spaces,
}

impl Stage {
    fn cut<'t>(&self, piece: &'t str, out: &mut Vec<&'t str>) {
        let (mut from, mut at) = (0, 0);
        while let Some(found) = self.pattern.find_at(piece, at) {
            let (start, mut end) = (found.start(), found.end());
            if end < piece.len()
                && self.spaces != Spaces::Plain
                && let Some(last) = trailing_space(&piece[start..end])
                && !(self.spaces == Spaces::LeaveLastUnlessBreak && matches!(last, '\r' | '\n'))
                && end - start > last.len_utf8()
            {
                end -= last.len_utf8();
            }
            if from < start {
                out.push(&piece[from..start]);
            }
            if end > start {
                out.push(&piece[start..end]);
            }
            // No pattern below matches the empty string; the step keeps this loop finite anyway.
            at = if end > at { end } else { end + piece[end..].chars().next().map_or(1, char::len_utf8) };
            from = end;
            if at > piece.len() {
                break;
            }
        }
        if from < piece.len() {
            out.push(&piece[from..]);
        }
    }
}

/// The last character of `text` if all of it is white space.
fn trailing_space(text: &str) -> Option<char> {
    let first = text.chars().next()?;
    // All patterns' matches that begin with two white space characters, or that begin with one
    // and hold no other character, are runs of white space.
    (first.is_whitespace() && text.chars().all(char::is_whitespace))
        .then(|| text.chars().next_back())
        .flatten()
}

/// A pre-tokeniser by its name in GGUF files, with what else that name says about encoding.
pub(crate) struct Splitter {
    stages: Vec<Stage>,
    /// A word that is a token as a whole is that token, whatever the merges say.
    pub ignore_merges: bool,
    /// Text is brought to Unicode's normal form C first.
    pub nfc: bool,
    /// BOS goes first unless the file says otherwise.
    pub add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+";

/// Llama 3's pattern and its relatives, which differ in how many digits make a piece.
fn cl100k(digits: &str) -> String {
    format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+"
    )
}

/// The patterns of GPT-4o and Mistral's Tekken: words change where lower case turns upper.
fn o200k(suffix: &str, digits: &str) -> String {
    let upper = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}";
    let lower = r"\p{Ll}\p{Lm}\p{Lo}\p{M}";
    let lead = r"[^\r\n\p{L}\p{N}]?";
    format!(
        r"{lead}[{upper}]*[{lower}]+{suffix}|{lead}[{upper}]+[{lower}]*{suffix}|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+"
    )
}

const CONTRACTIONS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?";

/// The names that [`Splitter::by_name`] knows, for the error message.
const KNOWN: &str = "default, gpt-2, smollm, starcoder, refact, llama-bpe, llama3, qwen2, qwen35, deepseek-r1-qwen, deepseek-v3, deepseek-coder, tekken, gpt-4o, llama4, glm4";

/// The names to write, of those that cut alike the first.
const NAMES: [&str; 11] = [
    "gpt-2",
    "smollm",
    "llama-bpe",
    "glm4",
    "qwen2",
    "deepseek-r1-qwen",
    "qwen35",
    "deepseek-v3",
    "deepseek-coder",
    "tekken",
    "gpt-4o",
];

/// Another spelling of one pattern: DeepSeek V3's files list its punctuation one by one.
fn published_as(pattern: &str) -> &str {
    match pattern.strip_prefix(r"[!-/:-@\[-`{-~]") {
        Some(_) => {
            r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##
        }
        None => pattern,
    }
}

impl Splitter {
    /// The pre-tokeniser that GGUF files call `name` (`tokenizer.ggml.pre`).
    ///
    /// # Errors
    /// [`Error::UnknownPre`] for any other name: a near match would give other tokens than the
    /// model was trained on.
    pub fn by_name(name: &str) -> Result<Splitter, Error> {
        use Spaces::{LeaveLast, LeaveLastUnlessBreak, Plain};
        let gpt2 = || (GPT2.to_string(), LeaveLast);
        let plain = |pattern: &str| (pattern.to_string(), Plain);
        let llama3 = matches!(name, "llama-bpe" | "llama3" | "llama-v3");
        let stages = match name {
            // What llama.cpp's converter wrote before it told pre-tokenisers apart.
            "default" => vec![
                plain(r"[\p{P}$+<=>^~|]+"),
                gpt2(),
                plain(r"\p{N}+"),
                plain(r"[0-9][0-9][0-9]"),
            ],
            "gpt-2" | "phi-2" | "olmo" | "mpt" => vec![gpt2()],
            "smollm" | "starcoder" | "refact" | "command-r" | "codeshell" => {
                vec![plain(r"\p{N}"), gpt2()]
            }
            _ if llama3 => vec![(cl100k("{1,3}"), LeaveLastUnlessBreak)],
            "glm4" | "chatglm-bpe" => vec![(cl100k("{1,3}"), LeaveLastUnlessBreak)],
            "qwen2" | "deepseek-r1-qwen" | "stablelm2" => {
                vec![(cl100k(""), LeaveLastUnlessBreak)]
            }
            "qwen35" => vec![(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+".to_string(),
                LeaveLastUnlessBreak,
            )],
            "deepseek-v3" => vec![
                plain(r"\p{N}{1,3}"),
                plain("[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+"),
                (
                    r"[!-/:-@\[-`{-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+".to_string(),
                    LeaveLastUnlessBreak,
                ),
            ],
            "deepseek-coder" => vec![
                plain(r"[\r\n]"),
                plain(r"\s?\p{L}+"),
                plain(r"\s?\p{P}+"),
                plain("[\u{4E00}-\u{9FA5}\u{0800}-\u{4E00}\u{AC00}-\u{D7FF}]+"),
                plain(r"\p{N}"),
            ],
            "tekken" => vec![(o200k("", ""), LeaveLastUnlessBreak)],
            "gpt-4o" | "llama4" => vec![(o200k(CONTRACTIONS, "{1,3}"), LeaveLastUnlessBreak)],
            _ => {
                return Err(Error::UnknownPre { name: name.to_string(), known: KNOWN });
            }
        };
        Ok(Splitter {
            stages: stages
                .into_iter()
                .map(|(pattern, spaces)| Stage {
                    pattern: Regex::new(&pattern).expect("the patterns above are valid"),
                    spaces,
                })
                .collect(),
            ignore_merges: llama3 || name == "tekken",
            // Qwen's own tokenizer normalises; llama.cpp does not.
            nfc: matches!(name, "qwen2" | "qwen35"),
            add_bos: llama3 || name == "tekken",
        })
    }

    /// The patterns as they were published, one for each stage.
    pub fn patterns(&self) -> Vec<String> {
        let published = |stage: &Stage| {
            let pattern = stage.pattern.as_str();
            match (stage.spaces, pattern.strip_suffix(r"|\s+")) {
                (Spaces::LeaveLast | Spaces::LeaveLastUnlessBreak, Some(front)) => {
                    format!(r"{front}|\s+(?!\S)|\s+")
                }
                _ => pattern.to_string(),
            }
        };
        self.stages.iter().map(published).collect()
    }

    /// The name of the pre-tokeniser that has these patterns, and `nfc` and `ignore_merges` as it has them.
    pub fn name_of(patterns: &[String], nfc: bool, ignore_merges: bool) -> Option<&'static str> {
        NAMES.into_iter().find(|name| {
            let Ok(splitter) = Splitter::by_name(name) else { return false };
            let own = splitter.patterns();
            let same = own.iter().zip(patterns).all(|(a, b)| a == b || published_as(a) == b);
            same && own.len() == patterns.len()
                && splitter.nfc == nfc
                && splitter.ignore_merges == ignore_merges
        })
    }

    /// Cuts `text` into words; their concatenation is `text`.
    pub fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        let mut next = Vec::new();
        for stage in &self.stages {
            next.clear();
            for piece in &pieces {
                stage.cut(piece, &mut next);
            }
            std::mem::swap(&mut pieces, &mut next);
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;

    fn check(name: &str, text: &str, words: &[&str]) {
        assert_eq!(Splitter::by_name(name).unwrap().split(text), words, "{name}: {text:?}");
    }

    #[test]
    fn words_of_each_pattern() {
        check("gpt-2", "It's  a\n\n test 42 !", &["It", "'s", " ", " a", "\n\n", " test", " 42", " !"]);
        check("gpt-2", "a   ", &["a", "   "]);
        check("gpt-2", "\tx", &["\t", "x"]);
        check("gpt-2", "\u{3000}\u{3000}x", &["\u{3000}", "\u{3000}", "x"]);
        check("smollm", "a 42½", &["a", " ", "4", "2", "½"]);
        check("smollm", "a  5", &["a", "  ", "5"]);
        check("llama-bpe", "IT'S 12345\r\n  x", &["IT", "'S", " ", "123", "45", "\r\n", " ", " x"]);
        check("llama-bpe", "a \n \n  b;\n", &["a", " \n \n", " ", " b", ";\n"]);
        check("qwen2", "x=12", &["x", "=", "1", "2"]);
        check("tekken", "HelloWorld/\n7", &["Hello", "World", "/\n", "7"]);
        check("gpt-4o", "HelloWorld's", &["Hello", "World's"]);
        check("deepseek-v3", "print(x) 漢字かな1234", &["print", "(x", ")", " ", "漢字かな", "123", "4"]);
        check("deepseek-coder", "a\nb 12", &["a", "\n", "b", " ", "1", "2"]);
        check("default", "a+b", &["a", "+", "b"]);
        for name in KNOWN.split(", ") {
            check(name, "", &[]);
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        let error = Splitter::by_name("qwen-2").err().expect("refused").to_string();
        assert!(error.contains("qwen-2") && error.contains("smollm"), "{error}");
    }

    /// Patterns take long to compile, so once for all cases.
    static ALL: LazyLock<Vec<Splitter>> =
        LazyLock::new(|| KNOWN.split(", ").map(|name| Splitter::by_name(name).unwrap()).collect());

    proptest! {
        #[test]
        fn nothing_is_lost(text in r"[ \t\r\na-zA-Z0-9'.,!/\u{a0}\u{3000}é漢🙂½]{0,40}|\PC{0,40}") {
            for splitter in ALL.iter() {
                let words = splitter.split(&text);
                prop_assert_eq!(words.concat(), text.as_str());
                prop_assert!(words.iter().all(|w| !w.is_empty()));
            }
        }
    }
}
