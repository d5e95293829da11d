//! Counters for Prometheus.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the buckets of the time to the first token, in seconds.
const BOUNDS: [f64; 8] = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];

#[derive(Default)]
pub(crate) struct Metrics {
    pub requests: AtomicU64,
    pub refused: AtomicU64,
    pub cancelled: AtomicU64,
    pub prompt_tokens: AtomicU64,
    pub reused_tokens: AtomicU64,
    pub generated_tokens: AtomicU64,
    pub active: AtomicU64,
    pub waiting: AtomicU64,
    /// Answers asked for that the worker has not seen yet; no metric of its own.
    pub unseen: AtomicU64,
    pub cache_free: AtomicU64,
    pub cache_size: AtomicU64,
    first_token: [AtomicU64; BOUNDS.len()],
    first_token_count: AtomicU64,
    first_token_micros: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(n as u64, Ordering::Relaxed);
}

pub(crate) fn set(gauge: &AtomicU64, n: usize) {
    gauge.store(n as u64, Ordering::Relaxed);
}

impl Metrics {
    pub fn first_token(&self, after: Duration) {
        let seconds = after.as_secs_f64();
        for (bucket, bound) in self.first_token.iter().zip(BOUNDS) {
            if seconds <= bound {
                add(bucket, 1);
            }
        }
        add(&self.first_token_count, 1);
        add(&self.first_token_micros, after.as_micros() as usize);
    }

    /// In Prometheus' text format.
    pub fn text(&self) -> String {
        let get = |x: &AtomicU64| x.load(Ordering::Relaxed);
        let mut out = String::new();
        let mut one = |kind: &str, name: &str, help: &str, value: u64| {
            let _ = writeln!(
                out,
                "# HELP sparsam_{name} {help}\n# TYPE sparsam_{name} {kind}\nsparsam_{name} {value}"
            );
        };
        one("counter", "requests_total", "Answers asked for.", get(&self.requests));
        one("counter", "refused_total", "Answers refused since too many waited.", get(&self.refused));
        one(
            "counter",
            "cancelled_total",
            "Answers whose client went away or whose time ran out.",
            get(&self.cancelled),
        );
        one(
            "counter",
            "prompt_tokens_total",
            "Tokens of prompts, reused ones included.",
            get(&self.prompt_tokens),
        );
        one(
            "counter",
            "reused_tokens_total",
            "Tokens of prompts found in the cache.",
            get(&self.reused_tokens),
        );
        one("counter", "generated_tokens_total", "Tokens written.", get(&self.generated_tokens));
        one("gauge", "requests_active", "Answers being written.", get(&self.active));
        one("gauge", "requests_waiting", "Answers waiting for a place.", get(&self.waiting));
        one("gauge", "cache_free_tokens", "Tokens that the cache has free.", get(&self.cache_free));
        one("gauge", "cache_tokens", "Tokens that the cache can hold.", get(&self.cache_size));
        let name = "sparsam_first_token_seconds";
        let _ = writeln!(out, "# HELP {name} From a request to its first token.\n# TYPE {name} histogram");
        for (bucket, bound) in self.first_token.iter().zip(BOUNDS) {
            let _ = writeln!(out, "{name}_bucket{{le=\"{bound}\"}} {}", get(bucket));
        }
        let count = get(&self.first_token_count);
        let sum = get(&self.first_token_micros) as f64 / 1e6;
        let _ = writeln!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}");
        out
    }
}
