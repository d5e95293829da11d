//! Soft labels: a teacher's probabilities of each token that a student learns to write (Hinton et al. 2015).
//!
//! Teacher and student must have the same vocabulary. The largest [`TOP`] probabilities of each token are kept, on disk
//! too, so that a run that is taken up needs no teacher.

use crate::Error;
use crate::record::write_whole;
use sha2::{Digest, Sha256};
use sparsam_engine::{Batcher, Engine, Feed, Opened, Request, Runner, Sampling, Want};
use sparsam_train::step::Soft;
use std::collections::HashMap;
use std::path::Path;

/// Probabilities that are kept for each token: what is left is 1 to 2% where language models are sure of themselves.
pub const TOP: usize = 16;

/// Answers that a student writes at a time.
const AT_ONCE: usize = 16;

/// Tokens and their probabilities, the largest first.
pub type Top = [(u32, f32); TOP];

/// Whose probabilities are learnt, and how.
pub struct Teacher<'a> {
    /// The model.
    pub engine: &'a Engine,
    /// The share of the loss that they have; labels and reasons as they are written have the rest.
    pub share: f64,
    /// `KL(student || teacher)` instead of `KL(teacher || student)`.
    pub reverse: bool,
}

impl Teacher<'_> {
    /// What a step is made for.
    pub fn targets(&self, vocab_size: usize) -> Soft {
        Soft { top: TOP, vocab_size, share: self.share, reverse: self.reverse }
    }
}

/// A teacher's probabilities for all lessons: lesson, text, token that is learnt.
#[derive(Debug)]
pub struct SoftLabels {
    /// In the order of the lessons.
    pub of: Vec<Vec<Vec<Top>>>,
}

/// The name of the file in a run's folder.
const FILE: &str = "soft-labels.bin";
/// Bytes of one token: ids and probabilities.
const BYTES: usize = TOP * 8;

impl SoftLabels {
    /// Those in `folder`, or new ones: `lessons` are texts as tokens, each with the first one that is learnt.
    ///
    /// # Errors
    /// If teacher and student have other vocabularies, the file in `folder` belongs to other lessons, or a text is longer
    /// than the teacher's context.
    pub fn made(
        teacher: &Teacher,
        student: &Opened,
        lessons: &[Vec<(&[u32], usize)>],
        folder: &Path,
    ) -> Result<SoftLabels, Error> {
        if !(0.0..=1.0).contains(&teacher.share) {
            return Err(Error::setting("--soft-share", "must be between 0 and 1"));
        }
        same_vocabulary(teacher.engine, student)?;
        let mut hash = Sha256::new();
        hash.update(teacher.engine.opened().source.path().display().to_string());
        for (tokens, learnt_from) in lessons.iter().flatten() {
            hash.update((*learnt_from as u64).to_le_bytes());
            tokens.iter().for_each(|t| hash.update(t.to_le_bytes()));
        }
        let key: [u8; 32] = hash.finalize().into();
        let shape: Vec<Vec<usize>> =
            lessons.iter().map(|l| l.iter().map(|(tokens, from)| tokens.len() - from).collect()).collect();
        let file = folder.join(FILE);
        if file.exists() {
            let bytes = std::fs::read(&file).map_err(Error::io("read", &file))?;
            return read(&bytes, &key, &shape).ok_or_else(|| {
                Error::file(&file, "holds the probabilities of another teacher or other lessons; remove it")
            });
        }
        let longest = lessons.iter().flatten().map(|(tokens, _)| tokens.len()).max().unwrap_or(1);
        let mut runner = teacher.engine.runner_with(1, longest)?;
        let mut of = Vec::with_capacity(lessons.len());
        for lesson in lessons {
            let texts = lesson.iter().map(|&(tokens, from)| ask(&mut runner, tokens, from));
            of.push(texts.collect::<Result<Vec<_>, Error>>()?);
        }
        let labels = SoftLabels { of };
        std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        let bytes: Vec<u8> = key.into_iter().chain(labels.bytes()).collect();
        write_whole(&file, &bytes)?;
        Ok(labels)
    }

    fn bytes(&self) -> impl Iterator<Item = u8> {
        let all = self.of.iter().flatten().flatten().flatten();
        all.flat_map(|(id, p)| [id.to_le_bytes(), p.to_le_bytes()]).flatten()
    }

    /// Of all of them.
    pub fn sha256(&self) -> [u8; 32] {
        Sha256::digest(self.bytes().collect::<Vec<u8>>()).into()
    }
}

/// The labels in a file; `None` if they are others' than of `key`.
fn read(bytes: &[u8], key: &[u8; 32], shape: &[Vec<usize>]) -> Option<SoftLabels> {
    let rest = bytes.strip_prefix(key)?;
    let n: usize = shape.iter().flatten().sum();
    if rest.len() != n * BYTES {
        return None;
    }
    let number = |b: &[u8]| -> [u8; 4] { [b[0], b[1], b[2], b[3]] };
    let mut tokens = rest.chunks_exact(BYTES).map(|token| -> Top {
        std::array::from_fn(|i| {
            let b = &token[i * 8..];
            (u32::from_le_bytes(number(b)), f32::from_le_bytes(number(&b[4..])))
        })
    });
    let of = shape.iter().map(|l| l.iter().map(|&n| tokens.by_ref().take(n).collect()).collect()).collect();
    Some(SoftLabels { of })
}

/// The teacher's probabilities of `tokens[from..]`, each behind those before it.
fn ask(runner: &mut Runner, tokens: &[u32], from: usize) -> Result<Vec<Top>, Error> {
    let vocab = runner.vocab_size();
    let mut sequence = runner.sequence();
    // The last token predicts nothing that is learnt.
    let fed = &tokens[..tokens.len() - 1];
    let feed = Feed { sequence: &mut sequence, tokens: fed, want: Want::From(from - 1) };
    let all = runner.run(&mut [feed])?.chunks_exact(vocab).map(largest).collect();
    runner.release(sequence);
    Ok(all)
}

/// What the model in `engine` itself writes behind each prompt, which has at most so many tokens: drawn from its
/// probabilities, by `seed` and the prompt's number alone. The token that ends an answer is part of it.
///
/// # Errors
/// If a prompt does not fit the context.
pub(crate) fn written(
    engine: &Engine,
    prompts: &[(&[u32], usize)],
    seed: u64,
) -> Result<Vec<Vec<u32>>, Error> {
    let mut batcher = Batcher::new(engine, AT_ONCE.min(prompts.len().max(1)))?;
    let mut asked = HashMap::new();
    for (i, &(prompt, max_tokens)) in prompts.iter().enumerate() {
        let sampling = Sampling {
            temperature: 1.0,
            seed: seed.wrapping_add((i as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            ..Sampling::default()
        };
        let prompt = prompt.to_vec();
        let request = Request { prompt, sampling, max_tokens: Some(max_tokens), ..Request::default() };
        asked.insert(batcher.submit(request, None)?, i);
    }
    let mut all = vec![Vec::new(); prompts.len()];
    let mut open = prompts.len();
    while open > 0 {
        for output in batcher.step()? {
            if let Some(&i) = asked.get(&output.id) {
                all[i].extend(output.token);
                open -= usize::from(output.finish.is_some());
            }
        }
    }
    Ok(all)
}

/// The largest probabilities that logits give.
fn largest(logits: &[f32]) -> Top {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&x| f64::from(x - most).exp()).sum();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    let by = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
    if ids.len() > TOP {
        ids.select_nth_unstable_by(TOP - 1, by);
        ids.truncate(TOP);
    }
    ids.sort_unstable_by(by);
    let of = |id: u32| (id, (f64::from(logits[id as usize] - most).exp() / sum) as f32);
    std::array::from_fn(|i| ids.get(i).map_or((0, 0.0), |&id| of(id)))
}

fn same_vocabulary(teacher: &Engine, student: &Opened) -> Result<(), Error> {
    let (a, b) = (teacher.tokenizer()?, student.tokenizer()?);
    let n = a.vocab_size();
    let other = match n == b.vocab_size() {
        false => Some(n.min(b.vocab_size()) as u32),
        true => (0..n as u32).find(|&id| a.token(id) != b.token(id)),
    };
    match other {
        None => Ok(()),
        Some(id) => Err(Error::setting(
            "--soft-labels",
            format!(
                "teacher and student have other vocabularies (token {id} is {:?} and {:?}), so the one's probabilities mean nothing to the other",
                a.token(id),
                b.token(id)
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_probabilities_come_first_and_are_kept_bit_for_bit() {
        let mut logits = vec![0.0f32; 100];
        (logits[7], logits[70]) = (2.0, 3.0);
        let top = largest(&logits);
        assert_eq!([top[0].0, top[1].0, top[2].0, top[15].0], [70, 7, 0, 14]);
        let sum = 98.0 + 2f64.exp() + 3f64.exp();
        assert!((f64::from(top[0].1) - 3f64.exp() / sum).abs() < 1e-6);
        assert!((f64::from(top[2].1) - 1.0 / sum).abs() < 1e-6);
        // Fewer tokens than are kept: the rest is nothing.
        assert_eq!(largest(&[0.0, 0.0])[1..3], [(1, 0.5), (0, 0.0)]);

        let labels = SoftLabels { of: vec![vec![vec![top, largest(&[1.0])]], vec![vec![], vec![top]]] };
        let key = [9; 32];
        let bytes: Vec<u8> = key.into_iter().chain(labels.bytes()).collect();
        let shape = [vec![2], vec![0, 1]];
        assert_eq!(read(&bytes, &key, &shape).unwrap().of, labels.of);
        assert!(read(&bytes, &[8; 32], &shape).is_none() && read(&bytes, &key, &[vec![2]]).is_none());
        assert!(read(&bytes[..50], &key, &shape).is_none());
    }
}
