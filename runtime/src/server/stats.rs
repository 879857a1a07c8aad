//! GET /stats: what a person looks at, as one JSON object.
//!
//! ```text
//! model, artifact, backend, numerics      what is served, as in /v1/models
//! ready                                   whether requests are taken
//! uptime_seconds                          since the server began to answer; by a clock that never jumps
//! defaults    temperature, thinking       of requests that do not say
//! requests    running, waiting            now; of at most running_max, waiting_max
//!             finished.{stop, length, deadline, cancelled, failed}, refused
//! tokens      generated, prompt           so far; of the prompts' tokens, `cached` were not computed
//! kv_cache    tokens                      in the caches of running requests; of tokens_max = running_max * context
//! drafts      drafted, accepted, steps    so far; at most draft_max a step
//! steps       decode, prefill, seconds    so far
//! longest_gap_seconds                     that a running request lately waited for its next step
//! memory      process_bytes               resident, of this process alone, not of ranks in others; null: not known
//!             machine_available_bytes, machine_total_bytes     null: not known
//! ```
//!
//! Counters only grow: a rate is the difference of two replies by that of their `uptime_seconds`. Nothing is kept
//! between two requests, and nothing that computes waits for one: counters are atomics, memory is two small files of
//! the kernel's. Absent on purpose: rates, which depend on how often somebody looks; histograms, which /metrics has.

use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::routing::{MethodRouter, get};
use serde_json::{Map, Value, json};

use crate::preflight::texts::Meminfo;
use crate::scheduler::counters::Number;

use super::app::App;
use super::metrics::FINISHES;

/// The route of a server that begins now.
pub(super) fn route() -> MethodRouter<Arc<App>> {
    let began = Instant::now();
    get(async move |State(app): State<Arc<App>>| stats(&app, began))
}

fn stats(app: &App, began: Instant) -> ([(HeaderName, &'static str); 2], Json<Value>) {
    let (model, limits, counters) = (&app.model, app.scheduler.limits(), app.scheduler.counters());
    let now = counters.snapshot();
    let finished: Map<String, Value> =
        FINISHES.iter().zip(&counters.finished).map(|(name, n)| ((*name).to_owned(), n.get().into())).collect();
    let seconds = |us: &Number| us.get() as f64 / 1e6;
    let document = json!({
        "model": model.name,
        "artifact": model.artifact,
        "backend": model.backend,
        "numerics": model.numerics,
        "ready": app.scheduler.is_open(),
        "uptime_seconds": began.elapsed().as_secs_f64(),
        "defaults": {"temperature": app.config.sampling.temperature, "thinking": app.config.thinking},
        "requests": {
            "running": now.running,
            "waiting": now.waiting,
            "running_max": limits.running,
            "waiting_max": limits.queue,
            "finished": finished,
            "refused": counters.refused.get(),
        },
        "tokens": {
            "generated": counters.tokens.get(),
            "prompt": counters.prompt_tokens.get(),
            "cached": counters.cached_tokens.get(),
        },
        "kv_cache": {
            "tokens": now.cache_tokens,
            "tokens_max": limits.running as u64 * limits.context as u64,
            "context": limits.context,
        },
        "drafts": {
            "drafted": counters.draft_tokens.get(),
            "accepted": counters.accepted_tokens.get(),
            "steps": counters.drafts.get(),
            "draft_max": app.config.draft,
        },
        "steps": {
            "decode": counters.decode_steps.get(),
            "prefill": counters.prefill_steps.get(),
            "seconds": seconds(&counters.step_us),
        },
        "longest_gap_seconds": seconds(&counters.gap_us),
        "memory": memory(),
    });
    ([(header::CACHE_CONTROL, "no-store"), (header::X_CONTENT_TYPE_OPTIONS, "nosniff")], Json(document))
}

fn memory() -> Value {
    let status = std::fs::read_to_string("/proc/self/status").ok();
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| Meminfo::parse(&text).ok());
    json!({
        "process_bytes": status.as_deref().and_then(resident),
        "machine_available_bytes": machine.as_ref().and_then(|m| m.available),
        "machine_total_bytes": machine.as_ref().map(|m| m.total),
    })
}

/// VmRSS of a `/proc/PID/status`, bytes.
fn resident(status: &str) -> Option<u64> {
    let value = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    value.trim().strip_suffix(" kB")?.trim_end().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resident_memory_of_a_status() {
        let status = "Name:\tdsv4-run\nVmPeak:\t 9000 kB\nVmRSS:\t    1234 kB\nRssAnon:\t 99 kB\n";
        assert_eq!(resident(status), Some(1234 << 10));
        for other in ["", "Name:\tx\n", "VmRSS:\t12\n", "VmRSS:\tmany kB\n", "VmRSS:\t18446744073709551615 kB\n"] {
            assert_eq!(resident(other), None, "{other:?}");
        }
    }
}
