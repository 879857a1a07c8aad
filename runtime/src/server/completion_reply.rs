//! The choices of a completion's reply.

use std::sync::Arc;

use serde_json::{Value, json};

use crate::chat::Event as Part;
use crate::scheduler::Logprob;
use crate::tokenizer::Tokenizer;

use super::answers::Prompt;
use super::ask::Ask;
use super::choice::Step;
use super::logprobs::Columns;
use super::reply::Form;

/// One answer, as far as it is not in a chunk yet; of a whole reply that is all of it.
#[derive(Default)]
struct Kept {
    /// Of the prompt, to be echoed; taken when that is done.
    echo: Option<Echo>,
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    columns: Columns,
    text: String,
    finish: &'static str,
}

struct Echo {
    text: String,
    tokens: Vec<u32>,
}

pub(super) struct CompletionForm {
    tokenizer: Arc<Tokenizer>,
    answers: Vec<Kept>,
    token_ids: bool,
    logprobs: bool,
    /// An echo waits for the prompt's log-probabilities.
    waits: bool,
}

impl CompletionForm {
    pub fn new(tokenizer: &Arc<Tokenizer>, ask: &Ask, prompts: &[Prompt]) -> CompletionForm {
        let kept = |prompt: &Prompt| Kept {
            echo: ask.echo.then(|| Echo { text: prompt.text.clone(), tokens: prompt.tokens.clone() }),
            prompt_ids: if ask.token_ids { prompt.tokens.clone() } else { Vec::new() },
            ..Kept::default()
        };
        let answers = prompts.iter().flat_map(|prompt| (0..ask.n).map(move |_| kept(prompt)));
        CompletionForm {
            tokenizer: tokenizer.clone(),
            answers: answers.collect(),
            token_ids: ask.token_ids,
            logprobs: ask.options.logprobs.is_some(),
            waits: ask.options.prompt_logprobs.is_some(),
        }
    }
}

impl Kept {
    /// Takes a step in; the text that it adds.
    fn add(&mut self, form: &Shape, step: Step) -> String {
        let mut text = String::new();
        let (prompt, token, end) = (step.prompt, step.token, step.end);
        let ready = if form.waits { prompt.is_some() } else { step.started };
        if let Some(echo) = self.echo.take_if(|_| ready) {
            if form.logprobs {
                self.add_prompt(form, &echo.tokens, &prompt.unwrap_or_default());
            }
            text.push_str(&echo.text);
        }
        if let Some((token, logprob)) = token {
            if form.token_ids {
                self.ids.push(token);
            }
            if form.logprobs {
                self.columns.push(form.tokenizer, token, logprob.as_ref());
            }
        }
        for part in step.parts {
            if let Part::Content(part) = part {
                text.push_str(&part);
            }
        }
        if let Some(Ok(finish)) = end {
            self.finish = finish;
        }
        text
    }

    /// Of the first token nothing is known: nothing stands before it.
    fn add_prompt(&mut self, form: &Shape, tokens: &[u32], logprobs: &[Logprob]) {
        let known = std::iter::once(None).chain(logprobs.iter().map(Some)).chain(std::iter::repeat(None));
        for (token, logprob) in tokens.iter().zip(known) {
            self.columns.push(form.tokenizer, *token, logprob);
        }
    }

    fn choice(&mut self, form: &Shape, index: usize, text: &str, finish: Option<&str>) -> Value {
        let logprobs = if form.logprobs { self.columns.take() } else { Value::Null };
        let mut choice = json!({"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish});
        if form.token_ids {
            choice["token_ids"] = json!(std::mem::take(&mut self.ids));
        }
        choice
    }
}

/// What is wanted of every answer.
struct Shape<'a> {
    tokenizer: &'a Tokenizer,
    token_ids: bool,
    logprobs: bool,
    waits: bool,
}

impl CompletionForm {
    fn split(&mut self) -> (Shape<'_>, &mut [Kept]) {
        let CompletionForm { tokenizer, answers, token_ids, logprobs, waits } = self;
        (Shape { tokenizer, token_ids: *token_ids, logprobs: *logprobs, waits: *waits }, answers)
    }
}

impl Form for CompletionForm {
    const NAMES: (&'static str, &'static str, &'static str) = ("text_completion", "text_completion", "cmpl-");

    fn opening(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn chunks(&mut self, index: usize, step: Step) -> Vec<Value> {
        let finish = step.end.clone().and_then(Result::ok);
        let (shape, answers) = self.split();
        let Some(kept) = answers.get_mut(index) else { return Vec::new() };
        let text = kept.add(&shape, step);
        if text.is_empty() && finish.is_none() {
            return Vec::new();
        }
        vec![kept.choice(&shape, index, &text, finish)]
    }

    fn keep(&mut self, index: usize, step: Step) {
        let (shape, answers) = self.split();
        if let Some(kept) = answers.get_mut(index) {
            let text = kept.add(&shape, step);
            kept.text.push_str(&text);
        }
    }

    fn whole(mut self) -> Vec<Value> {
        let (shape, answers) = self.split();
        let choice = |(index, kept): (usize, &mut Kept)| {
            let (text, finish) = (std::mem::take(&mut kept.text), kept.finish);
            let mut choice = kept.choice(&shape, index, &text, Some(finish));
            if shape.token_ids {
                choice["prompt_token_ids"] = json!(kept.prompt_ids);
            }
            choice
        };
        answers.iter_mut().enumerate().map(choice).collect()
    }
}
