//! Choices among equal kernels, as a text table: one per architecture, part of an artifact's identity.
//!
//! A table decides what is compiled and how it is launched; it never changes what is computed beyond the order of
//! sums. At run time it is only read: all ranks have the same.

use serde::{Deserialize, Serialize};

use crate::ops::dense_gemm::gemm::GemmPoint;
use crate::ops::dense_gemm::gemv::GemvPoint;
use crate::ops::moe_gemm::decode::MoePoint;
use crate::ops::moe_gemm::prefill;
use dsv4_model::layout::Format;

/// Why a table is refused.
#[derive(Debug, thiserror::Error)]
#[error(
    "tuning table: expected {expected}, found {found}\n  help: compile by another with `dsv4c kernels ART --tuning FILE`, or by this program's without it"
)]
pub struct TuningError {
    /// What it must be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// The points of all tuned kernels on one architecture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuning {
    /// As compilers name it: `sm_121a`.
    pub arch: String,
    /// Matrices past a few rows.
    pub gemv: GemvPoint,
    /// Experts of a few rows.
    pub moe: MoePoint,
    /// FP8 matrices of many rows.
    pub gemm_fp8: GemmPoint,
    /// BF16 matrices of many rows.
    pub gemm_bf16: GemmPoint,
    /// Experts of many rows.
    pub experts: GemmPoint,
}

impl Tuning {
    /// Where nothing was measured.
    pub fn untuned(arch: &str) -> Tuning {
        Tuning {
            arch: arch.into(),
            gemv: GemvPoint::DEFAULT,
            moe: MoePoint::DEFAULT,
            gemm_fp8: GemmPoint::default_for(Format::Fp8),
            gemm_bf16: GemmPoint::default_for(Format::Bf16),
            experts: prefill::DEFAULT_POINT,
        }
    }

    /// The table that comes with this program for an architecture.
    pub fn for_arch(arch: &str) -> Tuning {
        Tuning::untuned(arch)
    }

    /// The table as text.
    pub fn text(&self) -> String {
        toml::to_string(self).unwrap_or_else(|e| panic!("a table of numbers as text: {e}"))
    }

    /// Reads a table. Errors: it is none, or a point is not among those that kernels can be compiled for.
    pub fn parse(text: &str) -> Result<Tuning, TuningError> {
        let table: Tuning = toml::from_str(text)
            .map_err(|e| TuningError { expected: "a table of this version".into(), found: e.to_string() })?;
        let legal = [
            ("arch", is_arch(&table.arch)),
            ("gemv", table.gemv.legal()),
            ("moe", table.moe.is_bounded()),
            ("gemm_fp8", table.gemm_fp8.legal(Format::Fp8)),
            ("gemm_bf16", table.gemm_bf16.legal(Format::Bf16)),
            ("experts", prefill::legal(table.experts)),
        ];
        for (name, legal) in legal {
            if !legal {
                let expected = format!("{name} that kernels can be compiled for");
                return Err(TuningError { expected, found: text.trim().replace('\n', ", ") });
            }
        }
        Ok(table)
    }
}

/// Whether compilers may name an architecture so.
fn is_arch(name: &str) -> bool {
    let digits = name.strip_prefix("sm_").map(|rest| rest.trim_end_matches(['a', 'f']));
    digits.is_some_and(|d| (2..=3).contains(&d.len()) && d.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_survives_its_text() {
        let table = Tuning::untuned("sm_121a");
        assert_eq!(Tuning::parse(&table.text()).unwrap(), table);
    }

    #[test]
    fn what_cannot_be_compiled_is_refused() {
        let good = Tuning::untuned("sm_90a");
        let wrong = |table: Tuning, name: &str| {
            let error = Tuning::parse(&table.text()).unwrap_err().to_string();
            assert!(error.contains(&format!("expected {name} that")), "{error}");
        };
        wrong(Tuning { arch: "sm_90a\n".into(), ..good.clone() }, "arch");
        wrong(Tuning { gemv: GemvPoint { warps: 7, ..good.gemv }, ..good.clone() }, "gemv");
        wrong(Tuning { moe: MoePoint { warps: 7, ..good.moe }, ..good.clone() }, "moe");
        wrong(Tuning { moe: MoePoint { ahead: 5, ..good.moe }, ..good.clone() }, "moe");
        let error = Tuning::parse(&(good.text() + "colour = 3\n")).unwrap_err().to_string();
        assert!(error.contains("colour"), "{error}");
        // Every number of every point, too large for any sum or product of it.
        for (name, of) in [("gemm_fp8", good.gemm_fp8), ("gemm_bf16", good.gemm_bf16), ("experts", good.experts)] {
            for huge in [u32::MAX, 1 << 28] {
                let points = [
                    GemmPoint { tokens: huge, ..of },
                    GemmPoint { outs: huge / 64 * 64, ..of },
                    GemmPoint { warps_m: huge, ..of },
                    GemmPoint { stages: huge, ..of },
                    GemmPoint { group: huge, ..of },
                ];
                for point in points {
                    let mut table = good.clone();
                    *match name {
                        "gemm_fp8" => &mut table.gemm_fp8,
                        "gemm_bf16" => &mut table.gemm_bf16,
                        _ => &mut table.experts,
                    } = point;
                    wrong(table, name);
                }
            }
        }
    }
}
