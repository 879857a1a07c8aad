//! Everything that can end a command, with its exit code.

use std::io;
use std::path::PathBuf;

use dsv4_format::FormatError;
use dsv4_kernels::device::DeviceError;
use dsv4_kernels::gpu::GpuError;
use dsv4_kernels::gpu::shape::ShapeError;
use dsv4_kernels::gpu::weights::DeviceWeightsError;
use dsv4_kernels::reference::ReferenceError;
use dsv4_kernels::weights::WeightsError;
use dsv4_model::ModelError;

use crate::chat::ChatError;
use crate::ranks::PeerError;
use crate::ranks::wire::WireError;
use crate::server::ServerError;
use crate::tokenizer::TokenizerError;

/// Errors of `dsv4-run`.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Options that do not fit together.
    #[error("{0}")]
    Usage(String),
    /// The artifact's files.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The artifact's model configuration.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The loaded tensors.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The artifact was made for another description of the model.
    #[error(
        "{contract} contract of the artifact differs from this program's in line {line}\n  this program: {ours}\n  the artifact: {theirs}\n  help: pack the checkpoint again with the dsv4c of this version"
    )]
    Contract { contract: &'static str, line: usize, ours: String, theirs: String },
    /// Text was asked of an artifact that has no tokenizer.
    #[error(
        "{artifact}: no tokenizer.json in the artifact, which {verb} needs\n  help: pack a checkpoint that has one beside its weights, or use `logits --tokens`"
    )]
    NoTokenizer { artifact: PathBuf, verb: &'static str },
    /// Drafts were asked of a model that cannot make them.
    #[error("{flag}: {reason}\n  help: leave {flag} out")]
    NoDraft { flag: &'static str, reason: &'static str },
    /// A tokenizer or generation_config that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A file with a conversation that cannot be read as one.
    #[error("{file}: {source}")]
    Conversation { file: PathBuf, source: ChatError },
    /// A conversation that cannot be encoded.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// An input file with the wrong content.
    #[error("{file}: expected {expected}, found {found}\n  help: {help}")]
    Input { file: PathBuf, expected: String, found: String, help: &'static str },
    /// The model computed something that is no number.
    #[error(
        "logit of token {token} for position {position}: expected a finite number, found {found}\n  help: run `dsv4c verify`; if the artifact is as packed, the checkpoint's weights are damaged"
    )]
    NotFinite {
        /// Position the token would have.
        position: usize,
        /// First such token.
        token: usize,
        /// Its logit.
        found: f32,
    },
    /// More tokens than the model's or the command's context.
    #[error(
        "{tokens} tokens leave no room in a context of {context}\n  help: shorten the prompt, or raise --max-context up to the model's {model}"
    )]
    Context { tokens: usize, context: usize, model: u64 },
    /// Reading or writing a file of the user's.
    #[error("{action} {file}: {source}\n  help: {help}")]
    Io { action: &'static str, file: PathBuf, source: io::Error, help: &'static str },
    /// Another rank.
    #[error(transparent)]
    Peer(#[from] PeerError),
    /// The compute backend.
    #[error(transparent)]
    Backend(#[from] ReferenceError),
    /// A command of rank 0 that cannot be read.
    #[error("command from rank 0: {0}\n  help: all ranks must run the same version of dsv4-run")]
    Command(#[from] WireError),
    /// Weights and caches do not fit into this machine's memory.
    #[error("not enough memory: {needed} needed, {usable} usable\n{table}  help: {help}")]
    DoesNotFit {
        /// All ranks here and the reserve.
        needed: String,
        /// What there is.
        usable: String,
        /// The arithmetic, lines of text.
        table: String,
        /// What would fit.
        help: String,
    },
    /// The HTTP server.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// Preflight found what refuses a start.
    #[error("{place}: refused by {refusals}\n  help: {help}")]
    Preflight {
        /// The artifact, or the machine.
        place: String,
        /// Names of the findings.
        refusals: String,
        /// What to do about the first.
        help: String,
        /// 3 for files, 4 for memory and the machine.
        code: u8,
    },
    /// The GPU, its driver, its memory.
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A step on the GPU.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// The artifact has no kernels for this GPU.
    #[error(
        "{artifact}: expected kernels for {gpu} ({arch}), found {found}\n  help: run `dsv4c kernels {artifact} --arch {arch}`, or run with --backend cpu"
    )]
    NoKernels {
        artifact: PathBuf,
        /// The GPU's name.
        gpu: String,
        /// What kernels for it are compiled for.
        arch: String,
        /// What there are kernels for.
        found: String,
    },
    /// The artifact's kernels for this GPU are not those that this program launches.
    #[error(
        "{artifact}: {what} for {arch}: expected it in the artifact, found {found}\n  help: the artifact's kernels were made by another version: run `dsv4c kernels {artifact} --arch {arch}`, or run with --backend cpu"
    )]
    NoKernel { artifact: PathBuf, what: String, arch: String, found: String },
    /// Threads for the CPU backend.
    #[error("cannot start {threads} compute threads: {reason}\n  help: give a smaller --threads")]
    Threads { threads: usize, reason: String },
}

impl RunError {
    /// Whether the ranks are no longer in step: one is gone, or this one failed within a step.
    pub fn loses_ranks(&self) -> bool {
        matches!(self, RunError::Peer(_) | RunError::Backend(_) | RunError::Gpu(_) | RunError::Command(_))
    }

    /// 2 usage, 3 input or artifact, 4 device or memory, 5 peer.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Usage(_) => 2,
            RunError::Server(ServerError::NoKey { .. } | ServerError::Origin { .. }) => 2,
            RunError::Server(ServerError::Bind { .. } | ServerError::Serve { .. }) => 4,
            RunError::Preflight { code, .. } => *code,
            // The artifact's kernels are not this program's: no fault of the device.
            RunError::Device(DeviceError::NoKernel { .. })
            | RunError::Gpu(GpuError::Device(DeviceError::NoKernel { .. })) => 3,
            RunError::Format(
                FormatError::Memory { .. }
                | FormatError::LowMemory { .. }
                | FormatError::Thread { .. }
                | FormatError::Uring { .. },
            )
            | RunError::Threads { .. }
            | RunError::Device(_)
            | RunError::Gpu(GpuError::Device(_))
            | RunError::DoesNotFit { .. } => 4,
            // A local rank that could not start says why; its reason is the group's.
            RunError::Peer(PeerError::Child { code, .. }) => match code {
                Some(code @ 3..=4) => *code as u8,
                _ => 5,
            },
            RunError::Peer(_) | RunError::Backend(_) | RunError::Gpu(_) | RunError::Command(_) => 5,
            _ => 3,
        }
    }
}

impl From<DeviceWeightsError> for RunError {
    fn from(error: DeviceWeightsError) -> RunError {
        match error {
            DeviceWeightsError::Weights(error) => error.into(),
            DeviceWeightsError::Device(error) => error.into(),
        }
    }
}

/// An error's message without what to do, for quoting in another.
pub fn fact(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    text.split_once("\n  help: ").map_or(text.clone(), |(fact, _)| fact.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_are_not_there_are_the_artifacts_fault() {
        let missing = || DeviceError::NoKernel { kernel: "attend".into(), unit: "cubin".into() };
        assert_eq!(RunError::from(missing()).exit_code(), 3);
        assert_eq!(RunError::from(GpuError::from(missing())).exit_code(), 3);
        assert_eq!(RunError::from(DeviceError::NoDriver).exit_code(), 4);
        assert_eq!(RunError::from(GpuError::from(DeviceError::NoDriver)).exit_code(), 4);
    }
}
