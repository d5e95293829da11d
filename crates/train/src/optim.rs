//! The optimiser behind the gradients: clipping by the global norm, then [`AdamW`] in two groups of parameters; or
//! [`Muon`] for matrices between layers, and AdamW for the rest. AdamW's moments may be kept in 8 bits.
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
    /// Whether AdamW's moments are kept in blocks of 8 bits ([`Optimiser::rounds`]).
    pub eight_bits: bool,
    /// Whether moments lie in a file, from which the system reads what it has no memory for.
    pub paged: bool,
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
        Optimiser { adamw, eight_bits: false, paged: false, muon: None, clip: Some(1.0), ratio_b: 1.0 }
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
            if let Some(muon) = self.muon_of(name, &w.shape()) {
                muon.update(name, w, &g, &rates);
                continue;
            }
            let group = if w.rank() > 1 { &self.adamw } else { &still };
            let of_b = of_b.as_ref().filter(|_| name.ends_with(".lora_B.weight"));
            let rates = of_b.unwrap_or(&rates);
            match self.rounds(name, &w.shape()) {
                true => group.update_8bit(name, w, &g, rates),
                false => group.update(name, w, &g, rates),
            };
        }
        clipped.map(|(norm, _)| norm)
    }

    /// What changes the parameter `name` of this shape, if it is [`Muon`].
    fn muon_of(&self, name: &str, shape: &[usize]) -> Option<&Muon> {
        let by_itself = EMBEDDINGS.contains(&module(name)) || module(name) == "lm_head";
        self.muon.as_ref().filter(|_| shape.len() == 2 && !by_itself)
    }

    /// Whether the moments of the parameter `name` of this shape are rounded to 8 bits. Those of small ones and of
    /// embeddings are not, as in bitsandbytes and transformers (Dettmers et al. 2022, section 2.3): a token that a batch
    /// lacks has no gradient, and where the second moment was rounded to 0 but the first was not, its step would be
    /// without measure.
    pub fn rounds(&self, name: &str, shape: &[usize]) -> bool {
        let n: usize = shape.iter().product();
        self.eight_bits && n >= LEAST_8BIT && !EMBEDDINGS.contains(&module(name))
    }

    /// The states that it keeps for the parameter `name` of this shape.
    pub fn moments(&self, name: &str, shape: &[usize]) -> Vec<Kept> {
        let of = |name: String, shape: &[usize], dtype| Kept { name, shape: shape.to_vec(), dtype };
        if self.muon_of(name, shape).is_some() {
            return vec![of(Muon::momentum(name), shape, DType::F32)];
        }
        let [m, v] = AdamW::moments(name);
        match self.rounds(name, shape) {
            true => {
                let kept = AdamW::kept_8bit(shape);
                vec![of(m, &kept, DType::DYN8S), of(v, &kept, DType::DYN8U)]
            }
            false => vec![of(m, shape, DType::F32), of(v, shape, DType::F32)],
        }
    }
}

/// Whether the state of this name is an optimiser's moment.
pub fn is_moment(name: &str) -> bool {
    name.starts_with("adamw.") || name.starts_with("muon.")
}

/// A state that lives on from step to step.
#[derive(Clone, Debug, PartialEq)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What its numbers are kept in.
    pub dtype: DType,
}

impl Kept {
    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        self.dtype.bytes_for(self.shape.iter().product()).unwrap_or(0)
    }
}

/// Elements from which on moments are rounded: bitsandbytes' `min_8bit_size`.
const LEAST_8BIT: usize = 4096;

/// Modules whose matrix is a table of tokens or positions.
const EMBEDDINGS: [&str; 3] = ["embed_tokens", "wte", "wpe"];

/// The last part of a weight's name: its layer's own.
fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name).rsplit('.').next().unwrap_or_default()
}

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
