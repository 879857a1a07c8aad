//! A GPU that is watched: how long recordings take, and which kernel how much of it.
//!
//! A recording is timed by a mark before and behind it, without the host's work between steps. For a profile marks
//! stand around every launch, in the recording itself, where the host has no part either; what a pair of marks
//! costs is measured apart and taken off.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use dsv4_kernels::device::unit::Image;
use dsv4_kernels::device::{DeviceError, Gpu, Graph, Kernel, Launch, Mark};
use dsv4_kernels::forward_gpu;

/// Marks in the recording that measures their cost.
const MARKS: u32 = 200;

/// A GPU behind which times are taken.
pub struct Watched {
    gpu: Arc<dyn Gpu>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    names: HashMap<Kernel, String>,
    /// Around the last recording that was replayed.
    replay: Option<(Mark, Mark)>,
    /// Around every launch, while a profile is made.
    launches: Option<Vec<(Kernel, Mark, Mark)>>,
}

/// Time of a kernel in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct KernelTime {
    /// Its name.
    pub name: String,
    /// Launches.
    pub count: u32,
    /// All of them together.
    pub seconds: f64,
}

impl Watched {
    /// Watches `gpu`.
    pub fn new(gpu: Arc<dyn Gpu>) -> Arc<Watched> {
        Arc::new(Watched { gpu, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// Seconds that the last recording took; none if none was replayed since this was asked.
    pub fn take_replay(&self) -> Result<Option<f64>, DeviceError> {
        let replay = self.state().replay.take();
        replay.map(|(from, to)| self.gpu.seconds_between(from, to)).transpose()
    }

    /// What two marks in a recording with nothing between them are apart.
    pub fn mark_seconds(&self) -> Result<f64, DeviceError> {
        if !self.gpu.begin_capture()? {
            return Ok(0.0);
        }
        let marks: Result<Vec<Mark>, DeviceError> = (0..=MARKS).map(|_| self.gpu.mark()).collect();
        let graph = self.gpu.end_capture()?;
        let marks = marks?;
        let mut least = f64::INFINITY;
        for _ in 0..5 {
            self.gpu.replay(graph)?;
            least = least.min(self.gpu.seconds_between(marks[0], marks[MARKS as usize])? / f64::from(MARKS));
        }
        self.gpu.forget_marks();
        Ok(least)
    }

    /// Marks every launch from here on, until [`Watched::end_profile`].
    pub fn begin_profile(&self) {
        self.state().launches = Some(Vec::new());
    }

    /// Times of all kernels launched since the profile began, longest first; each mark is taken for `mark_seconds`.
    /// A recording made meanwhile may have been replayed: the last time counts.
    pub fn profile(&self, mark_seconds: f64) -> Result<Vec<KernelTime>, DeviceError> {
        let state = self.state();
        let mut sums: BTreeMap<&str, (u32, f64)> = BTreeMap::new();
        for (kernel, from, to) in state.launches.iter().flatten() {
            let sum = sums.entry(state.names.get(kernel).map_or("?", String::as_str)).or_default();
            sum.0 += 1;
            sum.1 += (self.gpu.seconds_between(*from, *to)? - mark_seconds).max(0.0);
        }
        let list = sums.into_iter().map(|(name, (count, seconds))| KernelTime { name: name.into(), count, seconds });
        let mut list: Vec<KernelTime> = list.collect();
        list.sort_by(|a, b| b.seconds.total_cmp(&a.seconds));
        Ok(list)
    }

    /// Launches are marked no longer. What was recorded meanwhile must not be replayed any more.
    pub fn end_profile(&self) {
        let mut state = self.state();
        (state.launches, state.replay) = (None, None);
        self.gpu.forget_marks();
    }
}

impl Gpu for Watched {
    fn load(&self, image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        let loaded = self.gpu.load(image, kernels)?;
        let names = loaded.iter().zip(kernels).map(|(kernel, (name, _))| (*kernel, (*name).to_owned()));
        self.state().names.extend(names);
        Ok(loaded)
    }
    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        let mut state = self.state();
        let Some(launches) = &mut state.launches else {
            drop(state);
            return self.gpu.launch(kernel, shape, args);
        };
        let from = self.gpu.mark()?;
        self.gpu.launch(kernel, shape, args)?;
        launches.push((kernel, from, self.gpu.mark()?));
        Ok(())
    }
    fn replay(&self, graph: Graph) -> Result<(), DeviceError> {
        let from = self.gpu.mark()?;
        self.gpu.replay(graph)?;
        let to = self.gpu.mark()?;
        self.state().replay = Some((from, to));
        Ok(())
    }
    forward_gpu! {
        facts alloc free write read fill copy allow_overlap set_overlap overlaps sync begin_capture end_capture
        abort_capture forget_graph mark seconds_between forget_marks memory host send is_sent
    }
}
