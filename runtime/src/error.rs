//! Everything that can end a command, with its exit code.

use std::io;
use std::path::PathBuf;

use dsv4_format::FormatError;
use dsv4_kernels::reference::ReferenceError;
use dsv4_kernels::weights::WeightsError;
use dsv4_model::ModelError;

use crate::chat::ChatError;
use crate::ranks::PeerError;
use crate::ranks::wire::WireError;
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
    #[error("--draft {asked}: {reason}\n  help: leave --draft out")]
    NoDraft { asked: usize, reason: String },
    /// A tokenizer or generation_config that cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A conversation that cannot be encoded.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// An input file with the wrong content.
    #[error("{file}: expected {expected}, found {found}\n  help: {help}")]
    Input { file: PathBuf, expected: String, found: String, help: &'static str },
    /// More tokens than the model's or the command's context.
    #[error(
        "{tokens} tokens do not fit into a context of {context}\n  help: shorten the prompt, or raise --max-context up to the model's {model}"
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
    /// The GPU backend was asked for.
    #[error("--backend cuda: this version computes on the CPU only\n  help: leave --backend out, or use --backend cpu")]
    NoCuda,
    /// Threads for the CPU backend.
    #[error("cannot start {threads} compute threads: {reason}\n  help: give a smaller --threads")]
    Threads { threads: usize, reason: String },
}

impl RunError {
    /// Whether the ranks are no longer in step: one is gone, or this one failed within a step.
    pub fn loses_ranks(&self) -> bool {
        matches!(self, RunError::Peer(_) | RunError::Backend(_) | RunError::Command(_))
    }

    /// 2 usage, 3 input or artifact, 4 device or memory, 5 peer.
    pub fn exit_code(&self) -> u8 {
        match self {
            RunError::Usage(_) => 2,
            RunError::Format(FormatError::Memory { .. }) | RunError::Threads { .. } | RunError::NoCuda => 4,
            RunError::Peer(_) | RunError::Backend(_) | RunError::Command(_) => 5,
            _ => 3,
        }
    }
}
