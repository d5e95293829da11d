//! Teacher and student (Hsieh et al. 2023, "Distilling step-by-step").
//!
//! A [`question`] is put to a [`teacher`] by a [`template`] of worked examples; [`ask`](mod@ask) keeps what comes back, line by
//! line ([`record`]), within a [`budget`]. Arithmetic answers are [`expression`]s. A [`student`] is taught ([`mod@teach`]) to
//! write answers, reasons or both, and compared ([`eval`]) with others on the same questions ([`stats`]).
//!
//! The crate knows no terminal. Start at [`ask::ask`], [`teach::teach`] and [`eval::compare`].
#![forbid(unsafe_code)]

pub mod ask;
pub mod budget;
mod error;
pub mod eval;
pub mod expression;
pub mod question;
pub mod record;
pub mod soft;
pub mod stats;
pub mod student;
pub mod teach;
pub mod teacher;
pub mod template;

pub use error::Error;
