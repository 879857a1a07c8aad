//! A rank on a GPU: its kernels out of the artifact, its weights through pinned slots onto the device.
//!
//! Order: everything is reserved first (kernels, arena, caches, workspace), then weights are streamed, then the
//! backend is put together. Weights are never whole in host memory: a block is read into a slot, hashed there, and
//! only then copied. Nothing is compiled.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use dsv4_format::{BLOCK_BYTES, Digest, FormatError, LoadOptions, LoadReport, NoProgress, Progress, SLOTS, Staged};
use dsv4_kernels::collective::Collective;
use dsv4_kernels::device::{Buffer, DeviceError, Gpu, HostMemory};
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::gpu::shape::Shape;
use dsv4_kernels::gpu::weights::{DeviceWeights, fill};
use dsv4_kernels::gpu::{GpuBackend, GpuError, GpuOptions, Reserved};
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::dense_gemm::native::Verdict;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::Tp;

use crate::error::RunError;
use crate::load::Opened;
use crate::stall;

/// The kernels of an artifact for a rank and a GPU, by the tuning table they were compiled by.
struct Found<'a> {
    opened: &'a Opened,
    gpu: &'a dyn Gpu,
    arch: String,
    tp: Tp,
    numerics: Numerics,
    tuning: Tuning,
}

impl<'a> Found<'a> {
    /// Errors: no table for the GPU's architecture, or one of another version.
    fn new(opened: &'a Opened, gpu: &'a dyn Gpu, tp: Tp, numerics: Numerics) -> Result<Found<'a>, RunError> {
        let arch = gpu.facts().arch();
        let artifact = opened.artifact.path().to_owned();
        let Some(text) = opened.artifact.tuning(&arch)? else {
            let what = "tuning table".to_owned();
            return Err(RunError::NoKernel { artifact, what, arch, found: "none".into() });
        };
        let refused = |reason: String, arch: &str| RunError::NoKernel {
            artifact: artifact.clone(),
            what: "tuning table of this version".into(),
            arch: arch.to_owned(),
            found: reason,
        };
        let tuning =
            Tuning::parse(&String::from_utf8_lossy(&text)).map_err(|e| refused(crate::error::fact(&e), &arch))?;
        if tuning.arch != arch {
            return Err(refused(format!("one for {}", tuning.arch), &arch));
        }
        Shape::check(&opened.config, tp, numerics, &tuning)?;
        Ok(Found { opened, gpu, arch, tp, numerics, tuning })
    }

    /// Requires every kernel and loads none; how many there are. Errors: the first that is not there.
    fn require(&self) -> Result<usize, RunError> {
        let Opened { artifact, config, .. } = self.opened;
        let units = Kernels::units(config, self.tp, self.numerics, &self.tuning);
        let records = &artifact.manifest().kernels;
        let is_there = |key: [u8; 32]| records.iter().any(|k| k.arch == self.arch && k.key.0 == key);
        let missing: Vec<_> = units.iter().filter(|unit| !is_there(unit.key(&self.arch))).collect();
        match missing.first() {
            None => Ok(units.len()),
            Some(unit) => Err(RunError::NoKernel {
                artifact: artifact.path().to_owned(),
                what: format!("kernel {} ({} numerics)", unit.family, self.numerics.name()),
                arch: self.arch.clone(),
                found: format!(
                    "{} of {} of another version ({} is not there)",
                    missing.len(),
                    units.len(),
                    Digest(unit.key(&self.arch))
                ),
            }),
        }
    }

    fn load(&self) -> Result<Kernels, RunError> {
        let Opened { artifact, config, .. } = self.opened;
        let records = &artifact.manifest().kernels;
        Kernels::from_cubins(self.gpu, config, self.tp, self.numerics, &self.tuning, |unit, key| {
            let record = records.iter().find(|k| k.arch == self.arch && k.key.0 == key);
            let cubin = record.map(|record| artifact.kernel(record)).transpose()?.flatten();
            cubin.ok_or_else(|| RunError::NoKernel {
                artifact: artifact.path().to_owned(),
                what: format!("kernel {}", unit.family),
                arch: self.arch.clone(),
                found: "none".into(),
            })
        })
    }
}

/// How many kernels a rank loads on a GPU, all of which are in the artifact. Errors: one is not.
pub fn require_kernels(opened: &Opened, gpu: &dyn Gpu, tp: Tp, numerics: Numerics) -> Result<usize, RunError> {
    Found::new(opened, gpu, tp, numerics)?.require()
}

/// Blocks on their way from slots to the device.
struct Copies<'a> {
    gpu: &'a dyn Gpu,
    arena: &'a Buffer,
    sent: VecDeque<HostMemory>,
    /// What the load fails for; the loader's own error only says that it does.
    failed: Option<DeviceError>,
}

impl Copies<'_> {
    fn fail(&mut self, error: DeviceError) -> FormatError {
        self.failed = Some(error);
        let (what, source) = ("a copy to the GPU", io::Error::other("the GPU fails"));
        FormatError::Memory { what, bytes: BLOCK_BYTES, source }
    }
}

impl dsv4_format::Device for Copies<'_> {
    type Slot = HostMemory;

    fn slot(&mut self) -> Result<HostMemory, FormatError> {
        self.gpu.host(BLOCK_BYTES as usize).map_err(|e| self.fail(e))
    }

    fn copy(&mut self, slot: HostMemory, len: usize, arena_offset: u64) -> Result<(), FormatError> {
        assert!(arena_offset + len as u64 <= self.arena.bytes(), "{len} bytes at {arena_offset} of the arena");
        self.gpu.send(&slot, len, self.arena.at() + arena_offset).map_err(|e| self.fail(e))?;
        self.sent.push_back(slot);
        Ok(())
    }

    fn copied(&mut self, wait: bool) -> Result<Option<HostMemory>, FormatError> {
        let Some(first) = self.sent.front() else { return Ok(None) };
        match self.gpu.is_sent(first, wait) {
            Ok(true) => Ok(self.sent.pop_front()),
            Ok(false) => Ok(None),
            Err(error) => Err(self.fail(error)),
        }
    }
}

/// Streams a rank's weights into `arena`, which is as long as they are; ends the process when the disk stops
/// answering. Errors: the loader's, the GPU's.
pub fn load_arena(
    opened: &Opened,
    rank: u32,
    gpu: &dyn Gpu,
    arena: &Buffer,
    options: &LoadOptions<'_>,
    progress: &dyn Progress,
) -> Result<LoadReport, RunError> {
    let artifact = &opened.artifact;
    let options = LoadOptions { staged: true, ..*options };
    let copies = Copies { gpu, arena, sent: VecDeque::new(), failed: None };
    let mut staged = Staged::new(copies, SLOTS);
    let loaded = stall::guard(&artifact.rank_path(rank), progress, |progress| {
        artifact.load_into(rank, &mut staged, &options, progress)
    });
    match (loaded, staged.into_device().failed) {
        (Ok(report), _) => Ok(report),
        (Err(_), Some(error)) => Err(error.into()),
        (Err(error), None) => Err(error.into()),
    }
}

/// A rank with everything but its weights.
pub struct Ready {
    gpu: Arc<dyn Gpu>,
    tp: Tp,
    kernels: Kernels,
    reserved: Reserved,
    arena: Buffer,
}

/// A rank with its weights.
pub struct Loaded {
    kernels: Kernels,
    reserved: Reserved,
    weights: DeviceWeights,
}

impl Ready {
    /// Loads kernels and reserves all memory of a rank.
    ///
    /// Errors: kernels that are not in the artifact, not enough GPU memory.
    pub fn new(
        opened: &Opened,
        gpu: Arc<dyn Gpu>,
        rank: u32,
        numerics: Numerics,
        options: GpuOptions,
    ) -> Result<Ready, RunError> {
        let artifact = &opened.artifact;
        let tp = Tp::new(rank, artifact.manifest().tp)?;
        let found = Found::new(opened, gpu.as_ref(), tp, numerics)?;
        let mut kernels = stall::guard(artifact.path(), &NoProgress, |_| found.load())?;
        kernels.check(&gpu)?;
        let arena = Buffer::new(&gpu, artifact.arena_bytes(rank)?)?;
        let reserved = Reserved::new(Arc::clone(&gpu), opened.config.clone(), tp, numerics, options)?;
        Ok(Ready { gpu, tp, kernels, reserved, arena })
    }

    /// How the block-scaled kernels did when they were checked, a line each; none where the GPU has none.
    pub fn verdicts(&self) -> String {
        self.kernels.verdicts.iter().map(|verdict| format!("{verdict}\n")).collect()
    }

    /// Whether long steps use the block-scaled kernels, after ranks have agreed.
    pub fn is_block_scaled(&self) -> bool {
        self.kernels.is_native()
    }

    /// The same as a line; none where the GPU has no such kernels.
    pub fn outcome(&self) -> &'static str {
        let verdicts = &self.kernels.verdicts;
        if verdicts.is_empty() {
            ""
        } else if self.is_block_scaled() {
            "long steps use the block-scaled kernels\n"
        } else if verdicts.iter().all(Verdict::accepted) {
            "long steps use the portable kernels: another rank's block-scaled ones have failed their check\n"
        } else {
            "long steps use the portable kernels: a block-scaled one has failed its check\n"
        }
    }

    /// Uses the block-scaled kernels only if those of all ranks have passed: they may round sums otherwise than the
    /// portable ones, and what ranks replicate must be equal. Errors: another rank is lost.
    pub fn agree(&mut self, collective: &mut dyn Collective) -> Result<(), RunError> {
        let mut passed = [if self.kernels.is_native() { 1.0 } else { 0.0 }];
        collective.all_reduce(&mut passed).map_err(GpuError::from)?;
        if passed[0] < collective.size() as f32 {
            self.kernels.drop_native();
        }
        Ok(())
    }

    /// Where the weights will be.
    pub fn arena(&self) -> &Buffer {
        &self.arena
    }

    /// Streams the weights. Errors: those of [`load_arena`], and of weights that are not the model's.
    pub fn load(
        self,
        opened: &Opened,
        options: &LoadOptions<'_>,
        progress: &dyn Progress,
    ) -> Result<(Loaded, LoadReport), RunError> {
        let report = load_arena(opened, self.tp.rank(), self.gpu.as_ref(), &self.arena, options, progress)?;
        Ok((self.with_weights(opened)?, report))
    }

    /// Makes the weights from a seed, for measurements. Errors: the GPU's.
    pub fn fill(self, opened: &Opened, seed: u64) -> Result<Loaded, RunError> {
        let place = place(opened, self.tp.rank())?;
        fill(self.gpu.as_ref(), &opened.config, self.tp, &self.arena, place, seed)?;
        self.with_weights(opened)
    }

    fn with_weights(self, opened: &Opened) -> Result<Loaded, RunError> {
        let Ready { gpu, tp, kernels, reserved, arena } = self;
        let weights = DeviceWeights::new(&gpu, &opened.config, tp, arena, place(opened, tp.rank())?)?;
        Ok(Loaded { kernels, reserved, weights })
    }
}

/// Where a rank's tensors lie in its arena, by name.
fn place(opened: &Opened, rank: u32) -> Result<impl Fn(&str) -> Option<Range<usize>>, RunError> {
    let layout = Arc::clone(opened.artifact.layout(rank)?);
    Ok(move |name: &str| {
        let place = layout.tensor(name)?;
        Some(place.arena_offset as usize..(place.arena_offset + place.len) as usize)
    })
}

impl Loaded {
    /// The backend, with its way to the other ranks.
    pub fn backend(self, collective: Box<dyn Collective>) -> GpuBackend {
        GpuBackend::with(self.reserved, self.weights, self.kernels, collective)
    }
}
