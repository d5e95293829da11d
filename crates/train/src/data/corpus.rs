//! A stream of tokens, in memory or in mapped files.

use crate::Error;
use sha2::{Digest, Sha256};
use sparsam_formats::{AtomicFile, Map};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The first word of llm.c's and modded-nanogpt's token files; their header is 256 words long, the tokens are 16 bits.
const LLM_C_MAGIC: u32 = 20_240_520;
const LLM_C_HEADER_BYTES: usize = 1024;

#[derive(Clone)]
enum Shard {
    Memory(Arc<Vec<u32>>),
    /// Little-endian integers of `bytes` bytes from `offset` on.
    File {
        map: Arc<Map>,
        offset: usize,
        bytes: usize,
        len: usize,
    },
}

impl Shard {
    fn len(&self) -> usize {
        match self {
            Shard::Memory(tokens) => tokens.len(),
            Shard::File { len, .. } => *len,
        }
    }

    fn read(&self, start: usize, n: usize, out: &mut Vec<u32>) {
        match self {
            Shard::Memory(tokens) => out.extend(&tokens[start..start + n]),
            Shard::File { map, offset, bytes, .. } => {
                let raw = &map.bytes()[offset + start * bytes..][..n * bytes];
                match bytes {
                    2 => out.extend(raw.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]) as u32)),
                    _ => {
                        out.extend(raw.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                    }
                }
            }
        }
    }
}

/// A stream of tokens; documents end with the end token, if the tokenizer has one. Cheap to clone.
#[derive(Clone)]
pub struct Corpus {
    shards: Vec<Shard>,
    /// The part of all shards' tokens that belongs to it.
    range: std::ops::Range<usize>,
    end: Option<u32>,
    path: PathBuf,
}

impl Corpus {
    /// Tokens in memory.
    pub fn from_tokens(tokens: Vec<u32>, end: Option<u32>) -> Corpus {
        let range = 0..tokens.len();
        Corpus { shards: vec![Shard::Memory(Arc::new(tokens))], range, end, path: PathBuf::from("(memory)") }
    }

    /// Token files, mapped, one after the other: `.bin` holds 16-bit tokens, with or without llm.c's header (nanoGPT,
    /// llm.c), `.u32` 32-bit tokens; both little-endian.
    ///
    /// # Errors
    /// If a file cannot be read, has another name, or does not hold whole tokens.
    pub fn open(paths: &[PathBuf], end: Option<u32>) -> Result<Corpus, Error> {
        let shards = paths.iter().map(|p| open_shard(p)).collect::<Result<Vec<_>, Error>>()?;
        let n = shards.iter().map(Shard::len).sum();
        let path = paths.first().cloned().unwrap_or_default();
        Ok(Corpus { shards, range: 0..n, end, path })
    }

    /// Whether `path` is named like a token file.
    pub fn is_token_file(path: &Path) -> bool {
        path.extension().is_some_and(|e| e == "bin" || e == "u32")
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The token behind each document.
    pub fn end(&self) -> Option<u32> {
        self.end
    }

    /// Its first file, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tokens `start .. start + n`; fewer where the stream ends.
    pub fn window(&self, start: usize, n: usize) -> Vec<u32> {
        let mut at = self.range.start + start;
        let mut left = n.min(self.range.end.saturating_sub(at));
        let mut out = Vec::with_capacity(left);
        for shard in &self.shards {
            if at >= shard.len() {
                at -= shard.len();
                continue;
            }
            let take = left.min(shard.len() - at);
            shard.read(at, take, &mut out);
            (at, left) = (0, left - take);
            if left == 0 {
                break;
            }
        }
        out
    }

    /// Cuts the stream at token `at`.
    pub fn split(&self, at: usize) -> (Corpus, Corpus) {
        let middle = self.range.start + at.min(self.len());
        let part = |range| Corpus { range, ..self.clone() };
        (part(self.range.start..middle), part(middle..self.range.end))
    }

    /// Where to cut off about `n` tokens at the end: behind the end of a document, if one ends within the first tenth of
    /// them.
    pub fn held_back_from(&self, n: usize) -> usize {
        let at = self.len() - n.min(self.len());
        let near = self.window(at, n / 10);
        match near.iter().position(|t| Some(*t) == self.end) {
            Some(i) => at + i + 1,
            None => at,
        }
    }
}

fn open_shard(path: &Path) -> Result<Shard, Error> {
    let bytes = match path.extension().and_then(|e| e.to_str()) {
        Some("bin") => 2,
        Some("u32") => 4,
        _ => {
            return Err(Error::data(path, "token files end in .bin (16-bit tokens) or .u32 (32-bit tokens)"));
        }
    };
    let map = Map::open(path)?;
    let word =
        |i: usize| map.bytes().get(4 * i..4 * i + 4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let offset = match (bytes, word(0)) {
        (2, Some(LLM_C_MAGIC)) if word(1) != Some(1) => {
            return Err(Error::data(
                path,
                format!("its header says version {:?}; version 1 is known", word(1)),
            ));
        }
        (2, Some(LLM_C_MAGIC)) => LLM_C_HEADER_BYTES,
        _ => 0,
    };
    let Some(body) = map.bytes().len().checked_sub(offset).filter(|n| n.is_multiple_of(bytes)) else {
        return Err(Error::data(
            path,
            format!(
                "{} bytes are no whole number of {bytes}-byte tokens; the file is cut off",
                map.bytes().len()
            ),
        ));
    };
    Ok(Shard::File { map: Arc::new(map), offset, bytes, len: body / bytes })
}

/// A token file that is being written; nothing is at its path until [`TokenWriter::finish`].
pub struct TokenWriter {
    file: AtomicFile,
    bytes: usize,
    hash: Sha256,
    n: usize,
}

impl TokenWriter {
    /// The file name for tokens of a vocabulary: 16 bits where they are enough.
    pub fn name(stem: &str, vocab_size: usize) -> String {
        format!("{stem}.{}", if vocab_size <= 1 << 16 { "bin" } else { "u32" })
    }

    /// Starts the file `name` of a vocabulary of `vocab_size` in `folder`.
    ///
    /// # Errors
    /// If it cannot be created.
    pub fn create(path: &Path, vocab_size: usize) -> Result<TokenWriter, Error> {
        let bytes = if vocab_size <= 1 << 16 { 2 } else { 4 };
        Ok(TokenWriter { file: AtomicFile::create(path)?, bytes, hash: Sha256::new(), n: 0 })
    }

    /// Appends tokens.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn write(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let mut raw = Vec::with_capacity(tokens.len() * self.bytes);
        for t in tokens {
            raw.extend_from_slice(&t.to_le_bytes()[..self.bytes]);
        }
        self.hash.update(&raw);
        self.n += tokens.len();
        self.file.write_all(&raw).map_err(Error::io("write", self.file.path()))
    }

    /// Makes the file appear; number of tokens and SHA-256 of their bytes.
    ///
    /// # Errors
    /// If the disk is full or fails.
    pub fn finish(self) -> Result<(usize, String), Error> {
        self.file.commit()?;
        Ok((self.n, hex(&self.hash.finalize())))
    }
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_files_are_read_as_one_stream() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        for (name, vocab, tokens) in
            [("a.bin", 300, vec![1, 2, 299]), ("b.u32", 100_000, vec![70_000, 4]), ("c.bin", 300, vec![])]
        {
            let mut w = TokenWriter::create(&path(name), vocab).unwrap();
            w.write(&tokens).unwrap();
            assert_eq!(w.finish().unwrap().0, tokens.len());
        }
        let mut llm_c = vec![0u8; LLM_C_HEADER_BYTES];
        llm_c[..4].copy_from_slice(&LLM_C_MAGIC.to_le_bytes());
        llm_c[4] = 1;
        llm_c.extend([7, 0, 8, 0]);
        std::fs::write(path("d.bin"), llm_c).unwrap();
        let all = ["a.bin", "c.bin", "b.u32", "d.bin"].map(path);
        let c = Corpus::open(&all, Some(2)).unwrap();
        assert_eq!(c.window(0, 99), [1, 2, 299, 70_000, 4, 7, 8]);
        assert_eq!(c.window(2, 3), [299, 70_000, 4]);
        let (a, b) = c.split(4);
        assert_eq!((a.window(3, 9), b.window(0, 2), b.len()), (vec![70_000], vec![4, 7], 3));
    }

    #[test]
    fn the_held_back_part_starts_at_a_document_if_one_is_near() {
        let tokens: Vec<u32> = (0..100).map(|i| if i == 62 { 1 } else { 0 }).collect();
        assert_eq!(Corpus::from_tokens(tokens.clone(), Some(1)).held_back_from(40), 63);
        assert_eq!(Corpus::from_tokens(tokens, Some(9)).held_back_from(40), 60);
    }

    #[test]
    fn broken_token_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let said = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            Corpus::open(&[path], None).err().unwrap().to_string()
        };
        assert!(said("a.bin", &[1, 2, 3]).contains("3 bytes are no whole number of 2-byte tokens"));
        assert!(said("a.txt", b"x").contains("end in .bin"));
        let mut v2 = LLM_C_MAGIC.to_le_bytes().to_vec();
        v2.extend([2, 0, 0, 0]);
        assert!(said("v.bin", &v2).contains("version 1 is known"));
    }
}
