//! Threads of one process in the place of the processes of a group.

use sparsam_runtime::Group;
use std::sync::{Arc, Barrier, Mutex};

/// One of them.
pub struct Threads {
    rank: usize,
    shared: Arc<Shared>,
}

struct Shared {
    barrier: Barrier,
    values: Vec<Mutex<Vec<f64>>>,
}

impl Threads {
    /// A group of `n`.
    pub fn all(n: usize) -> Vec<Threads> {
        let values = (0..n).map(|_| Mutex::new(Vec::new())).collect();
        let shared = Arc::new(Shared { barrier: Barrier::new(n), values });
        (0..n).map(|rank| Threads { rank, shared: shared.clone() }).collect()
    }

    /// Sums in the order of the ranks: the same bits for all.
    fn exchange(&self, own: Vec<f64>) -> Vec<f64> {
        *self.shared.values[self.rank].lock().unwrap() = own;
        self.shared.barrier.wait();
        let mut sum: Vec<f64> = Vec::new();
        for values in &self.shared.values {
            let values = values.lock().unwrap();
            sum.resize(values.len(), 0.0);
            sum.iter_mut().zip(&*values).for_each(|(s, v)| *s += v);
        }
        // Nobody overwrites its own before all have read it.
        self.shared.barrier.wait();
        sum
    }
}

impl Group for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.shared.values.len()
    }

    fn sum(&self, values: &mut [f32]) {
        let sum = self.exchange(values.iter().map(|v| *v as f64).collect());
        values.iter_mut().zip(sum).for_each(|(v, s)| *v = s as f32);
    }

    fn sum_counts(&self, values: &mut [u64]) {
        let sum = self.exchange(values.iter().map(|v| *v as f64).collect());
        values.iter_mut().zip(sum).for_each(|(v, s)| *v = s as u64);
    }
}
