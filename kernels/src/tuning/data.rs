//! Weights and activations of random codes, made fast: a short pattern that the device repeats.

use dsv4_model::layout::{Format, MatrixLayout};

use crate::device::{Buffer, DeviceError, Gpu};

/// Bytes that come from the host; a prime number of 256-byte pieces, so that neighbouring rows differ.
const PATTERN: u64 = 256 * 1021;
/// 2^-6: sums of a thousand products stay near one.
const SCALE: u8 = 121;

/// Random numbers; the same in every run.
pub(super) struct Noise(u64);

impl Noise {
    pub(super) fn new(seed: u64) -> Noise {
        Noise(0x9e37_79b9_7f4a_7c15 ^ seed.wrapping_mul(0x2545_f491_4f6c_dd1d) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// In -1..1.
    fn value(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// `bytes` bytes of values of a format.
    fn codes(&mut self, format: Format, bytes: u64) -> Vec<u8> {
        let bytes = bytes as usize;
        match format {
            Format::F32 | Format::I64 => (0..bytes / 4).flat_map(|_| (self.value() / 64.0).to_le_bytes()).collect(),
            Format::Bf16 => (0..bytes / 2).flat_map(|_| bf16(self.value() / 16.0)).collect(),
            // Exponents of 2^-1 to 2: no NaN.
            Format::Fp8 => (0..bytes).map(|_| (self.next() >> 32) as u8 & 0x8f | 0x30).collect(),
            Format::Fp4 => (0..bytes).map(|_| (self.next() >> 32) as u8).collect(),
        }
    }
}

fn bf16(value: f32) -> [u8; 2] {
    ((value.to_bits() >> 16) as u16).to_le_bytes()
}

/// Repeats what lies at the start of `bytes` bytes at `at`, of which `have` are there.
fn repeat(gpu: &dyn Gpu, at: u64, mut have: u64, bytes: u64) -> Result<(), DeviceError> {
    while have < bytes {
        let part = have.min(bytes - have);
        gpu.copy(at + have, at, part)?;
        have += part;
    }
    Ok(())
}

/// `count` matrices, one behind the other.
pub(super) fn matrices(
    gpu: &dyn Gpu,
    at: u64,
    format: Format,
    layout: &MatrixLayout,
    count: u64,
    noise: &mut Noise,
) -> Result<(), DeviceError> {
    // The codes' pattern runs through everything, then scales go where they belong.
    let bytes = layout.stride * count;
    let part = PATTERN.min(bytes);
    gpu.write(at, &noise.codes(format, part))?;
    repeat(gpu, at, part, bytes)?;
    if layout.scales_bytes > 0 {
        for i in 0..count {
            gpu.fill(at + i * layout.stride + layout.scales_offset, SCALE, layout.scales_bytes)?;
        }
    }
    Ok(())
}

/// A buffer of `count` bfloat16 activations.
pub(super) fn activations(gpu: &dyn Gpu, buffer: &Buffer, noise: &mut Noise) -> Result<(), DeviceError> {
    let bytes = buffer.bytes();
    let part = PATTERN.min(bytes / 2 * 2);
    let values: Vec<u8> = (0..part / 2).flat_map(|_| bf16(noise.value())).collect();
    gpu.write(buffer.at(), &values)?;
    repeat(gpu, buffer.at(), part, bytes)
}
