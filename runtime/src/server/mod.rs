//! The HTTP server: requests in the forms of the OpenAI and Anthropic APIs become jobs of the scheduler, their events
//! replies.
//!
//! ```text
//! access.rs ─▶ body.rs ─▶ chat.rs, completions.rs ─▶ ask.rs ─▶ answers.rs ─▶ job … events ─▶ choice.rs ─▶ reply.rs
//!  who may      JSON      messages.rs, responses.rs   how       submit                        text, calls    sse.rs
//!                          prompt tokens
//! ```
//!
//! Owns the shapes of requests and replies, and what a client may ask for. A reply that nobody reads any more drops
//! its receivers, and that cancels its jobs: there is no task that outlives a connection. Every error, whatever its
//! cause, is an `error` object, in the form of the route's API. Text of a request reaches the model only as text, never as control tokens.
//!
//! Absent on purpose: TLS (that is a proxy's), `/version` (clients take it for another server's), images, grammars.

mod access;
mod answers;
mod app;
mod ask;
mod blocks;
mod body;
mod chat;
mod chat_reply;
mod choice;
mod chunks;
mod completion_reply;
mod completions;
mod error;
mod fields;
mod logprobs;
mod messages;
mod messages_error;
mod messages_reply;
mod metrics;
mod models;
mod page;
mod reply;
mod responses;
mod responses_reply;
mod sse;
mod stats;
mod stop;
#[cfg(test)]
mod tests;
mod turns;
mod usage;

use std::future::{Future, IntoFuture};
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{Method, Uri};
use axum::middleware::{from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::ListenerExt;
use axum::{Router, serve as serve_http};
use dsv4_model::ModelConfig;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::chat::Profile;
use crate::sample::Sampling;
use crate::scheduler::Scheduler;
use crate::tokenizer::Tokenizer;

use app::App;
pub use error::ServerError;
use error::{ApiError, Result};

/// After the last job has ended: how long slow readers may take for what is already written.
const WRITE_WITHIN: Duration = Duration::from_secs(10);
/// After that: how long connections may take to close.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);

/// How to serve.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// Where to listen; port 0 takes any free one.
    pub address: SocketAddr,
    /// Whoever sends one of these is let in; if there are none, everybody.
    pub api_keys: Vec<String>,
    /// Origins of web pages that may ask, as browsers spell them (`http://localhost:3000`), or `*`.
    pub cors_origins: Vec<String>,
    /// Most drafts a step.
    pub draft: usize,
    /// Of requests that do not say; its seed is not used.
    pub sampling: Sampling,
    /// Whether conversations that do not say ask for reasoning.
    pub thinking: bool,
    /// Longest that an answer may take, from request to end.
    pub answer_within: Option<Duration>,
    /// Longest body of a request.
    pub body_bytes_max: usize,
    /// How often a stream that has nothing to say says so.
    pub keep_alive: Duration,
}

impl ServerConfig {
    /// The defaults of the API, at an address.
    pub fn new(address: SocketAddr) -> ServerConfig {
        ServerConfig {
            address,
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            draft: 0,
            sampling: Sampling { temperature: 1.0, ..Sampling::GREEDY },
            thinking: true,
            answer_within: None,
            body_bytes_max: 64 << 20,
            keep_alive: Duration::from_secs(5),
        }
    }
}

/// What is served.
#[derive(Debug)]
pub struct ModelInfo {
    /// Of the artifact.
    pub tokenizer: Arc<Tokenizer>,
    /// Of the artifact.
    pub config: ModelConfig,
    /// The release's chat format.
    pub profile: Profile,
    /// What clients are told to call it.
    pub name: String,
    /// Other names that they may use.
    pub aliases: Vec<String>,
    /// The published model's name, for clients that look for its tokenizer.
    pub root: String,
    /// The artifact's id.
    pub artifact: String,
    /// What computes.
    pub backend: Value,
    /// In which arithmetic.
    pub numerics: Value,
}

/// A server that has its address, and answers nobody yet.
#[derive(Debug)]
pub struct Bound {
    config: ServerConfig,
    listener: TcpListener,
    address: SocketAddr,
}

/// Takes the address. Within a tokio runtime.
///
/// Errors: an address that others can reach without a key for them; keys or origins that no request can have;
/// whatever the system says.
pub async fn bind(config: ServerConfig) -> std::result::Result<Bound, ServerError> {
    access::check(&config)?;
    let bind = |source| ServerError::Bind { address: config.address, source };
    let listener = TcpListener::bind(config.address).await.map_err(bind)?;
    let address = listener.local_addr().map_err(bind)?;
    Ok(Bound { config, listener, address })
}

impl Bound {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Answers requests. When `shutdown` comes nothing new is taken, what runs ends, then this returns; dropped, it
    /// stops at once.
    pub async fn serve(
        self,
        model: Arc<ModelInfo>,
        scheduler: Scheduler,
        shutdown: impl Future<Output = ()>,
    ) -> std::result::Result<(), ServerError> {
        let app = Arc::new(App::new(self.config, model, scheduler));
        // Without this, Nagle's algorithm holds small writes back for tens of milliseconds.
        let listener = self.listener.tap_io(|stream| {
            let _ = stream.set_nodelay(true);
        });
        let (close, closed) = oneshot::channel::<()>();
        let serving = serve_http(listener, router(app.clone())).with_graceful_shutdown(async {
            let _ = closed.await;
        });
        let mut serving = pin!(serving.into_future());
        let ending = async {
            shutdown.await;
            app.drain();
            nothing_runs(&app).await;
        };
        tokio::select! {
            ended = &mut serving => return ended.map_err(|source| ServerError::Serve { source }),
            () = ending => drop(close),
        }
        // A client that has sent half a request holds its connection open: it is not waited for.
        let _ = tokio::time::timeout(CLOSE_WITHIN, serving).await;
        Ok(())
    }
}

/// Waits until every answer is written, or its reader has had time enough.
async fn nothing_runs(app: &App) {
    let mut since = None;
    while app.answering() > 0 {
        let now = app.scheduler.counters().snapshot();
        if now.waiting + now.running > 0 {
            since = None;
        } else if since.get_or_insert_with(Instant::now).elapsed() > WRITE_WITHIN {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/messages", post(messages::messages))
        .route("/v1/messages/count_tokens", post(messages::count_tokens))
        .route("/v1/responses", post(responses::responses))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{*id}", get(models::one))
        .route("/tokenize", post(models::tokenize))
        .route("/detokenize", post(models::detokenize))
        .route("/health", get(health))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics::metrics))
        .route("/stats", stats::route())
        .route("/", get(page::page))
        .fallback(unknown)
        .method_not_allowed_fallback(method)
        .layer(from_fn_with_state(app.clone(), access::guard))
        .layer(from_fn(messages_error::shape))
        .with_state(app)
}

async fn unknown(uri: Uri) -> Response {
    ApiError::no_route(uri.path()).into_response()
}

async fn method(method: Method, uri: Uri) -> Response {
    ApiError::no_method(method.as_str(), uri.path()).into_response()
}

/// Whether there is anything to restart.
async fn health(State(app): State<Arc<App>>) -> Result<&'static str> {
    if app.scheduler.has_ended() { Err(ApiError::ended()) } else { Ok("ok\n") }
}

/// Whether to send requests here.
async fn ready(State(app): State<Arc<App>>) -> Result<&'static str> {
    if app.scheduler.is_open() { Ok("ok\n") } else { Err(ApiError::draining()) }
}
