//! Texts that end an answer.

/// Passes text on as it comes and ends at the first of some strings, which it does not pass on. Text that may be the
/// beginning of one is held back until that is decided.
pub(crate) struct StopText {
    stops: Vec<String>,
    held: String,
}

impl StopText {
    /// Empty strings among `stops` are ignored.
    pub fn new(stops: &[String]) -> StopText {
        StopText { stops: stops.iter().filter(|s| !s.is_empty()).cloned().collect(), held: String::new() }
    }

    /// Takes more text. Gives what may be passed on, and whether the end is reached.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        if let Some(at) = self.stops.iter().filter_map(|s| self.held.find(s.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let starts_stop = |at: &usize| self.stops.iter().any(|s| s.starts_with(&self.held[*at..]));
        let keep = self.held.char_indices().map(|(at, _)| at).find(starts_stop).unwrap_or(self.held.len());
        let later = self.held.split_off(keep);
        (std::mem::replace(&mut self.held, later), false)
    }

    /// What is still held back, when nothing more comes.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the text is cut, what passes is the text up to the first stop.
        #[test]
        fn any_cut_gives_the_same(text in "[abc]{0,24}", stops in prop::collection::vec("[abc]{1,3}", 0..3), cuts in prop::collection::vec(1usize..4, 24)) {
            let mut stop = StopText::new(&stops);
            let (mut passed, mut rest, mut ended) = (String::new(), text.as_str(), false);
            for n in cuts {
                let (now, later) = rest.split_at(n.min(rest.len()));
                let (out, end) = stop.push(now);
                passed += &out;
                rest = later;
                ended = end;
                if end { break; }
            }
            if !ended {
                let (out, end) = stop.push(rest);
                passed += &out;
                ended = end;
            }
            if !ended {
                passed += &stop.finish();
            }
            // The first stop to be complete wins; a longer one that began earlier may complete later.
            let first_end = (0..=text.len()).find(|&end| stops.iter().any(|s| text[..end].contains(s.as_str())));
            let want = match first_end {
                None => text.as_str(),
                Some(end) => &text[..stops.iter().filter_map(|s| text[..end].find(s.as_str())).min().unwrap()],
            };
            // Pieces of several letters may complete two stops at once, where the one that begins earlier wins.
            prop_assert!(passed == want || (ended && want.starts_with(&passed) && stops.iter().any(|s| text[passed.len()..].starts_with(s.as_str()))));
        }
    }
}
