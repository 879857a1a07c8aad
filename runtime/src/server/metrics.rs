//! GET /metrics: the scheduler's counters as Prometheus text.
//!
//! Names are those that measuring tools look for, without a prefix.

use std::fmt::Display;
use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderName, header};
use dsv4_model::Draft;

use crate::scheduler::Counters;
use crate::scheduler::counters::Number;

use super::app::App;

/// Names of the scheduler's ends, in its order.
pub(super) const FINISHES: [&str; 5] = ["stop", "length", "deadline", "cancelled", "failed"];

pub(super) async fn metrics(State(app): State<Arc<App>>) -> ([(HeaderName, &'static str); 1], String) {
    let method = match app.model.config.draft {
        Draft::None => "none",
        Draft::Mtp => "mtp",
        Draft::DSpark { .. } => "dspark",
    };
    let text = page(app.scheduler.counters(), method, app.config.draft);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

#[derive(Default)]
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.0 += &format!("# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn value(&mut self, name: &str, label: Option<(&str, &dyn Display)>, value: impl Display) {
        self.0 += &match label {
            Some((label, of)) => format!("{name}{{{label}=\"{of}\"}} {value}\n"),
            None => format!("{name} {value}\n"),
        };
    }

    fn counter(&mut self, name: &str, help: &str, value: &Number) {
        self.family(name, "counter", help);
        self.value(name, None, value.get());
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Display) {
        self.family(name, "gauge", help);
        self.value(name, None, value);
    }
}

fn page(counters: &Counters, method: &str, draft: usize) -> String {
    let mut page = Page::default();
    page.gauge("num_requests_running", "Requests that run.", counters.running.get());
    page.gauge("num_requests_waiting", "Requests in the queue.", counters.waiting.get());
    page.gauge("kv_cache_tokens", "Tokens in the caches of running requests.", counters.cache_tokens.get());
    let gap = counters.gap_us.get() as f64 / 1e6;
    page.gauge("step_gap_seconds", "Longest that a running request lately waited for its next step.", gap);
    page.counter("prompt_tokens_total", "Prompt tokens of requests that started.", &counters.prompt_tokens);
    page.counter("generation_tokens_total", "Tokens generated.", &counters.tokens);
    page.counter("prefix_cache_queries", "Prompt tokens looked for in a cache.", &counters.prompt_tokens);
    page.counter("prefix_cache_hits", "Prompt tokens found in a cache.", &counters.cached_tokens);

    page.family("requests_total", "counter", "Requests that ended, by how.");
    for (finish, number) in FINISHES.iter().zip(&counters.finished) {
        page.value("requests_total", Some(("finish", finish)), number.get());
    }
    page.counter("requests_refused_total", "Requests refused because the queue was full.", &counters.refused);
    for (name, help, number) in [
        ("spec_decode_num_drafts_total", "Steps that checked drafts, of one request each.", &counters.drafts),
        ("spec_decode_num_draft_tokens_total", "Drafts that were checked.", &counters.draft_tokens),
        ("spec_decode_num_accepted_tokens_total", "Drafts that were accepted.", &counters.accepted_tokens),
    ] {
        page.family(name, "counter", help);
        page.value(name, Some(("method", &method)), number.get());
    }
    let name = "spec_decode_num_accepted_tokens_per_pos_total";
    page.family(name, "counter", "Drafts that were accepted, by place in the draft.");
    let used = counters.accepted_at.iter().rposition(|n| n.get() > 0).map_or(0, |last| last + 1);
    for (position, number) in counters.accepted_at.iter().enumerate().take(used.max(draft)) {
        page.value(name, Some(("position", &position)), number.get());
    }

    page.counter("decode_steps_total", "Steps of decoding.", &counters.decode_steps);
    page.counter("prefill_steps_total", "Steps of prefill.", &counters.prefill_steps);
    for (name, help, number) in [
        ("step_seconds_total", "Time spent in steps.", &counters.step_us),
        ("request_seconds_total", "Time from start to end of requests, all together.", &counters.job_us),
    ] {
        page.family(name, "counter", help);
        page.value(name, None, number.get() as f64 / 1e6);
    }
    page.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_a_family_and_its_number() {
        let counters = Counters::default();
        counters.drafts.add(3);
        counters.accepted_at[2].add(7);
        counters.finished[4].add(2);
        counters.step_us.add(1_500_000);
        let page = page(&counters, "mtp", 1);
        for line in [
            "# TYPE spec_decode_num_drafts_total counter",
            "spec_decode_num_drafts_total{method=\"mtp\"} 3",
            "spec_decode_num_accepted_tokens_per_pos_total{position=\"2\"} 7",
            "requests_total{finish=\"failed\"} 2",
            "step_seconds_total 1.5",
            "num_requests_waiting 0",
        ] {
            assert!(page.lines().any(|found| found == line), "{line}\n{page}");
        }
        assert!(!page.contains("position=\"3\""));
        let mut family = "";
        for line in page.lines() {
            match line.strip_prefix("# HELP ") {
                Some(help) => family = help.split(' ').next().unwrap_or_default(),
                None if line.starts_with("# TYPE ") => assert!(line.contains(family)),
                None => assert_eq!(line.split(['{', ' ']).next(), Some(family)),
            }
        }
    }
}
