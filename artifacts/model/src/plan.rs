//! Which tensors go into which section of a rank file, in order.
//!
//! The order is that of the forward pass (so a file read front to back arrives as it is needed);
//! rows that no pass touches yet follow in table order. A section holds whole blocks (the embedding,
//! a layer, the head, a draft stage): blocks are joined until a section reaches
//! [`SECTION_BYTES_MIN`], and the draft is apart from the trunk.

use std::collections::HashSet;

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::partition::Tp;
use crate::tensors::{Block, Kind, TensorId, TensorRow, table};
use crate::trace::Trace;

/// A section is closed at the first block boundary past this size, in bytes.
pub const SECTION_BYTES_MIN: u64 = 64 << 20;

/// A section of the rank files: the same rows for every rank.
#[derive(Clone, Debug)]
pub struct Section {
    /// Name: its first and last block.
    pub name: String,
    /// Rows, in file order.
    pub rows: Vec<TensorRow>,
}

/// Rows of the whole table in file order.
pub fn file_order(config: &ModelConfig) -> Vec<TensorRow> {
    let rows = table(config);
    let mut seen: HashSet<TensorId> = HashSet::new();
    let touched = Trace::run(config).into_iter().flat_map(|call| call.tensors);
    let rest = rows.iter().map(|r| r.id);
    let order: Vec<TensorId> = touched.chain(rest).filter(|id| seen.insert(*id)).collect();
    let by_id: std::collections::HashMap<TensorId, &TensorRow> = rows.iter().map(|r| (r.id, r)).collect();
    order.iter().map(|id| (*by_id[id]).clone()).collect()
}

/// The sections of a model's rank files at a tensor-parallel size.
///
/// Errors: a tensor that cannot be cut for `tp`.
pub fn sections(config: &ModelConfig, tp: Tp) -> Result<Vec<Section>, ModelError> {
    let mut out: Vec<Section> = Vec::new();
    let mut open: Vec<TensorRow> = Vec::new();
    let mut bytes = 0;
    let is_draft = |row: &TensorRow| matches!(row.id.block, Block::Draft(_));
    for row in file_order(config) {
        let boundary = open.last().is_some_and(|last| last.id.block != row.id.block);
        let full = bytes >= SECTION_BYTES_MIN || open.last().is_some_and(|last| is_draft(last) != is_draft(&row));
        if boundary && full {
            out.push(section(std::mem::take(&mut open)));
            bytes = 0;
        }
        bytes += row.artifact_bytes(tp)?;
        open.push(row);
    }
    out.push(section(open));
    Ok(out)
}

/// A section named after its first and last block. The global block comes apart: into the embedding, which
/// is read first, and the head.
fn section(rows: Vec<TensorRow>) -> Section {
    let label = |row: &TensorRow| match row.id {
        TensorId { block: Block::Global, kind: Kind::Embed } => "embed".to_owned(),
        TensorId { block: Block::Global, .. } => "head".to_owned(),
        TensorId { block, .. } => block.to_string(),
    };
    let (first, last) = (rows.first().map(label), rows.last().map(label));
    let name = match (first, last) {
        (Some(first), Some(last)) if first != last => format!("{first}..{last}"),
        (first, _) => first.unwrap_or_default(),
    };
    Section { name, rows }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_is_in_exactly_one_section() {
        for text in [
            include_str!("../../../tests/golden/flash_config.json"),
            include_str!("../../../tests/golden/dspark_config.json"),
            include_str!("../../../tests/nano/config.json"),
        ] {
            let config = ModelConfig::parse(text).unwrap();
            let sections = sections(&config, Tp::new(0, 2).unwrap()).unwrap();
            let mut names: Vec<String> = sections.iter().flat_map(|s| &s.rows).map(|r| r.name.clone()).collect();
            assert_eq!(names.len(), table(&config).len());
            names.sort();
            names.dedup();
            assert_eq!(names.len(), table(&config).len());
            let unique: HashSet<&String> = sections.iter().map(|s| &s.name).collect();
            assert_eq!(unique.len(), sections.len());
        }
    }

    #[test]
    fn nano_is_a_trunk_and_a_draft() {
        let config = ModelConfig::parse(include_str!("../../../tests/nano/config.json")).unwrap();
        let names: Vec<String> = sections(&config, Tp::ONE).unwrap().into_iter().map(|s| s.name).collect();
        assert_eq!(names, ["embed..head", "mtp.0"]);
    }
}
