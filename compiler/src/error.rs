//! Everything that can go wrong in the compiler, each message as
//! what / where / expected / found / what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use dsv4_format::FormatError;
use dsv4_kernels::gpu::shape::ShapeError;
use dsv4_model::ModelError;

/// Shown of each kind of tensor mismatch; the rest is only counted.
const SHOWN_MAX: usize = 20;

/// Errors of all verbs.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The configuration is of another model, or the model cannot be cut as asked.
    #[error("{at}: {source}", at = .at.display())]
    Model {
        at: PathBuf,
        #[source]
        source: ModelError,
    },
    /// Reading a shard, or writing or reading an artifact.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Any other file operation.
    #[error("{path}: cannot {action}: {source}\n  help: check the path, its permissions and the disk", path = .path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    /// Nothing of what was written stays.
    #[error("{path}: the disk is full: {needed} bytes are needed for all of it\n  help: free space or choose a directory on another file system", path = .path.display())]
    NoSpace { path: PathBuf, needed: u64 },
    /// The directory has not the files of a checkpoint.
    #[error("{dir}: not a checkpoint: expected {expected}, found {found}\n  help: give the directory that holds config.json and the *.safetensors files", dir = .dir.display())]
    NotACheckpoint { dir: PathBuf, expected: String, found: String },
    /// A small file is not small.
    #[error("{file}: length is at least {found} bytes, expected at most {limit}\n  help: this is not such a file; fetch it again", file = .file.display())]
    TooLarge { file: PathBuf, limit: u64, found: u64 },
    /// A shard's data ends before its header says so.
    #[error("{file}: truncated: expected {expected} bytes, found {found}, {missing} are missing\n  help: fetch this shard again", file = .file.display(), missing = .expected - .found)]
    Truncated { file: PathBuf, expected: u64, found: u64 },
    /// A safetensors header that is malformed or contradicts itself.
    #[error("{file}: header: {at}: expected {expected}, found {found}\n  help: the file is damaged or not a safetensors file; fetch it again", file = .file.display())]
    Header { file: PathBuf, at: String, expected: String, found: String },
    /// model.safetensors.index.json is malformed or names what the shards do not have.
    #[error("{file}: {at}: expected {expected}, found {found}\n  help: the index and the shards are not of one download; fetch them again", file = .file.display())]
    Index { file: PathBuf, at: String, expected: String, found: String },
    /// The tensors are not those of the model that config.json describes.
    #[error("{dir}: the tensors are not those of the model in config.json{mismatch}\n  help: config.json and the shards must be of one DeepSeek-V4 release in its published FP8/FP4 formats", dir = .dir.display())]
    Tensors { dir: PathBuf, mismatch: Box<Mismatch> },
    /// So many more or fewer that naming them would not help.
    #[error("{dir}: the tensors are not those of the model in config.json: expected {expected} of them, found {found}\n  help: config.json and the shards must be of one DeepSeek-V4 release in its published FP8/FP4 formats", dir = .dir.display())]
    TensorCount { dir: PathBuf, expected: u64, found: u64 },
    /// A small file beside config.json that the artifact could not use.
    #[error("{file}: {at}: expected {expected}, found {found}\n  help: the file is damaged or of another model; fetch it again, or move it away to pack without it", file = .file.display())]
    SideFile { file: PathBuf, at: String, expected: String, found: String },
    /// A list of SHA-256 sums that is malformed or not of this checkpoint.
    #[error("{file}: {at}: expected {expected}, found {found}\n  help: give the list that `sha256sum *.safetensors` writes in the checkpoint's directory", file = .file.display())]
    SumList { file: PathBuf, at: String, expected: String, found: String },
    /// A file with another SHA-256 sum than its line says.
    #[error("{file}: SHA-256 is {found}, expected {expected}\n  help: the file is damaged or of another release; fetch it again", file = .file.display())]
    Sum { file: PathBuf, expected: String, found: String },
    /// A stored value no kernel could use.
    #[error(
        "{tensor}: element {element} is {found}, expected {expected}\n  help: the checkpoint is damaged at this place; fetch the shard that holds this tensor again"
    )]
    Value { tensor: String, element: u64, expected: String, found: String },
    /// The output's name is taken.
    #[error("{path}: expected a free name, found {found}\n  help: choose another name, or move away what is there", path = .path.display())]
    Occupied { path: PathBuf, found: &'static str },
    /// An artifact with the output's name that cannot become the one asked for.
    #[error("{path}: an artifact is already here: {what}: expected {expected}, found {found}\n  help: choose another name, or replace it with --force", path = .path.display())]
    OtherArtifact { path: PathBuf, what: &'static str, expected: String, found: String },
    /// An artifact with the output's name and the same model, but with other kernels than asked for.
    #[error("{path}: an artifact is already here: kernels: expected {expected}, found {found}\n  help: `dsv4c kernels` changes the kernels alone; choose another name, or pack everything again with --force", path = .path.display())]
    OtherKernels { path: PathBuf, expected: String, found: String },
    /// An artifact whose weights other kernels than this program's were made for.
    #[error("{path}: the weights' contract is {found}, expected {expected}\n  help: they are laid out for another version of this program: use that one, or pack the checkpoint again", path = .path.display())]
    OtherWeights { path: PathBuf, expected: String, found: String },
    /// A tuning table that cannot be used, or measurements for one.
    #[error("{file}: {source}", file = .file.display())]
    Tuning { file: PathBuf, source: dsv4_kernels::tuning::TuningError },
    /// A model that there are no kernels for.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The compiler of kernels is not on this machine.
    #[error(
        "NVRTC {build}, the compiler of GPU kernels: expected this very build in {expected}, found {found}\n  help: `scripts/setup cuda` fetches it (90 MB; no GPU, no toolkit); or name its directory with --nvrtc; or pack for the CPU alone with --arch none"
    )]
    NoNvrtc { build: &'static str, expected: String, found: String },
    /// A kernel that does not compile, or is not as all must be.
    #[error("kernels: {family} for {arch}: expected {expected}, found {found}\n  help: {help}")]
    Kernel { family: &'static str, arch: String, expected: String, found: String, help: &'static str },
    /// A key file that is not one, or of the wrong kind.
    #[error("{file}: expected {expected}, found {found}\n  help: {help}", file = .file.display())]
    Key { file: PathBuf, expected: &'static str, found: String, help: &'static str },
    /// A signature that is missing, of another key, or wrong.
    #[error("{file}: expected {expected}, found {found}\n  help: {help}", file = .file.display())]
    Signature { file: PathBuf, expected: String, found: String, help: &'static str },
    /// Two artifacts that were compared. What differs is the result, not part of the message.
    #[error("{b}: the artifact differs: expected that of {a}, {expected}, found {found}\n  help: stdout says what differs", a = .a.display(), b = .b.display())]
    Differs { a: PathBuf, b: PathBuf, expected: String, found: String },
    /// Results could not be written, for another reason than a reader that went away.
    #[error("standard output: cannot write: {source}\n  help: check where it leads, and that disk's free space")]
    Stdout { source: io::Error },
    /// A connection that cannot be made, broke or stalled.
    #[error("{peer}: cannot {action}: {source}\n  help: {help}")]
    Network { peer: String, action: &'static str, source: io::Error, help: &'static str },
    /// A peer that does not keep to the protocol, or is another than it should be.
    #[error("{peer}: {at}: expected {expected}, found {found}\n  help: {help}")]
    Peer { peer: String, at: &'static str, expected: String, found: String, help: &'static str },
    /// A peer that said why it stops.
    #[error(
        "{peer}: expected it to go on, found that it refuses: {reason}\n  help: the reason is of the other machine; what to do is to be done there"
    )]
    Refused { peer: String, reason: String },
    /// The GPU, its driver or its memory.
    #[error(transparent)]
    Device(#[from] dsv4_kernels::device::DeviceError),
    /// A request that cannot be meant.
    #[error("{what}: expected {expected}, found {found}\n  help: {help}")]
    Usage { what: &'static str, expected: String, found: String, help: &'static str },
}

impl CompileError {
    /// Process exit code: 2 usage, 3 input or artifact, 4 memory, 5 peer.
    pub fn exit_code(&self) -> u8 {
        match self {
            CompileError::Usage { .. } | CompileError::Model { source: ModelError::Tp { .. }, .. } => 2,
            CompileError::Format(error) => match error {
                FormatError::Kept { source, .. } => format_exit_code(source),
                error => format_exit_code(error),
            },
            CompileError::Device(_) => 4,
            CompileError::Network { .. } | CompileError::Peer { .. } | CompileError::Refused { .. } => 5,
            _ => 3,
        }
    }

    pub(crate) fn model(at: &Path) -> impl FnOnce(ModelError) -> CompileError + '_ {
        move |source| CompileError::Model { at: at.to_path_buf(), source }
    }

    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> CompileError + 'a {
        move |source| CompileError::Io { action, path: path.to_path_buf(), source }
    }
}

fn format_exit_code(error: &FormatError) -> u8 {
    match error {
        FormatError::Memory { .. }
        | FormatError::LowMemory { .. }
        | FormatError::Thread { .. }
        | FormatError::Uring { .. } => 4,
        _ => 3,
    }
}

/// How the tensors of a checkpoint differ from the table, all differences together.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Names the table has and the checkpoint has not.
    pub missing: Vec<String>,
    /// `name in file` the table has not.
    pub extra: Vec<String>,
    /// `name in file: expected, found`.
    pub wrong_shape: Vec<String>,
    /// `name in file: expected, found`.
    pub wrong_dtype: Vec<String>,
}

impl Mismatch {
    /// Whether the checkpoint is exactly the table.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.extra.is_empty() && self.wrong_shape.is_empty() && self.wrong_dtype.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [
            ("missing", &self.missing),
            ("not of this model", &self.extra),
            ("with another shape", &self.wrong_shape),
            ("with another dtype", &self.wrong_dtype),
        ];
        for (kind, list) in kinds {
            if list.is_empty() {
                continue;
            }
            write!(f, "\n  {} {kind}:", list.len())?;
            for item in list.iter().take(SHOWN_MAX) {
                write!(f, "\n    {item}")?;
            }
            if list.len() > SHOWN_MAX {
                write!(f, "\n    and {} more", list.len() - SHOWN_MAX)?;
            }
        }
        Ok(())
    }
}
