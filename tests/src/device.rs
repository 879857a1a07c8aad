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
/// Set to 1 where there is a GPU: a test that would run on the emulator instead fails.
const REQUIRE_GPU: &str = "DSV4_REQUIRE_GPU";
/// What the emulator poses as.
const EMULATED: (u32, u32) = (9, 0);

fn built(what: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(what)
}

/// What a driver gives, or none where there is no GPU. Panics for everything else: a GPU that cannot be used is no
/// reason to test an emulator.
fn there<T>(found: Result<T, DeviceError>) -> Option<T> {
    match found {
        Ok(found) => Some(found),
        Err(DeviceError::NoDriver | DeviceError::NoGpu { .. }) => None,
        Err(error) => panic!("{error}"),
    }
}

/// Whether this machine has a GPU. Panics where it has one that cannot be used.
pub fn is_real() -> bool {
    there(Cuda::count()).is_some_and(|count| count > 0)
}

/// The GPU of this machine, or the emulator where there is none; says so where neither can be. Panics where a GPU cannot
/// be used, and where [`REQUIRE_GPU`] asks for one that is not there.
pub fn open() -> Option<Device> {
    if let Some(device) = there(cuda(0)) {
        return Some(device);
    }
    let required = std::env::var_os(REQUIRE_GPU).is_some_and(|value| value == "1");
    assert!(!required, "no GPU here, and {REQUIRE_GPU} is 1");
    if Emulated::is_possible() {
        return Some(emulator());
    }
    skip("no GPU, and no emulator (it needs x86-64 and a C++ compiler)");
    None
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_gpu_there_is_none() {
        assert_eq!(there(Ok(3)), Some(3));
        assert_eq!(there::<u32>(Err(DeviceError::NoDriver)), None);
        assert_eq!(there::<u32>(Err(DeviceError::NoGpu { ordinal: 0, found: "none".into() })), None);
    }

    #[test]
    #[should_panic(expected = "CUDA 12.8")]
    fn a_driver_that_fails_is_no_reason_for_the_emulator() {
        there::<u32>(Err(DeviceError::OldDriver { expected: "13.0".into(), found: "12.8".into() }));
    }
}
