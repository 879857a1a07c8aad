//! How many bytes a model has, by category, in the checkpoint and in a rank file.

use crate::config::ModelConfig;
use crate::error::ModelError;
use crate::partition::Tp;
use crate::tensors::table;

/// Categories of the byte inventory, as published totals list them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Category {
    RoutedExperts,
    Attention,
    SharedExperts,
    EmbedHead,
    Compressors,
    Indexers,
    HyperConnections,
    Routers,
    NormsAndHead,
    Draft,
}

impl Category {
    /// All categories, in the order of the printed inventory.
    pub const ALL: [Category; 10] = [
        Category::RoutedExperts,
        Category::Attention,
        Category::SharedExperts,
        Category::EmbedHead,
        Category::Compressors,
        Category::Indexers,
        Category::HyperConnections,
        Category::Routers,
        Category::NormsAndHead,
        Category::Draft,
    ];

    /// Name in the printed inventory.
    pub fn name(self) -> &'static str {
        match self {
            Category::RoutedExperts => "routed experts",
            Category::Attention => "attention projections",
            Category::SharedExperts => "shared experts",
            Category::EmbedHead => "embed + head",
            Category::Compressors => "compressors",
            Category::Indexers => "indexers",
            Category::HyperConnections => "hyper-connections",
            Category::Routers => "routers",
            Category::NormsAndHead => "norms + head hyper-connection",
            Category::Draft => "draft block",
        }
    }
}

/// Bytes and tensor count of one inventory line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InventoryLine {
    /// Category.
    pub category: Category,
    /// Tensors in the checkpoint (a quantised weight and its scales count as two).
    pub tensors: u64,
    /// Bytes in the checkpoint.
    pub checkpoint_bytes: u64,
    /// Bytes in one rank file (before section padding).
    pub rank_bytes: u64,
}

/// The inventory of a model at a tensor-parallel size, one line per category that occurs.
pub fn inventory(config: &ModelConfig, tp: Tp) -> Result<Vec<InventoryLine>, ModelError> {
    let rows = table(config);
    let mut lines = Vec::new();
    for category in Category::ALL {
        let mut line = InventoryLine { category, tensors: 0, checkpoint_bytes: 0, rank_bytes: 0 };
        for row in rows.iter().filter(|r| r.category == category) {
            line.tensors += row.matrices() * row.stored(0).len() as u64;
            line.checkpoint_bytes += row.checkpoint_bytes();
            line.rank_bytes += row.artifact_bytes(tp)?;
        }
        if line.tensors > 0 {
            lines.push(line);
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flash() -> ModelConfig {
        ModelConfig::parse(include_str!("../../../tests/golden/flash_config.json")).unwrap()
    }

    fn flash_0731() -> ModelConfig {
        ModelConfig::parse(include_str!("../../../tests/golden/flash_0731_config.json")).unwrap()
    }

    fn bytes(config: &ModelConfig, category: Category) -> u64 {
        let lines = inventory(config, Tp::ONE).unwrap();
        lines.iter().find(|l| l.category == category).unwrap().checkpoint_bytes
    }

    /// The published totals, to the byte.
    #[test]
    fn inventory_of_flash() {
        let config = flash();
        for (category, expected) in [
            (Category::RoutedExperts, 147_169_738_752),
            (Category::Attention, 4_599_478_144),
            (Category::SharedExperts, 1_082_196_480),
            (Category::EmbedHead, 2_118_123_520),
            (Category::Compressors, 525_722_624),
            (Category::Indexers, 275_353_344),
            (Category::HyperConnections, 135_275_592),
            (Category::Routers, 108_834_816),
            (Category::NormsAndHead, 974_868),
            (Category::Draft, 3_593_787_756),
        ] {
            assert_eq!(bytes(&config, category), expected, "{}", category.name());
        }
        let lines = inventory(&config, Tp::ONE).unwrap();
        assert_eq!(lines.iter().map(|l| l.checkpoint_bytes).sum::<u64>(), 159_609_485_896);
        assert_eq!(lines.iter().map(|l| l.tensors).sum::<u64>(), 69_187);
    }

    #[test]
    fn inventory_of_0731() {
        let lines = inventory(&flash_0731(), Tp::ONE).unwrap();
        assert_eq!(lines.iter().map(|l| l.checkpoint_bytes).sum::<u64>(), 166_878_536_440);
        assert_eq!(lines.iter().map(|l| l.tensors).sum::<u64>(), 72_317);
        assert_eq!(bytes(&flash_0731(), Category::Draft), 10_862_838_300);
    }
}
