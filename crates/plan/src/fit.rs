//! Fitting the parametric law to runs, with intervals.
//!
//! As Hoffmann et al. 2022 (section 3.3) and Besiroglu et al. 2024 (section 3.1) do it: the sum over all runs of the
//! Huber loss, delta = 0.001, between the logarithm of the loss seen and of the law's, minimised by L-BFGS from a grid
//! of starts; intervals from refitting runs drawn with replacement. The sum, not the mean: Besiroglu et al. found that
//! averaging made the gradient so small that the original fit stopped early.
//!
//! The law is linear in nothing, and its coefficients and exponents are all but collinear (`A` may double while `alpha`
//! moves by 0.03). The fit therefore runs over `ln A - alpha * mean ln N` and the like, in which the same valley is
//! round, and needs tens of starts where the papers use thousands.

use crate::Error;
use crate::law::Law;
use crate::runs::Run;
use argmin::core::{CostFunction, Executor, Gradient, State};
use argmin::solver::linesearch::MoreThuenteLineSearch;
use argmin::solver::quasinewton::LBFGS;
use serde::Serialize;

/// Where the Huber loss turns from square to straight, on differences of log loss (both papers).
const DELTA: f64 = 1e-3;
/// Fewer runs than this leave five constants undetermined.
const FEWEST_RUNS: usize = 6;

/// A law fitted to runs.
#[derive(Clone, Debug, Serialize)]
pub struct Fit {
    /// The constants.
    pub law: Law,
    /// The sum of Huber losses that was minimised ([`objective`]).
    pub objective: f64,
    /// Root mean square of the differences of log loss: 0.01 is about 1% of the loss.
    pub rms: f64,
    /// How many runs it rests on.
    pub n_runs: usize,
    /// Laws fitted to runs drawn with replacement: the spread of everything that follows from the law.
    #[serde(skip)]
    pub draws: Vec<Law>,
}

/// A number with its spread over bootstrap draws.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Estimate {
    /// From all runs.
    pub value: f64,
    /// Standard deviation over the draws.
    pub standard_error: f64,
    /// 2.5th and 97.5th percentile of the draws.
    pub interval: (f64, f64),
}

impl Fit {
    /// Anything that follows from the law, with its spread.
    pub fn estimate(&self, f: impl Fn(&Law) -> f64) -> Estimate {
        let value = f(&self.law);
        let draws: Vec<f64> = self.draws.iter().map(&f).filter(|x| x.is_finite()).collect();
        if draws.len() < 2 {
            return Estimate { value, standard_error: f64::NAN, interval: (f64::NAN, f64::NAN) };
        }
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (draws.len() - 1) as f64;
        Estimate { value, standard_error: variance.sqrt(), interval: percentiles(draws, 0.025, 0.975) }
    }
}

/// Fits `runs`, and refits them `n_draws` times with replacement, from `seed`.
///
/// # Errors
/// Fewer than six runs, or runs that do not vary in size and tokens.
pub fn fit(runs: &[Run], n_draws: usize, seed: u64) -> Result<Fit, Error> {
    if runs.len() < FEWEST_RUNS {
        return Err(Error::Runs(format!(
            "{} runs; the law has five constants and needs at least {FEWEST_RUNS}, over several sizes and lengths",
            runs.len()
        )));
    }
    for (what, f) in [("size", (|r: &Run| r.parameters) as fn(&Run) -> f64), ("length", |r: &Run| r.tokens)] {
        let mut values: Vec<f64> = runs.iter().map(f).collect();
        values.sort_by(f64::total_cmp);
        values.dedup_by(|a, b| (*a / *b - 1.0).abs() < 1e-6);
        if values.len() < 3 {
            return Err(Error::Runs(format!(
                "only {} different {what}s among {} runs; the law needs at least three",
                values.len(),
                runs.len()
            )));
        }
    }
    let problem = Problem::new(runs);
    let best = problem
        .starts()
        .into_iter()
        .map(|start| problem.minimise(start))
        .min_by(|x, y| x.1.total_cmp(&y.1))
        .filter(|(_, objective)| objective.is_finite())
        .ok_or_else(|| Error::Runs("no start converged; are the losses in nats a token?".into()))?;
    let mut random = SplitMix(seed);
    let draws = (0..n_draws)
        .map(|_| {
            let drawn = (0..runs.len()).map(|_| problem.rows[random.below(problem.rows.len())]).collect();
            let again = Problem { rows: drawn, ..problem };
            again.law(&again.minimise(best.0.clone()).0)
        })
        .collect();
    let law = problem.law(&best.0);
    let squares: f64 = runs.iter().map(|r| (law.loss(r.parameters, r.tokens) / r.loss).ln().powi(2)).sum();
    let rms = (squares / runs.len() as f64).sqrt();
    Ok(Fit { law, objective: objective(&law, runs), rms, n_runs: runs.len(), draws })
}

/// What the fit minimises: the sum over `runs` of the Huber loss of the difference of log losses, as both papers define
/// it. The lower, the better `law` describes them.
pub fn objective(law: &Law, runs: &[Run]) -> f64 {
    let huber = |r: f64| if r.abs() <= DELTA { 0.5 * r * r } else { DELTA * (r.abs() - 0.5 * DELTA) };
    runs.iter().map(|r| huber((law.loss(r.parameters, r.tokens) / r.loss).ln())).sum()
}

/// The objective over `[ln A - alpha mean ln N, ln B - beta mean ln D, ln E, alpha, beta]`.
#[derive(Clone)]
struct Problem {
    /// (ln N - mean, ln D - mean, ln loss) of each run.
    rows: Vec<[f64; 3]>,
    mean_ln_n: f64,
    mean_ln_d: f64,
    least_loss: f64,
}

impl Problem {
    fn new(runs: &[Run]) -> Problem {
        let mean = |f: fn(&Run) -> f64| runs.iter().map(f).sum::<f64>() / runs.len() as f64;
        let (mean_ln_n, mean_ln_d) = (mean(|r| r.parameters.ln()), mean(|r| r.tokens.ln()));
        let rows =
            runs.iter().map(|r| [r.parameters.ln() - mean_ln_n, r.tokens.ln() - mean_ln_d, r.loss.ln()]);
        let least_loss = runs.iter().map(|r| r.loss).fold(f64::INFINITY, f64::min);
        Problem { rows: rows.collect(), mean_ln_n, mean_ln_d, least_loss }
    }

    fn law(&self, p: &[f64]) -> Law {
        Law::from_logs(p[0] + p[3] * self.mean_ln_n, p[1] + p[4] * self.mean_ln_d, p[2], p[3], p[4])
    }

    /// Exponents of 0.2, 0.5 and 1; an irreducible share of the least loss of 0.3, 0.6 and 0.9; what is left at the
    /// middle run is shared by the two other terms 1:3, 1:1 or 3:1.
    fn starts(&self) -> Vec<Vec<f64>> {
        let middle = (self.rows.iter().map(|r| r[2]).sum::<f64>() / self.rows.len() as f64).exp();
        let mut starts = Vec::new();
        for alpha in [0.2, 0.5, 1.0] {
            for beta in [0.2, 0.5, 1.0] {
                for share in [0.3, 0.6, 0.9] {
                    for split in [0.25, 0.5, 0.75] {
                        let e = share * self.least_loss;
                        let left = middle - e;
                        starts.push(vec![
                            (split * left).ln(),
                            ((1.0 - split) * left).ln(),
                            e.ln(),
                            alpha,
                            beta,
                        ]);
                    }
                }
            }
        }
        starts
    }

    /// L-BFGS from `start`, restarted twice so that a line search stuck on a kink of the Huber loss gets fresh
    /// directions: (where it ended, the objective there).
    fn minimise(&self, start: Vec<f64>) -> (Vec<f64>, f64) {
        let mut best = (start.clone(), self.objective(&start));
        for _ in 0..3 {
            let search = MoreThuenteLineSearch::new();
            let Ok(solver) = LBFGS::new(search, 10).with_tolerance_cost(1e-15) else { return best };
            let begin = best.0.clone();
            let run = Executor::new(self.clone(), solver).configure(|s| s.param(begin).max_iters(300)).run();
            let Ok(result) = run else { return best };
            let Some(param) = result.state().get_best_param().cloned() else { return best };
            let objective = self.objective(&param);
            let gain = best.1 - objective;
            if objective < best.1 {
                best = (param, objective);
            }
            if gain <= 1e-9 * best.1 {
                break;
            }
        }
        best
    }

    fn objective(&self, p: &[f64]) -> f64 {
        self.evaluate(p).0
    }

    /// The objective and its gradient: the mean Huber loss over delta, which is the sum of the papers up to a factor,
    /// with a gradient of order one, so that L-BFGS's first step (the gradient itself) stays within reach.
    fn evaluate(&self, p: &[f64]) -> (f64, [f64; 5]) {
        let mut total = 0.0;
        let mut gradient = [0.0; 5];
        for [n, d, ln_loss] in &self.rows {
            let terms = [(p[0] - p[3] * n).exp(), (p[1] - p[4] * d).exp(), p[2].exp()];
            let sum: f64 = terms.iter().sum();
            let r = (sum.ln() - ln_loss) / DELTA;
            total += if r.abs() <= 1.0 { 0.5 * r * r } else { r.abs() - 0.5 };
            // d(Huber)/d(ln law), then d(ln law)/d(each) = share of its term.
            let slope = r.clamp(-1.0, 1.0) / DELTA / sum;
            for (g, t) in gradient.iter_mut().zip(terms) {
                *g += slope * t;
            }
            gradient[3] -= slope * terms[0] * n;
            gradient[4] -= slope * terms[1] * d;
        }
        let scale = DELTA / self.rows.len() as f64;
        (total * scale, gradient.map(|g| g * scale))
    }
}

impl CostFunction for Problem {
    type Param = Vec<f64>;
    type Output = f64;

    fn cost(&self, p: &Vec<f64>) -> Result<f64, argmin::core::Error> {
        Ok(self.objective(p))
    }
}

impl Gradient for Problem {
    type Param = Vec<f64>;
    type Gradient = Vec<f64>;

    fn gradient(&self, p: &Vec<f64>) -> Result<Vec<f64>, argmin::core::Error> {
        Ok(self.evaluate(p).1.to_vec())
    }
}

/// The `low` and `high` quantiles (between 0 and 1) of `values`, interpolated; (NaN, NaN) of nothing.
pub fn percentiles(mut values: Vec<f64>, low: f64, high: f64) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |q: f64| match values.len() {
        0 => f64::NAN,
        len => {
            let place = q * (len - 1) as f64;
            let (below, above) = (place.floor() as usize, place.ceil() as usize);
            values[below] + (values[above] - values[below]) * (place - below as f64)
        }
    };
    (at(low), at(high))
}

/// SplitMix64 (Steele, Lea and Flood 2014): enough to draw runs with replacement, the same everywhere.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e3779b97f4a7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, uniform up to a bias of n / 2^64.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(law: Law) -> Vec<Run> {
        let mut runs = Vec::new();
        for i in 0..6 {
            for j in 0..5 {
                let (n, d) = (1e5 * 3f64.powi(i), 1e6 * 4f64.powi(j));
                runs.push(Run { parameters: n, tokens: d, loss: law.loss(n, d) });
            }
        }
        runs
    }

    #[test]
    fn gradient_is_the_slope_of_the_objective() {
        let problem = Problem::new(&made(Law::BESIROGLU));
        let p = [0.1, -0.2, 0.4, 0.3, 0.45];
        let (_, gradient) = problem.evaluate(&p);
        for i in 0..5 {
            let h = 1e-6;
            let (mut up, mut down) = (p, p);
            up[i] += h;
            down[i] -= h;
            let slope = (problem.objective(&up) - problem.objective(&down)) / (2.0 * h);
            assert!(
                (slope - gradient[i]).abs() < 1e-4 * gradient[i].abs().max(1.0),
                "{i}: {slope} {}",
                gradient[i]
            );
        }
    }

    #[test]
    fn finds_the_law_that_made_the_runs() {
        let law = Law { a: 50.0, b: 300.0, e: 1.2, alpha: 0.3, beta: 0.4 };
        let got = fit(&made(law), 3, 1).unwrap();
        assert!(got.rms < 1e-6, "{got:?}");
        for (x, y) in [(got.law.a, law.a), (got.law.b, law.b), (got.law.e, law.e), (got.law.alpha, law.alpha)]
        {
            assert!((x / y - 1.0).abs() < 1e-3, "{x} is not {y}");
        }
        // Draws of exact runs are exact again: no spread.
        assert!(got.estimate(|l| l.beta).standard_error < 1e-3);
    }

    #[test]
    fn same_seed_same_draws() {
        let runs: Vec<Run> = made(Law::BESIROGLU)
            .into_iter()
            .enumerate()
            .map(|(i, r)| Run { loss: r.loss * (1.0 + 0.01 * ((i * 7 % 5) as f64 - 2.0)), ..r })
            .collect();
        let (x, y, z) = (fit(&runs, 2, 7).unwrap(), fit(&runs, 2, 7).unwrap(), fit(&runs, 2, 8).unwrap());
        assert_eq!(x.draws, y.draws);
        assert_ne!(x.draws, z.draws);
    }

    #[test]
    fn refuses_runs_that_leave_it_undetermined() {
        let check = |runs: &[Run], part: &str| {
            let message = fit(runs, 0, 0).unwrap_err().to_string();
            assert!(message.contains(part), "`{message}` does not say `{part}`");
        };
        let runs = made(Law::BESIROGLU);
        check(&runs[..5], "5 runs");
        let one_size: Vec<Run> =
            (1..9).map(|i| Run { parameters: 1e6, tokens: 1e6 * i as f64, loss: 3.0 }).collect();
        check(&one_size, "only 1 different sizes");
    }

    #[test]
    fn percentiles_interpolate() {
        assert_eq!(percentiles(vec![4.0, 0.0, 2.0], 0.25, 0.75), (1.0, 3.0));
        assert!(percentiles(vec![], 0.5, 0.5).0.is_nan());
    }
}
