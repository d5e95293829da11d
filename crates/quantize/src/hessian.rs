//! What a layer's inputs say about which of its errors matter: `H = mean of x x^T`.

/// Sums of products of a layer's inputs over calibration tokens.
#[derive(Clone, Debug)]
pub struct Hessian {
    /// Inputs of the layer.
    pub n: usize,
    /// Tokens seen.
    pub tokens: usize,
    /// Sum of `x_i x_j` (n, n), row-major.
    pub sum: Vec<f32>,
    /// Sum of `y_i x_j`, where y is the same layer's input in the original model and x the one that it gets from the
    /// rounded layers before it; `None` where these are the same.
    pub cross: Option<Vec<f32>>,
}

/// A damped Hessian: the error of a row `e = w - rounded` is `e H e^T`.
#[derive(Clone, Debug)]
pub struct Damped {
    /// Order.
    pub n: usize,
    /// The matrix, row-major.
    pub h: Vec<f32>,
    /// Inputs that were always 0.
    pub dead: usize,
    /// What was added to the diagonal.
    pub lambda: f32,
}

impl Hessian {
    /// No tokens yet.
    pub fn new(n: usize) -> Hessian {
        Hessian { n, tokens: 0, sum: vec![0.0; n * n], cross: None }
    }

    /// Adds the products of `tokens` tokens.
    pub fn add(&mut self, products: &[f32], cross: Option<&[f32]>, tokens: usize) {
        self.sum.iter_mut().zip(products).for_each(|(s, p)| *s += p);
        if let Some(cross) = cross {
            let sum = self.cross.get_or_insert_with(|| vec![0.0; self.n * self.n]);
            sum.iter_mut().zip(cross).for_each(|(s, p)| *s += p);
        }
        self.tokens += tokens;
    }

    /// How many directions the inputs take, each input counted at its own size: `(tr C)^2 / tr(C^2)` of the matrix C of
    /// `H_ij / sqrt(H_ii H_jj)`, over inputs that were ever used. From 1, where all go together, to their number, where none
    /// do; never more than tokens.
    pub fn effective_rank(&self) -> f64 {
        let n = self.n;
        let size = |i: usize| f64::from(self.sum[i * n + i]);
        let used: Vec<usize> = (0..n).filter(|&i| size(i) > 0.0).collect();
        let mut squares = 0.0;
        for &i in &used {
            let row = &self.sum[i * n..(i + 1) * n];
            squares += used.iter().map(|&j| f64::from(row[j]).powi(2) / size(j)).sum::<f64>() / size(i);
        }
        (used.len() as f64).powi(2) / squares.max(f64::MIN_POSITIVE)
    }

    /// Divided by the number of tokens, with `damping` times the mean of the diagonal added to the diagonal (Frantar et
    /// al. 2023, section 3.3, step 3; 0.01 there and in general). All 0 if no input was ever anything else: then damped by 1.
    pub fn damped(&self, damping: f32) -> Damped {
        let (n, scale) = (self.n, 1.0 / self.tokens.max(1) as f32);
        let mut h: Vec<f32> = self.sum.iter().map(|v| v * scale).collect();
        let diagonal = (0..n).map(|i| f64::from(h[i * n + i]));
        let mean = (diagonal.clone().sum::<f64>() / n.max(1) as f64) as f32;
        let dead = diagonal.filter(|&v| v == 0.0).count();
        let lambda = if mean > 0.0 { damping * mean } else { 1.0 };
        for i in 0..n {
            h[i * n + i] += lambda;
        }
        Damped { n, h, dead, lambda }
    }
}

impl Damped {
    /// The diagonal: how much an error alone in its row counts.
    pub fn diagonal(&self) -> Vec<f32> {
        (0..self.n).map(|i| self.h[i * self.n + i]).collect()
    }

    /// The same matrix with row and column `i` taken from `order[i]`.
    pub(crate) fn permuted(&self, order: &[usize]) -> Vec<f32> {
        order.iter().flat_map(|&i| order.iter().map(move |&j| self.h[i * self.n + j])).collect()
    }
}
