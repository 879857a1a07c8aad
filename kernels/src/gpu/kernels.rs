//! Which kernels a rank needs: the same walk compiles them at pack time and loads them at start.

use std::path::Path;

use dsv4_model::cache::PAGE_TOKENS;
use dsv4_model::layout::Format;
use dsv4_model::tensors::{draft_stages, layers};
use dsv4_model::{ModelConfig, Tp};
use rayon::prelude::*;

use crate::device::nvrtc::Nvrtc;
use crate::device::unit::{Image, Unit};
use crate::device::{DeviceError, Gpu, Kernel, emulated};
use crate::gpu::state;
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemm::{self, GemmPoint};
use crate::ops::dense_gemm::gemv::{self, Gemv};
use crate::ops::dense_gemm::native::{self, Native, NativePoint, Verdict};
use crate::ops::hyper_connection::{self as hc, HcKernels, HcShape};
use crate::ops::indexer::Indexer;
use crate::ops::moe_gemm::decode::{self, Experts, MoeDecode};
use crate::ops::moe_gemm::native::{self as native_moe, NativeExperts};
use crate::ops::moe_gemm::prefill::{self, MoeSizes, Prefill};
use crate::ops::{embedding, indexer, kv, rms_norm, router, sparse_attention};
use crate::tuning::Tuning;

/// Rows up to which a step streams weights past a few rows; longer steps multiply tiles.
pub const DECODE_ROWS: u32 = 16;
/// Rows of activations that decode kernels are compiled for.
const ROWS: [u32; 4] = [1, 2, 4, 8];

/// Sizes of a rank, as kernels count them.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Model width.
    pub hidden: u32,
    /// Residual streams.
    pub streams: u32,
    /// Query heads of this rank.
    pub heads: u32,
    /// Channels of a head.
    pub head_dim: u32,
    /// Rotated channels.
    pub rope: u32,
    /// Width of the low-rank query.
    pub q_rank: u32,
    /// Output groups of this rank.
    pub groups: u32,
    /// Width of a group's low-rank output.
    pub o_rank: u32,
    /// Positions of the window.
    pub window: u32,
    /// Index heads.
    pub index_heads: u32,
    /// Channels of an index head.
    pub index_dim: u32,
    /// Entries that are selected.
    pub topk: u32,
    /// Routed experts.
    pub experts: u32,
    /// Experts of a row.
    pub chosen: u32,
    /// This rank's part of an expert's width.
    pub inner: u32,
    /// Tokens of this rank's part of embedding and head.
    pub vocab: u32,
}

/// A model that there are no kernels for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "config.json: {field}: expected {expected}, found {found}\n  help: there are no GPU kernels for such a model; use one with {expected}, or run with --backend cpu"
)]
pub struct ShapeError {
    /// The field, or fields.
    pub field: &'static str,
    /// What there are kernels for.
    pub expected: String,
    /// What it is.
    pub found: String,
}

impl Shape {
    /// Checks that there are hyper-connections of the model's size. Everything else here panics where there are none.
    ///
    /// Errors: other than 2 or 4 residual streams.
    pub fn check(config: &ModelConfig) -> Result<(), ShapeError> {
        if hc_shape(config).is_possible() {
            return Ok(());
        }
        let found = format!("{} of {}", config.hc_mult, config.hidden_size);
        let expected = "2 or 4 streams of a multiple of 64".into();
        Err(ShapeError { field: "hc_mult and hidden_size", expected, found })
    }

    /// Sizes of `tp`'s rank.
    pub fn new(config: &ModelConfig, tp: Tp) -> Shape {
        let size = u64::from(tp.size());
        Shape {
            hidden: config.hidden_size as u32,
            streams: config.hc_mult as u32,
            heads: (config.num_attention_heads / size) as u32,
            head_dim: config.head_dim as u32,
            rope: config.qk_rope_head_dim as u32,
            q_rank: config.q_lora_rank as u32,
            groups: (config.o_groups / size) as u32,
            o_rank: config.o_lora_rank as u32,
            window: config.sliding_window as u32,
            index_heads: config.index_n_heads as u32,
            index_dim: config.index_head_dim as u32,
            topk: config.index_topk as u32,
            experts: config.n_routed_experts as u32,
            chosen: config.num_experts_per_tok as u32,
            inner: (config.moe_intermediate_size / size) as u32,
            vocab: (config.vocab_size / size) as u32,
        }
    }

    /// Attention over entries of `ratio` positions.
    pub fn attention(&self, ratio: u32) -> sparse_attention::Sizes {
        sparse_attention::Sizes {
            heads: self.heads,
            head_dim: self.head_dim,
            rope: self.rope,
            window: self.window,
            capacity: state::window_capacity(self.window),
            ratio,
            topk: self.topk,
            per_page: per_page(ratio),
        }
    }

    /// What precedes attention over entries of `ratio` positions.
    pub fn prepare(&self, ratio: u32) -> kv::Sizes {
        kv::Sizes {
            ratio,
            query_rank: self.q_rank,
            head_dim: self.head_dim,
            rope: self.rope,
            index_dim: self.index_dim,
            window: self.window,
            capacity: state::window_capacity(self.window),
            compressor_capacity: state::compressor_capacity(ratio),
            per_page: per_page(ratio),
        }
    }
}

/// Hyper-connections of a model.
pub fn hc_shape(config: &ModelConfig) -> HcShape {
    HcShape {
        hidden: config.hidden_size as u32,
        streams: config.hc_mult as u32,
        sinkhorn_iters: config.hc_sinkhorn_iters as u32,
    }
}

/// Entries of a page.
pub fn per_page(ratio: u32) -> u32 {
    (PAGE_TOKENS as u32).checked_div(ratio).unwrap_or(1)
}

/// A number of something for each ratio: 0, 4, 128.
#[derive(Clone, Copy)]
pub struct ByRatio<T>(pub [Option<T>; 3]);

impl<T: Copy> ByRatio<T> {
    /// That of a ratio. Panics for a ratio that the model has no layer of.
    pub fn of(&self, ratio: u32) -> T {
        self.0[ratio_index(ratio)].unwrap_or_else(|| panic!("no layer of ratio {ratio}"))
    }
}

fn ratio_index(ratio: u32) -> usize {
    match ratio {
        0 => 0,
        4 => 1,
        _ => 2,
    }
}

/// All kernels of a rank, loaded.
pub struct Kernels {
    /// embed, expand, settle, draft_add.
    pub embedding: [Kernel; 4],
    /// Of the model's width; only drafts need it.
    pub hidden_norm: Option<Kernel>,
    /// Hyper-connections.
    pub hc: HcKernels,
    /// gate, route.
    pub router: [Kernel; 2],
    /// Matrices past 1, 2, 4 and 8 rows.
    pub gemv: Vec<Gemv>,
    /// Experts of 1, 2, 4 and 8 rows, as far as a block has room for them.
    pub moe: Vec<MoeDecode>,
    /// Long steps in published numerics, where the sizes allow it.
    pub long: Option<Long>,
    /// How the block-scaled kernels of long steps did when they were checked.
    pub verdicts: Vec<Verdict>,
    /// attn_prepare, store_rings.
    pub prepare: ByRatio<[Kernel; 2]>,
    /// The choice of entries.
    pub indexer: Option<Indexer>,
    /// attend, attend_long.
    pub attend: ByRatio<[Kernel; 2]>,
}

/// Kernels for many rows.
pub struct Long {
    /// gemm_fp8, and its tiles.
    pub fp8: (Kernel, GemmPoint),
    /// fake_quant.
    pub fake_quant: Kernel,
    /// gemm_bf16, and its tiles.
    pub bf16: (Kernel, GemmPoint),
    /// The experts.
    pub experts: Prefill,
    /// The same on block-scaled tensor cores, where the architecture has them.
    pub native: Option<NativeLong>,
}

/// Kernels for many rows that one architecture has.
pub struct NativeLong {
    /// FP8 matrices.
    pub dense: Native,
    /// The experts.
    pub experts: NativeExperts,
}

impl Kernels {
    /// Walks through all units of a rank in a fixed order; `load` gives the kernels of each, in the unit's order.
    pub fn walk<E>(
        config: &ModelConfig,
        tp: Tp,
        numerics: Numerics,
        tuning: &Tuning,
        mut load: impl FnMut(&Unit) -> Result<Vec<Kernel>, E>,
    ) -> Result<Kernels, E> {
        let s = Shape::new(config, tp);
        let drafts = draft_stages(config);
        let ratios: Vec<u32> = layers(config).iter().chain(&drafts).map(|l| l.ratio).collect();
        let hc_shape = hc_shape(config);
        let embedding = take(load(&embedding::unit(s.hidden as usize, s.streams as usize, numerics))?);
        let hidden_norm = match drafts.is_empty() {
            true => None,
            false => load(&rms_norm::unit(s.hidden as usize, numerics))?.first().copied(),
        };
        let [site, tiled, collapse, finish, head] = take(load(&hc::unit(hc_shape, numerics))?);
        let sizes = (s.hidden as usize, s.experts as usize, s.chosen as usize);
        let router = take(load(&router::unit(sizes.0, sizes.1, sizes.2, numerics))?);
        let point = tuning.gemv;
        let mut gemvs = Vec::new();
        for rows in ROWS {
            let [kernel] = take(load(&gemv::unit(rows, point, numerics))?);
            gemvs.push(Gemv { kernel, rows, point, numerics });
        }
        let experts = Experts { hidden: s.hidden, inner: s.inner, chosen: s.chosen };
        let point = tuning.moe;
        let mut moe = Vec::new();
        for rows in ROWS.into_iter().filter(|rows| point.legal(experts, *rows, numerics)) {
            let [up, down] = take(load(&decode::unit(experts, rows, point, numerics))?);
            moe.push(MoeDecode { up, down, experts, rows, point, numerics });
        }
        let long = match numerics == Numerics::Published && Long::is_possible(&s) {
            true => Some(Long::walk(&s, tuning, &mut load)?),
            false => None,
        };
        let (mut prepare, mut attend) = ([None; 3], [None; 3]);
        for ratio in [0, 4, 128].into_iter().filter(|ratio| ratios.contains(ratio)) {
            prepare[ratio_index(ratio)] = Some(take(load(&kv::unit(s.prepare(ratio), numerics))?));
            attend[ratio_index(ratio)] = Some(take(load(&sparse_attention::unit(s.attention(ratio), numerics))?));
        }
        let mut index = None;
        if ratios.contains(&4) {
            let [score, queries, score_long, select] = take(load(&indexer::unit(s.indexer(), numerics))?);
            index = Some(Indexer { score, queries, score_long, select });
        }
        Ok(Kernels {
            embedding,
            hidden_norm,
            hc: HcKernels { shape: hc_shape, site, tiled, collapse, finish, head },
            router,
            gemv: gemvs,
            moe,
            long,
            verdicts: Vec::new(),
            prepare: ByRatio(prepare),
            indexer: index,
            attend: ByRatio(attend),
        })
    }

    /// Compiles all units of a rank for the emulator into `dir`, where they are not there yet, and loads them.
    ///
    /// Errors: no C++ compiler, or it fails.
    pub fn emulated(
        gpu: &dyn Gpu,
        config: &ModelConfig,
        tp: Tp,
        numerics: Numerics,
        tuning: &Tuning,
        dir: &Path,
    ) -> Result<Kernels, DeviceError> {
        let units = Kernels::units(config, tp, numerics, tuning);
        let images: Result<Vec<Image>, DeviceError> = units.par_iter().map(|u| emulated::compile(u, dir)).collect();
        let mut images = images?.into_iter();
        Kernels::walk(config, tp, numerics, tuning, |unit| {
            let image = images.next().unwrap_or_else(|| panic!("no image of unit {}", unit.family));
            unit.load(gpu, &image)
        })
    }

    /// Compiles all units of a rank for the GPU that is there, and loads them. Errors: the compiler's, the GPU's.
    pub fn compiled(
        gpu: &dyn Gpu,
        config: &ModelConfig,
        tp: Tp,
        numerics: Numerics,
        tuning: &Tuning,
        nvrtc: &Nvrtc,
    ) -> Result<Kernels, DeviceError> {
        let arch = gpu.facts().arch();
        Kernels::walk(config, tp, numerics, tuning, |unit| {
            let (cubin, _) = nvrtc.compile(unit, &arch)?;
            unit.load(gpu, &Image::Cubin(cubin))
        })
    }

    /// Loads all units of a rank as they were compiled at pack time for the GPU that is there; `find` gives the cubin
    /// of a unit by its key for that architecture.
    ///
    /// Errors: those of `find`, the GPU's.
    pub fn from_cubins<E: From<DeviceError>>(
        gpu: &dyn Gpu,
        config: &ModelConfig,
        tp: Tp,
        numerics: Numerics,
        tuning: &Tuning,
        mut find: impl FnMut(&Unit, [u8; 32]) -> Result<Vec<u8>, E>,
    ) -> Result<Kernels, E> {
        let arch = gpu.facts().arch();
        Kernels::walk(config, tp, numerics, tuning, |unit| {
            let cubin = find(unit, unit.key(&arch))?;
            Ok(unit.load(gpu, &Image::Cubin(cubin))?)
        })
    }

    /// All units of a rank.
    pub fn units(config: &ModelConfig, tp: Tp, numerics: Numerics, tuning: &Tuning) -> Vec<Unit> {
        let mut units = Vec::new();
        let record = |unit: &Unit| -> Result<Vec<Kernel>, std::convert::Infallible> {
            units.push(unit.clone());
            Ok(vec![Kernel(0); unit.kernels.len()])
        };
        match Kernels::walk(config, tp, numerics, tuning, record) {
            Ok(_) => units,
            Err(never) => match never {},
        }
    }
}

impl Shape {
    /// The indexer.
    pub fn indexer(&self) -> indexer::Sizes {
        indexer::Sizes {
            heads: self.index_heads,
            width: self.index_dim,
            rope: self.rope,
            topk: self.topk,
            ratio: 4,
            per_page: per_page(4),
        }
    }

    /// The experts of long steps.
    pub fn moe_sizes(&self) -> MoeSizes {
        MoeSizes { hidden: self.hidden, inner: self.inner, experts: self.experts, top_k: self.chosen }
    }
}

impl Long {
    /// Whole groups of quantised activations everywhere.
    fn is_possible(s: &Shape) -> bool {
        let widths = [s.hidden, s.q_rank, s.groups * s.o_rank, s.inner];
        widths.iter().all(|w| w.is_multiple_of(128)) && s.o_rank.is_multiple_of(64)
    }

    fn walk<E>(s: &Shape, tuning: &Tuning, load: &mut impl FnMut(&Unit) -> Result<Vec<Kernel>, E>) -> Result<Long, E> {
        let [fp8, fake_quant] = take(load(&gemm::unit(Format::Fp8, tuning.gemm_fp8))?);
        let [bf16] = take(load(&gemm::unit(Format::Bf16, tuning.gemm_bf16))?);
        let (sizes, point) = (s.moe_sizes(), tuning.experts);
        let unit = prefill::unit(sizes, point);
        let loaded = load(&unit)?;
        let kernel = |name: &str| {
            let at = unit.kernels.iter().position(|(k, _)| k == name).unwrap_or_else(|| panic!("no kernel {name}"));
            loaded[at]
        };
        let (fp8, bf16) = ((fp8, tuning.gemm_fp8), (bf16, tuning.gemm_bf16));
        let experts = Prefill::new(sizes, point, kernel);
        let native = match tuning.arch == native::ARCH && native_moe::legal(native_moe::point_for(point)) {
            true => Some(NativeLong::walk(sizes, tuning, load)?),
            false => None,
        };
        Ok(Long { fp8, fake_quant, bf16, experts, native })
    }
}

impl NativeLong {
    fn walk<E>(
        sizes: MoeSizes,
        tuning: &Tuning,
        load: &mut impl FnMut(&Unit) -> Result<Vec<Kernel>, E>,
    ) -> Result<NativeLong, E> {
        let (dense, experts) = (NativePoint::DEFAULT, native_moe::point_for(tuning.experts));
        Ok(NativeLong {
            dense: Native::new(dense, take(load(&native::unit(dense))?)),
            experts: NativeExperts::new(sizes, experts, take(load(&native_moe::unit(sizes, experts))?)),
        })
    }
}

/// As many as there must be: units list their kernels, and loading gives one for each.
fn take<T, const N: usize>(list: Vec<T>) -> [T; N] {
    let found = list.len();
    list.try_into().unwrap_or_else(|_| panic!("{found} kernels instead of {N}"))
}
