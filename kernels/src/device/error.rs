//! What can go wrong with a GPU, its driver or the compiler of kernels.

use std::path::PathBuf;

/// Each is "device or memory" (exit code 4) to the binaries, but [`DeviceError::NoKernel`]: that is of the artifact (3).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// No driver on this machine.
    #[error(
        "no CUDA driver (libcuda.so.1) on this machine: expected one, found none\n  help: install the NVIDIA driver, or run with --backend cpu"
    )]
    NoDriver,
    /// A driver that does not know what the kernels are compiled with.
    #[error(
        "CUDA driver: expected one for CUDA {expected}, found one for CUDA {found}\n  help: install NVIDIA driver 580 or newer, or run with --backend cpu"
    )]
    OldDriver {
        /// The oldest that will do.
        expected: String,
        /// What it supports.
        found: String,
    },
    /// No such GPU.
    #[error(
        "GPU {ordinal}: expected a GPU of this number, found {found}\n  help: check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --backend cpu"
    )]
    NoGpu {
        /// Which was asked for, from 0.
        ordinal: u32,
        /// How many there are, or why none is seen.
        found: String,
    },
    /// A call of the driver failed.
    #[error("GPU: {call}: {reason}\n  help: {help}")]
    Driver {
        /// Which call.
        call: &'static str,
        /// What the driver says.
        reason: String,
        /// What to do.
        help: &'static str,
    },
    /// Device memory is used up.
    #[error(
        "{bytes} bytes of GPU memory are not available: {reason}\n  help: stop other programs on the GPU, or ask for a smaller --max-context"
    )]
    Memory {
        /// How many were asked for.
        bytes: u64,
        /// What the driver says.
        reason: String,
    },
    /// Host memory that the GPU copies from is not to be had.
    #[error(
        "{bytes} bytes of memory for copies to the GPU are not available: {reason}\n  help: stop other programs, and raise the limit on locked memory (ulimit -l unlimited)"
    )]
    HostMemory {
        /// How many were asked for.
        bytes: u64,
        /// What the system or the driver says.
        reason: String,
    },
    /// A kernel is not in its image.
    #[error(
        "kernel {kernel} of unit {unit}: not in its image\n  help: the artifact's kernels are of another version; run dsv4c kernels on it"
    )]
    NoKernel {
        /// Which.
        kernel: String,
        /// Where.
        unit: String,
    },
    /// A unit did not compile.
    #[error(
        "unit {unit} does not compile for {target}: {log}\n  help: this is a fault of this program; report it with the command line"
    )]
    Compile {
        /// Which.
        unit: String,
        /// Architecture, or the emulator.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// The compiler is not there.
    #[error("{what} is not there: expected it at {place}\n  help: {help}", place = place.display())]
    NoCompiler {
        /// Which.
        what: &'static str,
        /// Where it was looked for.
        place: PathBuf,
        /// What to do.
        help: &'static str,
    },
}
