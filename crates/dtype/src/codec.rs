//! Encoding and decoding of block formats.
