//! The learning rate over the steps of a run.

use serde::{Deserialize, Serialize};

/// The form of the curve after the warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// Half a cosine down to the lowest rate (Loshchilov & Hutter 2017).
    #[default]
    Cosine,
    /// Warm-up, stable, decay: constant, then linear down over the last part (Hu et al. 2024, MiniCPM).
    Wsd,
    /// Constant.
    Constant,
}

/// A learning rate for each step: linear from 0 over `warmup` steps, then `form`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The curve.
    pub form: Form,
    /// The highest rate.
    pub lr: f64,
    /// The rate of the last step.
    pub min_lr: f64,
    /// Steps of the warm-up.
    pub warmup: u64,
    /// Steps of the final decay, WSD only.
    pub decay: u64,
    /// Steps of the run.
    pub steps: u64,
}

impl Schedule {
    /// The rate of step `step`, counted from 1.
    ///
    /// ```
    /// use sparsam_train::schedule::{Form, Schedule};
    /// let s = Schedule { form: Form::Cosine, lr: 1.0, min_lr: 0.0, warmup: 10, decay: 0, steps: 110 };
    /// assert_eq!([s.at(1), s.at(10), s.at(110)], [0.1, 1.0, 0.0]);
    /// assert!((s.at(60) - 0.5).abs() < 1e-12);
    /// ```
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup {
            return self.lr * step as f64 / self.warmup as f64;
        }
        // How far the way down has been gone, 0 to 1.
        let gone = |from: u64| {
            let way = self.steps.saturating_sub(from).max(1);
            (step.saturating_sub(from) as f64 / way as f64).min(1.0)
        };
        let span = self.lr - self.min_lr;
        match self.form {
            Form::Constant => self.lr,
            Form::Cosine => {
                self.min_lr + span * 0.5 * (1.0 + (std::f64::consts::PI * gone(self.warmup)).cos())
            }
            Form::Wsd => {
                let from = self.steps.saturating_sub(self.decay).max(self.warmup);
                if step <= from { self.lr } else { self.lr - span * gone(from) }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_their_forms() {
        let s = |form, decay| Schedule { form, lr: 2.0, min_lr: 0.5, warmup: 4, decay, steps: 20 };
        let wsd = s(Form::Wsd, 6);
        assert_eq!([1, 4, 5, 14, 17, 20].map(|i| wsd.at(i)), [0.5, 2.0, 2.0, 2.0, 1.25, 0.5]);
        assert_eq!([1, 4, 20, 99].map(|i| s(Form::Constant, 0).at(i)), [0.5, 2.0, 2.0, 2.0]);
        let cosine = s(Form::Cosine, 0);
        assert!((cosine.at(12) - 1.25).abs() < 1e-12 && (cosine.at(20) - 0.5).abs() < 1e-12);
        // A run taken further than planned keeps its last rate.
        assert_eq!([cosine.at(21), wsd.at(40)], [0.5, 0.5]);
    }

    #[test]
    fn no_warmup_starts_high() {
        let s = Schedule { form: Form::Cosine, lr: 1.0, min_lr: 0.1, warmup: 0, decay: 0, steps: 1 };
        assert!((s.at(1) - 0.1).abs() < 1e-12);
    }
}
