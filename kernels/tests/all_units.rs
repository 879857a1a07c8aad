//! Kernels compile without a GPU: always to the same bytes, and every unit that a rank needs without spills, within a
//! block's shared memory. Of full Flash the bytes themselves are on record, in `cubins.lock`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dsv4_kernels::device::nvrtc::{Nvrtc, Resources, judge};
use dsv4_kernels::device::unit::Unit;
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::gpu::shape::Shape;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::rms_norm;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp};

const ARCH: &str = "sm_121a";
const THREADS: usize = 2;
const FLASH: &str = include_str!("../../tests/golden/flash_config.json");
/// Set to write `cubins.lock` anew instead of comparing with it.
const RENEW: &str = "DSV4_RENEW";
const HEAD: &str = "\
# The cubins of full Flash and Flash-0731 at two ranks, in both numerics, as NVRTC 13.0.88 compiles them:
# architecture, family, kernel key, BLAKE3 of the cubin. Written by a test; to renew it:
#   DSV4_RENEW=1 cargo test --release -p dsv4-kernels --test all_units flash
";

/// Where `scripts/setup cuda` puts it.
fn nvrtc() -> Option<Nvrtc> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/nvrtc");
    match Nvrtc::open(&dir) {
        Ok(nvrtc) => Some(nvrtc),
        Err(error) => {
            println!("SKIPPED compiling kernels: {error}");
            assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skips are not allowed");
            None
        }
    }
}

/// The units of all configs in both numerics for a rank of `tp`, each once.
fn units(configs: &[&str], tp: u32) -> Vec<([u8; 32], Unit)> {
    let (tp, tuning) = (Tp::new(0, tp).unwrap(), Tuning::for_arch(ARCH));
    let mut units = BTreeMap::new();
    for config in configs {
        let config = ModelConfig::parse(config).unwrap();
        for numerics in [Numerics::Published, Numerics::Float] {
            Shape::check(&config, tp, numerics, &tuning).unwrap();
            let of = Kernels::units(&config, tp, numerics, &tuning);
            units.extend(of.into_iter().map(|unit| (unit.key(ARCH), unit)));
        }
    }
    units.into_iter().collect()
}

/// Compiles all of them, which must keep to the rules; gives a line of the lock for each.
fn compile_all(name: &str, nvrtc: &Nvrtc, units: &[([u8; 32], Unit)]) -> BTreeSet<String> {
    let (next, wrong, lines) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(BTreeSet::new()));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((key, unit)) = units.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let one = Instant::now();
                    let compiled = nvrtc.compile(unit, ARCH).map_err(|e| e.to_string());
                    let judged = compiled.and_then(|(cubin, log)| match judge(unit, &cubin, &log) {
                        Ok(resources) => Ok((cubin, resources)),
                        Err(fault) => Err(format!("{}: {fault}\n{:?}", unit.family, unit.defines)),
                    });
                    let (cubin, resources) = match judged {
                        Ok(judged) => judged,
                        Err(error) => {
                            wrong.lock().unwrap().push(error);
                            continue;
                        }
                    };
                    let takes = |(r, (_, dynamic)): (&Resources, &(String, u32))| {
                        format!("{} {} registers {}+{dynamic} shared", r.kernel, r.registers, r.shared)
                    };
                    let takes: Vec<String> = resources.iter().zip(&unit.kernels).map(takes).collect();
                    println!("{name}: {:.2} s {}: {}", one.elapsed().as_secs_f64(), unit.family, takes.join(", "));
                    let (key, hash) = (blake3::Hash::from_bytes(*key).to_hex(), blake3::hash(&cubin).to_hex());
                    lines.lock().unwrap().insert(format!("{ARCH} {} {key} {hash}", unit.family));
                }
            });
        }
    });
    let seconds = begin.elapsed().as_secs_f64();
    println!("{name}: {} units in {seconds:.1} s with {THREADS} threads", units.len());
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    lines.into_inner().unwrap()
}

#[test]
fn flash_compiles_to_the_bytes_on_record() {
    let Some(nvrtc) = nvrtc() else { return };
    let configs = [FLASH, include_str!("../../tests/golden/flash_0731_config.json")];
    let compiled = compile_all("flash", &nvrtc, &units(&configs, 2));
    let place: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("cubins.lock");
    if std::env::var_os(RENEW).is_some() {
        let lines: String = compiled.iter().map(|line| format!("{line}\n")).collect();
        std::fs::write(&place, format!("{HEAD}{lines}")).unwrap();
        return;
    }
    let text = std::fs::read_to_string(&place).unwrap_or_default();
    let locked: BTreeSet<String> = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned).collect();
    let mut changes: Vec<String> = locked.difference(&compiled).map(|line| format!("- {line}")).collect();
    changes.extend(compiled.difference(&locked).map(|line| format!("+ {line}")));
    changes.sort_by(|a, b| a[2..].cmp(&b[2..]));
    assert!(
        changes.is_empty(),
        "{}: expected these lines (-), compiled those (+). Where the key is another, a kernel, its sizes or its tuning \
         changed; where only the hash is, the compiler did.\n{}\nhelp: if that is meant, renew the file:\n{HEAD}",
        place.display(),
        changes.join("\n")
    );
}

#[test]
fn nano_and_tiny_compile() {
    let Some(nvrtc) = nvrtc() else { return };
    let configs = [include_str!("../../tests/nano/config.json"), include_str!("../../tests/tiny/config.json")];
    compile_all("nano and tiny", &nvrtc, &units(&configs, 2));
}

/// The same code at the sizes of the larger model, in which it differs from Flash.
#[test]
fn pro_compiles() {
    let Some(nvrtc) = nvrtc() else { return };
    let mut config: serde_json::Value = serde_json::from_str(FLASH).unwrap();
    for (name, size) in [
        ("hidden_size", 7168),
        ("num_hidden_layers", 61),
        ("num_attention_heads", 128),
        ("q_lora_rank", 1536),
        ("o_groups", 16),
        ("moe_intermediate_size", 3072),
        ("n_routed_experts", 384),
        ("index_topk", 1024),
    ] {
        config[name] = size.into();
    }
    // The last is of the draft block.
    let ratio = |layer: u64| match layer {
        61 => 0,
        0 => 128,
        layer if layer.is_multiple_of(2) => 4,
        _ => 128,
    };
    config["compress_ratios"] = (0..=61).map(ratio).collect();
    compile_all("pro", &nvrtc, &units(&[&config.to_string()], 8));
}

#[test]
fn the_same_text_gives_the_same_bytes() {
    let (Some(first), Some(again)) = (nvrtc(), nvrtc()) else { return };
    let unit = rms_norm::unit(4096, Numerics::Published);
    for arch in ["sm_90a", "sm_121a"] {
        let (cubin, log) = first.compile(&unit, arch).unwrap();
        assert!(log.contains("0 bytes spill stores"), "{log}");
        assert_eq!(cubin[..4], *b"\x7fELF");
        assert!(again.compile(&unit, arch).unwrap().0 == cubin);
        assert_ne!(unit.key(arch), unit.key("sm_90"));
    }
}

#[test]
fn a_unit_that_does_not_compile_says_why() {
    let Some(nvrtc) = nvrtc() else { return };
    let mut unit = rms_norm::unit(4096, Numerics::Float);
    unit.source = "KERNEL(rms_norm, RmsNormArgs, THREADS) { missing(a.x); }";
    let error = nvrtc.compile(&unit, "sm_90a").unwrap_err().to_string();
    assert!(error.contains("missing") && error.contains("rms_norm"), "{error}");
    let error = nvrtc.compile(&rms_norm::unit(4096, Numerics::Float), "sm_1").unwrap_err().to_string();
    assert!(error.contains("sm_1"), "{error}");
}
