//! A local model as teacher: many prompts at once, and what they begin with alike is read once.

use super::{Asked, Desk, Manner, Prompt, Reply, Teacher};
use crate::Error;
use crate::budget::Tokens;
use sparsam_engine::{Batcher, Engine, JobId, Request, Sampling};
use std::collections::HashMap;

/// Texts behind which a model that continues text goes on with questions of its own.
const STOPS: [&str; 2] = ["\nQ:", "\n\nQ:"];

/// A local model.
pub struct Local<'a> {
    engine: &'a Engine,
    name: String,
}

/// A prompt that is being answered.
struct Open {
    index: usize,
    prompt_tokens: u64,
    completion_tokens: u64,
    text: String,
}

impl<'a> Local<'a> {
    /// The model in `engine`, called `name` in records.
    pub fn new(engine: &'a Engine, name: impl Into<String>) -> Local<'a> {
        Local { engine, name: name.into() }
    }

    fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, Error> {
        Ok(match prompt {
            Prompt::Text(text) => self.engine.encode(text)?,
            Prompt::Dialogue(messages) => self.engine.encode_dialogue(messages)?,
        })
    }

    fn submit(&self, batcher: &mut Batcher, asked: Asked, manner: &Manner) -> Result<(JobId, Open), Error> {
        let prompt = self.tokens(&asked.prompt)?;
        let prompt_tokens = prompt.len() as u64;
        let stops = match asked.prompt {
            Prompt::Text(_) => STOPS.map(str::to_string).to_vec(),
            Prompt::Dialogue(_) => Vec::new(),
        };
        let sampling = Sampling { temperature: manner.temperature, seed: asked.seed, ..Sampling::default() };
        let max_tokens = Some(manner.max_tokens);
        let request = Request { prompt, sampling, max_tokens, stops, ..Request::default() };
        let id = batcher.submit(request, None)?;
        Ok((id, Open { index: asked.index, prompt_tokens, completion_tokens: 0, text: String::new() }))
    }
}

impl Teacher for Local<'_> {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn most(&self, prompt: &Prompt, manner: &Manner) -> Result<Tokens, Error> {
        let tokens = self.tokens(prompt)?.len();
        let context = self.engine.context();
        if tokens + manner.max_tokens > context {
            return Err(Error::setting(
                "--ctx",
                format!(
                    "a prompt has {tokens} tokens and its answer up to {} (--max-tokens), but the context is {context}; choose a larger --ctx",
                    manner.max_tokens
                ),
            ));
        }
        Ok(Tokens { prompt: tokens as u64, completion: manner.max_tokens as u64 })
    }

    fn serve(&mut self, desk: &mut dyn Desk, manner: &Manner) -> Result<(), Error> {
        let mut batcher = Batcher::new(self.engine, manner.parallel)?;
        let mut open: HashMap<JobId, Open> = HashMap::new();
        // The first prompt is read alone: pages can be shared only once they are there.
        let mut places = 1;
        loop {
            while open.len() < places
                && let Some(asked) = desk.next()
            {
                let (id, job) = self.submit(&mut batcher, asked, manner)?;
                open.insert(id, job);
            }
            if open.is_empty() {
                return Ok(());
            }
            let mut replies = Vec::new();
            for output in batcher.step()? {
                places = manner.parallel;
                let Some(job) = open.get_mut(&output.id) else { continue };
                job.text += &output.text;
                job.completion_tokens += 1;
                if output.finish.is_some()
                    && let Some(job) = open.remove(&output.id)
                {
                    let used = Tokens { prompt: job.prompt_tokens, completion: job.completion_tokens };
                    replies.push(Reply { index: job.index, text: job.text, used });
                }
            }
            if !replies.is_empty() {
                desk.take(replies)?;
            }
        }
    }
}
