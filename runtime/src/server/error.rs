//! What can be wrong with a server's start, and with a request.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Json;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::chat::ChatError;
use crate::scheduler::Refused;

/// Why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Everybody on the network could ask.
    #[error(
        "{address}: expected a loopback address or an API key, found neither: everybody who reaches this machine could ask\n  help: give --api-key-file, or listen on 127.0.0.1"
    )]
    NoKey {
        /// As configured.
        address: SocketAddr,
    },
    /// A key that no header can carry.
    #[error(
        "API key {number}: expected visible ASCII characters, found {found}\n  help: make one with `openssl rand -hex 24`"
    )]
    Key {
        /// Counted from 1; the key itself is not shown.
        number: usize,
        /// What is wrong.
        found: &'static str,
    },
    /// An origin that no browser sends.
    #[error(
        "CORS origin: expected scheme://host or scheme://host:port without a path, or *, found {found:?}\n  help: write it as the browser's address line does, such as http://localhost:3000"
    )]
    Origin {
        /// As configured.
        found: String,
    },
    /// The address cannot be had.
    #[error("{address}: cannot listen there: {source}\n  help: choose another port, or stop what listens there")]
    Bind {
        /// As configured.
        address: SocketAddr,
        /// What the system says.
        source: io::Error,
    },
    /// It stopped by itself.
    #[error("the HTTP server stopped: {source}\n  help: start it again; the cause is above")]
    Serve {
        /// What the system says.
        source: io::Error,
    },
}

/// Of this module's functions.
pub(super) type Result<T> = std::result::Result<T, ApiError>;

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    pub status: StatusCode,
    kind: &'static str,
    pub message: String,
    param: Option<String>,
    code: Option<&'static str>,
    retry_after: Option<Duration>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> ApiError {
        ApiError { status, kind, message, param: None, code, retry_after: None }
    }

    fn invalid(status: StatusCode, code: Option<&'static str>, message: String) -> ApiError {
        ApiError::new(status, "invalid_request_error", code, message)
    }

    /// A field whose value cannot be taken.
    pub fn field(param: &str, reason: impl std::fmt::Display) -> ApiError {
        let error = ApiError::invalid(StatusCode::BAD_REQUEST, Some("invalid_value"), format!("{param}: {reason}"));
        ApiError { param: Some(param.to_owned()), ..error }
    }

    /// A field that asks for what cannot be done here.
    pub fn unsupported(param: &str, reason: impl std::fmt::Display) -> ApiError {
        ApiError { code: Some("unsupported_value"), ..ApiError::field(param, reason) }
    }

    /// A part of a message that is no text.
    pub fn part(place: &str, found: &str) -> ApiError {
        ChatError::UnsupportedPart { place: place.to_owned(), found: found.to_owned() }.into()
    }

    /// A body that is no JSON object.
    pub fn body(reason: impl std::fmt::Display) -> ApiError {
        ApiError::invalid(StatusCode::BAD_REQUEST, Some("invalid_json"), format!("request body: {reason}"))
    }

    pub fn body_too_long(bytes_max: usize) -> ApiError {
        let message = format!("request body: more than {bytes_max} bytes, which is the most that is accepted");
        ApiError::invalid(StatusCode::PAYLOAD_TOO_LARGE, Some("body_too_long"), message)
    }

    pub fn body_too_slow(within: Duration) -> ApiError {
        let message = format!("request body: not there within {} s", within.as_secs());
        ApiError::invalid(StatusCode::REQUEST_TIMEOUT, Some("body_too_slow"), message)
    }

    pub fn no_route(path: &str) -> ApiError {
        let message = format!("{path}: there is nothing here; GET /v1/models, POST /v1/chat/completions are");
        ApiError::invalid(StatusCode::NOT_FOUND, Some("unknown_url"), message)
    }

    pub fn no_method(method: &str, path: &str) -> ApiError {
        let message = format!("{path}: {method} is not allowed; see the Allow header");
        ApiError::invalid(StatusCode::METHOD_NOT_ALLOWED, Some("method_not_allowed"), message)
    }

    pub fn no_model(found: &str, name: &str) -> ApiError {
        let message = format!("model: found {found:?}, expected {name:?}, the one that is served here");
        let error = ApiError::invalid(StatusCode::NOT_FOUND, Some("model_not_found"), message);
        ApiError { param: Some("model".to_owned()), ..error }
    }

    pub fn no_key(found: &str) -> ApiError {
        let message = format!(
            "API key: {found}, expected one of this server's as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        );
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    pub fn origin(found: &str) -> ApiError {
        let message = format!("Origin {found:?}: pages from there may not ask; the server's --cors-origin lets them");
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", Some("origin_not_allowed"), message)
    }

    pub fn context(param: &str, prompt: usize, context: usize) -> ApiError {
        let message = format!(
            "{param}: prompt is too long: {prompt} tokens > {} maximum, because an answer needs room too: this model's maximum context length is {context} tokens",
            context.saturating_sub(1)
        );
        let error = ApiError::invalid(StatusCode::BAD_REQUEST, Some("context_length_exceeded"), message);
        ApiError { param: Some(param.to_owned()), ..error }
    }

    /// What the scheduler does not take.
    pub fn refused(refused: Refused, param: &str, prompt: usize) -> ApiError {
        match refused {
            Refused::TooLong { context } => ApiError::context(param, prompt, context),
            Refused::Draining => ApiError::draining(),
            Refused::Full { retry_after } => {
                let message = "as many requests wait as may; ask again later".to_owned();
                let kind = "rate_limit_error";
                let error = ApiError::new(StatusCode::TOO_MANY_REQUESTS, kind, Some("queue_full"), message);
                ApiError { retry_after: Some(retry_after), ..error }
            }
        }
    }

    pub fn draining() -> ApiError {
        let message = "the server ends or starts again; ask again later".to_owned();
        let error = ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("shutting_down"), message);
        ApiError { retry_after: Some(Duration::from_secs(10)), ..error }
    }

    pub fn ended() -> ApiError {
        let message = "nothing computes any more: the server must be started again".to_owned();
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "server_error", Some("ended"), message)
    }

    pub fn failed(reason: impl std::fmt::Display) -> ApiError {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "server_error", Some("failed"), format!("the answer failed: {reason}"))
    }

    pub fn late() -> ApiError {
        let message = "the answer was not ready within the time that this server gives".to_owned();
        ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", Some("deadline"), message)
    }

    pub fn json(&self) -> Value {
        let ApiError { kind, message, param, code, .. } = self;
        json!({"error": {"message": message, "type": kind, "param": param, "code": code}})
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> ApiError {
        let message = error.to_string();
        let param = match error {
            ChatError::NoMessages => "messages".to_owned(),
            ChatError::UnsupportedEffort { .. } => "reasoning_effort".to_owned(),
            ChatError::Missing { place, .. }
            | ChatError::WrongType { place, .. }
            | ChatError::UnknownRole { place, .. }
            | ChatError::UnknownTask { place, .. }
            | ChatError::UnsupportedPart { place, .. } => place,
        };
        let error = ApiError::invalid(StatusCode::BAD_REQUEST, Some("invalid_value"), message);
        ApiError { param: Some(param), ..error }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.json())).into_response();
        // For routes that tell it in another form.
        response.extensions_mut().insert(self.clone());
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil() as u64));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.status == StatusCode::GATEWAY_TIMEOUT {
            // Clients of the OpenAI kind would ask again at once, for the same time in vain.
            headers.insert(HeaderName::from_static("x-should-retry"), HeaderValue::from_static("false"));
        }
        response
    }
}
