//! A GPU for tests: the machine's, or the emulator, which poses as one so that its kernels can lie in an artifact.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dsv4_format::{Digest, KernelInput};
use dsv4_kernels::device::cuda::Cuda;
use dsv4_kernels::device::emulated::{self, Emulated};
use dsv4_kernels::device::nvrtc::Nvrtc;
use dsv4_kernels::device::unit::{Image, Unit};
use dsv4_kernels::device::{DeviceError, Facts, Gpu, Kernel};
use dsv4_kernels::forward_gpu;
use dsv4_kernels::gpu::kernels::Kernels;
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::tuning::Tuning;
use dsv4_model::{ModelConfig, Tp};
use dsv4_run::compute::{Device, cuda};
use rayon::prelude::*;

use crate::artifacts::Packed;
use crate::skip;

/// A directory with artifacts that have kernels for this machine's GPU: `nano1.dsv4`, `nano2.dsv4`, `tiny1.dsv4`,
/// `tiny2.dsv4`. Without it they are packed here, which needs NVRTC.
const ARTIFACTS: &str = "DSV4_ARTIFACTS";
/// What the emulator poses as.
const EMULATED: (u32, u32) = (9, 0);

fn built(what: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(what)
}

/// Whether this machine has a GPU that can be used.
pub fn is_real() -> bool {
    Cuda::count().is_ok_and(|count| count > 0)
}

/// The GPU of this machine, or the emulator; says so where neither can be.
pub fn open() -> Option<Device> {
    match cuda(0) {
        Ok(device) => Some(device),
        Err(_) if Emulated::is_possible() => Some(emulator()),
        Err(error) => {
            skip(&format!("no emulator (it needs x86-64 and a C++ compiler), and {error}"));
            None
        }
    }
}

/// The emulator, in disguise.
pub fn emulator() -> Device {
    emulator_as(EMULATED)
}

/// The emulator in the disguise of a GPU of that compute capability.
pub fn emulator_as(capability: (u32, u32)) -> Device {
    let gpu = Posing::new(capability);
    let memory = gpu.memory().expect("the emulator's memory");
    Device { gpu, ordinal: 0, count: 1, memory }
}

/// A packed checkpoint of the test data with kernels for [`open`]'s GPU, in both numerics.
pub fn packed(checkpoint: &str, tp: u32) -> Packed {
    if let (true, Some(dir)) = (is_real(), std::env::var_os(ARTIFACTS)) {
        return Packed::there(&Path::new(&dir).join(format!("{checkpoint}{tp}.dsv4")));
    }
    let packed = Packed::of(&Path::new(crate::DATA).join(checkpoint), tp);
    let (kernels, tuning) = kernels(&packed, tp);
    packed.with_kernels(&arch(), &kernels, Some(&tuning))
}

/// What the kernels of [`open`]'s GPU are compiled for.
fn arch() -> String {
    open().expect("a GPU, as before").gpu.facts().arch()
}

/// All kernels of an artifact's ranks for [`open`]'s GPU, and the table they are compiled by.
pub fn kernels(packed: &Packed, tp: u32) -> (Vec<KernelInput>, String) {
    kernels_for(packed, tp, &arch(), &[Numerics::Published, Numerics::Float], Unit::clone)
}

/// All kernels of an artifact's ranks for `arch`, each compiled from what `edit` makes of it; for another than
/// [`open`]'s GPU on the emulator only.
pub fn kernels_for(
    packed: &Packed,
    tp: u32,
    arch: &str,
    numerics: &[Numerics],
    edit: impl Fn(&Unit) -> Unit + Sync,
) -> (Vec<KernelInput>, String) {
    let opened = dsv4_run::load::open(packed.path()).unwrap_or_else(|e| panic!("{e}"));
    let tuning = Tuning::for_arch(arch);
    let units = units(&opened.config, Tp::new(0, tp).expect("a rank"), &tuning, numerics);
    let nvrtc = is_real().then(|| Nvrtc::open(&built("nvrtc")).unwrap_or_else(|e| panic!("{e}")));
    let compile = |unit: &Unit| match &nvrtc {
        Some(nvrtc) => nvrtc.compile(unit, arch).map(|(cubin, _)| cubin),
        None => emulated::compile(unit, &built("emulated")).map(|image| match image {
            Image::Library(path) => path.as_os_str().as_bytes().to_vec(),
            Image::Cubin(cubin) => cubin,
        }),
    };
    let input = |unit: &Unit| KernelInput {
        family: unit.family.into(),
        key: Digest(unit.key(arch)),
        cubin: compile(&edit(unit)).unwrap_or_else(|e| panic!("{e}")),
    };
    (units.par_iter().map(input).collect(), tuning.text())
}

/// Units of all `numerics`, each once.
fn units(config: &ModelConfig, tp: Tp, tuning: &Tuning, numerics: &[Numerics]) -> Vec<Unit> {
    let mut units: Vec<Unit> = Vec::new();
    for unit in numerics.iter().flat_map(|numerics| Kernels::units(config, tp, *numerics, tuning)) {
        if !units.contains(&unit) {
            units.push(unit);
        }
    }
    units
}

/// The emulator as a GPU: its cubins are the paths of the emulator's libraries.
struct Posing {
    gpu: Arc<dyn Gpu>,
    facts: Facts,
}

impl Posing {
    fn new(capability: (u32, u32)) -> Arc<Posing> {
        let gpu = Emulated::open();
        let facts = Facts { capability, ..gpu.facts().clone() };
        Arc::new(Posing { gpu, facts })
    }
}

impl Gpu for Posing {
    fn facts(&self) -> &Facts {
        &self.facts
    }
    fn load(&self, image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        let Image::Cubin(bytes) = image else { panic!("kernels come as cubins") };
        self.gpu.load(&Image::Library(PathBuf::from(OsStr::from_bytes(bytes))), kernels)
    }
    forward_gpu! {
        alloc free write read fill copy allow_overlap set_overlap overlaps launch sync begin_capture end_capture
        abort_capture replay forget_graph mark seconds_between forget_marks memory host send is_sent
    }
}
