//! Runs a Program on a device: weights, states, buffers and threads.
