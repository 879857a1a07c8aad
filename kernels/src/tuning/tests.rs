use std::sync::Arc;

use dsv4_model::{ModelConfig, Tp};

use super::choose::{Timed, choose};
use super::cost::Constants;
use super::table::{Entry, Source, Table};
use super::tunables::{Loaded, Tunable};
use super::*;
use crate::device::testing::Bench;
use crate::device::unit::Image;

const FLASH: &str = include_str!("../../../tests/golden/flash_config.json");
const TINY: &str = include_str!("../../../tests/tiny/config.json");
const NANO: &str = include_str!("../../../tests/nano/config.json");

fn flash() -> Vec<Box<dyn Tunable>> {
    tunables::all(&ModelConfig::parse(FLASH).unwrap(), Tp::new(0, 2).unwrap())
}

/// A value of a legal point that differs in one number.
fn other(values: &Values, name: &str, n: u32) -> Values {
    let mut out = values.clone();
    out.insert(name.into(), n);
    out
}

#[test]
fn a_table_survives_its_text() {
    for arch in ["sm_121a", "sm_90a", "sm_99"] {
        let tuning = Tuning::for_arch(arch);
        assert_eq!(Tuning::parse(&tuning.text()).unwrap(), tuning);
        assert_eq!(tuning.arch, arch);
    }
    let untuned = Tuning::untuned("sm_99");
    assert_eq!((untuned.gemv(1), untuned.gemv(8)), (GemvPoint::DEFAULT, GemvPoint::DEFAULT));
    let experts = Experts { hidden: 256, inner: 128, chosen: 3 };
    assert_eq!(untuned.moe(experts, 4), MoePoint::DEFAULT);
    assert_eq!(untuned.gemm(Format::Bf16), GemmPoint::default_for(Format::Bf16));
    let sizes = MoeSizes { hidden: 256, inner: 128, experts: 8, top_k: 3 };
    assert_eq!(untuned.experts(sizes), prefill::DEFAULT_POINT);
    // What was tuned for one model's experts is for that model's.
    let up = other(&without(values_of(&MoePoint::DEFAULT), "down_tiles"), "up_tiles", 4);
    let entry = vec![Entry::new("moe_up", "6 of 1024x4096", 1, up)];
    let tuned = Tuning::of(&Table { arch: "sm_90a".into(), entry }).unwrap();
    assert_eq!((tuned.moe(experts, 4), tuned.experts(sizes)), (MoePoint::DEFAULT, prefill::DEFAULT_POINT));
    let own = tuned.moe(Experts { hidden: 4096, inner: 1024, chosen: 6 }, 1);
    assert_eq!(own, MoePoint { up_tiles: 4, ..MoePoint::DEFAULT });
    assert_eq!(Tuning::parse(&tuned.text()).unwrap(), tuned);
}

#[test]
fn times_stay_out_of_artifacts() {
    let mut entry = Entry::new("gemm_fp8", ANY_SHAPE, ANY_ROWS, values_of(&GemmPoint::default_for(Format::Fp8)));
    let bare = Table { arch: "sm_90a".into(), entry: vec![entry.clone()] };
    entry.source = Some(Source::Measured);
    (entry.predicted_us, entry.measured_us) = (Some(2.5), Some(2.25));
    entry.gpu = Some("a \"GPU\"".into());
    let table = Table { arch: "sm_90a".into(), entry: vec![entry] };
    assert_eq!(Table::parse(&table.text()).unwrap(), table);
    assert_eq!(Tuning::of(&table).unwrap().text(), Tuning::of(&bare).unwrap().text());
    assert!(!Tuning::of(&table).unwrap().text().contains("GPU"));
}

#[test]
fn what_cannot_be_compiled_is_refused() {
    let refused = |kernel: &str, shape: &str, rows: u32, point: Values| {
        let text = Table { arch: "sm_90a".into(), entry: vec![Entry::new(kernel, shape, rows, point)] }.text();
        Tuning::parse(&text).unwrap_err().to_string()
    };
    let gemv = values_of(&GemvPoint::DEFAULT);
    assert!(refused("gemv", "*", 1, other(&gemv, "warps", 7)).contains("gemv * rows 1"));
    assert!(refused("gemv", "*", 1, other(&gemv, "colour", 7)).contains("colour"));
    assert!(refused("gemw", "*", 1, gemv.clone()).contains("no kernel gemw"));
    let moe = values_of(&MoePoint::DEFAULT);
    assert!(refused("moe_up", "*", 1, other(&moe, "up_tiles", 99)).contains("moe_up"));
    assert!(refused("moe_up", "*", 1, other(&moe, "ahead", 5)).contains("moe_up"));
    // Every number of every kernel's tiles, too large for any sum or product of it.
    let (fp8, bf16) = (GemmPoint::default_for(Format::Fp8), GemmPoint::default_for(Format::Bf16));
    for (kernel, point) in [("gemm_fp8", fp8), ("gemm_bf16", bf16), ("experts", prefill::DEFAULT_POINT)] {
        let point = values_of(&point);
        for name in point.keys() {
            for huge in [u32::MAX, (1 << 28) / 64 * 64] {
                assert!(
                    refused(kernel, "*", 0, other(&point, name, huge)).contains("that compiles"),
                    "{kernel} {name}"
                );
            }
        }
    }
    let arch = Tuning::parse("arch = \"sm_90a\\n\"").unwrap_err().to_string();
    assert!(arch.contains("arch: expected"), "{arch}");
    assert!(Tuning::parse("arch = 3").unwrap_err().to_string().contains("version"));
    assert!(Tuning::parse("arch = \"sm_90a\"\ncolour = 3\n").unwrap_err().to_string().contains("colour"));
}

#[test]
fn points_that_contradict_one_another_are_refused() {
    let parse = |entry: Vec<Entry>| Tuning::parse(&Table { arch: "sm_90a".into(), entry }.text());
    let gemv = values_of(&GemvPoint::DEFAULT);
    let wide = other(&other(&gemv, "warps", 4), "depth", gemv["depth"]);
    let both = vec![Entry::new("gemv", "*", 1, gemv.clone()), Entry::new("gemv", "*", 8, wide)];
    assert!(parse(both).unwrap_err().to_string().contains("as many warps"));
    let deep = other(&gemv, "depth", 3);
    assert_ne!(deep, gemv);
    let both = vec![Entry::new("gemv", "*", 1, gemv.clone()), Entry::new("gemv", "64x64 bf16", 1, deep)];
    assert!(parse(both).unwrap_err().to_string().contains("compiled"));
    let moe = values_of(&MoePoint::DEFAULT);
    let (up, down) = (without(moe.clone(), "down_tiles"), without(other(&moe, "depth", 3), "up_tiles"));
    let both = vec![Entry::new("moe_up", "*", 1, up), Entry::new("moe_down", "*", 1, down)];
    assert!(parse(both).unwrap_err().to_string().contains("compiled as one"));
    // Each compiles beside the defaults, but not beside the other.
    let of = |name: &str, n| Values::from([(name.to_owned(), n)]);
    let deep = |kernel| Entry::new(kernel, "*", 1, of("depth", 4));
    let own = Entry::new("moe_up", "6 of 64x64", 1, of("warps", 16));
    assert!(
        parse(vec![deep("moe_up"), deep("moe_down"), own]).unwrap_err().to_string().contains("compiles with moe_up")
    );
    let every_row = vec![Entry::new("gemv", "64x64 bf16", 0, other(&gemv, "depth", 3))];
    assert!(parse(every_row).unwrap_err().to_string().contains("compiled to be that of all shapes"));
}

#[test]
fn a_lookup_takes_the_next_number_of_rows_and_its_own_shape() {
    let gemv = |n: u32| other(&values_of(&GemvPoint::DEFAULT), "block_bytes", n);
    let entry = vec![
        Entry::new("gemv", "*", 2, gemv(32 << 10)),
        Entry::new("gemv", "*", 8, gemv(64 << 10)),
        Entry::new("gemv", "64x64 bf16", 2, gemv(16 << 10)),
    ];
    let tuning = Tuning::parse(&Table { arch: "sm_90a".into(), entry }.text()).unwrap();
    let bytes = |shape: &str, rows| tuning.lookup("gemv", shape, rows).unwrap()["block_bytes"] >> 10;
    assert_eq!([1, 2, 3, 8, 9].map(|rows| bytes("*", rows)), [32, 32, 64, 64, 64]);
    assert_eq!([1, 2].map(|rows| bytes("64x64 bf16", rows)), [16, 16]);
    assert_eq!(bytes("other", 1), 32);
    assert_eq!(tuning.gemv(1).block_bytes, 32 << 10);
}

#[test]
fn every_point_of_every_model_is_legal_and_the_first_is_that_of_untuned_tables() {
    for text in [FLASH, NANO, TINY] {
        let config = ModelConfig::parse(text).unwrap();
        let untuned = Tuning::untuned("sm_90a");
        for tunable in tunables::all(&config, Tp::new(0, 2).unwrap()) {
            let points = tunable.points();
            let name = format!("{} {}", tunable.kernel(), tunable.shape());
            assert_eq!(Some(&points[0]), untuned.lookup(tunable.kernel(), "*", tunable.rows()), "{name}");
            for point in &points {
                legal(tunable.kernel(), point).unwrap_or_else(|e| panic!("{name} {}: {e}", values_text(point)));
            }
            assert!(!tunables::launches(tunable.as_ref(), &points[0], &chip::GB10).is_empty(), "{name}");
            assert!(tunable.calls() >= 1.0 && tunable.bytes() > 0 && tunable.flops() > 0.0, "{name}");
        }
    }
}

/// Bytes of a decode step's tuned kernels: those of the model's table that they read.
#[test]
fn a_step_reads_the_models_weights_once() {
    let config = ModelConfig::parse(FLASH).unwrap();
    let decode = |kernel: &str| -> f64 {
        let list = flash();
        let own = list.iter().filter(|t| t.rows() == 1 && t.kernel() == kernel);
        own.map(|t| t.bytes() as f64 * t.calls()).sum::<f64>() / 1e9
    };
    // Attention projections, compressors, index and head of one of two ranks; then experts, six and the shared.
    let layers = config.num_hidden_layers as f64;
    let (matrices, up, down) = (decode("gemv"), decode("moe_up"), decode("moe_down"));
    assert!((3.7..3.8).contains(&matrices), "{matrices} GB");
    assert!((up / layers * 1e3 - 35.1).abs() < 0.2, "{up} GB");
    assert!((down / layers * 1e3 - 17.5).abs() < 0.2, "{down} GB");
}

#[test]
fn estimates_are_the_same_every_time_and_sane() {
    let list = flash();
    for chip in [chip::GB10, chip::H100] {
        let first = measure::candidates(&list, &chip, 8);
        let again = measure::candidates(&list, &chip, 8);
        let text = |list: &[measure::Candidate]| -> Vec<String> {
            list.iter().map(|c| format!("{} {} {}", c.tunable, values_text(&c.point), c.guessed)).collect()
        };
        let differs = text(&first).into_iter().zip(text(&again)).find(|(a, b)| a != b);
        assert_eq!((first.len(), differs), (again.len(), None));
        for c in &first {
            let t = &list[c.tunable];
            let floor = cost::floor(t.bytes() as f64, t.flops(), &chip);
            assert!(
                c.guessed > floor * 0.9 && c.guessed < floor * 60.0 + 100e-6,
                "{} {}: {} of {floor}",
                t.kernel(),
                t.shape(),
                c.guessed
            );
        }
    }
}

#[test]
fn more_bytes_take_longer_and_blocks_that_do_not_fit_are_refused() {
    let list = flash();
    let head = list.iter().filter(|t| t.kernel() == "gemv" && t.rows() == 1).max_by_key(|t| t.bytes()).unwrap();
    let point = &head.points()[0];
    let work = head.work(point, &tunables::launches(head.as_ref(), point, &chip::GB10));
    let time =
        |work: &cost::Work| cost::predict(work, cost::guess(work), &chip::GB10, &Constants::FITTED).map(|p| p.seconds);
    let whole = time(&work).unwrap();
    // 530 MB at 232 GB/s.
    assert!((2.2e-3..3.0e-3).contains(&whole), "{whole}");
    let half = cost::Work { dram_bytes: work.dram_bytes / 2.0, l2_bytes: work.l2_bytes / 2.0, ..work };
    assert!(time(&half).unwrap() < whole);
    let mut large = work;
    large.shape.shared = 200 << 10;
    assert_eq!(time(&large), None);
}

/// The order of sums is one for the machine, what is compiled one for a bucket, the rest each shape's own.
#[test]
fn the_choice_keeps_what_must_agree() {
    let list = flash();
    let gemv: Vec<usize> = (0..list.len()).filter(|i| list[*i].kernel() == "gemv" && list[*i].rows() <= 2).collect();
    let mut timed = Vec::new();
    for &i in &gemv {
        let rows = list[i].rows();
        for point in list[i].points() {
            // Alone each number of rows would like other warps; together 8 are best. Every other shape likes small blocks.
            let warps = match (rows, point["warps"]) {
                (_, 8) => 1.1,
                (1, 4) | (2, 16) => 1.0,
                _ => 2.0,
            };
            let small = if i % 2 == 0 { point["block_bytes"] } else { (512 << 10) - point["block_bytes"] };
            let depth = if point["depth"] == rows + 1 { 0.9 } else { 1.0 };
            timed.push(Timed { tunable: i, point, seconds: warps * depth * (1.0 + f64::from(small) * 1e-9) });
        }
    }
    let chosen = choose(&list, &timed);
    let table = Table { arch: "sm_90a".into(), entry: chosen.iter().map(|(e, _)| e.clone()).collect() };
    let tuning = Tuning::of(&table).unwrap();
    assert!(chosen.iter().all(|(e, _)| e.point["warps"] == 8 && e.point["depth"] == e.rows + 1));
    assert_eq!((tuning.gemv(1).warps, tuning.gemv(1).depth, tuning.gemv(2).depth), (8, 2, 3));
    for &i in &gemv {
        let point = tuning.lookup("gemv", list[i].shape(), list[i].rows()).unwrap();
        assert_eq!(point["block_bytes"], if i % 2 == 0 { 64 << 10 } else { 256 << 10 });
    }
}

/// The backend asks for the same launches as the tuner times: by name, and as often.
#[test]
fn the_backend_launches_what_is_tuned() {
    let config = ModelConfig::parse(FLASH).unwrap();
    let tp = Tp::new(0, 2).unwrap();
    let tuning = Tuning::for_arch("sm_121a");
    let mut rank = predict::Rank::new(&config, tp, &chip::GB10, &tuning, 200 << 10);
    for context in [8 << 10, 200 << 10] {
        let step = rank.step(context, 1);
        for kernel in ["gemv", "moe_up", "moe_down"] {
            let calls: f64 = flash().iter().filter(|t| t.rows() == 1 && t.kernel() == kernel).map(|t| t.calls()).sum();
            let part = step.parts.iter().find(|p| p.kernel == kernel).unwrap();
            assert_eq!((f64::from(part.launches), part.tuned), (calls, true), "{kernel}");
        }
        assert_eq!(step.all_reduces, 87);
        assert!((20e-3..60e-3).contains(&step.kernels()), "{}", step.kernels());
    }
}

/// The H100 that latencies are of: one row is what they were fitted on, eight rows are not.
#[test]
fn steps_take_what_an_h100_took() {
    let config = ModelConfig::parse(FLASH).unwrap();
    let tp = Tp::new(0, 2).unwrap();
    let tuning = Tuning::untuned("sm_90a");
    let mut rank = predict::Rank::new(&config, tp, &chip::H100, &tuning, 200 << 10);
    for (context, measured) in [(8 << 10, 5.20e-3), (200 << 10, 5.71e-3)] {
        let step = rank.step(context, 1);
        let factor = step.kernels() / measured;
        assert!(step.launches == 499 && (0.97..1.03).contains(&factor), "{context}: {factor}");
    }
    // Events of the kernels that take most, at 8K, less what events cost: 11.8 ms of launches that do not overlap.
    let eight = rank.step(8 << 10, 8);
    let timed = ["gemv", "moe_up", "moe_down", "attend", "hc_site", "index_score", "gate", "attn_prepare"];
    let of_timed = eight.parts.iter().filter(|p| timed.contains(&p.kernel.as_str()));
    let seconds: f64 = of_timed.map(|p| p.seconds + f64::from(p.launches) * 0.73e-6).sum();
    assert!((0.9..1.1).contains(&(seconds / 11.76e-3)), "{seconds}");
}

/// Fewer accepted drafts, slower sums and longer contexts are slower; a chunk of a prompt took an H100 84.5 ms of six layers.
#[test]
fn forecasts_go_the_right_way() {
    let config = ModelConfig::parse(FLASH).unwrap();
    let tp = Tp::new(0, 2).unwrap();
    let forecasts = predict::forecasts(&config, tp, &chip::GB10, &Tuning::for_arch("sm_121a"));
    assert_eq!(forecasts.len(), 4);
    for pair in forecasts.windows(2) {
        let (near, far) = (&pair[0], &pair[1]);
        for drafts in predict::DRAFTS {
            let rate = |f: &predict::Forecast, accepted, each| f.rate(drafts, accepted, each).unwrap();
            assert!(rate(near, 0.6, 12e-6) > rate(far, 0.6, 12e-6));
            assert!(rate(far, 0.6, 12e-6) > rate(far, 0.6, 32e-6));
            assert!(drafts == 0 || rate(far, 0.8, 12e-6) > rate(far, 0.6, 12e-6));
        }
        assert!(near.prefill.unwrap().at_depth > far.prefill.unwrap().at_depth);
    }
    // The chunk that was measured, without sums over ranks: 705 KB of a row at 23.7 GB/s.
    let own = 1.0 / latency::prefill(&config, tp, &chip::H100, 0).unwrap().at_depth - 705e3 / 23.7e9;
    assert!((0.95..1.05).contains(&(own / (84.5e-3 / 8192.0 * 43.0 / 6.0))), "{own}");
    assert_eq!(latency::prefill(&ModelConfig::parse(TINY).unwrap(), tp, &chip::GB10, 0), None);
}

/// Every tunable of the small model runs on the emulator at its first point and one other, with the same results. On a
/// GPU `dsv4c tune` does that itself.
#[test]
fn launches_compute_the_same_at_every_point() {
    if std::env::var_os("DSV4_GPU").is_some() {
        println!("SKIPPED: of the emulator");
        return;
    }
    let Some(bench) = Bench::new(Numerics::Published) else { return };
    let config = ModelConfig::parse(TINY).unwrap();
    let list = tunables::all(&config, Tp::new(0, 2).unwrap());
    let gpu = bench.shared();
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/emulated");
    let mut seen: Vec<(&str, u32)> = Vec::new();
    for (i, tunable) in list.iter().enumerate() {
        // The first shape of each kernel and number of rows; few rows suffice.
        let id = (tunable.kernel(), tunable.rows());
        if seen.contains(&id) || ![1, 4, tunables::PREFILL_ROWS[0]].contains(&tunable.rows()) {
            continue;
        }
        seen.push(id);
        let first = tunable.points();
        let two = [first[0].clone(), first[first.len() / 2].clone()];
        let candidates: Vec<measure::Candidate> = two
            .iter()
            .map(|point| measure::Candidate {
                tunable: i,
                point: point.clone(),
                unit: tunable.unit(point),
                shapes: tunables::launches(tunable.as_ref(), point, &chip::GB10),
                guessed: 1.0,
            })
            .collect();
        let key = |unit: &crate::device::unit::Unit| format!("{:?}", unit.key("emulated"));
        let units = candidates.iter().map(|c| (key(&c.unit), c.unit.clone())).collect();
        let compile = |unit: &crate::device::unit::Unit| {
            crate::device::emulated::compile(unit, &dir).map(|image| (image, String::new()))
        };
        let until = std::time::Instant::now() + std::time::Duration::from_secs(600);
        let compiled = measure::compile(units, 2, until, &compile, &|_, _| {});
        let said = std::sync::Mutex::new(Vec::new());
        let tell = |line: &str| said.lock().unwrap().push(line.to_owned());
        let limits = measure::Limits { until, samples: 1, flush_bytes: 1 << 16, tell: &tell };
        let measured = measure::measure(&gpu, &list, &candidates, &key, &compiled, &limits).unwrap();
        assert_eq!(measured.len(), 2, "{id:?}: {:?}", said.lock().unwrap());
        assert!(measured.iter().all(|m| m.timed.seconds > 0.0));
        let over = measure::Limits { until: std::time::Instant::now(), ..limits };
        assert!(measure::measure(&gpu, &list, &candidates, &key, &compiled, &over).unwrap().is_empty());
    }
    assert!(seen.len() >= 4, "{seen:?}");
    // What a launch does not write is seen.
    let tunable = &list[0];
    let point = &tunable.points()[0];
    let unit = tunable.unit(point);
    let image: Image = crate::device::emulated::compile(&unit, &dir).unwrap();
    let kernels = Loaded::new(&unit, unit.load(gpu.as_ref(), &image).unwrap());
    let shared: Arc<dyn crate::device::Gpu> = bench.shared();
    let prepared = tunable.prepare(&shared, 2).unwrap();
    prepared.clear(gpu.as_ref()).unwrap();
    assert!(prepared.result(gpu.as_ref()).unwrap().iter().all(|v| v.is_nan()));
    prepared.launch(gpu.as_ref(), &kernels, point, 1).unwrap();
    assert!(prepared.result(gpu.as_ref()).unwrap().iter().all(|v| v.is_finite()));
}
