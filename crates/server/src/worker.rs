//! The one thread that owns the model.

use crate::error::ApiError;
use crate::metrics::{Metrics, add, set};
use axum::http::StatusCode;
use sparsam_engine::{Batcher, Engine, Error, Finish, JobId, Logprob, Request};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;
use tokio::sync::mpsc::UnboundedSender;

/// What a client gets of one of its answers.
#[derive(Debug)]
pub(crate) enum Event {
    Token {
        index: usize,
        token: u32,
        text: String,
        logprob: Option<Logprob>,
        finish: Option<Finish>,
        reused: usize,
    },
    /// The answer ends without a result.
    Failed(ApiError),
}

/// One answer that is asked for. When the receiver of `events` is dropped, the answer is cancelled.
pub(crate) struct Ask {
    pub request: Request,
    pub n_logprobs: Option<usize>,
    /// Which of the client's answers it is.
    pub index: usize,
    /// Each token at once. Otherwise all come together with the last: waking the client's thread for every token takes
    /// time from the kernels.
    pub stream: bool,
    pub events: UnboundedSender<Event>,
}

/// A handle to the thread, which ends when the last handle is dropped.
#[derive(Clone)]
pub(crate) struct Worker {
    asks: Sender<Ask>,
    metrics: Arc<Metrics>,
    queue: usize,
}

struct Client {
    index: usize,
    stream: bool,
    held: Vec<Event>,
    events: UnboundedSender<Event>,
    since: Instant,
}

impl Worker {
    pub fn start(
        engine: &Engine,
        parallel: usize,
        queue: usize,
        metrics: Arc<Metrics>,
    ) -> Result<Worker, Error> {
        let batcher = Batcher::new(engine, parallel)?;
        let (asks, receiver) = channel();
        let shared = metrics.clone();
        std::thread::spawn(move || run(batcher, receiver, &shared));
        Ok(Worker { asks, metrics, queue })
    }

    /// Hands the answers of one client over, or refuses them all if too many wait.
    pub fn submit(&self, asks: Vec<Ask>) -> Result<(), ApiError> {
        let waiting = &self.metrics.waiting;
        let waiting =
            (waiting.load(Ordering::Relaxed) + self.metrics.unseen.load(Ordering::Relaxed)) as usize;
        if waiting + asks.len() > self.queue.max(asks.len()) {
            add(&self.metrics.refused, asks.len());
            let message = format!("{waiting} requests wait already; try again later");
            return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "overloaded_error", message));
        }
        add(&self.metrics.requests, asks.len());
        // Counted at once, so that a burst between two steps of the worker is seen.
        add(&self.metrics.unseen, asks.len());
        for ask in asks {
            self.asks.send(ask).map_err(|_| stopped())?;
        }
        Ok(())
    }
}

fn stopped() -> ApiError {
    ApiError::new(
        StatusCode::INTERNAL_SERVER_ERROR,
        "server_error",
        "the model has stopped; restart the server",
    )
}

fn run(mut batcher: Batcher, asks: Receiver<Ask>, metrics: &Metrics) {
    let mut clients: HashMap<JobId, Client> = HashMap::new();
    let accept = |batcher: &mut Batcher, clients: &mut HashMap<JobId, Client>, ask: Ask| {
        metrics.unseen.fetch_sub(1, Ordering::Relaxed);
        add(&metrics.prompt_tokens, ask.request.prompt.len());
        match batcher.submit(ask.request, ask.n_logprobs) {
            Ok(id) => {
                let Ask { index, stream, events, .. } = ask;
                clients.insert(id, Client { index, stream, held: Vec::new(), events, since: Instant::now() });
            }
            // A client that is gone needs no answer.
            Err(e) => drop(ask.events.send(Event::Failed(e.into()))),
        }
    };
    loop {
        let (active, waiting) = batcher.load();
        if active + waiting == 0 {
            publish(&batcher, metrics);
            let Ok(ask) = asks.recv() else { return };
            accept(&mut batcher, &mut clients, ask);
        }
        while let Ok(ask) = asks.try_recv() {
            accept(&mut batcher, &mut clients, ask);
        }
        let gone: Vec<JobId> =
            clients.iter().filter(|(_, c)| c.events.is_closed()).map(|(&id, _)| id).collect();
        for id in gone {
            batcher.cancel(id);
            clients.remove(&id);
            add(&metrics.cancelled, 1);
        }
        batcher.admit();
        publish(&batcher, metrics);
        match batcher.step() {
            Ok(outputs) => {
                for o in outputs {
                    let Some(client) = clients.get_mut(&o.id) else { continue };
                    let Some(token) = o.token else {
                        let message =
                            "the answer cannot go on within response_format: it takes too much work";
                        let failed = Event::Failed(ApiError::invalid("response_format", message));
                        let _ = client.events.send(failed);
                        clients.remove(&o.id);
                        continue;
                    };
                    add(&metrics.generated_tokens, 1);
                    if let Some(reused) = o.reused {
                        add(&metrics.reused_tokens, reused);
                        metrics.first_token(client.since.elapsed());
                    }
                    let (index, reused) = (client.index, o.reused.unwrap_or(0));
                    let event = Event::Token {
                        index,
                        token,
                        text: o.text,
                        logprob: o.logprob,
                        finish: o.finish,
                        reused,
                    };
                    client.held.push(event);
                    if client.stream || o.finish.is_some() {
                        // A closed channel is seen before the next step.
                        client.held.drain(..).for_each(|event| drop(client.events.send(event)));
                    }
                    if o.finish.is_some() {
                        clients.remove(&o.id);
                    }
                }
            }
            Err(e) => {
                // Nothing of this step can be trusted: every client is told, and the next ones start afresh.
                let message = format!("the model failed: {e}");
                for (id, client) in clients.drain() {
                    batcher.cancel(id);
                    let error =
                        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message.clone());
                    let _ = client.events.send(Event::Failed(error));
                }
            }
        }
    }
}

fn publish(batcher: &Batcher, metrics: &Metrics) {
    let (active, waiting) = batcher.load();
    let (free, size) = batcher.cache();
    set(&metrics.active, active);
    set(&metrics.waiting, waiting);
    set(&metrics.cache_free, free);
    set(&metrics.cache_size, size);
}
