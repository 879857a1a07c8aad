use super::*;
use crate::device::rows::Row;
use crate::device::testing::{Bench, assert_close};

/// Of Flash, tiny, nano and of no model.
const SIZES: [(usize, usize); 5] = [(256, 6), (8, 3), (8, 2), (40, 6), (100, 1)];
const SCALE: f32 = 1.5;

struct Case {
    scores: Vec<f32>,
    bias: Vec<f32>,
    /// Tokens of the rows and the experts of every token.
    table: Option<(Vec<u32>, Vec<i32>)>,
}

/// Runs the kernel and the reference on `case`.
fn check(bench: &Bench, numerics: Numerics, (experts, k): (usize, usize), case: &Case) {
    let kernel = bench.kernel(&unit(experts, k, numerics), "route");
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
    let (mut experts_of, mut weights_of) = (Vec::new(), Vec::new());
    for (r, row) in case.scores.chunks(experts).enumerate() {
        let affinities: Vec<f32> = row.iter().map(|x| affinity(*x)).collect();
        let picked = match &case.table {
            Some((tokens, table)) => {
                let mut picked: Vec<u32> = table[tokens[r] as usize * k..][..k].iter().map(|e| *e as u32).collect();
                picked.sort_unstable();
                picked
            }
            None => choose(&affinities, &case.bias, k),
        };
        weights_of.extend(super::weights(&affinities, &picked, SCALE));
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
