//! From a request to its response: whole, or as a stream of events.

use crate::error::ApiError;
use crate::metrics::add;
use crate::routes::App;
use crate::wire::Wanted;
use crate::worker::{Ask, Event};
use axum::Json;
use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde_json::{Value, json};
use sparsam_engine::{Finish, Logprob, Request};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::time::Instant;

/// How one kind of completion is written.
pub(crate) trait Format: Send + 'static {
    /// The whole response from the finished answers.
    fn whole(&self, head: &Head, answers: &[Collected], usage: Value) -> Value;
    /// Chunks before the first token of each answer.
    fn opening(&self, head: &Head, index: usize) -> Option<Value>;
    /// The chunk of one token. An answer whose text is not to be streamed gives `None` but for its last.
    fn chunk(&mut self, head: &Head, piece: &Piece) -> Option<Value>;
    /// The last chunk of a stream whose client wants to know the cost.
    fn usage(&self, head: &Head, usage: Value) -> Value;
}

/// What all chunks of a response repeat.
pub(crate) struct Head {
    pub id: String,
    pub created: u64,
    pub model: String,
}

/// One token of one answer.
pub(crate) struct Piece {
    pub index: usize,
    pub token: u32,
    pub text: String,
    pub logprob: Option<Logprob>,
    pub finish: Option<&'static str>,
}

/// One answer, finished.
#[derive(Default)]
pub(crate) struct Collected {
    pub text: String,
    pub logprobs: Vec<(u32, Logprob)>,
    pub finish: &'static str,
}

fn finish_name(finish: Finish) -> &'static str {
    match finish {
        Finish::Stop | Finish::Cancelled => "stop",
        // An answer that fails in its rule ends in an error before it comes here.
        Finish::Length | Finish::Context | Finish::Rule => "length",
    }
}

/// Answers on their way: receives until all are finished or the time is over.
struct Receiving {
    events: UnboundedReceiver<Event>,
    deadline: Instant,
    timeout: Duration,
    open: usize,
    usage: Usage,
}

#[derive(Default)]
struct Usage {
    prompt: usize,
    completion: usize,
    cached: usize,
}

impl Usage {
    fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        })
    }
}

impl Receiving {
    /// The next token; `None` once all answers are finished.
    async fn next(&mut self, app: &App) -> Result<Option<Piece>, ApiError> {
        if self.open == 0 {
            return Ok(None);
        }
        let Ok(event) = tokio::time::timeout_at(self.deadline, self.events.recv()).await else {
            add(&app.metrics.cancelled, self.open);
            let message = format!("the answer took longer than {} seconds", self.timeout.as_secs());
            return Err(ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message));
        };
        match event {
            Some(Event::Token { index, token, text, logprob, finish, reused }) => {
                self.usage.completion += 1;
                self.usage.cached += reused;
                if finish.is_some() {
                    self.open -= 1;
                }
                Ok(Some(Piece { index, token, text, logprob, finish: finish.map(finish_name) }))
            }
            Some(Event::Failed(e)) => Err(e),
            None => {
                let message = "the model has stopped; restart the server";
                Err(ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message))
            }
        }
    }
}

/// Answers `prompts`, each `wanted.n` times, in the given format.
pub(crate) async fn respond(
    app: Arc<App>,
    prefix: &str,
    prompts: Vec<Vec<u32>>,
    wanted: Wanted,
    n_logprobs: Option<usize>,
    format: impl Format,
) -> Result<Response, ApiError> {
    let created = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_secs());
    let head = Head { id: app.new_id(prefix), created, model: app.config.model.clone() };
    let rule = match wanted.grammar.clone() {
        Some(grammar) => Some(app.clone().rule(grammar).await?),
        None => None,
    };
    let (sender, events) = unbounded_channel();
    let mut asks = Vec::new();
    let mut usage = Usage::default();
    for prompt in &prompts {
        usage.prompt += prompt.len();
        for _ in 0..wanted.n {
            let index = asks.len();
            let mut sampling = wanted.sampling.clone();
            sampling.seed = sampling.seed.wrapping_add(index as u64);
            let request = Request {
                prompt: prompt.clone(),
                sampling,
                max_tokens: wanted.max_tokens,
                stops: wanted.stops.clone(),
                ignore_end: wanted.ignore_end,
                rule: rule.clone(),
            };
            let events = sender.clone();
            asks.push(Ask { request, n_logprobs, index, stream: wanted.stream, events });
        }
    }
    drop(sender);
    let open = asks.len();
    app.worker.submit(asks)?;
    let timeout = app.config.timeout;
    let mut receiving = Receiving { events, deadline: Instant::now() + timeout, timeout, open, usage };
    // The first token decides the status: what is refused is refused with its own.
    let first = receiving.next(&app).await?;

    if !wanted.stream {
        let mut answers: Vec<Collected> = (0..open).map(|_| Collected::default()).collect();
        let mut piece = first;
        while let Some(p) = piece {
            let answer = &mut answers[p.index];
            answer.text += &p.text;
            answer.logprobs.extend(p.logprob.map(|l| (p.token, l)));
            answer.finish = p.finish.unwrap_or(answer.finish);
            piece = receiving.next(&app).await?;
        }
        return Ok(Json(format.whole(&head, &answers, receiving.usage.json())).into_response());
    }

    let opening: String =
        (0..open).filter_map(|i| format.opening(&head, i)).map(|chunk| event(&chunk)).collect();
    let state = (app, receiving, format, head, Some((opening, first)), false);
    let stream =
        stream::unfold(state, move |(app, mut receiving, mut format, head, begin, done)| async move {
            if done {
                return None;
            }
            let (mut out, next) = match begin {
                Some((opening, first)) => (opening, Ok(first)),
                None => (String::new(), receiving.next(&app).await),
            };
            let done = match next {
                Ok(Some(piece)) => {
                    out.extend(format.chunk(&head, &piece).map(|chunk| event(&chunk)));
                    false
                }
                Ok(None) => {
                    if wanted.stream_usage {
                        out += &event(&format.usage(&head, receiving.usage.json()));
                    }
                    out += "data: [DONE]\n\n";
                    true
                }
                Err(e) => {
                    out += &event(&e.body());
                    true
                }
            };
            Some((Ok::<_, Infallible>(out), (app, receiving, format, head, None, done)))
        });
    let mut response = Body::from_stream(stream).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    Ok(response)
}

/// A server-sent event.
fn event(chunk: &Value) -> String {
    format!("data: {chunk}\n\n")
}
