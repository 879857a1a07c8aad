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

/// Options that change no byte. The compiler's log is wanted, and where there is a driver the library has a cache of
/// its own, which gives what it compiled before without one.
const FOR_THE_LOG: [&str; 2] = ["--ptxas-options=-v", NO_CACHE];
const NO_CACHE: &str = "--no-cache";

/// What is compiled to PTX to learn the build: any target that every 13.0 knows.
const PROBE_TARGET: &str = "--gpu-architecture=compute_90";

type Program = *mut c_void;
type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Get = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// Why the NVRTC of a directory is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// A library is not there.
    Missing(PathBuf),
    /// It is there and cannot be opened, for this reason.
    Unloadable(PathBuf, String),
    /// It lacks a function, or does not say which build it is; how that shows.
    NotNvrtc(PathBuf, String),
    /// It is another build than [`BUILD`].
    OtherBuild(PathBuf, String),
}

impl std::fmt::Display for Unfit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unfit::Missing(file) => write!(f, "no {}", file.display()),
            Unfit::Unloadable(file, why) => write!(f, "{}, which cannot be opened ({why})", file.display()),
            Unfit::NotNvrtc(file, why) => write!(f, "{}, which is no NVRTC 13 ({why})", file.display()),
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
    /// Errors: [`DeviceError::NoCompiler`] when it or its builtins are missing, cannot be opened or are of another build.
    pub fn open(dir: &Path) -> Result<Nvrtc, DeviceError> {
        Nvrtc::try_open(dir).map_err(|unfit| {
            let (what, place) = match unfit {
                Unfit::Missing(file) => ("NVRTC 13.0.88", file),
                Unfit::Unloadable(file, _) => ("NVRTC 13.0.88 (what cannot be opened is)", file),
                Unfit::NotNvrtc(file, _) => ("NVRTC 13.0.88 (something else is)", file),
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
            unsafe { Library::open(Some(&path), flags) }.map_err(|error| match path.try_exists() {
                Ok(false) => Unfit::Missing(path),
                _ => Unfit::Unloadable(path, loader_text(&error)),
            })
        };
        // The 13.0 library has no run path to its sibling: it finds it only when it is open already.
        let builtins = open(BUILTINS, RTLD_NOW | RTLD_GLOBAL)?;
        let library = open(LIBRARY, RTLD_NOW)?;
        let path = dir.join(LIBRARY);
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is that of NVRTC's header.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|error| Unfit::NotNvrtc(path.clone(), loader_text(&error)))?
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
            Ok(found) if found == BUILD => Ok(nvrtc),
            Ok(found) => Err(Unfit::OtherBuild(path, found)),
            Err(why) => Err(Unfit::NotNvrtc(path, why)),
        }
    }

    /// Which build it is. Its version function knows no more than 13.0, but every PTX begins with the build.
    /// Errors: why that is not known, a line.
    fn build(&self) -> Result<String, String> {
        let (ptx, _) = self
            .run("", "build.cu", &[PROBE_TARGET, NO_CACHE], self.ptx_size, self.ptx)
            .map_err(|log| log.trim().replace('\n', ": "))?;
        build_of(&String::from_utf8_lossy(&ptx)).ok_or_else(|| "its PTX does not say which build it is".into())
    }

    /// A unit's cubin for an architecture such as `sm_121a`, and what the compiler says of it (registers, spills).
    ///
    /// Errors: [`DeviceError::Compile`] with the log.
    pub fn compile(&self, unit: &Unit, arch: &str) -> Result<(Vec<u8>, String), DeviceError> {
        let failed = |log: String| DeviceError::Compile { unit: unit.family.into(), target: arch.into(), log };
        let (name, target) = (format!("{}.cu", unit.family), format!("--gpu-architecture={arch}"));
        let options: Vec<&str> = [&[target.as_str()], &OPTIONS[..], &FOR_THE_LOG].concat();
        self.run(&unit.text(), &name, &options, self.cubin_size, self.cubin).map_err(failed)
    }

    /// Compiles a text; gives what `size` and `get` fetch, and the log. Errors: the reason and the log.
    fn run(
        &self,
        source: &str,
        name: &str,
        options: &[&str],
        size: Size,
        get: Get,
    ) -> Result<(Vec<u8>, String), String> {
        let c = |text: &str| CString::new(text).map_err(|e| e.to_string());
        let (source, name) = (c(source)?, c(name)?);
        let options: Vec<CString> = options.iter().map(|option| c(option)).collect::<Result<_, _>>()?;
        let options: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
        let mut program = null_mut();
        // SAFETY: the texts live until the program is destroyed; no headers are passed.
        let created = unsafe { (self.create)(&mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()) };
        if created != 0 {
            return Err(self.error_text(created));
        }
        // SAFETY: the program was made; the options live through the call.
        let compiled = unsafe { (self.compile)(program, options.len() as c_int, options.as_ptr()) };
        let log = self.fetch(program, self.log_size, self.log);
        let out = match compiled {
            0 => self.fetch(program, size, get).and_then(|out| match out.is_empty() {
                true => Err("0 bytes".into()),
                false => Ok(out),
            }),
            _ => Ok(Vec::new()),
        };
        // SAFETY: made above, not used again.
        unsafe { (self.destroy)(&mut program) };
        let log = log.map(|log| String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned());
        match (compiled, out, log) {
            (0, Ok(out), Ok(log)) => Ok((out, log)),
            (0, Ok(_), Err(why)) => Err(format!("compiled, but there is no log: {why}")),
            (0, Err(why), log) => Err(format!("compiled, but there is no result: {why}\n{}", log.unwrap_or_default())),
            (code, _, log) => Err(format!("{}\n{}", self.error_text(code), log.unwrap_or_default())),
        }
    }

    /// What a program has of something. Errors: what the library says.
    fn fetch(&self, program: Program, size: Size, get: Get) -> Result<Vec<u8>, String> {
        let done = |code| if code == 0 { Ok(()) } else { Err(self.error_text(code)) };
        let mut len = 0;
        // SAFETY: writes one length.
        done(unsafe { size(program, &mut len) })?;
        let mut bytes = vec![0u8; len];
        // SAFETY: as many bytes as the library said it has.
        done(unsafe { get(program, bytes.as_mut_ptr().cast()) })?;
        Ok(bytes)
    }

    fn error_text(&self, code: c_int) -> String {
        // SAFETY: a static text for every code.
        unsafe { CStr::from_ptr((self.error)(code)) }.to_string_lossy().into_owned()
    }
}

/// What the loader says; the error itself only names the call.
fn loader_text(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
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

    /// A library with NVRTC's functions, as far as the tests need them; without --no-cache it fails.
    const FAKE: &str = r#"
        #include <string.h>
        #define GIVES(SIZE, GET, BYTES, CODE) \
            int SIZE(void* p, size_t* n) { *n = sizeof BYTES; return 0; } \
            int GET(void* p, char* to) { memcpy(to, BYTES, sizeof BYTES); return CODE; }
        int nvrtcCreateProgram(void** p, const char* s, const char* name, int n, const char** h, const char** names) {
            *p = (void*)1;
            return 0;
        }
        int nvrtcCompileProgram(void* p, int n, const char** options) {
            for (int i = 0; i < n; i++)
                if (strcmp(options[i], "--no-cache") == 0) return COMPILES;
            return 5;
        }
        GIVES(nvrtcGetProgramLogSize, nvrtcGetProgramLog, "the log\n", 0)
        GIVES(nvrtcGetPTXSize, nvrtcGetPTX, HEAD "\n", 0)
        GIVES(nvrtcGetCUBINSize, CUBIN, "a cubin", FETCHES)
        int nvrtcDestroyProgram(void** p) { return 0; }
        const char* nvrtcGetErrorString(int code) {
            return code == 0 ? "NVRTC_SUCCESS" : code == 5 ? "NVRTC_ERROR_INVALID_OPTION" : "NVRTC_ERROR_OTHER";
        }
    "#;

    const RIGHT: &str = "-DHEAD=\"// Cuda compilation tools, release 13.0, V13.0.88\"";

    struct Place(PathBuf);

    impl Place {
        fn new(name: &str) -> Place {
            let dir = std::env::temp_dir().join(format!("dsv4-nvrtc-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Place(dir)
        }

        /// With a fake of this kind; what is not said is as it should be.
        fn with_fake(name: &str, defines: &[&str]) -> Place {
            let place = Place::new(name);
            place.build(BUILTINS, "", &[]);
            let usual = ["-DCOMPILES=0", "-DFETCHES=0", "-DCUBIN=nvrtcGetCUBIN", RIGHT];
            place.build(LIBRARY, FAKE, &[&usual, defines].concat());
            place
        }

        fn build(&self, library: &str, text: &str, options: &[&str]) {
            let source = self.0.join("fake.c");
            std::fs::write(&source, text).unwrap();
            let mut cc = std::process::Command::new("cc");
            cc.args(["-shared", "-fPIC", "-w"]).args(options).arg("-o").arg(self.0.join(library)).arg(source);
            assert!(cc.status().unwrap().success());
        }

        fn unfit(&self) -> Unfit {
            Nvrtc::try_open(&self.0).err().unwrap()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_no_nvrtc_is_told_apart() {
        let place = Place::new("none");
        let [builtins, library] = [BUILTINS, LIBRARY].map(|name| place.0.join(name));
        assert_eq!(place.unfit(), Unfit::Missing(builtins.clone()));
        assert!(Nvrtc::open(&place.0).err().unwrap().to_string().contains("scripts/setup cuda"));
        std::fs::write(&builtins, "no library").unwrap();
        let Unfit::Unloadable(file, why) = place.unfit() else { panic!("{:?}", place.unfit()) };
        assert!(file == builtins && why.contains("file too short"), "{why}");
        let text = Nvrtc::open(&place.0).err().unwrap().to_string();
        assert!(text.contains("cannot be opened") && text.contains(BUILTINS), "{text}");
        place.build(BUILTINS, "", &[]);
        assert_eq!(place.unfit(), Unfit::Missing(library.clone()));
        std::fs::write(&library, [1; 4096]).unwrap();
        assert!(matches!(place.unfit(), Unfit::Unloadable(file, why) if file == library && why.contains("ELF")));

        let not_nvrtc = |name: &str, define: &str, words: &str| {
            let place = Place::with_fake(name, &[define]);
            let Unfit::NotNvrtc(file, why) = place.unfit() else { panic!("{:?}", place.unfit()) };
            assert!(file == place.0.join(LIBRARY) && why.contains(words), "{why}");
        };
        not_nvrtc("lacks", "-DCUBIN=other", "nvrtcGetCUBIN");
        not_nvrtc("fails", "-DCOMPILES=6", "NVRTC_ERROR_OTHER: the log");
        not_nvrtc("silent", "-DHEAD=\"//\"", "does not say which build");
        let other = Place::with_fake("other", &[&RIGHT.replace("88", "48")]);
        assert_eq!(other.unfit(), Unfit::OtherBuild(other.0.join(LIBRARY), "13.0.48".into()));
    }

    #[test]
    fn what_is_compiled_must_be_had_too() {
        let (family, args) = ("rope", String::new());
        let unit = Unit { family, source: "", args, defines: Vec::new(), kernels: Vec::new() };
        let good = Place::with_fake("good", &[]);
        let (cubin, log) = Nvrtc::open(&good.0).unwrap().compile(&unit, "sm_121a").unwrap();
        assert_eq!((cubin.as_slice(), log.as_str()), (&b"a cubin\0"[..], "the log"));
        let bad = Place::with_fake("unfetched", &["-DFETCHES=6"]);
        let error = Nvrtc::open(&bad.0).unwrap().compile(&unit, "sm_121a").unwrap_err().to_string();
        assert!(error.contains("no result: NVRTC_ERROR_OTHER\nthe log") && !error.contains("SUCCESS"), "{error}");
    }
}
