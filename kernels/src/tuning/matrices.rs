//! `gemv` as the tuner sees it: every launch of a decode step that multiplies matrices with a few rows.

use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout};
use dsv4_model::tensors::{Block, Kind, TensorRow, layers, table};
use dsv4_model::{ModelConfig, Tp};

use super::cost::{Kind as How, Pipe, Work};
use super::tunables::{DECODE_ROWS, Loaded, Prepared, Scope, Tunable, free};
use super::{Values, data, point_of, values_of};
use crate::device::unit::Unit;
use crate::device::{Buffer, DeviceError, Gpu, In, Launch};
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemv::{self, Gemv, GemvPoint, Segment, TILE_ROWS};

/// A matrix of a launch.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub rows: u32,
    pub cols: u32,
    pub format: Format,
    pub quantised: bool,
    /// Values before its activations in a row of them.
    pub x_at: u32,
}

impl Part {
    /// Bytes of codes and scales that a product reads.
    pub fn bytes(&self) -> u64 {
        let layout = MatrixLayout::new(self.format, self.rows.into(), self.cols.into());
        layout.codes_bytes + layout.scales_bytes
    }
}

/// A launch with several matrices, and how often a step has it.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub parts: Vec<Part>,
    /// Activations of a row.
    pub x_cols: u32,
    pub calls: f64,
    /// Steps of a few rows have another kernel for it.
    pub many_rows: bool,
}

/// How tables name a launch.
fn name_of<'a>(parts: impl Iterator<Item = (u32, u32, Format, bool)> + 'a) -> String {
    let part = |(rows, cols, format, quantised): (u32, u32, Format, bool)| {
        let raw = if format == Format::Fp8 && !quantised { " raw" } else { "" };
        format!("{rows}x{cols} {}{raw}", format.name().to_lowercase())
    };
    parts.map(part).collect::<Vec<_>>().join(" + ")
}

/// The shape of a launch with these segments.
pub(super) fn shape_of(segments: &[Segment]) -> String {
    name_of(segments.iter().map(|s| (s.rows, s.cols, s.format, s.quantised)))
}

/// The launches of a step, each shape once.
pub(super) fn groups(config: &ModelConfig, tp: Tp) -> Vec<Group> {
    let rows = table(config);
    let find = |block, kind| rows.iter().find(|r| r.id.block == block && r.id.kind == kind);
    let part = |row: &TensorRow| -> Part {
        // A cut that does not fall on a unit was refused long before.
        let shape = row.local_shape(tp).unwrap_or_else(|e| panic!("{}: {e}", row.name));
        let (rows, cols) = (shape[shape.len() - 2] as u32, shape[shape.len() - 1] as u32);
        Part { rows, cols, format: row.format, quantised: row.format == Format::Fp8, x_at: 0 }
    };
    let mut out: Vec<Group> = Vec::new();
    let mut add = |parts: Vec<Part>, x_cols: Option<u32>, many_rows: bool| {
        let Some(first) = parts.first() else { return };
        let x_cols = x_cols.unwrap_or(first.cols);
        let name = |parts: &[Part]| name_of(parts.iter().map(|p| (p.rows, p.cols, p.format, p.quantised)));
        match out.iter_mut().find(|g| name(&g.parts) == name(&parts)) {
            Some(group) => group.calls += 1.0,
            None => out.push(Group { parts, x_cols, calls: 1.0, many_rows }),
        }
    };
    for layer in layers(config) {
        let of = |kinds: &[Kind]| kinds.iter().filter_map(|k| find(layer.block, *k)).map(part).collect::<Vec<_>>();
        use Kind::*;
        let inputs = [WqA, Wkv, CompressorWkv, CompressorWgate, IndexerWkv, IndexerWgate, IndexerWeightsProj];
        add(of(&inputs), None, false);
        add(of(&[WqB, IndexerWqB]), None, false);
        if let Some(wo_a) = of(&[WoA]).first() {
            let groups = config.o_groups as u32 / tp.size();
            let count = wo_a.rows / groups.max(1);
            let cut = |g| Part { rows: count, quantised: false, x_at: g * wo_a.cols, ..wo_a.clone() };
            add((0..groups).map(cut).collect(), Some(groups * wo_a.cols), false);
        }
        add(of(&[WoB]), None, false);
        add(of(&[Gate]), None, true);
    }
    add(find(Block::Global, Kind::Head).map(part).into_iter().collect(), None, false);
    out
}

/// A launch at a number of rows.
struct Matrices {
    group: Group,
    shape: String,
    rows: u32,
    /// Numbers of a point that only launches depend on.
    free: Vec<String>,
}

/// All launches at all numbers of rows.
pub(super) fn all(config: &ModelConfig, tp: Tp) -> Vec<Box<dyn Tunable>> {
    let mut list: Vec<Box<dyn Tunable>> = Vec::new();
    for rows in DECODE_ROWS {
        let unit = |point| gemv::unit(rows, point, Numerics::Published);
        let free = free(GemvPoint::all(), values_of, unit);
        for group in groups(config, tp).into_iter().filter(|group| !group.many_rows) {
            let shape = name_of(group.parts.iter().map(|p| (p.rows, p.cols, p.format, p.quantised)));
            let fits = |p: &Part| Gemv::fits(rows, GemvPoint::DEFAULT, Numerics::Published, p.format, p.cols);
            if group.parts.iter().all(fits) {
                list.push(Box::new(Matrices { group, shape, rows, free: free.clone() }));
            }
        }
    }
    list
}

fn typed(values: &Values) -> GemvPoint {
    point_of(&GemvPoint::DEFAULT, &[values]).unwrap_or_else(|e| panic!("a point of gemv: {e}"))
}

impl Tunable for Matrices {
    fn kernel(&self) -> &'static str {
        "gemv"
    }
    fn shape(&self) -> &str {
        &self.shape
    }
    fn rows(&self) -> u32 {
        self.rows
    }
    fn scope(&self) -> Scope {
        Scope { group: "gemv", bucket: self.rows, machine: &["warps"], free: self.free.clone(), sized: false }
    }
    fn calls(&self) -> f64 {
        self.group.calls
    }
    fn points(&self) -> Vec<Values> {
        let fits = |p: &GemvPoint| {
            self.group.parts.iter().all(|m| Gemv::fits(self.rows, *p, Numerics::Published, m.format, m.cols))
        };
        let mut others: Vec<GemvPoint> = GemvPoint::all().filter(|p| *p != GemvPoint::DEFAULT).filter(fits).collect();
        // The cost model does not know how far ahead is best: of equals the untuned one's comes first.
        others.sort_by_key(|p| p.ahead != GemvPoint::DEFAULT.ahead);
        [GemvPoint::DEFAULT].into_iter().chain(others).map(|p| values_of(&p)).collect()
    }
    fn unit(&self, point: &Values) -> Unit {
        gemv::unit(self.rows, typed(point), Numerics::Published)
    }
    fn entry(&self, _point: &Values) -> &'static str {
        "gemv"
    }
    fn bytes(&self) -> u64 {
        self.group.parts.iter().map(Part::bytes).sum()
    }
    fn flops(&self) -> f64 {
        self.group.parts.iter().map(|p| 2.0 * f64::from(self.rows) * f64::from(p.rows) * f64::from(p.cols)).sum()
    }
    fn work(&self, point: &Values, shapes: &[Launch]) -> Work {
        let point = typed(point);
        let blocks = f64::from(shapes[0].grid[0]);
        let stage = |p: &Part| f64::from(p.cols * self.rows) / 8.0 / 32.0 * Pipe::STAGE_ISSUE;
        // Blocks have about as many bytes each: so many tiles of each matrix, of which a warp has a slice.
        let share =
            self.group.parts.iter().map(|p| f64::from(p.bytes_of_row()) * f64::from(p.rows)).sum::<f64>() / blocks;
        let (mut issue, mut chain, mut flight) = (0.0, 0f64, 0.0);
        for part in &self.group.parts {
            let steps = gemv::steps_of(part.bytes_of_row());
            let split = gemv::split_of(steps, point.warps);
            let all = part.rows.div_ceil(TILE_ROWS);
            let bytes = f64::from(part.bytes_of_row() * TILE_ROWS);
            let tiles = ((share / bytes).round() as u32).clamp(1, all);
            let longest = tiles.div_ceil(point.warps / split) * steps.div_ceil(split);
            let of_step = Pipe::of(part.format, part.quantised).step_issue;
            issue += f64::from(all * steps) * of_step + f64::from(all) / f64::from(tiles) * stage(part);
            chain = chain.max(f64::from(longest) * of_step + stage(part) / f64::from(point.warps));
            let ahead = f64::from(point.warps.min(tiles * split) * longest.min(point.depth_of(self.rows))) * 2048.0;
            flight += ahead * f64::from(all) / f64::from(tiles);
        }
        Work {
            kind: How::Stream,
            dram_bytes: self.bytes() as f64,
            l2_bytes: self.bytes() as f64,
            tensor_flops: self.group.parts.iter().map(|p| 16.0 * f64::from(p.rows) * f64::from(p.cols)).sum(),
            issue,
            chain,
            flight_bytes: flight / blocks,
            syncs: 2.0,
            shape: shapes[0],
            launches: shapes.len() as f64,
        }
    }
    fn prepare(&self, gpu: &Arc<dyn Gpu>, copies: u32) -> Result<Box<dyn Prepared>, DeviceError> {
        let mut noise = data::Noise::new(1);
        let mut weights = Vec::new();
        for part in &self.group.parts {
            let layout = MatrixLayout::new(part.format, part.rows.into(), part.cols.into());
            let buffer = Buffer::new(gpu, layout.stride * u64::from(copies))?;
            data::matrices(gpu.as_ref(), buffer.at(), part.format, &layout, copies.into(), &mut noise)?;
            weights.push((buffer, layout));
        }
        let x = Buffer::new(gpu, u64::from(self.rows * self.group.x_cols) * 2)?;
        data::activations(gpu.as_ref(), &x, &mut noise)?;
        let outs: u32 = self.group.parts.iter().map(|p| p.rows).sum();
        let y = Buffer::new(gpu, u64::from(outs) * u64::from(self.rows) * 4)?;
        Ok(Box::new(PreparedMatrices { group: self.group.clone(), rows: self.rows, weights, x, y, outs }))
    }
}

impl Part {
    fn bytes_of_row(&self) -> u32 {
        MatrixLayout::new(self.format, 1, self.cols.into()).row_bytes as u32
    }
}

struct PreparedMatrices {
    group: Group,
    rows: u32,
    weights: Vec<(Buffer, MatrixLayout)>,
    x: Buffer,
    y: Buffer,
    outs: u32,
}

impl Prepared for PreparedMatrices {
    fn before(&self, _gpu: &dyn Gpu, _kernels: &Loaded, _point: &Values) -> Result<(), DeviceError> {
        Ok(())
    }
    fn launch(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values, copy: u32) -> Result<(), DeviceError> {
        let point = typed(point);
        let mut segments = Vec::with_capacity(self.group.parts.len());
        let mut y = self.y.at();
        for (part, (buffer, layout)) in self.group.parts.iter().zip(&self.weights) {
            let at = buffer.at() + u64::from(copy) * layout.stride;
            segments.push(Segment {
                w: In::at(at),
                scales: if layout.scales_bytes > 0 { In::at(at + layout.scales_offset) } else { In::none() },
                x: In::at(self.x.at() + u64::from(part.x_at) * 2),
                y,
                rows: part.rows,
                cols: part.cols,
                x_stride: self.group.x_cols,
                y_stride: self.outs,
                format: part.format,
                quantised: part.quantised,
                unrounded: true,
                // The copy is a stored matrix of its own.
                row0: 0,
            });
            y += u64::from(part.rows) * 4;
        }
        let gemv = Gemv { kernel: kernels.of("gemv"), rows: self.rows, point, numerics: Numerics::Published };
        gemv.launch(gpu, self.rows, &segments)
    }
    fn result(&self, gpu: &dyn Gpu) -> Result<Vec<f32>, DeviceError> {
        sample(gpu, &self.y)
    }
    fn clear(&self, gpu: &dyn Gpu) -> Result<(), DeviceError> {
        gpu.fill(self.y.at(), 0xff, self.y.bytes())
    }
}

/// Some thousand float32 values: the first, and pieces from all over the buffer.
pub(super) fn sample(gpu: &dyn Gpu, buffer: &Buffer) -> Result<Vec<f32>, DeviceError> {
    const PIECE: u64 = 1024;
    const PIECES: u64 = 16;
    let count = buffer.bytes() / 4;
    let mut out = Vec::new();
    for i in 0..PIECES {
        let first = if count > PIECE { (count - PIECE) * i / (PIECES - 1) } else { 0 };
        let mut piece = vec![0f32; PIECE.min(count) as usize];
        gpu.read(buffer.at() + first * 4, bytemuck::cast_slice_mut(&mut piece))?;
        out.append(&mut piece);
        if count <= PIECE {
            break;
        }
    }
    Ok(out)
}
