//! Plans against what is reserved, and recordings. The backend itself is tested where there is a checkpoint: `tests/gpu.rs`
//! of the test crate.

use std::path::Path;

use dsv4_model::{ModelConfig, Tp};

use crate::device::args::ARGS_BYTES_MAX;
use crate::device::emulated::{self, Emulated};
use crate::device::testing::Bench;
use crate::device::{In, Launch, Out};
use crate::gpu::shape::Shape;
use crate::gpu::state::{DeviceState, StateSize};
use crate::gpu::stream::{Key, RECORDINGS_MAX, StepStats, Stream};
use crate::gpu::workspace::{Need, Workspace};
use crate::numerics::Numerics;
use crate::ops::embedding::{self, SettleArgs};
use crate::ops::rms_norm;

fn configs() -> [ModelConfig; 2] {
    [include_str!("../../../tests/nano/config.json"), include_str!("../../../tests/tiny/config.json")]
        .map(|text| ModelConfig::parse(text).unwrap())
}

#[test]
fn plans_are_what_is_reserved() {
    let Some(bench) = Bench::new(Numerics::Published) else { return };
    let gpu = bench.shared();
    for config in configs() {
        for (numerics, act_bytes) in [(Numerics::Published, 2), (Numerics::Float, 4)] {
            for (slots, context, rows_max) in [(1, 256, 1), (3, 700, 40)] {
                let size = StateSize { slots, context, act_bytes };
                assert_eq!(DeviceState::new(&gpu, &config, size).unwrap().bytes(), size.bytes(&config));
                let shape = Shape::new(&config, Tp::new(1, 2).unwrap());
                let need = Need::new(&config, shape, numerics, rows_max, context);
                let work = Workspace::new(&gpu, &need).unwrap();
                for ((role, reserved), (_, planned)) in work.reserved().into_iter().zip(Workspace::sizes(&need)) {
                    // A buffer has at least a byte.
                    assert_eq!(reserved, planned.max(1), "{role}");
                }
            }
        }
    }
}

/// Flash on one of two ranks: 2,048 rows a step, 200,000 tokens.
#[test]
fn flash_fits_beside_its_weights() {
    let config = ModelConfig::parse(include_str!("../../../tests/golden/flash_config.json")).unwrap();
    let shape = Shape::new(&config, Tp::new(0, 2).unwrap());
    let sizes = Workspace::sizes(&Need::new(&config, shape, Numerics::Published, 2048, 200_000));
    let of = |role: &str| sizes.iter().find(|(name, _)| *name == role).map(|(_, bytes)| *bytes);
    assert_eq!(of("trunk"), Some(2048 * 4 * 4096 * 2));
    assert_eq!(of("queries"), Some(2048 * 32 * 512 * 2));
    assert_eq!(of("mid"), Some(2048 * 7 * 1024 * 2));
    let total: u64 = sizes.iter().map(|(_, bytes)| bytes).sum();
    println!("workspace {:.2} GiB", total as f64 / f64::from(1 << 30));
    assert!(total < 2 << 30, "{total} bytes: {sizes:?}");
    let state = StateSize { slots: 1, context: 200_000, act_bytes: 2 }.bytes(&config);
    println!("caches {:.2} GiB", state as f64 / f64::from(1 << 30));
    assert!(state < 3 << 29, "{state} bytes");
}

#[test]
fn a_recording_does_what_its_launches_did() {
    let Some(bench) = Bench::new(Numerics::Float) else { return };
    let settle = bench.kernel(&embedding::unit(64, 4, Numerics::Float), "settle");
    let x = bench.upload(&[1.5f32; 64]);
    let y = bench.buffer::<f32>(64);
    let args = SettleArgs { parts: In::at(x.at()), y: Out::at(y.at()), count: 64, n: 1 };
    let key = |rows| Key { rows, wanted: 0, source: None, entries: 0 };
    let mut stream = Stream::new(bench.shared());
    let mut step = |key: Option<Key>, keep: bool, value: f32| {
        bench.gpu().write(x.at(), bytemuck::cast_slice(&[value; 64])).unwrap();
        stream.begin(key).unwrap();
        embedding::launch_settle(&stream, settle, args).unwrap();
        stream.end(keep).unwrap();
        assert_eq!(y.values::<f32>().unwrap(), [value; 64]);
        stream.stats()
    };
    let (eager, replayed) = (StepStats { launches: 1, replayed: false }, StepStats { launches: 1, replayed: true });
    assert_eq!(step(None, false, 1.0), eager);
    assert_eq!(step(Some(key(1)), false, 2.0), eager);
    assert_eq!(step(Some(key(1)), true, 3.0), eager, "a part of a step is not kept");
    assert_eq!(step(Some(key(1)), true, 4.0), replayed);
    assert_eq!(step(Some(key(2)), true, 5.0), eager, "another key is another step");
    assert_eq!(step(None, true, 6.0), eager);
    // A step that fails on its way is forgotten.
    stream.begin(Some(key(3))).unwrap();
    embedding::launch_settle(&stream, settle, args).unwrap();
    stream.begin(Some(key(3))).unwrap();
    // Nothing but launches while recording; and what is refused spoils nothing.
    let gpu = bench.gpu();
    assert!(gpu.sync().is_err() && gpu.read(x.at(), &mut [0]).is_err() && gpu.write(x.at(), &[0]).is_err());
    assert!(gpu.fill(x.at(), 0, 1).is_err() && gpu.copy(y.at(), x.at(), 4).is_err());
    stream.end(true).unwrap();
    assert_eq!(stream.stats().launches, 0);
    // What is forgotten is recorded anew.
    stream.forget().unwrap();
    stream.begin(Some(key(1))).unwrap();
    embedding::launch_settle(&stream, settle, args).unwrap();
    stream.end(true).unwrap();
    assert_eq!(stream.stats(), eager);
}

/// Not even one kind of step for each of many keys fills the GPU with recordings.
#[test]
fn recordings_are_bounded() {
    let Some(bench) = Bench::new(Numerics::Float) else { return };
    let mut stream = Stream::new(bench.shared());
    let mut is_replayed = |rows: u32| {
        stream.begin(Some(Key { rows, wanted: 0, source: None, entries: 0 })).unwrap();
        stream.end(true).unwrap();
        stream.stats().replayed
    };
    assert!((0..RECORDINGS_MAX as u32).all(|rows| !is_replayed(rows)));
    assert!((0..RECORDINGS_MAX as u32).all(&mut is_replayed), "all are kept");
    assert!(!is_replayed(u32::MAX) && is_replayed(u32::MAX), "one more");
    assert!(!is_replayed(0), "those before it are gone");
}

/// On the emulator: a GPU would run on, and what waits for such a kernel would not wait for those before it.
#[test]
fn a_kernel_that_does_not_wait_fails() {
    if !Emulated::is_possible() {
        return;
    }
    let run = |body: &str, blocks: u32| {
        let mut unit = rms_norm::unit(64, Numerics::Float);
        unit.source = String::leak(format!("KERNEL(rms_norm, RmsNormArgs, THREADS) {{ {body} }}"));
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/emulated");
        let gpu = Emulated::open();
        let kernel = unit.load(gpu.as_ref(), &emulated::compile(&unit, &dir).unwrap()).unwrap()[0];
        gpu.launch(kernel, Launch::row(blocks, 64), &[0; ARGS_BYTES_MAX])
    };
    assert!(run("wait_for_previous();", 3).is_ok());
    assert!(run("", 1).is_err());
    assert!(run("if (blockIdx.x < 2) wait_for_previous();", 2).is_ok());
    assert!(run("if (blockIdx.x < 2) wait_for_previous();", 3).is_err(), "every block");
}
