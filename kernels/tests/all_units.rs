//! Kernels compile without a GPU: always to the same bytes, and every unit that a rank needs without spills, within a
//! block's shared memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use dsv4_kernels::device::nvrtc::Nvrtc;
use dsv4_kernels::device::unit::Unit;
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::rms_norm;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp};

const ARCH: &str = "sm_121a";
/// Shared memory that a block can have there, bytes.
const SHARED_MAX: u32 = 101_376;
const THREADS: usize = 2;

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

/// The numbers that stand before `unit` in the compiler's log.
fn numbers_before(log: &str, unit: &str) -> Vec<u32> {
    let before = |at: usize| log[..at].rsplit(|c: char| !c.is_ascii_digit()).next().and_then(|n| n.parse().ok());
    log.match_indices(unit).filter_map(|(at, _)| before(at)).collect()
}

/// What is wrong with a unit, and its line for the table.
fn check(unit: &Unit, log: &str) -> (Option<String>, String) {
    let spills = numbers_before(log, " bytes spill stores");
    let registers = numbers_before(log, " registers");
    let smem = numbers_before(log, " bytes smem").into_iter().max().unwrap_or(0);
    let shared = smem + unit.kernels.iter().map(|(_, dynamic)| *dynamic).max().unwrap_or(0);
    let line = format!("{} registers {registers:?}, shared {shared}, static {smem}", unit.family);
    let wrong = spills.is_empty() || spills.iter().any(|s| *s > 0) || shared > SHARED_MAX;
    (wrong.then(|| format!("{line}: spills {spills:?}\n{:?}", unit.defines)), line)
}

fn compile_all(name: &str, config: &str, numerics: Numerics) {
    let Some(nvrtc) = nvrtc() else { return };
    let config = ModelConfig::parse(config).unwrap();
    let units = Kernels::units(&config, Tp::new(0, 2).unwrap(), numerics, &Tuning::for_arch("sm_121a"));
    let (next, wrong, lines) = (AtomicUsize::new(0), Mutex::new(Vec::new()), Mutex::new(BTreeMap::new()));
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                while let Some((i, unit)) =
                    { Some(next.fetch_add(1, Ordering::Relaxed)) }.and_then(|i| Some((i, units.get(i)?)))
                {
                    let one = Instant::now();
                    let (error, line) = match nvrtc.compile(unit, ARCH) {
                        Ok((_, log)) => check(unit, &log),
                        Err(error) => (Some(error.to_string()), String::new()),
                    };
                    wrong.lock().unwrap().extend(error);
                    lines.lock().unwrap().insert(i, format!("{:.2} s {line}", one.elapsed().as_secs_f64()));
                }
            });
        }
    });
    for line in lines.lock().unwrap().values() {
        println!("{name}: {line}");
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!("{name}, {}: {} units in {seconds:.1} s with {THREADS} threads", numerics.name(), units.len());
    let wrong = wrong.into_inner().unwrap();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

macro_rules! compile {
    ($($name:ident, $config:literal, $numerics:ident;)*) => { $(
        #[test]
        fn $name() {
            compile_all(stringify!($name), include_str!($config), Numerics::$numerics);
        }
    )* };
}
compile! {
    flash_published, "../../tests/golden/flash_config.json", Published;
    flash_float, "../../tests/golden/flash_config.json", Float;
    nano_published, "../../tests/nano/config.json", Published;
    nano_float, "../../tests/nano/config.json", Float;
    tiny_published, "../../tests/tiny/config.json", Published;
    tiny_float, "../../tests/tiny/config.json", Float;
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
