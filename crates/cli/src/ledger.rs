//! A run's receipt in the making: what commands that make a model start with and end with.
//!
//! ```text
//! let mut ledger = Ledger::new("train", machine, start);            at the start
//! ledger.expect(forecast);                                          once it is known
//! ledger.parent("base", path);
//! ledger.finish(&folder, Some(tokens))?                             writes receipt.json, gives forecast and fact
//! ```

use crate::{plan, probe, receipt};
use sparsam_plan::forecast::{Fact, Forecast, Machine};
use sparsam_plan::receipt::{FILE, Record, beside};
use sparsam_plan::report::Table;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// A run that is under way.
pub struct Ledger {
    command: &'static str,
    machine: Machine,
    forecast: Option<Forecast>,
    start: Instant,
    parents: Vec<(&'static str, String)>,
    resumed: bool,
    /// Dollars paid to others.
    paid: f64,
}

impl Ledger {
    /// A run of `command` on `machine` that began at `start`.
    pub fn new(command: &'static str, machine: Machine, start: Instant) -> Ledger {
        Ledger { command, machine, forecast: None, start, parents: Vec::new(), resumed: false, paid: 0.0 }
    }

    /// The run goes on with one that has a record: [`Ledger::finish`] adds what that took.
    pub fn resume(&mut self) {
        self.resumed = true;
    }

    /// The machine that the run is reckoned on.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Seconds since it began.
    pub fn elapsed(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// The run is expected to take this.
    pub fn expect(&mut self, forecast: Forecast) {
        self.forecast = Some(forecast);
    }

    /// The run has cost `usd` beside what the machine costs: a teacher's answers.
    pub fn pay(&mut self, usd: f64) {
        self.paid += usd;
    }

    /// The run was made from the model or run at `path`, its `role` (`base`, `teacher`).
    pub fn parent(&mut self, role: &'static str, path: &Path) {
        // Absolute, so that the record holds wherever it is read; a name of no file (`builtin`) stays a name.
        let place = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
        self.parents.push((role, place.to_string_lossy().to_string()));
    }

    /// Stops the clock and writes the record of what lies at `result`, a run's folder or a model file: what it took,
    /// having worked on `tokens`. What an earlier part of the same run has taken is added. Gives the table of forecast
    /// and fact, if there was a forecast.
    ///
    /// # Errors
    /// If the record cannot be written.
    pub fn finish(self, result: &Path, tokens: Option<f64>) -> anyhow::Result<Option<Table>> {
        let fact = Fact {
            memory_bytes: probe::peak_memory(),
            seconds: Some(self.elapsed()),
            disk_bytes: Some(bytes_below(result)?),
            tokens,
            ..Fact::default()
        };
        let mut record = Record::new(self.command, &self.machine, self.forecast, fact);
        record.fact.usd = record.fact.usd.map(|usd| usd + self.paid);
        for (role, path) in &self.parents {
            record = record.parent(role, path);
        }
        let table = (!record.comparison().is_empty()).then(|| receipt::comparison_table(&record));
        let file = match result.is_dir() {
            true => result.join(FILE),
            false => PathBuf::from(beside(&result.to_string_lossy())),
        };
        if self.resumed
            && let Ok(text) = std::fs::read_to_string(&file)
            && let Ok(earlier) = Record::from_json(&text, FILE)
        {
            record.add_earlier(&earlier);
        }
        plan::write(&file, &record.to_json())?;
        Ok(table)
    }
}

/// Bytes of the file, or of all files in the folder. Links are not followed.
fn bytes_below(path: &Path) -> std::io::Result<f64> {
    let meta = std::fs::symlink_metadata(path)?;
    if !meta.is_dir() {
        return Ok(meta.len() as f64);
    }
    let mut sum = 0.0;
    for entry in std::fs::read_dir(path)? {
        sum += bytes_below(&entry?.path())?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsam_plan::forecast::Work;
    use sparsam_plan::memory::Memory;

    #[test]
    fn a_run_leaves_its_receipt() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("weights"), [0; 1000]).unwrap();
        let machine = Machine::owned("desk", 2.0, 1e11, 1e10, 8e9, 1e9);
        let work = Work { flop: 1e6, read_bytes: 0.0 };
        let forecast =
            Forecast::new("train", &work, Memory { weights: 1e15, ..Memory::default() }, 2e3, &machine);
        let mut ledger = Ledger::new("train", machine.clone(), Instant::now());
        ledger.expect(forecast);
        ledger.parent("base", Path::new("builtin"));
        let table = ledger.finish(folder.path(), Some(5e3)).unwrap().unwrap().to_text(80);
        assert!(table.contains("memory") && table.contains("disk") && table.contains("time"), "{table}");
        let text = std::fs::read_to_string(folder.path().join("receipt.json")).unwrap();
        let record = Record::from_json(&text, "r").unwrap();
        assert_eq!((record.fact.tokens, record.fact.disk_bytes), (Some(5e3), Some(1e3)));
        assert_eq!(record.parents[0].path, "builtin");
        assert!(record.fact.seconds.unwrap() > 0.0 && record.fact.joules.unwrap() > 0.0);
        // Going on with it adds what it has taken.
        let mut ledger = Ledger::new("train", machine, Instant::now());
        ledger.resume();
        ledger.pay(2.5);
        ledger.finish(folder.path(), Some(1e4)).unwrap();
        let again = std::fs::read_to_string(folder.path().join("receipt.json")).unwrap();
        let again = Record::from_json(&again, "r").unwrap();
        assert!(again.fact.seconds > record.fact.seconds);
        assert!((2.5..2.6).contains(&again.fact.usd.unwrap()), "what was paid is in the sum");
        assert_eq!((again.fact.tokens, again.parents), (Some(1e4), record.parents));
        // A single file has it beside.
        let file = folder.path().join("m.gguf");
        std::fs::write(&file, "x").unwrap();
        let machine = Machine::owned("desk", 2.0, 1e11, 1e10, 8e9, 1e9);
        assert!(Ledger::new("quantize", machine, Instant::now()).finish(&file, None).unwrap().is_none());
        assert!(folder.path().join("m.gguf.receipt.json").is_file());
    }
}
