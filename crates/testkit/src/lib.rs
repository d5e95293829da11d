//! Test helpers: the real model, goldens, tolerances, finite differences (development only).
