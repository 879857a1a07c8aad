//! The `.dsv4` artifact: files, sections, blocks and hashes.
//!
//! A packer plans each rank's file ([`RankLayout`]), writes it through a [`Draft`] and commits;
//! a runtime opens the result ([`Artifact`]), checks it and streams a rank into an [`Arena`].
//! Every byte of every file is described in `docs/format.md`.
//!
//! Invariants: what has the final name is complete; no byte of a rank file is handed out before its
//! block's hash matched; nothing but RECEIPT.json depends on time, host, path or thread count.
//! Absent on purpose: models (tensor names and dtypes are opaque text here), weight compression,
//! what a signature says (SIGNATURE has the form of one; whose it is, is the caller's to judge).

mod artifact;
mod check;
mod commit;
mod draft;
mod error;
mod header;
mod identity;
pub mod io;
mod journal;
mod kernels;
mod layout;
mod load;
mod manifest;
mod map;
mod marks;
mod members;
mod minisign;
mod parallel;
mod partial;
mod progress;
mod rank_writer;
mod receive;
mod section;
mod signature;
mod tree_hash;
mod verify;

pub use artifact::Artifact;
pub use commit::{CommitInput, Committed, Outcome};
pub use draft::{Draft, DraftOptions, Found, JournalOptions};
pub use error::{FormatError, SuperblockCopy};
pub use header::{BLOCK_BYTES, FORMAT_VERSION, MANIFEST_BYTES_MAX, SECTION_ALIGN};
pub use kernels::{ArchKernels, KernelInput, NewKernels};
pub use layout::{Place, RankLayout, SectionLayout, SectionPlan, TensorPlan};
pub use load::{
    Arena, Block, CACHED_BYTES_MAX, Destination, Device, Engine, Floor, InPlace, Io, LoadOptions, LoadReport, Look,
    RankReader, SLOTS, Staged,
};
pub use manifest::{
    ArtifactId, Canary, Digest, KernelRecord, KernelSetId, Manifest, Member, RankFile, Section, SourceId, StoredFile,
    Tensor, WeightSetId,
};
pub use marks::Marks;
pub use partial::{Partial, require_room};
pub use progress::{NoProgress, Progress};
pub use rank_writer::RankWriter;
pub use receive::Receiving;
pub use signature::SIGNATURE_BYTES_MAX;
pub use tree_hash::TreeHash;
pub use verify::VerifyReport;
