//! What rounding will take, said once a whole block was seen: the others are as large.

use crate::ledger::Ledger;
use sparsam_formats::Source;
use sparsam_plan::forecast::Interval;
use sparsam_quantize::recipe::TensorPlan;
use std::time::Instant;

/// How far it may be off either way: blocks differ little, other work on the machine more.
const SPREAD: f64 = 0.3;

/// The block that a tensor of this name lies in: the first part of it that is a number.
fn block(name: &str) -> Option<usize> {
    name.split('.').find_map(|part| part.parse().ok())
}

/// Most bytes on disk: finished tensors lie beside the file until it is whole; passport and report take a megabyte.
pub fn disk(source: &Source, plan: &[TensorPlan]) -> f64 {
    let bytes: usize = plan.iter().map(TensorPlan::bytes).sum();
    let stored: usize = source.tensors().iter().map(|t| t.bytes_len()).sum();
    let file = std::fs::metadata(source.path()).map_or(0, |m| m.len() as usize);
    (2 * bytes + file.saturating_sub(stored) + 1_000_000) as f64
}

/// A forecast of a run that is under way, once a whole block of it was seen.
pub struct Blocks {
    n_layers: usize,
    /// The block at hand, and when it began if its beginning was seen.
    at: Option<(usize, Option<Instant>)>,
    said: bool,
}

impl Blocks {
    /// Of a model with `n_layers` blocks.
    pub fn new(n_layers: usize) -> Blocks {
        Blocks { n_layers, at: None, said: false }
    }

    /// Time in all, said once: when the tensor `name` begins the block behind one that was seen whole.
    pub fn after(&mut self, name: &str, ledger: &Ledger) -> Option<Interval> {
        let now = block(name)?;
        match self.at {
            Some((then, _)) if then == now => None,
            Some((_, Some(began))) if !self.said => {
                self.said = true;
                let rest = began.elapsed().as_secs_f64() * (self.n_layers - now.min(self.n_layers)) as f64;
                Some(Interval::around(rest, SPREAD).after(ledger.elapsed()))
            }
            seen => {
                self.at = Some((now, seen.map(|_| Instant::now())));
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expected;
    use std::path::Path;
    use std::time::Duration;

    #[test]
    fn time_follows_from_a_whole_block() {
        let ledger = Ledger::new("quantize", expected::machine(1, Path::new("x")), Instant::now());
        let mut blocks = Blocks::new(10);
        // A run that goes on within block 3: the next one is the first that is seen whole.
        for name in ["embed_tokens", "layers.3.q", "layers.3.k", "layers.4.q", "layers.4.k"] {
            assert_eq!(blocks.after(name, &ledger), None, "{name}");
        }
        std::thread::sleep(Duration::from_millis(20));
        let seconds = blocks.after("layers.5.q", &ledger).unwrap();
        // Five blocks of at least 20 ms are left.
        assert!(seconds.value >= 0.1 && seconds.low < seconds.value && seconds.value < seconds.high);
        assert_eq!(blocks.after("layers.6.q", &ledger), None, "it is said once");
        assert_eq!((block("model.layers.12.mlp.up_proj.weight"), block("lm_head.weight")), (Some(12), None));
    }
}
