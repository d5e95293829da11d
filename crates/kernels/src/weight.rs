//! Packed weights, rounded or not, and products with them.
