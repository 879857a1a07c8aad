//! Gated pooling of 4 or 128 tokens into one entry (SPEC 3.5).

use crate::state::Compressed;

/// Pools the window that ends at position `end - 1` (a multiple of `ratio`) into `out` (`[width]`).
///
/// Per channel: softmax of the gates over the window's rows, times the values. With ratio 4 windows
/// overlap: the first half of the channels of the previous 4 tokens joins the second half of these 4.
pub fn pool(state: &Compressed, end: usize, ratio: usize, out: &mut [f32]) {
    let width = state.width;
    let start = end - ratio;
    // Rows of the pool and where their channels begin.
    let mut rows: Vec<(usize, usize)> = Vec::with_capacity(2 * ratio);
    if ratio == 4 {
        if start >= ratio {
            rows.extend((start - ratio..start).map(|t| (t, 0)));
        }
        rows.extend((start..end).map(|t| (t, width)));
    } else {
        rows.extend((start..end).map(|t| (t, 0)));
    }
    let mut max = vec![f32::NEG_INFINITY; width];
    for (t, at) in &rows {
        for (m, g) in max.iter_mut().zip(&state.gates.row(*t)[*at..at + width]) {
            *m = m.max(*g);
        }
    }
    let mut sum = vec![0f32; width];
    out.fill(0.0);
    for (t, at) in &rows {
        let gates = &state.gates.row(*t)[*at..at + width];
        let values = &state.values.row(*t)[*at..at + width];
        for c in 0..width {
            let weight = libm::expf(gates[c] - max[c]);
            sum[c] += weight;
            out[c] += weight * values[c];
        }
    }
    for (o, s) in out.iter_mut().zip(&sum) {
        *o /= s;
    }
}
