//! Training: data, optimisers, the loop, checkpoints that resume bit for bit.
//!
//! A batch makes one trip: [`data`] packs rows of tokens, [`step`] has traced model, loss, gradients and optimiser
//! ([`optim`]) into one graph, a [`Learner`] runs it and holds weights and moments. [`Run`] is the loop around it: a
//! folder with settings ([`config`]), measures ([`metrics`]), [`checkpoint`]s and a [`report`].
//!
//! This crate knows no terminal: whoever starts a run hears of it by [`Event`]s and stops it by a flag. Start at
//! [`step::update`] to train a function of one's own, at [`Run`] to train a model on text.
#![forbid(unsafe_code)]

pub mod bench;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod dialogue;
mod error;
mod learner;
pub mod lora;
pub mod metrics;
pub mod new;
pub mod optim;
mod random;
pub mod report;
mod run;
pub mod schedule;
pub mod step;
pub mod task;
pub mod verify;

pub use error::Error;
pub use learner::{Base, How, Learner, Outcome};
pub use run::{Event, Finished, Run};
