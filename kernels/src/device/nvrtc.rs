//! The compiler of kernels, opened at run time: one pinned NVRTC, no GPU and no toolkit needed.
//!
//! Sources and headers are passed in memory under fixed names, and nothing that changes bytes depends on where
//! the library lies: the same text, options and build give the same cubin. Own thin loader, because the known
//! wrappers give PTX where a cubin is wanted (docs/decisions/0010).
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr::{null, null_mut};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::device::DeviceError;
use crate::device::unit::Unit;

/// The library's file, and the one that it opens by name.
pub const LIBRARY: &str = "libnvrtc.so.13";
const BUILTINS: &str = "libnvrtc-builtins.so.13.0";
/// The build whose bytes the lock file records.
pub const VERSION: (i32, i32) = (13, 0);
/// The compiler as kernel keys name it. Its libraries differ between machine types, the cubins do not.
pub const COMPILER: &str = "nvrtc 13.0.88";
/// Options but the architecture, in order; part of every kernel's key.
pub const OPTIONS: [&str; 1] = ["--std=c++17"];

type Program = *mut c_void;

/// An opened NVRTC.
pub struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    error: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Open as long as the functions above may be called.
    _libraries: [Library; 2],
}

impl Nvrtc {
    /// Opens the library of that name in `dir`.
    ///
    /// Errors: [`DeviceError::NoCompiler`] when it or its builtins are missing or of another version.
    pub fn open(dir: &Path) -> Result<Nvrtc, DeviceError> {
        let missing = |what: &'static str, place: PathBuf| DeviceError::NoCompiler {
            what,
            place,
            help: "run scripts/setup cuda, which fetches NVRTC 13.0.88, or give --nvrtc DIRECTORY",
        };
        let open = |name: &str, flags| {
            let path = dir.join(name);
            // SAFETY: NVIDIA's library; its initialisers touch nothing of ours.
            unsafe { Library::open(Some(&path), flags) }.map_err(|_| missing("NVRTC 13.0", path))
        };
        // The 13.0 library has no run path to its sibling: it finds it only when it is open already.
        let builtins = open(BUILTINS, RTLD_NOW | RTLD_GLOBAL)?;
        let library = open(LIBRARY, RTLD_NOW)?;
        let path = dir.join(LIBRARY);
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is that of NVRTC's header.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }.map_err(|_| missing($name, path.clone()))?
            };
        }
        let nvrtc = Nvrtc {
            version: symbol!("nvrtcVersion"),
            create: symbol!("nvrtcCreateProgram"),
            compile: symbol!("nvrtcCompileProgram"),
            log_size: symbol!("nvrtcGetProgramLogSize"),
            log: symbol!("nvrtcGetProgramLog"),
            cubin_size: symbol!("nvrtcGetCUBINSize"),
            cubin: symbol!("nvrtcGetCUBIN"),
            destroy: symbol!("nvrtcDestroyProgram"),
            error: symbol!("nvrtcGetErrorString"),
            _libraries: [builtins, library],
        };
        let mut found = (0, 0);
        // SAFETY: writes two integers.
        unsafe { (nvrtc.version)(&mut found.0, &mut found.1) };
        if found != VERSION {
            return Err(missing("NVRTC 13.0 (found another version)", path));
        }
        Ok(nvrtc)
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
        let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: the texts live until the program is destroyed; no headers are passed.
        let created = unsafe { (self.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()) };
        if created != 0 {
            return Err(failed(self.error_text(created)));
        }
        // SAFETY: the program was made; the options live through the call.
        let compiled = unsafe { (self.compile)(program, pointers.len() as c_int, pointers.as_ptr()) };
        let log = self.text(program, self.log_size, self.log);
        let cubin = if compiled == 0 { self.text(program, self.cubin_size, self.cubin) } else { Vec::new() };
        // SAFETY: made above, not used again.
        unsafe { (self.destroy)(&mut program) };
        let log = String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned();
        if compiled != 0 || cubin.is_empty() {
            return Err(failed(format!("{}\n{log}", self.error_text(compiled))));
        }
        Ok((cubin, log))
    }

    fn text(
        &self,
        program: Program,
        size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
        get: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    ) -> Vec<u8> {
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
