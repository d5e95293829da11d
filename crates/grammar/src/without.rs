//! A build without the library.

use crate::{Error, Grammar};
use sparsam_engine::Rule;
use sparsam_tokenizer::Tokenizer;

/// A vocabulary made ready for grammars: there is none in this build.
pub enum Grammars {}

impl Grammars {
    /// # Errors
    /// Always.
    pub fn new(_: &Tokenizer, _: usize) -> Result<Grammars, Error> {
        let why = "this build has no library for it; build sparsam with the feature `grammar`".into();
        Err(Error { what: "a grammar", why })
    }

    /// # Errors
    /// It cannot be called.
    pub fn compile(&self, _: &Grammar) -> Result<Box<dyn Rule>, Error> {
        match *self {}
    }
}
