//! What each pass did, for `--explain`.

use crate::program::{Kernel, Program, Step};
use std::fmt;

/// The effect of one pass.
#[derive(Clone, Debug, PartialEq)]
pub struct PassReport {
    /// Its name.
    pub name: &'static str,
    /// Graph nodes or kernels before and after, whichever it works on.
    pub before: usize,
    /// See `before`.
    pub after: usize,
    /// What is counted: `nodes` or `kernels`.
    pub unit: &'static str,
    /// Bytes read and written by all kernels after it; `None` while there are no kernels yet.
    pub bytes_moved: Option<usize>,
}

/// What was computed again to fit a budget of memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recompute {
    /// The budget, in bytes.
    pub budget: usize,
    /// Parts of the forward pass between points where one value is all that goes on.
    pub segments: usize,
    /// Segments of which all but products is computed again.
    pub cheap: usize,
    /// Segments that are computed again as a whole.
    pub all: usize,
    /// Rows of logits that exist at once, where the budget chose them.
    pub loss_rows: Option<usize>,
}

/// Sums over processes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sums {
    /// How many there are.
    pub count: usize,
    /// Bytes of all of them.
    pub bytes: usize,
    /// Bytes of those beside which there are products or attention, before somebody waits for them.
    pub beside: usize,
}

impl Sums {
    pub(crate) fn of(program: &Program) -> Sums {
        let product = |s: &Step| {
            use Kernel::{Attention, Matmul, WeightMatmul, WeightMatmulT};
            matches!(s.kernel, Matmul { .. } | WeightMatmul { .. } | WeightMatmulT { .. } | Attention { .. })
        };
        let mut sums = Sums::default();
        for (i, s) in program.steps.iter().enumerate().filter(|(_, s)| s.kernel == Kernel::AllReduce) {
            let (place, bytes) = (s.outs[0].place, s.outs[0].bytes());
            let free = |s: &&Step| s.ins.iter().chain(&s.outs).all(|o| o.place != place);
            sums.count += 1;
            sums.bytes += bytes;
            sums.beside += match program.steps[i + 1..].iter().take_while(free).any(product) {
                true => bytes,
                false => 0,
            };
        }
        sums
    }
}

/// What compiling did to a graph. Kernels and bytes of the eager form stand beside those of the result.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Kernels of the eager form.
    pub kernels_before: usize,
    /// Kernels of the result.
    pub kernels: usize,
    /// Bytes that the eager form's kernels read and write.
    pub bytes_before: usize,
    /// Bytes that the result's kernels read and write.
    pub bytes: usize,
    /// Arena of the eager form.
    pub arena_before: usize,
    /// Arena of the result.
    pub arena: usize,
    /// Bytes that the result needs: arena, inputs, states, and weights as they are stored.
    pub memory: usize,
    /// What is summed over processes.
    pub sums: Sums,
    /// What was computed again, if there was a budget.
    pub recompute: Option<Recompute>,
    /// In the order in which they ran; those switched off are absent.
    pub passes: Vec<PassReport>,
}

/// `1.25 MB` (powers of ten).
fn megabytes(bytes: usize) -> String {
    format!("{:.2} MB", bytes as f64 / 1e6)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<14} {:>12} {:>12}", "", "eager", "compiled")?;
        writeln!(f, "{:<14} {:>12} {:>12}", "kernels", self.kernels_before, self.kernels)?;
        let row = |f: &mut fmt::Formatter<'_>, name, before, after| {
            writeln!(f, "{name:<14} {:>12} {:>12}", megabytes(before), megabytes(after))
        };
        row(f, "bytes moved", self.bytes_before, self.bytes)?;
        row(f, "arena", self.arena_before, self.arena)?;
        writeln!(f, "{:<14} {:>12} {:>12}", "memory", "", megabytes(self.memory))?;
        if let Some(r) = &self.recompute {
            let Recompute { segments, cheap, all, .. } = r;
            write!(f, "\nbudget {}: computed again, of {segments} segments: ", megabytes(r.budget))?;
            write!(f, "{cheap} but for products, {all} as a whole")?;
            match r.loss_rows {
                Some(rows) => writeln!(f, "; {rows} rows of logits at once")?,
                None => writeln!(f)?,
            }
        }
        if self.sums.count > 0 {
            let Sums { count, bytes, beside } = self.sums;
            let (bytes, beside) = (megabytes(bytes), megabytes(beside));
            writeln!(
                f,
                "\nsums over processes: {count} of {bytes} together, {beside} of it beside products"
            )?;
        }
        if self.passes.is_empty() {
            return Ok(());
        }
        writeln!(f, "\n{:<14} {:>12} {:>12} {:>12}", "pass", "before", "after", "bytes moved")?;
        for p in &self.passes {
            let bytes = p.bytes_moved.map_or(String::new(), megabytes);
            writeln!(f, "{:<14} {:>12} {:>12} {bytes:>12}  {}", p.name, p.before, p.after, p.unit)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_shows_both_forms() {
        let pass =
            PassReport { name: "fuse", before: 10, after: 3, unit: "kernels", bytes_moved: Some(1_000_000) };
        let report = Report {
            kernels_before: 10,
            kernels: 3,
            bytes_before: 4_000_000,
            passes: vec![pass],
            sums: Sums { count: 3, bytes: 6_000_000, beside: 2_000_000 },
            ..Report::default()
        };
        let text = report.to_string();
        assert!(text.contains("kernels                  10            3"), "{text}");
        assert!(
            text.contains("sums over processes: 3 of 6.00 MB together, 2.00 MB of it beside products"),
            "{text}"
        );
        assert!(text.contains("fuse                     10            3      1.00 MB  kernels"), "{text}");
    }
}
