//! The repository's tables: points with what they were predicted to take and what they took.
//!
//! The same text format as in artifacts, with more columns. Numbers of entries are bounded by the text's length.

use serde::Deserialize;

use super::{TuningError, Values};

/// One choice.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// The kernel, as [`super::tunables`] names it.
    pub kernel: String,
    /// Its shape, or `*` for all others.
    pub shape: String,
    /// Rows up to which it holds, or 0 for all.
    pub rows: u32,
    /// The point.
    pub point: Values,
    /// How it was found.
    #[serde(default)]
    pub source: Option<Source>,
    /// By the cost model, for the shape (for `*`: all of a step's launches).
    #[serde(default)]
    pub predicted_us: Option<f64>,
    /// On the GPU of that name.
    #[serde(default)]
    pub measured_us: Option<f64>,
    /// Which GPU.
    #[serde(default)]
    pub gpu: Option<String>,
}

/// How a point was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// It took the least time on a GPU of the architecture.
    Measured,
    /// The cost model says that it takes the least.
    Estimated,
}

impl Source {
    /// As tables have it.
    pub fn name(self) -> &'static str {
        match self {
            Source::Measured => "measured",
            Source::Estimated => "estimated",
        }
    }
}

/// All choices for an architecture.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// As compilers name it: `sm_121a`.
    pub arch: String,
    /// Ascending by kernel, shape and rows.
    #[serde(default)]
    pub entry: Vec<Entry>,
}

impl Entry {
    /// A point without times.
    pub fn new(kernel: &str, shape: &str, rows: u32, point: Values) -> Entry {
        Entry {
            kernel: kernel.into(),
            shape: shape.into(),
            rows,
            point,
            source: None,
            predicted_us: None,
            measured_us: None,
            gpu: None,
        }
    }
}

impl Table {
    /// The one that comes with this program.
    pub fn for_arch(arch: &str) -> Option<Table> {
        let text = match arch {
            "sm_121a" => include_str!("../../tuning/sm_121a.toml"),
            "sm_90a" => include_str!("../../tuning/sm_90a.toml"),
            _ => return None,
        };
        Some(Table::parse(text).unwrap_or_else(|e| panic!("the table of {arch} that comes with this program: {e}")))
    }

    /// Reads a text. Errors: it is no table.
    pub fn parse(text: &str) -> Result<Table, TuningError> {
        toml::from_str(text).map_err(|e| TuningError {
            at: "text".into(),
            expected: "a table of this version".into(),
            found: e.to_string().trim().to_owned(),
        })
    }

    /// The text.
    pub fn text(&self) -> String {
        let quoted = |text: &str| toml::Value::String(text.to_owned()).to_string();
        let mut out = format!("arch = {}\n", quoted(&self.arch));
        for entry in &self.entry {
            let point: Vec<String> = entry.point.iter().map(|(name, n)| format!("{name} = {n}")).collect();
            out += &format!(
                "\n[[entry]]\nkernel = {}\nshape = {}\nrows = {}\npoint = {{ {} }}\n",
                quoted(&entry.kernel),
                quoted(&entry.shape),
                entry.rows,
                point.join(", ")
            );
            if let Some(source) = entry.source {
                out += &format!("source = \"{}\"\n", source.name());
            }
            for (name, us) in [("predicted_us", entry.predicted_us), ("measured_us", entry.measured_us)] {
                out += &us.map_or(String::new(), |us| format!("{name} = {us:.2}\n"));
            }
            out += &entry.gpu.as_ref().map_or(String::new(), |gpu| format!("gpu = {}\n", quoted(gpu)));
        }
        out
    }
}
