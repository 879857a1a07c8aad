//! The CUDA driver: memory, cubins, launches on one stream, graphs, times.
//!
//! The driver is opened at run time, so this builds and starts anywhere. Its calls are made from any thread;
//! the context is made current first. Nothing here synchronises but [`Gpu::read`] and [`Gpu::sync`].
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUdevice_attribute_enum as Attribute, CUfunction_attribute_enum as FunctionAttribute, CUresult,
};

use crate::device::args::ARGS_BYTES_MAX;
use crate::device::unit::Image;
use crate::device::{DeviceError, DeviceMemory, Facts, Gpu, Graph, HostMemory, Kernel, Launch, Mark, cubin};

/// The oldest driver whose cubin loader knows what NVRTC 13 writes (CUDA 13.0).
const DRIVER_MIN: i32 = 13_000;
/// Shared memory that a kernel has without asking, bytes.
const SHARED_PLAIN: u32 = 48 << 10;
/// As much of a multiprocessor's L1 cache as can be is shared memory, for every kernel: kernels that ask for different
/// parts do not run side by side.
const CARVEOUT_MAX: i32 = 100;

/// One GPU and one stream on it.
pub struct Cuda {
    facts: Facts,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    handles: Mutex<Handles>,
    /// Kernels that wait by themselves start early.
    overlap: AtomicBool,
}

#[derive(Default)]
struct Handles {
    modules: Vec<sys::CUmodule>,
    kernels: Vec<sys::CUfunction>,
    /// Those that wait by themselves for what is ahead of them.
    early: HashSet<Kernel>,
    /// Nothing where one was forgotten.
    graphs: Vec<Option<sys::CUgraphExec>>,
    events: Vec<sys::CUevent>,
    /// How many of the events are marks; the rest were.
    marks: usize,
    /// Launches are being recorded.
    recording: bool,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; every call here makes
// it so first.
unsafe impl Send for Cuda {}
// SAFETY: as above; our own lists are behind a mutex.
unsafe impl Sync for Cuda {}

fn failed(call: &'static str) -> impl Fn(DriverError) -> DeviceError {
    move |e| {
        let name = e.error_name().map_or("unknown error".into(), |n| n.to_string_lossy().into_owned());
        let help = match e.0 {
            CUresult::CUDA_ERROR_STUB_LIBRARY => "libcuda.so is a toolkit's stub: take its folder off the library path",
            CUresult::CUDA_ERROR_NO_DEVICE => "no GPU is visible: check nvidia-smi and CUDA_VISIBLE_DEVICES",
            CUresult::CUDA_ERROR_ILLEGAL_ADDRESS | CUresult::CUDA_ERROR_LAUNCH_FAILED => {
                "a kernel failed: this is a fault of this program; report it with the command line"
            }
            _ => "see dmesg and nvidia-smi",
        };
        DeviceError::Driver { call, reason: name, help }
    }
}

fn misused(call: &'static str, reason: &str) -> DeviceError {
    DeviceError::Driver { call, reason: reason.into(), help: "this is a fault of this program; report it" }
}

/// Starts the driver; how many GPUs it shows, and its version.
fn init(ordinal: u32) -> Result<(u32, i32), DeviceError> {
    // SAFETY: only looks whether the library is there.
    if !unsafe { sys::is_culib_present() } {
        return Err(DeviceError::NoDriver);
    }
    let mut version = 0;
    // SAFETY: writes one integer; needs no driver that was started.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
    if version < DRIVER_MIN {
        let text = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(DeviceError::OldDriver { expected: text(DRIVER_MIN), found: text(version) });
    }
    match result::init() {
        Err(e) if e.0 == CUresult::CUDA_ERROR_NO_DEVICE => {
            return Err(DeviceError::NoGpu { ordinal, found: "none that the driver sees".into() });
        }
        other => other.map_err(failed("cuInit"))?,
    }
    let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
    Ok((u32::try_from(count).unwrap_or(0), version))
}

impl Cuda {
    /// How many GPUs there are. Errors: [`DeviceError::NoDriver`], a driver that is too old, none.
    pub fn count() -> Result<u32, DeviceError> {
        Ok(init(0)?.0)
    }

    /// The GPU of number `ordinal`.
    ///
    /// Errors: [`DeviceError::NoDriver`], a driver that is too old, no such GPU.
    pub fn open(ordinal: u32) -> Result<Arc<dyn Gpu>, DeviceError> {
        let (count, driver) = init(ordinal)?;
        if ordinal >= count {
            let found = format!("{count} GPUs, numbered from 0");
            return Err(DeviceError::NoGpu { ordinal, found });
        }
        let device = result::device::get(ordinal as i32).map_err(failed("cuDeviceGet"))?;
        let attribute = |which| {
            // SAFETY: the device is valid.
            unsafe { result::device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"))
        };
        let facts = Facts {
            name: result::device::get_name(device).map_err(failed("cuDeviceGetName"))?,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            capability: (
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
                attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
            ),
            // SAFETY: the device is valid.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("cuDeviceTotalMem"))? as u64,
            l2_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)? as u64,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as u32,
            driver,
        };
        // SAFETY: the device is valid; the context is released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context is retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        let overlap = AtomicBool::new(true);
        Ok(Arc::new(Cuda { facts, device, context, stream, handles: Mutex::default(), overlap }))
    }

    fn handles(&self) -> MutexGuard<'_, Handles> {
        self.handles.lock().unwrap_or_else(|p| p.into_inner())
    }

    /// The driver would spoil the recording, or keep addresses of what is copied in it.
    fn refuse_recording(&self, call: &'static str) -> Result<(), DeviceError> {
        match self.handles().recording {
            false => Ok(()),
            true => Err(misused(call, "not while launches are recorded")),
        }
    }

    fn enter(&self) -> Result<(), DeviceError> {
        // SAFETY: the context is retained until drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }
}

impl Gpu for Cuda {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn alloc(&self, bytes: u64) -> Result<u64, DeviceError> {
        self.enter()?;
        // SAFETY: nothing is read before it is written.
        unsafe { result::malloc_sync(bytes as usize) }.map_err(|e| DeviceError::Memory { bytes, reason: e.to_string() })
    }

    fn free(&self, at: u64) {
        if self.enter().is_ok() {
            // SAFETY: `at` came from `alloc` and is freed once; the driver waits for what still uses it.
            let _ = unsafe { result::free_sync(at) };
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError> {
        self.refuse_recording("write")?;
        self.enter()?;
        // SAFETY: pageable memory is staged before the call returns.
        unsafe { result::memcpy_htod_async(at, bytes, self.stream) }.map_err(failed("cuMemcpyHtoDAsync"))
    }

    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        self.refuse_recording("read")?;
        self.enter()?;
        // SAFETY: `out` outlives the copy, which has ended after the synchronisation.
        unsafe { result::memcpy_dtoh_async(out, at, self.stream) }.map_err(failed("cuMemcpyDtoHAsync"))?;
        self.sync()
    }

    fn fill(&self, at: u64, byte: u8, bytes: u64) -> Result<(), DeviceError> {
        self.refuse_recording("fill")?;
        self.enter()?;
        // SAFETY: callers fill inside buffers they hold.
        unsafe { result::memset_d8_async(at, byte, bytes as usize, self.stream) }.map_err(failed("cuMemsetD8Async"))
    }

    fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), DeviceError> {
        self.refuse_recording("copy")?;
        self.enter()?;
        // SAFETY: callers copy between buffers they hold, in the order of the stream.
        unsafe { result::memcpy_dtod_async(to, from, bytes as usize, self.stream) }.map_err(failed("cuMemcpyDtoDAsync"))
    }

    fn load(&self, image: &Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError> {
        self.enter()?;
        let Image::Cubin(bytes) = image else {
            return Err(DeviceError::NoKernel { kernel: "any".into(), unit: "a library of the emulator".into() });
        };
        // The driver gets no length, and takes what is no ELF file for a text to be compiled.
        if !cubin::is_whole(bytes) {
            return Err(DeviceError::NoKernel { kernel: "any".into(), unit: "what is no whole ELF file".into() });
        }
        // SAFETY: a whole ELF file; the driver copies it.
        let loaded = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
        let module = loaded.map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU | CUresult::CUDA_ERROR_INVALID_IMAGE => {
                DeviceError::NoKernel { kernel: "any for this GPU".into(), unit: "cubin".into() }
            }
            _ => failed("cuModuleLoadData")(e),
        })?;
        let mut handles = self.handles();
        handles.modules.push(module);
        let mut out = Vec::with_capacity(kernels.len());
        for (name, shared) in kernels {
            let missing = |_| DeviceError::NoKernel { kernel: (*name).into(), unit: "cubin".into() };
            let c_name = CString::new(*name)
                .map_err(|_| DeviceError::NoKernel { kernel: (*name).into(), unit: "cubin".into() })?;
            // SAFETY: the module is loaded until drop.
            let function = unsafe { result::module::get_function(module, c_name) }.map_err(missing)?;
            let set = |which, value| {
                // SAFETY: the function is loaded.
                unsafe { result::function::set_function_attribute(function, which, value) }
                    .map_err(failed("cuFuncSetAttribute"))
            };
            set(FunctionAttribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, CARVEOUT_MAX)?;
            if *shared > SHARED_PLAIN {
                set(FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, *shared as i32)?;
            }
            out.push(Kernel(handles.kernels.len()));
            handles.kernels.push(function);
        }
        Ok(out)
    }

    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        self.enter()?;
        let (function, early) = {
            let handles = self.handles();
            (handles.kernels[kernel.0], handles.early.contains(&kernel))
        };
        // At the alignment of any struct.
        let mut aligned = [0u128; ARGS_BYTES_MAX / 16];
        bytemuck::cast_slice_mut::<u128, u8>(&mut aligned)[..args.len()].copy_from_slice(args);
        let mut params = [aligned.as_mut_ptr().cast::<c_void>()];
        let [x, y, z] = shape.grid;
        // In a recording this makes the edge from the kernel ahead a programmatic one.
        let early = early && self.overlaps();
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: i32::from(early) },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: shape.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared,
            hStream: self.stream,
            attrs: &mut attribute,
            numAttrs: u32::from(early),
        };
        // SAFETY: the driver copies the one argument, a struct of the kernel's own definition, and the configuration
        // before it returns; the buffers it names are held by whoever built it until the stream is done with them. A
        // kernel that may start early waits by itself before it touches what earlier ones write.
        unsafe { sys::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed("cuLaunchKernelEx"))
    }

    fn allow_overlap(&self, kernels: &[Kernel]) {
        self.handles().early.extend(kernels);
    }

    fn set_overlap(&self, on: bool) {
        self.overlap.store(on, Ordering::Relaxed);
    }

    fn overlaps(&self) -> bool {
        self.overlap.load(Ordering::Relaxed)
    }

    fn sync(&self) -> Result<(), DeviceError> {
        self.refuse_recording("sync")?;
        self.enter()?;
        // SAFETY: the stream lives until drop.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("cuStreamSynchronize"))
    }

    fn begin_capture(&self) -> Result<bool, DeviceError> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode_enum::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives until drop.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("cuStreamBeginCapture"))?;
        self.handles().recording = true;
        Ok(true)
    }

    fn end_capture(&self) -> Result<Graph, DeviceError> {
        self.enter()?;
        self.handles().recording = false;
        // SAFETY: a capture was begun on this stream.
        let graph = unsafe { result::stream::end_capture(self.stream) }.map_err(failed("cuStreamEndCapture"))?;
        // SAFETY: the graph is whole; what is instantiated no longer needs it.
        let ready = unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) };
        // SAFETY: as above.
        let _ = unsafe { result::graph::destroy(graph) };
        let mut handles = self.handles();
        handles.graphs.push(Some(ready.map_err(failed("cuGraphInstantiate"))?));
        Ok(Graph(handles.graphs.len() - 1))
    }

    fn abort_capture(&self) -> Result<(), DeviceError> {
        self.enter()?;
        self.handles().recording = false;
        // SAFETY: a capture was begun on this stream.
        match unsafe { result::stream::end_capture(self.stream) } {
            // SAFETY: the graph is whole, and nothing came of it.
            Ok(graph) => unsafe { result::graph::destroy(graph) }.map_err(failed("cuGraphDestroy")),
            // What was not to be recorded ended it before: that is forgotten with it.
            Err(e) if e.0 == CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED => Ok(()),
            Err(e) => Err(failed("cuStreamEndCapture")(e)),
        }
    }

    fn replay(&self, graph: Graph) -> Result<(), DeviceError> {
        self.refuse_recording("replay")?;
        self.enter()?;
        let ready = self.handles().graphs[graph.0].ok_or_else(|| misused("replay", "the recording is forgotten"))?;
        // SAFETY: instantiated and kept until drop; its buffers are those of the step, which live as long.
        unsafe { result::graph::launch(ready, self.stream) }.map_err(failed("cuGraphLaunch"))
    }

    fn forget_graph(&self, graph: Graph) -> Result<(), DeviceError> {
        self.enter()?;
        let ready = self.handles().graphs[graph.0].take();
        let ready = ready.ok_or_else(|| misused("forget_graph", "the recording is forgotten already"))?;
        // SAFETY: destroyed once; the driver lets a replay that is under way come to its end.
        unsafe { result::graph::exec_destroy(ready) }.map_err(failed("cuGraphExecDestroy"))
    }

    fn mark(&self) -> Result<Mark, DeviceError> {
        self.enter()?;
        let mut handles = self.handles();
        if handles.marks == handles.events.len() {
            let event =
                result::event::create(sys::CUevent_flags_enum::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"))?;
            handles.events.push(event);
        }
        let event = handles.events[handles.marks];
        // In a recording the event is recorded whenever that is replayed, and not an edge between its launches.
        let flags = match handles.recording {
            true => sys::CUevent_record_flags_enum::CU_EVENT_RECORD_EXTERNAL,
            false => sys::CUevent_record_flags_enum::CU_EVENT_RECORD_DEFAULT,
        };
        // SAFETY: event and stream live until drop.
        unsafe { sys::cuEventRecordWithFlags(event, self.stream, flags as u32) }
            .result()
            .map_err(failed("cuEventRecordWithFlags"))?;
        handles.marks += 1;
        Ok(Mark(handles.marks - 1))
    }

    fn seconds_between(&self, from: Mark, to: Mark) -> Result<f64, DeviceError> {
        self.sync()?;
        let handles = self.handles();
        // SAFETY: both events are kept until drop and were recorded.
        let ms = unsafe { result::event::elapsed(handles.events[from.0], handles.events[to.0]) };
        Ok(f64::from(ms.map_err(failed("cuEventElapsedTime"))?) / 1e3)
    }

    fn forget_marks(&self) {
        self.handles().marks = 0;
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        // SAFETY: the device is valid.
        let integrated =
            unsafe { result::device::get_attribute(self.device, Attribute::CU_DEVICE_ATTRIBUTE_INTEGRATED) };
        let unified = integrated.map_err(failed("cuDeviceGetAttribute"))? != 0;
        Ok(DeviceMemory { total: total as u64, free: free as u64, unified })
    }

    fn host(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        let memory = HostMemory::plain(bytes)?;
        let pin = Pin::new(self.device, self.context, &memory)?;
        Ok(memory.pinned(pin))
    }

    fn send(&self, from: &HostMemory, len: usize, to: u64) -> Result<(), DeviceError> {
        let Some(pin) = from.pin() else { return self.write(to, &from[..len]) };
        self.refuse_recording("send")?;
        self.enter()?;
        // SAFETY: the memory is pinned, and its owner leaves it as it is until `is_sent`; dropping it waits.
        unsafe { result::memcpy_htod_async(to, &from[..len], self.stream) }.map_err(failed("cuMemcpyHtoDAsync"))?;
        // SAFETY: the event lives as long as the memory.
        unsafe { result::event::record(pin.event, self.stream) }.or_else(|e| {
            // Nothing would say when the copy is done: it is, after this.
            self.sync()?;
            Err(failed("cuEventRecord")(e))
        })
    }

    fn is_sent(&self, from: &HostMemory, wait: bool) -> Result<bool, DeviceError> {
        let Some(pin) = from.pin() else { return Ok(true) };
        self.enter()?;
        pin.is_passed(wait)
    }
}

/// The driver's side of [`HostMemory`]: pinned, with an event behind the last copy from it.
pub struct Pin {
    at: *mut c_void,
    device: sys::CUdevice,
    context: sys::CUcontext,
    event: sys::CUevent,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs.
unsafe impl Send for Pin {}

impl Pin {
    /// Pins `memory`, which has to outlive it.
    fn new(device: sys::CUdevice, context: sys::CUcontext, memory: &HostMemory) -> Result<Pin, DeviceError> {
        let refused = |e: DriverError| DeviceError::HostMemory { bytes: memory.len() as u64, reason: e.to_string() };
        // A context of its own: the memory may outlive whoever made it.
        // SAFETY: the device is valid; released on drop.
        unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let mut pin = Pin { at: std::ptr::null_mut(), device, context, event: std::ptr::null_mut() };
        // SAFETY: retained above.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        pin.event =
            result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING).map_err(failed("cuEventCreate"))?;
        let at: *mut c_void = memory.as_ptr().cast_mut().cast();
        // SAFETY: the memory is the caller's, at a page boundary, and pinned once.
        unsafe { sys::cuMemHostRegister_v2(at, memory.len(), sys::CU_MEMHOSTREGISTER_PORTABLE) }
            .result()
            .map_err(refused)?;
        pin.at = at;
        Ok(pin)
    }

    fn is_passed(&self, wait: bool) -> Result<bool, DeviceError> {
        // SAFETY: the event lives until drop; one that was never recorded has passed.
        match unsafe { if wait { result::event::synchronize(self.event) } else { result::event::query(self.event) } } {
            Ok(()) => Ok(true),
            Err(e) if e.0 == CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(e) => Err(failed("cuEventQuery")(e)),
        }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        // SAFETY: everything is given back once, after the last copy is done; errors have nowhere to go.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            if !self.event.is_null() {
                let _ = result::event::synchronize(self.event);
                let _ = result::event::destroy(self.event);
            }
            if !self.at.is_null() {
                let _ = sys::cuMemHostUnregister(self.at);
            }
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        let handles = std::mem::take(&mut *self.handles());
        // SAFETY: everything is freed once, after the stream is done with it; errors have nowhere to go.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for graph in handles.graphs.into_iter().flatten() {
                let _ = result::graph::exec_destroy(graph);
            }
            for event in handles.events {
                let _ = result::event::destroy(event);
            }
            for module in handles.modules {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = sys::cuDevicePrimaryCtxRelease_v2(self.device);
        }
    }
}
