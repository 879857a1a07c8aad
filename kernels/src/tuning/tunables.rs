//! What can be tuned of a rank: kernels with their shapes, rows and legal points, as the tuner sees them.
//!
//! Everything here is generic over [`Tunable`]: a kernel with points joins by one implementation and a line in
//! [`all`]. Sizes come from the model's table; launches from the kernels' own launch code.

use std::sync::Arc;

use dsv4_model::{ModelConfig, Tp};

use super::chip::Chip;
use super::cost::Work;
use super::sketch::{Sketch, Sketched};
use super::{Values, experts, matrices, tiles};
use crate::device::unit::Unit;
use crate::device::{DeviceError, Gpu, Kernel, Launch};

/// Rows that decode kernels are compiled for.
pub const DECODE_ROWS: [u32; 4] = [1, 2, 4, 8];
/// Rows at which kernels for many rows are timed: a short chunk and a usual one.
pub const PREFILL_ROWS: [u32; 2] = [512, 4096];

/// Which numbers of a point may differ where.
#[derive(Clone, Debug)]
pub struct Scope {
    /// Kernels that are compiled as one, or whose sums must be in the same order.
    pub group: &'static str,
    /// Rows that share a compiled unit, or 0 for all.
    pub bucket: u32,
    /// Numbers that are one for all of the group: they decide the order of sums.
    pub machine: &'static [&'static str],
    /// Numbers that every shape may have its own of: nothing that is compiled depends on them. The rest is one for a
    /// bucket.
    pub free: Vec<String>,
    /// Sizes are compiled in: a point that compiles well for one shape says nothing of others.
    pub sized: bool,
}

/// A kernel at a shape and a number of rows.
pub trait Tunable: Send + Sync {
    /// As tables name it.
    fn kernel(&self) -> &'static str;
    /// As tables name it.
    fn shape(&self) -> &str;
    /// Rows of activations.
    fn rows(&self) -> u32;
    /// What must agree.
    fn scope(&self) -> Scope;
    /// Launches of it in a step of the whole rank.
    fn calls(&self) -> f64;
    /// Legal points, that of untuned tables first.
    fn points(&self) -> Vec<Values>;
    /// What is compiled.
    fn unit(&self, point: &Values) -> Unit;
    /// Which kernel of the unit most of the time goes to.
    fn entry(&self, point: &Values) -> &'static str;
    /// What a launch has to do; `shapes` are those of its kernels.
    fn work(&self, point: &Values, shapes: &[Launch]) -> Work;
    /// Weights, activations and results in the device's memory: `copies` of what must not come from the cache.
    fn prepare(&self, gpu: &Arc<dyn Gpu>, copies: u32) -> Result<Box<dyn Prepared>, DeviceError>;
    /// Bytes of weights of a launch, each counted once.
    fn bytes(&self) -> u64;
    /// Multiplications and additions of a launch.
    fn flops(&self) -> f64;
}

/// A tunable with its data on a device.
pub trait Prepared {
    /// What has to be there before a launch and is not timed.
    fn before(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values) -> Result<(), DeviceError>;
    /// What is timed, on one of the copies.
    fn launch(&self, gpu: &dyn Gpu, kernels: &Loaded, point: &Values, copy: u32) -> Result<(), DeviceError>;
    /// What the last launch on copy 0 gave: at most some thousand values.
    fn result(&self, gpu: &dyn Gpu) -> Result<Vec<f32>, DeviceError>;
    /// Makes results unlike any that a launch gives.
    fn clear(&self, gpu: &dyn Gpu) -> Result<(), DeviceError>;
}

/// The kernels of a loaded unit.
pub struct Loaded {
    names: Vec<String>,
    kernels: Vec<Kernel>,
}

impl Loaded {
    /// Kernels in the unit's order.
    pub fn new(unit: &Unit, kernels: Vec<Kernel>) -> Loaded {
        Loaded { names: unit.kernels.iter().map(|(name, _)| name.clone()).collect(), kernels }
    }

    /// One of them. Panics if the unit has none of this name: both are in this program.
    pub fn of(&self, name: &str) -> Kernel {
        let at = self.names.iter().position(|n| n == name).unwrap_or_else(|| panic!("no kernel {name}"));
        self.kernels[at]
    }
}

/// Everything that is tuned of a rank, in a fixed order.
pub fn all(config: &ModelConfig, tp: Tp) -> Vec<Box<dyn Tunable>> {
    let mut list = matrices::all(config, tp);
    list.extend(experts::all(config, tp));
    list.extend(tiles::all(config, tp));
    list
}

/// Numbers of a point that what is compiled does not depend on, told by trying all legal ones.
pub(super) fn free<P: Copy>(
    points: impl Iterator<Item = P>,
    values: impl Fn(&P) -> Values,
    unit: impl Fn(P) -> Unit,
) -> Vec<String> {
    let all: Vec<(Values, Unit)> = points.map(|p| (values(&p), unit(p))).collect();
    let Some((first, unit)) = all.first() else { return Vec::new() };
    let only = |other: &Values, name: &String| other.iter().all(|(n, v)| (n == name) != (first.get(n) == Some(v)));
    let others = |name: &String| all.iter().filter(|(v, _)| only(v, name)).map(|(_, u)| u).collect::<Vec<_>>();
    first.keys().filter(|name| !others(name).is_empty() && others(name).iter().all(|u| *u == unit)).cloned().collect()
}

/// The shapes of a tunable's launches at a point, as its launch code decides them.
pub fn launches(tunable: &dyn Tunable, point: &Values, chip: &Chip) -> Vec<Launch> {
    Sketcher::new(tunable, chip).launches(point)
}

/// A tunable on a GPU that runs nothing: made once for all its points, since its data take longer than its launches.
pub struct Sketcher<'a> {
    tunable: &'a dyn Tunable,
    sketch: Arc<Sketch>,
    prepared: Box<dyn Prepared>,
}

impl<'a> Sketcher<'a> {
    /// On a GPU like `chip`.
    pub fn new(tunable: &'a dyn Tunable, chip: &Chip) -> Sketcher<'a> {
        let sketch = Sketch::open(chip);
        let gpu: Arc<dyn Gpu> = sketch.clone();
        let prepared = tunable.prepare(&gpu, 1).unwrap_or_else(|e| panic!("a GPU that runs nothing fails: {e}"));
        Sketcher { tunable, sketch, prepared }
    }

    /// The shapes of the launches at a point.
    pub fn launches(&self, point: &Values) -> Vec<Launch> {
        self.sketched(point, &self.tunable.unit(point)).into_iter().map(|l| l.shape).collect()
    }

    /// The launches at a point, whose unit is `unit`, with their arguments; addresses depend on the tunable alone.
    pub(super) fn sketched(&self, point: &Values, unit: &Unit) -> Vec<Sketched> {
        let gpu = self.sketch.as_ref();
        let names: Vec<(&str, u32)> = unit.kernels.iter().map(|(name, shared)| (name.as_str(), *shared)).collect();
        let image = crate::device::unit::Image::Cubin(Vec::new());
        let launched = || -> Result<(), DeviceError> {
            let kernels = Loaded::new(unit, gpu.load(&image, &names)?);
            self.prepared.before(gpu, &kernels, point)?;
            self.sketch.take();
            self.prepared.launch(gpu, &kernels, point, 0)
        };
        launched().unwrap_or_else(|e| panic!("a GPU that runs nothing fails: {e}"));
        self.sketch.take()
    }
}
