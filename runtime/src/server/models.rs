//! What is served, and its tokenizer: GET /v1/models, POST /tokenize and /detokenize.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use serde_json::{Value, json};

use super::app::App;
use super::body::read;
use super::chat::conversation;
use super::completions::text_tokens;
use super::error::{ApiError, Result};
use super::fields::{Fields, parse_object};

fn entry(app: &App) -> Value {
    let model = &app.model;
    json!({
        "id": model.name,
        "object": "model",
        "created": app.created,
        "owned_by": "dsv4",
        "root": model.root,
        "max_model_len": app.context(),
        "dsv4": {"artifact": model.artifact, "backend": model.backend, "numerics": model.numerics},
    })
}

pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [entry(&app)]}))
}

pub(super) async fn one(
    State(app): State<Arc<App>>,
    id: std::result::Result<Path<String>, PathRejection>,
) -> Result<Json<Value>> {
    // A path that is no text names no model.
    let id = id.map_or_else(|_| String::new(), |Path(id)| id);
    if app.is_served(&id) { Ok(Json(entry(&app))) } else { Err(ApiError::no_model(&id, &app.model.name)) }
}

/// Ids of a text, or of a conversation as a chat would put it.
pub(super) async fn tokenize(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>> {
    let body = read(request, app.config.body_bytes_max).await?;
    let work = move |app: &App| {
        let object = parse_object(&body)?;
        let fields = Fields::new(&object);
        app.check_model(&fields)?;
        let tokens = match fields.string("prompt")? {
            Some(text) => {
                let bos = fields.boolean("add_special_tokens")?.unwrap_or(false);
                text_tokens(app, "prompt", text, bos)?
            }
            None if fields.get("messages").is_some() => conversation(app, &fields)?.tokens,
            None => return Err(ApiError::field("prompt", "missing, expected a string, or a list as messages")),
        };
        Ok(json!({"count": tokens.len(), "max_model_len": app.context(), "tokens": tokens}))
    };
    app.work(work).await.map(Json)
}

/// The text of ids, control tokens included.
pub(super) async fn detokenize(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>> {
    let body = read(request, app.config.body_bytes_max).await?;
    let work = move |app: &App| {
        let object = parse_object(&body)?;
        let fields = Fields::new(&object);
        app.check_model(&fields)?;
        let Some(list) = fields.list("tokens")? else {
            return Err(ApiError::field("tokens", "missing, expected a list of token ids"));
        };
        let tokens = fields.token_ids("tokens", list, app.model.config.vocab_size)?;
        Ok(json!({"prompt": app.model.tokenizer.decode(&tokens, false)}))
    };
    app.work(work).await.map(Json)
}
