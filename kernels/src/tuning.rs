//! Choices among equal kernels, as a text table: one per architecture, part of an artifact's identity.
//!
//! A table decides what is compiled and how it is launched; it never changes what is computed beyond the order of
//! sums. At run time it is only read: all ranks have the same. [`tunables`] says what can be chosen, [`cost`] what it
//! should take, [`measure`] what it takes, [`choose`] turns times into a [`table`]. Absent on purpose: times. They stay
//! in the repository's tables ([`table::Table`]) and never reach an artifact.

pub mod chip;
pub mod choose;
pub mod cost;
mod data;
mod experts;
pub mod latency;
mod matrices;
pub mod measure;
pub mod predict;
pub mod rank;
pub mod resources;
pub mod sketch;
pub mod table;
#[cfg(test)]
mod tests;
mod tiles;
pub mod tunables;

use std::collections::{BTreeMap, BTreeSet};

use dsv4_model::layout::Format;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::numerics::Numerics;
use crate::ops::dense_gemm::gemm::GemmPoint;
use crate::ops::dense_gemm::gemv::{self, GemvPoint, Segment};
use crate::ops::moe_gemm::decode::{Experts, MoePoint};
use crate::ops::moe_gemm::prefill::{self, MoeSizes};
use table::{Entry, Table};

/// A point as named numbers: what tables hold of any kernel.
pub type Values = BTreeMap<String, u32>;
/// Every shape that has no entry of its own.
pub const ANY_SHAPE: &str = "*";
/// Every number of rows that has no entry of its own.
pub const ANY_ROWS: u32 = 0;

/// Why a table is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "tuning table: {at}: expected {expected}, found {found}
  help: make one with `dsv4c tune -o FILE`, or compile by this program's: `dsv4c kernels ART` without --tuning"
)]
pub struct TuningError {
    /// Where in the table.
    pub at: String,
    /// What it must be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// The points of all tuned kernels on one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tuning {
    /// As compilers name it: `sm_121a`.
    pub arch: String,
    /// (kernel, shape, rows) and the point.
    choices: BTreeMap<(String, String, u32), Values>,
}

/// A typed point as named numbers.
pub(crate) fn values_of<P: Serialize>(point: &P) -> Values {
    let value = toml::Value::try_from(point).unwrap_or_else(|e| panic!("a point is numbers: {e}"));
    let table = value.as_table().cloned().unwrap_or_default();
    table.into_iter().filter_map(|(name, v)| Some((name, u32::try_from(v.as_integer()?).ok()?))).collect()
}

/// Named numbers as a typed point; those that are missing come from `default`.
pub(crate) fn point_of<P: Serialize + DeserializeOwned>(default: &P, values: &[&Values]) -> Result<P, String> {
    let mut all = values_of(default);
    values.iter().for_each(|v| all.extend(v.iter().map(|(name, n)| (name.clone(), *n))));
    let table = all.into_iter().map(|(name, n)| (name, toml::Value::Integer(n.into()))).collect();
    toml::Value::Table(table).try_into().map_err(|e| e.to_string())
}

/// Numbers in a line: `depth=3 warps=8`.
pub fn values_text(values: &Values) -> String {
    values.iter().map(|(name, n)| format!("{name}={n}")).collect::<Vec<_>>().join(" ")
}

/// What [`values_text`] wrote.
pub fn values_parse(text: &str) -> Option<Values> {
    text.split_whitespace()
        .map(|word| word.split_once('=').and_then(|(name, n)| Some((name.to_owned(), n.parse().ok()?))))
        .collect()
}

impl Tuning {
    /// Where nothing was measured.
    pub fn untuned(arch: &str) -> Tuning {
        let points = [
            ("gemv", values_of(&GemvPoint::DEFAULT)),
            ("moe_up", without(values_of(&MoePoint::DEFAULT), "down_tiles")),
            ("moe_down", without(values_of(&MoePoint::DEFAULT), "up_tiles")),
            ("gemm_fp8", values_of(&GemmPoint::default_for(Format::Fp8))),
            ("gemm_bf16", values_of(&GemmPoint::default_for(Format::Bf16))),
            ("experts", values_of(&prefill::DEFAULT_POINT)),
        ];
        let choices = points.map(|(kernel, point)| ((kernel.to_owned(), ANY_SHAPE.to_owned(), ANY_ROWS), point));
        Tuning { arch: arch.into(), choices: choices.into() }
    }

    /// The table that comes with this program for an architecture.
    pub fn for_arch(arch: &str) -> Tuning {
        Table::for_arch(arch).map_or_else(
            || Tuning::untuned(arch),
            |table| {
                Tuning::of(&table).unwrap_or_else(|e| panic!("the table of {arch} that comes with this program: {e}"))
            },
        )
    }

    /// The points of a table; kernels that it does not have stay as they are where nothing was measured.
    ///
    /// Errors: a point is not among those that kernels can be compiled for, or points contradict one another.
    pub fn of(table: &Table) -> Result<Tuning, TuningError> {
        if !is_arch(&table.arch) {
            let (at, expected) = ("arch".into(), "one that compilers name so, like sm_121a".into());
            return Err(TuningError { at, expected, found: format!("{:?}", table.arch) });
        }
        let mut tuning = Tuning::untuned(&table.arch);
        let has = |kernel: &str| table.entry.iter().any(|e| e.kernel == kernel && e.shape == ANY_SHAPE);
        tuning.choices.retain(|(kernel, ..), _| !has(kernel));
        for Entry { kernel, shape, rows, point, .. } in &table.entry {
            let at = format!("{kernel} {shape} rows {rows}");
            legal(kernel, point).map_err(|expected| TuningError { at, expected, found: values_text(point) })?;
            tuning.choices.insert((kernel.clone(), shape.clone(), *rows), point.clone());
        }
        tuning.check()?;
        Ok(tuning)
    }

    /// The table as text: points alone.
    pub fn text(&self) -> String {
        let entry = self
            .choices
            .iter()
            .map(|((kernel, shape, rows), point)| Entry::new(kernel, shape, *rows, point.clone()))
            .collect();
        Table { arch: self.arch.clone(), entry }.text()
    }

    /// Reads a table. Errors: it is none, or see [`Tuning::of`].
    pub fn parse(text: &str) -> Result<Tuning, TuningError> {
        Tuning::of(&Table::parse(text)?)
    }

    /// The point of a kernel for a shape and a number of rows: its own, or the nearest with more rows, or that of all.
    pub fn lookup(&self, kernel: &str, shape: &str, rows: u32) -> Option<&Values> {
        [shape, ANY_SHAPE].into_iter().find_map(|shape| {
            let key = |rows| (kernel.to_owned(), shape.to_owned(), rows);
            let larger = self.choices.range(key(rows.max(1))..=key(u32::MAX)).next();
            let largest = || self.choices.range(key(1)..=key(u32::MAX)).next_back();
            let any = || self.choices.get_key_value(&key(ANY_ROWS));
            larger.or_else(largest).or_else(any).map(|(_, point)| point)
        })
    }

    /// Matrices past a few rows.
    pub fn gemv(&self, rows: u32) -> GemvPoint {
        self.point("gemv", ANY_SHAPE, rows, &GemvPoint::DEFAULT)
    }

    /// The same for a launch with these matrices. What is compiled is that of [`Tuning::gemv`].
    pub fn gemv_for(&self, rows: u32, segments: &[Segment]) -> GemvPoint {
        // Steps that are not replayed come here at every launch.
        if !self.choices.keys().any(|(kernel, shape, _)| kernel == "gemv" && shape != ANY_SHAPE) {
            return self.gemv(rows);
        }
        self.point("gemv", &matrices::shape_of(segments), rows, &GemvPoint::DEFAULT)
    }

    /// Experts of a few rows.
    pub fn moe(&self, experts: Experts, rows: u32) -> MoePoint {
        self.moe_of(&experts::shape_of(experts), rows)
    }

    fn moe_of(&self, shape: &str, rows: u32) -> MoePoint {
        let of = |kernel| self.lookup(kernel, shape, rows).cloned().unwrap_or_default();
        point_of(&MoePoint::DEFAULT, &[&of("moe_up"), &of("moe_down")]).unwrap_or(MoePoint::DEFAULT)
    }

    /// FP8 or BF16 matrices of many rows.
    pub fn gemm(&self, format: Format) -> GemmPoint {
        let kernel = if format == Format::Bf16 { "gemm_bf16" } else { "gemm_fp8" };
        self.point(kernel, ANY_SHAPE, ANY_ROWS, &GemmPoint::default_for(format))
    }

    /// Experts of many rows.
    pub fn experts(&self, sizes: MoeSizes) -> GemmPoint {
        self.point("experts", &tiles::sorted_shape(sizes), ANY_ROWS, &prefill::DEFAULT_POINT)
    }

    fn point<P: Serialize + DeserializeOwned + Copy>(&self, kernel: &str, shape: &str, rows: u32, default: &P) -> P {
        // What was parsed is legal, so it is a point.
        self.lookup(kernel, shape, rows).and_then(|values| point_of(default, &[values]).ok()).unwrap_or(*default)
    }

    /// What decides the order of sums is one for all rows, and kernels of one unit agree.
    fn check(&self) -> Result<(), TuningError> {
        // Matrices of all shapes are one model's; experts of another shape are another's.
        let of_moe = |kernel: &str| kernel == "moe_up" || kernel == "moe_down";
        let machine = |kernel: &str, shape: &str| match kernel {
            "gemv" => Some(ANY_SHAPE.to_owned()),
            _ => of_moe(kernel).then(|| format!("moe {shape}")),
        };
        let mut first: BTreeMap<String, (&(String, String, u32), &Values)> = BTreeMap::new();
        for (key, point) in &self.choices {
            let Some(machine) = machine(&key.0, &key.1) else { continue };
            let (other, expected) = *first.entry(machine).or_insert((key, point));
            if point.get("warps") != expected.get("warps") {
                let at = format!("{} {} rows {}", key.0, key.1, key.2);
                let expected = format!("as many warps as for {} rows {}, {}", other.1, other.2, values_text(expected));
                return Err(TuningError { at, expected, found: values_text(point) });
            }
        }
        let shapes = |is: &dyn Fn(&str) -> bool| -> BTreeSet<&String> {
            self.choices.keys().filter(|(kernel, ..)| is(kernel)).map(|(_, shape, _)| shape).collect()
        };
        for (shape, rows) in shapes(&of_moe).into_iter().flat_map(|s| tunables::DECODE_ROWS.map(|rows| (s, rows))) {
            let of = |kernel| self.lookup(kernel, shape, rows).cloned().unwrap_or_default();
            let (up, down) = (of("moe_up"), of("moe_down"));
            let at = format!("moe_down {shape} rows {rows}");
            if let Some((name, n)) = up.iter().find(|(name, n)| down.get(*name).is_some_and(|m| m != *n)) {
                let expected = format!("{name} = {n} as of moe_up: they are compiled as one");
                return Err(TuningError { at, expected, found: values_text(&down) });
            }
            if !self.moe_of(shape, rows).is_bounded() {
                let expected = format!("a point that compiles with moe_up's, {}", values_text(&up));
                return Err(TuningError { at, expected, found: values_text(&down) });
            }
        }
        for (shape, rows) in shapes(&|k| k == "gemv").into_iter().flat_map(|s| tunables::DECODE_ROWS.map(|r| (s, r))) {
            let unit = |shape: &str| {
                gemv::unit(rows, self.point("gemv", shape, rows, &GemvPoint::DEFAULT), Numerics::Published)
            };
            if unit(shape) != unit(ANY_SHAPE) {
                let of = |shape: &str| self.lookup("gemv", shape, rows).map(values_text).unwrap_or_default();
                let expected = format!("what is compiled to be that of all shapes, {}", of(ANY_SHAPE));
                return Err(TuningError { at: format!("gemv {shape} rows {rows}"), expected, found: of(shape) });
            }
        }
        Ok(())
    }
}

/// Whether compilers may name an architecture so.
fn is_arch(name: &str) -> bool {
    let digits = name.strip_prefix("sm_").map(|rest| rest.trim_end_matches(['a', 'f']));
    digits.is_some_and(|d| (2..=3).contains(&d.len()) && d.bytes().all(|b| b.is_ascii_digit()))
}

fn without(mut values: Values, name: &str) -> Values {
    values.remove(name);
    values
}

/// Whether a point can be compiled; otherwise what is expected of it.
fn legal(kernel: &str, point: &Values) -> Result<(), String> {
    let is = match kernel {
        "gemv" => point_of(&GemvPoint::DEFAULT, &[point]).map(|p| p.legal()),
        "moe_up" | "moe_down" => point_of(&MoePoint::DEFAULT, &[point]).map(|p| p.is_bounded()),
        "gemm_fp8" => point_of(&GemmPoint::default_for(Format::Fp8), &[point]).map(|p| p.legal(Format::Fp8)),
        "gemm_bf16" => point_of(&GemmPoint::default_for(Format::Bf16), &[point]).map(|p| p.legal(Format::Bf16)),
        "experts" => point_of(&prefill::DEFAULT_POINT, &[point]).map(prefill::legal),
        other => Err(format!("no kernel {other} is tuned")),
    };
    match is {
        Ok(true) => Ok(()),
        Ok(false) => Err("a point that compiles".into()),
        Err(e) => Err(format!("numbers of this kernel ({e})")),
    }
}
