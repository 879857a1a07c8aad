//! Many requests on one model: who waits, who runs, what a step computes.
//!
//! ```text
//! server ── Job ──▶ queue ──▶ worker.rs: admit, prefill, draft, verify ──▶ Event ──▶ server
//! ```
//!
//! [`Scheduler`] is the side of those who ask, on any thread; [`Intake`] that of the one thread that owns the ranks.

pub mod counters;
mod job;
mod plan;
mod sequence;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use counters::{Counters, Snapshot};
pub use job::{Done, Event, Finish, Job, Logprob, Options, Usage};
pub use worker::{Policy, Ranks, work};

/// What is accepted at most.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Jobs that wait.
    pub queue: usize,
    /// Jobs that run at once.
    pub running: usize,
    /// Tokens of prompt and answer.
    pub context: usize,
}

/// Why a job is not taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refused {
    /// As many wait as may.
    Full {
        /// When it may be different.
        retry_after: Duration,
    },
    /// It would not fit the context.
    TooLong {
        /// Tokens that there may be.
        context: usize,
    },
    /// The server ends.
    Draining,
}

/// A job in the queue.
pub struct Queued {
    /// The job.
    pub job: Job,
    /// When it came.
    pub since: Instant,
    order: u64,
}

#[derive(Default)]
struct Queue {
    waiting: Vec<Queued>,
    /// Places kept for jobs that are made ready.
    kept: usize,
    taken: u64,
    draining: bool,
    ended: bool,
}

struct Shared {
    limits: Limits,
    queue: Mutex<Queue>,
    /// Something was submitted, or draining began.
    changed: Condvar,
    counters: Counters,
}

/// For those who ask.
#[derive(Clone)]
pub struct Scheduler(Arc<Shared>);

/// A place in the queue, kept until it is dropped.
pub struct Place(Arc<Shared>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.queue().kept -= 1;
    }
}

/// For the one that computes. Dropped, nothing is taken any more and whoever waits hears that.
pub struct Intake(Arc<Shared>);

/// Both sides of a new queue.
pub fn new(limits: Limits) -> (Scheduler, Intake) {
    let shared =
        Arc::new(Shared { limits, queue: Mutex::default(), changed: Condvar::new(), counters: Counters::default() });
    (Scheduler(shared.clone()), Intake(shared))
}

impl Shared {
    fn queue(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Scheduler {
    /// Keeps a place for a job that is made ready, so that work is refused before it is done.
    pub fn place(&self) -> Result<Place, Refused> {
        let mut queue = self.0.queue();
        self.require_room(&mut queue)?;
        queue.kept += 1;
        Ok(Place(self.0.clone()))
    }

    /// Puts a job into the queue. What becomes of it is told by events.
    pub fn submit(&self, job: Job) -> Result<(), Refused> {
        let limits = &self.0.limits;
        if job.prompt.len().saturating_add(job.options.tokens_max) > limits.context {
            return Err(Refused::TooLong { context: limits.context });
        }
        let mut queue = self.0.queue();
        self.require_room(&mut queue)?;
        let order = queue.taken;
        queue.taken += 1;
        queue.waiting.push(Queued { job, since: Instant::now(), order });
        self.0.counters.waiting.set(queue.waiting.len() as u64);
        drop(queue);
        self.0.changed.notify_one();
        Ok(())
    }

    fn require_room(&self, queue: &mut Queue) -> Result<(), Refused> {
        let (limits, counters) = (&self.0.limits, &self.0.counters);
        if queue.draining || queue.ended {
            return Err(Refused::Draining);
        }
        if queue.waiting.len() + queue.kept >= limits.queue {
            // Those that nobody waits for any more hold no place.
            let before = queue.waiting.len();
            queue.waiting.retain(|q| !q.job.events.is_closed());
            counters.finished[3].add((before - queue.waiting.len()) as u64);
        }
        if queue.waiting.len() + queue.kept < limits.queue {
            return Ok(());
        }
        counters.refused.add(1);
        Err(Refused::Full { retry_after: counters.retry_after(queue.waiting.len(), limits.running) })
    }

    /// What was accepted runs to its end, nothing more is.
    pub fn drain(&self) {
        self.0.queue().draining = true;
        self.0.changed.notify_all();
    }

    /// Whether jobs are taken.
    pub fn is_open(&self) -> bool {
        let queue = self.0.queue();
        !queue.draining && !queue.ended
    }

    /// Whether nobody computes any more.
    pub fn has_ended(&self) -> bool {
        self.0.queue().ended
    }

    /// Limits.
    pub fn limits(&self) -> Limits {
        self.0.limits
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }
}

impl Intake {
    /// The next job: of the highest priority the oldest.
    pub fn next(&self) -> Option<Queued> {
        self.sweep();
        let mut queue = self.0.queue();
        let best = (0..queue.waiting.len()).min_by_key(|&i| {
            let q = &queue.waiting[i];
            (std::cmp::Reverse(q.job.options.priority), q.order)
        });
        let next = best.map(|i| queue.waiting.swap_remove(i));
        self.0.counters.waiting.set(queue.waiting.len() as u64);
        next
    }

    /// Drops jobs that nobody waits for any more, and tells those that are late.
    pub fn sweep(&self) {
        let mut queue = self.0.queue();
        let (now, counters) = (Instant::now(), &self.0.counters);
        queue.waiting.retain(|q| {
            let is_late = q.job.options.deadline.is_some_and(|deadline| deadline <= now);
            let is_closed = q.job.events.is_closed();
            if is_closed {
                counters.finished[3].add(1);
            } else if is_late {
                counters.finished[2].add(1);
                let usage = Usage {
                    prompt_tokens: q.job.prompt.len(),
                    queue_ms: (now - q.since).as_secs_f64() * 1e3,
                    ..Usage::default()
                };
                let _ = q.job.events.send(Event::Done(Done { finish: Finish::Deadline, usage }));
            }
            !is_late && !is_closed
        });
        counters.waiting.set(queue.waiting.len() as u64);
    }

    /// Waits, at most `within`, until there may be a job or nothing more comes.
    pub fn wait(&self, within: Duration) {
        let queue = self.0.queue();
        if queue.waiting.is_empty() && !queue.draining {
            drop(self.0.changed.wait_timeout(queue, within));
        }
    }

    /// Whether nothing more comes.
    pub fn is_over(&self) -> bool {
        let queue = self.0.queue();
        queue.draining && queue.waiting.is_empty()
    }

    /// Limits.
    pub fn limits(&self) -> Limits {
        self.0.limits
    }

    /// What happened so far.
    pub fn counters(&self) -> &Counters {
        &self.0.counters
    }
}

impl Drop for Intake {
    fn drop(&mut self) {
        let mut queue = self.0.queue();
        queue.ended = true;
        for q in queue.waiting.drain(..) {
            let _ = q.job.events.send(Event::Failed { reason: "the server ends".into() });
        }
        self.0.counters.waiting.set(0);
    }
}
