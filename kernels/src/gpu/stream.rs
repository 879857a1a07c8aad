//! The launches of a step: counted, recorded the first time a step of its kind runs, replayed afterwards.
//!
//! Everything that kernels read of a step comes from device memory, so a recording serves every step with the same
//! [`Key`]. The graph is launched where the step begins; while the GPU works, the operations run through as always, and
//! their launches do nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::device::{DeviceError, Gpu, Graph, Kernel, Launch};
use crate::forward_gpu;

/// Recordings that are kept; past that all are made anew. One of a whole step takes some megabytes of the GPU.
pub(super) const RECORDINGS_MAX: usize = 64;

/// What launches depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// Rows.
    pub rows: u32,
    /// Rows whose logits are wanted.
    pub wanted: u32,
    /// Draft steps: whether they continue draft streams.
    pub source: Option<bool>,
    /// Index entries that any row sees, rounded up.
    pub entries: u32,
}

/// What the launches of a step were.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepStats {
    /// Kernels launched, or in the graph that was.
    pub launches: u32,
    /// Whether a graph of an earlier step ran.
    pub replayed: bool,
}

#[derive(Clone, Copy)]
enum Mode {
    Eager,
    Recording(Key),
    Replaying,
}

/// A GPU whose launches may be recorded.
pub struct Stream {
    gpu: Arc<dyn Gpu>,
    mode: Mode,
    /// While a graph is replayed.
    muted: AtomicBool,
    launches: AtomicU32,
    replayed: bool,
    /// Recordings and their launches, of kernels that may or may not overlap.
    graphs: HashMap<(Key, bool), (Graph, u32)>,
}

impl Stream {
    /// Nothing is recorded yet.
    pub fn new(gpu: Arc<dyn Gpu>) -> Stream {
        Stream {
            gpu,
            mode: Mode::Eager,
            muted: AtomicBool::new(false),
            launches: AtomicU32::new(0),
            replayed: false,
            graphs: HashMap::new(),
        }
    }

    /// The GPU itself, past what is recorded.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    /// Begins a step, all of whose inputs are on their way; with a key it is replayed, or recorded where that is possible.
    pub fn begin(&mut self, key: Option<Key>) -> Result<(), DeviceError> {
        self.discard()?;
        self.replayed = false;
        self.launches = AtomicU32::new(0);
        let Some(key) = key else { return Ok(()) };
        if let Some((graph, launches)) = self.graphs.get(&(key, self.gpu.overlaps())) {
            self.gpu.replay(*graph)?;
            self.mode = Mode::Replaying;
            self.muted = AtomicBool::new(true);
            self.launches = AtomicU32::new(*launches);
            self.replayed = true;
        } else if self.gpu.begin_capture()? {
            self.mode = Mode::Recording(key);
        }
        Ok(())
    }

    /// Launches what was recorded; launches are eager from here on. With `keep` the recording is
    /// the whole step and serves later ones.
    pub fn end(&mut self, keep: bool) -> Result<(), DeviceError> {
        let graph = match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Eager => return Ok(()),
            Mode::Replaying => {
                self.muted = AtomicBool::new(false);
                return Ok(());
            }
            Mode::Recording(key) => {
                let graph = self.gpu.end_capture()?;
                if !keep {
                    self.gpu.replay(graph)?;
                    return self.gpu.forget_graph(graph);
                }
                if self.graphs.len() >= RECORDINGS_MAX {
                    self.forget()?;
                }
                self.graphs.insert((key, self.gpu.overlaps()), (graph, self.launches.load(Ordering::Relaxed)));
                graph
            }
        };
        self.gpu.replay(graph)
    }

    /// Forgets what a step that failed has recorded.
    pub fn discard(&mut self) -> Result<(), DeviceError> {
        self.muted = AtomicBool::new(false);
        match std::mem::replace(&mut self.mode, Mode::Eager) {
            Mode::Recording(_) => self.gpu.abort_capture(),
            Mode::Eager | Mode::Replaying => Ok(()),
        }
    }

    /// Records every kind of step anew.
    pub fn forget(&mut self) -> Result<(), DeviceError> {
        self.discard()?;
        self.graphs.drain().try_for_each(|(_, (graph, _))| self.gpu.forget_graph(graph))
    }

    /// Of the current or last step.
    pub fn stats(&self) -> StepStats {
        StepStats { launches: self.launches.load(Ordering::Relaxed), replayed: self.replayed }
    }
}

impl Gpu for Stream {
    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        if self.muted.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.gpu.launch(kernel, shape, args)
    }
    forward_gpu! {
        facts alloc free write read fill copy load allow_overlap set_overlap overlaps sync begin_capture end_capture
        abort_capture replay forget_graph mark seconds_between forget_marks memory host send is_sent
    }
}
