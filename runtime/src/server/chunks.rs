//! A stream of chunks with choices, as chats and completions have it.

use serde_json::Value;

use super::answers::Answers;
use super::ask::Ask;
use super::choice::Step;
use super::error::ApiError;
use super::reply::{Form, Head};
use super::sse::{Events, write_data};
use super::usage::{Total, usage};

const DONE: &str = "data: [DONE]\n\n";

pub(super) struct Chunks<F> {
    form: F,
    head: Head,
    usage_at_end: bool,
    usage_always: bool,
    /// Of the prompt, for the first chunk.
    ids: Option<Value>,
    /// Whether the opening is written.
    is_open: bool,
}

impl<F: Form> Chunks<F> {
    /// `ids`: of the prompt, for the first chunk.
    pub fn new(form: F, head: Head, ask: &Ask, ids: Option<Value>) -> Chunks<F> {
        Chunks { form, head, usage_at_end: ask.usage_at_end, usage_always: ask.usage_always, ids, is_open: false }
    }

    /// Writes the opening, once.
    fn open(&mut self, answers: &Answers, out: &mut String) {
        if std::mem::replace(&mut self.is_open, true) {
            return;
        }
        // It stands before the first token, with which it is written.
        let none = Total { tokens: 0, reasoning: 0, ..answers.total() };
        for choice in self.form.opening() {
            let mut document = self.document(choice, none);
            if let Some(ids) = self.ids.take() {
                document["prompt_token_ids"] = ids;
            }
            write_data(out, &document);
        }
    }

    /// A chunk's document, without what only the last one has.
    fn document(&self, choice: Value, total: Total) -> Value {
        let mut document = self.head.document(vec![choice]);
        if self.usage_always {
            document["usage"] = usage(total);
        } else if self.usage_at_end {
            document["usage"] = Value::Null;
        }
        document
    }
}

impl<F: Form> Events for Chunks<F> {
    const KEEP_ALIVE: &'static str = ": keep-alive\n\n";

    // Clients take the first chunk for the first token: until there is one, only comments are written.
    fn begin(&mut self, _answers: &Answers, _out: &mut String) {}

    fn step(&mut self, index: usize, step: Step, answers: &Answers, out: &mut String) {
        let choices = self.form.chunks(index, step);
        if !choices.is_empty() {
            self.open(answers, out);
        }
        let last = choices.len().saturating_sub(1);
        for (i, choice) in choices.into_iter().enumerate() {
            let mut document = self.document(choice, answers.total());
            if i == last
                && !self.usage_at_end
                && answers.have_ended()
                && let Some(metrics) = answers.metrics()
            {
                document["metrics"] = metrics;
            }
            write_data(out, &document);
        }
    }

    fn fail(&mut self, error: &ApiError, _answers: &Answers, out: &mut String) {
        write_data(out, &error.json());
        out.push_str(DONE);
    }

    fn finish(&mut self, answers: &Answers, out: &mut String) {
        self.open(answers, out);
        if self.usage_at_end {
            let mut document = self.head.document(Vec::new());
            document["usage"] = answers.usage();
            if let Some(metrics) = answers.metrics() {
                document["metrics"] = metrics;
            }
            write_data(out, &document);
        }
        out.push_str(DONE);
    }
}
