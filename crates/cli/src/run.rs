//! `sparsam run`: a model answers, once or in a chat.

use crate::load::{Load, positive};
use crate::text;
use anyhow::{Context, bail};
use serde_json::json;
use sparsam_engine::{
    DEFAULT_DRAFT_TOKENS, Engine, Error, Finish, Generated, Message, Request, Runner, Sampling, Sequence,
    Speculation, Speculator, generate,
};
use sparsam_grammar::{Grammar, Grammars};
use std::io::{BufRead, IsTerminal, Read, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Instant, SystemTime};

/// Ask a model: one prompt, or a chat
#[derive(clap::Args)]
#[command(after_help = "Examples:
  sparsam run model.gguf                                   chat in a terminal
  sparsam run model.gguf 'Why is the sky blue?'            one answer
  sparsam run model.gguf --raw 'Once upon a time' -n 50    continue plain text
  cat article.txt | sparsam run model.gguf --system 'Summarise in one sentence.'
  sparsam run model.gguf 'Name three fruits.' --json-schema fruits.json
  sparsam run big.gguf 'Hello' --draft small.gguf          the same answer faster, if the small one guesses well
  sparsam run model.gguf --explain 'Hi' -n 1               what the compiler did")]
pub struct Args {
    /// A GGUF file, a safetensors file or folder, builtin, or ORG/NAME of the hub if it is in the cache
    model: String,
    /// What to ask; `-` or nothing reads standard input, nothing in a terminal starts a chat
    prompt: Option<String>,
    /// System message at the head of the dialogue
    #[arg(long)]
    system: Option<String>,
    /// Continue the prompt as plain text, without the chat template
    #[arg(long, conflicts_with = "system")]
    raw: bool,
    /// Use the Jinja template in this file instead of the model's
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    chat_template: Option<PathBuf>,
    /// Most tokens of an answer
    #[arg(long, short = 'n', value_name = "N", value_parser = positive)]
    max_tokens: Option<usize>,
    /// End the answer at this text (may be given several times)
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// The answer is JSON that fits this JSON Schema: a file, or the schema itself
    #[arg(long, value_name = "SCHEMA", conflicts_with = "grammar")]
    json_schema: Option<String>,
    /// The answer is a text of the grammar in this file, in Lark's language as llguidance reads it
    #[arg(long, value_name = "FILE")]
    grammar: Option<PathBuf>,
    /// Tokens of the context (default: the model's, at most 8192)
    #[arg(long, short = 'c', value_name = "N", value_parser = positive)]
    ctx: Option<usize>,
    /// Drop the oldest tokens of a prompt that is longer than the context, and say so
    #[arg(long)]
    truncate: bool,
    /// A smaller model with the same vocabulary that proposes tokens; the answer stays the model's own, greedy
    #[arg(long, value_name = "MODEL")]
    draft: Option<String>,
    /// Tokens that the draft proposes at a time
    #[arg(long, value_name = "N", default_value_t = DEFAULT_DRAFT_TOKENS, value_parser = positive)]
    draft_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    load: Load,
    /// Print what the compiler did to the model, for a prompt and for a token
    #[arg(long)]
    explain: bool,
    /// Print one JSON object with text, counts and speeds instead of streaming
    #[arg(long)]
    json: bool,
}

/// How tokens are chosen; the defaults are llama.cpp's.
#[derive(clap::Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArgs {
    /// Divides the logits; 0 takes the likeliest token always (default: 0.8; 0 with --draft)
    #[arg(long, value_name = "T")]
    temperature: Option<f32>,
    /// Only the k likeliest tokens (0: all)
    #[arg(long, default_value_t = 40, value_name = "K")]
    top_k: usize,
    /// Only the likeliest tokens that together have this probability (1: all)
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f32,
    /// Only tokens at least this likely, relative to the likeliest (0: all)
    #[arg(long, default_value_t = 0.05, value_name = "P")]
    min_p: f32,
    /// Weakens tokens among the last 64 (1: not at all)
    #[arg(long, default_value_t = 1.0, value_name = "X")]
    repeat_penalty: f32,
    /// The same seed gives the same answer (default: by the clock)
    #[arg(long)]
    seed: Option<u64>,
}

impl SamplingArgs {
    fn sampling(&self, temperature: f32) -> Sampling {
        let clock = || SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64 & 0xffff_ffff);
        Sampling {
            temperature: self.temperature.unwrap_or(temperature),
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repeat_penalty: self.repeat_penalty,
            seed: self.seed.unwrap_or_else(clock),
            ..Sampling::default()
        }
    }
}

/// Set by Ctrl-C, cleared where an answer begins.
static STOPPED: AtomicBool = AtomicBool::new(false);

fn catch_interrupt() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        // A second one in the same answer means it.
        if STOPPED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    })
    .context("cannot catch Ctrl-C")
}

struct Asker {
    engine: Engine,
    runner: Runner,
    sequence: Sequence,
    speculator: Option<Speculator>,
    request: Request,
    truncate: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let sampling = args.sampling.sampling(if args.draft.is_some() { 0.0 } else { 0.8 });
    sampling.check()?;
    let start = Instant::now();
    let engine = args.load.engine(&args.model, args.ctx)?;
    let engine = match &args.chat_template {
        None => engine,
        Some(file) => {
            let source = std::fs::read_to_string(file)
                .with_context(|| format!("{}: cannot read the chat template", file.display()))?;
            engine.with_chat_template(source)?
        }
    };
    let mut runner = engine.runner(1)?;
    if args.explain {
        for n in [1, 512.min(engine.context())] {
            eprintln!("{n} token{} at a time:\n{}", if n == 1 { "" } else { "s" }, runner.report(n)?);
        }
    }
    eprintln!("{} · loaded in {}", engine.describe(), text::duration(start.elapsed()));
    let rule = match grammar(args.json_schema.as_deref(), args.grammar.as_deref())? {
        Some(grammar) => {
            let vocab_size = engine.model().facts().vocab_size;
            Some(Grammars::new(engine.tokenizer()?, vocab_size)?.compile(&grammar)?)
        }
        None => None,
    };
    let (max_tokens, stops) = (args.max_tokens, args.stop);
    let request = Request { sampling, max_tokens, stops, rule, ..Request::default() };
    let sequence = runner.sequence();
    let templated = !args.raw && engine.tokenizer()?.chat_template().is_some();
    let speculator = match &args.draft {
        None => None,
        Some(name) => {
            let draft = args.load.engine(name, args.ctx)?;
            Some(Speculator::new(&engine, &draft, args.draft_tokens)?)
        }
    };
    let mut asker = Asker { engine, runner, sequence, speculator, request, truncate: args.truncate };
    catch_interrupt()?;

    let prompt = match args.prompt.as_deref() {
        None if std::io::stdin().is_terminal() => None,
        None | Some("-") => {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("standard input is not UTF-8 text")?;
            Some(text)
        }
        Some(text) => Some(text.to_string()),
    };
    let system = args.system.map(|s| Message::new("system", s));
    let Some(prompt) = prompt else {
        if args.json {
            bail!("--json wants a prompt: a chat has no single result");
        }
        if !templated {
            bail!(Error::NoTemplate { file: asker.engine.opened().source.path().to_path_buf() });
        }
        return chat(&mut asker, system);
    };
    if prompt.is_empty() && templated {
        bail!(Error::EmptyPrompt);
    }
    if !templated && system.is_some() {
        bail!(Error::NoTemplate { file: asker.engine.opened().source.path().to_path_buf() });
    }
    let tokens = if templated {
        let dialogue: Vec<Message> = system.into_iter().chain([Message::new("user", prompt)]).collect();
        asker.engine.encode_dialogue(&dialogue)?
    } else {
        if !args.raw {
            eprintln!("the model has no chat template: it continues the prompt as plain text");
        }
        asker.engine.encode(&prompt)?
    };
    let (answer, speculation) = asker.ask(tokens, !args.json)?;
    if args.json {
        return text::say_json(&json!({
            "draft": speculation.map(|s| json!({
                "proposed": s.proposed,
                "accepted": s.accepted,
                "acceptance": s.acceptance(),
                "checks": s.checks,
                "seconds": s.draft_time.as_secs_f64(),
            })),
            "text": answer.text,
            "tokens": answer.tokens,
            "finish": finish(answer.finish),
            "prompt_tokens": answer.prompt_tokens,
            "prompt_tokens_per_second": answer.prompt_rate(),
            "generated_tokens": answer.tokens.len(),
            "generated_tokens_per_second": answer.generation_rate(),
            "seed": asker.request.sampling.seed,
            "runs_on": asker.engine.describe(),
        }));
    }
    text::say("")?;
    report(&answer, speculation, &asker.request.sampling);
    Ok(())
}

/// What the answer must keep to.
fn grammar(json_schema: Option<&str>, file: Option<&Path>) -> anyhow::Result<Option<Grammar>> {
    let read = |file: &Path| {
        std::fs::read_to_string(file).with_context(|| format!("{}: cannot read it as text", file.display()))
    };
    if let Some(file) = file {
        return Ok(Some(Grammar::Lark(read(file)?)));
    }
    let Some(schema) = json_schema else { return Ok(None) };
    let (text, name) = match schema.trim_start().starts_with('{') {
        true => (schema.to_string(), "--json-schema"),
        false => (read(schema.as_ref())?, schema),
    };
    let schema = serde_json::from_str(&text).with_context(|| format!("{name}: the schema is not JSON"))?;
    Ok(Some(Grammar::JsonSchema(schema)))
}

impl Asker {
    /// Answers `prompt`, streaming to stdout if `stream`.
    fn ask(
        &mut self,
        mut prompt: Vec<u32>,
        stream: bool,
    ) -> anyhow::Result<(Generated, Option<Speculation>)> {
        let context = self.engine.context();
        if self.truncate && prompt.len() >= context {
            // Half of the context for the answer, or what was asked for.
            let answer = self.request.max_tokens.unwrap_or(context / 2).min(context / 2);
            let keep = context - answer;
            let bos = self.engine.tokenizer()?.bos().filter(|&bos| prompt.first() == Some(&bos));
            let dropped = prompt.len() - keep;
            prompt.drain(..dropped);
            if let Some(bos) = bos {
                prompt[0] = bos;
            }
            eprintln!("--truncate: the oldest {dropped} tokens of the prompt were dropped, {keep} are left");
        }
        self.request.prompt = prompt;
        STOPPED.store(false, Ordering::Relaxed);
        let mut closed = None;
        let mut on_text = |piece: &str| {
            let mut out = std::io::stdout();
            if stream && let Err(e) = out.write_all(piece.as_bytes()).and_then(|()| out.flush()) {
                closed = Some(e);
                return ControlFlow::Break(());
            }
            if STOPPED.load(Ordering::Relaxed) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let answer = match &mut self.speculator {
            Some(s) => {
                let (answer, speculation) = s.generate(&self.engine, &self.request, &mut on_text)?;
                (answer, Some(speculation))
            }
            None => {
                let (tokenizer, request) = (self.engine.tokenizer()?, &self.request);
                (generate(&mut self.runner, &mut self.sequence, tokenizer, request, &mut on_text)?, None)
            }
        };
        match closed {
            Some(e) => Err(e.into()),
            None => Ok(answer),
        }
    }
}

fn finish(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop => "stop",
        Finish::Length => "length",
        Finish::Context => "context",
        Finish::Cancelled => "cancelled",
        Finish::Rule => "grammar",
    }
}

/// Speeds, and why the answer ended if it did not end by itself; on stderr.
fn report(a: &Generated, speculation: Option<Speculation>, sampling: &Sampling) {
    let mut line = format!("prompt {} tokens, {:.0}/s", a.prompt_tokens, a.prompt_rate());
    if let Some(rate) = a.generation_rate() {
        line += &format!(" · answer {} tokens, {rate:.0}/s", a.tokens.len());
    }
    if let Some(s) = speculation
        && let Some(acceptance) = s.acceptance()
    {
        let (accepted, percent) = (s.accepted, 100.0 * acceptance);
        line += &format!(" · draft: {accepted} of {} tokens taken ({percent:.0}%)", s.proposed);
    }
    match a.finish {
        Finish::Stop => (),
        Finish::Length => line += " · cut at --max-tokens",
        Finish::Context => line += " · cut: the context is full",
        Finish::Cancelled => line += " · stopped",
        Finish::Rule => line += " · cut: it cannot go on within its grammar",
    }
    if sampling.temperature > 0.0 {
        line += &format!(" · seed {}", sampling.seed);
    }
    let (dim, plain) = if text::live() && text::coloured() { ("\x1b[2m", "\x1b[0m") } else { ("", "") };
    eprintln!("{dim}{line}{plain}");
}

/// Reads lines and answers them until the input ends.
fn chat(asker: &mut Asker, system: Option<Message>) -> anyhow::Result<()> {
    eprintln!(
        "Type a message; /clear forgets the dialogue, /exit or Ctrl-D ends it, Ctrl-C stops an answer."
    );
    let opening: Vec<Message> = system.into_iter().collect();
    let mut dialogue = opening.clone();
    loop {
        eprint!("\n> ");
        let mut line = String::new();
        STOPPED.store(false, Ordering::Relaxed);
        if std::io::stdin().lock().read_line(&mut line).context("standard input is not UTF-8 text")? == 0 {
            eprintln!();
            return Ok(());
        }
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" | "/bye" => return Ok(()),
            "/clear" => {
                dialogue.clone_from(&opening);
                continue;
            }
            command if command.starts_with('/') && !command.contains(' ') => {
                eprintln!("no command {command}; there are /clear and /exit");
                continue;
            }
            message => dialogue.push(Message::new("user", message)),
        }
        let answer =
            asker.engine.encode_dialogue(&dialogue).map_err(Into::into).and_then(|t| asker.ask(t, true));
        match answer {
            Ok((answer, speculation)) => {
                println!();
                report(&answer, speculation, &asker.request.sampling);
                // The next answer of the same seed would repeat itself.
                asker.request.sampling.seed = asker.request.sampling.seed.wrapping_add(1);
                dialogue.push(Message::new("assistant", answer.text));
            }
            // The dialogue outgrew the context, or the template refuses the message: the chat goes on without it.
            Err(e) if e.downcast_ref::<Error>().is_some() => {
                dialogue.pop();
                eprintln!("error: {e:#}\n(/clear starts a new dialogue)");
            }
            Err(e) => return Err(e),
        }
    }
}
