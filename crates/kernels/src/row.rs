//! Row programs: straight-line code over tiles of rows.
