//! What the scheduler counts, for /metrics: written by the thread that computes and by those who submit.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// A number that others may read at any time.
#[derive(Debug, Default)]
pub struct Number(AtomicU64);

impl Number {
    /// More of it.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Relaxed);
    }

    /// Another value.
    pub fn set(&self, n: u64) {
        self.0.store(n, Relaxed);
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Counters only grow; gauges are what is now.
#[derive(Debug, Default)]
pub struct Counters {
    /// Gauge: jobs in the queue.
    pub waiting: Number,
    /// Gauge: jobs that run.
    pub running: Number,
    /// Gauge: tokens in the caches of running jobs.
    pub cache_tokens: Number,
    /// Jobs refused because the queue was full.
    pub refused: Number,
    /// Jobs ended, by [`super::Finish`]: stop, length, deadline, cancelled; then failed.
    pub finished: [Number; 5],
    /// Prompt tokens of jobs that started.
    pub prompt_tokens: Number,
    /// Of these, from a cache.
    pub cached_tokens: Number,
    /// Tokens generated.
    pub tokens: Number,
    /// Trunk steps of decoding.
    pub decode_steps: Number,
    /// Trunk steps of prefill.
    pub prefill_steps: Number,
    /// Steps that checked drafts, of one sequence each.
    pub drafts: Number,
    /// Drafts that were checked.
    pub draft_tokens: Number,
    /// Of these, accepted.
    pub accepted_tokens: Number,
    /// Of these, by place in the draft.
    pub accepted_at: [Number; 16],
    /// Microseconds spent in steps.
    pub step_us: Number,
    /// Microseconds spent by jobs between start and end, all together.
    pub job_us: Number,
    /// Gauge: the longest that a running job waited for its next step lately, microseconds.
    pub gap_us: Number,
}

/// The gauges that a person looks at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Jobs in the queue.
    pub waiting: u64,
    /// Jobs that run.
    pub running: u64,
    /// Tokens in caches.
    pub cache_tokens: u64,
}

impl Counters {
    /// The gauges now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot { waiting: self.waiting.get(), running: self.running.get(), cache_tokens: self.cache_tokens.get() }
    }

    /// How long `waiting` jobs before this one take, by what jobs took so far; between one second and a minute.
    pub fn retry_after(&self, waiting: usize, running: usize) -> Duration {
        let ended: u64 = self.finished.iter().map(Number::get).sum();
        let each = self.job_us.get().checked_div(ended).unwrap_or(1_000_000);
        let all = each.saturating_mul(waiting as u64 + 1) / running.max(1) as u64;
        Duration::from_micros(all).clamp(Duration::from_secs(1), Duration::from_secs(60))
    }
}
