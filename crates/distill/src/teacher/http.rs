//! A server that speaks OpenAI's protocol as teacher.

use super::{Asked, Desk, Manner, Prompt, Reply, Teacher};
use crate::Error;
use crate::budget::Tokens;
use serde_json::{Value, json};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use ureq::tls::{Certificate, RootCerts, TlsConfig, TlsProvider};

/// Where the server is and how it is treated.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The address up to and with `/v1`.
    pub url: String,
    /// The model's name there.
    pub model: String,
    /// Sent as bearer token; never written anywhere.
    pub key: Option<String>,
    /// Attempts for each prompt.
    pub attempts: u32,
    /// The pause behind the first failed attempt; each further one is twice as long.
    pub back_off: Duration,
    /// Requests in a minute, at most.
    pub per_minute: Option<f64>,
    /// How long to wait for an answer.
    pub timeout: Duration,
}

/// The longest pause between two attempts, whatever a server asks for.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Bytes of an answer, at most.
const MAX_BODY: u64 = 16 << 20;

/// A server.
pub struct Server {
    options: Options,
    agent: ureq::Agent,
    /// When the next request may leave.
    slot: Mutex<Instant>,
}

/// What became of one attempt.
enum Attempt {
    Done(String, Option<Tokens>),
    /// Worth another attempt, behind a pause if the server asks for one.
    Again(String, Option<Duration>),
    Failed(String),
}

impl Server {
    /// A client of the server; nothing is sent yet.
    ///
    /// # Errors
    /// If the address is none.
    pub fn new(mut options: Options) -> Result<Server, Error> {
        let bad = |problem: &str| Error::setting("--teacher-url", format!("{:?} {problem}", options.url));
        if !options.url.starts_with("http://") && !options.url.starts_with("https://") {
            return Err(bad("is no address; give one such as https://api.openai.com/v1"));
        }
        if options.per_minute.is_some_and(|n| !n.is_finite() || n <= 0.0) {
            return Err(Error::setting("--per-minute", "must be above 0"));
        }
        let mut config = ureq::Agent::config_builder()
            .timeout_global(Some(options.timeout))
            // Statuses are read together with the server's own words.
            .http_status_as_error(false);
        if options.url.starts_with("https://") {
            config = config.tls_config(tls().map_err(|problem| bad(&problem))?);
        }
        options.url = options.url.trim_end_matches('/').to_string();
        Ok(Server { agent: config.build().into(), options, slot: Mutex::new(Instant::now()) })
    }

    fn request(&self, asked: &Asked, manner: &Manner) -> (String, Value) {
        let mut body = json!({
            "model": self.options.model,
            "max_tokens": manner.max_tokens,
            "temperature": manner.temperature,
            // Some servers read it as a signed number.
            "seed": asked.seed >> 1,
        });
        let route = match &asked.prompt {
            Prompt::Text(text) => {
                body["prompt"] = json!(text);
                body["stop"] = json!(["\nQ:"]);
                "completions"
            }
            Prompt::Dialogue(messages) => {
                body["messages"] = json!(messages);
                "chat/completions"
            }
        };
        (format!("{}/{route}", self.options.url), body)
    }

    /// Waits until a request may leave.
    fn wait(&self) {
        let Some(per_minute) = self.options.per_minute else { return };
        let every = Duration::from_secs_f64(60.0 / per_minute);
        let mine = {
            let mut slot = self.slot.lock().unwrap_or_else(|e| e.into_inner());
            let mine = (*slot).max(Instant::now());
            *slot = mine + every;
            mine
        };
        std::thread::sleep(mine.saturating_duration_since(Instant::now()));
    }

    fn attempt(&self, url: &str, body: &Value) -> Attempt {
        let mut request = self.agent.post(url).header("content-type", "application/json");
        if let Some(key) = &self.options.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let mut response = match request.send(body.to_string()) {
            Ok(response) => response,
            Err(ureq::Error::BadUri(e)) => return Attempt::Failed(format!("is no address: {e}")),
            Err(e) => return Attempt::Again(e.to_string(), None),
        };
        let status = response.status().as_u16();
        let pause = response.headers().get("retry-after").and_then(|v| v.to_str().ok()?.trim().parse().ok());
        let text = match response.body_mut().with_config().limit(MAX_BODY).read_to_string() {
            Ok(text) => text,
            Err(e) => return Attempt::Again(format!("its answer cannot be read: {e}"), None),
        };
        match status {
            200..=299 => read_answer(&text),
            // Busy, too many requests, or a fault that may pass.
            408 | 409 | 425 | 429 | 500..=599 => {
                let pause = pause.filter(|s: &f64| s.is_finite() && *s >= 0.0).map(Duration::from_secs_f64);
                Attempt::Again(format!("status {status}: {}", words(&text)), pause)
            }
            _ => Attempt::Failed(format!("status {status}: {}", words(&text))),
        }
    }

    /// One prompt, with as many attempts as are allowed.
    fn answer(&self, asked: &Asked, manner: &Manner) -> Result<Reply, Error> {
        let (url, body) = self.request(asked, manner);
        let fail = |problem: String| Error::Server { url: url.clone(), problem };
        let mut last = String::new();
        for n in 0..self.options.attempts.max(1) {
            self.wait();
            let pause = match self.attempt(&url, &body) {
                Attempt::Done(text, used) => {
                    let used = used.unwrap_or_else(|| Tokens {
                        prompt: estimate(&asked.prompt),
                        completion: estimate_text(&text),
                    });
                    return Ok(Reply { index: asked.index, text, used });
                }
                Attempt::Failed(problem) => return Err(fail(problem)),
                Attempt::Again(problem, pause) => {
                    last = problem;
                    // Up to a half more, differently for each prompt, so that they do not all come back at once.
                    let spread = 1.0 + (asked.seed.wrapping_add(u64::from(n)) % 1024) as f64 / 2048.0;
                    let own = self.options.back_off.mul_f64(f64::from(1_u32 << n.min(16)) * spread);
                    pause.unwrap_or(own).min(LONGEST_PAUSE)
                }
            };
            if n + 1 < self.options.attempts {
                std::thread::sleep(pause);
            }
        }
        Err(fail(format!("{last} ({} attempts)", self.options.attempts.max(1))))
    }
}

/// TLS for clients: certificates of the system, so that one's own count too; rustls for the rest.
///
/// # Errors
/// If the system has no certificates.
pub fn tls() -> Result<TlsConfig, String> {
    let found = rustls_native_certs::load_native_certs();
    let certificates: Vec<Certificate<'static>> =
        found.certs.iter().map(|c| Certificate::from_der(c.as_ref()).to_owned()).collect();
    if certificates.is_empty() {
        return Err("needs TLS, but the system has no certificates; install ca-certificates, or name a file in SSL_CERT_FILE".into());
    }
    Ok(TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .root_certs(RootCerts::Specific(Arc::new(certificates)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build())
}

/// A server's own words about what went wrong, short.
fn words(text: &str) -> String {
    let said = serde_json::from_str::<Value>(text)
        .ok()
        .and_then(|v| Some(v.get("error")?.get("message")?.as_str()?.to_string()))
        .unwrap_or_else(|| text.trim().to_string());
    said.chars().take(300).collect()
}

fn read_answer(text: &str) -> Attempt {
    let Ok(value) = serde_json::from_str::<Value>(text) else {
        return Attempt::Again(format!("its answer is not JSON: {}", words(text)), None);
    };
    let choice = &value["choices"][0];
    let content = choice["message"]["content"].as_str().or_else(|| choice["text"].as_str());
    let Some(content) = content else {
        return Attempt::Failed(format!("its answer has no text: {}", words(text)));
    };
    let usage = &value["usage"];
    let used = usage["prompt_tokens"]
        .as_u64()
        .zip(usage["completion_tokens"].as_u64())
        .map(|(prompt, completion)| Tokens { prompt, completion });
    Attempt::Done(content.to_string(), used)
}

/// A token has about four letters of English; three are assumed, so that estimates are on the high side.
fn estimate_text(text: &str) -> u64 {
    (text.len() as u64).div_ceil(3)
}

fn estimate(prompt: &Prompt) -> u64 {
    match prompt {
        Prompt::Text(text) => estimate_text(text),
        // A few tokens around each message.
        Prompt::Dialogue(messages) => messages.iter().map(|m| 8 + estimate_text(&m.content)).sum(),
    }
}

impl Teacher for Server {
    fn name(&self) -> String {
        format!("{} at {}", self.options.model, self.options.url)
    }

    fn most(&self, prompt: &Prompt, manner: &Manner) -> Result<Tokens, Error> {
        Ok(Tokens { prompt: estimate(prompt), completion: manner.max_tokens as u64 })
    }

    fn serve(&mut self, desk: &mut dyn Desk, manner: &Manner) -> Result<(), Error> {
        let server: &Server = self;
        std::thread::scope(|scope| {
            let (to_workers, jobs): (Sender<Asked>, Receiver<Asked>) = channel();
            let jobs = Arc::new(Mutex::new(jobs));
            let (done, replies) = channel();
            for _ in 0..manner.parallel.max(1) {
                let (jobs, done) = (jobs.clone(), done.clone());
                scope.spawn(move || {
                    loop {
                        let next = jobs.lock().unwrap_or_else(|e| e.into_inner()).recv();
                        let Ok(asked) = next else { return };
                        if done.send(server.answer(&asked, manner)).is_err() {
                            return;
                        }
                    }
                });
            }
            let mut open = 0;
            loop {
                while open < manner.parallel.max(1)
                    && let Some(asked) = desk.next()
                {
                    open += usize::from(to_workers.send(asked).is_ok());
                }
                if open == 0 {
                    return Ok(());
                }
                let reply = replies.recv().map_err(|_| Error::Server {
                    url: server.options.url.clone(),
                    problem: "all connections ended".into(),
                })?;
                open -= 1;
                match reply {
                    Ok(reply) => desk.take(vec![reply])?,
                    Err(e) => {
                        // What is under way was paid for: it is kept before the error is told.
                        drop(to_workers);
                        for reply in replies.iter().take(open).flatten() {
                            desk.take(vec![reply])?;
                        }
                        return Err(e);
                    }
                }
            }
        })
    }
}
