//! The scheduler over a toy model that checks every step it is given: the tokens are those of a request alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dsv4_kernels::ops::Mat;
use dsv4_model::ops::Step;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::{Done, Event, Finish, Job, Limits, Options, Policy, Ranks, Refused, Scheduler, new, work};
use crate::error::RunError;
use crate::step::{Command, Source};

const VOCAB: u32 = 50;
const EOS: u32 = 1;

fn mix(values: impl IntoIterator<Item = u32>) -> u32 {
    values.into_iter().fold(17u32, |h, v| (h ^ v).wrapping_mul(0x9e37_79b1).rotate_left(13))
}

/// The next token after `tokens`: the end now and then.
fn next_token(tokens: &[u32]) -> u32 {
    let h = mix(tokens.iter().copied());
    if h % 31 == 0 { EOS } else { 2 + h / 31 % (VOCAB - 2) }
}

/// What the draft block thinks of it: right two times in three.
fn guess(tokens: &[u32]) -> u32 {
    let h = mix(tokens.iter().map(|t| t ^ 5));
    if h % 3 == 0 { 2 + h / 7 % (VOCAB - 2) } else { next_token(tokens) }
}

fn one_hot(token: u32) -> Vec<f32> {
    (0..VOCAB).map(|t| if t == token { 9.0 } else { (t % 7) as f32 * 0.1 }).collect()
}

/// A model whose next token is a hash of all before it. Panics at steps that no backend would accept.
#[derive(Default)]
struct Toy {
    slots: Vec<Option<Vec<u32>>>,
    /// (slot, position) of every row of the last trunk step, of the last draft step.
    trunk: Vec<(u32, u32)>,
    draft: Vec<(u32, u32)>,
    /// Tokens that the draft block has of a slot, a position behind.
    read: Vec<Vec<u32>>,
    steps: usize,
    rows_max: usize,
    pause: Duration,
    fail_after: Option<usize>,
    /// Rows of each step, and those of them whose logits were wanted.
    seen: Vec<(usize, usize)>,
    /// Of every position of a slot, whether its last row was in a short step; and of slots that were closed.
    short: Vec<Vec<bool>>,
    closed: Vec<(Vec<u32>, Vec<bool>)>,
}

impl Toy {
    fn new(slots: usize) -> Toy {
        Toy {
            slots: vec![None; slots],
            read: vec![Vec::new(); slots],
            short: vec![Vec::new(); slots],
            rows_max: 4096,
            ..Toy::default()
        }
    }

    fn rows(step: &Step) -> Vec<(u32, u32)> {
        let rows: Vec<_> =
            step.segments.iter().flat_map(|s| (s.start..s.start + s.rows).map(|p| (s.slot, p))).collect();
        assert_eq!(rows.len(), step.tokens.len());
        assert!(step.logits.is_sorted() && step.logits.iter().all(|&r| (r as usize) < rows.len()));
        let mut slots: Vec<u32> = step.segments.iter().map(|s| s.slot).collect();
        slots.sort_unstable();
        slots.dedup();
        assert_eq!(slots.len(), step.segments.len(), "a slot twice");
        rows
    }
}

impl Ranks for Toy {
    fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        let mut out = Vec::new();
        let wanted = match command {
            Command::Open(slot) => {
                self.slots[slot as usize] = Some(Vec::new());
                self.read[slot as usize].clear();
                0
            }
            Command::Close(slot) => {
                let tokens = self.slots[slot as usize].take().expect("an open slot");
                self.closed.push((tokens, std::mem::take(&mut self.short[slot as usize])));
                0
            }
            Command::Trunk(step) => {
                self.steps += 1;
                if self.fail_after.is_some_and(|n| self.steps > n) {
                    return Err(RunError::Usage("the ranks are lost".into()));
                }
                std::thread::sleep(self.pause);
                let rows = Toy::rows(&step);
                assert!(!rows.is_empty() && rows.len() <= self.rows_max, "{} rows", rows.len());
                self.seen.push((rows.len(), step.logits.len()));
                for (r, (&(slot, position), &token)) in rows.iter().zip(&step.tokens).enumerate() {
                    let tokens = self.slots[slot as usize].as_mut().expect("an open slot");
                    assert!(position as usize <= tokens.len(), "a gap before {position}");
                    tokens.truncate(position as usize);
                    tokens.push(token);
                    let short = &mut self.short[slot as usize];
                    short.truncate(position as usize);
                    short.push(rows.len() <= 16);
                    if step.logits.contains(&(r as u32)) {
                        out.extend(one_hot(next_token(tokens)));
                    }
                }
                self.trunk = rows;
                step.logits.len()
            }
            Command::Draft(step, source) => {
                let rows = Toy::rows(&step);
                let from = if source == Source::Trunk { &self.trunk } else { &self.draft };
                for (r, (&(slot, position), &token)) in rows.iter().zip(&step.tokens).enumerate() {
                    let (of, at) = from[step.source[r] as usize];
                    assert_eq!(of, slot, "streams of another sequence");
                    assert_eq!(at, if source == Source::Trunk { position } else { position - 1 });
                    let read = &mut self.read[slot as usize];
                    assert!(position as usize <= read.len(), "the draft block never read what is before {position}");
                    read.truncate(position as usize);
                    read.push(token);
                    let tokens = self.slots[slot as usize].as_ref().expect("an open slot");
                    if source == Source::Trunk {
                        assert!((position as usize) < tokens.len(), "a row that the trunk never had");
                    }
                    if step.logits.contains(&(r as u32)) {
                        let all: Vec<u32> = tokens[..1].iter().chain(read.iter()).copied().collect();
                        out.extend(one_hot(guess(&all)));
                    }
                }
                self.draft = rows;
                step.logits.len()
            }
        };
        Ok(Mat { rows: wanted, cols: VOCAB as usize, data: out })
    }

    fn check(&mut self) -> Result<(), RunError> {
        Ok(())
    }
}

fn options(tokens_max: usize) -> Options {
    Options::greedy(tokens_max)
}

fn policy() -> Policy {
    Policy { chunk: 256, decode_bound: Duration::from_millis(50), eos: EOS }
}

fn limits(queue: usize, running: usize) -> Limits {
    Limits { queue, running, context: 4000 }
}

fn prompt(number: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|i| 2 + mix([number, i]) % (VOCAB - 2)).collect()
}

/// What the model says, one token after another.
fn expected(prompt: &[u32], options: &Options) -> Vec<u32> {
    let mut tokens = prompt.to_vec();
    loop {
        let (token, so_far) = (next_token(&tokens), tokens.len() - prompt.len());
        // The row of logits without the end has 0.6 as its largest, at the lowest of the multiples of 7 plus 6.
        let no_end = options.ignore_eos || so_far < options.tokens_min;
        tokens.push(if token == EOS && no_end { 6 } else { token });
        if tokens.len() - prompt.len() >= options.tokens_max || (tokens.last() == Some(&EOS) && !no_end) {
            return tokens.split_off(prompt.len());
        }
    }
}

fn submit(scheduler: &Scheduler, prompt: &[u32], options: Options) -> Result<UnboundedReceiver<Event>, Refused> {
    let (events, receiver) = unbounded_channel();
    scheduler.submit(Job { prompt: prompt.to_vec(), options, events })?;
    Ok(receiver)
}

fn collect(mut events: UnboundedReceiver<Event>) -> (Vec<u32>, Result<Done, String>) {
    let mut tokens = Vec::new();
    loop {
        match events.blocking_recv().expect("an end") {
            Event::Token { token, .. } => tokens.push(token),
            Event::Done(done) => return (tokens, Ok(done)),
            Event::Failed { reason } => return (tokens, Err(reason)),
            Event::Started { .. } | Event::Prompt(_) => {}
        }
    }
}

/// Jobs of all kinds at once, in any company: the tokens are those of each alone.
#[test]
fn company_drafts_and_chunks_change_no_token() {
    for (running, chunk, draft) in [(1, 256, 0), (8, 256, 0), (8, 64, 3), (20, 100, 5), (3, 8, 15), (16, 256, 1)] {
        let (scheduler, intake) = new(limits(1000, running));
        let jobs: Vec<(Vec<u32>, Options)> = (0..60)
            .map(|n| {
                let length = 1 + mix([n, 77]) as usize % if n % 9 == 0 { 900 } else { 90 };
                let more = Options {
                    ignore_eos: n % 5 == 0,
                    tokens_min: if n % 7 == 0 { 20 } else { 0 },
                    draft: if n % 4 == 0 { 0 } else { draft },
                    ..options(1 + mix([n, 3]) as usize % 60)
                };
                (prompt(n, length), more)
            })
            .collect();
        let worker = std::thread::spawn(move || {
            let mut toy = Toy::new(running);
            let policy = Policy { chunk, ..policy() };
            work(&mut toy, &intake, policy).expect("work");
            assert!(toy.slots.iter().all(Option::is_none), "slots that stay");
            toy
        });
        let events: Vec<_> = jobs.iter().map(|(p, o)| submit(&scheduler, p, o.clone()).expect("room")).collect();
        scheduler.drain();
        assert_eq!(submit(&scheduler, &[2], options(1)).err(), Some(Refused::Draining));
        let (mut drafted, mut accepted) = (0, 0);
        for (events, (prompt, options)) in events.into_iter().zip(&jobs) {
            let (tokens, done) = collect(events);
            let done = done.expect("done");
            assert_eq!(tokens, expected(prompt, options), "{running} {chunk} {draft}");
            let stop = tokens.last() == Some(&EOS) && !options.ignore_eos;
            assert_eq!(done.finish, if stop { Finish::Stop } else { Finish::Length });
            assert_eq!((done.usage.tokens, done.usage.prompt_tokens), (tokens.len(), prompt.len()));
            drafted += done.usage.drafted.iter().map(|&n| usize::from(n)).sum::<usize>();
            accepted += done.usage.accepted.iter().map(|&n| usize::from(n)).sum::<usize>();
        }
        let toy = worker.join().expect("worker");
        for (prompt, options) in &jobs {
            let first = expected(prompt, options)[0];
            let known: Vec<u32> = prompt.iter().copied().chain([first]).collect();
            let of =
                toy.closed.iter().filter(|(tokens, _)| known.starts_with(&tokens[..tokens.len().min(known.len())]));
            let of: Vec<_> = of.filter(|(tokens, _)| tokens.len() >= prompt.len()).collect();
            assert!(!of.is_empty(), "a prompt of {} tokens", prompt.len());
            // Alone, in as few pieces as there may be.
            let rest = prompt.len() % chunk.min(64);
            let long = if rest <= 16 { prompt.len() - rest } else { prompt.len() };
            let is_short = |at: usize| chunk <= 16 || at >= long;
            for (_, short) in of {
                let found = (0..prompt.len()).find(|&at| short[at] != is_short(at));
                assert_eq!(found, None, "a prompt of {} tokens, chunks of {chunk}", prompt.len());
            }
        }
        assert!(toy.seen.iter().all(|(rows, wanted)| *rows <= chunk.max(16) && *wanted <= 16), "{:?}", toy.seen);
        let counters = scheduler.counters();
        assert_eq!(counters.draft_tokens.get(), drafted as u64);
        assert_eq!(counters.accepted_tokens.get(), accepted as u64);
        assert!(draft == 0 || running == 20 || (accepted > drafted / 3 && accepted < drafted), "{accepted} {drafted}");
        assert_eq!(counters.finished.iter().map(super::counters::Number::get).sum::<u64>(), 60);
        assert_eq!(counters.snapshot(), super::Snapshot::default());
    }
}

/// A prompt of thousands of tokens does not keep those waiting who decode.
#[test]
fn a_long_prompt_stalls_nobody() {
    let (scheduler, intake) = new(limits(10, 4));
    let first = submit(&scheduler, &prompt(1, 30), Options { ignore_eos: true, ..options(60) }).expect("room");
    let long = prompt(2, 3000);
    let second = submit(&scheduler, &long, options(3)).expect("room");
    let worker = std::thread::spawn(move || {
        let mut toy = Toy { pause: Duration::from_millis(1), ..Toy::new(4) };
        work(&mut toy, &intake, Policy { decode_bound: Duration::from_micros(10), ..policy() }).expect("work");
        toy.seen
    });
    scheduler.drain();
    assert_eq!(collect(first).0.len(), 60);
    assert_eq!(collect(second).0, expected(&long, &options(3)));
    let seen = worker.join().expect("worker");
    // While one decodes, pieces are as short as the bound asks; alone the prompt gets whole chunks.
    let pieces: Vec<usize> = seen.iter().map(|s| s.0).filter(|rows| *rows > 16).collect();
    assert!(pieces.iter().filter(|rows| **rows == 64).count() > 20, "{pieces:?}");
    let between = seen.split(|s| s.0 <= 16).map(<[_]>::len).take(40).max();
    assert!(between <= Some(1), "more than one piece between two tokens: {seen:?}");
}

#[test]
fn who_goes_away_frees_the_place() {
    let (scheduler, intake) = new(limits(10, 1));
    let forever = Options { ignore_eos: true, ..options(3900) };
    let mut gone = submit(&scheduler, &prompt(1, 10), forever.clone()).expect("room");
    let late = Options { deadline: Some(Instant::now() + Duration::from_millis(400)), ..forever };
    let late = submit(&scheduler, &prompt(2, 10), late).expect("room");
    let queued = submit(&scheduler, &prompt(3, 10), options(5)).expect("room");
    let last = submit(&scheduler, &prompt(4, 10), options(5)).expect("room");
    let worker = std::thread::spawn(move || {
        let mut toy = Toy { pause: Duration::from_millis(1), ..Toy::new(1) };
        work(&mut toy, &intake, policy()).expect("work");
    });
    drop(queued);
    while !matches!(gone.blocking_recv().expect("events"), Event::Token { .. }) {}
    drop(gone);
    let (tokens, done) = collect(late);
    assert_eq!(done.expect("done").finish, Finish::Deadline);
    assert!(tokens.len() < 3900);
    assert_eq!(collect(last).0, expected(&prompt(4, 10), &options(5)));
    scheduler.drain();
    worker.join().expect("worker");
    assert_eq!(scheduler.counters().finished[3].get(), 2);
}

#[test]
fn the_queue_is_bounded_and_ordered() {
    let (scheduler, intake) = new(limits(3, 1));
    let jobs: Vec<_> = [0, 5, 0]
        .iter()
        .map(|&priority| submit(&scheduler, &prompt(9, 4), Options { priority, ..options(2) }).expect("room"))
        .collect();
    let Err(Refused::Full { retry_after }) = submit(&scheduler, &[2], options(1)) else { panic!("not full") };
    assert!(retry_after >= Duration::from_secs(1));
    let long = Err(Refused::TooLong { context: 4000 });
    assert_eq!(submit(&scheduler, &prompt(1, 3999), options(2)).map(|_| ()), long);
    let order: Vec<i32> = std::iter::from_fn(|| intake.next()).map(|q| q.job.options.priority).collect();
    assert_eq!(order, [5, 0, 0]);
    drop(jobs);
    // Who has gone away holds no place.
    let gone: Vec<_> = (0..3).map(|n| submit(&scheduler, &prompt(n, 4), options(2)).expect("room")).collect();
    drop(gone);
    drop(submit(&scheduler, &prompt(9, 4), options(2)).expect("room again"));
    while intake.next().is_some() {}
    // A place that is kept is one less, until it is given back.
    let places: Vec<_> = (0..3).map(|_| scheduler.place().unwrap_or_else(|_| panic!("room"))).collect();
    assert!(matches!(scheduler.place().err(), Some(Refused::Full { .. })));
    assert!(matches!(submit(&scheduler, &[2], options(1)).err(), Some(Refused::Full { .. })));
    drop(places);
    let waits = submit(&scheduler, &prompt(9, 4), options(2)).expect("room");
    drop(intake);
    assert_eq!(collect(waits).1.err().as_deref(), Some("the server ends"));
    assert_eq!(submit(&scheduler, &[2], options(1)).err(), Some(Refused::Draining));
}

/// Everybody hears that the ranks are gone.
#[test]
fn lost_ranks_end_all() {
    let (scheduler, intake) = new(limits(10, 2));
    let jobs: Vec<_> = (0..3)
        .map(|n| submit(&scheduler, &prompt(n, 10), Options { ignore_eos: true, ..options(50) }).expect("room"))
        .collect();
    let mut toy = Toy { fail_after: Some(9), ..Toy::new(2) };
    assert!(work(&mut toy, &intake, policy()).is_err());
    drop(intake);
    for events in jobs {
        let reason = collect(events).1.expect_err("failed");
        assert!(reason == "the ranks are lost" || reason == "the server ends", "{reason}");
    }
}

/// Logits of a prompt, in pieces, and of the answer.
#[test]
fn log_probabilities_are_told() {
    let steps = AtomicU64::new(0);
    for (length, tokens_max) in [(40, 3), (2, 0), (1, 1)] {
        let (scheduler, intake) = new(limits(10, 2));
        let prompt = prompt(7, length);
        let asked = Options { prompt_logprobs: Some(2), logprobs: Some(1), ..options(tokens_max) };
        let mut events = submit(&scheduler, &prompt, asked).expect("room");
        scheduler.drain();
        let mut toy = Toy::new(2);
        work(&mut toy, &intake, policy()).expect("work");
        steps.fetch_add(toy.steps as u64, Ordering::Relaxed);
        let (mut told, mut tokens) = (None, 0);
        while let Some(event) = events.blocking_recv() {
            match event {
                Event::Prompt(all) => told = Some(all),
                Event::Token { token, logprob } => {
                    let logprob = logprob.expect("asked for");
                    assert_eq!(logprob.top, [(token, logprob.logprob)]);
                    tokens += 1;
                }
                _ => {}
            }
        }
        assert!(tokens <= tokens_max && (tokens > 0) == (tokens_max > 0));
        let told = told.expect("of the prompt");
        assert_eq!(told.len(), length - 1);
        for (at, of) in told.iter().enumerate() {
            assert_eq!(of.top.len(), 2);
            assert_eq!(of.top[0].0, next_token(&prompt[..at + 1]));
        }
    }
    assert!(steps.load(Ordering::Relaxed) > 3);
}
