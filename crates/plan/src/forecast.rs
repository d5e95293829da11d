//! What a command will take, before it runs, and what it took, after.
//!
//! A [`Machine`] is what a short probe (or a table) says of a machine; a [`Forecast`] is memory by kind, time with an
//! interval, disk, energy and money; [`Forecast::against`] sets it beside the facts. Energy is watts times seconds: an
//! estimate, since few machines measure it.

use crate::hardware::Accelerator;
use crate::memory::Memory;
use crate::shape::Shape;
use crate::{Error, units};
use serde::{Deserialize, Serialize};

/// What a machine does, as probed or as a table says.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// FLOP/s that the matrix products of a training step reach.
    pub flops: f64,
    /// Bytes/s read from memory while decoding.
    pub bandwidth: f64,
    /// Bytes of memory that may be used.
    pub memory_bytes: f64,
    /// Bytes free on the disk that is written to.
    pub disk_bytes: f64,
    /// Watts drawn under load.
    pub watts: f64,
    /// Dollars an hour: rent, or electricity.
    pub usd_per_hour: f64,
    /// How far speed may be off either way, as a share: 0.2 for a probe, more for a table.
    pub spread: f64,
}

/// Watts of a busy core of a computer without an accelerator, with its share of memory and board: 65 W for 16 cores of a
/// desktop processor (Intel i7-13700, data sheet 2023-01), 360 W for 96 of a server's (AMD EPYC 9654, 2022-11).
pub const CORE_WATTS: f64 = 4.0;
/// Dollars for a kilowatt hour of electricity: the mean of households in the USA (EIA, Electric Power Monthly, 2025).
pub const USD_PER_KWH: f64 = 0.17;

impl Machine {
    /// A computer of one's own with `cores` cores: watts by [`CORE_WATTS`], money is electricity by [`USD_PER_KWH`].
    /// `spread` is that of a probe of ten seconds, whose matrix products a whole step reaches in part.
    pub fn owned(
        name: &str,
        cores: f64,
        flops: f64,
        bandwidth: f64,
        memory_bytes: f64,
        disk_bytes: f64,
    ) -> Machine {
        let watts = cores * CORE_WATTS;
        Machine {
            name: name.to_string(),
            flops,
            bandwidth,
            memory_bytes,
            disk_bytes,
            watts,
            usd_per_hour: watts / 1000.0 * USD_PER_KWH,
            spread: 0.4,
        }
    }
}

impl From<&Accelerator> for Machine {
    fn from(a: &Accelerator) -> Machine {
        Machine {
            name: a.name.clone(),
            flops: a.training_flops(),
            bandwidth: a.bandwidth * a.bandwidth_share,
            memory_bytes: a.memory_bytes,
            disk_bytes: f64::INFINITY,
            watts: a.watts,
            usd_per_hour: a.usd_per_hour,
            spread: 0.4,
        }
    }
}

/// A value that lies between two others.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// At least.
    pub low: f64,
    /// Expected.
    pub value: f64,
    /// At most.
    pub high: f64,
}

impl Interval {
    /// From `value / (1 + spread)` to `value * (1 + spread)`.
    pub fn around(value: f64, spread: f64) -> Interval {
        Interval { low: value / (1.0 + spread), value, high: value * (1.0 + spread) }
    }

    /// Every end times `factor`.
    pub fn times(self, factor: f64) -> Interval {
        Interval { low: self.low * factor, value: self.value * factor, high: self.high * factor }
    }

    /// Every end later by `x`.
    pub fn after(self, x: f64) -> Interval {
        Interval { low: x + self.low, value: x + self.value, high: x + self.high }
    }

    /// Whether `x` lies in it.
    pub fn contains(&self, x: f64) -> bool {
        (self.low..=self.high).contains(&x)
    }
}

/// What a command will take.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forecast {
    /// Of what: `train`, `finetune`.
    pub what: String,
    /// Peak memory by kind.
    pub memory: Memory,
    /// Time.
    pub seconds: Interval,
    /// Most that will lie on disk at once.
    pub disk_bytes: f64,
    /// Energy, an estimate from watts.
    pub joules: Interval,
    /// Money.
    pub usd: Interval,
}

/// What a command took. What was not measured is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Fact {
    /// Peak memory.
    pub memory_bytes: Option<f64>,
    /// Time.
    pub seconds: Option<f64>,
    /// Bytes on disk.
    pub disk_bytes: Option<f64>,
    /// Energy, an estimate: seconds times the machine's watts, unless a meter was read.
    pub joules: Option<f64>,
    /// Money.
    pub usd: Option<f64>,
    /// Tokens worked on: trained on, generated, or calibrated with.
    pub tokens: Option<f64>,
}

/// One row of forecast against fact.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// `memory`, `time`, `disk`, `energy`, `money`.
    pub what: &'static str,
    /// As forecast.
    pub forecast: f64,
    /// As it was.
    pub fact: f64,
    /// Whether the fact lay in the forecast's interval (for memory and disk: not above it).
    pub held: bool,
}

impl Comparison {
    /// A value of this row for people: `2.1 GB`, `3.4 min`.
    pub fn show(&self, x: f64) -> String {
        match self.what {
            "time" => units::show_seconds(x),
            "energy" => units::show_joules(x),
            "money" => units::show_usd(x),
            _ => units::show_bytes(x),
        }
    }
}

impl Forecast {
    /// A forecast from its arithmetic and the bytes that must be read: the time is the sum of both on the machine.
    pub fn new(what: &str, work: &Work, memory: Memory, disk_bytes: f64, machine: &Machine) -> Forecast {
        let seconds = work.flop / machine.flops + work.read_bytes / machine.bandwidth;
        Forecast::timed(what, Interval::around(seconds, machine.spread), memory, disk_bytes, machine)
    }

    /// A forecast whose time is known, from a trial of the work itself.
    pub fn timed(
        what: &str,
        seconds: Interval,
        memory: Memory,
        disk_bytes: f64,
        machine: &Machine,
    ) -> Forecast {
        Forecast {
            what: what.to_string(),
            memory,
            seconds,
            disk_bytes,
            joules: seconds.times(machine.watts),
            usd: seconds.times(machine.usd_per_hour / 3600.0),
        }
    }

    /// This and `next` behind it, as one: times, disk, energy and money add up; memory is that of the hungrier one.
    pub fn then(self, what: &str, next: Forecast) -> Forecast {
        let sum = |x: Interval, y: Interval| Interval {
            low: x.low + y.low,
            value: x.value + y.value,
            high: x.high + y.high,
        };
        let larger = if self.memory.total() >= next.memory.total() { self.memory } else { next.memory };
        Forecast {
            what: what.to_string(),
            memory: larger,
            seconds: sum(self.seconds, next.seconds),
            disk_bytes: self.disk_bytes + next.disk_bytes,
            joules: sum(self.joules, next.joules),
            usd: sum(self.usd, next.usd),
        }
    }

    /// Whether it fits the machine's memory and disk.
    ///
    /// # Errors
    /// What does not fit, by how much, and what to do about it.
    pub fn check(&self, machine: &Machine) -> Result<(), Error> {
        let (need, have) = (self.memory.total(), machine.memory_bytes);
        if need > have {
            let mut kinds = self.memory.kinds();
            kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
            return Err(Error::Impossible(format!(
                "{} needs {} of memory, {} has {}; most of it is {} ({}). Take fewer tokens a step, a smaller \
                 optimiser, or fewer bits",
                self.what,
                units::show_bytes(need),
                machine.name,
                units::show_bytes(have),
                kinds[0].0,
                units::show_bytes(kinds[0].1)
            )));
        }
        if self.disk_bytes > machine.disk_bytes {
            return Err(Error::Impossible(format!(
                "{} writes {} to a disk with {} free; keep fewer checkpoints or choose another folder",
                self.what,
                units::show_bytes(self.disk_bytes),
                units::show_bytes(machine.disk_bytes)
            )));
        }
        Ok(())
    }

    /// The forecast beside the facts, as far as they were measured.
    pub fn against(&self, fact: &Fact) -> Vec<Comparison> {
        let below = |what, forecast: f64, fact: Option<f64>| {
            fact.map(|fact| Comparison { what, forecast, fact, held: fact <= forecast })
        };
        let within = |what, forecast: Interval, fact: Option<f64>| {
            fact.map(|fact| Comparison {
                what,
                forecast: forecast.value,
                fact,
                held: forecast.contains(fact),
            })
        };
        let rows = [
            below("memory", self.memory.total(), fact.memory_bytes),
            below("disk", self.disk_bytes, fact.disk_bytes),
            within("time", self.seconds, fact.seconds),
            within("energy", self.joules, fact.joules),
            within("money", self.usd, fact.usd),
        ];
        rows.into_iter().flatten().collect()
    }
}

/// Arithmetic to do and bytes to read for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Floating-point operations.
    pub flop: f64,
    /// Bytes read where reading is what takes the time: decoding.
    pub read_bytes: f64,
}

impl Work {
    /// Training all weights on `tokens` in sequences of `context`.
    pub fn training(shape: &Shape, tokens: f64, context: f64) -> Work {
        Work { flop: tokens * shape.train_flop(context), read_bytes: 0.0 }
    }

    /// Training adapters: forward, and backward towards the activations only, so two thirds of a full step.
    pub fn adapters(shape: &Shape, tokens: f64, context: f64) -> Work {
        Work { flop: tokens * shape.train_flop(context) * 2.0 / 3.0, read_bytes: 0.0 }
    }

    /// Rounding with compensated errors (Frantar et al. 2023, section 3) over `tokens` of calibration: two forward
    /// passes; a Hessian of `2 in^2` a token for each of a block's four different inputs; a Cholesky factor and its
    /// inverse of `in^3`; the update of `in^2 out` for each matrix.
    pub fn rounding(shape: &Shape, tokens: f64, context: f64) -> Work {
        let forward = 2.0 * tokens * shape.forward_flop((context + 1.0) / 2.0);
        let (h, q, i) = (shape.hidden_size as f64, shape.q_size(), shape.intermediate_size as f64);
        let hessians: f64 = [h, q, h, i].iter().map(|x| 2.0 * x * x * tokens + x.powi(3)).sum();
        let updates: f64 =
            shape.block_matrices().iter().map(|(inputs, outputs)| inputs * inputs * outputs).sum();
        Work { flop: forward + shape.n_layers as f64 * (hessians + updates), read_bytes: 0.0 }
    }

    /// Generating `tokens` with `batch` sequences at once from weights of `weight_bytes`.
    pub fn generating(shape: &Shape, weight_bytes: f64, tokens: f64, batch: f64, context: f64) -> Work {
        Work { flop: tokens * shape.forward_flop(context / 2.0), read_bytes: tokens / batch * weight_bytes }
    }

    /// Both, one after the other.
    pub fn then(self, next: Work) -> Work {
        Work { flop: self.flop + next.flop, read_bytes: self.read_bytes + next.read_bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            name: "desk".into(),
            flops: 1e11,
            bandwidth: 1e10,
            memory_bytes: 8e9,
            disk_bytes: 1e9,
            watts: 50.0,
            usd_per_hour: 0.36,
            spread: 0.25,
        }
    }

    #[test]
    fn time_energy_and_money_follow_from_work() {
        let work = Work { flop: 1e12, read_bytes: 1e11 };
        let f = Forecast::new("train", &work, Memory { weights: 1e9, ..Memory::default() }, 1e8, &machine());
        assert_eq!(f.seconds, Interval { low: 16.0, value: 20.0, high: 25.0 });
        assert_eq!(f.joules.value, 1000.0);
        assert!((f.usd.value - 0.002).abs() < 1e-12);
        assert_eq!(f.check(&machine()), Ok(()));
    }

    #[test]
    fn what_does_not_fit_is_said_with_numbers() {
        let f = |weights, disk| {
            let memory = Memory { weights, temporary: 1e6, ..Memory::default() };
            Forecast::new("train", &Work::default(), memory, disk, &machine())
                .check(&machine())
                .unwrap_err()
                .to_string()
        };
        assert!(f(9e9, 0.0).contains("needs 9 GB of memory, desk has 8 GB; most of it is weights (9 GB)"));
        assert!(f(1e9, 2e9).contains("writes 2 GB to a disk with 1 GB free"));
    }

    #[test]
    fn one_after_the_other() {
        let f = |seconds, weights| {
            let memory = Memory { weights, ..Memory::default() };
            Forecast::timed("x", Interval::around(seconds, 0.5), memory, 10.0, &machine())
        };
        let both = f(10.0, 1.0).then("both", f(20.0, 2.0)).then("all", f(30.0, 1.0));
        assert_eq!((both.what.as_str(), both.seconds.value, both.seconds.high), ("all", 60.0, 90.0));
        assert_eq!((both.memory.weights, both.disk_bytes, both.joules.value), (2.0, 30.0, 3000.0));
        assert!((both.usd.value - 0.006).abs() < 1e-12);
    }

    #[test]
    fn forecast_against_fact() {
        let work = Work { flop: 1e12, read_bytes: 0.0 };
        let f = Forecast::new("train", &work, Memory { weights: 1e9, ..Memory::default() }, 1e8, &machine());
        let rows = f.against(&Fact {
            memory_bytes: Some(2e9),
            seconds: Some(11.0),
            usd: Some(1.0),
            ..Fact::default()
        });
        assert_eq!(
            rows.iter().map(|r| (r.what, r.held)).collect::<Vec<_>>(),
            [("memory", false), ("time", true), ("money", false)]
        );
        assert_eq!(rows[0].show(rows[0].fact), "2 GB");
    }
}
