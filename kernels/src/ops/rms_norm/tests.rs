use super::*;
use crate::device::rows::Row;
use crate::device::testing::{Bench, assert_close};

/// Rows as the reference normalises them.
fn expected(x: &[f32], cols: usize, w: &[f32], bench: &Bench) -> Vec<f32> {
    let mut out = x.to_vec();
    for row in out.chunks_exact_mut(cols) {
        rms_norm(row, w, 1e-6);
    }
    bench.round(&mut out);
    out
}

#[test]
fn kernel_is_the_reference() {
    for numerics in [Numerics::Float, Numerics::Published] {
        let Some(mut bench) = Bench::new(numerics) else { return };
        for (cols, rows) in [(128, 3), (256, 1), (1024, 2), (4096, 2)] {
            let kernel = bench.kernel(&unit(cols, numerics), "rms_norm");
            let stride = cols + 32;
            let x = bench.act(rows * stride);
            let w = bench.noise(cols);
            let y = bench.buffer_act(rows * cols);
            let (dx, dw) = (bench.upload_act(&x), bench.upload(&w));
            let args = RmsNormArgs {
                x: In::at(dx.at()),
                w: In::at(dw.at()),
                y: Out::at(y.at()),
                gather: In::none(),
                stride: stride as u32,
                per: 1,
                eps: 1e-6,
            };
            launch(bench.gpu(), kernel, rows as u32, args).unwrap();
            let tight: Vec<f32> = x.chunks_exact(stride).flat_map(|row| row[..cols].to_vec()).collect();
            assert_close(&bench.download_act(&y), &expected(&tight, cols, &w, &bench), numerics);

            // Two streams of each source row.
            let sources = [2u32, 0, 1];
            let gather: Vec<Row> = sources.iter().map(|s| Row { source: *s, ..Row::default() }).collect();
            let from = bench.act(3 * 2 * cols);
            let (dg, df) = (bench.upload(&gather), bench.upload_act(&from));
            let y = bench.buffer_act(6 * cols);
            let args = RmsNormArgs {
                x: In::at(df.at()),
                y: Out::at(y.at()),
                gather: In::at(dg.at()),
                stride: cols as u32,
                per: 2,
                ..args
            };
            launch(bench.gpu(), kernel, 6, args).unwrap();
            let gathered: Vec<f32> =
                sources.iter().flat_map(|s| from[*s as usize * 2 * cols..][..2 * cols].to_vec()).collect();
            assert_close(&bench.download_act(&y), &expected(&gathered, cols, &w, &bench), numerics);
        }
    }
}
