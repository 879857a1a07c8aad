use super::testing::{Layer, NANO, TINY};
use super::*;

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

/// A step of the longest length that is stored at once, and one row more.
#[test]
fn rings_keep_what_steps_can_still_read() {
    for rows in [16, 17, 18] {
        let Some(mut layer) = Layer::new(TINY, 4, Numerics::Published) else { return };
        assert_eq!(layer.sizes.stored_at_once(), 17);
        let done = layer.step(&[(1, 0, 150)]);
        layer.store(&done);
        let done = layer.step(&[(0, 0, 2), (1, 150, rows - 2)]);
        layer.store(&done);
        let Sizes { capacity, head_dim, .. } = layer.sizes;
        let found = layer.bench.download_act(&layer.window);
        let end = 150 + rows - 2;
        for p in end - capacity..end {
            let at = ((capacity + p % capacity) * head_dim) as usize;
            let expected = layer.states[1].window.row(p as usize);
            assert_eq!(&found[at..at + head_dim as usize], expected, "{rows} rows, position {p}");
        }
    }
}
