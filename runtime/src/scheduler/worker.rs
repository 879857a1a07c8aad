//! The one thread that computes: takes jobs, runs steps, tells tokens.
//!
//! Decoding and prefill have steps of their own, in turn: a step of all that decode, then one of prefill, as long as
//! those that decode may wait. Behind every trunk step comes a step of the draft block over the same rows.

use std::time::{Duration, Instant};

use dsv4_kernels::ops::Mat;
use dsv4_model::ops::{Segment, Step};
use rayon::prelude::*;

use super::plan::{GRID, SHORT_ROWS, drafts_each, piece_end, rows_within};
use super::sequence::Sequence;
use super::{Counters, Finish, Intake};
use crate::error::RunError;
use crate::step::{Command, Engine, Source};

/// How long nothing happens before the ranks are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Weight of the newest measurement in a running mean.
const NEWEST: f64 = 0.2;

/// What may run commands on all ranks.
pub trait Ranks {
    /// Runs one: the wanted logits, `[wanted, V]`.
    fn run(&mut self, command: Command) -> Result<Mat, RunError>;
    /// Looks, without waiting, whether all ranks are there.
    fn check(&mut self) -> Result<(), RunError>;
}

impl Ranks for crate::session::Session {
    fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        self.engine.run(command)
    }

    fn check(&mut self) -> Result<(), RunError> {
        crate::session::Session::check(self)
    }
}

impl Ranks for Engine {
    fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        Engine::run(self, command)
    }

    fn check(&mut self) -> Result<(), RunError> {
        Engine::check(self)
    }
}

/// How steps are made.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Most rows of a prefill step.
    pub chunk: usize,
    /// How long those that decode may wait for somebody's prefill.
    pub decode_bound: Duration,
    /// The token that ends an answer.
    pub eos: u32,
}

/// Rows of a sequence in a step.
struct Part {
    /// Which of the running.
    index: usize,
    tokens: Vec<u32>,
    /// Rows whose logits are wanted, from the end.
    wanted: usize,
}

struct Worker<'a, R: Ranks> {
    ranks: &'a mut R,
    intake: &'a Intake,
    policy: Policy,
    running: Vec<Sequence>,
    /// Slots that are free, the lowest last.
    free: Vec<u32>,
    /// Whose turn it is to be first in a prefill step.
    turn: usize,
    us_per_row: f64,
    /// When those who wait were last looked at.
    swept: Instant,
}

/// Works until nothing more comes and all jobs have ended. Errors: the ranks'; every job has heard of it then.
pub fn work<R: Ranks>(ranks: &mut R, intake: &Intake, policy: Policy) -> Result<(), RunError> {
    let free = (0..intake.limits().running as u32).rev().collect();
    let mut worker =
        Worker { ranks, intake, policy, running: Vec::new(), free, turn: 0, us_per_row: 0.0, swept: Instant::now() };
    let result = worker.run();
    if let Err(error) = &result {
        let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
        worker.running.drain(..).for_each(|sequence| sequence.fail(reason.clone()));
    }
    intake.counters().running.set(0);
    intake.counters().cache_tokens.set(0);
    result
}

impl<R: Ranks> Worker<'_, R> {
    fn run(&mut self) -> Result<(), RunError> {
        loop {
            self.retire()?;
            self.admit()?;
            if self.swept.elapsed() > LOOK_EVERY {
                self.intake.sweep();
                self.swept = Instant::now();
            }
            if self.running.is_empty() {
                if self.intake.is_over() {
                    return Ok(());
                }
                self.intake.wait(LOOK_EVERY);
                self.ranks.check()?;
                continue;
            }
            self.decode()?;
            self.prefill()?;
        }
    }

    /// Gives back the slots of those that ended.
    fn retire(&mut self) -> Result<(), RunError> {
        let now = Instant::now();
        self.running.iter_mut().for_each(|s| s.look(now));
        let counters = self.intake.counters();
        while let Some(at) = self.running.iter().position(|s| s.finish.is_some()) {
            let sequence = self.running.remove(at);
            self.ranks.run(Command::Close(sequence.slot))?;
            self.free.push(sequence.slot);
            let kind = match sequence.finish {
                _ if sequence.failure.is_some() => 4,
                Some(Finish::Stop) => 0,
                Some(Finish::Length) => 1,
                Some(Finish::Deadline) => 2,
                _ => 3,
            };
            // Counted before it is told: whoever was told finds it counted.
            counters.finished[kind].add(1);
            counters.job_us.add(sequence.running_us());
            self.gauges();
            sequence.end();
        }
        self.gauges();
        Ok(())
    }

    fn gauges(&self) {
        let counters = self.intake.counters();
        counters.running.set(self.running.len() as u64);
        counters.cache_tokens.set(self.running.iter().map(|s| s.computed as u64).sum());
    }

    /// Gives slots to those who wait.
    fn admit(&mut self) -> Result<(), RunError> {
        while !self.free.is_empty()
            && let Some(queued) = self.intake.next()
        {
            let Some(slot) = self.free.pop() else { break };
            let sequence = Sequence::new(queued.job, queued.since, slot, self.policy.eos);
            self.intake.counters().prompt_tokens.add(sequence.prompt.len() as u64);
            self.running.push(sequence);
            self.ranks.run(Command::Open(slot))?;
        }
        self.gauges();
        Ok(())
    }

    /// One token or more for everybody whose prompt is computed.
    fn decode(&mut self) -> Result<(), RunError> {
        let all: Vec<usize> = (0..self.running.len()).filter(|&i| !self.running[i].is_prefilling()).collect();
        for group in all.chunks(SHORT_ROWS) {
            let now = Instant::now();
            let longest = group.iter().map(|&i| now - self.running[i].stepped).max().unwrap_or_default();
            self.intake.counters().gap_us.set(longest.as_micros() as u64);
            let room = drafts_each(group.len());
            let parts = group.iter().map(|&index| {
                let s = &mut self.running[index];
                // Somebody may have come since they were made.
                s.drafts.truncate(room);
                let tokens: Vec<u32> = s.answer.last().into_iter().chain(&s.drafts).copied().collect();
                Part { index, wanted: tokens.len(), tokens }
            });
            let parts: Vec<Part> = parts.collect();
            self.step(parts, room)?;
            self.intake.counters().decode_steps.add(1);
        }
        Ok(())
    }

    /// The next pieces of prompts.
    fn prefill(&mut self) -> Result<(), RunError> {
        let mut waiting: Vec<usize> = (0..self.running.len())
            .filter(|&i| self.running[i].is_prefilling() && self.running[i].finish.is_none())
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let Policy { chunk, decode_bound, .. } = self.policy;
        let decoding = self.running.len() - waiting.len();
        let budget = if decoding > 0 { rows_within(decode_bound, self.us_per_row, chunk) } else { chunk };
        // Everybody is first in turn; who is gets as much as there is, others what is left.
        let turn = self.turn % waiting.len();
        waiting.rotate_left(turn);
        self.turn = self.turn.wrapping_add(1);
        let (mut left, mut wanted_left, mut parts) = (budget, SHORT_ROWS, Vec::<Part>::new());
        for index in waiting {
            let s = &self.running[index];
            let all_logits = s.options.prompt_logprobs.is_some();
            let grid = if all_logits { SHORT_ROWS } else { GRID }.min(chunk);
            let end = piece_end(s.computed, s.prompt.len(), if all_logits { left.min(grid) } else { left }, grid);
            let rows = end - s.computed;
            let wanted = if all_logits { rows } else { usize::from(end == s.prompt.len()) };
            if rows == 0 || wanted > wanted_left {
                continue;
            }
            // Short pieces and long ones have orders of their own: they do not share a step.
            let is_short = rows <= SHORT_ROWS;
            match parts.first() {
                None if is_short => left = left.min(SHORT_ROWS),
                Some(first) if is_short != (first.tokens.len() <= SHORT_ROWS) => continue,
                _ => {}
            }
            parts.push(Part { index, tokens: s.prompt[s.computed..end].to_vec(), wanted });
            left -= rows;
            wanted_left -= wanted;
        }
        let rows: usize = parts.iter().map(|p| p.tokens.len()).sum();
        let began = Instant::now();
        let room = drafts_each(decoding + parts.len());
        self.step(parts, room)?;
        // A short step takes what it takes, however few its rows are: it says nothing of long ones.
        if rows > SHORT_ROWS {
            let us = began.elapsed().as_micros() as f64 / rows as f64;
            self.us_per_row =
                if self.us_per_row > 0.0 { self.us_per_row + NEWEST * (us - self.us_per_row) } else { us };
        }
        self.intake.counters().prefill_steps.add(1);
        Ok(())
    }

    /// A trunk step over `parts`, and what follows from it; then the draft block over the same rows, with up to
    /// `room` drafts for each.
    fn step(&mut self, parts: Vec<Part>, room: usize) -> Result<(), RunError> {
        let began = Instant::now();
        let (mut step, mut firsts, mut row) = (Step::default(), Vec::with_capacity(parts.len()), 0u32);
        for part in &parts {
            let (s, rows) = (&self.running[part.index], part.tokens.len() as u32);
            step.segments.push(Segment { slot: s.slot, start: s.computed as u32, rows });
            step.tokens.extend(&part.tokens);
            step.logits.extend(row + rows - part.wanted as u32..row + rows);
            firsts.push(row);
            row += rows;
        }
        let logits = self.ranks.run(Command::Trunk(step))?;
        let mut follows: Vec<Option<(&Part, usize)>> = vec![None; self.running.len()];
        let mut at = 0;
        for part in &parts {
            follows[part.index] = Some((part, at));
            at += part.wanted;
        }
        // Choosing among a hundred thousand tokens takes longer than much else here.
        let counters = self.intake.counters();
        self.running.par_iter_mut().zip(follows).for_each(|(s, part)| {
            if let Some((part, at)) = part {
                follow(s, part, &logits, at, counters);
            }
        });
        self.draft(&parts, &firsts, room)?;
        let counters = self.intake.counters();
        counters.step_us.add(began.elapsed().as_micros() as u64);
        let now = Instant::now();
        parts.iter().for_each(|part| self.running[part.index].stepped = now);
        Ok(())
    }

    /// Brings the draft block up to date over the rows of a trunk step (`firsts` are the parts' first rows), then
    /// drafts for those that decode.
    fn draft(&mut self, parts: &[Part], firsts: &[u32], room: usize) -> Result<(), RunError> {
        let mut step = Step::default();
        // Whoever drafts on: which, how many are wanted, and its row in the last draft step.
        let mut live: Vec<(usize, usize, u32)> = Vec::new();
        let mut row = 0u32;
        for (part, &first) in parts.iter().zip(firsts) {
            let s = &mut self.running[part.index];
            let following = std::mem::take(&mut s.following);
            if !s.is_drafting() || s.finish.is_some() || following.is_empty() {
                continue;
            }
            let rows = following.len() as u32;
            // The rows of the trunk step that are part of the sequence, each with the token behind it.
            let start = (s.computed - following.len()) as u32;
            step.segments.push(Segment { slot: s.slot, start, rows });
            step.source.extend(first..first + rows);
            step.tokens.extend(following);
            row += rows;
            let wanted = if s.is_prefilling() { 0 } else { s.drafts_wanted(room) };
            if wanted > 0 {
                step.logits.push(row - 1);
                live.push((part.index, wanted, row - 1));
            }
        }
        if step.tokens.is_empty() {
            return Ok(());
        }
        let mut logits = self.ranks.run(Command::Draft(step, Source::Trunk))?;
        while !live.is_empty() {
            let mut next = Step::default();
            let mut on = Vec::with_capacity(live.len());
            let running = &self.running;
            let choose = |(at, (index, ..)): (usize, &(usize, usize, u32))| {
                let s: &Sequence = &running[*index];
                s.choose(logits.row(at), &s.drafts)
            };
            let tokens: Vec<_> = live.par_iter().enumerate().map(choose).collect();
            for ((index, wanted, source), token) in live.into_iter().zip(tokens) {
                let s = &mut self.running[index];
                let Ok(token) = token else { continue };
                s.drafts.push(token);
                if s.drafts.len() >= wanted || s.ends_with(token) {
                    continue;
                }
                // Row p of the draft block decides the token at p + 2.
                let start = (s.prompt.len() + s.answer.len() + s.drafts.len() - 2) as u32;
                next.segments.push(Segment { slot: s.slot, start, rows: 1 });
                next.tokens.push(token);
                next.source.push(source);
                let row = next.logits.len() as u32;
                next.logits.push(row);
                on.push((index, wanted, row));
            }
            live = on;
            if !live.is_empty() {
                logits = self.ranks.run(Command::Draft(next, Source::Draft))?;
            }
        }
        Ok(())
    }
}

/// The next token of a sequence from its logits; logits that are none end it.
fn decide(s: &mut Sequence, logits: &[f32]) {
    match s.choose(logits, &[]) {
        Ok(token) => s.decide(token, logits),
        Err(error) => s.break_off(error.to_string()),
    }
}

/// What a trunk step says of a sequence; its logits begin at row `at`.
fn follow(s: &mut Sequence, part: &Part, logits: &Mat, at: usize, counters: &Counters) {
    let (start, rows) = (s.computed, part.tokens.len());
    if s.is_prefilling() {
        s.computed += rows;
        s.following = s.prompt[start + 1..s.prompt.len().min(s.computed + 1)].to_vec();
        if s.options.prompt_logprobs.is_some() {
            s.tell_prompt(start, (at..at + part.wanted).map(|row| logits.row(row)));
        }
        if s.is_prefilling() {
            return;
        }
        if s.options.tokens_max == 0 {
            s.finish = Some(Finish::Length);
            return;
        }
        let row = logits.row(at + part.wanted - 1);
        decide(s, row);
        counters.tokens.add(1);
        s.following.extend(s.answer.last());
        return;
    }
    let drafts = std::mem::take(&mut s.drafts);
    let mut accepted = 0;
    let before = s.answer.len();
    loop {
        decide(s, logits.row(at + accepted));
        if s.finish.is_some() || drafts.get(accepted) != s.answer.last() {
            break;
        }
        accepted += 1;
    }
    let tokens = s.answer.len() - before;
    // An end token that was drafted is accepted too, and nothing follows it.
    let taken = drafts.iter().zip(&s.answer[before..]).take_while(|(a, b)| a == b).count();
    s.learn(drafts.len(), taken);
    s.computed += accepted + 1;
    s.following = s.answer[before..].to_vec();
    counters.tokens.add(tokens as u64);
    if !drafts.is_empty() {
        counters.drafts.add(1);
        counters.draft_tokens.add(drafts.len() as u64);
        counters.accepted_tokens.add(taken as u64);
        counters.accepted_at.iter().take(taken).for_each(|n| n.add(1));
    }
}
