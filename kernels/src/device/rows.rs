//! What kernels know of the rows of a step: written once a step, read by every kernel that needs positions.

use dsv4_model::ops::Step;

/// The CUDA text of a row.
pub const CUDA: &str = "struct Row { u32 token, slot, position, start, first, source, pad0, pad1; };\n";

/// One row of the step.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, bytemuck::Pod, bytemuck::Zeroable)]
pub struct Row {
    /// Token id.
    pub token: u32,
    /// Slot of its sequence.
    pub slot: u32,
    /// Position in its sequence.
    pub position: u32,
    /// Position of the first row of its segment: older positions are in the rings, the others in the step's buffers.
    pub start: u32,
    /// Row of the step that has position `start`.
    pub first: u32,
    /// Draft steps: row of the source streams that it continues.
    pub source: u32,
    /// Zero.
    pub pad: [u32; 2],
}

/// The rows of a step.
pub fn rows(step: &Step) -> Vec<Row> {
    let mut out = Vec::with_capacity(step.tokens.len());
    for s in &step.segments {
        let first = out.len() as u32;
        for i in 0..s.rows {
            let row = out.len();
            out.push(Row {
                token: step.tokens.get(row).copied().unwrap_or_default(),
                slot: s.slot,
                position: s.start + i,
                start: s.start,
                first,
                source: step.source.get(row).copied().unwrap_or_default(),
                pad: [0; 2],
            });
        }
    }
    out
}
