//! Compiled steps over one cache of pages: the only way from tokens to logits when nothing is trained.

use crate::Error;
use sparsam_dtype::DType;
use sparsam_ir::{Precision, Trace};
use sparsam_models::Model;
use sparsam_models::nn::{Batch, Cache};
use sparsam_runtime::{Data, Device, Profile, Report, Session, Step, Weights};
use std::sync::Arc;

/// Tokens in a page of the cache.
pub(crate) const PAGE: usize = 64;
/// Rows of the largest step; longer prompts take several.
pub(crate) const MAX_ROWS: usize = 512;

/// Element types that a cache can have.
pub const CACHE_TYPES: [DType; 4] = [DType::F32, DType::F16, DType::BF16, DType::Q8_0];

/// What a [`Runner`] is made for.
#[derive(Clone, Debug, PartialEq)]
pub struct RunnerOptions {
    /// How products with weights read their activations.
    pub precision: Precision,
    /// Element type of keys and values in the cache, one of [`CACHE_TYPES`].
    pub cache: DType,
    /// Tokens that one sequence may have.
    pub context: usize,
    /// Sequences that may be in the cache at once, each with its whole context.
    pub sequences: usize,
    /// Run node by node, without the compiler: the baseline.
    pub eager: bool,
}

/// The tokens of one text in the cache. Belongs to the runner that made it.
#[derive(Debug, Default)]
pub struct Sequence {
    pages: Vec<i32>,
    tokens: Vec<u32>,
}

impl Sequence {
    /// The tokens whose keys and values are in the cache.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// For which tokens of a [`Feed`] logits are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Want {
    /// None.
    Nothing,
    /// The last one.
    Last,
    /// All from this index into the feed's tokens on.
    From(usize),
}

/// Tokens to append to a sequence.
pub struct Feed<'a> {
    /// The sequence.
    pub sequence: &'a mut Sequence,
    /// What to append.
    pub tokens: &'a [u32],
    /// Where logits are wanted.
    pub want: Want,
}

/// A session with the model's cache, and its steps by shape, compiled when first needed.
pub struct Runner {
    session: Session,
    model: Model,
    options: RunnerOptions,
    cache: Cache,
    steps: Vec<((usize, usize), Step)>,
    free: Vec<i32>,
    /// How many sequences have each page.
    shared: Vec<u16>,
    vocab_size: usize,
    made_for: usize,
    rows: Rows,
}

/// The inputs of a step, kept to save their allocation.
#[derive(Default)]
struct Rows {
    tokens: Vec<i32>,
    positions: Vec<i32>,
    seqs: Vec<i32>,
    slots: Vec<i32>,
    logits: Vec<i32>,
    table: Vec<i32>,
}

/// Tokens that a cached text and a prompt have in common, but for the prompt's last one.
pub(crate) fn common(cached: &[u32], prompt: &[u32]) -> usize {
    let common = cached.iter().zip(prompt).take_while(|(a, b)| a == b).count();
    common.min(prompt.len().saturating_sub(1))
}

/// Sizes that steps are compiled for: powers of two, so that few are and at most half of the rows are padding.
fn bucket(n: usize) -> usize {
    n.next_power_of_two()
}

impl Runner {
    /// An empty cache for `model` over `weights`.
    ///
    /// # Errors
    /// If the context or the cache's type is not possible for the model.
    pub fn new(
        device: &Device,
        model: &Model,
        weights: Arc<Weights>,
        options: RunnerOptions,
    ) -> Result<Runner, Error> {
        let facts = model.facts();
        let refuse = |what: String| Err(Error::Context { what });
        if options.context == 0 || options.sequences == 0 {
            return refuse("a context of 0 tokens has room for nothing; choose at least 1".into());
        }
        if !CACHE_TYPES.contains(&options.cache) {
            return refuse(format!("no cache can hold {}; choose one of {CACHE_TYPES:?}", options.cache));
        }
        if facts.cache_bytes_per_token(options.cache).is_none() {
            let (dtype, head) = (options.cache, facts.heads.head_dim);
            return refuse(format!(
                "a cache of {dtype} wants heads of whole blocks, this model's have {head}; choose F16"
            ));
        }
        let n_pages = options.context.div_ceil(PAGE);
        let pages = n_pages * options.sequences;
        let Ok(last) = i32::try_from(pages * PAGE) else {
            return refuse(format!(
                "a cache of {} tokens is beyond what can be numbered; choose a smaller --ctx",
                pages * PAGE
            ));
        };
        let cache = Cache {
            n_slots: last as usize,
            page_size: PAGE,
            n_seqs: options.sequences,
            n_pages,
            dtype: options.cache,
        };
        Ok(Runner {
            session: Session::new(device, weights),
            model: model.clone(),
            cache,
            steps: Vec::new(),
            free: (0..pages as i32).rev().collect(),
            shared: vec![0; pages],
            vocab_size: facts.vocab_size,
            made_for: facts.context_length,
            options,
            rows: Rows::default(),
        })
    }

    /// What it was made for.
    pub fn options(&self) -> &RunnerOptions {
        &self.options
    }

    /// Columns of the logits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Tokens that the cache still has room for, over all sequences.
    pub fn free_tokens(&self) -> usize {
        self.free.len() * PAGE
    }

    /// A new, empty sequence.
    pub fn sequence(&self) -> Sequence {
        Sequence::default()
    }

    /// A new sequence with the first tokens of `sequence`, at most `n` and in whole pages, which the two then share.
    pub fn fork(&mut self, sequence: &Sequence, n: usize) -> Sequence {
        let pages = n.min(sequence.tokens.len()) / PAGE;
        let fork = Sequence {
            pages: sequence.pages[..pages].to_vec(),
            tokens: sequence.tokens[..pages * PAGE].to_vec(),
        };
        fork.pages.iter().for_each(|&page| self.shared[page as usize] += 1);
        fork
    }

    /// Keeps the first `n` tokens of a sequence and gives back the pages of the others. Keeps fewer if the last page
    /// would be cut while another sequence has it too. Returns how many are kept.
    pub fn truncate(&mut self, sequence: &mut Sequence, n: usize) -> usize {
        let mut n = n.min(sequence.tokens.len());
        if n < sequence.tokens.len()
            && !n.is_multiple_of(PAGE)
            && self.shared[sequence.pages[n / PAGE] as usize] > 1
        {
            n -= n % PAGE;
        }
        sequence.tokens.truncate(n);
        for page in sequence.pages.drain(n.div_ceil(PAGE)..).rev() {
            let shared = &mut self.shared[page as usize];
            *shared -= 1;
            if *shared == 0 {
                self.free.push(page);
            }
        }
        n
    }

    /// Cuts `sequence` back to what it has in common with `prompt`, but for the last token, whose logits are wanted.
    /// Returns how many tokens that is.
    pub fn reuse(&mut self, sequence: &mut Sequence, prompt: &[u32]) -> usize {
        let keep = common(&sequence.tokens, prompt);
        self.truncate(sequence, keep)
    }

    /// Gives all pages of a sequence back.
    pub fn release(&mut self, mut sequence: Sequence) {
        self.truncate(&mut sequence, 0);
    }

    /// Appends `tokens`, however many, and gives the logits (vocab_size) after the last.
    ///
    /// # Errors
    /// As [`Runner::run`]; for no tokens at all, [`Error::EmptyPrompt`].
    pub fn append(&mut self, sequence: &mut Sequence, tokens: &[u32]) -> Result<&[f32], Error> {
        let Some(last) = tokens.len().checked_sub(1) else { return Err(Error::EmptyPrompt) };
        self.check_room(sequence, tokens.len())?;
        let cut = last / MAX_ROWS * MAX_ROWS;
        for part in tokens[..cut].chunks(MAX_ROWS) {
            self.run(&mut [Feed { sequence, tokens: part, want: Want::Nothing }])?;
        }
        self.run(&mut [Feed { sequence, tokens: &tokens[cut..], want: Want::Last }])
    }

    /// Whether a text of these tokens fits the context with room for one more, and the vocabulary knows them.
    pub(crate) fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        let context = self.options.context;
        if tokens.len() >= context {
            let (room, made_for) = (context - 1, self.made_for);
            return Err(Error::TooLong { tokens: tokens.len(), room, context, made_for });
        }
        self.check_ids(tokens)
    }

    fn check_ids(&self, tokens: &[u32]) -> Result<(), Error> {
        match tokens.iter().find(|&&id| id as usize >= self.vocab_size) {
            Some(&id) => Err(Error::TokenId { id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    fn check_room(&self, sequence: &Sequence, n: usize) -> Result<(), Error> {
        let (context, taken) = (self.options.context, sequence.tokens.len());
        if taken + n > context {
            let room = context - taken;
            return Err(Error::TooLong { tokens: n, room, context, made_for: self.made_for });
        }
        Ok(())
    }

    /// Appends tokens to several sequences in one step of at most 512 rows. Gives the logits (R, vocab_size) of the R
    /// tokens for which they are wanted, in the order of the feeds.
    ///
    /// A token's logits depend neither on the other feeds nor on how its own text was cut into steps.
    ///
    /// # Errors
    /// If a sequence outgrows the context, the cache is full, a token is none of the vocabulary's, or a kernel fails.
    /// The sequences are then as before.
    pub fn run(&mut self, feeds: &mut [Feed]) -> Result<&[f32], Error> {
        let n: usize = feeds.iter().map(|f| f.tokens.len()).sum();
        assert!(
            n <= MAX_ROWS && feeds.len() <= self.cache.n_seqs,
            "{n} rows of {} sequences in one step",
            feeds.len()
        );
        let mut new_pages = 0;
        for f in feeds.iter() {
            self.check_room(f.sequence, f.tokens.len())?;
            let pages = (f.sequence.tokens.len() + f.tokens.len()).div_ceil(PAGE);
            new_pages += pages.saturating_sub(f.sequence.pages.len());
            self.check_ids(f.tokens)?;
        }
        if new_pages > self.free.len() {
            return Err(Error::CacheFull { slots: self.cache.n_slots });
        }
        let n_logits = self.fill(feeds);
        let shape = (bucket(n.max(1)), bucket(n_logits.max(1)));
        self.rows.pad(shape);
        let step = self.step(shape)?;
        let r = &self.rows;
        let inputs = [
            ("tokens", Data::I32(&r.tokens)),
            ("positions", Data::I32(&r.positions)),
            ("row_seq", Data::I32(&r.seqs)),
            ("slots", Data::I32(&r.slots)),
            ("logit_rows", Data::I32(&r.logits)),
            ("page_table", Data::I32(&r.table)),
        ];
        let outputs = self.session.run(&self.steps[step].1, &inputs)?;
        for f in feeds.iter_mut() {
            f.sequence.tokens.extend_from_slice(f.tokens);
        }
        Ok(&outputs.f32("logits")?[..n_logits * self.vocab_size])
    }

    /// Writes the inputs of a step, taking the pages that it needs. Returns how many logits are wanted.
    fn fill(&mut self, feeds: &mut [Feed]) -> usize {
        let r = &mut self.rows;
        for list in [&mut r.tokens, &mut r.positions, &mut r.seqs, &mut r.slots, &mut r.logits] {
            list.clear();
        }
        r.table.clear();
        r.table.resize(self.cache.n_seqs * self.cache.n_pages, 0);
        for (s, f) in feeds.iter_mut().enumerate() {
            let Sequence { pages, tokens } = &mut *f.sequence;
            let first_row = r.tokens.len();
            let wanted = match f.want {
                Want::Nothing => f.tokens.len(),
                Want::Last => f.tokens.len().saturating_sub(1),
                Want::From(i) => i,
            };
            r.logits.extend((wanted..f.tokens.len()).map(|i| (first_row + i) as i32));
            for (i, &token) in f.tokens.iter().enumerate() {
                let position = tokens.len() + i;
                if position / PAGE == pages.len()
                    && let Some(page) = self.free.pop()
                {
                    self.shared[page as usize] = 1;
                    pages.push(page);
                }
                r.tokens.push(token as i32);
                r.positions.push(position as i32);
                r.seqs.push(s as i32);
                r.slots.push(pages[position / PAGE] * PAGE as i32 + (position % PAGE) as i32);
            }
            r.table[s * self.cache.n_pages..][..pages.len()].copy_from_slice(pages);
        }
        r.logits.len()
    }

    /// The index of the step of this shape (rows, rows with logits), compiled if it is new.
    fn step(&mut self, shape: (usize, usize)) -> Result<usize, Error> {
        if let Some(i) = self.steps.iter().position(|(s, _)| *s == shape) {
            return Ok(i);
        }
        let batch = Batch::paged(shape.0, self.cache.clone())
            .with_logit_rows(shape.1)
            .with_precision(self.options.precision);
        let t = Trace::with_weights(self.session.weights().shapes());
        let logits = self.model.trace(&t, &batch);
        let graph = t.finish(&[("logits", &logits)])?;
        let step =
            if self.options.eager { self.session.eager(&graph)? } else { self.session.compile(&graph)? };
        self.steps.push((shape, step));
        Ok(self.steps.len() - 1)
    }

    /// What compiling a step of `n` tokens that wants one row of logits did.
    ///
    /// # Errors
    /// If it does not compile.
    pub fn report(&mut self, n: usize) -> Result<&Report, Error> {
        let step = self.step((bucket(n.clamp(1, MAX_ROWS)), 1))?;
        Ok(self.steps[step].1.report())
    }

    /// Starts (or ends) counting time by kind of kernel.
    pub fn set_profiling(&mut self, on: bool) {
        self.session.set_profiling(on);
    }

    /// Times since profiling began.
    pub fn profile(&self) -> Option<&Profile> {
        self.session.profile()
    }

    /// Bytes of its arena, and of the cache when full.
    pub fn memory(&self) -> (usize, usize) {
        let per_token = self.model.facts().cache_bytes_per_token(self.cache.dtype).unwrap_or(0);
        (self.session.arena_bytes(), per_token * self.cache.n_slots)
    }
}

impl Rows {
    /// Padding: rows of no sequence, whose keys go nowhere; logits of row 0 once more.
    fn pad(&mut self, (rows, logits): (usize, usize)) {
        self.tokens.resize(rows, 0);
        self.positions.resize(rows, 0);
        self.seqs.resize(rows, -1);
        self.slots.resize(rows, -1);
        self.logits.resize(logits, 0);
    }
}
