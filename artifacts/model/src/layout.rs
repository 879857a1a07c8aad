//! Byte order of stored weights: what the packer writes and every kernel reads.
//!
//! There is one layout per format for all backends and architectures. Rows are contiguous along
//! the input dimension (the one summed over), so a matrix-vector product streams each row once. A
//! matrix's block scales follow its codes at a 256-byte boundary; a row of the table that holds
//! many experts is one such matrix after another, each starting at a 256-byte boundary.

/// Number format of a tensor, in the checkpoint and (but for `I64`) in the artifact.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Format {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// Token-to-expert table; 64-bit in the checkpoint, stored as checked 32-bit.
    I64,
    /// E4M3 with one UE8M0 scale per 128x128 tile.
    Fp8,
    /// E2M1, two per byte (low nibble = even column), one UE8M0 scale per 32 columns of a row.
    Fp4,
}

/// Side of an FP8 scale tile and length of an activation quantisation group.
pub const TILE: u64 = 128;
/// Columns under one FP4 scale.
pub const FP4_GROUP: u64 = 32;
/// Alignment of the parts of a stored tensor, in bytes.
pub const PART_ALIGN: u64 = 256;

impl Format {
    /// Name used in contracts, manifests and messages.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "F32",
            Format::Bf16 => "BF16",
            Format::I64 => "I64",
            Format::Fp8 => "FP8",
            Format::Fp4 => "FP4",
        }
    }

    /// The stored byte order, in words, for the weight contract.
    pub fn layout(self) -> &'static str {
        match self {
            Format::F32 | Format::Bf16 => "rows, little-endian",
            Format::I64 => "rows, narrowed to I32 little-endian",
            Format::Fp8 => "rows of codes; at 256: scales [ceil(out/128), ceil(in/128)]",
            Format::Fp4 => "rows of nibble pairs; at 256: scales [out, in/32]",
        }
    }
}

/// Where the parts of one stored matrix lie, in bytes from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MatrixLayout {
    /// Bytes of one row of codes (or plain values).
    pub row_bytes: u64,
    /// Bytes of all codes.
    pub codes_bytes: u64,
    /// Start of the scales; equal to `codes_bytes` rounded up, also when there are none.
    pub scales_offset: u64,
    /// Bytes of one row of scales (0 where there are none).
    pub scale_row_bytes: u64,
    /// Bytes of all scales.
    pub scales_bytes: u64,
    /// Distance from one matrix of a stack to the next.
    pub stride: u64,
}

impl MatrixLayout {
    /// Layout of a matrix of `rows` x `cols` (a vector is one row).
    pub fn new(format: Format, rows: u64, cols: u64) -> MatrixLayout {
        let row_bytes = match format {
            Format::F32 | Format::I64 => cols * 4,
            Format::Bf16 => cols * 2,
            Format::Fp8 => cols,
            Format::Fp4 => cols / 2,
        };
        let (scale_rows, scale_row_bytes) = match format {
            Format::Fp8 => (rows.div_ceil(TILE), cols.div_ceil(TILE)),
            Format::Fp4 => (rows, cols / FP4_GROUP),
            _ => (0, 0),
        };
        let codes_bytes = rows * row_bytes;
        let scales_offset = codes_bytes.next_multiple_of(PART_ALIGN);
        let scales_bytes = scale_rows * scale_row_bytes;
        let stride = (scales_offset + scales_bytes).next_multiple_of(PART_ALIGN);
        MatrixLayout { row_bytes, codes_bytes, scales_offset, scale_row_bytes, scales_bytes, stride }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hand_worked_sizes() {
        // One routed expert of Flash: w1 [2048, 4096].
        let w1 = MatrixLayout::new(Format::Fp4, 2048, 4096);
        assert_eq!((w1.row_bytes, w1.codes_bytes, w1.scales_bytes), (2048, 4_194_304, 262_144));
        assert_eq!((w1.scales_offset, w1.stride), (4_194_304, 4_456_448));
        // An FP8 matrix whose sides are not whole tiles.
        let odd = MatrixLayout::new(Format::Fp8, 130, 100);
        assert_eq!((odd.codes_bytes, odd.scales_offset, odd.scales_bytes, odd.stride), (13_000, 13_056, 2, 13_312));
        let vector = MatrixLayout::new(Format::F32, 1, 24);
        assert_eq!((vector.row_bytes, vector.scales_bytes, vector.stride), (96, 0, 256));
    }
}
