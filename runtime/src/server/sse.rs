//! A reply as server-sent events: the body asks the answers for more only when the connection can take more.
//!
//! Hyper drops the body when the client is gone; with it go the receivers, and that cancels the jobs.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use http_body::Frame;
use serde_json::Value;
use tokio::time::{Instant, Sleep, sleep};

use super::answers::Answers;
use super::app::Answering;
use super::choice::Step;
use super::error::ApiError;

/// What a stream writes; one kind for each form of stream.
pub(super) trait Events: Send + Unpin + 'static {
    /// What clients skip; it shows proxies and readers with a time limit that somebody is there.
    const KEEP_ALIVE: &'static str;

    /// Writes what comes before any answer.
    fn begin(&mut self, answers: &Answers, out: &mut String);

    /// Writes what a step of answer `index` comes to; its end is no error.
    fn step(&mut self, index: usize, step: Step, answers: &Answers, out: &mut String);

    /// Writes that an answer failed, which ends the stream.
    fn fail(&mut self, error: &ApiError, answers: &Answers, out: &mut String);

    /// Writes what comes after all answers.
    fn finish(&mut self, answers: &Answers, out: &mut String);
}

/// An event without a name.
pub(super) fn write_data(out: &mut String, data: &Value) {
    out.push_str(&format!("data: {data}\n\n"));
}

/// An event that has its data's `type` for a name.
pub(super) fn write_named(out: &mut String, data: &Value) {
    let name = data["type"].as_str().unwrap_or("message");
    out.push_str(&format!("event: {name}\n"));
    write_data(out, data);
}

pub(super) struct Live<E> {
    answers: Answers,
    events: E,
    keep_alive: Duration,
    silence: Pin<Box<Sleep>>,
    /// Text that is not written yet.
    out: String,
    over: bool,
    _answering: Answering,
}

impl<E: Events> Live<E> {
    pub fn new(answers: Answers, events: E, keep_alive: Duration, answering: Answering) -> Live<E> {
        let silence = Box::pin(sleep(keep_alive));
        let mut live =
            Live { answers, events, keep_alive, silence, out: String::new(), over: false, _answering: answering };
        live.events.begin(&live.answers, &mut live.out);
        live
    }

    /// The reply, which begins with the answers' `first` step if there was one.
    pub fn response(mut self, first: Option<(usize, Step)>) -> Response {
        if let Some((index, step)) = first {
            self.step(index, step);
        }
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            // Some proxies collect a reply otherwise.
            (header::HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        (headers, Body::new(self)).into_response()
    }

    fn step(&mut self, index: usize, mut step: Step) {
        let failed = step.end.take_if(|end| end.is_err());
        self.events.step(index, step, &self.answers, &mut self.out);
        if let Some(Err(error)) = failed {
            self.answers.cancel();
            self.events.fail(&error, &self.answers, &mut self.out);
            self.over = true;
        }
    }

    fn finish(&mut self) {
        self.events.finish(&self.answers, &mut self.out);
        self.over = true;
    }
}

impl<E: Events> HttpBody for Live<E> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let live = self.get_mut();
        loop {
            if !live.out.is_empty() {
                live.silence.as_mut().reset(Instant::now() + live.keep_alive);
                return Poll::Ready(Some(Ok(Frame::data(std::mem::take(&mut live.out).into()))));
            }
            if live.over {
                return Poll::Ready(None);
            }
            match live.answers.poll_next(cx) {
                Poll::Ready(Some((index, step))) => live.step(index, step),
                Poll::Ready(None) => live.finish(),
                Poll::Pending => match live.silence.as_mut().poll(cx) {
                    Poll::Ready(()) => live.out.push_str(E::KEEP_ALIVE),
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }
}
