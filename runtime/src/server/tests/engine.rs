//! An engine without a model: every job gets a thread that plays a script.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::scheduler::{Done, Event, Finish, Intake, Job, Logprob, Options, Usage};

/// What a script does.
#[derive(Clone, Debug)]
pub(super) enum Act {
    Cached(usize),
    Prompt(Vec<Logprob>),
    Token(u32),
    Scored(u32, Logprob),
    /// Goes on when the test says so.
    Gate,
    Stop,
    Length,
    Deadline,
    Fail(&'static str),
    /// The thread ends without a word.
    Vanish,
    /// What drafts did, for the end.
    Drafts(Vec<u8>, Vec<u8>),
}

/// A job that came.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub prompt: Vec<u32>,
    pub options: Options,
}

type Script = Arc<dyn Fn(&Seen) -> Vec<Act> + Send + Sync>;

#[derive(Default)]
struct State {
    seen: Mutex<Vec<Seen>>,
    cancelled: AtomicU64,
    running: AtomicU64,
    gates_open: AtomicBool,
    stop: AtomicBool,
}

/// What a test sees of the engine.
pub(super) struct Engine(Arc<State>);

impl Engine {
    pub fn seen(&self) -> Vec<Seen> {
        self.0.seen.lock().expect("lock").clone()
    }

    /// Jobs whose receiver was found gone.
    pub fn cancelled(&self) -> u64 {
        self.0.cancelled.load(SeqCst)
    }

    pub fn open_gates(&self) {
        self.0.gates_open.store(true, SeqCst);
    }

    /// Drops the intake, as an engine does that fails.
    pub fn end(&self) {
        self.0.stop.store(true, SeqCst);
    }
}

pub(super) fn play(intake: Intake, script: Script) -> Engine {
    let state = Arc::new(State::default());
    let engine = Engine(state.clone());
    std::thread::spawn(move || {
        let intake = Arc::new(intake);
        while !intake.is_over() && !state.stop.load(SeqCst) {
            let full = state.running.load(SeqCst) >= intake.limits().running as u64;
            match if full { None } else { intake.next() } {
                None if full => std::thread::sleep(Duration::from_millis(2)),
                None => intake.wait(Duration::from_millis(20)),
                Some(queued) => {
                    let (state, script) = (state.clone(), script.clone());
                    intake.counters().running.set(state.running.fetch_add(1, SeqCst) + 1);
                    let intake = intake.clone();
                    std::thread::spawn(move || {
                        run(&state, &script, queued.job, queued.since);
                        intake.counters().running.set(state.running.fetch_sub(1, SeqCst) - 1);
                    });
                }
            }
        }
    });
    engine
}

fn run(state: &State, script: &Script, job: Job, since: Instant) {
    let seen = Seen { prompt: job.prompt.clone(), options: job.options.clone() };
    state.seen.lock().expect("lock").push(seen.clone());
    let mut acts = script(&seen).into_iter().peekable();
    let cached = match acts.next_if(|act| matches!(act, Act::Cached(_))) {
        Some(Act::Cached(cached)) => cached,
        _ => 0,
    };
    let mut usage = Usage {
        prompt_tokens: job.prompt.len(),
        cached_tokens: cached,
        queue_ms: since.elapsed().as_secs_f64() * 1e3,
        prefill_ms: 20.0,
        decode_ms: 500.0,
        ..Usage::default()
    };
    let mut start = Some(Event::Started { cached });
    for act in acts {
        // What fails at once has never started.
        if !matches!(act, Act::Fail(_) | Act::Vanish)
            && let Some(start) = start.take()
        {
            let _ = job.events.send(start);
        }
        let done = |finish| Event::Done(Done { finish, usage: usage.clone() });
        let event = match act {
            Act::Cached(_) => continue,
            Act::Prompt(logprobs) => Event::Prompt(logprobs),
            Act::Token(token) => Event::Token { token, logprob: None },
            Act::Scored(token, logprob) => Event::Token { token, logprob: Some(logprob) },
            Act::Gate => {
                while !state.gates_open.load(SeqCst) && !job.events.is_closed() {
                    std::thread::sleep(Duration::from_millis(2));
                }
                continue;
            }
            Act::Drafts(drafted, accepted) => {
                (usage.drafted, usage.accepted) = (drafted, accepted);
                continue;
            }
            Act::Stop => done(Finish::Stop),
            Act::Length => done(Finish::Length),
            Act::Deadline => done(Finish::Deadline),
            Act::Fail(reason) => Event::Failed { reason: reason.into() },
            Act::Vanish => return,
        };
        usage.tokens += usize::from(matches!(event, Event::Token { .. }));
        if job.events.send(event).is_err() {
            state.cancelled.fetch_add(1, SeqCst);
            return;
        }
    }
}
