//! What kernel tests share: a GPU (emulated), compiled units, random numbers, activations both ways.

use std::path::Path;
use std::sync::Arc;

use crate::device::cuda::Cuda;
use crate::device::emulated::{self, Emulated};
use crate::device::nvrtc::Nvrtc;
use crate::device::unit::{Image, Unit};
use crate::device::{Buffer, Gpu, Kernel};
use crate::numerics::{Numerics, bf16_round};

/// A GPU and a source of numbers.
pub struct Bench {
    gpu: Arc<dyn Gpu>,
    /// A real GPU's compiler, and the architecture.
    compiler: Option<(Nvrtc, String)>,
    numerics: Numerics,
    noise: u64,
}

impl Bench {
    /// Emulated, or with DSV4_GPU (a folder with NVRTC 13.0) the real one. None, said loudly, where neither can be.
    pub fn new(numerics: Numerics) -> Option<Bench> {
        let noise = 0x9e37_79b9_7f4a_7c15;
        if let Some(dir) = std::env::var_os("DSV4_GPU") {
            let gpu = Cuda::open(0).unwrap_or_else(|e| panic!("{e}"));
            let nvrtc = Nvrtc::open(Path::new(&dir)).unwrap_or_else(|e| panic!("{e}"));
            let (major, minor) = gpu.facts().capability;
            return Some(Bench { gpu, compiler: Some((nvrtc, format!("sm_{major}{minor}a"))), numerics, noise });
        }
        if !Emulated::is_possible() {
            println!("SKIPPED kernels on the emulator: x86-64 and a C++ compiler are needed");
            assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skips are not allowed");
            return None;
        }
        Some(Bench { gpu: Emulated::open(), compiler: None, numerics, noise })
    }

    pub fn gpu(&self) -> &dyn Gpu {
        self.gpu.as_ref()
    }

    pub fn shared(&self) -> Arc<dyn Gpu> {
        Arc::clone(&self.gpu)
    }

    /// Compiles a unit and finds one of its kernels.
    pub fn kernel(&self, unit: &Unit, name: &str) -> Kernel {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/emulated");
        // For looking at what the GPU's compiler makes of it.
        if let Some(to) = std::env::var_os("DSV4_DUMP_UNITS") {
            let name = unit.defines.iter().fold(unit.family.to_owned(), |n, (k, v)| format!("{n}-{k}{v}"));
            std::fs::write(Path::new(&to).join(name + ".cu"), unit.text()).expect("a directory for units");
        }
        let image = match &self.compiler {
            Some((nvrtc, arch)) => nvrtc.compile(unit, arch).map(|(cubin, _)| Image::Cubin(cubin)),
            None => emulated::compile(unit, &dir),
        };
        let image = image.unwrap_or_else(|e| panic!("{e}"));
        let at = unit.kernels.iter().position(|(kernel, _)| kernel == name).expect("a kernel of the unit");
        unit.load(self.gpu.as_ref(), &image).unwrap_or_else(|e| panic!("{e}"))[at]
    }

    /// Uniform in 0..bound.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.noise ^= self.noise << 13;
        self.noise ^= self.noise >> 7;
        self.noise ^= self.noise << 17;
        (self.noise >> 11) % bound
    }

    /// Bytes of any value.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.below(256) as u8).collect()
    }

    /// About normal, with a few outliers.
    pub fn noise(&mut self, count: usize) -> Vec<f32> {
        (0..count)
            .map(|_| {
                let sum: f32 = (0..4).map(|_| self.below(1 << 20) as f32 / (1 << 20) as f32 - 0.5).sum();
                if self.below(97) == 0 { sum * 20.0 } else { sum * 1.7 }
            })
            .collect()
    }

    /// The same as activations: rounded to their format.
    pub fn act(&mut self, count: usize) -> Vec<f32> {
        let mut out = self.noise(count);
        self.round(&mut out);
        out
    }

    /// Rounds to the activation format.
    pub fn round(&self, values: &mut [f32]) {
        if self.numerics == Numerics::Published {
            values.iter_mut().for_each(|v| *v = bf16_round(*v));
        }
    }

    pub fn upload<T: bytemuck::Pod>(&self, values: &[T]) -> Buffer {
        Buffer::of(&self.gpu, values).expect("memory")
    }

    /// Activations as kernels read them.
    pub fn upload_act(&self, values: &[f32]) -> Buffer {
        match self.numerics {
            Numerics::Float => self.upload(values),
            Numerics::Published => self.upload(&values.iter().map(|v| (v.to_bits() >> 16) as u16).collect::<Vec<_>>()),
        }
    }

    /// Room for `count` values of `T`, all of them NaN.
    pub fn buffer<T>(&self, count: usize) -> Buffer {
        let buffer = Buffer::new(&self.gpu, (count * size_of::<T>()) as u64).expect("memory");
        self.gpu.fill(buffer.at(), 0xff, buffer.bytes()).expect("filled");
        buffer
    }

    /// Room for activations.
    pub fn buffer_act(&self, count: usize) -> Buffer {
        match self.numerics {
            Numerics::Float => self.buffer::<f32>(count),
            Numerics::Published => self.buffer::<u16>(count),
        }
    }

    pub fn download_act(&self, buffer: &Buffer) -> Vec<f32> {
        match self.numerics {
            Numerics::Float => buffer.values().expect("values"),
            Numerics::Published => {
                let bits: Vec<u16> = buffer.values().expect("values");
                bits.iter().map(|b| f32::from_bits(u32::from(*b) << 16)).collect()
            }
        }
    }
}

/// Equal but for the order of sums: within 1e-5 of the largest value; in published numerics a value may also be a
/// bfloat16 step away, for at most one in 50 values (a sum that falls on another side of a rounding).
pub fn assert_close(found: &[f32], expected: &[f32], numerics: Numerics) {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
    let mut stepped = 0;
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let distance = (f - e).abs();
        if distance <= 1e-5 * largest {
            continue;
        }
        let step = numerics == Numerics::Published && distance <= e.abs().max(1e-3 * largest) / 120.0;
        assert!(step, "value {i}: {f} instead of {e}");
        stepped += 1;
    }
    assert!(stepped * 50 <= found.len() + 50, "{stepped} of {} values are a step away", found.len());
}
