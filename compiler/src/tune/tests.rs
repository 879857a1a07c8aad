use clap::Parser;
use dsv4_kernels::tuning::rank::HEADER;
use dsv4_kernels::tuning::table::Source;

use super::*;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/tiny/config.json");

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    args: TuneArgs,
}

/// A run with these flags on another architecture than that of any GPU here.
fn run(flags: &[&str]) -> Result<TuneReport, CompileError> {
    let line = ["tune", "--arch", "sm_121a", "--config", TINY].iter().chain(flags).copied();
    tune(&Line::parse_from(line).args, &|_| {})
}

#[test]
fn a_table_is_estimated_without_a_gpu() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("table.toml");
    let path = file.to_str().unwrap();
    let flags = ["-o", path, "--nvrtc", "/nowhere", "--only", "gemv"];
    // No compiler where one was said to be is an error.
    assert_eq!(run(&flags).err().unwrap().exit_code(), 3);
    if kernels::find(None).is_ok() {
        // Where there is one, registers come from it; few points keep that short.
        run(&["-o", path, "--only", "gemv", "--points", "2"]).unwrap();
    } else {
        run(&["-o", path, "--only", "gemv"]).unwrap();
    }
    let table = Table::parse(&std::fs::read_to_string(&file).unwrap()).unwrap();
    assert!(!table.entry.is_empty());
    let estimated = |e: &Entry| e.source == Some(Source::Estimated) && e.measured_us.is_none() && e.gpu.is_none();
    assert!(table.entry.iter().all(|e| estimated(e) && e.predicted_us.is_some_and(|us| us > 0.0)));
    assert_eq!(Tuning::of(&table).unwrap().arch, "sm_121a");
}

#[test]
fn a_step_is_predicted_and_marked() {
    let report = run(&["--predict", "--json"]).unwrap();
    let (text, json) = (report.to_text(), report.to_json());
    assert!(text.contains("PREDICTED, not measured: GB10"), "{text}");
    let forecasts = json["forecasts"].as_array().unwrap();
    assert!(!forecasts.is_empty());
    for forecast in forecasts {
        assert_eq!(forecast["predicted"], true);
        let steps = forecast["steps"].as_array().unwrap();
        let us = |i: usize| steps[i]["us"].as_f64().unwrap();
        assert!(steps.len() == 3 && us(0) > 100.0 && us(2) > us(1) && us(1) > us(0), "{forecast}");
        assert!(steps[0]["latency_us"].as_f64().unwrap() > 50.0 && steps[0]["launches"].as_u64().unwrap() > 10);
        for rate in forecast["decode"].as_array().unwrap() {
            assert!(rate["tokens_per_second"].as_f64().unwrap() > 1.0, "{forecast}");
        }
        // What was measured of prefill is Flash's.
        assert_eq!(forecast["prefill_tokens_per_second"], serde_json::Value::Null);
    }
    assert!(json["kernels"].as_array().unwrap().iter().all(|k| k["source"] == "estimated"));
    assert_eq!(json["gpu"], serde_json::Value::Null);
}

#[test]
fn what_needs_a_gpu_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("points.csv");
    let error = run(&["--measurements", file.to_str().unwrap(), "--points", "1", "--only", "gemm_bf16"]).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("a GPU of sm_121a"), "{error}");
    assert!(!file.exists());
    let line = ["tune", "--arch", "sm_80"];
    let error = tune(&Line::parse_from(line).args, &|_| {}).err().unwrap();
    assert!(error.exit_code() == 2 && error.to_string().contains("sm_80"), "{error}");
}

/// A file of measurements: what a point takes by its index and what the model says.
fn made_up(tunables: &[Box<dyn Tunable>], chip: &Chip, seconds: &dyn Fn(usize, f64) -> f64) -> String {
    let mut text = format!("# made up, by a test\n{HEADER}\n");
    for (i, c) in measure::candidates(tunables, chip, 8).iter().enumerate() {
        let t = &tunables[c.tunable];
        let point = dsv4_kernels::tuning::values_text(&c.point);
        let us = seconds(i, c.guessed) * 1e6;
        text += &format!("{},{},{},{point},0,0,{us:.6}\n", t.kernel(), t.shape(), t.rows());
    }
    text
}

/// Measurements that are the model's own predictions are ordered perfectly; a shuffled order is not.
#[test]
fn measurements_are_judged() {
    let dir = tempfile::tempdir().unwrap();
    let (config, tp) = model(Path::new(TINY), Some(2)).unwrap();
    let tunables = tunables::all(&config, tp);
    let chip = chip::of("sm_121a").unwrap();
    let write = |name: &str, seconds: &dyn Fn(usize, f64) -> f64| {
        let file = dir.path().join(name);
        std::fs::write(&file, made_up(&tunables, &chip, seconds)).unwrap();
        let file = file.to_str().unwrap().to_owned();
        run(&["--validate", &file]).unwrap().to_json()["validation"].clone()
    };
    let own = write("own.csv", &|_, s| s);
    assert!(own["rank_all"].as_f64().unwrap() > 0.99, "{own}");
    assert!((own["factor"].as_f64().unwrap() - 1.0).abs() < 0.02, "{own}");
    let noise = write("noise.csv", &|i, _| 1e-6 * (1.0 + (i * 7919 % 101) as f64));
    assert!(noise["rank_all"].as_f64().unwrap() < 0.5, "{noise}");
    let bad = dir.path().join("bad.csv");
    std::fs::write(&bad, "gemv,64x64 bf16,1\n").unwrap();
    let error = run(&["--validate", bad.to_str().unwrap()]).err().unwrap();
    assert!(error.exit_code() == 3 && error.to_string().contains("line 1"), "{error}");
}

/// A file of measurements gives the same table every time, without a GPU or a compiler.
#[test]
fn a_table_is_chosen_from_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("points.csv");
    let (config, tp) = model(Path::new(TINY), Some(2)).unwrap();
    let chip = chip::of("sm_121a").unwrap();
    let mut tunables = tunables::all(&config, tp);
    tunables.retain(|t| t.kernel() == "moe_up");
    // Every point is as slow as the next, but for those with two tiles.
    let candidates = measure::candidates(&tunables, &chip, 8);
    let two = |i: usize| candidates[i].point["up_tiles"] == 2;
    assert!((0..candidates.len()).any(two));
    let text = made_up(&tunables, &chip, &|i, _| if two(i) { 3e-6 } else { 4e-6 });
    std::fs::write(&file, text).unwrap();
    let chosen = || {
        let report = run(&["--from", file.to_str().unwrap(), "--only", "moe_up"]).unwrap().to_json();
        Table::parse(report["table"].as_str().unwrap()).unwrap()
    };
    let table = chosen();
    assert_eq!(table, chosen());
    assert_eq!(table.entry.len(), 4);
    for entry in &table.entry {
        assert_eq!((entry.source, entry.point["up_tiles"]), (Some(Source::Measured), 2), "{entry:?}");
        assert_eq!((entry.measured_us, entry.gpu.as_deref()), (Some(3.0), Some("made up")), "{entry:?}");
    }
}

/// A run that ended before both halves of the experts were timed at all rows leaves a table that is accepted.
#[test]
fn what_was_measured_in_part_makes_a_table() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("points.csv");
    let (config, tp) = model(Path::new(TINY), Some(2)).unwrap();
    let chip = chip::of("sm_121a").unwrap();
    let mut tunables = tunables::all(&config, tp);
    tunables.retain(|t| t.kernel().starts_with("moe"));
    // Other warps than untuned, so that half a choice would contradict the other half.
    let candidates = measure::candidates(&tunables, &chip, 8);
    let text = made_up(&tunables, &chip, &|i, _| if candidates[i].point["warps"] == 4 { 3e-6 } else { 4e-6 });
    let source = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let report = run(&["--from", file.to_str().unwrap(), "--only", "moe"]).unwrap().to_json();
        let table = Table::parse(report["table"].as_str().unwrap()).unwrap();
        Tuning::of(&table).unwrap();
        table.entry.iter().map(|e| e.source).collect::<Vec<_>>()
    };
    let whole = source(&text);
    assert!(!whole.is_empty() && whole.iter().all(|s| *s == Some(Source::Measured)));
    let partial: String = text.lines().filter(|l| !l.starts_with("moe_down")).map(|l| format!("{l}\n")).collect();
    let partial = source(&partial);
    assert!(!partial.is_empty() && partial.iter().all(|s| *s == Some(Source::Estimated)));
}
