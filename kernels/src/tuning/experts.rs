//! The experts of a few rows as the tuner sees them: both kernels of `moe_gemm::decode`, timed apart.
//!
//! Both are compiled as one unit but do not see each other's tiles, so points where both have as many stand for all.

use std::sync::Arc;

use dsv4_model::layout::{Format, MatrixLayout};
use dsv4_model::tensors::layers;
use dsv4_model::{ModelConfig, Tp};

use super::cost::{Kind, Pipe, Work};
use super::matrices::sample;
use super::tunables::{DECODE_ROWS, Loaded, Prepared, Scope, Tunable};
use super::{Values, data, point_of, values_of, without};
use crate::device::unit::Unit;
use crate::device::{Buffer, DeviceError, Gpu, In, Launch, Out};
use crate::gpu::shape::Shape;
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemv::{split_of, steps_of};
use crate::ops::moe_gemm::decode::{self, Experts, MoeDecode, MoeDownArgs, MoePoint, MoeUpArgs};

/// Which half of the experts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Up,
    Down,
}

struct Few {
    half: Half,
    experts: Experts,
    /// Routed experts of a layer.
    of: u32,
    rows: u32,
    shape: String,
    calls: f64,
    limit: f32,
}

/// How tables name experts of a few rows.
pub(super) fn shape_of(e: Experts) -> String {
    format!("{} of {}x{}", e.chosen, e.inner, e.hidden)
}

/// Both halves at all numbers of rows.
pub(super) fn all(config: &ModelConfig, tp: Tp) -> Vec<Box<dyn Tunable>> {
    let s = Shape::new(config, tp);
    let experts = Experts { hidden: s.hidden, inner: s.inner, chosen: s.chosen };
    let mut list: Vec<Box<dyn Tunable>> = Vec::new();
    for rows in DECODE_ROWS {
        if !MoePoint::DEFAULT.legal(experts, rows, Numerics::Published) {
            continue;
        }
        for half in [Half::Up, Half::Down] {
            list.push(Box::new(Few {
                half,
                experts,
                of: s.experts,
                rows,
                shape: shape_of(experts),
                calls: layers(config).len() as f64,
                limit: config.swiglu_limit,
            }));
        }
    }
    list
}

impl Few {
    fn typed(&self, values: &Values) -> MoePoint {
        // The other half's tiles do not matter to this one; with as many, both halves are timed with one unit.
        let (own, other) = self.names();
        let mut values = values.clone();
        if let Some(n) = values.get(own).copied() {
            values.insert(other.into(), n);
        }
        point_of(&MoePoint::DEFAULT, &[&values]).unwrap_or_else(|e| panic!("a point of the experts: {e}"))
    }

    /// Own tiles, the other's.
    fn names(&self) -> (&'static str, &'static str) {
        match self.half {
            Half::Up => ("up_tiles", "down_tiles"),
            Half::Down => ("down_tiles", "up_tiles"),
        }
    }

    /// Routed experts of a launch: all different.
    fn picked(&self) -> u32 {
        self.rows * self.experts.chosen
    }

    fn layouts(&self) -> [MatrixLayout; 4] {
        let (d, f) = (u64::from(self.experts.hidden), u64::from(self.experts.inner));
        let (fp4, fp8) = (Format::Fp4, Format::Fp8);
        match self.half {
            Half::Up => [(fp4, f, d), (fp4, f, d), (fp8, f, d), (fp8, f, d)],
            Half::Down => [(fp4, d, f), (fp4, 0, f), (fp8, d, f), (fp8, 0, f)],
        }
        .map(|(format, rows, cols)| MatrixLayout::new(format, rows, cols))
    }

    /// Bytes of routed and of shared weights.
    fn weights(&self) -> (u64, u64) {
        let bytes = self.layouts().map(|l| l.codes_bytes + l.scales_bytes);
        (u64::from(self.picked()) * (bytes[0] + bytes[1]), bytes[2] + bytes[3])
    }
}

impl Tunable for Few {
    fn kernel(&self) -> &'static str {
        match self.half {
            Half::Up => "moe_up",
            Half::Down => "moe_down",
        }
    }
    fn shape(&self) -> &str {
        &self.shape
    }
    fn rows(&self) -> u32 {
        self.rows
    }
    fn scope(&self) -> Scope {
        // Compiled in, but of no consequence to the other half.
        let free = vec![self.names().0.to_owned()];
        Scope { group: "moe", bucket: self.rows, machine: &["warps"], free, sized: true }
    }
    fn calls(&self) -> f64 {
        self.calls
    }
    fn points(&self) -> Vec<Values> {
        let (_, other) = self.names();
        let first = MoePoint::DEFAULT;
        let mut others: Vec<MoePoint> = MoePoint::all(self.experts, self.rows, Numerics::Published)
            .filter(|p| p.up_tiles == p.down_tiles && *p != first)
            .collect();
        // The cost model does not know how far ahead is best: of equals the untuned one's comes first.
        others.sort_by_key(|p| p.ahead != first.ahead);
        [first].into_iter().chain(others).map(|p| without(values_of(&p), other)).collect()
    }
    fn unit(&self, point: &Values) -> Unit {
        decode::unit(self.experts, self.rows, self.typed(point), Numerics::Published)
    }
    fn entry(&self, _point: &Values) -> &'static str {
        self.kernel()
    }
    fn bytes(&self) -> u64 {
        let (routed, shared) = self.weights();
        routed + shared
    }
    fn flops(&self) -> f64 {
        let matrices = if self.half == Half::Up { 2.0 } else { 1.0 };
        let of_one = 2.0 * matrices * f64::from(self.experts.hidden) * f64::from(self.experts.inner);
        of_one * f64::from(self.picked() + self.rows)
    }
    fn work(&self, point: &Values, shapes: &[Launch]) -> Work {
        let point = self.typed(point);
        let Experts { hidden, inner, chosen } = self.experts;
        let (rows, cols) = match self.half {
            Half::Up => (2 * inner, hidden),
            Half::Down => (hidden, inner),
        };
        let tiles = f64::from(rows.div_ceil(16));
        let (fp4, fp8) = (Pipe::of(Format::Fp4, true).step_issue, Pipe::of(Format::Fp8, true).step_issue);
        let (routed_steps, shared_steps) = (steps_of(cols / 2), steps_of(cols));
        let routed = f64::from(self.picked()) * tiles * f64::from(routed_steps) * fp4;
        // Rows of a block: all of them for the shared expert on the way up, a group for all experts on the way down.
        let group = decode::at_once(self.experts, self.rows, Numerics::Published);
        let passes = if self.half == Half::Up { 1.0 } else { f64::from(self.rows.div_ceil(group)) };
        let shared = passes * tiles * f64::from(shared_steps) * fp8;
        let blocks = f64::from(shapes[0].grid[0]);
        let staged = f64::from(cols) * if self.half == Half::Down { f64::from((chosen + 1) * group) } else { 1.0 };
        let stage = staged / 8.0 / 32.0 * Pipe::STAGE_ISSUE;
        // Steps of the longest warp, and warps that have any: of `jobs` tiles that warps share `split` to one.
        let longest = |jobs: u32, warps: u32, steps: u32, split: u32| {
            (jobs.div_ceil(warps / split) * steps.div_ceil(split), warps.min(jobs * split))
        };
        let warps = point.warps;
        let ((steps, busy), (last_steps, last_busy)) = match self.half {
            Half::Up => {
                let jobs = 2 * point.up_tiles;
                let of_shared = longest(jobs, warps, shared_steps, split_of(shared_steps, warps));
                // A block is of one kind; nearly all are routed.
                (longest(jobs, warps, routed_steps, split_of(routed_steps, warps)), (of_shared.0, 0))
            }
            Half::Down => {
                let few = warps / 4;
                let of_shared = longest(point.down_tiles, few, shared_steps, split_of(shared_steps, few));
                (longest(chosen * group * point.down_tiles, warps - few, routed_steps, 1), of_shared)
            }
        };
        let depth = point.depth_of(self.rows);
        let ahead = busy * steps.min(depth) + last_busy * last_steps.min(depth);
        let (routed_bytes, shared_bytes) = self.weights();
        Work {
            kind: Kind::Stream,
            dram_bytes: self.bytes() as f64,
            l2_bytes: routed_bytes as f64 + passes * shared_bytes as f64,
            tensor_flops: 16.0 * f64::from(rows) * f64::from(cols) * (f64::from(self.picked()) + passes),
            issue: routed + shared + blocks * stage,
            chain: (f64::from(steps) * fp4).max(f64::from(last_steps) * fp8) + stage / f64::from(warps),
            flight_bytes: f64::from(ahead) * 2048.0,
            syncs: 2.0,
            shape: shapes[0],
            launches: shapes.len() as f64,
        }
    }
    fn prepare(&self, gpu: &Arc<dyn Gpu>, copies: u32) -> Result<Box<dyn Prepared>, DeviceError> {
        let mut noise = data::Noise::new(2);
        let Experts { hidden, inner, chosen } = self.experts;
        // Copies choose experts one after another out of a layer's; past the last they start again.
        let stored = (u64::from(self.picked()) * u64::from(copies)).clamp(u64::from(chosen), u64::from(self.of));
        let mut stacks = Vec::new();
        for (i, layout) in self.layouts().iter().enumerate() {
            let (format, count) = if i < 2 { (Format::Fp4, stored) } else { (Format::Fp8, u64::from(copies)) };
            let buffer = Buffer::new(gpu, layout.stride * count)?;
            if layout.stride > 0 {
                data::matrices(gpu.as_ref(), buffer.at(), format, layout, count, &mut noise)?;
            }
            stacks.push(buffer);
        }
        let mut ids: Vec<u32> = Vec::new();
        for copy in 0..copies {
            for row in 0..self.rows {
                let first = u64::from(copy) * u64::from(self.picked()) + u64::from(row * chosen);
                let mut of_row: Vec<u32> = (0..u64::from(chosen)).map(|k| ((first + k) % stored) as u32).collect();
                of_row.sort_unstable();
                ids.extend(of_row);
            }
        }
        let (rows, slots) = (u64::from(self.rows), u64::from(chosen + 1));
        let weights = vec![0.25f32; (rows * u64::from(chosen)) as usize];
        let x = Buffer::new(gpu, rows * u64::from(hidden) * 2)?;
        data::activations(gpu.as_ref(), &x, &mut noise)?;
        let mid = Buffer::new(gpu, rows * slots * u64::from(inner) * 2)?;
        data::activations(gpu.as_ref(), &mid, &mut noise)?;
        Ok(Box::new(PreparedFew {
            half: self.half,
            experts: self.experts,
            rows: self.rows,
            limit: self.limit,
            layouts: self.layouts(),
            stacks,
            chosen: Buffer::of(gpu, &ids)?,
            weights: Buffer::of(gpu, &weights)?,
            x,
            mid,
            y: Buffer::new(gpu, rows * u64::from(hidden) * 4)?,
        }))
    }
}

struct PreparedFew {
    half: Half,
    experts: Experts,
    rows: u32,
    limit: f32,
    layouts: [MatrixLayout; 4],
    stacks: Vec<Buffer>,
    chosen: Buffer,
    weights: Buffer,
    x: Buffer,
    mid: Buffer,
    y: Buffer,
}

impl Prepared for PreparedFew {
    fn before(&self, _gpu: &dyn Gpu, _kernels: &Loaded, _point: &Values) -> Result<(), DeviceError> {
        Ok(())
    }
    fn launch(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values, copy: u32) -> Result<(), DeviceError> {
        let point = point_of(&MoePoint::DEFAULT, &[point]).unwrap_or_else(|e| panic!("a point of the experts: {e}"));
        let (up, down) = (kernels.of("moe_up"), kernels.of("moe_down"));
        let decode =
            MoeDecode { up, down, experts: self.experts, rows: self.rows, point, numerics: Numerics::Published };
        let stack = |i: usize| In::at(self.stacks[i].at());
        let shared = |i: usize| In::at(self.stacks[i].at() + u64::from(copy) * self.layouts[i].stride);
        let ids = u64::from(self.rows * self.experts.chosen) * 4;
        let chosen = In::at(self.chosen.at() + u64::from(copy) * ids);
        match self.half {
            Half::Up => decode.launch_up(
                gpu,
                MoeUpArgs {
                    x: In::at(self.x.at()),
                    w1: stack(0),
                    w3: stack(1),
                    stride: self.layouts[0].stride,
                    shared_w1: shared(2),
                    shared_w3: shared(3),
                    chosen,
                    weights: In::at(self.weights.at()),
                    mid: Out::at(self.mid.at()),
                    limit: self.limit,
                    rows: self.rows,
                    prefetch: 0,
                },
            ),
            Half::Down => decode.launch_down(
                gpu,
                MoeDownArgs {
                    mid: In::at(self.mid.at()),
                    w2: stack(0),
                    stride: self.layouts[0].stride,
                    shared_w2: shared(2),
                    chosen,
                    y: Out::at(self.y.at()),
                    rows: self.rows,
                    prefetch: 0,
                },
            ),
        }
    }
    fn result(&self, gpu: &dyn Gpu) -> Result<Vec<f32>, DeviceError> {
        if self.half == Half::Down {
            return sample(gpu, &self.y);
        }
        let words = sample(gpu, &self.mid)?;
        // Two bfloat16 values to a word.
        Ok(words
            .iter()
            .flat_map(|w| [f32::from_bits(w.to_bits() << 16), f32::from_bits(w.to_bits() & !0xffff)])
            .collect())
    }
    fn clear(&self, gpu: &dyn Gpu) -> Result<(), DeviceError> {
        // What goes up is the input of what goes down.
        let out = if self.half == Half::Up { &self.mid } else { &self.y };
        gpu.fill(out.at(), 0xff, out.bytes())
    }
}
