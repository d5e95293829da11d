//! Documents from text and JSONL files, read as they are needed.

use crate::Error;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

/// Bytes of text that are encoded at a time.
const CHUNK_BYTES: usize = 1 << 20;

/// Files of text: `.jsonl` holds an object with the text on each line, anything else is text, one document a file.
#[derive(Clone, Debug)]
pub struct Sources {
    /// The files, in order.
    pub files: Vec<PathBuf>,
    /// The key of the text in JSONL files.
    pub field: String,
}

/// Calls `f` with each piece of text in order, and whether a document ends with it.
///
/// A long text is handed on in pieces cut before a line break that follows text: no pre-tokeniser joins what stands on
/// its two sides, so the tokens are those of the whole.
///
/// # Errors
/// [`Error::Io`], [`Error::Data`] with file and line for what is not UTF-8, not JSON or has no text; whatever `f` gives.
pub fn documents(sources: &Sources, mut f: impl FnMut(&str, bool) -> Result<(), Error>) -> Result<(), Error> {
    for path in &sources.files {
        let file = File::open(path).map_err(Error::io("open", path))?;
        let reader = BufReader::with_capacity(1 << 20, file);
        if path.extension().is_some_and(|e| e == "jsonl" || e == "ndjson") {
            jsonl(path, reader, &sources.field, &mut f)?;
        } else {
            text(path, reader, &mut f)?;
        }
    }
    Ok(())
}

fn text(
    path: &Path,
    mut reader: impl BufRead,
    f: &mut impl FnMut(&str, bool) -> Result<(), Error>,
) -> Result<(), Error> {
    let (mut held, mut read) = (String::new(), 0usize);
    let mut line = Vec::new();
    let mut any = false;
    loop {
        line.clear();
        let n = reader.read_until(b'\n', &mut line).map_err(Error::io("read", path))?;
        if n == 0 {
            break;
        }
        let part = std::str::from_utf8(&line).map_err(|e| {
            let at = read + e.valid_up_to();
            Error::data(path, format!("byte {at} is not UTF-8; convert the file, or take the byte out"))
        })?;
        read += n;
        any |= !part.trim().is_empty();
        held.push_str(part);
        if held.len() >= CHUNK_BYTES
            && let Some(cut) = last_cut(&held)
        {
            f(&held[..cut], false)?;
            held.drain(..cut);
        }
    }
    if !any {
        return Err(Error::data(path, "it holds no text"));
    }
    f(&held, true)
}

/// The last place before a line break that stands behind text.
fn last_cut(text: &str) -> Option<usize> {
    let mut upto = text.len();
    while let Some(at) = text[..upto].rfind('\n') {
        if text[..at].chars().next_back().is_some_and(|c| !c.is_whitespace()) {
            return Some(at);
        }
        upto = at;
    }
    None
}

fn jsonl(
    path: &Path,
    reader: impl BufRead,
    field: &str,
    f: &mut impl FnMut(&str, bool) -> Result<(), Error>,
) -> Result<(), Error> {
    let mut any = false;
    for (i, line) in reader.split(b'\n').enumerate() {
        let line = line.map_err(Error::io("read", path))?;
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let bad = |problem: String| Error::data(path, format!("line {}: {problem}", i + 1));
        let value: Value = serde_json::from_slice(&line).map_err(|e| bad(format!("is not JSON: {e}")))?;
        let Value::Object(object) = &value else {
            return Err(bad("is not a JSON object".into()));
        };
        match object.get(field) {
            Some(Value::String(text)) if !text.is_empty() => {
                any = true;
                f(text, true)?;
            }
            Some(Value::String(_)) => {}
            Some(_) => return Err(bad(format!("`{field}` is not text"))),
            None => {
                let near = sparsam_plan::nearest(field, object.keys().map(String::as_str));
                let near = near.map(|n| format!(" (did you mean `{n}`?)")).unwrap_or_default();
                return Err(bad(format!("has no `{field}`{near}; name the key of the text with field")));
            }
        }
    }
    if any { Ok(()) } else { Err(Error::data(path, "it holds no text")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(name: &str, bytes: &[u8]) -> Result<Vec<(String, bool)>, Error> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let mut out = Vec::new();
        let sources = Sources { files: vec![path], field: "text".into() };
        documents(&sources, |t, end| {
            out.push((t.to_string(), end));
            Ok(())
        })?;
        Ok(out)
    }

    #[test]
    fn long_texts_come_in_pieces_cut_before_line_breaks() {
        let text = "some words of a line\n\n  indented\n".repeat(60_000);
        let pieces = read("a.txt", text.as_bytes()).unwrap();
        assert!(pieces.len() > 1 && pieces.iter().all(|(p, _)| p.len() < CHUNK_BYTES + 100));
        assert!(pieces[1..].iter().all(|(p, _)| p.starts_with('\n')));
        assert!(pieces[..pieces.len() - 1].iter().all(|(p, end)| !end && !p.ends_with(char::is_whitespace)));
        assert!(pieces.last().unwrap().1);
        assert_eq!(pieces.into_iter().map(|p| p.0).collect::<String>(), text);
    }

    #[test]
    fn jsonl_gives_a_document_a_line() {
        let docs = read("a.jsonl", b"{\"text\": \"one\"}\n\n{\"id\": 3, \"text\": \"two\\n\"}").unwrap();
        assert_eq!(docs, [("one".to_string(), true), ("two\n".to_string(), true)]);
    }

    #[test]
    fn wrong_lines_are_named() {
        let said = |name, bytes: &[u8]| read(name, bytes).unwrap_err().to_string();
        assert!(said("a.jsonl", b"{\"text\": \"x\"}\nnot json").contains("line 2: is not JSON"));
        let e = said("a.jsonl", b"{\"texts\": \"x\"}");
        assert!(e.contains("line 1: has no `text` (did you mean `texts`?)"), "{e}");
        assert!(said("a.jsonl", b"{\"text\": 3}").contains("`text` is not text"));
        assert!(said("a.txt", b"fine\nnot \xff fine").contains("byte 9 is not UTF-8"));
        assert!(said("a.txt", b" \n").contains("holds no text"));
        assert!(said("a.jsonl", b"\n").contains("holds no text"));
    }
}
