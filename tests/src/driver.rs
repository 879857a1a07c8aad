//! A CUDA driver without a GPU, compiled for a test: what a program says to it, and makes of its answers.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::binaries::{DSV4_RUN, Ran, start_with};
use crate::skip;

const SOURCE: &str = include_str!("driver.cpp");

/// What the driver says of itself.
#[derive(Clone, Copy, Debug)]
pub struct Says {
    /// 13000 is CUDA 13.0.
    pub version: i32,
    /// What its start gives: 0, or an error.
    pub init: i32,
    /// GPUs.
    pub count: i32,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Their memory is the machine's.
    pub unified: bool,
    /// Free memory of 80 GiB, bytes.
    pub free: u64,
    /// A module has the kernels that it is asked for.
    pub kernels: bool,
}

impl Default for Says {
    /// A GB10 with memory of its own.
    fn default() -> Says {
        Says { version: 13_000, init: 0, count: 1, capability: (12, 1), unified: false, free: 79 << 30, kernels: true }
    }
}

/// A driver, found before any other by the programs it is given to.
pub struct Driver(TempDir);

impl Driver {
    /// Compiles one. None, said loudly, without a C++ compiler.
    pub fn new(says: Says) -> Option<Driver> {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let source = dir.path().join("driver.cpp");
        std::fs::write(&source, SOURCE).expect("a source");
        let Says { version, init, count, capability: (major, minor), unified, free, kernels } = says;
        let defines = [
            format!("-DVERSION={version}"),
            format!("-DINIT={init}"),
            format!("-DCOUNT={count}"),
            format!("-DMAJOR={major}"),
            format!("-DMINOR={minor}"),
            format!("-DUNIFIED={}", i32::from(unified)),
            format!("-DTOTAL={}ull", 80u64 << 30),
            format!("-DFREE={free}ull"),
            format!("-DKERNELS={}", i32::from(kernels)),
        ];
        let library = dir.path().join("libcuda.so");
        let mut command = Command::new("c++");
        command.args(["-shared", "-fPIC", "-O1", "-w"]).args(&defines).arg("-o").arg(&library).arg(&source);
        let Ok(ran) = command.output() else {
            skip("a driver of the test's own: needs a C++ compiler");
            return None;
        };
        assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
        // The name that machines without a toolkit have.
        std::fs::copy(&library, dir.path().join("libcuda.so.1")).expect("a copy");
        Some(Driver(dir))
    }

    /// A directory where no driver is, and none is found through.
    pub fn none() -> Driver {
        Driver(tempfile::tempdir().expect("a temporary directory"))
    }

    /// Runs `dsv4-run` with this driver.
    pub fn run(&self, artifact: &Path, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Ran {
        let args = args.into_iter().map(|arg| arg.as_ref().to_owned());
        let args = std::iter::once(artifact.as_os_str().to_owned()).chain(args);
        let place = self.0.path().to_str().expect("a path in ASCII");
        start_with(DSV4_RUN, args, &[("LD_LIBRARY_PATH", place)]).finish()
    }
}
