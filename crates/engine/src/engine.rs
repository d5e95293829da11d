//! A loaded model: weights in memory, packed, on a device.

use crate::runner::RunnerOptions;
use crate::{Error, Opened, Runner, adapter, open};
use serde::Serialize;
use sparsam_dtype::DType;
use sparsam_ir::Precision;
use sparsam_models::Model;
use sparsam_runtime::{Device, Weights};
use sparsam_tokenizer::{Message, RenderOptions, Specials, Tokenizer};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The context that is taken if none is asked for: the model's own, but at most this.
pub const DEFAULT_CONTEXT: usize = 8192;

/// How to load and run a model. The default: all cores, fast, the model's context up to [`DEFAULT_CONTEXT`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// Threads; 0: all cores.
    pub threads: usize,
    /// f32 activations and an f32 cache, instead of 8-bit activations and an F16 cache.
    pub exact: bool,
    /// Run node by node, without the compiler.
    pub eager: bool,
    /// Tokens of the longest sequence; `None`: [`DEFAULT_CONTEXT`] or the model's own, whichever is less.
    pub context: Option<usize>,
    /// Element type of the cache; `None`: F16, or F32 where `exact`.
    pub cache: Option<DType>,
    /// Folders of adapters in PEFT's layout, each with the weight of its term.
    pub adapters: Vec<(PathBuf, f64)>,
}

/// A model ready to run. Runners share its weights.
pub struct Engine {
    opened: Opened,
    weights: Arc<Weights>,
    device: Device,
    options: Options,
}

impl Engine {
    /// Opens the model at `path` and packs its weights.
    ///
    /// # Errors
    /// As [`open()`] and [`Opened::weights`]; if the machine lacks the instructions that `SPARSAM_SIMD` asks for, or the
    /// context is beyond what the model was made for.
    pub fn load(path: &Path, options: &Options) -> Result<Engine, Error> {
        Engine::from_opened(open(path)?, options)
    }

    /// Packs the weights of an open model.
    ///
    /// # Errors
    /// As [`Engine::load`].
    pub fn from_opened(mut opened: Opened, options: &Options) -> Result<Engine, Error> {
        let device = Device::cpu(options.threads)?;
        let made_for = opened.model.facts().context_length;
        if let Some(context) = options.context.filter(|&c| c > made_for || c == 0) {
            let what = format!(
                "a context of {context} tokens is not possible: the model was made for {made_for}; choose --ctx from 1 to {made_for}"
            );
            return Err(Error::Context { what });
        }
        let mut weights = opened.weights()?;
        if !options.adapters.is_empty() {
            adapter::replay(&options.adapters, opened.tokenizer.as_ref())?;
            let (model, adapters) = adapter::attach(opened.model, &options.adapters)?;
            opened.model = model;
            for (name, shape, values) in adapters {
                weights.insert_f32(&name, &shape, &values)?;
            }
        }
        let weights = Arc::new(weights);
        Ok(Engine { opened, weights, device, options: options.clone() })
    }

    /// The same engine with another chat template.
    ///
    /// # Errors
    /// If the model comes without a tokenizer.
    pub fn with_chat_template(mut self, source: String) -> Result<Engine, Error> {
        self.opened.tokenizer = Some(self.tokenizer()?.clone().with_chat_template(source));
        Ok(self)
    }

    /// The model's files.
    pub fn opened(&self) -> &Opened {
        &self.opened
    }

    /// What it computes.
    pub fn model(&self) -> &Model {
        &self.opened.model
    }

    /// How it reads and writes text.
    ///
    /// # Errors
    /// If the model comes without a tokenizer.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        self.opened.tokenizer()
    }

    /// Its parameters.
    pub fn weights(&self) -> &Arc<Weights> {
        &self.weights
    }

    /// What it runs on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Tokens of the longest sequence.
    pub fn context(&self) -> usize {
        self.options.context.unwrap_or(self.model().facts().context_length.min(DEFAULT_CONTEXT))
    }

    /// How it was loaded.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// A cache for `sequences` texts at a time, each as long as the context.
    ///
    /// # Errors
    /// If the cache's type is not possible for the model.
    pub fn runner(&self, sequences: usize) -> Result<Runner, Error> {
        self.runner_with(sequences, self.context())
    }

    /// A cache for `sequences` texts of up to `context` tokens.
    ///
    /// # Errors
    /// As [`Engine::runner`].
    pub fn runner_with(&self, sequences: usize, context: usize) -> Result<Runner, Error> {
        let exact = self.options.exact;
        let options = RunnerOptions {
            precision: if exact { Precision::F32 } else { Precision::Int8 },
            cache: self.options.cache.unwrap_or(if exact { DType::F32 } else { DType::F16 }),
            context,
            sequences,
            eager: self.options.eager,
        };
        Runner::new(&self.device, self.model(), self.weights.clone(), options)
    }

    /// The tokens of plain text to be continued: with the token that begins a text, if the model wants one.
    ///
    /// # Errors
    /// If there is no tokenizer or the vocabulary lacks a character.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        self.encode_with(text, Specials { add: true, parse: false })
    }

    fn encode_with(&self, text: &str, specials: Specials) -> Result<Vec<u32>, Error> {
        self.tokenizer()?.encode(text, specials).map_err(|source| self.tokenizer_error(source))
    }

    /// The tokens of a dialogue as the model's chat template writes it, up to where the assistant is to speak.
    ///
    /// # Errors
    /// If there is no tokenizer or template, or the template refuses the messages.
    pub fn encode_dialogue(&self, messages: &[Message]) -> Result<Vec<u32>, Error> {
        self.encode_dialogue_with(
            messages,
            &RenderOptions { add_generation_prompt: true, ..RenderOptions::default() },
        )
    }

    /// The tokens of a dialogue, with tools and other variables of the template.
    ///
    /// # Errors
    /// As [`Engine::encode_dialogue`].
    pub fn encode_dialogue_with<M: Serialize>(
        &self,
        messages: &[M],
        options: &RenderOptions,
    ) -> Result<Vec<u32>, Error> {
        let file = || self.opened.source.path().to_path_buf();
        let template = self.tokenizer()?.chat_template().ok_or_else(|| Error::NoTemplate { file: file() })?;
        let text = template.render(messages, options).map_err(|source| self.tokenizer_error(source))?;
        self.encode_with(&text, Specials { add: false, parse: true })
    }

    /// `source` with the model's file.
    pub fn tokenizer_error(&self, source: sparsam_tokenizer::Error) -> Error {
        Error::Tokenizer { file: self.opened.source.path().to_path_buf(), source }
    }

    /// One line on what runs where: device, threads, instructions, precision, context, cache.
    pub fn describe(&self) -> String {
        let exact = self.options.exact;
        format!(
            "{:?}, {} activations, cache {}, context {} of {}{}",
            self.device,
            if exact { "f32" } else { "8-bit" },
            self.options.cache.unwrap_or(if exact { DType::F32 } else { DType::F16 }),
            self.context(),
            self.model().facts().context_length,
            if self.options.eager { ", eager" } else { "" },
        )
    }
}
