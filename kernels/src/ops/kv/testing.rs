//! One attention layer twice: its caches on the emulated GPU, kept by the kernels of this family, and on the CPU.
//!
//! Every projection is noise that depends on slot, position and generation alone, so that the same sequence can be
//! built in different steps. After each step the CPU's caches take over the device's roundings: a value that fell on
//! another side of a tie is counted once, not followed.

use dsv4_model::ModelConfig;
use dsv4_model::ops::{Segment, Step};
use dsv4_model::tensors::layers;

use super::*;
use crate::device::Buffer;
use crate::device::rows::{Row, rows};
use crate::device::testing::Bench;
use crate::numerics::{fake_fp4, fake_fp8, hadamard};
use crate::ops::compressor::pool;
use crate::ops::rms_norm::rms_norm;
use crate::ops::rope::{Rope, rotate};
use crate::state::{Compressed, LayerState};

pub const NANO: &str = include_str!("../../../../tests/nano/config.json");
pub const FLASH: &str = include_str!("../../../../tests/golden/flash_config.json");
pub const TINY: &str = include_str!("../../../../tests/tiny/config.json");

const SLOTS: usize = 2;
/// Rows that a step may go back over.
const BACK: u32 = 16;
const ENTRIES_MAX: u32 = 1024;
/// A step of the stored rows' rounding, as a part of the largest value.
const FP8_STEP: f32 = 0.126;
/// Distance of projections beyond their width.
const PAD: usize = 16;

/// Equal but for roundings: in published numerics one in 50 values may be off, by `step` of itself or of the largest.
pub fn assert_rounded(found: &[f32], expected: &[f32], numerics: Numerics, step: f32) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let mut off = 0;
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let distance = (f - e).abs();
        if distance <= 1e-5 * largest {
            continue;
        }
        let near = numerics == Numerics::Published && distance <= step * largest;
        assert!(near, "value {i} of {}: {f} instead of {e}", found.len());
        off += 1;
    }
    assert!(off * 50 <= found.len() + 50, "{off} of {} values are off", found.len());
}

/// One compressor of the layer.
pub struct Compressor {
    ratio: u32,
    width: u32,
    per_page: u32,
    ring: [Buffer; 2],
    ape: Vec<f32>,
    norm: Vec<f32>,
    device: [Buffer; 2],
    pub entries: Buffer,
    pages: Vec<u32>,
    pub device_pages: Buffer,
    pub pages_max: u32,
}

impl Compressor {
    fn new(bench: &mut Bench, sizes: Sizes, width: u32) -> Compressor {
        let Sizes { ratio, per_page, .. } = sizes;
        let cols = (if ratio == 4 { 2 } else { 1 } * width) as usize;
        let ring = || bench.buffer::<f32>(SLOTS * sizes.compressor_capacity as usize * cols);
        let ring = [ring(), ring()];
        let (ape, norm) = (bench.noise(ratio as usize * cols), bench.noise(width as usize));
        let pages_max = ENTRIES_MAX.div_ceil(per_page);
        let count = SLOTS as u32 * pages_max;
        let pages: Vec<u32> = (0..count).map(|i| (i * 7 + 3) % count).collect();
        assert!(!count.is_multiple_of(7), "pages are all different");
        let entries = bench.buffer_act((count * per_page * width) as usize);
        let device = [bench.upload(&ape), bench.upload(&norm)];
        let device_pages = bench.upload(&pages);
        Compressor { ratio, width, per_page, ring, ape, norm, device, entries, pages, device_pages, pages_max }
    }

    fn cols(&self) -> usize {
        self.ape.len() / self.ratio as usize
    }

    /// Which row of the cache an entry is.
    pub fn place_of(&self, slot: usize, w: usize) -> usize {
        let per = self.per_page as usize;
        self.pages[slot * self.pages_max as usize + w / per] as usize * per + w % per
    }
}

/// A step's buffers.
pub struct Done {
    pub rows: Vec<Row>,
    pub device_rows: Buffer,
    pub kv: Buffer,
    pub turns: Buffer,
    args: PrepareArgs,
    // What the arguments point to.
    _inputs: Vec<Buffer>,
}

/// The layer.
pub struct Layer {
    pub bench: Bench,
    pub numerics: Numerics,
    pub config: ModelConfig,
    pub sizes: Sizes,
    pub states: Vec<LayerState>,
    pub window: Buffer,
    pub compressors: Vec<Compressor>,
    /// Raised before positions are filled with other content.
    pub generation: u64,
    rope: Rope,
    norms: [Vec<f32>; 2],
    device_norms: [Buffer; 2],
    kernels: [Kernel; 2],
}

impl Layer {
    /// The first layer of `ratio` in a model; `None` where there is no emulator.
    pub fn new(config: &str, ratio: u32, numerics: Numerics) -> Option<Layer> {
        let mut bench = Bench::new(numerics)?;
        let config = ModelConfig::parse(config).unwrap();
        let spec = layers(&config).into_iter().find(|l| l.ratio == ratio).expect("a layer of this ratio");
        let sizes = Sizes {
            ratio,
            query_rank: config.q_lora_rank as u32,
            head_dim: config.head_dim as u32,
            rope: config.qk_rope_head_dim as u32,
            index_dim: config.index_head_dim as u32,
            window: config.sliding_window as u32,
            capacity: config.sliding_window as u32 + BACK,
            compressor_capacity: if ratio == 4 { 8 } else { ratio } + BACK,
            per_page: if ratio == 4 { 64 } else { 2 },
        };
        let widths = [sizes.head_dim, sizes.index_dim];
        let compressors = widths.iter().take(sizes.compressors() as usize);
        let compressors = compressors.map(|width| Compressor::new(&mut bench, sizes, *width)).collect();
        let unit = unit(sizes, numerics);
        let kernels = ["attn_prepare", "store_rings"].map(|k| bench.kernel(&unit, k));
        let norms = [sizes.query_rank, sizes.head_dim].map(|width| bench.noise(width as usize));
        Some(Layer {
            states: (0..SLOTS).map(|_| LayerState::new(&config, &spec, 256)).collect(),
            window: bench.buffer_act(SLOTS * (sizes.capacity * sizes.head_dim) as usize),
            compressors,
            generation: 0,
            rope: Rope::new(&config, ratio != 0),
            device_norms: norms.each_ref().map(|norm| bench.upload(norm)),
            norms,
            kernels,
            bench,
            numerics,
            config,
            sizes,
        })
    }

    /// Noise of a row, for a purpose.
    pub fn noise(&self, purpose: u64, row: &Row, count: usize) -> Vec<f32> {
        let mut s = (purpose << 48) ^ (u64::from(row.slot) << 40) ^ (self.generation << 32) ^ u64::from(row.position);
        s = (s + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut uniform = move || {
            s ^= s << 13;
            s ^= s >> 7;
            s ^= s << 17;
            (s >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (uniform() + uniform() + uniform()) * if uniform() > 0.49 { 8.0 } else { 1.7 }).collect()
    }

    /// The same for all rows, as activations.
    pub fn acts(&self, purpose: u64, rows: &[Row], count: usize) -> Vec<f32> {
        let mut out: Vec<f32> = rows.iter().flat_map(|row| self.noise(purpose, row, count)).collect();
        self.bench.round(&mut out);
        out
    }

    /// Cosines and sines of positions.
    pub fn turns(&self, positions: impl Iterator<Item = u32>) -> Buffer {
        let turns: Vec<[f32; 2]> = positions.flat_map(|p| self.rope.at(p)).map(|(c, s)| [c, s]).collect();
        self.bench.upload(&turns)
    }

    fn round(&self, x: &mut [f32]) {
        self.bench.round(x);
    }

    /// Normalised, rounded, turned, rounded.
    fn finish(&self, x: &mut [f32], norm: &[f32], position: u32) {
        rms_norm(x, norm, 1e-6);
        self.round(x);
        rotate(x, &self.rope.at(position));
        self.round(x);
    }

    fn kv_round(&self, x: &mut [f32]) {
        if self.numerics == Numerics::Published {
            let plain = x.len() - self.sizes.rope as usize;
            fake_fp8(&mut x[..plain], 64);
            self.round(&mut x[..plain]);
        }
    }

    pub fn index_round(&self, x: &mut [f32]) {
        if self.numerics == Numerics::Published {
            hadamard(x);
            self.round(x);
            fake_fp4(x);
            self.round(x);
        }
    }

    /// Queries, window rows and entries of a step of (slot, start, rows), checked; caches of the CPU are up to date.
    pub fn step(&mut self, segments: &[(u32, u32, u32)]) -> Done {
        let segments = segments.iter().map(|(slot, start, rows)| Segment { slot: *slot, start: *start, rows: *rows });
        let rows = rows(&Step { segments: segments.collect(), ..Step::default() });
        let count = rows.len();
        let (width, rank) = (self.sizes.head_dim as usize, self.sizes.query_rank as usize);
        let device_rows = self.bench.upload(&rows);
        let turns = self.turns(rows.iter().map(|r| r.position));
        let entry_turns = self.turns(rows.iter().map(|r| (r.position + 1).saturating_sub(self.sizes.ratio)));

        let (raw, low) = (self.acts(1, &rows, width + PAD), self.acts(9, &rows, rank));
        let (device_raw, device_low) = (self.bench.upload_act(&raw), self.bench.upload_act(&low));
        let kv = self.bench.buffer_act(count * width);
        let projections: Vec<[Vec<f32>; 2]> = self
            .compressors
            .iter()
            .enumerate()
            .map(|(c, of)| {
                let project = |purpose: u64| -> Vec<f32> {
                    rows.iter().flat_map(|row| self.noise(purpose + 2 * c as u64, row, of.cols() + PAD)).collect()
                };
                [project(2), project(3)]
            })
            .collect();
        let mut inputs = Vec::new();
        let mut compressors = [CompressArgs::none(); 2];
        for ((args, of), projections) in compressors.iter_mut().zip(&self.compressors).zip(&projections) {
            let [values, gates] = projections.each_ref().map(|p| self.bench.upload(p));
            *args = CompressArgs {
                values: In::at(values.at()),
                gates: In::at(gates.at()),
                ring_values: Out::at(of.ring[0].at()),
                ring_gates: Out::at(of.ring[1].at()),
                ape: In::at(of.device[0].at()),
                norm: In::at(of.device[1].at()),
                entries: Out::at(of.entries.at()),
                stride: (of.cols() + PAD) as u32,
            };
            inputs.extend([values, gates]);
        }
        let pages = self.compressors.first();
        let args = PrepareArgs {
            rows: In::at(device_rows.at()),
            query: Out::at(device_low.at()),
            query_norm: In::at(self.device_norms[0].at()),
            kv_raw: In::at(device_raw.at()),
            kv_norm: In::at(self.device_norms[1].at()),
            turns: In::at(turns.at()),
            entry_turns: In::at(entry_turns.at()),
            pages: In::at(pages.map_or(0, |c| c.device_pages.at())),
            kv: Out::at(kv.at()),
            window: Out::at(self.window.at()),
            compressors,
            count: count as u32,
            kv_stride: (width + PAD) as u32,
            pages_max: pages.map_or(0, |c| c.pages_max),
            store: 0,
            eps: 1e-6,
        };
        launch_prepare(self.bench.gpu(), self.kernels[0], self.sizes, args).unwrap();
        let mut expected = low;
        for row in expected.chunks_exact_mut(rank) {
            rms_norm(row, &self.norms[0], 1e-6);
        }
        self.round(&mut expected);
        assert_rounded(&self.bench.download_act(&device_low), &expected, self.numerics, 1.0 / 120.0);
        let found = self.bench.download_act(&kv);
        for (i, row) in rows.iter().enumerate() {
            let mut expected = raw[i * (width + PAD)..][..width].to_vec();
            self.finish(&mut expected, &self.norms[1], row.position);
            self.kv_round(&mut expected);
            let found = &found[i * width..][..width];
            assert_rounded(found, &expected, self.numerics, FP8_STEP);
            self.states[row.slot as usize].window.row_mut(row.position as usize).copy_from_slice(found);
        }
        for (c, projections) in projections.iter().enumerate() {
            self.compress(c, &rows, projections);
        }
        inputs.extend([device_raw, device_low, entry_turns]);
        Done { rows, device_rows, kv, turns, args, _inputs: inputs }
    }

    /// As the CPU backend does, against the entries on the device.
    fn compress(&mut self, c: usize, rows: &[Row], [values, gates]: &[Vec<f32>; 2]) {
        let (ratio, index, cols) = (self.sizes.ratio as usize, c == 1, self.compressors[c].cols());
        let mut closed = Vec::new();
        for (i, row) in rows.iter().enumerate() {
            let (position, from) = (row.position as usize, i * (cols + PAD));
            let state = cache(&mut self.states[row.slot as usize], index);
            state.values.row_mut(position).copy_from_slice(&values[from..from + cols]);
            let bias = &self.compressors[c].ape[position % ratio * cols..][..cols];
            let gates = gates[from..from + cols].iter().zip(bias).map(|(g, b)| g + b);
            state.gates.row_mut(position).iter_mut().zip(gates).for_each(|(o, g)| *o = g);
            state.entries.truncate(position / ratio * state.width);
            if (position + 1).is_multiple_of(ratio) {
                closed.push((row.slot as usize, position + 1));
                state.entries.resize(state.entries.len() + state.width, 0.0);
            }
        }
        let found = self.bench.download_act(&self.compressors[c].entries);
        for (slot, end) in closed {
            let of = &self.compressors[c];
            let width = of.width as usize;
            let mut expected = vec![0.0; width];
            pool(cache(&mut self.states[slot], index), end, ratio, &mut expected);
            self.round(&mut expected);
            self.finish(&mut expected, &of.norm, (end - ratio) as u32);
            if index {
                self.index_round(&mut expected)
            } else {
                self.kv_round(&mut expected)
            }
            let found = &found[of.place_of(slot, end / ratio - 1) * width..][..width];
            assert_rounded(found, &expected, self.numerics, if index { 0.34 } else { FP8_STEP });
            let entries = &mut cache(&mut self.states[slot], index).entries;
            entries[(end / ratio - 1) * width..][..width].copy_from_slice(found);
        }
    }

    /// Puts the rows of a longer step into the device's rings.
    pub fn store(&mut self, done: &Done) {
        launch_store_rings(self.bench.gpu(), self.kernels[1], self.sizes, done.args).unwrap();
    }
}

fn cache(state: &mut LayerState, index: bool) -> &mut Compressed {
    if index { &mut state.index } else { &mut state.compressed }.as_mut().expect("the layer has this compressor")
}

/// An index cache without entries.
pub fn index_cache(width: usize) -> Compressed {
    let caches = [NANO, TINY].into_iter().filter_map(|config| {
        let config = ModelConfig::parse(config).unwrap();
        let spec = layers(&config).into_iter().find(|l| l.ratio == 4)?;
        LayerState::new(&config, &spec, 1).index
    });
    caches.into_iter().find(|c| c.width == width).expect("a model with this width")
}
