//! The jobs of one request: submitted together, heard together, cancelled together.

use std::future::poll_fn;
use std::task::{Context, Poll};

use serde_json::Value;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::scheduler::{Event, Job, Options};

use super::app::App;
use super::ask::Ask;
use super::choice::{Choice, Step};
use super::error::{ApiError, Result};
use super::usage::{Total, total, usage};

/// What is to be answered.
#[derive(Clone, Debug)]
pub(super) struct Prompt {
    pub tokens: Vec<u32>,
    /// As text, for an echo.
    pub text: String,
    /// Of a chat: the answer begins inside the reasoning.
    pub thinking: Option<bool>,
}

struct Answer {
    /// None after the end. Dropped, it cancels the job.
    events: Option<UnboundedReceiver<Event>>,
    choice: Choice,
}

/// Answers to prompts, `n` to each.
pub(super) struct Answers {
    answers: Vec<Answer>,
    n: usize,
    /// Whose turn it is to be heard.
    turn: usize,
}

impl Answers {
    /// Submits the jobs, all or none. `param`: the field that has the prompts, for errors.
    pub fn submit(app: &App, ask: &Ask, prompts: &[Prompt], param: &str) -> Result<Answers> {
        let jobs = prompts.len() * ask.n;
        let most = app.scheduler.limits().queue;
        if jobs > most {
            let reason =
                format!("found {} with {} answers each, expected at most {most} answers", prompts.len(), ask.n);
            return Err(ApiError::field(param, reason));
        }
        let mut all = Answers { answers: Vec::with_capacity(jobs), n: ask.n, turn: 0 };
        for prompt in prompts {
            let options = options(app, ask, prompt.tokens.len(), param)?;
            for i in 0..ask.n {
                let (sender, events) = unbounded_channel();
                let mut options = options.clone();
                options.sampling.seed = options.sampling.seed.wrapping_add(i as u64);
                let job = Job { prompt: prompt.tokens.clone(), options, events: sender };
                let choice = Choice::new(app, ask, prompt.tokens.len(), prompt.thinking);
                let refused = |refused| ApiError::refused(refused, param, prompt.tokens.len());
                app.scheduler.submit(job).map_err(refused)?;
                all.answers.push(Answer { events: Some(events), choice });
            }
        }
        Ok(all)
    }

    /// The next step of any answer, with its place. None after all have ended.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<(usize, Step)>> {
        let count = self.answers.len();
        let mut open = false;
        for i in 0..count {
            let place = (self.turn + i) % count;
            let Some(Answer { events, choice }) = self.answers.get_mut(place) else { continue };
            let Some(receiver) = events else { continue };
            open = true;
            let Poll::Ready(event) = receiver.poll_recv(cx) else { continue };
            let event = event.unwrap_or_else(|| Event::Failed { reason: "nothing computes any more".into() });
            let step = choice.take(event);
            if step.end.is_some() {
                *events = None;
            }
            self.turn = (place + 1) % count;
            return Poll::Ready(Some((place, step)));
        }
        if open { Poll::Pending } else { Poll::Ready(None) }
    }

    /// As [`Answers::poll_next`].
    pub async fn next(&mut self) -> Option<(usize, Step)> {
        poll_fn(|cx| self.poll_next(cx)).await
    }

    pub fn have_ended(&self) -> bool {
        self.answers.iter().all(|answer| answer.events.is_none())
    }

    /// Nobody wants them any more.
    pub fn cancel(&mut self) {
        self.answers.iter_mut().for_each(|answer| answer.events = None);
    }

    /// What they took so far.
    pub fn total(&self) -> Total {
        total(self.answers.iter().map(|answer| &answer.choice.spent), self.n)
    }

    /// The same, for a reply with choices.
    pub fn usage(&self) -> Value {
        usage(self.total())
    }

    /// Measurements, if there is one answer; of several there are none that mean anything.
    pub fn metrics(&self) -> Option<Value> {
        match self.answers.as_slice() {
            [only] => Some(only.choice.spent.metrics()),
            _ => None,
        }
    }
}

/// A job's options, with as many tokens as the context has room for.
fn options(app: &App, ask: &Ask, prompt: usize, param: &str) -> Result<Options> {
    let context = app.context();
    let room = context.checked_sub(prompt).filter(|room| *room > 0 || ask.options.prompt_logprobs.is_some());
    let room = room.ok_or_else(|| ApiError::context(param, prompt, context))?;
    let tokens_max = ask.options.tokens_max.min(room);
    let tokens_min = ask.options.tokens_min.min(tokens_max);
    Ok(Options { tokens_max, tokens_min, ..ask.options.clone() })
}
