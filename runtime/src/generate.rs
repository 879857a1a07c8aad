//! Generation of one sequence: chunked prefill, then steps of one token or of verified drafts.

use std::ops::ControlFlow;
use std::time::Instant;

use dsv4_kernels::ops::Mat;
use dsv4_model::ops::{Segment, Step};

use crate::error::RunError;
use crate::sample::Sampling;
use crate::step::{Command, Engine, Source};

/// Most drafts per step: with the decided token before them they are the 16 rows up to which a row's result does not depend
/// on its company on a GPU either.
pub const DRAFT_MAX: usize = 15;

/// What to generate.
pub struct Request<'a> {
    /// Prompt token ids, at least one.
    pub prompt: &'a [u32],
    /// Most tokens to generate, the end token included.
    pub tokens_max: usize,
    /// Choice of tokens.
    pub sampling: Sampling,
    /// Most drafts per step; 0 drafts nothing.
    pub draft: usize,
    /// Rows of a prefill step.
    pub chunk: usize,
    /// The token that ends the answer.
    pub eos: u32,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The end token.
    Stop,
    /// `tokens_max`.
    Length,
    /// The caller wanted no more.
    Cancelled,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Stats {
    /// Time to the first token's logits, milliseconds.
    pub prefill_ms: f64,
    /// Time from there on, milliseconds.
    pub decode_ms: f64,
    /// Drafted tokens that a trunk step checked.
    pub draft_tokens: usize,
    /// Those it agreed with.
    pub accepted_tokens: usize,
    /// Trunk steps after prefill.
    pub decode_steps: usize,
}

/// The result of a request.
#[derive(Clone, Debug)]
pub struct Generated {
    /// Chosen tokens, the end token included.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: Finish,
    /// Measurements.
    pub stats: Stats,
}

/// The slot of the one sequence.
const SLOT: u32 = 0;

fn step(tokens: Vec<u32>, start: usize, logits: Vec<u32>, source: Vec<u32>) -> Step {
    let rows = tokens.len() as u32;
    Step { tokens, segments: vec![Segment { slot: SLOT, start: start as u32, rows }], logits, source }
}

/// Whose logits a prefill step gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The trunk's: row p is about token p + 1.
    Trunk = 0,
    /// The draft block's: row p is about token p + 2.
    Draft = 1,
}

/// Runs the tokens of a whole sequence through the trunk in chunks; with `draft`, also the draft block over
/// the rows whose next token is known.
///
/// `each` gets (whose, first row, logits): of every row with `want_all`, else of the trunk's last row.
pub fn prefill(
    engine: &mut Engine,
    tokens: &[u32],
    chunk: usize,
    want_all: bool,
    draft: bool,
    each: &mut dyn FnMut(Part, usize, Mat) -> Result<(), RunError>,
) -> Result<(), RunError> {
    engine.run(Command::Open(SLOT))?;
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let start = index * chunk;
        let end = start + part.len();
        let logits = match want_all {
            true => (0..part.len() as u32).collect(),
            false if end == tokens.len() => vec![part.len() as u32 - 1],
            false => vec![],
        };
        let wanted = !logits.is_empty();
        let out = engine.run(Command::Trunk(step(part.to_vec(), start, logits, vec![])))?;
        if wanted {
            each(Part::Trunk, start, out)?;
        }
        // The last row of the last chunk waits for the token that is chosen next.
        let last = end == tokens.len();
        let known = match (last, want_all) {
            (false, _) => part.len(),
            (true, true) => part.len() - 1,
            (true, false) => 0,
        };
        if draft && known > 0 {
            let next = tokens[start + 1..start + 1 + known].to_vec();
            let source: Vec<u32> = (0..known as u32).collect();
            let logits = if want_all { source.clone() } else { vec![] };
            let out = engine.run(Command::Draft(step(next, start, logits, source), Source::Trunk))?;
            if want_all {
                each(Part::Draft, start, out)?;
            }
        }
    }
    Ok(())
}

/// Generates one answer; `on_token` sees every token as it is decided and may stop.
///
/// Drafts never change the tokens: a draft is kept only where it equals the trunk's own choice.
pub fn generate(
    engine: &mut Engine,
    request: &Request<'_>,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated, RunError> {
    let started = Instant::now();
    let prompt = request.prompt;
    let drafting = request.draft > 0;
    let mut last = Mat::default();
    prefill(engine, prompt, request.chunk, false, drafting, &mut |_, _, logits| {
        last = logits;
        Ok(())
    })?;
    let choose = |logits: &Mat, row: usize, position: usize| -> Result<u32, RunError> {
        let logits = logits.row(row);
        match logits.iter().position(|l| !l.is_finite()) {
            None => Ok(request.sampling.choose(logits, position as u32)),
            Some(token) => Err(RunError::NotFinite { position, token, found: logits[token] }),
        }
    };
    let mut next = choose(&last, 0, prompt.len())?;
    let mut stats = Stats { prefill_ms: started.elapsed().as_secs_f64() * 1e3, ..Stats::default() };
    let decoding = Instant::now();

    let mut tokens = Vec::new();
    // Positions in the caches, and rows of the last trunk step that are part of the sequence.
    let mut length = prompt.len();
    let mut fresh = (prompt.len() - 1) % request.chunk + 1;
    // Tokens that follow those fresh rows, but the newest: what the draft block has yet to read.
    let mut following: Vec<u32> = prompt[prompt.len() - fresh + 1..].to_vec();
    let finish = 'answer: loop {
        tokens.push(next);
        if on_token(next).is_break() {
            break Finish::Cancelled;
        }
        if next == request.eos {
            break Finish::Stop;
        }
        if tokens.len() >= request.tokens_max {
            break Finish::Length;
        }
        let wanted = request.draft.min(request.tokens_max - tokens.len() - 1);
        let mut drafts = Vec::new();
        if drafting {
            following.push(next);
            drafts = draft(engine, &following, length - fresh, wanted, request, &choose)?;
        }
        let mut rows = vec![next];
        rows.extend(&drafts);
        let all = (0..rows.len() as u32).collect();
        let logits = engine.run(Command::Trunk(step(rows.clone(), length, all, vec![])))?;
        stats.decode_steps += 1;
        stats.draft_tokens += drafts.len();
        let mut accepted = 0;
        loop {
            next = choose(&logits, accepted, length + accepted + 1)?;
            if drafts.get(accepted) != Some(&next) {
                break;
            }
            accepted += 1;
            stats.accepted_tokens += 1;
            // An accepted draft is a decided token; the row behind it decides the one after.
            tokens.push(next);
            if on_token(next).is_break() {
                break 'answer Finish::Cancelled;
            }
            if next == request.eos {
                break 'answer Finish::Stop;
            }
            if tokens.len() >= request.tokens_max {
                break 'answer Finish::Length;
            }
        }
        fresh = accepted + 1;
        length += fresh;
        following = drafts[..accepted].to_vec();
    };
    engine.run(Command::Close(SLOT))?;
    stats.decode_ms = decoding.elapsed().as_secs_f64() * 1e3;
    Ok(Generated { tokens, finish, stats })
}

/// Brings the draft block up to date over the rows from `start` on (`following` are the tokens after each),
/// then drafts up to `wanted` tokens. Stops early at an end token: nothing follows it.
fn draft(
    engine: &mut Engine,
    following: &[u32],
    start: usize,
    wanted: usize,
    request: &Request<'_>,
    choose: &dyn Fn(&Mat, usize, usize) -> Result<u32, RunError>,
) -> Result<Vec<u32>, RunError> {
    let rows = following.len();
    let source: Vec<u32> = (0..rows as u32).collect();
    let logits = if wanted > 0 { vec![rows as u32 - 1] } else { vec![] };
    let mut out = engine.run(Command::Draft(step(following.to_vec(), start, logits, source), Source::Trunk))?;
    let mut drafts = Vec::with_capacity(wanted);
    // Row p of the draft block decides the token at p + 2.
    let mut position = start + rows - 1;
    let mut last_row = rows as u32 - 1;
    while drafts.len() < wanted {
        let token = choose(&out, 0, position + 2)?;
        drafts.push(token);
        if token == request.eos || drafts.len() == wanted {
            break;
        }
        position += 1;
        let deeper = step(vec![token], position, vec![0], vec![last_row]);
        out = engine.run(Command::Draft(deeper, Source::Draft))?;
        last_row = 0;
    }
    Ok(drafts)
}
