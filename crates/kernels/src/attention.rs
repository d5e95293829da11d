//! Exact causal attention in tiles.
