//! What computes: the CPU, or a GPU that the artifact has kernels for. Decided once, before anything is loaded.

use std::path::Path;
use std::sync::Arc;

use dsv4_format::Artifact;
use dsv4_kernels::device::cuda::Cuda;
use dsv4_kernels::device::{DeviceError, DeviceMemory, Gpu};
use serde_json::{Value, json};

use crate::cli::Backend;
use crate::error::{RunError, fact};
use crate::preflight::host::Host;
use crate::preflight::memory::{Card, Target};

/// Rows of a prefill step unless told, by backend. A GPU reads all experts' weights in each: fewer steps, fewer bytes.
const CPU_CHUNK: u32 = 256;
const GPU_CHUNK: u32 = 2048;

/// A GPU, opened.
#[derive(Clone)]
pub struct Device {
    /// The GPU.
    pub gpu: Arc<dyn Gpu>,
    /// Its number.
    pub ordinal: u32,
    /// How many GPUs this machine has; its ranks are dealt out to them in turn.
    pub count: u32,
    /// Its memory before this program took any.
    pub memory: DeviceMemory,
}

/// Which backend runs a rank.
#[derive(Clone)]
pub enum Compute {
    /// The CPU backend.
    Cpu,
    /// The GPU backend.
    Gpu(Device),
}

/// Opens the GPU that this machine's `local_rank`th rank computes on. Errors: no driver, one that is too old, no GPU.
pub fn cuda(local_rank: u32) -> Result<Device, DeviceError> {
    let count = Cuda::count()?;
    let ordinal = local_rank % count.max(1);
    let gpu = Cuda::open(ordinal)?;
    let memory = gpu.memory()?;
    Ok(Device { gpu, ordinal, count, memory })
}

/// Decides what computes, and says what a user should know about that. `open` opens a GPU.
///
/// `auto` takes a GPU where the artifact has kernels and there is a GPU; then they must be for it. Errors: what was
/// asked for is not there, or the artifact has no kernels for it.
pub fn choose(
    asked: Backend,
    artifact: &Artifact,
    open: &dyn Fn() -> Result<Device, DeviceError>,
) -> Result<(Compute, Option<String>), RunError> {
    let on_cpu = |why: String| (Compute::Cpu, Some(format!("computing on the CPU: {why}\n")));
    let device = match asked {
        Backend::Cpu => return Ok((Compute::Cpu, None)),
        Backend::Auto if arches(artifact).is_empty() => {
            let gpus = Host::for_memory(Path::new("/")).gpus;
            let why = || format!("the artifact has no kernels for {}", gpus.join(", "));
            return Ok(if gpus.is_empty() { (Compute::Cpu, None) } else { on_cpu(why()) });
        }
        Backend::Auto => match open() {
            Ok(device) => device,
            // No driver is no surprise.
            Err(DeviceError::NoDriver) => return Ok((Compute::Cpu, None)),
            Err(error) => return Ok(on_cpu(fact(&error))),
        },
        Backend::Cuda => open()?,
    };
    require_arch(artifact, device.gpu.as_ref())?;
    Ok((Compute::Gpu(device), None))
}

/// Architectures that an artifact has kernels for, ascending.
pub fn arches(artifact: &Artifact) -> Vec<&str> {
    let mut arches: Vec<&str> = artifact.manifest().kernels.iter().map(|k| k.arch.as_str()).collect();
    // As they are sorted in the manifest.
    arches.dedup();
    arches
}

/// Requires kernels for a GPU. Errors: [`RunError::NoKernels`].
fn require_arch(artifact: &Artifact, gpu: &dyn Gpu) -> Result<(), RunError> {
    let (facts, found) = (gpu.facts(), arches(artifact));
    let arch = facts.arch();
    if found.contains(&arch.as_str()) {
        return Ok(());
    }
    let found = if found.is_empty() { "none".to_owned() } else { format!("those for {}", found.join(", ")) };
    Err(RunError::NoKernels { artifact: artifact.path().to_owned(), gpu: facts.name.clone(), arch, found })
}

impl Compute {
    /// As on the command line.
    pub fn name(&self) -> &'static str {
        match self {
            Compute::Cpu => "cpu",
            Compute::Gpu(_) => "cuda",
        }
    }

    /// Rows of a prefill step: those asked for, else the backend's.
    pub fn chunk(&self, asked: Option<u32>) -> u32 {
        let own = if matches!(self, Compute::Cpu) { CPU_CHUNK } else { GPU_CHUNK };
        asked.unwrap_or(own)
    }

    /// Whose memory is planned.
    pub fn target(&self) -> Target {
        match self {
            Compute::Cpu => Target::Cpu,
            Compute::Gpu(device) if device.memory.unified => Target::Cuda,
            Compute::Gpu(_) => Target::Card,
        }
    }

    /// A machine's memory with that of the GPU's card.
    pub fn host(&self, root: &Path) -> Host {
        let mut host = Host::for_memory(root);
        self.describe(&mut host);
        host
    }

    /// Adds the card's memory to what is known of a machine.
    pub fn describe(&self, host: &mut Host) {
        if let Compute::Gpu(device) = self
            && !device.memory.unified
        {
            host.card = Some(Card { total: device.memory.total, free: device.memory.free });
        }
    }

    /// Of this machine's ranks those that share the memory of the first: all, unless there are cards to share out.
    pub fn sharing(&self, here: &[u32]) -> Vec<u32> {
        match self {
            Compute::Gpu(device) if !device.memory.unified => {
                here.iter().copied().step_by(device.count.max(1) as usize).collect()
            }
            _ => here.to_vec(),
        }
    }

    /// For people: where a rank computes, and with which kernels.
    pub fn line(&self, rank: u32, artifact: &Artifact) -> String {
        let Compute::Gpu(device) = self else { return String::new() };
        let (facts, id) = (device.gpu.facts(), artifact.manifest().kernel_set_id);
        let (name, arch, ordinal) = (&facts.name, facts.arch(), device.ordinal);
        format!("rank {rank}: on {name} (GPU {ordinal}), kernels {id} for {arch}\n")
    }

    /// For programs.
    pub fn to_json(&self, artifact: &Artifact) -> Value {
        let Compute::Gpu(device) = self else { return json!({"name": self.name()}) };
        let facts = device.gpu.facts();
        json!({
            "name": self.name(),
            "gpu": facts.name,
            "ordinal": device.ordinal,
            "multiprocessors": facts.multiprocessors,
            "arch": facts.arch(),
            "kernel_set_id": artifact.manifest().kernel_set_id.to_string(),
        })
    }

    /// What must be equal on all ranks.
    pub fn facts(&self, host: &Host) -> Vec<(&'static str, String)> {
        let mut facts = vec![("backend", self.name().to_owned())];
        if let Compute::Gpu(device) = self {
            let driver = host.driver.as_ref().map_or("not known".to_owned(), |d| d.version.clone());
            let on_gpu = device.gpu.facts();
            facts.extend([("arch", on_gpu.arch()), ("cuda", on_gpu.driver.to_string()), ("driver", driver)]);
        }
        facts
    }
}
