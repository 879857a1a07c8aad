use super::testing::{Layer, NANO, TINY, assert_rounded};
use super::*;
use crate::device::testing::Bench;
use crate::ops::rms_norm::inverse_rms;
use crate::ops::rope::{Rope, rotate};

const BOTH: [Numerics; 2] = [Numerics::Float, Numerics::Published];

/// Steps of a long chunk, decode steps of all sizes, two sequences together, drafts that are taken back.
fn grow(config: &str, ratio: u32, numerics: Numerics) -> Option<()> {
    let mut layer = Layer::new(config, ratio, numerics)?;
    let steps: [&[(u32, u32, u32)]; 13] = [
        &[(0, 0, 130)],
        &[(0, 130, 1)],
        &[(0, 131, 3), (1, 0, 2)],
        &[(1, 2, 1), (0, 134, 16)],
        // Four of sixteen were accepted.
        &[(0, 138, 1), (1, 3, 5)],
        &[(0, 139, 16)],
        // None was but the first; a window closes again with other rows.
        &[(0, 140, 3)],
        &[(0, 143, 1)],
        &[(0, 144, 130), (1, 8, 120)],
        // A whole step of drafts goes, the last one of a chunk too.
        &[(0, 273, 16), (1, 127, 1)],
        &[(0, 273, 2), (1, 128, 3)],
        &[(1, 131, 16), (0, 275, 130)],
        &[(0, 405, 3), (1, 147, 130)],
    ];
    for segments in steps {
        layer.generation += 1;
        let done = layer.step(segments);
        layer.store(&done);
    }
    Some(())
}

#[test]
fn caches_follow_the_reference() {
    for numerics in BOTH {
        for ratio in [0, 4, 128] {
            grow(NANO, ratio, numerics);
        }
    }
}

#[test]
fn caches_follow_the_reference_at_full_width() {
    for numerics in BOTH {
        for ratio in [4, 128] {
            grow(TINY, ratio, numerics);
        }
    }
}

#[test]
fn rings_keep_what_steps_can_still_read() {
    let Some(mut layer) = Layer::new(TINY, 4, Numerics::Published) else { return };
    let done = layer.step(&[(1, 0, 150)]);
    layer.store(&done);
    let done = layer.step(&[(0, 0, 2), (1, 150, 16)]);
    layer.store(&done);
    let Sizes { capacity, head_dim, .. } = layer.sizes;
    let found = layer.bench.download_act(&layer.window);
    for p in 150 + 16 - capacity..150 + 16 {
        let at = ((capacity + p % capacity) * head_dim) as usize;
        assert_eq!(&found[at..at + head_dim as usize], layer.states[1].window.row(p as usize), "position {p}");
    }
}

#[test]
fn heads_are_the_references() {
    for numerics in BOTH {
        for config in [NANO, TINY] {
            let Some(layer) = Layer::new(config, 4, numerics) else { return };
            let positions = [0u32, 5, 131_000, 7, 1_048_575];
            let turns = layer.turns(positions.iter().copied());
            let rope = Rope::new(&layer.config, true);
            let unit = unit(layer.sizes, numerics);
            let heads = 3;
            for (name, width) in [("query_heads", layer.sizes.head_dim), ("index_queries", layer.sizes.index_dim)] {
                let width = width as usize;
                let mut bench = Bench::new(numerics).expect("an emulator");
                let mut expected = bench.act(positions.len() * heads * width);
                let q = bench.upload_act(&expected);
                let args = HeadsArgs {
                    q: Out::at(q.at()),
                    turns: In::at(turns.at()),
                    count: positions.len() as u32,
                    heads: heads as u32,
                    eps: 1e-6,
                };
                launch_heads(bench.gpu(), bench.kernel(&unit, name), args).unwrap();
                for (i, head) in expected.chunks_exact_mut(width).enumerate() {
                    if name == "query_heads" {
                        let s = inverse_rms(head, 1e-6);
                        head.iter_mut().for_each(|v| *v *= s);
                        bench.round(head);
                    }
                    rotate(head, &rope.at(positions[i / heads]));
                    bench.round(head);
                    if name == "index_queries" {
                        layer.index_round(head);
                    }
                }
                let step = if name == "index_queries" { 0.34 } else { 1.0 / 120.0 };
                assert_rounded(&bench.download_act(&q), &expected, numerics, step);
            }
        }
    }
}
