//! What answers cost: the roofline of decoding, and a year's bill.
//!
//! A decoding step reads every weight and every sequence's cache once, and multiplies once for each sequence; it takes
//! the longer of the two (Williams et al. 2009; Pope et al. 2022, section 2). A prompt is read in parallel and is bound
//! by arithmetic once it is longer than a few hundred tokens.

use crate::hardware::Accelerator;
use crate::memory::{self, Use};
use crate::shape::Shape;
use crate::{Error, units};
use serde::Serialize;

/// A model on a machine.
#[derive(Clone, Copy, Debug)]
pub struct Service<'a> {
    /// Its shape.
    pub shape: &'a Shape,
    /// Bytes of its weights as stored.
    pub weight_bytes: f64,
    /// Bytes of a cached element.
    pub cache_element_bytes: f64,
    /// What it runs on.
    pub accelerator: &'a Accelerator,
}

/// A question and its answer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Query {
    /// Tokens of the prompt.
    pub prompt: f64,
    /// Tokens of the answer.
    pub answer: f64,
}

/// What bounds a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Reading weights and cache.
    Memory,
    /// Multiplying.
    Arithmetic,
}

/// What serving costs at one batch size.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cost {
    /// Sequences at once.
    pub batch: f64,
    /// Devices that one copy of the model takes.
    pub devices: u64,
    /// Seconds from one token of an answer to the next.
    pub step_seconds: f64,
    /// What bounds the step.
    pub bound: Bound,
    /// Tokens of answers in a second, all sequences together.
    pub tokens_per_second: f64,
    /// Seconds until a prompt is read.
    pub prompt_seconds: f64,
    /// Seconds of the machine for one query, its share of the batch.
    pub query_seconds: f64,
    /// Dollars for a million tokens of prompt.
    pub usd_per_million_in: f64,
    /// Dollars for a million tokens of answer.
    pub usd_per_million_out: f64,
    /// Dollars for one query.
    pub usd_per_query: f64,
    /// Joules for one query.
    pub joules_per_query: f64,
}

/// A year of a given traffic.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Year {
    /// Queries.
    pub queries: f64,
    /// Copies of the model that run all year.
    pub copies: u64,
    /// Devices that run all year.
    pub devices: u64,
    /// Share of their time in which they work.
    pub busy: f64,
    /// Rent in dollars.
    pub usd: f64,
    /// Energy in joules.
    pub joules: f64,
    /// Dollars for a thousand queries.
    pub usd_per_thousand: f64,
}

impl Service<'_> {
    /// The fewest devices that hold the weights and `batch` such queries.
    ///
    /// # Errors
    /// If scratch space alone exceeds a device, with the numbers.
    pub fn devices(&self, query: &Query, batch: f64) -> Result<u64, Error> {
        let how = Use {
            context: query.prompt + query.answer,
            batch,
            cache_element_bytes: self.cache_element_bytes,
        };
        let need = memory::inference(self.shape, self.weight_bytes, &how);
        need.devices(self.accelerator.memory_bytes).ok_or_else(|| {
            Error::Impossible(format!(
                "{} of scratch space for a batch of {} exceeds one {} ({}); take a smaller batch",
                units::show_bytes(need.temporary),
                units::show_count(batch),
                self.accelerator.name,
                units::show_bytes(self.accelerator.memory_bytes)
            ))
        })
    }

    /// The largest batch, a power of two, that needs no more devices than one sequence.
    pub fn largest_batch(&self, query: &Query) -> Result<f64, Error> {
        let devices = self.devices(query, 1.0)?;
        let mut batch = 1.0;
        while batch < 65536.0 && self.devices(query, batch * 2.0).is_ok_and(|n| n <= devices) {
            batch *= 2.0;
        }
        Ok(batch)
    }

    /// What `query` costs when `batch` of them are answered at once, `pue` joules drawn for each of the boards'.
    pub fn cost(&self, query: &Query, batch: f64, pue: f64) -> Result<Cost, Error> {
        let devices = self.devices(query, batch)?;
        let many = devices as f64;
        let hardware = self.accelerator;
        let bandwidth = many * hardware.bandwidth * hardware.bandwidth_share;
        let flops = many * hardware.training_flops();
        // A token of the answer sees the prompt and, in the mean, half of the answer.
        let keys = query.prompt + query.answer / 2.0;
        let cache = self.shape.cache_bytes_per_token(self.cache_element_bytes) * keys;
        let reading = (self.weight_bytes + batch * cache) / bandwidth;
        let multiplying = batch * self.shape.forward_flop(keys) / flops;
        let step_seconds = reading.max(multiplying);
        let prompt_flop = query.prompt * self.shape.forward_flop((query.prompt + 1.0) / 2.0);
        let prompt_seconds = (prompt_flop / flops).max(self.weight_bytes / bandwidth);
        let query_seconds = prompt_seconds + query.answer * step_seconds / batch;
        let usd_per_second = many * hardware.usd_per_hour / 3600.0;
        Ok(Cost {
            batch,
            devices,
            step_seconds,
            bound: if reading >= multiplying { Bound::Memory } else { Bound::Arithmetic },
            tokens_per_second: batch / step_seconds,
            prompt_seconds,
            query_seconds,
            usd_per_million_in: usd_per_second * prompt_seconds / query.prompt * 1e6,
            usd_per_million_out: usd_per_second * step_seconds / batch * 1e6,
            usd_per_query: usd_per_second * query_seconds,
            joules_per_query: many * hardware.watts * pue * query_seconds,
        })
    }

    /// A year of `queries_per_day`, each copy of the model kept busy at most the share `busy` of its time (traffic
    /// comes in waves). Rent and power run all year.
    pub fn year(&self, cost: &Cost, queries_per_day: f64, busy: f64, pue: f64) -> Year {
        const DAYS: f64 = 365.25;
        let needed = queries_per_day * cost.query_seconds / 86400.0;
        let copies = (needed / busy).ceil().max(1.0);
        let devices = copies * cost.devices as f64;
        let queries = queries_per_day * DAYS;
        let usd = devices * self.accelerator.usd_per_hour * 24.0 * DAYS;
        Year {
            queries,
            copies: copies as u64,
            devices: devices as u64,
            busy: needed / copies,
            usd,
            joules: devices * self.accelerator.watts * pue * 86400.0 * DAYS,
            usd_per_thousand: usd / queries * 1e3,
        }
    }
}
