//! From a file to text: loading, KV cache, sampling, generation and evaluation.
