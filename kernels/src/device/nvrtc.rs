//! The compiler of kernels, opened at run time: one pinned NVRTC, no GPU and no toolkit needed.
//!
//! Sources and headers are passed in memory under fixed names, and nothing that changes bytes depends on where
//! the library lies: the same text, options and build give the same cubin. Own thin loader, because the known
//! wrappers give PTX where a cubin is wanted (docs/decisions/0010). What a compiled unit must keep to is in
//! [`judge`]. Several threads may compile at once.
#![allow(unsafe_code)]

mod judge;

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::device::DeviceError;
use crate::device::unit::Unit;
pub use judge::{Broken, Resources, SHARED_MAX, judge};

/// The library's file, and the one that it opens by name.
pub const LIBRARY: &str = "libnvrtc.so.13";
const BUILTINS: &str = "libnvrtc-builtins.so.13.0";
/// The one build whose cubins this program knows, the same on every machine type.
pub const BUILD: &str = "13.0.88";
/// The compiler as kernel keys name it. Its libraries differ between machine types, the cubins do not.
pub const COMPILER: &str = "nvrtc 13.0.88";
/// Options but the architecture, in order; part of every kernel's key.
pub const OPTIONS: [&str; 1] = ["--std=c++17"];

/// What is compiled to PTX to learn the build: any target that every 13.0 knows.
const PROBE_TARGET: &CStr = c"--gpu-architecture=compute_90";

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// Why the NVRTC of a directory is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// A library is not there, or cannot be opened.
    Missing(PathBuf),
    /// It lacks a function, or does not say which build it is.
    NotNvrtc(PathBuf),
    /// It is another build than [`BUILD`].
    OtherBuild(PathBuf, String),
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unfit::Missing(file) => write!(f, "no {}", file.display()),
            Unfit::NotNvrtc(file) => write!(f, "{}, which is no NVRTC 13", file.display()),
            Unfit::OtherBuild(file, found) => write!(f, "{} of build {found}", file.display()),
        }
    }
}

/// An opened NVRTC.
pub struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Get,
    ptx_size: Size,
    ptx: Get,
    cubin_size: Size,
    cubin: Get,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Open as long as the functions above may be called.
    _libraries: [Library; 2],
}

impl Nvrtc {
    /// Opens the library of that name in `dir`.
    ///
    /// Errors: [`DeviceError::NoCompiler`] when it or its builtins are missing or of another build.
    pub fn open(dir: &Path) -> Result<Nvrtc, DeviceError> {
        Nvrtc::try_open(dir).map_err(|unfit| {
            let (what, place) = match unfit {
                Unfit::Missing(file) => ("NVRTC 13.0.88", file),
                Unfit::NotNvrtc(file) => ("NVRTC 13.0.88 (something else is)", file),
                Unfit::OtherBuild(file, _) => ("NVRTC 13.0.88 (another build is)", file),
            };
            let help = "run scripts/setup cuda, which fetches NVRTC 13.0.88, or give --nvrtc DIRECTORY";
            DeviceError::NoCompiler { what, place, help }
        })
    }

    /// As [`Nvrtc::open`], for those who look in several places.
    pub fn try_open(dir: &Path) -> Result<Nvrtc, Unfit> {
        let open = |name: &str, flags| {
            let path = dir.join(name);
            // SAFETY: NVIDIA's library; its initialisers touch nothing of ours.
            unsafe { Library::open(Some(&path), flags) }.map_err(|_| Unfit::Missing(path))
        };
        // The 13.0 library has no run path to its sibling: it finds it only when it is open already.
        let builtins = open(BUILTINS, RTLD_NOW | RTLD_GLOBAL)?;
        let library = open(LIBRARY, RTLD_NOW)?;
        let path = dir.join(LIBRARY);
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is that of NVRTC's header.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(|_| Unfit::NotNvrtc(path.clone()))?
            };
        }
        let nvrtc = Nvrtc {
            create: symbol!("nvrtcCreateProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            log_size: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            ptx_size: symbol!("nvrtcGetPTXSize"),
            ptx: symbol!("nvrtcGetPTX"),
            cubin_size: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
            destroy: symbol!("nvrtcDestroyProgram"),
            error: symbol!("nvrtcGetErrorString"),
            _libraries: [builtins, library],
        };
        match nvrtc.build() {
            Some(found) if found == BUILD => Ok(nvrtc),
            Some(found) => Err(Unfit::OtherBuild(path, found)),
            None => Err(Unfit::NotNvrtc(path)),
        }
    }

    /// Which build it is. Its version function knows no more than 13.0, but every PTX begins with the build.
    fn build(&self) -> Option<String> {
        let compiled = self.run(c"", c"build.cu", &[PROBE_TARGET], self.ptx_size, self.ptx);
        build_of(&String::from_utf8_lossy(&compiled.ok()?.0))
    }

    /// A unit's cubin for an architecture such as `sm_121a`, and what the compiler says of it (registers, spills).
    ///
    /// Errors: [`DeviceError::Compile`] with the log.
    pub fn compile(&self, unit: &Unit, arch: &str) -> Result<(Vec<u8>, String), DeviceError> {
        let failed = |log: String| DeviceError::Compile { unit: unit.family.into(), target: arch.into(), log };
        let c = |text: &str| CString::new(text).map_err(|e| failed(e.to_string()));
        let (source, name) = (c(&unit.text())?, c(&format!("{}.cu", unit.family))?);
        let mut options = vec![c(&format!("--gpu-architecture={arch}"))?];
        for option in OPTIONS.iter().chain(&["--ptxas-options=-v"]) {
            options.push(c(option)?);
        }
        let options: Vec<&CStr> = options.iter().map(CString::as_c_str).collect();
        self.run(&source, &name, &options, self.cubin_size, self.cubin).map_err(failed)
    }

    /// Compiles a text; gives what `size` and `get` fetch, and the log. Errors: the reason and the log.
    fn run(
        &self,
        source: &CStr,
        name: &CStr,
        options: &[&CStr],
        size: Size,
        get: Get,
    ) -> Result<(Vec<u8>, String), String> {
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: the texts live until the program is destroyed; no headers are passed.
        let created = unsafe { (self.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()) };
        if created != 0 {
            return Err(self.error_text(created));
        }
        // SAFETY: the program was made; the options live through the call.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let log = self.text(program, self.log_size, self.log);
        let out = if compiled == 0 { self.text(program, size, get) } else { Vec::new() };
        // SAFETY: made above, not used again.
        unsafe { (self.destroy)(&mut program) };
        let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned();
        if compiled != 0 || out.is_empty() {
            return Err(format!("{}\n{log}", self.error_text(compiled)));
        }
        Ok((out, log))
    }

    fn text(&self, program: Program, size: Size, get: Get) -> Vec<u8> {
        let mut len = 0;
        // SAFETY: writes one length.
        if unsafe { size(program, &mut len) } != 0 {
            return Vec::new();
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: as many bytes as the library said it has.
        match unsafe { get(program, bytes.as_mut_ptr().cast()) } {
            0 => bytes,
            _ => Vec::new(),
        }
    }

    fn error_text(&self, code: c_int) -> String {
        // SAFETY: a static text for every code.
        unsafe { CStr::from_ptr((self.error)(code)) }.to_string_lossy().into_owned()
    }
}

/// The build in PTX's head: of `// Cuda compilation tools, release 13.0, V13.0.88` the last part.
fn build_of(ptx: &str) -> Option<String> {
    let line = ptx.lines().find(|line| line.starts_with("// Cuda compilation tools"))?;
    let (_, build) = line.rsplit_once(", V")?;
    Some(build.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_build_is_read_from_the_head_of_ptx() {
        let head = "//\n// Generated by NVIDIA NVVM Compiler\n// Compiler Build ID: CL-36424714\n";
        let of = |line: &str| build_of(&format!("{head}{line}\n.version 9.0\n"));
        assert_eq!(of("// Cuda compilation tools, release 13.0, V13.0.48").as_deref(), Some("13.0.48"));
        assert_eq!(of("// Cuda compilation tools, release 13.1, V13.1.115").as_deref(), Some("13.1.115"));
        assert_eq!(of("// tools, release 13.0, V13.0.88"), None);
    }

    #[test]
    fn what_is_no_nvrtc_is_told_apart() {
        let dir = std::env::temp_dir().join(format!("dsv4-no-nvrtc-{}", std::process::id()));
        let error = |dir: &Path| Nvrtc::try_open(dir).err().unwrap();
        assert_eq!(error(&dir), Unfit::Missing(dir.join(BUILTINS)));
        assert!(Nvrtc::open(&dir).err().unwrap().to_string().contains("scripts/setup cuda"));
    }
}
