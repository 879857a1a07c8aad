//! What `dsv4c tune` found, for people and for programs.

use std::fmt::Write as _;
use std::path::PathBuf;

use dsv4_kernels::tuning::cost::Bound;
use dsv4_kernels::tuning::predict::{ALL_REDUCE, ALL_REDUCE_NCCL, Forecast, Part, Step};
use dsv4_kernels::tuning::rank::Validation;
use dsv4_kernels::tuning::table::Table;
use dsv4_kernels::tuning::{Values, values_text};
use serde_json::{Value, json};

/// What others publish; sources are in `docs/tuning.md`.
const PUBLISHED: &str = "published by others for two GB10, same model, one sequence, tokens/s: 27.4 without drafts; 29-42 at 4-16K with 2 drafts; \
     66-76 at 8K, 51-75 at 128K with 5 (exact-length prompts up to 110); none at 200K\n\
     prefill, tokens/s: 1710-2590 at 8K, 860-1000 (one 1800-2000) at 64K, 1620-2090 at 128K\n";

/// A kernel at a shape with its point. Times are seconds of a launch.
pub(super) struct Row {
    pub kernel: &'static str,
    pub shape: String,
    pub rows: u32,
    pub calls: f64,
    pub point: Values,
    pub bytes: u64,
    pub flops: f64,
    pub predicted: Option<f64>,
    pub bound: Option<Bound>,
    pub measured: Option<f64>,
    pub untuned: Option<f64>,
    pub floor: f64,
}

impl Row {
    fn best(&self) -> Option<f64> {
        self.measured.or(self.predicted)
    }

    /// Bytes of weights a second, and operations of whole tiles a second, over 10^9 and 10^12.
    fn rates(&self, seconds: f64) -> (f64, f64) {
        (self.bytes as f64 / seconds / 1e9, self.flops / seconds / 1e12)
    }
}

/// How well the cost model does on a file of measurements.
pub(super) struct Validated {
    pub file: PathBuf,
    pub found: Validation,
}

/// Everything a run found.
pub struct TuneReport {
    arch: String,
    chip: &'static str,
    tp: u32,
    pub(super) gpu: Option<String>,
    pub(super) details: bool,
    pub(super) rows: Vec<Row>,
    pub(super) table: Option<Table>,
    pub(super) forecasts: Vec<Forecast>,
    pub(super) validated: Option<Validated>,
    pub(super) out: Option<PathBuf>,
    pub(super) compiled: usize,
    pub(super) seconds: f64,
}

impl TuneReport {
    pub(super) fn new(arch: &str, chip: &'static str, tp: u32) -> TuneReport {
        TuneReport {
            arch: arch.into(),
            chip,
            tp,
            gpu: None,
            details: false,
            rows: Vec::new(),
            table: None,
            forecasts: Vec::new(),
            validated: None,
            out: None,
            compiled: 0,
            seconds: 0.0,
        }
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        if self.compiled > 0 {
            let _ = writeln!(out, "{} units compiled for {}", self.compiled, self.arch);
        }
        if let Some(v) = &self.validated {
            validation_text(&mut out, v);
        }
        if !self.rows.is_empty() {
            match &self.gpu {
                Some(gpu) => out += &format!("{}, {gpu}, rank of {}: measured\n", self.arch, self.tp),
                None => out += &format!("{}, {}, rank of {}: predicted, not measured\n", self.arch, self.chip, self.tp),
            }
            self.rows_text(&mut out);
        }
        if !self.forecasts.is_empty() {
            self.forecast_text(&mut out);
        }
        if let Some(file) = &self.out {
            let _ = writeln!(out, "{} written after {:.1} s", file.display(), self.seconds);
        }
        out
    }

    fn forecast_text(&self, out: &mut String) {
        let _ = writeln!(
            out,
            "PREDICTED, not measured: {}, rank of {}, one sequence; an all-reduce takes {:.0} us ({:.0} in brackets), nothing is hidden",
            self.chip,
            self.tp,
            ALL_REDUCE * 1e6,
            ALL_REDUCE_NCCL * 1e6
        );
        let _ = writeln!(
            out,
            "{:>8} {:>14} {:>17} {:>17} {:>17} {:>17} {:>17} {:>9} {:>9}",
            "context",
            "ms of kernels",
            "tok/s, no drafts",
            "1, 60 % accepted",
            "1, 80 %",
            "3, 60 %",
            "3, 80 %",
            "prefill",
            "prompt"
        );
        for f in &self.forecasts {
            let rate = |drafts, accepted| {
                let at = |each| f.rate(drafts, accepted, each).map_or("-".into(), |r| format!("{r:.1}"));
                format!("{} ({})", at(ALL_REDUCE), at(ALL_REDUCE_NCCL))
            };
            let kernels = f.steps.first().map_or(0.0, Step::kernels) * 1e3;
            let tokens = |rate: Option<f64>| rate.map_or("-".into(), |r| format!("{r:.0}"));
            let _ = writeln!(
                out,
                "{:>8} {kernels:>14.2} {:>17} {:>17} {:>17} {:>17} {:>17} {:>9} {:>9}",
                f.context,
                rate(0, 0.0),
                rate(1, 0.6),
                rate(1, 0.8),
                rate(3, 0.6),
                rate(3, 0.8),
                tokens(f.prefill.map(|p| p.at_depth)),
                tokens(f.prefill.and_then(|p| p.of_prompt))
            );
        }
        out.push_str(PUBLISHED);
        let shown = |f: &&Forecast| self.details || f.context == 8 << 10;
        let steps = self.forecasts.iter().filter(shown).filter_map(|f| f.steps.first());
        steps.for_each(|step| *out += &step.to_text());
        if let Some(draft) = self.forecasts.first().and_then(|f| f.draft.as_ref()).filter(|_| self.details) {
            *out += &draft.to_text();
        }
    }

    fn rows_text(&self, out: &mut String) {
        let (mut tuned, mut untuned, mut known) = (0.0, 0.0, 0);
        for row in self.rows.iter().filter(|r| r.rows == 1) {
            if let (Some(m), Some(u)) = (row.measured, row.untuned) {
                tuned += m * row.calls;
                untuned += u * row.calls;
                known += 1;
            }
        }
        if self.details {
            let _ = writeln!(
                out,
                "{:<10} {:>5} {:>9} {:>9} {:>9} {:>7} {:>7} {:>7} {:>8}  shape; point",
                "kernel", "rows", "us", "predicted", "floor", "of it", "GB/s", "TFLOP/s", "calls"
            );
            for row in &self.rows {
                let Some(seconds) = row.best() else { continue };
                let (gb, tflops) = row.rates(seconds);
                let us = |s: Option<f64>| s.map_or("-".into(), |s| format!("{:.2}", s * 1e6));
                let _ = writeln!(
                    out,
                    "{:<10} {:>5} {:>9} {:>9} {:>9.2} {:>6.0}% {:>7.0} {:>7.1} {:>8}  {}; {}",
                    row.kernel,
                    row.rows,
                    us(row.measured),
                    us(row.predicted),
                    row.floor * 1e6,
                    100.0 * row.floor / seconds,
                    gb,
                    tflops,
                    row.calls,
                    row.shape,
                    values_text(&row.point)
                );
            }
        }
        if known > 0 {
            let _ = writeln!(
                out,
                "tuned kernels of a decode step of one row: {:.1} us, untuned {:.1} us",
                tuned * 1e6,
                untuned * 1e6
            );
        }
        let mut off: Vec<f64> =
            self.rows.iter().filter_map(|r| Some((r.predicted? / r.measured?).ln().abs().exp())).collect();
        off.sort_by(f64::total_cmp);
        if let Some(median) = off.get(off.len() / 2) {
            let _ = writeln!(out, "predicted and measured times differ by a factor of {median:.2} (median)");
        }
    }

    /// For programs.
    pub fn to_json(&self) -> Value {
        let us = |s: Option<f64>| s.map(|s| s * 1e6);
        let rows: Vec<Value> = self
            .rows
            .iter()
            .map(|r| {
                let rates = r.best().map(|s| r.rates(s));
                json!({
                    "kernel": r.kernel, "shape": r.shape, "rows": r.rows, "calls": r.calls, "point": r.point,
                    "source": if r.measured.is_some() { "measured" } else { "estimated" },
                    "measured_us": us(r.measured), "predicted_us": us(r.predicted), "untuned_us": us(r.untuned),
                    "floor_us": r.floor * 1e6, "gb_s": rates.map(|r| r.0), "tflop_s": rates.map(|r| r.1),
                    "share_of_floor": r.best().map(|s| r.floor / s), "bound": r.bound.map(|b| format!("{b:?}").to_lowercase()),
                })
            })
            .collect();
        let step = |s: &Step| {
            let part = |p: &Part| json!({"kernel": p.kernel, "launches": p.launches, "us": p.seconds * 1e6, "latency_us": p.latency * 1e6});
            json!({
                "rows": s.rows, "launches": s.launches, "us": s.kernels() * 1e6, "latency_us": s.latency() * 1e6,
                "all_reduces": s.all_reduces, "kernels": s.parts.iter().map(part).collect::<Vec<_>>(),
            })
        };
        let forecast = |f: &Forecast| {
            let rates: Vec<Value> = [(0, 0.0), (1, 0.6), (1, 0.8), (3, 0.6), (3, 0.8)]
                .into_iter()
                .filter_map(|(drafts, accepted)| {
                    let rate = f.rate(drafts, accepted, ALL_REDUCE)?;
                    Some(json!({"drafts": drafts, "accepted": accepted, "all_reduce_us": ALL_REDUCE * 1e6, "tokens_per_second": rate}))
                })
                .collect();
            json!({
                "predicted": true, "context": f.context, "steps": f.steps.iter().map(step).collect::<Vec<_>>(),
                "draft": f.draft.as_ref().map(step), "decode": rates,
                "prefill_tokens_per_second": f.prefill.map(|p| p.at_depth),
                "prompt_tokens_per_second": f.prefill.and_then(|p| p.of_prompt),
            })
        };
        let forecasts: Vec<Value> = self.forecasts.iter().map(forecast).collect();
        let validation = self.validated.as_ref().map(|v| {
            let f = &v.found;
            let kernels: Value = f
                .kernels
                .iter()
                .map(|(name, (points, rank, off))| {
                    (name.clone(), json!({"held_out": points, "rank": finite(*rank), "factor": finite(*off)}))
                })
                .collect();
            json!({
                "file": v.file, "fitted_on": f.points.0, "held_out": f.points.1, "rank_all": f.rank_all,
                "rank_within_shapes": finite(f.rank_within), "rank_fixed_constants": finite(f.rank_fixed),
                "factor": finite(f.off), "chosen_over_best": f.regret, "untuned_over_best": f.untuned,
                "constants": f.constants.list(), "kernels": kernels,
            })
        });
        json!({
            "arch": self.arch, "chip": self.chip, "gpu": self.gpu, "tp": self.tp, "kernels": rows, "forecasts": forecasts,
            "validation": validation, "table": self.table.as_ref().map(Table::text), "out": self.out,
            "compiled": self.compiled, "seconds": self.seconds,
        })
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn validation_text(out: &mut String, v: &Validated) {
    let f = &v.found;
    let _ = writeln!(out, "{}: {} points fitted on, {} held out", v.file.display(), f.points.0, f.points.1);
    let _ = writeln!(
        out,
        "rank correlation of held-out points: {:.3} within shapes, {:.3} over all",
        f.rank_within, f.rank_all
    );
    let _ = writeln!(out, "with the program's constants: {:.3} within shapes", f.rank_fixed);
    let _ = writeln!(out, "predicted and measured times of held-out points: a factor of {:.2} (median)", f.off);
    let _ = writeln!(
        out,
        "the model's choice takes {:.3} of the best measured time, the untuned point {:.3} (means over shapes)",
        f.regret, f.untuned
    );
    for (kernel, (points, rank, off)) in &f.kernels {
        let _ = writeln!(out, "  {kernel:<10} {points:>5} held out, rank {rank:>6.3}, factor {off:.2}");
    }
    let _ = writeln!(out, "constants: {:?}", f.constants);
}
