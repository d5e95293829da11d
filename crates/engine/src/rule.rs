//! Rules that an answer must keep to, as the engine sees them: which tokens may come next. What they say of the text is
//! another crate's matter.

use std::fmt;

/// A rule for a text, and how far the text has come.
pub trait Rule: Send + fmt::Debug {
    /// Sets the logits of tokens that cannot come next to -inf.
    ///
    /// # Errors
    /// If no token can come, or finding out takes too much work: why.
    fn restrict(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Goes on by a token that could come.
    ///
    /// # Errors
    /// If it could not: why.
    fn take(&mut self, token: u32) -> Result<(), String>;

    /// Whether nothing can follow.
    fn ended(&self) -> bool;

    /// The rule at the same place, which goes its own way from here.
    fn fork(&self) -> Box<dyn Rule>;
}

impl Clone for Box<dyn Rule> {
    fn clone(&self) -> Box<dyn Rule> {
        self.fork()
    }
}
