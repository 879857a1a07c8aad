//! What can be wrong with a configuration or a partition.

/// Errors of the model description; all of them are bad input (exit code 3).
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// config.json is not JSON.
    #[error("config.json: not valid JSON: {source}\n  help: fetch config.json again")]
    Json { source: serde_json::Error },
    /// A field is missing or has a value this model family does not have.
    #[error(
        "config.json: {field}: expected {expected}, found {found}\n  help: only DeepSeek-V4 models in their published formats are supported"
    )]
    Field { field: String, expected: String, found: String },
    /// A tensor cannot be cut among this many ranks.
    #[error("tensor {tensor}: dimension of {len} cannot be cut into {ranks} ranks in whole units of {unit}\n  help: {help}", help = .fits.as_str())]
    Indivisible { tensor: String, len: u64, unit: u64, ranks: u32, fits: String },
    /// A tensor-parallel size other than 1, 2, 4, 8.
    #[error("tensor-parallel size {found}: expected 1, 2, 4 or 8\n  help: choose one of these with --tp")]
    Tp { found: u32 },
    /// Layers asked for that the model does not have.
    #[error(
        "layer list {found}: expected layers below {layers}, ascending, at least one\n  help: give --layers N or a list such as 2,3"
    )]
    Layers { found: String, layers: u32 },
}
