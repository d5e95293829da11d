//! Copies, gathers and scatters.
