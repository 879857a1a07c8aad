//! Which kernels a rank needs: the same walk compiles them at pack time and loads them at start.

use dsv4_model::layout::Format;
use dsv4_model::tensors::{draft_stages, layers};
use dsv4_model::{ModelConfig, Tp};

use crate::device::unit::{Image, Unit};
use crate::device::{DeviceError, Gpu, Kernel};
use crate::gpu::shape::{Shape, hc_shape};
use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemm::{self, GemmPoint};
use crate::ops::dense_gemm::gemv::{self, Gemv};
use crate::ops::dense_gemm::native::{self, Native, NativePoint, Verdict};
use crate::ops::hyper_connection::{self as hc, HcKernels};
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
    /// By what they were compiled, and how they are launched.
    pub tuning: Tuning,
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
    /// Walks through all units of a rank of a checked shape ([`Shape::check`]) in a fixed order; `load` gives the kernels of each, in the unit's order.
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
        let mut gemvs = Vec::new();
        for rows in ROWS {
            let point = tuning.gemv(rows);
            let [kernel] = take(load(&gemv::unit(rows, point, numerics))?);
            gemvs.push(Gemv { kernel, rows, point, numerics });
        }
        let experts = Experts { hidden: s.hidden, inner: s.inner, chosen: s.chosen };
        let mut moe = Vec::new();
        for rows in ROWS.into_iter().filter(|rows| tuning.moe(experts, *rows).legal(experts, *rows, numerics)) {
            let point = tuning.moe(experts, rows);
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
            tuning: tuning.clone(),
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

    /// All units of a rank of a checked shape.
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

impl Long {
    /// Whole groups of quantised activations everywhere.
    fn is_possible(s: &Shape) -> bool {
        let widths = [s.hidden, s.q_rank, s.groups * s.o_rank, s.inner];
        widths.iter().all(|w| w.is_multiple_of(128)) && s.o_rank.is_multiple_of(64)
    }

    fn walk<E>(s: &Shape, tuning: &Tuning, load: &mut impl FnMut(&Unit) -> Result<Vec<Kernel>, E>) -> Result<Long, E> {
        let [fp8, fake_quant] = take(load(&gemm::unit(Format::Fp8, tuning.gemm(Format::Fp8)))?);
        let [bf16] = take(load(&gemm::unit(Format::Bf16, tuning.gemm(Format::Bf16)))?);
        let (sizes, point) = (s.moe_sizes(), tuning.experts(s.moe_sizes()));
        let unit = prefill::unit(sizes, point);
        let loaded = load(&unit)?;
        let kernel = |name: &str| {
            let at = unit.kernels.iter().position(|(k, _)| k == name).unwrap_or_else(|| panic!("no kernel {name}"));
            loaded[at]
        };
        let (fp8, bf16) = ((fp8, tuning.gemm(Format::Fp8)), (bf16, tuning.gemm(Format::Bf16)));
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
        let (dense, experts) = (NativePoint::DEFAULT, native_moe::point_for(tuning.experts(sizes)));
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
