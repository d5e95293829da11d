//! What goes wrong, for whoever starts the server and for its clients.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::net::SocketAddr;

/// Why the server does not start or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the fields are what the messages say
pub enum Error {
    /// The model cannot be run.
    #[error(transparent)]
    Engine(#[from] sparsam_engine::Error),
    /// The port is taken or not allowed.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen { address: SocketAddr, source: std::io::Error },
    /// The system refuses threads or sockets.
    #[error("the server's runtime failed: {0}")]
    Runtime(std::io::Error),
}

/// An error as OpenAI's clients read it.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub kind: &'static str,
    pub message: String,
    pub param: Option<&'static str>,
}

impl ApiError {
    /// The request is wrong in `param`, or as a whole.
    pub fn invalid(param: impl Into<Option<&'static str>>, message: impl Into<String>) -> ApiError {
        let (kind, message) = ("invalid_request_error", message.into());
        ApiError { status: StatusCode::BAD_REQUEST, kind, message, param: param.into() }
    }

    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError { status, kind, message: message.into(), param: None }
    }

    pub fn body(&self) -> serde_json::Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": null}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            response.headers_mut().insert("retry-after", axum::http::HeaderValue::from_static("1"));
        }
        response
    }
}

/// What the engine refuses is the request's fault, unless a kernel failed.
impl From<sparsam_engine::Error> for ApiError {
    fn from(e: sparsam_engine::Error) -> ApiError {
        match e {
            sparsam_engine::Error::Runtime(_) => {
                ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", e.to_string())
            }
            e => ApiError::invalid(None, e.to_string()),
        }
    }
}
