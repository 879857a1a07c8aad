//! What a pack will write, computed from config.json alone: no weight byte is read.
//!
//! [`forecast`] says what that asks of disk, memory and time.

pub mod forecast;

use dsv4_format::{RankLayout, SectionPlan, TensorPlan};
use dsv4_model::inventory::{InventoryLine, inventory};
use dsv4_model::plan::{Section, sections};
use dsv4_model::{TensorRow, Tp};
use serde_json::{Value, json};

use crate::checkpoint::Config;
use crate::error::CompileError;
use crate::split::{Cut, cuts};
use forecast::Forecast;

/// One row of the table and how its stored tensors are shared out.
pub struct PlannedRow {
    /// The row.
    pub row: TensorRow,
    /// One for each stored tensor of a matrix.
    pub cuts: Vec<Cut>,
}

/// The rank files of a model, before a byte of them exists.
pub struct Plan {
    /// Number of ranks.
    pub tp: u32,
    /// In file order; the same for every rank.
    pub rows: Vec<PlannedRow>,
    /// Index = rank.
    pub layouts: Vec<RankLayout>,
    /// Bytes by category.
    pub inventory: Vec<InventoryLine>,
}

impl Plan {
    /// Errors: a size other than 1, 2, 4, 8, or the first tensor that cannot be cut so.
    pub fn new(config: &Config, tp: u32) -> Result<Plan, CompileError> {
        let fault = || CompileError::model(&config.path);
        let first = Tp::new(0, tp).map_err(fault())?;
        let model = &config.model;
        let sections = sections(model, first).map_err(fault())?;
        let mut layouts = Vec::new();
        for rank in first.all() {
            let plans: Result<Vec<SectionPlan>, _> = sections.iter().map(|s| section_plan(s, rank)).collect();
            layouts.push(RankLayout::new(&plans.map_err(fault())?)?);
        }
        let mut rows = Vec::new();
        for row in sections.into_iter().flat_map(|s| s.rows) {
            let cuts = cuts(&row, tp, model.n_routed_experts).map_err(fault())?;
            rows.push(PlannedRow { row, cuts });
        }
        let inventory = inventory(model, first).map_err(fault())?;
        Ok(Plan { tp, rows, layouts, inventory })
    }

    /// Tensors in the checkpoint.
    pub fn tensors(&self) -> u64 {
        self.inventory.iter().map(|l| l.tensors).sum()
    }

    /// Weight bytes in the checkpoint.
    pub fn checkpoint_bytes(&self) -> u64 {
        self.inventory.iter().map(|l| l.checkpoint_bytes).sum()
    }

    /// Length of each rank's file, bytes; index = rank.
    pub fn rank_file_bytes(&self) -> Vec<u64> {
        self.layouts.iter().map(RankLayout::file_len).collect()
    }

    /// The plan and what it asks of a machine, for programs.
    pub fn to_json(&self, forecast: &Forecast) -> Value {
        let categories = self.inventory.iter().map(|l| {
            json!({
                "category": l.category.name(), "tensors": l.tensors,
                "checkpoint_bytes": l.checkpoint_bytes, "rank_bytes": l.rank_bytes,
            })
        });
        let sections =
            self.sections().map(|(name, tensors, bytes)| json!({"name": name, "tensors": tensors, "bytes": bytes}));
        json!({
            "tp": self.tp,
            "tensors": self.tensors(),
            "checkpoint_bytes": self.checkpoint_bytes(),
            "categories": categories.collect::<Vec<_>>(),
            "ranks": self.layouts.iter().enumerate().map(|(rank, l)| {
                json!({"rank": rank, "file_bytes": l.file_len(), "arena_bytes": l.arena_bytes()})
            }).collect::<Vec<_>>(),
            "sections": sections.collect::<Vec<_>>(),
            "forecast": forecast.to_json(),
        })
    }

    /// (name, tensors, bytes with padding) of each section of a rank file.
    fn sections(&self) -> impl Iterator<Item = (&str, usize, u64)> {
        let layout = self.layouts.first();
        layout.into_iter().flat_map(|l| l.sections()).map(|s| (s.name.as_str(), s.tensors.len(), s.len))
    }

    /// The plan and what it asks of a machine, for people.
    pub fn to_text(&self, forecast: &Forecast) -> String {
        let mut out = format!("{:<32}{:>9}{:>18}{:>18}\n", "category", "tensors", "checkpoint bytes", "bytes per rank");
        let line = |name: &str, tensors: u64, checkpoint: u64, rank: u64| {
            format!("{name:<32}{tensors:>9}{checkpoint:>18}{rank:>18}\n")
        };
        for l in &self.inventory {
            out += &line(l.category.name(), l.tensors, l.checkpoint_bytes, l.rank_bytes);
        }
        let rank_bytes = self.inventory.iter().map(|l| l.rank_bytes).sum();
        out += &line("total", self.tensors(), self.checkpoint_bytes(), rank_bytes);
        for (rank, layout) in self.layouts.iter().enumerate() {
            let (file, arena) = (layout.file_len(), layout.arena_bytes());
            out += &format!("rank {rank} of {}: file {file} bytes, memory {arena} bytes\n", self.tp);
        }
        out += "sections of a rank file:\n";
        for (name, tensors, bytes) in self.sections() {
            out += &format!("  {name:<30}{tensors:>9}{bytes:>18}\n");
        }
        out + &forecast.to_text()
    }
}

fn section_plan(section: &Section, tp: Tp) -> Result<SectionPlan, dsv4_model::ModelError> {
    let tensor = |row: &TensorRow| {
        Ok(TensorPlan {
            name: row.name.clone(),
            dtype: row.format.name().to_owned(),
            shape: row.local_shape(tp)?,
            bytes: row.artifact_bytes(tp)?,
        })
    };
    let tensors: Result<Vec<TensorPlan>, _> = section.rows.iter().map(tensor).collect();
    Ok(SectionPlan { name: section.name.clone(), tensors: tensors? })
}
