//! Who can be asked: a local model ([`local`]) or a server ([`http`]).

pub mod http;
pub mod local;

use crate::Error;
use crate::budget::Tokens;
use sparsam_engine::Message;

/// A question as it is put to a teacher.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Text to be continued.
    Text(String),
    /// A dialogue to be answered.
    Dialogue(Vec<Message>),
}

/// How a teacher answers.
#[derive(Clone, Debug, PartialEq)]
pub struct Manner {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// 0: the likeliest answer.
    pub temperature: f32,
    /// Questions under way at a time.
    pub parallel: usize,
}

/// A prompt on its way to a teacher.
#[derive(Clone, Debug)]
pub struct Asked {
    /// The asker's name for it.
    pub index: usize,
    /// What is asked.
    pub prompt: Prompt,
    /// The same seed gives the same answer.
    pub seed: u64,
}

/// What came back.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The asker's name for the prompt.
    pub index: usize,
    /// The text.
    pub text: String,
    /// What it took.
    pub used: Tokens,
}

/// The asker: hands out prompts and takes replies.
pub trait Desk {
    /// The next prompt; `None` if there is none, or none that may be asked before more replies have come.
    fn next(&mut self) -> Option<Asked>;
    /// Takes replies that came together.
    ///
    /// # Errors
    /// If they cannot be kept; the teacher stops then.
    fn take(&mut self, replies: Vec<Reply>) -> Result<(), Error>;
}

/// Someone who answers.
pub trait Teacher {
    /// Its name, for the record.
    fn name(&self) -> String;

    /// The most tokens that prompt and answer can take.
    ///
    /// # Errors
    /// If the prompt cannot be asked at all.
    fn most(&self, prompt: &Prompt, manner: &Manner) -> Result<Tokens, Error>;

    /// Answers what the desk hands out, until it has nothing more.
    ///
    /// # Errors
    /// If the teacher fails, or the desk cannot keep a reply.
    fn serve(&mut self, desk: &mut dyn Desk, manner: &Manner) -> Result<(), Error>;
}
