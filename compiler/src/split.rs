//! Which bytes of a stored tensor go to which rank, in the artifact's order. Pure.
//!
//! A row of the table is one or more matrices, a matrix one or two stored tensors (codes or plain
//! values, then scales). A [`Cut`] describes one stored tensor for all ranks; applied to runs of its
//! rows in order it yields, for each rank, exactly the bytes to append next: the rank's part of
//! those rows, and the padding once its last row is there. So a rank's parts of codes and scales,
//! one cut after the other, are the matrix as `MatrixLayout` describes it. What a value may be is
//! checked on the way; how ranges of ranks are computed is `dsv4_model::partition`'s business alone.

use std::ops::Range;

use dsv4_model::layout::{Format, MatrixLayout};
use dsv4_model::{ModelError, TensorRow, Tp};

/// What the elements of a stored tensor are, as far as they can be wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    /// Any bits: FP4 codes have no NaN.
    Any,
    /// Finite.
    F32,
    /// Finite.
    Bf16,
    /// E4M3: no NaN.
    E4m3,
    /// UE8M0: no NaN.
    E8m0,
    /// I64 expert numbers below this count, different ones in a row; stored as I32.
    Experts(u64),
}

/// One stored tensor and each rank's part of it.
#[derive(Clone, Debug)]
pub struct Cut {
    /// Its rows; the elements of a vector are its rows.
    pub rows: u64,
    /// Bytes of one row in the checkpoint.
    pub row_bytes: u64,
    values: Values,
    /// Index = rank.
    shares: Vec<Share>,
}

#[derive(Clone, Debug)]
struct Share {
    rows: Range<u64>,
    /// Within a row, as stored in the artifact.
    bytes: Range<u64>,
    /// Zero bytes after the last row.
    padding: u64,
}

/// What one rank's file gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    bytes: Bytes,
    /// Zero bytes to append after [`Piece::bytes`].
    pub padding: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Bytes {
    /// These bytes of the tile.
    Tile(Range<usize>),
    /// Bytes gathered or converted from the tile.
    Own(Vec<u8>),
}

impl Piece {
    /// The bytes to append; `tile` is the one the piece was cut from.
    pub fn bytes<'a>(&'a self, tile: &'a [u8]) -> &'a [u8] {
        match &self.bytes {
            Bytes::Tile(range) => &tile[range.clone()],
            Bytes::Own(bytes) => bytes,
        }
    }
}

/// A value that does not belong in its tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadValue {
    /// Index of the element in the stored tensor.
    pub element: u64,
    /// What is there.
    pub found: String,
    /// What should be.
    pub expected: String,
}

/// The cuts of each stored tensor of every matrix of `row`, in stored order, for `ranks` ranks.
///
/// `experts` bounds the entries of a token table. Errors: a cut inside a unit, naming the tensor.
pub fn cuts(row: &TensorRow, ranks: u32, experts: u64) -> Result<Vec<Cut>, ModelError> {
    // [experts, out, in], [out, in] or [n]: a vector is cut like a matrix of one column.
    let (out_dim, out) = match row.shape.len() {
        3 => (1, row.shape[1]),
        _ => (0, row.shape[0]),
    };
    let (in_dim, in_) = (out_dim + 1, row.shape.get(out_dim + 1).copied().unwrap_or(1));
    assert!(
        row.shape.len() < 3 || row.local_shape(Tp::new(0, ranks)?)?[0] == row.shape[0],
        "experts are not shared out"
    );
    let mut parts = Vec::new();
    for tp in Tp::new(0, ranks)?.all() {
        let rows = row.partition.range(&row.name, out_dim, out, tp)?;
        let cols = row.partition.range(&row.name, in_dim, in_, tp)?;
        parts.push((rows, cols, row.matrix_layout(tp)?));
    }
    let values = match row.format {
        Format::Fp8 => Values::E4m3,
        Format::I64 => Values::Experts(experts),
        Format::F32 => Values::F32,
        Format::Bf16 => Values::Bf16,
        Format::Fp4 => Values::Any,
    };
    // Where the part begins and ends: as many bytes or rows in as the layout of what lies before it has.
    let before = |rows: u64, cols: u64| MatrixLayout::new(row.format, rows, cols);
    let columns =
        |of: fn(&MatrixLayout) -> u64, cols: &Range<u64>| of(&before(1, cols.start))..of(&before(1, cols.end));
    let stored = row.stored(0);
    let cut = |part: usize, values, shares| {
        let (rows, bytes) = (stored[part].shape[0], stored[part].bytes);
        Cut { rows, row_bytes: bytes / rows, values, shares }
    };
    let has_scales = stored.len() > 1;
    let codes = parts.iter().map(|(rows, cols, layout)| {
        let end = if has_scales { layout.scales_offset } else { layout.stride };
        Share { rows: rows.clone(), bytes: columns(|l| l.row_bytes, cols), padding: end - layout.codes_bytes }
    });
    let codes = cut(0, values, codes.collect());
    if !has_scales {
        return Ok(vec![codes]);
    }
    // Starts fall on whole tiles (a unit is one or more); only the end of the tensor may not.
    let scale_rows = |rows: u64| before(rows, in_).scales_bytes / before(1, in_).scale_row_bytes;
    let scales = parts.iter().map(|(rows, cols, layout)| Share {
        rows: scale_rows(rows.start)..scale_rows(rows.end),
        bytes: columns(|l| l.scale_row_bytes, cols),
        padding: layout.stride - layout.scales_offset - layout.scales_bytes,
    });
    Ok(vec![codes, cut(1, Values::E8m0, scales.collect())])
}

impl Cut {
    /// What each rank gets of `tile`, whole rows of the stored tensor from `first_row` on; index = rank.
    ///
    /// Errors: the first value that does not belong there.
    pub fn apply(&self, first_row: u64, tile: &[u8]) -> Result<Vec<Piece>, BadValue> {
        let rows = tile.len() as u64 / self.row_bytes;
        assert!(
            rows * self.row_bytes == tile.len() as u64 && first_row + rows <= self.rows,
            "{} bytes from row {first_row} of {self:?}",
            tile.len()
        );
        let narrowed = self.check(first_row, tile)?;
        let (source, row_bytes) = match &narrowed {
            Some(bytes) => (bytes.as_slice(), self.row_bytes / 2),
            None => (tile, self.row_bytes),
        };
        let piece = |share: &Share| {
            let first = share.rows.start.max(first_row) - first_row;
            let last = (share.rows.end.min(first_row + rows)).saturating_sub(first_row).max(first.min(rows));
            let first = first.min(rows);
            let ends_here = last > first && first_row + last == share.rows.end;
            let padding = if ends_here { share.padding } else { 0 };
            let whole_rows = share.bytes == (0..row_bytes);
            let range = (first * row_bytes) as usize..(last * row_bytes) as usize;
            let bytes = if whole_rows && narrowed.is_none() {
                Bytes::Tile(range)
            } else if whole_rows {
                Bytes::Own(source[range].to_vec())
            } else {
                let columns = share.bytes.start as usize..share.bytes.end as usize;
                let mut own = Vec::with_capacity((last - first) as usize * columns.len());
                for row in source[range].chunks_exact(row_bytes as usize) {
                    own.extend_from_slice(&row[columns.clone()]);
                }
                Bytes::Own(own)
            };
            Piece { bytes, padding }
        };
        Ok(self.shares.iter().map(piece).collect())
    }

    /// Checks every value of `tile`; gives the narrowed bytes where they are stored narrower.
    fn check(&self, first_row: u64, tile: &[u8]) -> Result<Option<Vec<u8>>, BadValue> {
        let first = first_row * self.row_bytes;
        match self.values {
            Values::Any => Ok(None),
            Values::F32 => {
                let bits = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
                refuse(
                    tile,
                    first,
                    "a finite number",
                    |v| bits(v) & 0x7f80_0000 == 0x7f80_0000,
                    |v| format!("{} (F32 {:#010x})", f32::from_bits(bits(v)), bits(v)),
                )
            }
            Values::Bf16 => {
                let bits = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes);
                refuse(
                    tile,
                    first,
                    "a finite number",
                    |v| bits(v) & 0x7f80 == 0x7f80,
                    |v| format!("{} (BF16 {:#06x})", f32::from_bits(u32::from(bits(v)) << 16), bits(v)),
                )
            }
            Values::E4m3 => refuse(tile, first, "an E4M3 number", |[code]| code & 0x7f == 0x7f, nan),
            Values::E8m0 => refuse(tile, first, "a UE8M0 scale", |[code]| *code == 0xff, nan),
            Values::Experts(count) => narrowed(tile, first / 8, self.row_bytes as usize / 8, count).map(Some),
        }
    }
}

fn nan([code]: &[u8; 1]) -> String {
    format!("NaN (code {code:#04x})")
}

/// Refuses a tile with a value of `N` bytes that `is_bad`; `first` is the tile's first byte in the
/// tensor. Counted per chunk first, which the compiler vectorises.
fn refuse<const N: usize>(
    tile: &[u8],
    first: u64,
    expected: &str,
    is_bad: impl Fn(&[u8; N]) -> bool,
    shown: impl Fn(&[u8; N]) -> String,
) -> Result<Option<Vec<u8>>, BadValue> {
    const CHUNK: usize = 4096;
    for (n, chunk) in tile.as_chunks().0.chunks(CHUNK).enumerate() {
        if chunk.iter().fold(false, |any, value| any | is_bad(value)) {
            let at = chunk.iter().position(&is_bad).unwrap_or(0);
            return Err(BadValue {
                element: first / N as u64 + (n * CHUNK + at) as u64,
                found: shown(&chunk[at]),
                expected: expected.to_owned(),
            });
        }
    }
    Ok(None)
}

/// Rows of `per_row` I64 expert numbers below `count` as I32; `first` is the tile's first element in
/// the tensor. A row names an expert once: its weight would otherwise count twice.
fn narrowed(tile: &[u8], first: u64, per_row: usize, count: u64) -> Result<Vec<u8>, BadValue> {
    let ids: Vec<i64> = tile.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let mut out = Vec::with_capacity(tile.len() / 2);
    for (n, row) in ids.chunks(per_row).enumerate() {
        let at = first + (n * per_row) as u64;
        for (i, id) in row.iter().enumerate() {
            let bad = |found: String, expected: String| BadValue { element: at + i as u64, found, expected };
            let known = u64::try_from(*id).is_ok_and(|id| id < count);
            let narrow = i32::try_from(*id).ok().filter(|_| known);
            let narrow = narrow.ok_or_else(|| bad(id.to_string(), format!("an expert number in 0..{count}")))?;
            if row[..i].contains(id) {
                let token = at / per_row as u64;
                return Err(bad(format!("{id} again"), format!("different experts in row {token}")));
            }
            out.extend_from_slice(&narrow.to_le_bytes());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use dsv4_model::ModelConfig;
    use dsv4_model::partition::Partition;
    use dsv4_model::tensors::table;
    use proptest::prelude::*;

    use super::*;

    const NANO: &str = include_str!("../../tests/nano/config.json");
    const TINY: &str = include_str!("../../tests/tiny/config.json");
    const DSPARK: &str = include_str!("../../tests/golden/dspark_config.json");

    /// Bytes that differ from their neighbours and are no NaN in any format; token tables get expert
    /// numbers, different ones in a row.
    fn values(cut: &Cut, seed: u64) -> Vec<u8> {
        let bytes = cut.rows * cut.row_bytes;
        let mix = |i: u64| (i ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        match cut.values {
            Values::Experts(count) => {
                let per_row = cut.row_bytes / 8;
                let id = |i: u64| (mix(i / per_row) + i % per_row) % count;
                (0..bytes / 8).flat_map(|i| id(i).to_le_bytes()).collect()
            }
            _ => (0..bytes).map(|i| (mix(i) % 0x7f) as u8).collect(),
        }
    }

    /// Each rank's matrix, packed tile by tile of `tile_rows` rows.
    fn packed(cuts: &[Cut], sources: &[Vec<u8>], ranks: usize, tile_rows: u64) -> Vec<Vec<u8>> {
        let mut out = vec![Vec::new(); ranks];
        for (cut, source) in cuts.iter().zip(sources) {
            for (n, tile) in source.chunks((tile_rows * cut.row_bytes) as usize).enumerate() {
                let pieces = cut.apply(n as u64 * tile_rows, tile).unwrap();
                for (file, piece) in out.iter_mut().zip(&pieces) {
                    file.extend_from_slice(piece.bytes(tile));
                    file.extend(std::iter::repeat_n(0, piece.padding as usize));
                }
            }
        }
        out
    }

    /// Puts the stored tensors of one matrix together again from all ranks' files. Written from the
    /// layout's description: element (r, c) of a part of the matrix, looked up one at a time.
    fn joined(row: &TensorRow, files: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let matrix = if row.shape.len() == 3 { &row.shape[1..] } else { &row.shape[..] };
        let (rows, cols) = (matrix[0], matrix.get(1).copied().unwrap_or(1));
        let ranks = files.len() as u32;
        let cut_dim = match row.partition {
            Partition::Split { dim, .. } => Some(dim + matrix.len() - row.shape.len()),
            Partition::Copy => None,
        };
        // (rows, columns, bytes of an element) of each stored tensor
        let stored: &[(u64, u64, u64)] = match row.format {
            Format::F32 | Format::I64 => &[(rows, cols, 4)],
            Format::Bf16 => &[(rows, cols, 2)],
            Format::Fp8 => &[(rows, cols, 1), (rows.div_ceil(128), cols.div_ceil(128), 1)],
            Format::Fp4 => &[(rows, cols / 2, 1), (rows, cols / 32, 1)],
        };
        let mut base = 0;
        let mut out = Vec::new();
        for &(rows, cols, width) in stored {
            let (local_rows, local_cols) = match cut_dim {
                Some(0) => (rows / u64::from(ranks), cols),
                Some(_) => (rows, cols / u64::from(ranks)),
                None => (rows, cols),
            };
            let mut whole = Vec::new();
            for r in 0..rows {
                for c in 0..cols {
                    let rank = r / local_rows + c / local_cols;
                    let at = base + ((r % local_rows) * local_cols + c % local_cols) * width;
                    let element = &files[rank as usize][at as usize..(at + width) as usize];
                    whole.extend_from_slice(element);
                    if row.format == Format::I64 {
                        whole.extend([0; 4]);
                    }
                }
            }
            out.push(whole);
            base = (base + local_rows * local_cols * width).next_multiple_of(256);
        }
        assert!(files.iter().all(|f| f.len() as u64 == base), "{}: padding", row.name);
        out
    }

    /// Splits every row of the table that `ranks` can share; returns how many there were.
    fn join_all(config: &ModelConfig, ranks: u32, tile_rows: u64) -> usize {
        let mut done = 0;
        for row in table(config) {
            let Ok(cuts) = cuts(&row, ranks, config.n_routed_experts) else { continue };
            let sources: Vec<Vec<u8>> = cuts.iter().map(|cut| values(cut, done as u64)).collect();
            let stored = row.stored(0);
            assert_eq!(
                stored.iter().map(|t| t.bytes).collect::<Vec<_>>(),
                sources.iter().map(|s| s.len() as u64).collect::<Vec<_>>()
            );
            let files = packed(&cuts, &sources, ranks as usize, tile_rows);
            for (tp, file) in Tp::new(0, ranks).unwrap().all().zip(&files) {
                assert_eq!(file.len() as u64 * row.matrices(), row.artifact_bytes(tp).unwrap(), "{}", row.name);
            }
            if row.partition == Partition::Copy {
                assert!(files.iter().all(|f| *f == files[0]), "{}", row.name);
            }
            assert!(joined(&row, &files) == sources, "{} at {ranks} ranks", row.name);
            done += 1;
        }
        done
    }

    #[test]
    fn shards_of_every_row_join_to_the_whole() {
        for text in [NANO, TINY, DSPARK] {
            let config = ModelConfig::parse(text).unwrap();
            let rows = table(&config).len();
            for ranks in [1, 2] {
                for tile_rows in [7, 128, 1 << 20] {
                    assert_eq!(join_all(&config, ranks, tile_rows), rows);
                }
            }
            // These sizes cut tiles of some rows, never of all.
            for ranks in [4, 8] {
                let done = join_all(&config, ranks, 100);
                assert!(done > 0 && done < rows, "{done} of {rows}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

        /// Any sizes of a model that 8 ranks can share, in any tiles.
        #[test]
        fn shards_of_any_model_join_to_the_whole(
            hidden in 1u64..4, experts in 2u64..5, width in 1u64..3, groups in 1u64..3, rank in 1u64..3, vocab in 1u64..4,
            ranks in prop::sample::select(vec![1u32, 2, 4, 8]), tile_rows in 1u64..300,
        ) {
            let mut root: serde_json::Value = serde_json::from_str(NANO).unwrap();
            for (field, value) in [
                ("hidden_size", hidden * 128), ("n_routed_experts", experts), ("moe_intermediate_size", width * 1024),
                ("o_groups", groups * 8), ("num_attention_heads", groups * 16), ("o_lora_rank", 128),
                ("q_lora_rank", rank * 128), ("vocab_size", vocab * 128), ("num_hidden_layers", 4),
            ] {
                root[field] = value.into();
            }
            root["compress_ratios"] = vec![0, 4, 128, 4, 0].into();
            let config = ModelConfig::parse(&root.to_string()).unwrap();
            prop_assert_eq!(join_all(&config, ranks, tile_rows), table(&config).len());
        }
    }

    #[test]
    fn bad_values_are_named_by_their_element() {
        let config = ModelConfig::parse(NANO).unwrap();
        let rows = table(&config);
        let find = |format: Format| rows.iter().find(|r| r.format == format).unwrap();
        let fp8 = cuts(find(Format::Fp8), 2, 8).unwrap();
        let mut codes = values(&fp8[0], 1);
        codes[5000] = 0xff;
        let error = fp8[0].apply(0, &codes).unwrap_err();
        assert_eq!((error.element, error.found.as_str()), (5000, "NaN (code 0xff)"));
        let mut scales = values(&fp8[1], 1);
        *scales.last_mut().unwrap() = 0xff;
        assert_eq!(fp8[1].apply(0, &scales).unwrap_err().element, scales.len() as u64 - 1);
        let ids = cuts(find(Format::I64), 2, 8).unwrap();
        let again = {
            let table = values(&ids[0], 1);
            i64::from_le_bytes(table[88..96].try_into().unwrap())
        };
        for bad in [8i64, -1, i64::MAX, 1 << 32] {
            let mut table = values(&ids[0], 1);
            table[80..88].copy_from_slice(&bad.to_le_bytes());
            let rest = table.split_off(ids[0].row_bytes as usize * 2);
            let error = ids[0].apply(0, &table).err().or(ids[0].apply(2, &rest).err()).unwrap();
            assert_eq!((error.element, error.found), (10, bad.to_string()));
        }
        // Element 10 is the first of row 5; the repetition is its second.
        let mut table = values(&ids[0], 1);
        table[80..88].copy_from_slice(&again.to_le_bytes());
        let rest = table.split_off(ids[0].row_bytes as usize * 2);
        ids[0].apply(0, &table).unwrap();
        let error = ids[0].apply(2, &rest).unwrap_err();
        assert_eq!(
            (error.element, error.found, error.expected.as_str()),
            (11, format!("{again} again"), "different experts in row 5")
        );
        for (format, element, bad) in [
            (Format::F32, 1000, f32::INFINITY.to_le_bytes().to_vec()),
            (Format::F32, 0, 0xffc0_0001u32.to_le_bytes().to_vec()),
            (Format::Bf16, 5001, 0x7f80u16.to_le_bytes().to_vec()),
            (Format::Bf16, 4096, 0xff81u16.to_le_bytes().to_vec()),
        ] {
            let large = |r: &&TensorRow| r.format == format && r.shape.iter().product::<u64>() > 6000;
            let cut = cuts(rows.iter().find(large).unwrap(), 2, 8).unwrap().remove(0);
            let mut whole = values(&cut, 1);
            cut.apply(0, &whole).unwrap();
            whole[element * bad.len()..][..bad.len()].copy_from_slice(&bad);
            // In the second of two tiles too.
            let split = cut.row_bytes as usize * (element * bad.len() / cut.row_bytes as usize);
            for (first_row, tile) in [(0, &whole[..]), (split as u64 / cut.row_bytes, &whole[split..])] {
                let error = cut.apply(first_row, tile).unwrap_err();
                assert_eq!((error.element, error.expected.as_str()), (element as u64, "a finite number"), "{error:?}");
            }
        }
    }

    #[test]
    fn a_cut_inside_a_tile_names_the_tensor() {
        let config = ModelConfig::parse(NANO).unwrap();
        let error = table(&config).iter().find_map(|row| cuts(row, 4, 8).err()).unwrap();
        assert!(matches!(error, ModelError::Indivisible { ref tensor, ranks: 4, .. } if !tensor.is_empty()), "{error}");
    }
}
