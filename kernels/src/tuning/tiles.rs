//! Products of many rows as the tuner sees them: dense matrices by format, and sorted experts.

use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout};
use dsv4_model::tensors::layers;
use dsv4_model::{ModelConfig, Tp};

use super::cost::{Kind, Pipe, Work};
use super::matrices::{self, Part, sample};
use super::tunables::{Loaded, PREFILL_ROWS, Prepared, Scope, Tunable};
use super::{Values, data, point_of, values_of};
use crate::device::unit::Unit;
use crate::device::{Buffer, DeviceError, Gpu, In, Launch, Out};
use crate::gpu::shape::Shape;
use crate::ops::dense_gemm::gemm::{self, BF16, FLAG_F32, FP8, GemmPoint, GemmSeg};
use crate::ops::moe_gemm::prefill::{self, MoeDownArgs, MoeSizes, MoeSortArgs, MoeUpArgs, Prefill};

/// Values of partial results that a step's workspace has room for, as the backend slices them.
const OUTPUTS_MAX: u64 = 32 << 20;

/// How tables name experts of many rows.
pub(super) fn sorted_shape(s: MoeSizes) -> String {
    format!("{} of {}: {}x{}", s.top_k, s.experts, s.inner, s.hidden)
}

/// Both kernels at all numbers of rows.
pub(super) fn all(config: &ModelConfig, tp: Tp) -> Vec<Box<dyn Tunable>> {
    let s = Shape::new(config, tp);
    let mut list: Vec<Box<dyn Tunable>> = Vec::new();
    for rows in PREFILL_ROWS {
        for format in [Format::Fp8, Format::Bf16] {
            let mut dense: Vec<Dense> = Vec::new();
            for group in matrices::groups(config, tp) {
                let parts: Vec<Part> = group.parts.into_iter().filter(|p| p.format == format).collect();
                // The head is multiplied with wanted rows alone.
                let fits = parts.iter().all(|p| p.cols.is_multiple_of(64) && p.rows != s.vocab);
                if parts.is_empty() || !fits {
                    continue;
                }
                let shape = parts.iter().map(|p| format!("{}x{}", p.rows, p.cols)).collect::<Vec<_>>().join(" + ");
                // Kinds of layers share shapes.
                match dense.iter_mut().find(|d| d.shape == shape) {
                    Some(same) => same.calls += group.calls,
                    None => {
                        dense.push(Dense { format, shape, parts, x_cols: group.x_cols, rows, calls: group.calls });
                    }
                }
            }
            list.extend(dense.into_iter().map(|d| Box::new(d) as Box<dyn Tunable>));
        }
        let sizes = s.moe_sizes();
        if sizes.hidden.is_multiple_of(128) && sizes.inner.is_multiple_of(128) {
            list.push(Box::new(Sorted {
                sizes,
                rows,
                shape: sorted_shape(sizes),
                calls: layers(config).len() as f64,
                limit: config.swiglu_limit,
            }));
        }
    }
    list
}

/// All choices of tiles that are worth a look.
fn points(first: GemmPoint, legal: impl Fn(GemmPoint) -> bool, groups: &[u32]) -> Vec<Values> {
    let mut list = vec![first];
    for tokens in [32, 64, 128, 256] {
        for outs in [64, 128, 192, 256] {
            for warps_m in [1, 2, 4] {
                for stages in 2..=5 {
                    for &group in groups {
                        let point = GemmPoint { tokens, outs, warps_m, stages, group };
                        if legal(point) && point != first {
                            list.push(point);
                        }
                    }
                }
            }
        }
    }
    list.iter().map(values_of).collect()
}

struct Dense {
    format: Format,
    shape: String,
    parts: Vec<Part>,
    x_cols: u32,
    rows: u32,
    calls: f64,
}

impl Dense {
    fn typed(&self, values: &Values) -> GemmPoint {
        point_of(&GemmPoint::default_for(self.format), &[values]).unwrap_or_else(|e| panic!("tiles: {e}"))
    }
}

/// Work of tiles: blocks of `point` over `steps` stages of 64 columns each.
fn tile_work(
    point: GemmPoint,
    format: Format,
    dram: f64,
    flops: f64,
    steps: f64,
    shape: Launch,
    launches: f64,
) -> Work {
    let blocks = shape.grid.iter().map(|n| f64::from(*n)).product::<f64>();
    let row = MatrixLayout::new(format, 1, 64).row_bytes as f64;
    let stage = f64::from(point.tokens) * 128.0 + f64::from(point.outs) * row;
    let warps = f64::from(point.threads() / 32);
    Work {
        kind: Kind::Tiles,
        dram_bytes: dram,
        l2_bytes: blocks * steps * stage,
        tensor_flops: flops,
        issue: blocks * steps * warps * Pipe::tile_issue(format, point.tokens / point.warps_m),
        chain: steps * Pipe::tile_issue(format, point.tokens / point.warps_m),
        flight_bytes: stage * f64::from(point.stages - 1),
        syncs: steps,
        shape,
        launches,
    }
}

impl Tunable for Dense {
    fn kernel(&self) -> &'static str {
        if self.format == Format::Bf16 { "gemm_bf16" } else { "gemm_fp8" }
    }
    fn shape(&self) -> &str {
        &self.shape
    }
    fn rows(&self) -> u32 {
        self.rows
    }
    fn scope(&self) -> Scope {
        Scope { group: self.kernel(), bucket: 0, machine: &[], free: Vec::new(), sized: false }
    }
    fn calls(&self) -> f64 {
        self.calls
    }
    fn points(&self) -> Vec<Values> {
        points(GemmPoint::default_for(self.format), |p| p.legal(self.format), &[4, 8, 16])
    }
    fn unit(&self, point: &Values) -> Unit {
        gemm::unit(self.format, self.typed(point))
    }
    fn entry(&self, _point: &Values) -> &'static str {
        self.kernel()
    }
    fn bytes(&self) -> u64 {
        self.parts.iter().map(Part::bytes).sum()
    }
    fn flops(&self) -> f64 {
        self.parts.iter().map(|p| 2.0 * f64::from(self.rows) * f64::from(p.rows) * f64::from(p.cols)).sum()
    }
    fn work(&self, point: &Values, shapes: &[Launch]) -> Work {
        let rows = f64::from(self.rows);
        let outs: f64 = self.parts.iter().map(|p| f64::from(p.rows)).sum();
        let cols = self.flops() / (2.0 * rows * outs);
        let dram = self.bytes() as f64 + rows * (f64::from(self.x_cols) * 2.0 + outs * 4.0);
        // Tiles that stick out of a matrix are whole work.
        let point = self.typed(point);
        let tiled: f64 = f64::from(shapes[0].grid[0]) * f64::from(point.tokens * point.outs) * 2.0 * cols;
        tile_work(point, self.format, dram, tiled, cols / 64.0, shapes[0], shapes.len() as f64)
    }
    fn prepare(&self, gpu: &Arc<dyn Gpu>, copies: u32) -> Result<Box<dyn Prepared>, DeviceError> {
        let mut noise = data::Noise::new(3);
        let mut weights = Vec::new();
        for part in &self.parts {
            let layout = MatrixLayout::new(part.format, part.rows.into(), part.cols.into());
            let buffer = Buffer::new(gpu, layout.stride * u64::from(copies))?;
            data::matrices(gpu.as_ref(), buffer.at(), part.format, &layout, copies.into(), &mut noise)?;
            weights.push((buffer, layout));
        }
        let x = Buffer::new(gpu, u64::from(self.rows) * u64::from(self.x_cols) * 2)?;
        data::activations(gpu.as_ref(), &x, &mut noise)?;
        let outs: u64 = self.parts.iter().map(|p| u64::from(p.rows)).sum();
        let y = Buffer::new(gpu, outs * u64::from(self.rows) * 4)?;
        let (format, parts, x_cols, rows) = (self.format, self.parts.clone(), self.x_cols, self.rows);
        Ok(Box::new(PreparedDense { format, parts, x_cols, rows, weights, x, y }))
    }
}

struct PreparedDense {
    format: Format,
    parts: Vec<Part>,
    x_cols: u32,
    rows: u32,
    weights: Vec<(Buffer, MatrixLayout)>,
    x: Buffer,
    y: Buffer,
}

impl Prepared for PreparedDense {
    fn before(&self, _gpu: &dyn Gpu, _kernels: &Loaded, _point: &Values) -> Result<(), DeviceError> {
        Ok(())
    }
    fn launch(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values, copy: u32) -> Result<(), DeviceError> {
        let bf16 = self.format == Format::Bf16;
        let point = point_of(&GemmPoint::default_for(self.format), &[point]).unwrap_or_else(|e| panic!("tiles: {e}"));
        let mut y = self.y.at();
        let mut segs = Vec::with_capacity(self.parts.len());
        for (part, (buffer, layout)) in self.parts.iter().zip(&self.weights) {
            let at = buffer.at() + u64::from(copy) * layout.stride;
            segs.push(GemmSeg {
                w: In::at(at),
                scales: if bf16 { In::none() } else { In::at(at + layout.scales_offset) },
                x: In::at(self.x.at() + u64::from(part.x_at) * 2),
                y,
                rows: part.rows,
                cols: part.cols,
                x_stride: self.x_cols,
                y_stride: part.rows,
                format: if bf16 { BF16 } else { FP8 },
                flags: FLAG_F32,
                row0: 0,
                first_block: 0,
            });
            y += u64::from(part.rows) * u64::from(self.rows) * 4;
        }
        let kernel = kernels.of(if bf16 { "gemm_bf16" } else { "gemm_fp8" });
        gemm::launch(gpu, kernel, self.format, point, self.rows, &segs)
    }
    fn result(&self, gpu: &dyn Gpu) -> Result<Vec<f32>, DeviceError> {
        sample(gpu, &self.y)
    }
    fn clear(&self, gpu: &dyn Gpu) -> Result<(), DeviceError> {
        gpu.fill(self.y.at(), 0xff, self.y.bytes())
    }
}

/// All experts of a layer for many rows: both matrices up, the shared expert up, one slice of the outputs down.
struct Sorted {
    sizes: MoeSizes,
    rows: u32,
    shape: String,
    calls: f64,
    limit: f32,
}

impl Sorted {
    /// Pairs of a row and one of its experts, and experts that have any.
    fn pairs(&self) -> (u32, u32) {
        let pairs = self.rows * self.sizes.top_k;
        (pairs, pairs.min(self.sizes.experts))
    }
    fn layouts(&self) -> [MatrixLayout; 3] {
        let (d, f) = (u64::from(self.sizes.hidden), u64::from(self.sizes.inner));
        [(Format::Fp4, f, d), (Format::Fp4, d, f), (Format::Fp8, f, d)].map(|(w, r, c)| MatrixLayout::new(w, r, c))
    }
    /// Outputs that go down at once.
    fn slice(&self) -> u32 {
        let slots = u64::from(self.rows) * u64::from(self.sizes.top_k + 1);
        ((OUTPUTS_MAX / slots / 256 * 256).max(256).min(u64::from(self.sizes.hidden))) as u32
    }
}

fn sorted_point(values: &Values) -> GemmPoint {
    point_of(&prefill::DEFAULT_POINT, &[values]).unwrap_or_else(|e| panic!("tiles: {e}"))
}

impl Tunable for Sorted {
    fn kernel(&self) -> &'static str {
        "experts"
    }
    fn shape(&self) -> &str {
        &self.shape
    }
    fn rows(&self) -> u32 {
        self.rows
    }
    fn scope(&self) -> Scope {
        Scope { group: "experts", bucket: 0, machine: &[], free: Vec::new(), sized: true }
    }
    fn calls(&self) -> f64 {
        self.calls
    }
    fn points(&self) -> Vec<Values> {
        // Tiles are of one expert each: nothing is grouped.
        points(prefill::DEFAULT_POINT, prefill::legal, &[1])
    }
    fn unit(&self, point: &Values) -> Unit {
        prefill::unit(self.sizes, sorted_point(point))
    }
    fn entry(&self, _point: &Values) -> &'static str {
        "moe_up"
    }
    fn bytes(&self) -> u64 {
        let [up, down, shared] = self.layouts().map(|l| l.codes_bytes + l.scales_bytes);
        let part = u64::from(self.slice()) * down / u64::from(self.sizes.hidden);
        u64::from(self.pairs().1) * (2 * up + part) + 2 * shared
    }
    fn flops(&self) -> f64 {
        let MoeSizes { hidden, inner, .. } = self.sizes;
        let up = 2.0 * f64::from(self.pairs().0 + self.rows) * f64::from(hidden);
        2.0 * f64::from(inner) * (up + f64::from(self.pairs().0) * f64::from(self.slice()))
    }
    fn work(&self, point: &Values, shapes: &[Launch]) -> Work {
        let point = sorted_point(point);
        let (pairs, experts) = self.pairs();
        let (d, f) = (f64::from(self.sizes.hidden), f64::from(self.sizes.inner));
        // Tiles are filled as far as an expert has pairs; all of a tile is worked on.
        let each = f64::from(pairs) / f64::from(experts);
        let tiles = f64::from(experts) * (each / f64::from(point.tokens)).ceil();
        let slots = tiles * f64::from(point.tokens) + f64::from(self.rows.next_multiple_of(point.tokens));
        let flops = 2.0 * slots * d * f * 2.0 + 2.0 * (slots - f64::from(self.rows)) * f64::from(self.slice()) * f;
        let rows = f64::from(self.rows * (self.sizes.top_k + 1));
        let dram = self.bytes() as f64 + rows * (f * 2.0 + f64::from(self.slice()) * 4.0);
        // Blocks that have work, of the largest launch; the others in proportion.
        let steps = d / 64.0;
        let busy = (tiles * f / 128.0).max(1.0);
        let up = Launch { grid: [busy as u32, 1, 1], ..shapes[0] };
        let mut work = tile_work(point, Format::Fp4, dram, flops, steps, up, shapes.len() as f64);
        // The launches beside the first do as much again in proportion to their products.
        let whole = flops / (2.0 * tiles * f64::from(point.tokens) * d * f * 2.0);
        work.l2_bytes *= whole;
        work.issue *= whole;
        work
    }
    fn prepare(&self, gpu: &Arc<dyn Gpu>, _copies: u32) -> Result<Box<dyn Prepared>, DeviceError> {
        let mut noise = data::Noise::new(4);
        let MoeSizes { hidden, inner, experts, top_k } = self.sizes;
        let layouts = self.layouts();
        let mut stacks = Vec::new();
        for (format, layout, count) in [
            (Format::Fp4, &layouts[0], experts),
            (Format::Fp4, &layouts[0], experts),
            (Format::Fp4, &layouts[1], experts),
            (Format::Fp8, &layouts[2], 1),
            (Format::Fp8, &layouts[2], 1),
        ] {
            let buffer = Buffer::new(gpu, layout.stride * u64::from(count))?;
            data::matrices(gpu.as_ref(), buffer.at(), format, layout, count.into(), &mut noise)?;
            stacks.push(buffer);
        }
        // Every expert has about as many rows, in no order.
        let ids: Vec<u32> = (0..self.rows)
            .flat_map(|row| {
                let first = row.wrapping_mul(7919) % experts;
                let mut of_row: Vec<u32> = (0..top_k).map(|k| (first + k * 41) % experts).collect();
                of_row.sort_unstable();
                of_row
            })
            .collect();
        let (rows, slots) = (u64::from(self.rows), u64::from(top_k + 1));
        let x = Buffer::new(gpu, rows * u64::from(hidden) * 2)?;
        data::activations(gpu.as_ref(), &x, &mut noise)?;
        let tiles = u64::from(prefill::tiles_max(self.sizes, prefill::TOKENS_MIN, self.rows));
        Ok(Box::new(PreparedSorted {
            sizes: self.sizes,
            rows: self.rows,
            limit: self.limit,
            slice: self.slice(),
            layouts,
            stacks,
            chosen: Buffer::of(gpu, &ids)?,
            weights: Buffer::of(gpu, &vec![0.25f32; ids.len()])?,
            counts: Buffer::new(gpu, u64::from(experts) * 4)?,
            pairs: Buffer::new(gpu, ids.len() as u64 * 4)?,
            tiles: Buffer::new(gpu, tiles * 16)?,
            tile_count: Buffer::new(gpu, 4)?,
            x,
            mid: Buffer::new(gpu, rows * slots * u64::from(inner) * 2)?,
            out: Buffer::new(gpu, rows * slots * u64::from(self.slice()) * 4)?,
        }))
    }
}

struct PreparedSorted {
    sizes: MoeSizes,
    rows: u32,
    limit: f32,
    slice: u32,
    layouts: [MatrixLayout; 3],
    stacks: Vec<Buffer>,
    chosen: Buffer,
    weights: Buffer,
    counts: Buffer,
    pairs: Buffer,
    tiles: Buffer,
    tile_count: Buffer,
    x: Buffer,
    mid: Buffer,
    out: Buffer,
}

impl PreparedSorted {
    fn kernels(&self, kernels: &Loaded, point: &Values) -> Prefill {
        Prefill::new(self.sizes, sorted_point(point), |name| kernels.of(name))
    }
}

impl Prepared for PreparedSorted {
    fn before(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values) -> Result<(), DeviceError> {
        let args = MoeSortArgs {
            chosen: In::at(self.chosen.at()),
            counts: Out::at(self.counts.at()),
            pairs: Out::at(self.pairs.at()),
            tiles: Out::at(self.tiles.at()),
            tile_count: Out::at(self.tile_count.at()),
            pair_count: self.rows * self.sizes.top_k,
        };
        self.kernels(kernels, point).sort(gpu, args)
    }
    fn launch(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values, _copy: u32) -> Result<(), DeviceError> {
        let prefill = self.kernels(kernels, point);
        let [up, down, shared] = &self.layouts;
        let at = |i: usize| In::at(self.stacks[i].at());
        let (pairs, tiles, tile_count) =
            (In::at(self.pairs.at()), In::at(self.tiles.at()), In::at(self.tile_count.at()));
        let routed = MoeUpArgs {
            x: In::at(self.x.at()),
            w1: at(0),
            w3: at(1),
            stride: up.stride,
            scales_at: up.scales_offset,
            pairs,
            tiles,
            tile_count,
            weights: In::at(self.weights.at()),
            mid: Out::at(self.mid.at()),
            limit: self.limit,
            rows: self.rows,
        };
        prefill.up(gpu, routed)?;
        let none = MoeUpArgs { pairs: In::none(), tiles: In::none(), tile_count: In::none(), ..routed };
        let scales_at = shared.scales_offset;
        prefill.up_shared(gpu, MoeUpArgs { w1: at(3), w3: at(4), scales_at, weights: In::none(), ..none })?;
        let args = MoeDownArgs {
            mid: In::at(self.mid.at()),
            w2: at(2),
            stride: down.stride,
            scales_at: down.scales_offset,
            pairs,
            tiles,
            tile_count,
            out: Out::at(self.out.at()),
            first_out: 0,
            outs: self.slice,
        };
        prefill.down(gpu, self.rows, args)
    }
    fn result(&self, gpu: &dyn Gpu) -> Result<Vec<f32>, DeviceError> {
        // The shared expert's slots are not written on the way down.
        let slots = self.sizes.top_k as usize + 1;
        let whole = sample(gpu, &self.out)?;
        Ok(whole.into_iter().filter(|v| !v.is_nan() || slots == 1).collect())
    }
    fn clear(&self, gpu: &dyn Gpu) -> Result<(), DeviceError> {
        gpu.fill(self.mid.at(), 0, self.mid.bytes())?;
        gpu.fill(self.out.at(), 0xff, self.out.bytes())
    }
}
