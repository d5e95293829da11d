//! An OpenAI-compatible HTTP server: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, `/tokenize`,
//! `/detokenize`, `/health`, `/metrics`, and a page to chat at `/`.
//!
//! One thread owns the model and answers all requests together (`worker.rs`); HTTP runs beside it on a small runtime
//! (`routes.rs`). A client that goes away takes its request with it. Start reading at [`serve`].
#![forbid(unsafe_code)]

mod answer;
mod chat;
mod completion;
mod dashboard;
mod error;
mod metrics;
mod routes;
mod wire;
mod worker;

pub use dashboard::dashboard;
pub use error::Error;

use sparsam_engine::Engine;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// What a server allows and where it listens.
#[derive(Clone, Debug)]
pub struct Config {
    /// Address and port; port 0 takes any free one. Loopback unless the user says otherwise.
    pub address: SocketAddr,
    /// The model's name in answers.
    pub model: String,
    /// Requests under `/v1`, `/tokenize` and `/detokenize` must carry this key (`Authorization: Bearer KEY`).
    pub api_key: Option<String>,
    /// Requests that are answered at the same time.
    pub parallel: usize,
    /// Requests that may wait for a place; more are refused with 503.
    pub queue: usize,
    /// Bytes of a request's body.
    pub max_body: usize,
    /// Time that a request may take, waiting included.
    pub timeout: Duration,
}

impl Config {
    /// The defaults for a model of this name: loopback port 8080, 8 places, 64 waiting, 4 MiB, 10 minutes.
    pub fn new(model: &str) -> Config {
        Config {
            address: ([127, 0, 0, 1], 8080).into(),
            model: model.to_string(),
            api_key: None,
            parallel: 8,
            queue: 64,
            max_body: 4 << 20,
            timeout: Duration::from_secs(600),
        }
    }
}

/// Serves `engine` until `stop` is ready; then finishes the requests that run and returns. `on_ready` gets the address
/// that it listens on.
///
/// # Errors
/// If the address cannot be had, the model has no tokenizer, or its cache is not possible.
pub fn serve(
    engine: Engine,
    config: Config,
    stop: impl Future<Output = ()> + Send + 'static,
    on_ready: impl FnOnce(SocketAddr),
) -> Result<(), Error> {
    let engine = Arc::new(engine);
    let metrics = Arc::new(metrics::Metrics::default());
    let worker = worker::Worker::start(&engine, config.parallel, config.queue, metrics.clone())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(Error::Runtime)?;
    let address = config.address;
    runtime.block_on(async move {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .map_err(|source| Error::Listen { address, source })?;
        on_ready(listener.local_addr().map_err(Error::Runtime)?);
        let app = routes::router(routes::App { engine, config, worker, metrics, grammars: OnceLock::new() });
        axum::serve(listener, app).with_graceful_shutdown(stop).await.map_err(Error::Runtime)
    })
}

/// Ends a server from any thread.
pub struct Stop(tokio::sync::watch::Sender<bool>);

impl Stop {
    /// The server takes no more requests, finishes those that run, and returns.
    pub fn stop(&self) {
        // Nobody listens any more: it has ended already.
        let _ = self.0.send(true);
    }
}

/// A way to end a server, and what to pass to [`serve`] for it. Dropping the former ends it too.
pub fn stopper() -> (Stop, impl Future<Output = ()> + Send + 'static) {
    let (sender, mut receiver) = tokio::sync::watch::channel(false);
    let stopped = async move {
        let _ = receiver.wait_for(|&stop| stop).await;
    };
    (Stop(sender), stopped)
}
