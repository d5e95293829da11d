//! The operations. Few and primitive: what can be composed is composed, and a pass may find it again.
//!
//! Every node has one result. Kernels that give several (attention with its log-sum-exp, its three gradients)
//! are several nodes over the same inputs that differ in their `part`; the compiler runs them as one.

use sparsam_dtype::DType;

/// A real constant, compared and hashed by its bits so that operations can be told apart exactly.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Real(u64);

impl Real {
    /// The constant `value`.
    pub fn new(value: f64) -> Real {
        Real(value.to_bits())
    }

    /// Its value.
    pub fn get(self) -> f64 {
        f64::from_bits(self.0)
    }
}

impl std::fmt::Debug for Real {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.get())
    }
}

/// Functions of one number, element by element, computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Unary {
    Neg,
    Abs,
    Recip,
    Sqrt,
    Exp,
    Log,
    Sin,
    Cos,
    Tanh,
    /// The error function, for the exact GELU.
    Erf,
    Floor,
}

/// Functions of two numbers, element by element, computed in f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    Max,
    Min,
    /// 1 where `a < b`, else 0.
    Less,
    /// 1 where `a == b`, else 0.
    Equal,
}

/// How elements along an axis become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names say it
pub enum Reduction {
    Sum,
    Max,
}

/// In what precision a matmul reads its activations. Products are always summed in f32 (int8: in i32 per block,
/// then f32).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Precision {
    /// f32 activations; rounded weights are decoded. What `--exact` means.
    F32,
    /// Activations and weights rounded to bf16.
    Bf16,
    /// Activations rounded per row in blocks of 32 to 8 bits. Never under a gradient.
    Int8,
}

/// Which result of the attention kernel a node stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttentionPart {
    /// (N, n_heads, head_dim): the weighted sum of values.
    Out,
    /// (N, n_heads): log of the sum of exponentials of the scores, kept for the backward pass.
    LogSumExp,
    /// Shape of q: the gradient towards the queries. This part and the next two take three more inputs: the `Out` and
    /// `LogSumExp` of the same inputs, and the gradient of `Out` (Dao et al. 2022, algorithm 4). Packed layout only.
    GradQ,
    /// Shape of k: the gradient towards the keys.
    GradK,
    /// Shape of v: the gradient towards the values.
    GradV,
}

impl AttentionPart {
    /// Whether this is a gradient.
    pub fn is_grad(self) -> bool {
        match self {
            AttentionPart::Out | AttentionPart::LogSumExp => false,
            AttentionPart::GradQ | AttentionPart::GradK | AttentionPart::GradV => true,
        }
    }
}

/// Where the keys of a row lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AttentionLayout {
    /// Keys are rows of the same flat token axis. Inputs: q, k, v, row_start (N): row `i` sees rows
    /// `row_start[i] ..= i`; `row_start[i] > i` marks padding, whose result is 0.
    Packed,
    /// Keys lie in a pool of pages. Inputs: q, k pool, v pool (slots, n_kv_heads, head_dim), positions (N),
    /// row_seq (N; -1 marks padding, whose result is 0), page_table (sequences, pages): row `i` of sequence `s`
    /// sees positions `0 ..= positions[i]`; position `p` lies in slot `table[s][p / page] * page + p % page`.
    Paged {
        /// Tokens in a page.
        page_size: usize,
    },
}

/// Exact causal attention with grouped heads (Dao et al. 2022; Ainslie et al. 2023 for the groups).
///
/// For each row and query head `h`, with key head `h / (n_heads / n_kv_heads)`: `softmax(cap(scale * q.k)) v` over
/// the keys that the layout and the window allow; `cap(s) = softcap * tanh(s / softcap)` where a soft cap is given.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Attention {
    /// Multiplies the scores, usually `1 / sqrt(head_dim)`.
    pub scale: Real,
    /// Sliding window: a row sees at most this many keys, itself included.
    pub window: Option<usize>,
    /// Soft limit on the scores (Gemma 2).
    pub softcap: Option<Real>,
    /// Where keys lie.
    pub layout: AttentionLayout,
    /// Which result.
    pub part: AttentionPart,
}

/// Which result of the cross-entropy kernel a node stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CrossEntropyPart {
    /// (N): `log(sum(exp(logits))) - logits[target]` of each row; 0 where the target is -1.
    Loss,
    /// Shape of h: `dh = dlogits W`. This part and the next take one more input, the gradient of the loss, F32 (N).
    GradH,
    /// Shape of the weight: `dW = dlogits^T h`.
    GradWeight,
}

impl CrossEntropyPart {
    /// Whether this is a gradient.
    pub fn is_grad(self) -> bool {
        match self {
            CrossEntropyPart::Loss => false,
            CrossEntropyPart::GradH | CrossEntropyPart::GradWeight => true,
        }
    }
}

/// One operation. Shapes and types of results: [`crate::infer()`]; meaning: [`crate::interpret`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // fields are named as in the text of each variant
pub enum Op {
    // -- 1. leaves ---------------------------------------------------------------------------------------------
    /// A value given at every run.
    Input { name: String, shape: Vec<usize>, dtype: DType },
    /// A parameter, bound by name at run time; may be stored in a block format. No pass reads its value.
    Weight { name: String, shape: Vec<usize>, dtype: DType },
    /// A value that lives on between runs (KV cache, optimiser moments), as it is before this run's writes.
    State { name: String, shape: Vec<usize>, dtype: DType },
    /// One number everywhere.
    Const { value: Real, shape: Vec<usize>, dtype: DType },
    /// The index along `axis`, as I32.
    Iota { axis: usize, shape: Vec<usize> },
    /// Uniform f32 in [0, 1) by counter (Salmon et al. 2011, Philox 4x32-10). Input: seed, I32 (2). The counter
    /// is the flat element index and `stream`, so values depend on neither threads nor order.
    Random { stream: u32, shape: Vec<usize> },

    // -- 2. elementwise ----------------------------------------------------------------------------------------
    /// F32 to F32.
    Unary(Unary),
    /// F32 and F32 of one shape.
    Binary(Binary),
    /// Inputs: condition, a, b of one shape: a where the condition is not 0.
    Select,
    /// To another element type. From a block format: decodes.
    Cast(DType),

    // -- 3. reductions -----------------------------------------------------------------------------------------
    /// Over `axes` (sorted), which stay with length 1.
    Reduce { op: Reduction, axes: Vec<usize> },

    // -- 4. movement -------------------------------------------------------------------------------------------
    /// Same elements in the same order, another shape.
    Reshape(Vec<usize>),
    /// Axis `i` of the result is axis `axes[i]` of the input.
    Permute(Vec<usize>),
    /// Axes of length 1 repeated to this shape.
    Broadcast(Vec<usize>),
    /// `start .. end` along `axis`.
    Slice { axis: usize, start: usize, end: usize },
    /// Zeros `before` and `after` along `axis`.
    Pad { axis: usize, before: usize, after: usize },
    /// Inputs one after the other along `axis`.
    Concat { axis: usize },

    // -- 5. products -------------------------------------------------------------------------------------------
    /// (.., M, K) by (.., K, N), each transposed first where said; leading axes equal. F32 result. A weight stored
    /// in a block format may stand on the right: with `trans_b` as a layer has it (N rows of K), without as the gradient
    /// towards the layer's input has it.
    Matmul { trans_a: bool, trans_b: bool, precision: Precision },
    /// Inputs: table (V, ..), rows I32 (N): result (N, ..) as F32, whatever the table is stored in (I32 stays I32).
    Gather,
    /// Inputs: values (N, ..), rows I32 (N): result (`rows`, ..) with values added up per row, in order.
    ScatterAdd { rows: usize },

    // -- 6. what cannot be composed without losing its point ---------------------------------------------------
    /// See [`Attention`].
    Attention(Attention),
    /// Softmax cross-entropy of the logits `h W^T` against hard targets, in chunks of rows: the logits of all rows
    /// never exist at once. Inputs: h F32 (N, D), weight (V, D), targets I32 (N) in `0 .. V`, or -1 for rows that do
    /// not count; gradients also that of the loss, F32 (N). With `p = softmax(logits)`:
    /// `dlogits = (p - onehot(target)) * dloss`. `precision` is that of all three products.
    CrossEntropy { part: CrossEntropyPart, precision: Precision },
    /// F32: the sum of this value over all processes that run the program together, the same bits on all; by one process
    /// alone, the value itself. All make these sums in the same order.
    AllReduce,
    /// Inputs: state, value of its shape. Result: the state's next version, in its type: into a block format, encodes.
    Assign,
    /// Inputs: state (S, ..), values (N, ..), slots I32 (N). Result: the state's next version with row `slots[i]`
    /// replaced by row `i` of the values, converted to the state's type; slot -1 skips a row.
    ScatterRows,
}

impl Op {
    /// Whether the result is a new version of a state, kept even if nothing reads it.
    pub fn writes_state(&self) -> bool {
        matches!(self, Op::Assign | Op::ScatterRows)
    }
}
