//! Paths, keys and limits.

use crate::error::ApiError;
use crate::metrics::Metrics;
use crate::worker::Worker;
use crate::{Config, chat, completion};
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use sparsam_engine::{Engine, Rule};
use sparsam_grammar::{Grammar, Grammars};
use sparsam_tokenizer::Specials;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

/// What handlers share.
pub(crate) struct App {
    pub engine: Arc<Engine>,
    pub config: Config,
    pub worker: Worker,
    pub metrics: Arc<Metrics>,
    /// Made when the first grammar is asked for.
    pub grammars: OnceLock<Grammars>,
}

impl App {
    /// Makes `grammar` ready, away from the thread that serves the others.
    pub async fn rule(self: Arc<App>, grammar: Grammar) -> Result<Box<dyn Rule>, ApiError> {
        let compile = move || {
            let wrong = |e: sparsam_grammar::Error| ApiError::invalid("response_format", e.to_string());
            let grammars = match self.grammars.get() {
                Some(grammars) => grammars,
                None => {
                    let vocab_size = self.engine.model().facts().vocab_size;
                    let made = Grammars::new(self.engine.tokenizer()?, vocab_size).map_err(wrong)?;
                    self.grammars.get_or_init(|| made)
                }
            };
            grammars.compile(&grammar).map_err(wrong)
        };
        let failed = |_| ApiError::invalid("response_format", "the grammar cannot be used");
        tokio::task::spawn_blocking(compile).await.map_err(failed)?
    }

    /// A name that no other response has.
    pub fn new_id(&self, prefix: &str) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let nanos = SystemTime::UNIX_EPOCH.elapsed().map_or(0, |d| d.as_nanos() as u64);
        format!("{prefix}-{nanos:016x}{:06x}", NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

pub(crate) fn router(app: App) -> Router {
    let limit = DefaultBodyLimit::max(app.config.max_body);
    let app = Arc::new(app);
    let guarded = Router::new()
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(one_model))
        .route("/v1/embeddings", post(embeddings))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .layer(middleware::from_fn_with_state(app.clone(), check_key));
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/props", get(props))
        .merge(guarded)
        .fallback(async || {
            ApiError::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                "no such path; see / for the page and /v1/models for the API",
            )
        })
        .layer(limit)
        .layer(middleware::from_fn(harden))
        .with_state(app)
}

/// Nothing here is to be framed, sniffed or kept.
pub(crate) async fn harden(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    response
}

async fn check_key(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let Some(key) = &app.config.api_key else { return next.run(request).await };
    let given = request.headers().get(header::AUTHORIZATION).map_or(&b""[..], |h| h.as_bytes());
    let given = given.strip_prefix(b"Bearer ").unwrap_or_default();
    // Takes the same time wherever the two differ.
    let differs = key.bytes().zip(given).fold(u8::from(key.len() != given.len()), |d, (a, b)| d | (a ^ b));
    if differs != 0 {
        let message = "a key is wanted: send the header Authorization: Bearer KEY";
        return ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message).into_response();
    }
    next.run(request).await
}

/// A body that is JSON, whatever its content type says.
fn json_body(body: Result<Bytes, axum::extract::rejection::BytesRejection>) -> Result<Value, ApiError> {
    let body = body.map_err(|e| ApiError::new(e.status(), "invalid_request_error", e.body_text()))?;
    let value: Value = serde_json::from_slice(&body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not JSON: {e}")))?;
    if !value.is_object() {
        return Err(ApiError::invalid(None, "the body is JSON, but no object"));
    }
    Ok(value)
}

type Body = Result<Bytes, axum::extract::rejection::BytesRejection>;

async fn chat_completions(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    chat::handle(app, json_body(body)?).await
}

async fn completions(State(app): State<Arc<App>>, body: Body) -> Result<Response, ApiError> {
    completion::handle(app, json_body(body)?).await
}

async fn embeddings() -> ApiError {
    let message = "this model generates text and gives no embeddings";
    ApiError::new(StatusCode::NOT_IMPLEMENTED, "invalid_request_error", message)
}

fn model(app: &App) -> Value {
    let facts = app.engine.model().facts();
    json!({
        "id": app.config.model, "object": "model", "created": 0, "owned_by": "sparsam",
        "meta": {
            "architecture": facts.architecture,
            "n_vocab": facts.vocab_size,
            "n_ctx_train": facts.context_length,
            "n_ctx": app.engine.context(),
            "n_params": app.engine.model().n_parameters().ok(),
            "size": app.engine.weights().bytes(),
        },
    })
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [model(&app)]}))
}

async fn one_model(
    State(app): State<Arc<App>>,
    axum::extract::Path(id): axum::extract::Path<String>,
) -> Result<Json<Value>, ApiError> {
    if id != app.config.model {
        let message = format!("no model {id:?} here; there is {:?}", app.config.model);
        return Err(ApiError::new(StatusCode::NOT_FOUND, "invalid_request_error", message));
    }
    Ok(Json(model(&app)))
}

/// llama.cpp's: `content` to ids, with special tokens if `add_special`, and texts if `with_pieces`.
async fn tokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = json_body(body)?;
    let text = body.get("content").or(body.get("prompt")).and_then(Value::as_str);
    let Some(text) = text else { return Err(ApiError::invalid("content", "content, the text, is missing")) };
    let flag = |name: &str, default| body.get(name).and_then(Value::as_bool).unwrap_or(default);
    let specials = Specials { add: flag("add_special", false), parse: flag("parse_special", true) };
    let tokenizer = app.engine.tokenizer()?;
    let ids = tokenizer.encode(text, specials).map_err(|e| app.engine.tokenizer_error(e))?;
    if !flag("with_pieces", false) {
        return Ok(Json(json!({"tokens": ids})));
    }
    let piece = |&id: &u32| {
        let bytes = tokenizer.token_bytes(id).unwrap_or_default();
        match String::from_utf8(bytes) {
            Ok(text) => json!({"id": id, "piece": text}),
            Err(e) => json!({"id": id, "piece": e.into_bytes()}),
        }
    };
    Ok(Json(json!({"tokens": ids.iter().map(piece).collect::<Vec<_>>()})))
}

async fn detokenize(State(app): State<Arc<App>>, body: Body) -> Result<Json<Value>, ApiError> {
    let body = json_body(body)?;
    let ids: Option<Vec<u32>> = body.get("tokens").and_then(|t| serde_json::from_value(t.clone()).ok());
    let Some(ids) = ids else { return Err(ApiError::invalid("tokens", "tokens, a list of ids, is missing")) };
    Ok(Json(json!({"content": app.engine.tokenizer()?.decode(&ids, false)})))
}

async fn health() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4");
    ([(header::CONTENT_TYPE, kind)], app.metrics.text()).into_response()
}

/// What the page shows of the model.
async fn props(State(app): State<Arc<App>>) -> Json<Value> {
    let mut value = model(&app);
    value["runs_on"] = app.engine.describe().into();
    value["key_wanted"] = app.config.api_key.is_some().into();
    value["chat"] = app.engine.tokenizer().is_ok_and(|t| t.chat_template().is_some()).into();
    Json(value)
}

/// What a page may load: nothing from elsewhere, it is one file.
pub(crate) const PAGE_POLICY: &str = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:";

async fn page() -> Response {
    let policy = HeaderValue::from_static(PAGE_POLICY);
    ([(header::CONTENT_SECURITY_POLICY, policy)], Html(include_str!("page.html"))).into_response()
}
