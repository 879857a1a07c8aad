use super::*;
use crate::device::Buffer;
use crate::device::rows::Row;
use crate::device::testing::{Bench, assert_close};

/// Of Flash, tiny, nano and of no model.
const SIZES: [(usize, usize); 5] = [(256, 6), (8, 3), (8, 2), (40, 6), (101, 1)];
const SCALE: f32 = 1.5;
/// Width of rows where the gate does not matter.
const NARROW: usize = 256;

struct Case {
    scores: Vec<f32>,
    bias: Vec<f32>,
    /// Tokens of the rows and the experts of every token.
    table: Option<(Vec<u32>, Vec<i32>)>,
}

/// Runs the kernel and the reference on `case`.
fn check(bench: &Bench, numerics: Numerics, (experts, k): (usize, usize), case: &Case) {
    let kernel = bench.kernel(&unit(NARROW, experts, k, numerics), "route");
    let count = case.scores.len() / experts;
    let (scores, bias) = (bench.upload(&case.scores), bench.upload(&case.bias));
    let (chosen, shares) = (bench.buffer::<u32>(count * k), bench.buffer::<f32>(count * k));
    let stored = case.table.as_ref().map(|(tokens, table)| {
        let rows: Vec<Row> = tokens.iter().map(|t| Row { token: *t, ..Row::default() }).collect();
        (bench.upload(&rows), bench.upload(table))
    });
    let args = RouteArgs {
        scores: In::at(scores.at()),
        bias: if stored.is_some() { In::none() } else { In::at(bias.at()) },
        table: stored.as_ref().map_or(In::none(), |(_, table)| In::at(table.at())),
        rows: stored.as_ref().map_or(In::none(), |(rows, _)| In::at(rows.at())),
        chosen: Out::at(chosen.at()),
        weights: Out::at(shares.at()),
        scale: SCALE,
        count: count as u32,
    };
    launch(bench.gpu(), kernel, args).unwrap();
    let affinities: Vec<f32> = case.scores.iter().map(|x| affinity(*x)).collect();
    check_route(case, &affinities, (experts, k), &chosen, &shares);
}

/// Checks a route that follows from `affinities`.
fn check_route(case: &Case, affinities: &[f32], (experts, k): (usize, usize), chosen: &Buffer, shares: &Buffer) {
    let (mut experts_of, mut weights_of) = (Vec::new(), Vec::new());
    for (r, affinities) in affinities.chunks(experts).enumerate() {
        let picked = match &case.table {
            Some((tokens, table)) => {
                let mut picked: Vec<u32> = table[tokens[r] as usize * k..][..k].iter().map(|e| *e as u32).collect();
                picked.sort_unstable();
                picked
            }
            None => choose(affinities, &case.bias, k),
        };
        weights_of.extend(super::weights(affinities, &picked, SCALE));
        experts_of.extend(picked);
    }
    assert_eq!(chosen.values::<u32>().unwrap(), experts_of, "{k} of {experts}");
    // Nothing here is rounded to the activation format.
    assert_close(&shares.values::<f32>().unwrap(), &weights_of, Numerics::Float);
}

fn each(test: impl Fn(&mut Bench, Numerics, (usize, usize))) {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        SIZES.iter().for_each(|size| test(&mut bench, numerics, *size));
    }
}

#[test]
fn kernel_is_the_reference() {
    each(|bench, numerics, (experts, k)| {
        for rows in [1, 4, 7] {
            // Also scores where softplus is linear, and where it vanishes.
            let scores = bench.noise(rows * experts).iter().map(|v| v * 12.0).collect();
            let bias = bench.noise(experts).iter().map(|v| v * 0.5).collect();
            check(bench, numerics, (experts, k), &Case { scores, bias, table: None });
        }
    });
}

#[test]
fn ties_go_to_the_lower_index() {
    each(|bench, numerics, (experts, k)| {
        // Few distinct values, and all the same.
        let scores = (0..5 * experts).map(|_| bench.below(3) as f32 - 1.0).collect();
        check(bench, numerics, (experts, k), &Case { scores, bias: vec![0.25; experts], table: None });
        let case = Case { scores: vec![-3.0; experts], bias: vec![-2.0; experts], table: None };
        check(bench, numerics, (experts, k), &case);
    });
}

#[test]
fn hashed_layers_take_the_experts_of_the_token() {
    each(|bench, numerics, (experts, k)| {
        // Experts of a token are distinct and in no order.
        let table: Vec<i32> = (0..50)
            .flat_map(|_| {
                let mut all: Vec<i32> = (0..experts as i32).collect();
                (0..k).map(|_| all.swap_remove(bench.below(all.len() as u64) as usize)).collect::<Vec<_>>()
            })
            .collect();
        let tokens = (0..6).map(|_| bench.below(50) as u32).collect();
        let case = Case { scores: bench.noise(6 * experts), bias: vec![0.0; experts], table: Some((tokens, table)) };
        check(bench, numerics, (experts, k), &case);
    });
}

/// Rows on their way through the gate.
struct Gated {
    x: Vec<f32>,
    w: Vec<u16>,
    hidden: usize,
    case: Case,
}

/// What it gives.
#[derive(Debug, PartialEq)]
struct Routed {
    affinities: Vec<f32>,
    chosen: Vec<u32>,
    weights: Vec<f32>,
}

impl Gated {
    fn new(bench: &mut Bench, hidden: usize, experts: usize, rows: usize) -> Gated {
        // Scores of about 2: some are linear, some vanish.
        let gain = 2.0 / (hidden as f32).sqrt();
        let w = bench.noise(experts * hidden).iter().map(|v| ((v * gain).to_bits() >> 16) as u16).collect();
        let bias = bench.noise(experts).iter().map(|v| v * 0.5).collect();
        let case = Case { scores: vec![], bias, table: None };
        Gated { x: bench.act(rows * hidden), w, hidden, case }
    }

    /// Affinities in float64.
    fn affinities(&self) -> Vec<f32> {
        let w: Vec<f64> = self.w.iter().map(|bits| f64::from(f32::from_bits(u32::from(*bits) << 16))).collect();
        let dot = |x: &[f32], w: &[f64]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * w).sum::<f64>();
        let row = |x: &[f32]| w.chunks(self.hidden).map(|w| affinity(dot(x, w) as f32)).collect::<Vec<_>>();
        self.x.chunks(self.hidden).flat_map(row).collect()
    }

    /// By the kernel, `times` times over.
    fn run(&self, bench: &Bench, kernel: Kernel, (experts, k): (usize, usize), times: usize) -> Routed {
        let rows = self.x.len() / self.hidden;
        let (x, w, bias) = (bench.upload_act(&self.x), bench.upload(&self.w), bench.upload(&self.case.bias));
        let arrivals = bench.upload(&vec![0u32; arrivals(rows as u64) as usize]);
        let stored = self.case.table.as_ref().map(|(tokens, table)| {
            let rows: Vec<Row> = tokens.iter().map(|t| Row { token: *t, ..Row::default() }).collect();
            (bench.upload(&rows), bench.upload(table))
        });
        let mut last = None;
        for _ in 0..times {
            let scores = bench.buffer::<f32>(rows * experts);
            let (chosen, weights) = (bench.buffer::<u32>(rows * k), bench.buffer::<f32>(rows * k));
            let args = GateArgs {
                x: In::at(x.at()),
                w: In::at(w.at()),
                scores: Out::at(scores.at()),
                bias: if stored.is_some() { In::none() } else { In::at(bias.at()) },
                table: stored.as_ref().map_or(In::none(), |(_, table)| In::at(table.at())),
                rows: stored.as_ref().map_or(In::none(), |(rows, _)| In::at(rows.at())),
                chosen: Out::at(chosen.at()),
                weights: Out::at(weights.at()),
                arrivals: Out::at(arrivals.at()),
                scale: SCALE,
                count: rows as u32,
            };
            launch_gate(bench.gpu(), kernel, experts as u32, args).unwrap();
            assert!(arrivals.values::<u32>().unwrap().iter().all(|n| *n == 0), "counters after a launch");
            // What is chosen follows from what was computed.
            let affinities: Vec<f32> = scores.values().unwrap();
            check_route(&self.case, &affinities, (experts, k), &chosen, &weights);
            let found = Routed { affinities, chosen: chosen.values().unwrap(), weights: weights.values().unwrap() };
            assert!(last.is_none_or(|last| last == found), "another launch");
            last = Some(found);
        }
        last.expect("a launch")
    }
}

#[test]
fn the_gate_is_the_reference() {
    // A width that is less than a block has threads, ragged ones, that of Flash.
    let widths = [4096, NARROW, 320, 2560, NARROW];
    each(|bench, numerics, (experts, k)| {
        let at = SIZES.iter().position(|size| *size == (experts, k)).expect("one of them");
        let hidden = widths[at];
        let kernel = bench.kernel(&unit(hidden, experts, k, numerics), "gate");
        for rows in [1, 5, 18] {
            let mut gated = Gated::new(bench, hidden, experts, rows);
            let found = gated.run(bench, kernel, (experts, k), 2);
            assert_close(&found.affinities, &gated.affinities(), Numerics::Float);
            // Neighbours of a token's first expert, backwards.
            let of = |token: usize| (0..k).rev().map(move |i| ((token * 7 + i) % experts) as i32);
            gated.case.table = Some(((0..rows as u32).map(|r| r * 7 % 50).collect(), (0..50).flat_map(of).collect()));
            let hashed = gated.run(bench, kernel, (experts, k), 1);
            assert_eq!(hashed.affinities, found.affinities);
        }
    });
}

#[test]
fn ties_in_the_gate_go_to_the_lower_index() {
    each(|bench, numerics, (experts, k)| {
        let kernel = bench.kernel(&unit(NARROW, experts, k, numerics), "gate");
        let mut gated = Gated::new(bench, NARROW, experts, 3);
        // All experts are one of three.
        let rows: Vec<&[u16]> = (0..experts).map(|e| &gated.w[e % 3 * NARROW..][..NARROW]).collect();
        gated.w = rows.concat();
        gated.case.bias.fill(0.25);
        gated.run(bench, kernel, (experts, k), 1);
    });
}

#[test]
fn a_row_of_the_gate_has_the_same_bits_among_others() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        let (hidden, experts, k, rows) = (4096, 40, 6, 35);
        let kernel = bench.kernel(&unit(hidden, experts, k, numerics), "gate");
        let gated = Gated::new(&mut bench, hidden, experts, rows);
        let all = gated.run(&bench, kernel, (experts, k), 1);
        let mut first = 0;
        for count in 1..=16 {
            first = if first + count > rows { 0 } else { first };
            let x = gated.x[first * hidden..(first + count) * hidden].to_vec();
            let case = Case { scores: vec![], bias: gated.case.bias.clone(), table: None };
            let some = Gated { x, w: gated.w.clone(), hidden, case };
            let found = some.run(&bench, kernel, (experts, k), 1);
            assert_eq!(found.affinities, all.affinities[first * experts..(first + count) * experts]);
            assert_eq!(found.chosen, all.chosen[first * k..(first + count) * k]);
            assert_eq!(found.weights, all.weights[first * k..(first + count) * k]);
            first += count;
        }
    }
}
