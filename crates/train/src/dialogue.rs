//! Examples to fine-tune on: JSON lines in the shapes that people have, as tokens with a mask of what is learnt.
//!
//! | shape | keys of a line |
//! |---|---|
//! | dialogue | `messages`: a list of objects with `role` and `content` |
//! | prompt | `prompt` and `completion`; or `question` and `answer` |
//! | Alpaca | `instruction`, perhaps `input`, and `output` |
//! | text | `text` |
//!
//! All but `text` are written by the model's chat template, if it has one. Pieces between what the assistant says and what
//! comes before it are encoded apart, as they are when the model answers.

use crate::Error;
use crate::data::{Batches, PackedRows};
use crate::random::Random;
use crate::step::NO_TARGET;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sparsam_tokenizer::{Message, RenderOptions, Specials, Tokenizer};
use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// On which tokens the loss is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LossOn {
    /// What the assistant says, and the token that ends it; all of a plain text.
    #[default]
    Answers,
    /// Everything.
    All,
}

/// How lines become tokens.
#[derive(Clone)]
pub struct Reading {
    /// The model's.
    pub tokenizer: Tokenizer,
    /// The keys of prompt and answer, where they are none of the known shapes'.
    pub fields: Option<(String, String)>,
    /// Where the loss is taken.
    pub loss_on: LossOn,
    /// Tokens that an example may have at most; the end of longer ones is cut.
    pub max_tokens: usize,
}

/// One example.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Whether each of them is learnt: it is a target.
    pub learnt: Vec<bool>,
    /// Tokens that were cut off at its end.
    pub cut: usize,
    /// Which file of the ones read, and which line, from 1.
    pub place: (usize, usize),
}

impl Example {
    /// Tokens that are learnt.
    pub fn n_learnt(&self) -> usize {
        self.learnt.iter().filter(|&&l| l).count()
    }
}

/// Examples, and what was lost on the way.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// Those that something can be learnt from, in the order of the files.
    pub all: Vec<Example>,
    /// The files.
    pub files: Vec<PathBuf>,
    /// Examples whose end was cut.
    pub n_cut: usize,
    /// Tokens cut off, all together.
    pub cut_tokens: usize,
    /// Examples of which nothing that is learnt was left: the answer begins behind the last token that fits.
    pub n_dropped: usize,
}

impl Examples {
    /// Reads `files`.
    ///
    /// # Errors
    /// [`Error::Data`] with file, line and what was expected; if there is no example, or none with an answer that fits.
    pub fn read(files: &[PathBuf], how: &Reading) -> Result<Examples, Error> {
        let mut found = Examples { files: files.to_vec(), ..Examples::default() };
        let mut lines = 0;
        for (n, path) in files.iter().enumerate() {
            let file = std::fs::File::open(path).map_err(Error::io("open", path))?;
            for (i, line) in BufReader::new(file).lines().enumerate() {
                let bad = |what: String| Error::data(path, format!("line {}: {what}", i + 1));
                let line = line.map_err(|e| bad(format!("cannot be read as UTF-8 text: {e}")))?;
                if line.trim().is_empty() {
                    continue;
                }
                lines += 1;
                let pieces = pieces(&line, how).map_err(bad)?;
                found.add(pieces, how.max_tokens, (n, i + 1));
            }
        }
        let first = files.first().cloned().unwrap_or_default();
        if lines == 0 {
            return Err(Error::data(first, "holds no example; one JSON object a line is expected"));
        }
        if found.all.is_empty() {
            let what = format!(
                "no token of its {lines} examples would be learnt: every answer is empty or begins behind token {}; give a larger ctx",
                how.max_tokens
            );
            return Err(Error::data(first, what));
        }
        Ok(found)
    }

    fn add(&mut self, pieces: Vec<(Vec<u32>, bool)>, max_tokens: usize, place: (usize, usize)) {
        let (mut tokens, mut learnt) = (Vec::new(), Vec::new());
        for (piece, is_learnt) in pieces {
            learnt.extend(std::iter::repeat_n(is_learnt, piece.len()));
            tokens.extend(piece);
        }
        let cut = tokens.len().saturating_sub(max_tokens);
        tokens.truncate(max_tokens);
        learnt.truncate(max_tokens);
        // Nothing predicts the first token.
        if let Some(first) = learnt.first_mut() {
            *first = false;
        }
        self.n_cut += (cut > 0) as usize;
        self.cut_tokens += cut;
        if learnt.contains(&true) {
            self.all.push(Example { tokens, learnt, cut, place });
        } else {
            self.n_dropped += 1;
        }
    }

    /// Where an example stands, for messages.
    pub fn place(&self, example: &Example) -> String {
        let (file, line) = example.place;
        format!("{}:{line}", self.files[file].display())
    }

    /// Takes a part of the examples out, chosen by `seed`: at least one where there are two. Those that are the same as
    /// one taken out are dropped from what stays; how many that were comes last.
    pub fn split(mut self, part: f64, seed: u64) -> (Examples, Examples, usize) {
        let n = self.all.len();
        let wanted = ((n as f64 * part).round() as usize).clamp((part > 0.0 && n > 1) as usize, n - 1);
        let order = Random::new(seed, "held back", 0).permutation(n as u32);
        let mut held: Vec<u32> = order[..wanted].to_vec();
        held.sort_unstable();
        let out = held.iter().map(|&i| self.all[i as usize].clone()).collect();
        let out = Examples { all: out, files: self.files.clone(), ..Examples::default() };
        let seen: HashMap<&[u32], ()> = out.all.iter().map(|e| (&e.tokens[..], ())).collect();
        let mut at = 0;
        self.all.retain(|_| {
            at += 1;
            held.binary_search(&(at - 1)).is_err()
        });
        let before = self.all.len();
        self.all.retain(|e| !seen.contains_key(&e.tokens[..]));
        let same = before - self.all.len();
        drop(seen);
        (self, out, same)
    }

    /// That no example is in `held_back` too, and that the model can learn to end its answers.
    ///
    /// # Errors
    /// [`Error::Data`] that names both places; or that no end-of-answer token is ever a target.
    pub fn check(&self, held_back: Option<&Examples>, tokenizer: &Tokenizer) -> Result<(), Error> {
        let known: HashMap<&[u32], &Example> = self.all.iter().map(|e| (&e.tokens[..], e)).collect();
        for e in held_back.map_or(&[][..], |h| &h.all) {
            if let Some(same) = known.get(&e.tokens[..]) {
                let (file, line) = e.place;
                let file = held_back.map(|h| h.files[file].clone()).unwrap_or_default();
                let what = format!(
                    "line {line} is held back, but {} is the same example and would be learnt; take one of them out",
                    self.place(same)
                );
                return Err(Error::data(file, what));
            }
        }
        let ends = tokenizer.stop_ids();
        let learns_end =
            |e: &Example| e.tokens.iter().zip(&e.learnt).any(|(t, &learnt)| learnt && ends.contains(t));
        if !ends.is_empty() && !self.all.iter().any(learns_end) {
            let names: Vec<String> = ends.iter().filter_map(|&id| tokenizer.token(id)).collect();
            let what = format!(
                "none of {} is ever a target, so the model would learn never to end an answer; does the chat template close the assistant's turn, or is every answer cut?",
                names.join(", ")
            );
            return Err(Error::data(self.files[0].clone(), what));
        }
        Ok(())
    }

    /// SHA-256 of all tokens and masks, in order.
    pub fn sha256(&self) -> String {
        let mut hash = Sha256::new();
        for e in &self.all {
            hash.update((e.tokens.len() as u64).to_le_bytes());
            e.tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
            e.learnt.iter().for_each(|&l| hash.update([l as u8]));
        }
        hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Tokens of all examples, and how many of them are learnt.
    pub fn counts(&self) -> (usize, usize) {
        let n = self.all.iter().map(|e| e.tokens.len()).sum();
        (n, self.all.iter().map(Example::n_learnt).sum())
    }
}

/// The texts of a line as pieces of tokens, each learnt or not.
fn pieces(line: &str, how: &Reading) -> Result<Vec<(Vec<u32>, bool)>, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("is not JSON: {e}"))?;
    let Value::Object(o) = &value else { return Err("is no JSON object".into()) };
    let text = |key: &str| match o.get(key) {
        Some(Value::String(s)) => Ok(s.clone()),
        // Answers of sums are often given as numbers.
        Some(Value::Number(n)) => Ok(n.to_string()),
        Some(_) => Err(format!("{key} is no text")),
        None => {
            let keys: Vec<&str> = o.keys().map(String::as_str).collect();
            Err(format!("there is no {key:?}; the line has {keys:?}"))
        }
    };
    let pair = |prompt: String, answer: String| {
        dialogue(&[Message::new("user", prompt), Message::new("assistant", answer)], how)
    };
    if let Some((prompt, answer)) = &how.fields {
        return pair(text(prompt)?, text(answer)?);
    }
    if let Some(messages) = o.get("messages") {
        let messages: Vec<Message> = serde_json::from_value(messages.clone())
            .map_err(|e| format!("messages is no list of objects with role and content: {e}"))?;
        if !messages.iter().any(|m| m.role == "assistant") {
            return Err("no message is the assistant's, so there is nothing to learn".into());
        }
        return dialogue(&messages, how);
    }
    for (prompt, answer) in [("prompt", "completion"), ("question", "answer")] {
        if o.contains_key(prompt) {
            return pair(text(prompt)?, text(answer)?);
        }
    }
    if o.contains_key("instruction") {
        let (mut prompt, input) =
            (text("instruction")?, if o.contains_key("input") { text("input")? } else { String::new() });
        if !input.is_empty() {
            prompt = format!("{prompt}\n\n{input}");
        }
        return pair(prompt, text("output")?);
    }
    if o.contains_key("text") {
        let t = &how.tokenizer;
        let mut ids = encode(t, &text("text")?, Specials { add: true, parse: false })?;
        ids.extend(t.eos().filter(|e| ids.last() != Some(e)));
        return Ok(vec![(ids, true)]);
    }
    let keys: Vec<&str> = o.keys().map(String::as_str).collect();
    Err(format!(
        "messages, prompt and completion, question and answer, instruction and output, or text is expected; the line has {keys:?} (name the keys of prompt and answer by fields)"
    ))
}

fn encode(t: &Tokenizer, text: &str, specials: Specials) -> Result<Vec<u32>, String> {
    t.encode(text, specials).map_err(|e| e.to_string())
}

/// A dialogue as the chat template writes it; without one, the texts one after the other.
fn dialogue(messages: &[Message], how: &Reading) -> Result<Vec<(Vec<u32>, bool)>, String> {
    let t = &how.tokenizer;
    let all = how.loss_on == LossOn::All;
    let Some(template) = t.chat_template() else {
        let mut pieces = Vec::new();
        for (i, m) in messages.iter().enumerate() {
            let is_answer = m.role == "assistant";
            let mut ids = encode(t, &m.content, Specials { add: i == 0, parse: false })?;
            if is_answer {
                ids.extend(t.eos());
            }
            pieces.push((ids, is_answer || all));
        }
        return Ok(pieces);
    };
    let render = |n: usize, opened: bool| {
        let options = RenderOptions { add_generation_prompt: opened, ..RenderOptions::default() };
        template.render(&messages[..n], &options).map_err(|e| e.to_string())
    };
    let specials = Specials { add: false, parse: true };
    let (mut pieces, mut written) = (Vec::new(), String::new());
    let follows = |text: &str, before: &str, i: usize| {
        text.strip_prefix(before).map(str::to_string).ok_or_else(|| {
            format!("message {i}: the chat template writes what came before it differently once it is there, so its tokens cannot be told apart; use loss_on = \"all\" or text")
        })
    };
    for (i, _) in messages.iter().enumerate().filter(|(_, m)| m.role == "assistant") {
        let before = render(i, true)?;
        let after = render(i + 1, false)?;
        let opening = follows(&before, &written, i)?;
        let answer = follows(&after, &before, i)?;
        pieces.push((encode(t, &opening, specials)?, all));
        let mut ids = encode(t, &answer, specials)?;
        // What the template writes behind the end (a line break) is never generated.
        let end = ids.iter().rposition(|id| t.stop_ids().contains(id)).map_or(ids.len(), |at| at + 1);
        let rest = ids.split_off(end);
        pieces.push((ids, true));
        pieces.push((rest, all));
        written = after;
    }
    let rest = follows(&render(messages.len(), false)?, &written, messages.len())?;
    pieces.push((encode(t, &rest, specials)?, all));
    // What nothing learnt follows only costs time.
    while pieces.last().is_some_and(|(_, learnt)| !learnt) {
        pieces.pop();
    }
    Ok(pieces)
}

/// Examples packed into rows of `ctx` tokens, several to a row, none of which sees another. The order of the rows is a
/// permutation of its own in every epoch.
pub struct PackedExamples {
    examples: Vec<Example>,
    /// Which examples are in each row.
    rows: Vec<Vec<u32>>,
    ctx: usize,
    seed: u64,
    epoch: Option<(u64, Vec<u32>)>,
}

/// Rows that are open at a time while examples are packed: enough to fill nearly all, few enough to be quick.
const OPEN_ROWS: usize = 256;

impl PackedExamples {
    /// Packs `examples`, each of at most `ctx + 1` tokens (the last is only a target): in a random order, each into the
    /// fullest open row that has room.
    pub fn new(examples: Vec<Example>, ctx: usize, seed: u64) -> PackedExamples {
        let order = Random::new(seed, "packing", 0).permutation(examples.len() as u32);
        let (mut rows, mut open): (Vec<Vec<u32>>, Vec<(usize, usize)>) = (Vec::new(), Vec::new());
        for i in order {
            let n = examples[i as usize].tokens.len() - 1;
            let fits = open.iter_mut().filter(|(_, left)| *left >= n).min_by_key(|(_, left)| *left);
            match fits {
                Some((row, left)) => {
                    rows[*row].push(i);
                    *left -= n;
                }
                None => {
                    rows.push(vec![i]);
                    open.push((rows.len() - 1, ctx - n));
                    if open.len() > OPEN_ROWS {
                        let fullest = (0..open.len()).min_by_key(|&j| open[j].1).unwrap_or(0);
                        open.swap_remove(fullest);
                    }
                }
            }
        }
        PackedExamples { examples, rows, ctx, seed, epoch: None }
    }

    /// Rows in one epoch.
    pub fn per_epoch(&self) -> usize {
        self.rows.len()
    }

    /// Targets that `n` rows have at most.
    pub fn most_targets(&self, n: usize) -> usize {
        let of = |row: &Vec<u32>| row.iter().map(|&i| self.examples[i as usize].n_learnt()).sum();
        let mut counts: Vec<usize> = self.rows.iter().map(of).collect();
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts.iter().cycle().take(if counts.is_empty() { 0 } else { n }).sum()
    }

    /// The share of all places that hold a token.
    pub fn filled(&self) -> f64 {
        let n: usize = self.examples.iter().map(|e| e.tokens.len() - 1).sum();
        n as f64 / (self.rows.len() * self.ctx).max(1) as f64
    }

    fn push(&self, batch: &mut PackedRows, row: usize) {
        let end = batch.tokens.len() + self.ctx;
        for &i in &self.rows[row] {
            batch.push_example(&self.examples[i as usize]);
        }
        batch.pad_to(end);
    }
}

impl Batches for PackedExamples {
    fn batch(&mut self, first: u64, n: usize) -> Result<PackedRows, Error> {
        let mut batch = PackedRows::default();
        let per_epoch = self.rows.len() as u64;
        for k in first..first + n as u64 {
            let epoch = k / per_epoch;
            if self.epoch.as_ref().is_none_or(|(e, _)| *e != epoch) {
                let order = Random::new(self.seed, "order", epoch).permutation(per_epoch as u32);
                self.epoch = Some((epoch, order));
            }
            let row = self.epoch.as_ref().map_or(0, |(_, order)| order[(k % per_epoch) as usize]);
            self.push(&mut batch, row as usize);
        }
        Ok(batch)
    }

    fn in_order(&self, first: usize, n: usize) -> Result<PackedRows, Error> {
        let mut batch = PackedRows::default();
        for row in first..(first + n).min(self.rows.len()) {
            self.push(&mut batch, row);
        }
        Ok(batch)
    }
}

impl PackedRows {
    /// Adds an example, which sees nothing of what is there already.
    pub fn push_example(&mut self, e: &Example) {
        let base = self.tokens.len();
        for (i, pair) in e.tokens.windows(2).enumerate() {
            self.tokens.push(pair[0] as i32);
            self.positions.push(i as i32);
            self.row_start.push(base as i32);
            self.targets.push(if e.learnt[i + 1] { pair[1] as i32 } else { NO_TARGET });
        }
    }
}

/// An example as text, with what is learnt set apart: in colour, or between « and ».
pub fn render(example: &Example, tokenizer: &Tokenizer, coloured: bool) -> String {
    let (open, close) = if coloured { ("\x1b[32m", "\x1b[0m") } else { ("«", "»") };
    let mut text = String::new();
    let mut at = 0;
    while at < example.tokens.len() {
        let learnt = example.learnt[at];
        let n = example.learnt[at..].iter().take_while(|&&l| l == learnt).count();
        let part = tokenizer.decode(&example.tokens[at..at + n], false);
        text += &if learnt { format!("{open}{part}{close}") } else { part };
        at += n;
    }
    if example.cut > 0 {
        let (red, plain) = if coloured { ("\x1b[31m", "\x1b[0m") } else { ("", "") };
        text += &format!("{red} [{} tokens cut]{plain}", example.cut);
    }
    text
}

/// The files as absolute paths that exist.
pub(crate) fn existing(files: &mut [PathBuf]) -> Result<(), Error> {
    for path in files {
        *path = std::path::absolute(&*path).map_err(Error::io("find", path.clone()))?;
        if !Path::is_file(path) {
            return Err(Error::data(path.clone(), "there is no such file"));
        }
    }
    Ok(())
}
