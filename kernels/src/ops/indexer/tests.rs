use super::*;
use crate::device::rows::Row;
use crate::device::testing::{Bench, assert_close};
use crate::numerics::{bf16_round, fake_fp4, hadamard};
use crate::ops::kv::testing::{NANO, assert_rounded, index_cache};
use crate::ops::rope::{Rope, rotate};
use dsv4_model::ModelConfig;

const BOTH: [Numerics; 2] = [Numerics::Float, Numerics::Published];
const SCALE: f32 = 0.011;

fn kernels(bench: &Bench, sizes: Sizes, numerics: Numerics) -> Indexer {
    let unit = unit(sizes, numerics);
    let kernel = |name| bench.kernel(&unit, name);
    Indexer {
        score: kernel("index_score"),
        queries: kernel("index_queries"),
        score_long: kernel("index_score_long"),
        select: kernel("index_select"),
    }
}

/// What is between the launches of one run.
struct Run {
    scores: Vec<f32>,
    selected: Vec<u32>,
}

/// Rows of two sequences at positions around the number that is kept. Queries against the reference's; each row's
/// scores against the reference's, in any company the same bits; the choice exactly that of its scores.
fn choose(sizes: Sizes, positions: &[(u32, u32)], numerics: Numerics) {
    let Some(mut bench) = Bench::new(numerics) else { return };
    let Sizes { heads, width, topk, ratio, per_page, .. } = sizes;
    let rows: Vec<Row> =
        positions.iter().map(|(slot, position)| Row { slot: *slot, position: *position, ..Row::default() }).collect();
    let visible = |row: &Row| ((row.position + 1) / ratio) as usize;
    let most = rows.iter().map(visible).max().unwrap();
    let pages_max = most.div_ceil(per_page as usize);
    let pages: Vec<u32> = (0..2 * pages_max as u32).rev().collect();
    let place = |row: &Row, w: usize| {
        pages[row.slot as usize * pages_max + w / per_page as usize] * per_page + (w % per_page as usize) as u32
    };
    let mut entries = bench.act(pages.len() * (per_page * width) as usize);
    // Entries with equal scores, and an outlier.
    let (head, tail) = entries.split_at_mut(width as usize);
    tail[..width as usize].copy_from_slice(head);
    let of_row = (heads * width) as usize;
    let (raw, hw) = (bench.act(rows.len() * of_row), bench.act(rows.len() * heads as usize));
    let kernels = kernels(&bench, sizes, numerics);
    let (de, dp, stride) = (bench.upload_act(&entries), bench.upload(&pages), most.next_multiple_of(4) + 4);
    let rope = Rope::new(&ModelConfig::parse(NANO).unwrap(), true);
    assert_eq!(rope.at(0).len() * 2, sizes.rope as usize);
    let turns: Vec<[f32; 2]> = rows.iter().flat_map(|r| rope.at(r.position)).map(|(c, s)| [c, s]).collect();

    let finished = bench.upload_act(&raw);
    let turns_of = |rows: std::ops::Range<usize>| bench.upload(&turns[rows.start * 32..rows.end * 32]);
    let device_turns = turns_of(0..rows.len());
    let args =
        IndexQueriesArgs { q: Out::at(finished.at()), turns: In::at(device_turns.at()), count: rows.len() as u32 };
    launch_queries(bench.gpu(), kernels, sizes, args).unwrap();
    let q = bench.download_act(&finished);
    let mut expected = raw.clone();
    for (i, head) in expected.chunks_exact_mut(width as usize).enumerate() {
        rotate(head, &rope.at(rows[i / heads as usize].position));
        bench.round(head);
        if numerics == Numerics::Published {
            hadamard(head);
            bench.round(head);
            fake_fp4(head);
            bench.round(head);
        }
    }
    assert_rounded(&q, &expected, numerics, 0.34);

    let (bins, arrived) = workspace(16);
    let (bins, arrived) = (bench.upload(&vec![0u32; bins as usize]), bench.upload(&vec![0u32; arrived as usize]));
    let run = |chosen: std::ops::Range<usize>, long: bool, times: u32| -> Run {
        let part = |of: &[f32], n: usize| bench.upload_act(&of[chosen.start * n..chosen.end * n]);
        let rows = bench.upload(&rows[chosen.clone()]);
        let (q, hw, turns) =
            (part(if long { &q } else { &raw }, of_row), part(&hw, heads as usize), turns_of(chosen.clone()));
        let scores = bench.buffer::<f32>(chosen.len() * stride);
        let selected = bench.buffer::<u32>(chosen.len() * topk as usize);
        let args = IndexScoreArgs {
            rows: In::at(rows.at()),
            q: In::at(q.at()),
            hw: In::at(hw.at()),
            turns: In::at(turns.at()),
            entries: In::at(de.at()),
            pages: In::at(dp.at()),
            scores: Out::at(scores.at()),
            bins: Out::at(bins.at()),
            arrived: Out::at(arrived.at()),
            selected: Out::at(selected.at()),
            stride: stride as u32,
            pages_max: pages_max as u32,
            count: chosen.len() as u32,
            per: 0,
            scale: SCALE,
        };
        for _ in 0..times {
            match long {
                false => launch_choose(bench.gpu(), kernels, sizes, numerics, most as u32, args).unwrap(),
                true => launch_choose_long(bench.gpu(), kernels, sizes, numerics, most as u32, args).unwrap(),
            }
        }
        let counts: Vec<u32> = [bins.values().unwrap(), arrived.values().unwrap()].concat();
        assert!(counts.iter().all(|n| *n == 0), "counts are left behind");
        Run { scores: scores.values().unwrap(), selected: selected.values().unwrap() }
    };
    let mut ways = vec![(true, 1)];
    if rows.len() <= 16 {
        // Once, and twice with the same counters.
        ways.extend([(false, 1), (false, 2)]);
    }
    for (long, times) in ways {
        let Run { scores, selected } = run(0..rows.len(), long, times);
        for (r, row) in rows.iter().enumerate() {
            let scores = &scores[r * stride..(r + 1) * stride];
            let selected = &selected[r * topk as usize..(r + 1) * topk as usize];
            let is_chosen = visible(row) > topk as usize;
            let written = if is_chosen { visible(row) } else { 0 };
            assert!(scores[written..].iter().all(|s| s.is_nan()), "row {r}: more than is visible");
            let mut state = index_cache(width as usize);
            for w in 0..written {
                let at = place(row, w) as usize * width as usize;
                state.entries.extend_from_slice(&entries[at..at + width as usize]);
            }
            let round = |v: f32| if numerics == Numerics::Published { bf16_round(v) } else { v };
            let weights: Vec<f32> =
                hw[r * heads as usize..][..heads as usize].iter().map(|v| round(v * SCALE)).collect();
            let expected = super::scores(&q[r * of_row..][..of_row], &weights, &state, written);
            assert_close(&scores[..written], &expected, Numerics::Float);
            let places: Vec<u32> = match is_chosen {
                true => top_k(&scores[..written], topk as usize).iter().map(|w| place(row, *w as usize)).collect(),
                false => vec![u32::MAX; topk as usize],
            };
            assert_eq!(selected, places, "row {r}, long: {long}");
            let alone = run(r..r + 1, long, 1);
            let same = alone.scores[..written].iter().zip(scores).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && alone.selected == selected, "row {r} alone, long: {long}");
        }
    }
}

#[test]
fn choices_are_the_references() {
    let nano = Sizes { heads: 4, width: 64, rope: 64, topk: 64, ratio: 4, per_page: 64 };
    let tiny = Sizes { heads: 8, width: 128, topk: 32, ..nano };
    let few = [(0, 300), (0, 301), (1, 258), (1, 259), (1, 2603), (0, 12)];
    // More rows than a decode step has: several share a block, sequences change within one.
    let many: Vec<(u32, u32)> = (0..18).map(|i| (i / 9, 600 + 7 * (i % 9))).collect();
    for numerics in BOTH {
        choose(nano, &few, numerics);
        choose(nano, &many, numerics);
        choose(nano, &many[..16], numerics);
        choose(tiny, &few, numerics);
    }
}

#[test]
fn choices_of_the_release_are_the_references() {
    let flash = Sizes { heads: 64, width: 128, rope: 64, topk: 512, ratio: 4, per_page: 64 };
    for numerics in BOTH {
        choose(flash, &[(0, 2100), (1, 2051), (1, 4446)], numerics);
    }
}

fn select(sizes: Sizes, rows: &[(u32, Vec<f32>)]) {
    let Some(bench) = Bench::new(Numerics::Float) else { return };
    let most = rows.iter().map(|(_, s)| s.len()).max().unwrap();
    let stride = most.next_multiple_of(4);
    let mut scores = vec![f32::INFINITY; rows.len() * stride];
    for (row, (_, s)) in scores.chunks_exact_mut(stride).zip(rows) {
        row[..s.len()].copy_from_slice(s);
    }
    let table: Vec<Row> = rows.iter().map(|(p, _)| Row { position: *p, ..Row::default() }).collect();
    let per_page = sizes.per_page as usize;
    let pages: Vec<u32> = (0..most.div_ceil(per_page) as u32).rev().collect();
    let (table, scores, device_pages) = (bench.upload(&table), bench.upload(&scores), bench.upload(&pages));
    let topk = sizes.topk as usize;
    let selected = bench.buffer::<u32>(rows.len() * topk);
    let args = IndexScoreArgs {
        rows: In::at(table.at()),
        q: In::none(),
        hw: In::none(),
        turns: In::none(),
        entries: In::none(),
        pages: In::at(device_pages.at()),
        scores: Out::at(scores.at()),
        bins: Out::none(),
        arrived: Out::none(),
        selected: Out::at(selected.at()),
        stride: stride as u32,
        pages_max: pages.len() as u32,
        count: rows.len() as u32,
        per: 0,
        scale: 1.0,
    };
    launch_select(bench.gpu(), kernels(&bench, sizes, Numerics::Float), most as u32, args).unwrap();
    let selected: Vec<u32> = selected.values().unwrap();
    for (r, (_, scores)) in rows.iter().enumerate() {
        let found = &selected[r * topk..][..topk];
        if scores.len() <= topk {
            assert!(found.iter().all(|w| *w == u32::MAX), "row {r}: a list of all");
            continue;
        }
        let place = |w: &u32| pages[*w as usize / per_page] * sizes.per_page + w % sizes.per_page;
        assert_eq!(found, top_k(scores, topk).iter().map(place).collect::<Vec<u32>>(), "row {r}");
    }
}

#[test]
fn selections_are_exact() {
    let Some(mut bench) = Bench::new(Numerics::Float) else { return };
    for topk in [32u32, 512] {
        let sizes = Sizes { heads: 4, width: 64, rope: 64, topk, ratio: 4, per_page: 64 };
        let mut rows = Vec::new();
        for visible in [0, 1, topk - 1, topk, topk + 1, topk + 2, 2 * topk + 3, 2048, 5001, 16390] {
            let n = visible as usize;
            let noise = bench.noise(n);
            let position = if visible == 0 { 2 } else { 4 * visible - 1 + visible % 4 };
            // Noise; few different values; all the same; both zeros; only negative ones; one that stands out; a few
            // that share all but their last bits, of which more are equal than can be listed.
            rows.push((position, noise.clone()));
            rows.push((position, noise.iter().map(|v| v.round()).collect()));
            rows.push((position, vec![-1.5; n]));
            rows.push((position, noise.iter().map(|v| 0.0 * v).collect()));
            rows.push((position, noise.iter().map(|v| -v.abs() - 1e-3).collect()));
            rows.push((position, (0..n).map(|i| if i + 1 == n { 1e30 } else { 1.0 + i as f32 * 1e-7 }).collect()));
            rows.push((position, (0..n).map(|i| f32::from_bits(0x3f80_0000 + (i as u32 * 7919 % 5))).collect()));
        }
        rows.iter().for_each(|(p, s)| assert_eq!((p + 1) as usize / 4, s.len()));
        select(sizes, &rows);
    }
}
