//! The optimiser behind the gradients: clipping by the global norm, then [`AdamW`] in two groups of parameters; or
//! [`Muon`] for matrices between layers, and AdamW for the rest.
//!
//! Composed over [`Tensor`]: the compiler fuses a weight's whole update into one pass over it. Weights and moments are
//! states, written in place by the step; what changes from step to step comes in as the input [`RATES`].

use sparsam_ir::{AdamW, DType, Muon, Tensor, Trace};

/// The input that holds [`AdamW::rates`], F32 (3).
pub const RATES: &str = "rates";

/// AdamW (Loshchilov & Hutter 2019) as language models are trained: matrices decay, weights of one axis (norms, biases)
/// do not; gradients are clipped.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Optimiser {
    /// Betas, eps, and the decay of matrices.
    pub adamw: AdamW,
    /// What matrices between layers are changed by instead.
    pub muon: Option<Muon>,
    /// Gradients are scaled so that the norm of all of them together is at most this (Pascanu et al. 2013). `None`:
    /// not at all, and then no gradient has to wait for the others.
    pub clip: Option<f64>,
    /// The learning rate of an adapter's B over that of A and of everything else (LoRA+, Hayou et al. 2024).
    pub ratio_b: f64,
}

impl Default for Optimiser {
    /// Betas 0.9 and 0.95, decay 0.1, clipped at 1 (Brown et al. 2020, appendix B).
    fn default() -> Optimiser {
        let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        Optimiser { adamw, muon: None, clip: Some(1.0), ratio_b: 1.0 }
    }
}

impl Optimiser {
    /// Writes the next version of each parameter and its moments. Returns the norm of all gradients together, before
    /// clipping, (1); `None` where nothing is clipped.
    #[track_caller]
    pub fn update(&self, t: &Trace, parameters: &[(String, Tensor)], grads: &[Tensor]) -> Option<Tensor> {
        let rates = t.input(RATES, &[3], DType::F32);
        let clipped = self.clip.map(|clip| {
            let norm = global_norm(t, grads);
            // PyTorch's clip_grad_norm_: min(1, clip / (norm + 1e-6)).
            let scale = (t.full(&[1], clip) / norm.add_scalar(1e-6)).minimum(&t.full(&[1], 1.0));
            (norm, scale)
        });
        // The rate and the step size grow; the third number belongs to the moments.
        let of_b = (self.ratio_b != 1.0)
            .then(|| t.concat(&[&rates.slice(0, 0, 2).mul_scalar(self.ratio_b), &rates.slice(0, 2, 3)], 0));
        let still = AdamW { weight_decay: 0.0, ..self.adamw };
        for ((name, w), g) in parameters.iter().zip(grads) {
            let g = clipped.as_ref().map_or(g.clone(), |(_, scale)| g * &scale.broadcast_to(&g.shape()));
            if let Some(muon) = self.muon_of(name, w.rank()) {
                muon.update(name, w, &g, &rates);
                continue;
            }
            let group = if w.rank() > 1 { &self.adamw } else { &still };
            let of_b = of_b.as_ref().filter(|_| name.ends_with(".lora_B.weight"));
            group.update(name, w, &g, of_b.unwrap_or(&rates));
        }
        clipped.map(|(norm, _)| norm)
    }

    /// What changes the parameter `name` with this many axes, if it is [`Muon`].
    fn muon_of(&self, name: &str, rank: usize) -> Option<&Muon> {
        let module = name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or_default();
        self.muon.as_ref().filter(|_| rank == 2 && !TABLES.contains(&module))
    }

    /// The states that it keeps for the parameter `name` with this many axes, each of the parameter's shape.
    pub fn moments(&self, name: &str, rank: usize) -> Vec<String> {
        match self.muon_of(name, rank) {
            Some(_) => vec![Muon::momentum(name)],
            None => AdamW::moments(name).to_vec(),
        }
    }
}

/// Modules whose matrix is a table of tokens or positions, or the head: each of its rows is learnt by itself.
const TABLES: [&str; 4] = ["embed_tokens", "lm_head", "wte", "wpe"];

/// `sqrt(sum of the squares of all elements)`: (1).
#[track_caller]
fn global_norm(t: &Trace, grads: &[Tensor]) -> Tensor {
    let square = |g: &Tensor| {
        let axes: Vec<usize> = (0..g.rank()).collect();
        (g * g).sum(&axes).reshape(&[1])
    };
    let squares: Vec<Tensor> = grads.iter().map(square).collect();
    t.concat(&squares.iter().collect::<Vec<_>>(), 0).sum(&[0]).sqrt()
}
