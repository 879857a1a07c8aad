//! What is compiled as one: a family's source, its argument structs and its specialisation.

use std::path::PathBuf;

use crate::device::{DeviceError, Gpu, Kernel, nvrtc, rows};
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

impl Unit {
    /// Whether a kernel waits by itself for the one ahead of it: then it may start while that one still runs.
    ///
    /// Told from the text: `wait_for_previous` in the kernel or in a function that it calls. A kernel must wait on
    /// every path of every block before it touches what earlier kernels write, also where it has nothing to do.
    pub fn waits(&self, kernel: &str) -> bool {
        let functions = functions(self.source);
        let mut waiting: Vec<&str> = vec!["wait_for_previous"];
        // Functions stand before those that call them.
        for (name, body) in functions {
            if words(body).any(|word| waiting.contains(&word)) {
                waiting.push(name);
            }
        }
        waiting.contains(&kernel)
    }

    /// Its kernels from its image, in its order; those that wait by themselves may start early.
    ///
    /// Errors: one is not in the image.
    pub fn load(&self, gpu: &dyn Gpu, image: &Image) -> Result<Vec<Kernel>, DeviceError> {
        let names: Vec<(&str, u32)> = self.kernels.iter().map(|(name, shared)| (name.as_str(), *shared)).collect();
        let kernels = gpu.load(image, &names)?;
        let early: Vec<Kernel> =
            names.iter().zip(&kernels).filter(|((name, _), _)| self.waits(name)).map(|(_, kernel)| *kernel).collect();
        gpu.allow_overlap(&early);
        Ok(kernels)
    }
}

/// Names and bodies of a source's functions and kernels, in their order.
fn functions(source: &str) -> Vec<(&str, &str)> {
    let mut out = Vec::new();
    for (at, _) in source.match_indices("DEVICE ").chain(source.match_indices("KERNEL")) {
        let text = &source[at..];
        if at > 0 && !source[..at].ends_with(['\n', ' ']) {
            continue;
        }
        let Some((head, rest)) = text.split_once('(') else { continue };
        // A kernel's name is the first argument of its macro.
        let name = match head.starts_with("KERNEL") {
            true => rest.split(',').next(),
            false => head.rsplit(|c: char| !is_word(c)).next(),
        };
        let body = text.find('{').and_then(|open| Some(&text[open..open + closing(&text[open..])?]));
        if let (Some(name), Some(body)) = (name, body) {
            out.push((at, name, body));
        }
    }
    out.sort_by_key(|(at, ..)| *at);
    out.into_iter().map(|(_, name, body)| (name, body)).collect()
}

/// Where the brace that a text begins with is closed.
fn closing(text: &str) -> Option<usize> {
    let mut depth = 0;
    text.char_indices().find_map(|(i, c)| {
        depth += i32::from(c == '{') - i32::from(c == '}');
        (depth == 0).then_some(i)
    })
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The words of a text's code.
fn words(text: &str) -> impl Iterator<Item = &str> {
    text.lines().flat_map(|line| line.split("//").next().unwrap_or("").split(|c: char| !is_word(c)))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpu::kernels::Kernels;
    use crate::numerics::Numerics;
    use crate::tuning::Tuning;
    use dsv4_model::{ModelConfig, Tp};

    #[test]
    fn waits_are_seen_in_kernels_and_in_what_they_call() {
        let source = "DEVICE void deep(int x) { wait_for_previous(); }\nDEVICE int calls() {\n { deep(1); } }\n\
            DEVICE void idle() { /* { */ } // deep\nKERNEL(a, Args, 32) { calls(); }\n\
            KERNEL(b, Args, 32) { idle(); // wait_for_previous\n }\nKERNEL(c, Args, 32) { if (1) { wait_for_previous(); } }\n";
        let source = source.replace("/* { */", "");
        let unit = Unit { family: "f", source: source.leak(), args: String::new(), defines: vec![], kernels: vec![] };
        assert_eq!(["a", "b", "c", "d"].map(|kernel| unit.waits(kernel)), [true, false, true, false]);
    }

    /// One that does not would have to wait for a full launch, and so would the one behind it.
    #[test]
    fn every_kernel_waits_by_itself() {
        for text in [
            include_str!("../../../tests/golden/flash_config.json"),
            include_str!("../../../tests/nano/config.json"),
            include_str!("../../../tests/tiny/config.json"),
        ] {
            let (config, tp) = (ModelConfig::parse(text).unwrap(), Tp::new(0, 2).unwrap());
            for numerics in [Numerics::Published, Numerics::Float] {
                for unit in Kernels::units(&config, tp, numerics, &Tuning::untuned("sm_121a")) {
                    for (kernel, _) in &unit.kernels {
                        assert!(unit.waits(kernel), "{kernel} of {} does not wait for the kernel ahead", unit.family);
                    }
                }
            }
        }
    }
}
