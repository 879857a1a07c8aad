use super::*;
use crate::device::Buffer;
use crate::device::rows::Row;
use crate::device::testing::Bench;

const STREAMS: usize = 4;
/// Of nano and tiny, of no model, of Flash.
const WIDTHS: [usize; 3] = [256, 320, 4096];

fn each(test: impl Fn(&mut Bench, usize, Numerics)) {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        WIDTHS.iter().for_each(|dim| test(&mut bench, *dim, numerics));
    }
}

#[test]
fn embed_looks_up_the_tokens_of_its_rank() {
    each(|bench, dim, numerics| {
        let kernel = bench.kernel(&unit(dim, STREAMS, numerics), "embed");
        // Two ranks of 100 tokens; the step has both ends of both.
        let tokens = [0u32, 99, 100, 199, 57];
        let table: Vec<u16> = (0..100 * dim).map(|_| bench.below(0x7f80) as u16).collect();
        let rows: Vec<Row> = tokens.iter().map(|t| Row { token: *t, ..Row::default() }).collect();
        let (rows, stored) = (bench.upload(&rows), bench.upload(&table));
        for first in [0, 100] {
            let y = bench.buffer::<f32>(tokens.len() * dim);
            let args = EmbedArgs {
                rows: In::at(rows.at()),
                table: In::at(stored.at()),
                y: Out::at(y.at()),
                first_token: first,
                vocab: 100,
            };
            launch_embed(bench.gpu(), kernel, tokens.len() as u32, args).unwrap();
            let expected: Vec<f32> = tokens
                .iter()
                .flat_map(|t| match t.checked_sub(first).filter(|local| *local < 100) {
                    Some(local) => table[local as usize * dim..][..dim].to_vec(),
                    None => vec![0; dim],
                })
                .map(|bits| f32::from_bits(u32::from(bits) << 16))
                .collect();
            assert_eq!(y.values::<f32>().unwrap(), expected, "rank of token {first}");
        }
    });
}

#[test]
fn expand_copies_into_every_stream() {
    each(|bench, dim, numerics| {
        let kernel = bench.kernel(&unit(dim, STREAMS, numerics), "expand");
        let (x, all) = (bench.act(3 * dim), bench.noise(3 * 3 * dim));
        let (from, parts) = (bench.upload_act(&x), bench.upload(&all));
        let check = |x: In<Act>, parts: In<F32>, n: u32, expected: &[f32]| {
            let h = bench.buffer_act(3 * STREAMS * dim);
            let args = ExpandArgs { x, parts, count: 3 * dim as u64, h: Out::at(h.at()), n };
            launch_expand(bench.gpu(), kernel, 3, args).unwrap();
            let expected: Vec<f32> = expected.chunks(dim).flat_map(|row| row.repeat(STREAMS)).collect();
            assert_eq!(bench.download_act(&h), expected);
        };
        check(In::at(from.at()), In::none(), 0, &x);
        for n in [1, 3] {
            let mut sum = all[..3 * dim].to_vec();
            for part in all.chunks(3 * dim).take(n).skip(1) {
                sum.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
            bench.round(&mut sum);
            check(In::none(), In::at(parts.at()), n as u32, &sum);
        }
    });
}

#[test]
fn settle_adds_in_rank_order() {
    each(|bench, dim, numerics| {
        let kernel = bench.kernel(&unit(dim, STREAMS, numerics), "settle");
        for (rows, ranks) in [(1, 1), (3, 2), (2, 4)] {
            let count = rows * dim;
            let parts = bench.noise(ranks * count);
            let (from, y) = (bench.upload(&parts), bench.buffer_act(count));
            let args =
                SettleArgs { parts: In::at(from.at()), y: Out::at(y.at()), count: count as u64, n: ranks as u32 };
            launch_settle(bench.gpu(), kernel, args).unwrap();
            let mut expected = parts[..count].to_vec();
            for part in parts[count..].chunks(count) {
                expected.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
            }
            bench.round(&mut expected);
            assert_eq!(bench.download_act(&y), expected);
        }
    });
}

#[test]
fn draft_add_adds_to_every_stream() {
    each(|bench, dim, numerics| {
        let kernel = bench.kernel(&unit(dim, STREAMS, numerics), "draft_add");
        let (h, e) = (bench.act(3 * STREAMS * dim), bench.act(3 * dim));
        let (streams, embedded) = (bench.upload_act(&h), bench.upload_act(&e));
        let mut expected: Vec<f32> =
            h.iter().enumerate().map(|(i, v)| v + e[i / dim / STREAMS * dim + i % dim]).collect();
        bench.round(&mut expected);
        let run = |y: &Buffer| {
            let args = DraftAddArgs { h: In::at(streams.at()), e: In::at(embedded.at()), y: Out::at(y.at()) };
            launch_draft_add(bench.gpu(), kernel, 3, args).unwrap();
            assert_eq!(bench.download_act(y), expected);
        };
        run(&bench.buffer_act(h.len()));
        run(&streams);
    });
}
