//! What the random tensors hold: values such that activations stay finite and routing near uniform.
//!
//! A projection from k inputs has elements of standard deviation k^-0.5, so it keeps the size of
//! what it reads; norms are near 1. Codes are drawn directly, their scales vary from tile to tile (a
//! wrong scale index shows) and give the elements that deviation. Only exact arithmetic is used
//! (no transcendental functions), so every machine makes the same bytes.

use dsv4_model::layout::Format;
use dsv4_model::{Kind, ModelConfig, TensorRow};

/// Standard deviation of the sum of four independent uniform 16-bit numbers: 65536 / sqrt(3).
const SUM_STD: f64 = 37_837.227;
/// Largest magnitude of the E4M3 table; the format's own is 448.
const E4M3_TOP: f64 = 416.0;

/// How the bytes of one stored tensor are drawn.
#[derive(Clone, Debug)]
pub enum Values {
    /// All bits random: FP4 codes, whose sixteen values are nearly those of a normal distribution.
    Bits,
    /// One of 256 equally likely codes for each byte.
    Codes(Box<[u8; 256]>),
    /// Sums of four uniform numbers: nearly normal, bounded at 3.5 deviations.
    Normal { mean: f32, std: f32, bf16: bool },
    /// F32.
    Uniform { low: f32, high: f32 },
    /// I64 rows of `per_token` different experts below `experts`.
    Experts { per_token: u64, experts: u64 },
}

/// The values of each stored tensor of a matrix of `row`.
pub fn of_row(row: &TensorRow, config: &ModelConfig) -> Vec<Values> {
    let inputs = row.shape[row.shape.len() - 1] as f64;
    let std = 1.0 / inputs.sqrt();
    match row.format {
        Format::Fp4 => {
            let codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
            vec![Values::Bits, Values::Codes(scales(std, rms(codes.iter().copied())))]
        }
        Format::Fp8 => {
            let codes = e4m3_codes();
            let deviation = rms(codes.iter().map(|c| e4m3(*c)));
            vec![Values::Codes(codes), Values::Codes(scales(std, deviation))]
        }
        Format::I64 => {
            vec![Values::Experts { per_token: config.num_experts_per_tok, experts: config.n_routed_experts }]
        }
        Format::F32 | Format::Bf16 => vec![plain(row.id.kind, std, row.format == Format::Bf16)],
    }
}

/// `std` is k^-0.5 for the row's k inputs.
fn plain(kind: Kind, std: f64, bf16: bool) -> Values {
    let normal = |mean: f64, std: f64| Values::Normal { mean: mean as f32, std: std as f32, bf16 };
    match kind {
        Kind::HcAttnScale | Kind::HcFfnScale | Kind::HcHeadScale => Values::Uniform { low: 0.6, high: 1.4 },
        Kind::HcAttnFn | Kind::HcFfnFn | Kind::HcHeadFn => normal(0.0, 1.5 * std),
        Kind::HcAttnBase | Kind::HcFfnBase | Kind::HcHeadBase => normal(0.0, 0.5),
        Kind::Norm
        | Kind::AttnNorm
        | Kind::FfnNorm
        | Kind::QNorm
        | Kind::KvNorm
        | Kind::CompressorNorm
        | Kind::IndexerNorm
        | Kind::ENorm
        | Kind::HNorm
        | Kind::MainNorm => normal(1.0, 0.2),
        Kind::Embed | Kind::AttnSink | Kind::CompressorApe | Kind::IndexerApe | Kind::MarkovW1 => normal(0.0, 1.0),
        // Small beside the spread of the scores: no expert is favoured.
        Kind::GateBias => normal(0.0, 0.02),
        Kind::Head | Kind::Gate | Kind::CompressorWgate | Kind::IndexerWgate | Kind::MarkovW2 => normal(0.0, 2.0 * std),
        Kind::IndexerWeightsProj => normal(0.0, 4.0 * std),
        _ => normal(0.0, std),
    }
}

/// Names the random numbers of one tensor.
pub fn key(tensor: &str, seed: u64) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("dsv4 synth v1");
    hasher.update(&seed.to_le_bytes()).update(tensor.as_bytes());
    let mut key = [0; 8];
    hasher.finalize_xof().fill(&mut key);
    u64::from_le_bytes(key)
}

/// Number `index` of the sequence named `key` (SplitMix64, whose state is a counter).
fn word(key: u64, index: u64) -> u64 {
    let z = key.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Values {
    /// Pieces of a tensor start at multiples of this many bytes.
    pub fn unit_bytes(&self) -> u64 {
        match self {
            Values::Experts { per_token, .. } => per_token * 8,
            _ => 8,
        }
    }

    /// The bytes of the tensor `key` from `offset` (a multiple of [`Values::unit_bytes`]) on.
    pub fn fill(&self, key: u64, offset: u64, out: &mut [u8]) {
        match self {
            Values::Bits => {
                for (i, bytes) in (offset / 8..).zip(out.chunks_mut(8)) {
                    bytes.copy_from_slice(&word(key, i).to_le_bytes()[..bytes.len()]);
                }
            }
            Values::Codes(codes) => {
                for (i, bytes) in (offset / 8..).zip(out.chunks_mut(8)) {
                    for (byte, random) in bytes.iter_mut().zip(word(key, i).to_le_bytes()) {
                        *byte = codes[random as usize];
                    }
                }
            }
            Values::Normal { mean, std, bf16: true } => {
                for (i, bytes) in (offset / 2..).zip(out.chunks_exact_mut(2)) {
                    let value = mean + normal(word(key, i)) * std;
                    bytes.copy_from_slice(&bf16(value).to_le_bytes());
                }
            }
            Values::Normal { mean, std, bf16: false } => {
                for (i, bytes) in (offset / 4..).zip(out.chunks_exact_mut(4)) {
                    bytes.copy_from_slice(&(mean + normal(word(key, i)) * std).to_le_bytes());
                }
            }
            Values::Uniform { low, high } => {
                for (i, bytes) in (offset / 4..).zip(out.chunks_exact_mut(4)) {
                    let unit = (word(key, i) >> 40) as f32 / (1 << 24) as f32;
                    bytes.copy_from_slice(&(low + unit * (high - low)).to_le_bytes());
                }
            }
            Values::Experts { per_token, experts } => {
                let row_bytes = (per_token * 8) as usize;
                for (row, bytes) in (offset / (per_token * 8)..).zip(out.chunks_exact_mut(row_bytes)) {
                    let picks = distinct(word(key, row), *per_token, *experts);
                    for (bytes, id) in bytes.chunks_exact_mut(8).zip(picks) {
                        bytes.copy_from_slice(&id.to_le_bytes());
                    }
                }
            }
        }
    }
}

/// Mean 0, deviation 1.
fn normal(word: u64) -> f32 {
    let sum: u64 = (0..4).map(|i| (word >> (16 * i)) & 0xffff).sum();
    (sum as i64 - 131_070) as f32 * (1.0 / SUM_STD) as f32
}

/// Rounded to nearest, ties to even. Finite values only.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// `count` different numbers below `below`, which is at least `count`.
fn distinct(key: u64, count: u64, below: u64) -> Vec<u64> {
    let mut out = Vec::with_capacity(count as usize);
    let mut draws = 0;
    while (out.len() as u64) < count {
        let pick = word(key, draws) % below;
        draws += 1;
        if !out.contains(&pick) {
            out.push(pick);
        }
    }
    out
}

fn rms(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = values.len() as f64;
    (values.map(|v| v * v).sum::<f64>() / count).sqrt()
}

/// Value of an E4M3 code.
fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (code >> 3 & 15, f64::from(code & 7));
    let magnitude = match exponent {
        0 => mantissa / 512.0,
        e => (1.0 + mantissa / 8.0) * f64::from(1u32 << e) / 128.0,
    };
    if code & 0x80 == 0 { magnitude } else { -magnitude }
}

/// 256 codes whose values lie like those of a normal distribution.
fn e4m3_codes() -> Box<[u8; 256]> {
    // Close to the half-normal quantile, which needs a logarithm: 0.70 at 1/2 (exact 0.67), 2.9 at 255/256.
    let quantile = |u: f64| 1.2533 * u / (1.0 - 0.8187 * u * u).sqrt();
    let top = quantile(127.5 / 128.0);
    let mut out = Box::new([0; 256]);
    for magnitude in 0..128 {
        let wanted = quantile((magnitude as f64 + 0.5) / 128.0) / top * E4M3_TOP;
        let distance = |code: &u8| (e4m3(*code) - wanted).abs();
        let code = (0..0x7f).min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap_or(0);
        out[magnitude] = code;
        out[magnitude + 128] = code | 0x80;
    }
    out
}

/// 256 UE8M0 scales of three neighbouring magnitudes, in a mixture that gives elements of deviation
/// `std` when the codes' is `codes`.
fn scales(std: f64, codes: f64) -> Box<[u8; 256]> {
    // The middle scale 2^e leaves a factor of 1/2 to 2 between the variances.
    let (mut middle, mut ratio) = (127u8, (std / codes) * (std / codes));
    while ratio < 0.5 && middle > 2 {
        (middle, ratio) = (middle - 1, ratio * 4.0);
    }
    while ratio >= 2.0 && middle < 0xfd {
        (middle, ratio) = (middle + 1, ratio / 4.0);
    }
    // Shares of 2^(e+1) and 2^(e-1) such that 1 + 3 up - 3/4 down = ratio, all three occurring.
    let up = 0.05 + 0.2 * (ratio - 0.5);
    let down = (1.0 + 3.0 * up - ratio) / 0.75;
    let (up, down) = ((up * 256.0).round() as usize, (down * 256.0).round() as usize);
    let mut out = Box::new([middle; 256]);
    out[..up].fill(middle + 1);
    out[256 - down..].fill(middle - 1);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(values: &Values, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        values.fill(key("tensor", 7), 0, &mut out);
        out
    }

    #[test]
    fn pieces_are_parts_of_the_whole() {
        for values in [
            Values::Bits,
            Values::Codes(e4m3_codes()),
            Values::Normal { mean: 1.0, std: 0.2, bf16: true },
            Values::Normal { mean: 0.0, std: 3.0, bf16: false },
            Values::Uniform { low: 0.6, high: 1.4 },
            Values::Experts { per_token: 3, experts: 8 },
        ] {
            let whole = made(&values, 2400);
            for offset in [24u64, 1200, 2376] {
                let mut part = vec![0; 2400 - offset as usize];
                values.fill(key("tensor", 7), offset, &mut part);
                assert!(part == whole[offset as usize..], "{values:?} from {offset}");
            }
        }
    }

    #[test]
    fn numbers_have_their_mean_and_deviation() {
        let bytes = made(&Values::Normal { mean: 1.0, std: 0.2, bf16: true }, 200_000);
        let values: Vec<f64> = bytes
            .chunks_exact(2)
            .map(|b| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)))
            .collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let deviation = rms(values.iter().map(|v| v - mean));
        assert!((mean - 1.0).abs() < 0.005 && (deviation - 0.2).abs() < 0.005, "{mean} {deviation}");
    }

    /// Elements of quantised matrices have deviation k^-0.5 for any k, from scales of three sizes.
    #[test]
    fn scaled_codes_have_the_deviation_of_their_inputs() {
        let codes = e4m3_codes();
        assert!(codes.iter().all(|c| c & 0x7f != 0x7f));
        let deviation = rms(codes.iter().map(|c| e4m3(*c)));
        for inputs in [32u32, 128, 256, 1000, 4096, 16384, 1 << 20] {
            let wanted = 1.0 / f64::from(inputs).sqrt();
            let table = scales(wanted, deviation);
            let scale = rms(table.iter().map(|e| 2f64.powi(i32::from(*e) - 127)));
            assert!((scale * deviation / wanted - 1.0).abs() < 0.02, "{inputs}: {}", scale * deviation / wanted);
            let mut sizes = table.to_vec();
            sizes.sort();
            sizes.dedup();
            assert_eq!(sizes.len(), 3, "{inputs}");
        }
    }

    #[test]
    fn hand_worked_codes() {
        assert_eq!([e4m3(0x38), e4m3(0x7e), e4m3(0x01), e4m3(0xb9)], [1.0, 448.0, 1.0 / 512.0, -1.125]);
        assert_eq!(
            [bf16(1.0), bf16(-2.5), bf16(1.0 + 1.0 / 256.0), bf16(1.0 + 3.0 / 256.0)],
            [0x3f80, 0xc020, 0x3f80, 0x3f82]
        );
    }

    #[test]
    fn tokens_get_different_experts_all_used() {
        let bytes = made(&Values::Experts { per_token: 3, experts: 5 }, 3 * 8 * 1000);
        let ids: Vec<u64> = bytes.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect();
        let mut uses = [0; 5];
        for row in ids.chunks(3) {
            assert!(row[0] != row[1] && row[1] != row[2] && row[0] != row[2], "{row:?}");
            row.iter().for_each(|id| uses[*id as usize] += 1);
        }
        assert!(uses.iter().all(|n| (500..700).contains(n)), "{uses:?}");
    }
}
