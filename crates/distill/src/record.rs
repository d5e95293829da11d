//! What a teacher said, line by line on disk: nothing that was written is lost or doubled by a kill.
//!
//! `NAME.jsonl` holds answers that could be taken apart, `NAME.malformed.jsonl` those that could not, and
//! `NAME.settings.json` what they were asked with. A line counts once its end is on disk; a torn last line is cut off
//! when the file is taken up again.

use crate::Error;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashSet;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// One answer of a teacher.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The question's id.
    pub id: String,
    /// Which of several answers to it, from 0.
    pub sample: u32,
    /// The question.
    pub question: String,
    /// What there was to choose from.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub choices: Vec<String>,
    /// The true answer, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub truth: Option<String>,
    /// The true answer as an expression, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub equation: Option<String>,
    /// The teacher's text as it came.
    pub raw: String,
    /// The reasons in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rationale: Option<String>,
    /// The answer in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<String>,
    /// Whether that is the true one, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub right: Option<bool>,
    /// Why the text could not be taken apart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    /// Tokens of the prompt.
    #[serde(default)]
    pub prompt_tokens: u64,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: u64,
    /// What it cost, in dollars.
    #[serde(default)]
    pub usd: f64,
}

impl Record {
    /// Whether the text could be taken apart.
    pub fn is_whole(&self) -> bool {
        self.problem.is_none() && self.answer.is_some()
    }
}

/// `a/b.jsonl` with `word` before the ending: `a/b.malformed.jsonl`.
fn beside(path: &Path, ending: &str) -> PathBuf {
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!("{stem}.{ending}"))
}

/// A file of lines that grows.
struct Log {
    path: PathBuf,
    file: File,
    /// Length up to the last line that is on disk.
    end: u64,
}

impl Log {
    /// Opens or creates the file, cuts a torn last line off, and gives the records in it.
    fn open(path: &Path) -> Result<(Log, Vec<Record>), Error> {
        let io = |doing| Error::io(doing, path);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(io("open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::file(
                    path,
                    "another run writes to it; wait for it, or choose another --out",
                ));
            }
            Err(TryLockError::Error(e)) => return Err(io("lock")(e)),
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io("read"))?;
        let whole = bytes.iter().rposition(|&b| b == b'\n').map_or(0, |at| at + 1);
        let text =
            std::str::from_utf8(&bytes[..whole]).map_err(|_| Error::file(path, "it is not UTF-8 text"))?;
        let records = parse_lines(path, text)?;
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(io("shorten"))?;
        }
        file.seek(SeekFrom::Start(whole as u64)).map_err(io("read"))?;
        Ok((Log { path: path.to_path_buf(), file, end: whole as u64 }, records))
    }

    /// Appends lines; they are on disk when this returns. After an error the file is as before.
    fn append(&mut self, records: &[&Record]) -> Result<(), Error> {
        if records.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for record in records {
            serde_json::to_writer(&mut bytes, record).expect("texts and numbers alone");
            bytes.push(b'\n');
        }
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_data());
        if let Err(e) = written {
            // Half a line must not stand before the next one; if this fails too, opening cuts it off.
            let _ = self.file.set_len(self.end).and_then(|()| self.file.seek(SeekFrom::Start(self.end)));
            return Err(Error::io("write", &self.path)(e));
        }
        self.end += bytes.len() as u64;
        Ok(())
    }
}

fn parse_lines(path: &Path, text: &str) -> Result<Vec<Record>, Error> {
    let parse = |(i, line)| {
        serde_json::from_str(line)
            .map_err(|e| Error::line(path, i + 1, format!("is no record of a teacher's answer: {e}")))
    };
    text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()).map(parse).collect()
}

/// The records in a finished file, in the order of its lines.
///
/// # Errors
/// If it cannot be read, or a line is no record.
pub fn read(path: &Path) -> Result<Vec<Record>, Error> {
    let text = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
    let records = parse_lines(path, &text)?;
    if records.is_empty() {
        return Err(Error::file(
            path,
            "it holds no answers of a teacher; make it with `sparsam distill ask` or `import`",
        ));
    }
    Ok(records)
}

/// Where answers are kept as they come.
pub struct Store {
    good: Log,
    aside: Log,
    done: HashSet<(String, u32)>,
    records: Vec<Record>,
}

impl Store {
    /// Begins a file at `path`, or takes it up: what is in it was asked with the same `settings`.
    ///
    /// # Errors
    /// If the files belong to other settings (the message names the first that differs), are damaged, or another
    /// process writes to them.
    pub fn open(path: &Path, settings: &Value) -> Result<Store, Error> {
        if path.extension().is_none_or(|e| e != "jsonl") {
            return Err(Error::file(path, "the name must end in .jsonl"));
        }
        let (good, mut records) = Log::open(path)?;
        let (aside, malformed) = Log::open(&beside(path, "malformed.jsonl"))?;
        records.extend(malformed);
        let settings_path = beside(path, "settings.json");
        if records.is_empty() {
            let text = serde_json::to_string_pretty(settings).expect("a value");
            write_whole(&settings_path, text.as_bytes())?;
        } else {
            let text = std::fs::read_to_string(&settings_path).map_err(Error::io("read", &settings_path))?;
            let before: Value = serde_json::from_str(&text)
                .map_err(|e| Error::file(&settings_path, format!("is not JSON: {e}")))?;
            if let Some(key) = difference(&before, settings) {
                let show = |v: &Value| v.get(&key).map_or("not set".to_string(), Value::to_string);
                let (was, is) = (show(&before), show(settings));
                return Err(Error::file(
                    path,
                    format!(
                        "its answers were asked with {key} = {was}, now it is {is}; choose another --out, or the settings of before"
                    ),
                ));
            }
        }
        let mut done = HashSet::new();
        for r in &records {
            if !done.insert((r.id.clone(), r.sample)) {
                return Err(Error::file(
                    path,
                    format!("answer {} to question {} is there twice", r.sample, r.id),
                ));
            }
        }
        Ok(Store { good, aside, done, records })
    }

    /// Whether there is this answer already.
    pub fn has(&self, id: &str, sample: u32) -> bool {
        self.done.contains(&(id.to_string(), sample))
    }

    /// All answers, malformed ones too: those found on disk, then those added.
    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Adds answers; they are on disk when this returns.
    ///
    /// # Errors
    /// If the disk is full or fails; then none of them counts.
    ///
    /// # Panics
    /// If one of them is there already.
    pub fn add(&mut self, records: Vec<Record>) -> Result<(), Error> {
        for r in &records {
            assert!(!self.has(&r.id, r.sample), "answer {} to question {} is there already", r.sample, r.id);
        }
        let (good, aside): (Vec<&Record>, Vec<&Record>) = records.iter().partition(|r| r.is_whole());
        self.good.append(&good)?;
        self.aside.append(&aside)?;
        self.done.extend(records.iter().map(|r| (r.id.clone(), r.sample)));
        self.records.extend(records);
        Ok(())
    }
}

/// The first key whose values differ.
fn difference(a: &Value, b: &Value) -> Option<String> {
    let keys = |v: &Value| v.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>()).unwrap_or_default();
    keys(a).into_iter().chain(keys(b)).find(|k| a.get(k) != b.get(k))
}

/// Writes a file whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let temporary = path.with_file_name(format!(".{name}.part"));
    let mut file = File::create(&temporary).map_err(Error::io("create", &temporary))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(Error::io("write", &temporary))?;
    std::fs::rename(&temporary, path).map_err(Error::io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record(id: &str, whole: bool) -> Record {
        Record {
            id: id.into(),
            raw: "text\nof two lines".into(),
            answer: whole.then(|| "1".into()),
            problem: (!whole).then(|| "no".into()),
            ..Record::default()
        }
    }

    #[test]
    fn answers_survive_a_cut_at_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let settings = json!({"seed": 1});
        let mut store = Store::open(&path, &settings).unwrap();
        store.add(vec![record("a", true), record("x", false), record("b", true)]).unwrap();
        store.add(vec![record("c", true)]).unwrap();
        drop(store);
        let bytes = std::fs::read(&path).unwrap();
        for cut in 0..=bytes.len() {
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let mut store = Store::open(&path, &settings).unwrap();
            assert!(store.has("x", 0));
            let missing: Vec<Record> = ["a", "b", "c"]
                .into_iter()
                .filter(|id| !store.has(id, 0))
                .map(|id| record(id, true))
                .collect();
            assert_eq!(missing.len(), 3 - bytes[..cut].iter().filter(|&&b| b == b'\n').count());
            store.add(missing).unwrap();
            drop(store);
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "cut at {cut}");
        }
        assert_eq!(read(&path).unwrap().len(), 3);
        assert_eq!(read(&beside(&path, "malformed.jsonl")).unwrap()[0].id, "x");
    }

    #[test]
    fn other_settings_foreign_lines_and_two_writers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        let said = |settings: Value| Store::open(&path, &settings).err().unwrap().to_string();
        let mut store = Store::open(&path, &json!({"seed": 1})).unwrap();
        store.add(vec![record("a", true)]).unwrap();
        assert!(said(json!({"seed": 1})).contains("another run writes"));
        drop(store);
        assert!(said(json!({"seed": 2})).contains("seed = 1, now it is 2"));
        let mut bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&bytes[..], &bytes[..]].concat()).unwrap();
        assert!(said(json!({"seed": 1})).contains("is there twice"));
        bytes.extend(b"{}\n");
        std::fs::write(&path, bytes).unwrap();
        assert!(said(json!({"seed": 1})).contains("a.jsonl:2: is no record"));
        assert!(Store::open(&folder.path().join("a.txt"), &json!({})).is_err());
    }
}
