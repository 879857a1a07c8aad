//! The GPU behind one trait, and all `unsafe` of this crate.
//!
//! [`Gpu`] is memory, modules and launches. It has two forms: the CUDA driver (`cuda`), and an emulator
//! that runs the same kernel sources on the CPU ([`emulated`]), so that their logic is tested where there is
//! no GPU. [`unit`] is what is compiled, `nvrtc` compiles it without a GPU, [`args`] writes argument
//! structs for both sides.

pub mod args;
mod cubin;
pub mod cuda;
pub mod emulated;
pub mod error;
mod forward;
pub mod host;
pub mod nvrtc;
pub mod rows;
#[cfg(test)]
pub mod testing;
pub mod unit;

use std::sync::Arc;

pub use args::{In, KernelArgs, Out};
pub use error::DeviceError;
pub use host::HostMemory;

/// What a GPU is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// As its driver names it.
    pub name: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Compute capability, major and minor; (0, 0) for the emulator.
    pub capability: (u32, u32),
    /// All of its memory, bytes.
    pub memory_bytes: u64,
    /// Its L2 cache, bytes.
    pub l2_bytes: u64,
    /// Shared memory of a multiprocessor, bytes.
    pub shared_bytes: u32,
    /// Version of CUDA that its driver is for, as that counts: 13000 for 13.0; 0 for the emulator.
    pub driver: i32,
}

impl Facts {
    /// What its kernels are compiled for, as compilers name it: `sm_121a`.
    pub fn arch(&self) -> String {
        let (major, minor) = self.capability;
        // What only one architecture has came with 9.0.
        let own = if (1..9).contains(&major) { "" } else { "a" };
        format!("sm_{major}{minor}{own}")
    }
}

/// Memory of a GPU, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// All of it.
    pub total: u64,
    /// What its driver calls free; of little worth where it is unified.
    pub free: u64,
    /// It is the machine's memory, and programs and the page cache live in it too.
    pub unified: bool,
}

/// Shape of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory of a block, bytes.
    pub shared: u32,
}

impl Launch {
    /// `blocks` blocks in a row.
    pub fn row(blocks: u32, threads: u32) -> Launch {
        Launch { grid: [blocks, 1, 1], threads, shared: 0 }
    }
}

/// A loaded kernel; lives as long as its GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel(pub(crate) usize);

/// A recorded sequence of launches; lives until it is forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph(pub(crate) usize);

/// A moment in the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub(crate) usize);

/// Memory, modules and launches, in the order of one stream.
pub trait Gpu: Send + Sync {
    /// What it is.
    fn facts(&self) -> &Facts;
    /// Reserves memory, aligned to 256 bytes. Errors: none left.
    fn alloc(&self, bytes: u64) -> Result<u64, DeviceError>;
    /// Gives memory back.
    fn free(&self, at: u64);
    /// Copies to the device; returns when `bytes` may be reused.
    fn write(&self, at: u64, bytes: &[u8]) -> Result<(), DeviceError>;
    /// Copies from the device, after everything launched so far.
    fn read(&self, at: u64, out: &mut [u8]) -> Result<(), DeviceError>;
    /// Sets bytes.
    fn fill(&self, at: u64, byte: u8, bytes: u64) -> Result<(), DeviceError>;
    /// Copies within the device.
    fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), DeviceError>;
    /// Loads a compiled unit and finds its kernels by name, with the dynamic shared memory each may ask for.
    fn load(&self, image: &unit::Image, kernels: &[(&str, u32)]) -> Result<Vec<Kernel>, DeviceError>;
    /// Lets kernels start before the one ahead of them in the stream has ended: each waits for it by itself
    /// ([`unit::Unit::waits`]).
    fn allow_overlap(&self, _kernels: &[Kernel]) {}
    /// Whether kernels that may start early do so from now on: they do unless this says otherwise.
    fn set_overlap(&self, _on: bool) {}
    /// Whether they do.
    fn overlaps(&self) -> bool {
        true
    }
    /// Puts a launch into the stream.
    fn launch(&self, kernel: Kernel, shape: Launch, args: &[u8]) -> Result<(), DeviceError>;
    /// Waits for everything launched so far. Errors: what went wrong in a kernel.
    fn sync(&self) -> Result<(), DeviceError>;
    /// Records the launches from here on instead of running them; false where nothing can be recorded. Until it has
    /// ended nothing but launches and marks is possible.
    fn begin_capture(&self) -> Result<bool, DeviceError>;
    /// Ends recording.
    fn end_capture(&self) -> Result<Graph, DeviceError>;
    /// Ends recording and forgets what was recorded, also where that went wrong.
    fn abort_capture(&self) -> Result<(), DeviceError>;
    /// Runs a recording.
    fn replay(&self, graph: Graph) -> Result<(), DeviceError>;
    /// Forgets a recording, which is not replayed after this; one that is running is run to its end.
    fn forget_graph(&self, graph: Graph) -> Result<(), DeviceError>;
    /// Marks this moment in the stream.
    fn mark(&self) -> Result<Mark, DeviceError>;
    /// Time between two marks; waits for everything launched so far.
    fn seconds_between(&self, from: Mark, to: Mark) -> Result<f64, DeviceError>;
    /// Marks made so far mean nothing from here on; nor does a recording that has some in it.
    fn forget_marks(&self) {}
    /// How much memory there is now.
    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let total = self.facts().memory_bytes;
        Ok(DeviceMemory { total, free: total, unified: false })
    }
    /// Host memory of `bytes` bytes that [`Gpu::send`] copies from. Errors: none left, or none may be pinned.
    fn host(&self, bytes: usize) -> Result<HostMemory, DeviceError> {
        HostMemory::plain(bytes)
    }
    /// Starts copying the first `len` bytes of `from` to the device; they stay as they are until it
    /// [is done](Gpu::is_sent). `from` is of this GPU's [`Gpu::host`].
    fn send(&self, from: &HostMemory, len: usize, to: u64) -> Result<(), DeviceError> {
        self.write(to, &from[..len])
    }
    /// Whether the last copy from `from` is done; with `wait`, once it is. Errors: it failed.
    fn is_sent(&self, from: &HostMemory, wait: bool) -> Result<bool, DeviceError> {
        let _done_when_sent = (from, wait);
        Ok(true)
    }
}

/// Device memory that is given back when dropped.
pub struct Buffer {
    gpu: Arc<dyn Gpu>,
    at: u64,
    bytes: u64,
}

impl Buffer {
    /// Reserves `bytes` (at least one). Errors: none left.
    pub fn new(gpu: &Arc<dyn Gpu>, bytes: u64) -> Result<Buffer, DeviceError> {
        Ok(Buffer { gpu: Arc::clone(gpu), at: gpu.alloc(bytes.max(1))?, bytes: bytes.max(1) })
    }

    /// A buffer with `values` in it.
    pub fn of<T: bytemuck::Pod>(gpu: &Arc<dyn Gpu>, values: &[T]) -> Result<Buffer, DeviceError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let buffer = Buffer::new(gpu, bytes.len() as u64)?;
        gpu.write(buffer.at, bytes)?;
        Ok(buffer)
    }

    /// Its address.
    pub fn at(&self) -> u64 {
        self.at
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Its content as values.
    pub fn values<T: bytemuck::Pod>(&self) -> Result<Vec<T>, DeviceError> {
        let mut out = vec![T::zeroed(); self.bytes as usize / size_of::<T>()];
        self.gpu.read(self.at, bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.gpu.free(self.at);
    }
}
