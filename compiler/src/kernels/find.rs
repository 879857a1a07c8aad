//! Where the compiler of kernels is: in the directory that is named, else beside this program, where `scripts/setup`
//! puts it, else in a CUDA toolkit. Only one build counts, so which of them it is changes no byte.

use std::path::{Path, PathBuf};

use dsv4_kernels::device::nvrtc::{BUILD, Nvrtc, Unfit};

use crate::error::CompileError;

/// `scripts/setup cuda` fills the directory of this name in `target`, somewhere above the program where cargo builds it.
const SET_UP: &str = "nvrtc";
const BUILT_IN: &str = "target";
/// Toolkits as NVIDIA's installers and distributions place them; other versions of them have other builds.
const TOOLKITS: [&str; 4] =
    ["/usr/local/cuda-13.0/lib64", "/usr/local/cuda/lib64", "/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu"];

/// Opens the compiler: of `given`, or of the first usual place that has the right build.
///
/// Errors: [`CompileError::NoNvrtc`] with what was found instead.
pub fn find(given: Option<&Path>) -> Result<Nvrtc, CompileError> {
    let places = match given {
        // A toolkit may be named by its own directory.
        Some(dir) => vec![dir.to_path_buf(), dir.join("lib64"), dir.join("lib")],
        None => usual(),
    };
    let mut found = Vec::new();
    for place in &places {
        match Nvrtc::try_open(place) {
            Ok(nvrtc) => return Ok(nvrtc),
            Err(Unfit::Missing(_)) => {}
            Err(other) => found.push(other.to_string()),
        }
    }
    let shown: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    Err(CompileError::NoNvrtc {
        build: BUILD,
        expected: shown.join(", "),
        found: if found.is_empty() { "none".into() } else { found.join(", ") },
    })
}

fn usual() -> Vec<PathBuf> {
    let program = std::env::current_exe().unwrap_or_default();
    let above = program.ancestors().skip(1).enumerate();
    // No other directory above: who else may write there decides which code runs here.
    let own = above.filter(|(level, dir)| *level == 0 || dir.file_name().is_some_and(|name| name == BUILT_IN));
    own.map(|(_, dir)| dir.join(SET_UP)).chain(TOOLKITS.map(PathBuf::from)).collect()
}
