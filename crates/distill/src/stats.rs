//! How sure a comparison on few questions is.

/// The 0.975 quantile of the standard normal distribution.
const Z95: f64 = 1.959_963_984_540_054;
/// Times that questions are drawn anew for an interval of a difference.
const DRAWS: usize = 4000;

/// The 95% interval of a share of which `k` of `n` were counted (Wilson 1927): (low, high).
///
/// ```
/// let (low, high) = sparsam_distill::stats::wilson(75, 100);
/// assert!((low - 0.6570).abs() < 1e-4 && (high - 0.8245).abs() < 1e-4);
/// ```
pub fn wilson(k: usize, n: usize) -> (f64, f64) {
    if n == 0 {
        return (0.0, 1.0);
    }
    let (n, p) = (n as f64, k as f64 / n as f64);
    let z2 = Z95 * Z95;
    let middle = (p + z2 / (2.0 * n)) / (1.0 + z2 / n);
    let half = Z95 / (1.0 + z2 / n) * (p * (1.0 - p) / n + z2 / (4.0 * n * n)).sqrt();
    ((middle - half).max(0.0), (middle + half).min(1.0))
}

/// Two answerers on the same questions.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Paired {
    /// Questions that only the first answered rightly.
    pub only_first: usize,
    /// Questions that only the second answered rightly.
    pub only_second: usize,
    /// Accuracy of the first less that of the second.
    pub difference: f64,
    /// Its 95% interval, by drawing questions anew.
    pub interval: (f64, f64),
    /// How likely a difference as large is if both are as good (McNemar's exact test, two-sided).
    pub p: f64,
}

/// Compares right answers question by question.
///
/// # Panics
/// If the two are not as long.
pub fn paired(first: &[bool], second: &[bool], seed: u64) -> Paired {
    assert_eq!(first.len(), second.len(), "answers to the same questions");
    let differences: Vec<i8> = first.iter().zip(second).map(|(&a, &b)| i8::from(a) - i8::from(b)).collect();
    let only_first = differences.iter().filter(|&&d| d > 0).count();
    let only_second = differences.iter().filter(|&&d| d < 0).count();
    let n = differences.len().max(1);
    let mut state = seed;
    let mut draws: Vec<f64> = (0..DRAWS)
        .map(|_| {
            let sum: i64 = (0..differences.len()).map(|_| i64::from(differences[below(&mut state, n)])).sum();
            sum as f64 / n as f64
        })
        .collect();
    draws.sort_by(f64::total_cmp);
    let at = |q: f64| draws[((DRAWS - 1) as f64 * q).round() as usize];
    Paired {
        only_first,
        only_second,
        difference: (only_first as f64 - only_second as f64) / n as f64,
        interval: (at(0.025), at(0.975)),
        p: mcnemar(only_first, only_second),
    }
}

/// McNemar's exact test (1947): two-sided probability of a split as uneven as `b` to `c` by a fair coin.
///
/// ```
/// // 2 of 12 or fewer, or 10 or more: 2 * (1 + 12 + 66) / 4096.
/// assert!((sparsam_distill::stats::mcnemar(10, 2) - 0.03857421875).abs() < 1e-12);
/// ```
pub fn mcnemar(b: usize, c: usize) -> f64 {
    let n = b + c;
    let few = b.min(c);
    // In logarithms: 2^-n underflows from n = 1075 on.
    let mut log_term = -(n as f64) * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for k in 0..=few {
        sum += log_term.exp();
        log_term += ((n - k) as f64).ln() - ((k + 1) as f64).ln();
    }
    (2.0 * sum).min(1.0)
}

/// Uniform in `0 .. n`: SplitMix64 (Steele et al. 2014).
pub(crate) fn below(state: &mut u64, n: usize) -> usize {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    ((u128::from(mix(*state)) * n as u128) >> 64) as usize
}

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A number in `0 .. 1` for each id, which only depends on `seed` and `what`: for splits that hold in every file.
pub fn place(seed: u64, what: &str, id: &str) -> f64 {
    let bytes = what.bytes().chain([0]).chain(id.bytes());
    let hash = bytes.fold(0xCBF2_9CE4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    (mix(hash ^ mix(seed)) >> 11) as f64 / (1_u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_wilsons() {
        // statsmodels.stats.proportion.proportion_confint(k, n, method="wilson").
        for (k, n, low, high) in [
            (0, 10, 0.0, 0.2775327998628892),
            (10, 10, 0.7224672001371106, 1.0),
            (1, 3, 0.06149194472039624, 0.7923403991979523),
        ] {
            let (a, b) = wilson(k, n);
            assert!((a - low).abs() < 1e-9 && (b - high).abs() < 1e-9, "{k} of {n}: {a} {b}");
        }
        assert_eq!(wilson(0, 0), (0.0, 1.0));
    }

    #[test]
    fn paired_answers_count_where_they_differ() {
        let first: Vec<bool> = (0..100).map(|i| i < 70).collect();
        let second: Vec<bool> = (0..100).map(|i| (10..70).contains(&i) || i >= 98).collect();
        let p = paired(&first, &second, 1);
        assert_eq!((p.only_first, p.only_second), (10, 2));
        assert!((p.difference - 0.08).abs() < 1e-12 && (p.p - 0.03857421875).abs() < 1e-12);
        // The difference's standard error is sqrt(0.12 - 0.0064) / 10 = 0.0337.
        assert!((p.interval.0 - 0.014).abs() < 0.02 && (p.interval.1 - 0.146).abs() < 0.02, "{p:?}");
        assert_eq!(paired(&first, &first, 1).p, 1.0);
        assert!(mcnemar(2000, 0) < 1e-300 && mcnemar(0, 0) == 1.0);
    }

    #[test]
    fn places_are_spread_evenly() {
        let all: Vec<f64> = (0..2000).map(|i| place(3, "split", &i.to_string())).collect();
        let share = all.iter().filter(|&&x| x < 0.25).count() as f64 / 2000.0;
        assert!((share - 0.25).abs() < 0.03, "{share}");
        assert_ne!(place(3, "split", "a"), place(4, "split", "a"));
        assert_ne!(place(3, "split", "a"), place(3, "share", "a"));
    }
}
