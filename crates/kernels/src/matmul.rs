//! Products of plain matrices.
