use super::*;
use crate::device::rows::Row;
use crate::device::testing::{Bench, assert_close};
use crate::numerics::bf16_round;
use crate::ops::kv::testing::index_cache;

const BOTH: [Numerics; 2] = [Numerics::Float, Numerics::Published];

/// Rows of two sequences at positions around the number that is kept, each row's scores against the reference's, in
/// any company the same bits.
fn score(sizes: Sizes, positions: &[(u32, u32)], numerics: Numerics) {
    let Some(mut bench) = Bench::new(numerics) else { return };
    let Sizes { heads, width, topk, ratio, per_page } = sizes;
    let rows: Vec<Row> =
        positions.iter().map(|(slot, position)| Row { slot: *slot, position: *position, ..Row::default() }).collect();
    let visible = |row: &Row| ((row.position + 1) / ratio) as usize;
    let most = rows.iter().map(visible).max().unwrap();
    let pages_max = most.div_ceil(per_page as usize);
    let pages: Vec<u32> = (0..2 * pages_max as u32).rev().collect();
    let mut entries = bench.act(pages.len() * (per_page * width) as usize);
    // Entries with equal scores, and an outlier.
    let (head, tail) = entries.split_at_mut(width as usize);
    tail[..width as usize].copy_from_slice(head);
    let (q, hw) = (bench.act(rows.len() * (heads * width) as usize), bench.act(rows.len() * heads as usize));
    let scale = 0.011_f32;
    let kernel = bench.kernel(&unit(sizes, numerics), "index_score");
    let (de, dp, stride) = (bench.upload_act(&entries), bench.upload(&pages), most.next_multiple_of(4) + 4);

    let run = |chosen: std::ops::Range<usize>| -> Vec<f32> {
        let n = (heads * width) as usize;
        let rows = bench.upload(&rows[chosen.clone()]);
        let q = bench.upload_act(&q[chosen.start * n..chosen.end * n]);
        let hw = bench.upload_act(&hw[chosen.start * heads as usize..chosen.end * heads as usize]);
        let scores = bench.buffer::<f32>(chosen.len() * stride);
        let args = IndexScoreArgs {
            rows: In::at(rows.at()),
            q: In::at(q.at()),
            hw: In::at(hw.at()),
            entries: In::at(de.at()),
            pages: In::at(dp.at()),
            scores: Out::at(scores.at()),
            stride: stride as u32,
            pages_max: pages_max as u32,
            count: chosen.len() as u32,
            per: 0,
            scale,
        };
        launch_score(bench.gpu(), kernel, most as u32, args).unwrap();
        scores.values().unwrap()
    };
    let found = run(0..rows.len());
    for (r, row) in rows.iter().enumerate() {
        let scores = &found[r * stride..(r + 1) * stride];
        let written = if visible(row) > topk as usize { visible(row) } else { 0 };
        assert!(scores[written..].iter().all(|s| s.is_nan()), "row {r}: more than is visible");
        let mut state = index_cache(width as usize);
        for w in 0..written {
            let page = pages[row.slot as usize * pages_max + w / per_page as usize] as usize;
            let at = (page * per_page as usize + w % per_page as usize) * width as usize;
            state.entries.extend_from_slice(&entries[at..at + width as usize]);
        }
        let round = |v: f32| if numerics == Numerics::Published { bf16_round(v) } else { v };
        let weights: Vec<f32> = hw[r * heads as usize..][..heads as usize].iter().map(|v| round(v * scale)).collect();
        let q = &q[r * (heads * width) as usize..][..(heads * width) as usize];
        let expected = super::scores(q, &weights, &state, written);
        assert_close(&scores[..written], &expected, Numerics::Float);
        let alone = run(r..r + 1);
        assert!(alone[..written].iter().zip(scores).all(|(a, b)| a.to_bits() == b.to_bits()), "row {r} alone");
    }
}

#[test]
fn scores_are_the_references() {
    let nano = Sizes { heads: 4, width: 64, topk: 64, ratio: 4, per_page: 64 };
    let tiny = Sizes { heads: 8, width: 128, topk: 32, ratio: 4, per_page: 64 };
    let flash = Sizes { heads: 64, width: 128, topk: 512, ratio: 4, per_page: 64 };
    let few = [(0, 300), (0, 301), (1, 258), (1, 259), (1, 1023), (0, 12)];
    // More rows than a decode step has: several share a block, sequences change within one.
    let many: Vec<(u32, u32)> = (0..18).map(|i| (i / 9, 600 + 7 * (i % 9))).collect();
    for numerics in BOTH {
        score(nano, &few, numerics);
        score(nano, &many, numerics);
        score(tiny, &few, numerics);
        score(flash, &[(0, 2100), (1, 2051), (1, 2046)], numerics);
    }
}

fn select(sizes: Sizes, rows: &[(u32, Vec<f32>)]) {
    let Some(bench) = Bench::new(Numerics::Float) else { return };
    let stride = rows.iter().map(|(_, s)| s.len()).max().unwrap().next_multiple_of(4);
    let mut scores = vec![f32::INFINITY; rows.len() * stride];
    for (row, (_, s)) in scores.chunks_exact_mut(stride).zip(rows) {
        row[..s.len()].copy_from_slice(s);
    }
    let table: Vec<Row> = rows.iter().map(|(p, _)| Row { position: *p, ..Row::default() }).collect();
    let (table, scores) = (bench.upload(&table), bench.upload(&scores));
    let topk = sizes.topk as usize;
    let (selected, counts) = (bench.buffer::<u32>(rows.len() * topk), bench.buffer::<u32>(rows.len()));
    let args = IndexSelectArgs {
        rows: In::at(table.at()),
        scores: In::at(scores.at()),
        selected: Out::at(selected.at()),
        counts: Out::at(counts.at()),
        stride: stride as u32,
    };
    let kernel = bench.kernel(&unit(sizes, Numerics::Float), "index_select");
    launch_select(bench.gpu(), kernel, rows.len() as u32, args).unwrap();
    let (selected, counts): (Vec<u32>, Vec<u32>) = (selected.values().unwrap(), counts.values().unwrap());
    for (r, (_, scores)) in rows.iter().enumerate() {
        let expected = top_k(scores, topk);
        assert_eq!(counts[r] as usize, expected.len(), "row {r}");
        assert_eq!(&selected[r * topk..][..expected.len()], expected, "row {r}");
    }
}

#[test]
fn selections_are_exact() {
    let Some(mut bench) = Bench::new(Numerics::Float) else { return };
    for topk in [32u32, 512] {
        let sizes = Sizes { heads: 4, width: 64, topk, ratio: 4, per_page: 64 };
        let mut rows = Vec::new();
        for visible in [0, 1, topk - 1, topk, topk + 1, topk + 2, 2 * topk + 3, 2048, 5001] {
            let n = visible as usize;
            let noise = bench.noise(n);
            let position = if visible == 0 { 2 } else { 4 * visible - 1 + visible % 4 };
            // Noise; few different values; all the same; both zeros; only negative ones; one that stands out.
            rows.push((position, noise.clone()));
            rows.push((position, noise.iter().map(|v| v.round()).collect()));
            rows.push((position, vec![-1.5; n]));
            rows.push((position, noise.iter().map(|v| 0.0 * v).collect()));
            rows.push((position, noise.iter().map(|v| -v.abs() - 1e-3).collect()));
            rows.push((position, (0..n).map(|i| if i + 1 == n { 1e30 } else { 1.0 + i as f32 * 1e-7 }).collect()));
        }
        rows.iter().for_each(|(p, s)| assert_eq!((p + 1) as usize / 4, s.len()));
        select(sizes, &rows);
    }
}
