//! What is compiled as one: a family's source, its argument structs and its specialisation.

use std::path::PathBuf;

use crate::device::{nvrtc, rows};
use crate::numerics::Numerics;

/// Device headers by name; a source includes them by these names.
pub const HEADERS: [(&str, &str); 3] = [
    ("base.cuh", include_str!("../cuh/base.cuh")),
    ("ptx.cuh", include_str!("../cuh/ptx.cuh")),
    ("numerics.cuh", include_str!("../cuh/numerics.cuh")),
];
/// Only for the emulator.
pub const EMULATE: (&str, &str) = ("emulate.h", include_str!("../cuh/emulate.h"));

/// The macro that the headers read: whether activations are rounded as published.
pub const PUBLISHED: &str = "PUBLISHED";

/// A source with everything that determines its compiled form but target and compiler.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The family, as manifests name it.
    pub family: &'static str,
    /// The CUDA source.
    pub source: &'static str,
    /// Argument structs, in CUDA.
    pub args: String,
    /// Macros, ascending by name.
    pub defines: Vec<(String, String)>,
    /// Names of its kernels, and dynamic shared memory that a launch may ask for, bytes.
    pub kernels: Vec<(String, u32)>,
}

/// A compiled unit.
#[derive(Clone, Debug)]
pub enum Image {
    /// For the driver.
    Cubin(Vec<u8>),
    /// For the emulator: a shared library.
    Library(PathBuf),
}

impl Unit {
    /// Everything in one text: numerics, headers, arguments, macros, source. Includes are resolved, so that this
    /// text alone decides what is compiled. The macros come after the headers, whose names they cannot touch.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let define = |published: bool, out: &mut String| {
            for (name, value) in self.defines.iter().filter(|(name, _)| (name == PUBLISHED) == published) {
                *out += &format!("#define {name} {value}\n");
            }
        };
        define(true, &mut out);
        HEADERS.iter().for_each(|(_, text)| expand(text, &mut out));
        out += rows::CUDA;
        out += &self.args;
        define(false, &mut out);
        expand(self.source, &mut out);
        out
    }
}

/// Version of what a key is made of.
const KEY_CONTEXT: &str = "dsv4 kernel v1";

impl Unit {
    /// Identity of its cubin for an architecture: of everything that determines the bytes.
    pub fn key(&self, arch: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        let mut put = |text: &str| {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        };
        put(nvrtc::COMPILER);
        nvrtc::OPTIONS.iter().for_each(|option| put(option));
        put(arch);
        put(self.family);
        for (name, shared) in &self.kernels {
            put(name);
            put(&shared.to_string());
        }
        put(&self.text());
        *hasher.finalize().as_bytes()
    }
}

/// Appends a text without what is there already: our own headers.
fn expand(text: &str, out: &mut String) {
    for line in text.lines() {
        let own = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"'));
        // The emulator's header is a file beside the text: it is not part of what the GPU runs.
        if line != "#pragma once" && own.is_none_or(|name| name == EMULATE.0) {
            *out += line;
            *out += "\n";
        }
    }
}

/// A macro of a unit.
pub fn define(name: &str, value: impl ToString) -> (String, String) {
    (name.to_owned(), value.to_string())
}

/// The macro that chooses the numerics.
pub fn published(numerics: Numerics) -> (String, String) {
    define(PUBLISHED, u32::from(numerics == Numerics::Published))
}
