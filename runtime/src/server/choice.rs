//! One answer as it comes: tokens to text, text to reasoning, content and calls, up to where it ends.

use crate::chat::{Event as Part, StreamParser};
use crate::scheduler::{Event, Finish, Logprob};
use crate::tokenizer::TextStream;

use super::app::App;
use super::ask::Ask;
use super::error::{ApiError, Result};
use super::stop::Stops;
use super::usage::Spent;

/// What an event of a job comes to.
#[derive(Debug, Default)]
pub(super) struct Step {
    /// The job left the queue.
    pub started: bool,
    /// Log-probabilities of the prompt's tokens from the second on.
    pub prompt: Option<Vec<Logprob>>,
    /// The token that came.
    pub token: Option<(u32, Option<Logprob>)>,
    /// What it adds to the answer.
    pub parts: Vec<Part>,
    /// The answer is over: its finish reason.
    pub end: Option<Result<&'static str>>,
    /// The stop string that ended it.
    pub stop: Option<String>,
}

/// An answer.
pub(super) struct Choice {
    eos: u32,
    text: TextStream,
    /// Of a chat.
    parser: Option<StreamParser>,
    stops: Stops,
    calls: usize,
    calls_max: Option<usize>,
    pub spent: Spent,
}

impl Choice {
    /// `thinking`: of a chat, whether the answer begins inside the reasoning.
    pub fn new(app: &App, ask: &Ask, prompt: usize, thinking: Option<bool>) -> Choice {
        Choice {
            eos: app.model.config.eos_token_id as u32,
            // Of a chat special tokens stay: some vocabularies mark the tags that the parser reads as special.
            text: app.model.tokenizer.stream(thinking.is_none()),
            parser: thinking.map(StreamParser::new),
            stops: Stops::new(ask.stops.clone()),
            calls: 0,
            calls_max: ask.calls_max,
            spent: Spent::new(prompt),
        }
    }

    /// Takes the job's next event. After a step with an end there are no more.
    pub fn take(&mut self, event: Event) -> Step {
        let mut step = Step::default();
        match event {
            Event::Started { cached } => {
                self.spent.start(cached);
                step.started = true;
            }
            Event::Prompt(logprobs) => step.prompt = Some(logprobs),
            Event::Token { token, logprob } => {
                self.spent.token(self.parser.as_ref().is_some_and(StreamParser::in_reasoning));
                step.token = Some((token, logprob));
                let text = if token == self.eos { None } else { self.text.push(token) };
                if let Some(text) = text {
                    self.show(&text, &mut step);
                }
            }
            Event::Done(done) => {
                self.spent.end(done.usage);
                match done.finish {
                    Finish::Stop => self.finish(if self.calls > 0 { "tool_calls" } else { "stop" }, &mut step),
                    Finish::Length => self.finish("length", &mut step),
                    Finish::Deadline => step.end = Some(Err(ApiError::late())),
                    Finish::Cancelled => step.end = Some(Err(ApiError::failed("it was cancelled"))),
                }
            }
            Event::Failed { reason } => step.end = Some(Err(ApiError::failed(reason))),
        }
        step
    }

    /// The answer's text goes on.
    fn show(&mut self, text: &str, step: &mut Step) {
        let parts = match &mut self.parser {
            Some(parser) => parser.push(text),
            None => vec![Part::Content(text.to_owned())],
        };
        self.show_parts(parts, step);
    }

    fn show_parts(&mut self, parts: Vec<Part>, step: &mut Step) {
        for part in parts {
            match part {
                Part::Content(text) => {
                    let (shown, stop) = self.stops.push(&text);
                    step.content(shown);
                    if let Some(stop) = stop {
                        step.stop = Some(stop.to_owned());
                        step.end = Some(Ok("stop"));
                    }
                }
                Part::ToolCallStart { .. } => {
                    step.content(self.stops.finish());
                    step.parts.push(part);
                }
                Part::ToolCallEnd { .. } => {
                    self.calls += 1;
                    step.parts.push(part);
                    if Some(self.calls) == self.calls_max {
                        step.end = Some(Ok("tool_calls"));
                    }
                }
                part => step.parts.push(part),
            }
            if step.end.is_some() {
                return;
            }
        }
    }

    /// Nothing more comes, for `reason`; a stop string in what was held back is another.
    fn finish(&mut self, reason: &'static str, step: &mut Step) {
        if let Some(rest) = self.text.finish() {
            self.show(&rest, step);
        }
        if let (None, Some(parser)) = (&step.end, &mut self.parser) {
            let parts = parser.finish();
            self.show_parts(parts, step);
        }
        if step.end.is_none() {
            step.content(self.stops.finish());
            step.end = Some(Ok(reason));
        }
    }
}

impl Step {
    fn content(&mut self, text: String) {
        if !text.is_empty() {
            self.parts.push(Part::Content(text));
        }
    }
}
