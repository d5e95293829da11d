//! From settings to what a run works with: tokenizer, tokens, model.

use super::*;
use crate::config::Facts;
use crate::data::{Sources, TokenWriter, documents};
use crate::new;
use sparsam_tokenizer::{JsonFiles, train as vocabulary};

/// Bytes of text that a vocabulary is learnt from, at most: pairs are as frequent in the rest.
const VOCABULARY_BYTES: usize = 64 << 20;

/// Makes tokenizer and tokens in `folder`, and completes `config`.
pub(super) fn prepare(folder: &Path, config: &mut Config) -> Result<Prepared, Error> {
    let d = &mut config.data;
    if d.train.is_empty() {
        return Err(Error::config(
            "data.train",
            "names no file; give text, .jsonl or token files (.bin, .u32)",
        ));
    }
    for path in d.train.iter_mut().chain(&mut d.held_back) {
        *path = std::path::absolute(&*path).map_err(Error::io("find", path.clone()))?;
        if !path.is_file() {
            return Err(Error::data(path.clone(), "there is no such file"));
        }
    }
    std::fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
    let field = d.field.get_or_insert_with(|| "text".to_string()).clone();
    let base = base(config)?;
    let tokenizer = match &base {
        Some(opened) => opened.tokenizer()?.clone(),
        None => new_tokenizer(folder, config, &field)?,
    };
    let d = &config.data;
    let n_token_files = d.train.iter().chain(&d.held_back).filter(|p| Corpus::is_token_file(p)).count();
    let mut hash = None;
    if n_token_files == 0 {
        let vocab_size = tokenizer.vocab_size();
        let write = |stem: &str, files: &[PathBuf]| -> Result<String, Error> {
            let mut w = TokenWriter::create(&folder.join(TokenWriter::name(stem, vocab_size)), vocab_size)?;
            documents(&Sources { files: files.to_vec(), field: field.clone() }, |text, ends| {
                let mut ids = tokenizer.encode(text, Specials::default())?;
                ids.extend(tokenizer.eos().filter(|_| ends));
                w.write(&ids)
            })?;
            Ok(w.finish()?.1)
        };
        hash = Some(write("tokens", &d.train)?);
        if !d.held_back.is_empty() {
            write("held-back", &d.held_back)?;
        }
    } else if n_token_files != d.train.len() + d.held_back.len() {
        return Err(Error::config("data", "text and token files are mixed; give one kind"));
    }
    finish(folder, config, tokenizer, base, hash)
}

/// The model that the settings continue with.
fn base(config: &Config) -> Result<Option<Opened>, Error> {
    let Some(from) = &config.model.from else { return Ok(None) };
    let (m, d) = (&config.model, &config.data);
    let new = m.arch.is_some() || m.size.is_some() || m.layers.is_some() || m.hidden.is_some();
    if new || d.tokenizer.is_some() || d.chat_template.is_some() {
        let problem =
            "architecture, sizes, tokenizer and chat template are those of model.from; leave them out";
        return Err(Error::config("model", problem));
    }
    Ok(Some(sparsam_engine::open(Path::new(from))?))
}

/// Opens what [`prepare()`] has made.
pub(super) fn reopen(folder: &Path, config: &mut Config) -> Result<Prepared, Error> {
    let base = base(config)?;
    let tokenizer = match &base {
        Some(opened) => opened.tokenizer()?.clone(),
        None => open_tokenizer(&folder.join("tokenizer"))?,
    };
    let hash = config.receipt.as_ref().and_then(|r| r.tokens_sha256.clone());
    finish(folder, config, tokenizer, base, hash)
}

fn finish(
    folder: &Path,
    config: &mut Config,
    tokenizer: Tokenizer,
    base: Option<Opened>,
    tokens_sha256: Option<String>,
) -> Result<Prepared, Error> {
    let end = tokenizer.eos();
    let vocab_size = tokenizer.vocab_size();
    let ctx = *config.data.ctx.get_or_insert(crate::config::DEFAULT_CTX);
    let (model, base) = match base {
        Some(opened) => (opened.model, Some(opened.source)),
        None => (Model::new(new::configure(&mut config.model, vocab_size, ctx)?), None),
    };
    let made = |stem: &str| vec![folder.join(TokenWriter::name(stem, vocab_size))];
    let files =
        |given: &[PathBuf], stem: &str| if tokens_sha256.is_some() { made(stem) } else { given.to_vec() };
    let all = Corpus::open(&files(&config.data.train, "tokens"), end)?;
    let (train, held_back) = if config.data.held_back.is_empty() {
        let part = *config.data.held_back_part.get_or_insert(0.05);
        let n = (all.len() as f64 * part.clamp(0.0, 1.0)) as usize;
        let (train, held_back) = all.split(all.held_back_from(n));
        (train, (!held_back.is_empty()).then_some(held_back))
    } else {
        (all, Some(Corpus::open(&files(&config.data.held_back, "held-back"), end)?))
    };
    let parameters = model.n_parameters()? as u64;
    let facts = Facts { parameters, train_tokens: train.len() as u64, continues: base.is_some() };
    let settings = config.complete(&facts)?;
    let receipt = Receipt {
        version: env!("CARGO_PKG_VERSION").to_string(),
        parameters,
        train_tokens: train.len() as u64,
        held_back_tokens: held_back.as_ref().map_or(0, |c| c.len() as u64),
        vocab_size: vocab_size as u64,
        tokens_sha256,
    };
    config.receipt = Some(receipt.clone());
    let vocab_size = model.facts().vocab_size;
    let rows = |corpus: Corpus| {
        Ok::<_, Error>(
            Box::new(Rows::new(corpus, settings.ctx, settings.seed, vocab_size)?) as Box<dyn Batches>
        )
    };
    // Too little is held back to fill a row: then there is nothing to evaluate on.
    let held_back = held_back.filter(|c| c.len() > settings.ctx).map(rows).transpose()?;
    let (train, stays, finetuned) = (rows(train)?, Base::nothing(), None);
    let tokenizer = Some(tokenizer);
    Ok(Prepared {
        model,
        tokenizer,
        source: base,
        train,
        held_back,
        settings,
        receipt,
        base: stays,
        targets: Targets::default(),
        finetuned,
    })
}

/// The tokenizer that the settings name, its files in the run's folder.
fn new_tokenizer(folder: &Path, config: &mut Config, field: &str) -> Result<Tokenizer, Error> {
    let d = &mut config.data;
    let named = d.tokenizer.get_or_insert_with(|| "bytes".to_string()).clone();
    let into = folder.join("tokenizer");
    let new = if named == "bytes" {
        vocabulary::byte_vocabulary()
    } else if let Some(size) = named.strip_prefix("bpe:") {
        let size = sparsam_plan::units::count("vocabulary", size)? as usize;
        if d.train.iter().any(|p| Corpus::is_token_file(p)) {
            return Err(Error::config(
                "data.tokenizer",
                "a vocabulary is learnt from text, not from token files",
            ));
        }
        let mut texts = Vec::new();
        let mut bytes = 0;
        documents(&Sources { files: d.train.clone(), field: field.to_string() }, |text, _| {
            if bytes < VOCABULARY_BYTES {
                bytes += text.len();
                texts.push(text.to_string());
            }
            Ok(())
        })?;
        vocabulary::byte_level_bpe(texts.iter(), size)?
    } else {
        let path = Path::new(&named);
        let (json, config) = match path.is_dir() {
            true => (path.join("tokenizer.json"), path.join("tokenizer_config.json")),
            false => (path.to_path_buf(), path.with_file_name("tokenizer_config.json")),
        };
        let tokenizer_json = std::fs::read(&json).map_err(Error::io("read", json))?;
        let tokenizer_config = if config.exists() {
            std::fs::read(&config).map_err(Error::io("read", config))?
        } else {
            b"{}".to_vec()
        };
        JsonFiles { tokenizer: tokenizer_json, config: tokenizer_config }
    };
    std::fs::create_dir_all(&into).map_err(Error::io("create", &into))?;
    let new = match &config.data.chat_template {
        None => new,
        Some(path) => {
            let source = std::fs::read_to_string(path).map_err(Error::io("read", path))?;
            let tokenizer = Tokenizer::from_json(&new.tokenizer, Some(&new.config))?;
            tokenizer.with_chat_template(source).to_json()?
        }
    };
    for (name, bytes) in [("tokenizer.json", &new.tokenizer), ("tokenizer_config.json", &new.config)] {
        write_file(&into.join(name), bytes)?;
    }
    open_tokenizer(&into)
}

fn open_tokenizer(folder: &Path) -> Result<Tokenizer, Error> {
    let read = |name: &str| {
        let path = folder.join(name);
        std::fs::read(&path).map_err(Error::io("read", path))
    };
    let (json, config) = (read("tokenizer.json")?, read("tokenizer_config.json")?);
    Ok(Tokenizer::from_json(&json, Some(&config))?)
}
