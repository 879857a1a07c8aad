//! Weights made up from a seed, for measuring without a checkpoint.
//!
//! Numbers are finite and of the size that trained ones have, so that kernels do what they do with those. A tensor
//! is some random values over and over: little passes from the host, the rest is copied on the GPU.

use std::ops::Range;

use dsv4_model::layout::Format;
use dsv4_model::tensors::{TensorRow, table};
use dsv4_model::{ModelConfig, Tp};

use super::DeviceWeightsError;
use crate::device::{Buffer, DeviceError, Gpu};
use crate::weights::{self, WeightsError};

/// Values of a tensor that are random; the others repeat them.
const PIECE_BYTES: u64 = 2 << 20;
/// Different values of a tensor that is no codes.
const VALUES: usize = 256;

/// Fills all tensors of `config`'s model at `tp` in `arena` from `seed`; `place` gives a tensor's bytes by name.
///
/// Errors: as for weights that are loaded.
pub fn fill(
    gpu: &dyn Gpu,
    config: &ModelConfig,
    tp: Tp,
    arena: &Buffer,
    place: impl Fn(&str) -> Option<Range<usize>>,
    seed: u64,
) -> Result<(), DeviceWeightsError> {
    for (index, row) in table(config).iter().enumerate() {
        let bytes = weights::place_of(row, tp, arena.bytes() as usize, &place)?;
        let mut noise = Noise::new(seed, index as u64);
        fill_row(gpu, config, row, tp, arena.at() + bytes.start as u64, &mut noise)?;
    }
    Ok(gpu.sync()?)
}

fn fill_row(
    gpu: &dyn Gpu,
    config: &ModelConfig,
    row: &TensorRow,
    tp: Tp,
    at: u64,
    noise: &mut Noise,
) -> Result<(), DeviceWeightsError> {
    let layout = row.matrix_layout(tp).map_err(WeightsError::from)?;
    let shape = row.local_shape(tp).map_err(WeightsError::from)?;
    let is_vector = shape.len() == 1;
    let cols = shape.last().copied().unwrap_or(1).max(1);
    let unit = 1.0 / (cols as f32).sqrt();
    // Whole rows of the expert table, whole values of all others.
    let step = if row.format == Format::I64 { layout.row_bytes } else { 8 };
    let piece = (PIECE_BYTES / step * step).min(layout.codes_bytes.next_multiple_of(step)) as usize;
    let mut codes = match row.format {
        // Between 1 and 2.
        Format::Fp8 => noise.words(piece, |word| word & 0x8787_8787_8787_8787 | 0x3838_3838_3838_3838),
        Format::Fp4 => noise.words(piece, |word| word),
        Format::Bf16 => {
            let (middle, gain) = if is_vector { (1.0, 0.25) } else { (0.0, unit) };
            let values = noise.values(middle, gain);
            noise.chosen(piece, values.map(|v| [(v.to_bits() >> 16) as u8, (v.to_bits() >> 24) as u8]))
        }
        Format::F32 => {
            let values = noise.values(0.0, unit);
            noise.chosen(piece, values.map(f32::to_le_bytes))
        }
        Format::I64 => noise.experts(piece, config.num_experts_per_tok, config.n_routed_experts),
    };
    codes.truncate(layout.codes_bytes as usize);
    gpu.write(at, &codes)?;
    repeat(gpu, at, codes.len() as u64, layout.codes_bytes)?;
    if layout.scales_bytes > 0 {
        // A product keeps the size of what it is made of.
        let size = if row.format == Format::Fp8 { 0.7 } else { 0.4 };
        let exponent = 127.0 + (size * unit).log2().round();
        gpu.fill(at + layout.scales_offset, exponent as u8, layout.scales_bytes)?;
    }
    Ok(repeat(gpu, at, layout.stride, layout.stride * row.matrices())?)
}

/// Fills a buffer with bfloat16 or float32 values between -1 and 1. They come in repetitions of no whole number of rows,
/// so that rows differ. Errors: the GPU's.
pub(crate) fn fill_values(gpu: &dyn Gpu, buffer: &Buffer, format: Format, seed: u64) -> Result<(), DeviceError> {
    let mut noise = Noise::new(seed, 0);
    let (values, piece) = (noise.values(0.0, 1.0), PIECE_BYTES as usize + 8);
    let mut bytes = match format {
        Format::Bf16 => noise.chosen(piece, values.map(|v| [(v.to_bits() >> 16) as u8, (v.to_bits() >> 24) as u8])),
        _ => noise.chosen(piece, values.map(f32::to_le_bytes)),
    };
    bytes.truncate(piece.min(buffer.bytes() as usize));
    gpu.write(buffer.at(), &bytes)?;
    repeat(gpu, buffer.at(), bytes.len() as u64, buffer.bytes())
}

/// Copies the first `have` bytes until there are `total`.
fn repeat(gpu: &dyn Gpu, at: u64, mut have: u64, total: u64) -> Result<(), DeviceError> {
    while have < total {
        let part = have.min(total - have);
        gpu.copy(at + have, at, part)?;
        have += part;
    }
    Ok(())
}

/// Random numbers: xorshift.
struct Noise(u64);

impl Noise {
    fn new(seed: u64, index: u64) -> Noise {
        // Neighbouring seeds have nothing in common, and none is zero.
        let mixed = (seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        Noise((mixed ^ (mixed >> 31)) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn words(&mut self, bytes: usize, map: impl Fn(u64) -> u64) -> Vec<u8> {
        (0..bytes.div_ceil(8)).flat_map(|_| map(self.next()).to_le_bytes()).collect()
    }

    /// Uniform within `gain` of `middle`.
    fn values(&mut self, middle: f32, gain: f32) -> [f32; VALUES] {
        [(); VALUES].map(|()| middle + ((self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0) * gain)
    }

    fn chosen<const N: usize>(&mut self, bytes: usize, values: [[u8; N]; VALUES]) -> Vec<u8> {
        let word = |noise: &mut Noise| noise.next().to_le_bytes();
        (0..bytes.div_ceil(8 * N)).flat_map(|_| word(self)).flat_map(|at| values[usize::from(at)]).collect()
    }

    /// Distinct experts, `per_token` in a row.
    fn experts(&mut self, bytes: usize, per_token: u64, experts: u64) -> Vec<u8> {
        let rows = bytes as u64 / (4 * per_token.max(1));
        let row = |first: u64| (0..per_token).flat_map(move |i| (((first + i) % experts) as i32).to_le_bytes());
        (0..rows).flat_map(|_| row(self.next() % experts)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::emulated::Emulated;
    use crate::gpu::weights::DeviceWeights;
    use crate::numerics::{e2m1_value, e4m3_value, ue8m0_value};

    /// Every format's numbers are finite and of their size, the same for a seed, others for another.
    #[test]
    fn tensors_from_a_seed() {
        let config = ModelConfig::parse(include_str!("../../../../tests/nano/config.json")).unwrap();
        let tp = Tp::new(1, 2).unwrap();
        let mut places = std::collections::HashMap::new();
        let mut end = 0;
        for row in table(&config) {
            let bytes = row.artifact_bytes(tp).unwrap() as usize;
            places.insert(row.name.clone(), end..end + bytes);
            end += bytes.next_multiple_of(4096);
        }
        let place = |name: &str| places.get(name).cloned();
        let gpu = Emulated::open();
        let filled = |seed| {
            let arena = Buffer::new(&gpu, end as u64).unwrap();
            gpu.fill(arena.at(), 0xff, arena.bytes()).unwrap();
            fill(gpu.as_ref(), &config, tp, &arena, place, seed).unwrap();
            arena
        };
        let (one, same, other) = (filled(7), filled(7), filled(8));
        let bytes = one.values::<u8>().unwrap();
        assert_eq!(bytes, same.values::<u8>().unwrap());
        assert_ne!(bytes, other.values::<u8>().unwrap());
        let mut seen = [0; 5];
        for row in table(&config) {
            let start = places[&row.name].start;
            let layout = row.matrix_layout(tp).unwrap();
            for matrix in 0..row.matrices() {
                let start = start + (matrix * layout.stride) as usize;
                let codes = &bytes[start..start + layout.codes_bytes as usize];
                let scales = &bytes[start + layout.scales_offset as usize..][..layout.scales_bytes as usize];
                assert!(scales.iter().all(|s| (0.001..1.0).contains(&ue8m0_value(*s))), "{}", row.name);
                let values: Vec<f32> = match row.format {
                    Format::Fp8 => codes.iter().map(|c| e4m3_value(*c)).collect(),
                    Format::Fp4 => codes.iter().flat_map(|c| [e2m1_value(c & 15), e2m1_value(c >> 4)]).collect(),
                    Format::Bf16 => {
                        let halves = codes.as_chunks::<2>().0.iter();
                        halves.map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16)).collect()
                    }
                    Format::F32 => codes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
                    Format::I64 => vec![1.0],
                };
                let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
                assert!(values.iter().all(|v| v.is_finite()) && (0.001..8.0).contains(&largest), "{}", row.name);
                seen[row.format as usize] += 1;
            }
        }
        assert!(seen.iter().all(|count| *count > 0), "{seen:?}");
        // What a loaded rank is checked for holds.
        let weights = DeviceWeights::new(&gpu, &config, tp, one, place).unwrap();
        assert!(weights.bytes() > end as u64);
    }
}
