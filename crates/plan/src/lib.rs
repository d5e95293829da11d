//! Scaling laws, bills and what fits where: pure arithmetic.
