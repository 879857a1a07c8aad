//! Kernels on the CPU: the same sources, compiled by the C++ compiler, every thread a fiber.
//!
//! Slow and without a memory model; it tells whether a kernel computes what it should. A launch runs to its
//! end before it returns, unless it is recorded. Device addresses are addresses of this process.
#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ffi::{c_int, c_ulong, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use libloading::Library;

use crate::device::unit::{EMULATE, Image, Unit};
use crate::device::{DeviceError, Facts, Gpu, Graph, Kernel, Launch, Mark};

type Entry = unsafe extern "C" fn(*const c_void, *const u32, u32, c_ulong, u32) -> c_int;

/// What a kernel writes past its buffers is looked for in this many bytes behind each.
const GUARD_BYTES: usize = 256;
const GUARD: u8 = 0xa5;
const ALIGN: usize = 256;

/// The emulator.
pub struct Emulated {
    facts: Facts,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    memory: HashMap<u64, Layout>,
    /// Kept open as long as their kernels may run.
    libraries: Vec<Library>,
    kernels: Vec<(String, Entry)>,
    marks: Vec<Instant>,
    /// Launches of the recording that was begun.
    recording: Option<Vec<Recorded>>,
    /// Nothing where one was forgotten.
    graphs: Vec<Option<Arc<[Recorded]>>>,
}

/// A launch of a graph.
struct Recorded {
    kernel: Kernel,
    shape: Launch,
    args: Vec<u8>,
}

impl Emulated {
    /// An emulated GPU, as small as is allowed.
    pub fn open() -> Arc<dyn Gpu> {
        let facts = Facts {
            name: "emulated on the CPU".into(),
            multiprocessors: 4,
            capability: (0, 0),
            memory_bytes: 4 << 30,
            l2_bytes: 24 << 20,
            shared_bytes: 100 << 10,
            driver: 0,
        };
        Arc::new(Emulated { facts, state: Mutex::default() })
    }

    /// Whether this machine can emulate: x86-64 with a C++ compiler.
    pub fn is_possible() -> bool {
        cfg!(target_arch = "x86_64") && Command::new("c++").arg("--version").output().is_ok_and(|o| o.status.success())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// As in the driver, nothing but launches may happen between the ends of a recording.
    fn refuse_recording(&self, call: &'static str) -> Result<(), DeviceError> {
        match self.state().recording {
            None => Ok(()),
            Some(_) => Err(misused(call, "launches are being recorded")),
        }
    }

    fn run(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        let (name, entry) = self.state().kernels[kernel.0].clone();
        // Aligned as the struct wants it.
        let mut aligned = vec![0u64; args.len().div_ceil(8)];
        bytemuck::cast_slice_mut::<u64, u8>(&mut aligned)[..args.len()].copy_from_slice(args);
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        // SAFETY: the arguments are those of this kernel, its buffers live; the library is open.
        let code = unsafe {
            entry(aligned.as_ptr().cast(), shape.grid.as_ptr(), shape.threads, c_ulong::from(shape.shared), workers)
        };
        if code != 0 {
            let reason = format!("kernel {name} with {shape:?} failed");
            return Err(DeviceError::Driver { call: "launch", reason, help: "see the line above" });
        }
        Ok(())
    }
}

fn misused(call: &'static str, reason: &str) -> DeviceError {
    DeviceError::Driver { call, reason: reason.into(), help: "this is a fault of this program; report it" }
}

/// Compiles a unit for the emulator into `dir`, once for each text.
///
/// Errors: [`DeviceError::Compile`], [`DeviceError::NoCompiler`].
pub fn compile(unit: &Unit, dir: &Path) -> Result<Image, DeviceError> {
    let failed = |log: String| DeviceError::Compile { unit: unit.family.into(), target: "the emulator".into(), log };
    let text = unit.text();
    let flags = flags();
    let key = fnv(text.as_bytes()) ^ fnv(EMULATE.1.as_bytes()).rotate_left(32) ^ fnv(flags.join(" ").as_bytes());
    let key = format!("{key:016x}");
    let library = dir.join(format!("{}-{key}.so", unit.family));
    if library.is_file() {
        return Ok(Image::Library(library));
    }
    std::fs::create_dir_all(dir).map_err(|e| failed(e.to_string()))?;
    // Several tests may compile the same: each its own files, the last rename wins.
    static COMPILED: AtomicU32 = AtomicU32::new(0);
    let nth = COMPILED.fetch_add(1, Ordering::Relaxed);
    let unique = format!("{}-{key}-{}-{nth}", unit.family, std::process::id());
    let scratch: PathBuf = dir.join(&unique);
    std::fs::create_dir_all(&scratch).map_err(|e| failed(e.to_string()))?;
    let source = scratch.join("unit.cpp");
    let write = |path: &Path, text: &str| std::fs::write(path, text).map_err(|e| failed(e.to_string()));
    write(&source, &text)?;
    write(&scratch.join(EMULATE.0), EMULATE.1)?;
    let built = scratch.join("unit.so");
    let output =
        Command::new("c++").args(flags).arg("-o").arg(&built).arg(&source).output().map_err(|_| {
            DeviceError::NoCompiler { what: "a C++ compiler", place: "c++".into(), help: "install g++" }
        })?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    std::fs::rename(&built, &library).map_err(|e| failed(e.to_string()))?;
    let _ = std::fs::remove_dir_all(&scratch);
    Ok(Image::Library(library))
}

/// Options of the compiler. No instruction set changes a result: nothing is contracted.
fn flags() -> Vec<&'static str> {
    let portable = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-w", "-DDSV4_EMULATED"];
    #[cfg(target_arch = "x86_64")]
    let wide = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c");
    #[cfg(not(target_arch = "x86_64"))]
    let wide = false;
    let of_this_machine: &[&str] = if wide { &["-mavx2", "-mf16c"] } else { &[] };
    [&portable, of_this_machine].concat()
}

/// Only names files of a cache that is thrown away.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

fn layout(bytes: u64) -> Layout {
    Layout::from_size_align(bytes as usize + GUARD_BYTES, ALIGN).expect("a size that fits the address space")
}

impl Gpu for Emulated {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn alloc(&self, bytes: u64) -> Result<u64, DeviceError> {
        let layout = layout(bytes);
        // SAFETY: the size is not zero.
        let at = unsafe { alloc_zeroed(layout) };
        if at.is_null() {
            return Err(DeviceError::Memory { bytes, reason: "the allocator refuses".into() });
        }
        // SAFETY: all of it is ours. Fresh device memory is NaN, so that what was never written shows.
        unsafe {
            at.write_bytes(0xff, bytes as usize);
            at.add(bytes as usize).write_bytes(GUARD, GUARD_BYTES);
        }
        let at = at as u64;
        self.state().memory.insert(at, layout);
        Ok(at)
    }

    fn free(&self, at: u64) {
        let Some(layout) = self.state().memory.remove(&at) else { return };
        // SAFETY: it came from `alloc` with this layout and is freed once.
        unsafe {
            let end = (at as *const u8).add(layout.size() - GUARD_BYTES);
            let whole = std::slice::from_raw_parts(end, GUARD_BYTES).iter().all(|b| *b == GUARD);
            dealloc(at as *mut u8, layout);
            assert!(
                whole || std::thread::panicking(),
                "a kernel wrote past a buffer of {} bytes",
                layout.size() - GUARD_BYTES
            );
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.refuse_recording("write")?;
        // SAFETY: callers write inside buffers they hold; launches have ended.
        unsafe { (at as *mut u8).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.refuse_recording("read")?;
        // SAFETY: callers read inside buffers they hold; launches have ended.
        unsafe { out.as_mut_ptr().copy_from_nonoverlapping(at as *const u8, out.len()) };
        Ok(())
    }

    fn fill(&self, at: u64, byte: u8, bytes: u64) -> Result<(), DeviceError> {
        self.refuse_recording("fill")?;
        // SAFETY: callers fill inside buffers they hold; launches have ended.
        unsafe { (at as *mut u8).write_bytes(byte, bytes as usize) };
        Ok(())
    }

    fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), DeviceError> {
        self.refuse_recording("copy")?;
        // SAFETY: callers copy between buffers they hold; launches have ended.
        unsafe { (to as *mut u8).copy_from(from as *const u8, bytes as usize) };
        Ok(())
    }

    fn load(&self, image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        let Image::Library(path) = image else {
            return Err(DeviceError::NoKernel { kernel: "any".into(), unit: "a cubin, in the emulator".into() });
        };
        let missing = |kernel: &str| DeviceError::NoKernel { kernel: kernel.into(), unit: path.display().to_string() };
        // SAFETY: the library is one that `compile` made: it has no initialisers.
        let library = unsafe { Library::new(path) }.map_err(|_| missing("any"))?;
        let mut state = self.state();
        let mut out = Vec::new();
        for (name, _) in kernels {
            // SAFETY: KERNEL gives every entry this type.
            let entry: Entry = *unsafe { library.get::<Entry>(name.as_bytes()) }.map_err(|_| missing(name))?;
            out.push(Kernel(state.kernels.len()));
            state.kernels.push(((*name).to_owned(), entry));
        }
        state.libraries.push(library);
        Ok(out)
    }

    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        if let Some(recording) = &mut self.state().recording {
            recording.push(Recorded { kernel, shape, args: args.to_vec() });
            return Ok(());
        }
        self.run(kernel, shape, args)
    }

    fn sync(&self) -> Result<(), DeviceError> {
        self.refuse_recording("sync")
    }

    fn begin_capture(&self) -> Result<bool, DeviceError> {
        self.refuse_recording("begin_capture")?;
        self.state().recording = Some(Vec::new());
        Ok(true)
    }

    fn end_capture(&self) -> Result<Graph, DeviceError> {
        let mut state = self.state();
        let launches = state.recording.take().ok_or_else(|| misused("end_capture", "nothing is being recorded"))?;
        state.graphs.push(Some(launches.into()));
        Ok(Graph(state.graphs.len() - 1))
    }

    fn abort_capture(&self) -> Result<(), DeviceError> {
        let recorded = self.state().recording.take();
        recorded.map(|_| ()).ok_or_else(|| misused("abort_capture", "nothing is being recorded"))
    }

    fn replay(&self, graph: Graph) -> Result<(), DeviceError> {
        self.refuse_recording("replay")?;
        let launches = self.state().graphs[graph.0].clone();
        let launches = launches.ok_or_else(|| misused("replay", "the recording is forgotten"))?;
        launches.iter().try_for_each(|l| self.run(l.kernel, l.shape, &l.args))
    }

    fn forget_graph(&self, graph: Graph) -> Result<(), DeviceError> {
        let forgotten = self.state().graphs[graph.0].take();
        forgotten.map(|_| ()).ok_or_else(|| misused("forget_graph", "the recording is forgotten already"))
    }

    fn mark(&self) -> Result<Mark, DeviceError> {
        let mut state = self.state();
        state.marks.push(Instant::now());
        Ok(Mark(state.marks.len() - 1))
    }

    fn forget_marks(&self) {
        self.state().marks.clear();
    }

    fn seconds_between(&self, from: Mark, to: Mark) -> Result<f64, DeviceError> {
        let state = self.state();
        Ok((state.marks[to.0] - state.marks[from.0]).as_secs_f64())
    }
}
