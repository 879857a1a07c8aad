//! Plans against what is reserved, and recordings. The backend itself is tested where there is a checkpoint: `tests/gpu.rs`
//! of the test crate.

use dsv4_model::{ModelConfig, Tp};

use crate::device::testing::Bench;
use crate::device::{Gpu, In, Out};
use crate::gpu::kernels::Shape;
use crate::gpu::state::{DeviceState, StateSize};
use crate::gpu::stream::{Key, StepStats, Stream};
use crate::gpu::workspace::{Need, Workspace};
use crate::numerics::Numerics;
use crate::ops::embedding::{self, SettleArgs};

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
    assert!(stream.sync().is_err(), "nothing but launches while recording");
    stream.end(true).unwrap();
    assert_eq!(stream.stats().launches, 0);
}
