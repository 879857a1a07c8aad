//! A GPU that runs nothing and remembers what it was asked to launch.
//!
//! Launch code decides grids, threads and shared memory; asking it here gives them without a GPU and without saying
//! them twice. Memory is addresses alone; what is read is zero.

use std::sync::{Arc, Mutex, MutexGuard};

use super::chip::Chip;
use crate::device::unit::Image;
use crate::device::{DeviceError, Facts, Gpu, Graph, Kernel, Launch, Mark};

/// A launch that was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sketched {
    /// The kernel's name; empty for one that was not loaded here.
    pub kernel: String,
    /// Its shape.
    pub shape: Launch,
    /// The argument struct.
    pub args: Vec<u8>,
}

/// See the module.
pub struct Sketch {
    facts: Facts,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    end: u64,
    names: Vec<String>,
    launches: Vec<Sketched>,
}

impl Sketch {
    /// One like `chip`, with any amount of memory.
    pub fn open(chip: &Chip) -> Arc<Sketch> {
        let facts = Facts {
            name: chip.name.into(),
            multiprocessors: chip.multiprocessors,
            capability: (0, 0),
            memory_bytes: u64::MAX,
            l2_bytes: chip.l2_bytes,
            shared_bytes: chip.shared,
            driver: 0,
        };
        Arc::new(Sketch { facts, state: Mutex::new(State { end: 1 << 20, ..State::default() }) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// What was launched since the last call.
    pub fn take(&self) -> Vec<Sketched> {
        std::mem::take(&mut self.state().launches)
    }
}

impl Gpu for Sketch {
    fn facts(&self) -> &Facts {
        &self.facts
    }
    fn alloc(&self, bytes: u64) -> Result<u64, DeviceError> {
        let mut state = self.state();
        let at = state.end;
        state.end = at.saturating_add(bytes.next_multiple_of(4096));
        Ok(at)
    }
    fn free(&self, _at: u64) {}
    fn write(&self, _at: u64, _bytes: &[u8]) -> Result<(), DeviceError> {
        Ok(())
    }
    fn read(&self, _at: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        out.fill(0);
        Ok(())
    }
    fn fill(&self, _at: u64, _byte: u8, _bytes: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn copy(&self, _to: u64, _from: u64, _bytes: u64) -> Result<(), DeviceError> {
        Ok(())
    }
    fn load(&self, _image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        let mut state = self.state();
        Ok(kernels
            .iter()
            .map(|(name, _)| {
                state.names.push((*name).to_owned());
                Kernel(state.names.len() - 1)
            })
            .collect())
    }
    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        let kernel = state.names.get(kernel.0).cloned().unwrap_or_default();
        state.launches.push(Sketched { kernel, shape, args: args.to_vec() });
        Ok(())
    }
    fn sync(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn begin_capture(&self) -> Result<bool, DeviceError> {
        Ok(false)
    }
    fn end_capture(&self) -> Result<Graph, DeviceError> {
        Ok(Graph(0))
    }
    fn abort_capture(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn replay(&self, _graph: Graph) -> Result<(), DeviceError> {
        Ok(())
    }
    fn forget_graph(&self, _graph: Graph) -> Result<(), DeviceError> {
        Ok(())
    }
    fn mark(&self) -> Result<Mark, DeviceError> {
        Ok(Mark(0))
    }
    fn seconds_between(&self, _from: Mark, _to: Mark) -> Result<f64, DeviceError> {
        Ok(0.0)
    }
}
