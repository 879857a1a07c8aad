//! From answers to a reply: all at once, or as a stream.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::answers::{Answers, Prompt};
use super::app::{Answering, App, new_id, now};
use super::ask::Ask;
use super::choice::Step;
use super::chunks::Chunks;
use super::error::Result;
use super::sse::{Events, Live};

/// What of a job's events goes into a reply; one kind for chats, one for completions.
pub(super) trait Form: Send + Unpin + 'static {
    /// `object` of a whole reply, of a chunk, and what ids begin with.
    const NAMES: (&'static str, &'static str, &'static str);

    /// Of the stream's first chunks, the choices, one each.
    fn opening(&mut self) -> Vec<Value>;

    /// The choices of the chunks, one each, that a step of answer `index` comes to.
    fn chunks(&mut self, index: usize, step: Step) -> Vec<Value>;

    /// Keeps a step of answer `index`, for [`Form::whole`].
    fn keep(&mut self, index: usize, step: Step);

    /// The choices of a whole reply.
    fn whole(self) -> Vec<Value>;
}

/// What every document of a reply has.
#[derive(Clone, Debug)]
pub(super) struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
}

impl Head {
    pub fn document(&self, choices: Vec<Value>) -> Value {
        let Head { id, object, created, model } = self;
        json!({"id": id, "object": object, "created": created, "model": model, "choices": choices})
    }
}

/// Submits and answers. `param`: the field that has the prompts.
pub(super) async fn reply<F: Form>(
    app: &Arc<App>,
    ask: Ask,
    prompts: Vec<Prompt>,
    param: &'static str,
    form: F,
    answering: Answering,
) -> Result<Response> {
    let answers = Answers::submit(app, &ask, &prompts, param)?;
    let (whole, chunk, prefix) = F::NAMES;
    let object = if ask.stream { chunk } else { whole };
    let head = Head { id: new_id(prefix), object, created: now(), model: app.model.name.clone() };
    let ids = ask.token_ids.then(|| prompt_ids(&prompts));
    drop(prompts);
    match ask.stream {
        true => stream(answers, Chunks::new(form, head, &ask, ids), app.config.keep_alive, answering).await,
        false => all(answers, form, &head, ids).await,
    }
}

/// Ids of the only prompt, or of each.
fn prompt_ids(prompts: &[Prompt]) -> Value {
    match prompts {
        [only] => json!(only.tokens),
        many => many.iter().map(|prompt| json!(prompt.tokens)).collect(),
    }
}

/// Hears the answers to their end. Errors: the first of any of them.
pub(super) async fn collect(answers: &mut Answers, mut keep: impl FnMut(usize, Step)) -> Result<()> {
    while let Some((index, mut step)) = answers.next().await {
        if let Some(Err(error)) = step.end.take_if(|end| end.is_err()) {
            return Err(error);
        }
        keep(index, step);
    }
    Ok(())
}

async fn all<F: Form>(mut answers: Answers, mut form: F, head: &Head, ids: Option<Value>) -> Result<Response> {
    collect(&mut answers, |index, step| form.keep(index, step)).await?;
    let mut document = head.document(form.whole());
    if let Some(ids) = ids {
        document["prompt_token_ids"] = ids;
    }
    document["usage"] = answers.usage();
    if let Some(metrics) = answers.metrics() {
        document["metrics"] = metrics;
    }
    Ok(Json(document).into_response())
}

/// A reply that is written as it comes.
pub(super) async fn stream<E: Events>(
    mut answers: Answers,
    events: E,
    keep_alive: Duration,
    answering: Answering,
) -> Result<Response> {
    // What fails at once is told by the status; what waits is told that it does.
    let mut first = tokio::time::timeout(keep_alive, answers.next()).await.ok().flatten();
    if let Some((_, step)) = &mut first
        && let Some(Err(error)) = step.end.take_if(|end| end.is_err())
    {
        return Err(error);
    }
    Ok(Live::new(answers, events, keep_alive, answering).response(first))
}
