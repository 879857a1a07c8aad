//! What a sound archive must also mean. Run by the writer before writing and by the reader after
//! reading, so neither can disagree with the other about what is allowed.
//!
//! Offsets are not judged but recomputed: the layout of the named tensors is made again and must be
//! the recorded one, which gives order, alignment, disjointness, bounds and "gaps are padding" at once.

use std::fmt::Display;
use std::path::Path;

use crate::error::FormatError;
use crate::header::{
    CANARY_TOKENS_MAX, CONFIG_BYTES_MAX, KERNELS_PREFIX, MEMBER_RAW_BYTES_MAX, MEMBERS_MAX, META_FILE, RANKS_MAX,
    STORED_FILE_BYTES_MAX,
};
use crate::layout::{RankLayout, SectionPlan, TensorPlan, is_name};
use crate::manifest::{Manifest, Member, RankFile, StoredFile};
use crate::section::{NO_ROOT, block_count, fold};

/// The member of `kernels.<arch>` that holds the tuning table's text.
pub(crate) const TUNING_MEMBER: &str = "tuning.toml";

/// Returns every rank's layout. `file` is where the manifest came from, for messages.
pub(crate) fn check(manifest: &Manifest, file: &Path) -> Result<Vec<RankLayout>, FormatError> {
    let check = Check { file, weightless: manifest.weights_seed.is_some() };
    let tp = manifest.tp;
    check.that((1..=RANKS_MAX).contains(&tp), "tp", || format!("1 to {RANKS_MAX}"), tp)?;
    check.equal("rank count", tp as usize, manifest.ranks.len())?;
    let mut layouts = Vec::with_capacity(manifest.ranks.len());
    for (index, rank) in (0..tp).zip(&manifest.ranks) {
        layouts.push(check.rank(index, rank)?);
    }
    let config_len = manifest.config_json.len();
    let config_ok = (1..=CONFIG_BYTES_MAX).contains(&config_len);
    check.that(config_ok, "config length", || format!("1 to {CONFIG_BYTES_MAX}"), config_len)?;
    check.equal("name of the meta file", META_FILE, manifest.meta.name.as_str())?;
    check.stored(&manifest.meta)?;
    check.kernels(manifest)?;
    if let Some(canary) = &manifest.canary {
        check.that(!check.weightless, "canary", || "none without weights".into(), "one")?;
        let tokens = canary.tokens.len();
        let tokens_ok = (1..=CANARY_TOKENS_MAX).contains(&tokens);
        check.that(tokens_ok, "canary tokens", || format!("1 to {CANARY_TOKENS_MAX}"), tokens)?;
        let finite = canary.logits.iter().all(|x| x.is_finite());
        check.that(
            finite && !canary.logits.is_empty(),
            "canary logits",
            || "finite numbers".into(),
            "none, or others",
        )?;
    }
    let (weight_set_id, kernel_set_id, artifact_id) = manifest.computed_ids();
    check.equal("weight set id", weight_set_id, manifest.weight_set_id)?;
    check.equal("kernel set id", kernel_set_id, manifest.kernel_set_id)?;
    check.equal("artifact id", artifact_id, manifest.artifact_id)?;
    Ok(layouts)
}

struct Check<'a> {
    file: &'a Path,
    /// Whether there are no rank files, and nothing to be hashed.
    weightless: bool,
}

impl Check<'_> {
    fn that(
        &self,
        holds: bool,
        at: impl Display,
        expected: impl FnOnce() -> String,
        found: impl Display,
    ) -> Result<(), FormatError> {
        if holds {
            return Ok(());
        }
        Err(FormatError::Manifest {
            file: self.file.to_path_buf(),
            at: at.to_string(),
            expected: expected(),
            found: found.to_string(),
        })
    }

    fn equal<T: PartialEq + Display>(&self, at: impl Display, expected: T, found: T) -> Result<(), FormatError> {
        self.that(expected == found, at, || expected.to_string(), &found)
    }

    fn rank(&self, index: u32, rank: &RankFile) -> Result<RankLayout, FormatError> {
        let at = |what: &str| format!("rank {index}: {what}");
        self.equal(at("number"), index, rank.rank)?;
        let layout = RankLayout::new(&plans(rank)).map_err(|e| match e {
            FormatError::Layout { section, tensor, expected, found } => FormatError::Manifest {
                file: self.file.to_path_buf(),
                at: at(&format!("section {section:?}, tensor {tensor:?}")),
                expected,
                found,
            },
            other => other,
        })?;
        self.equal(at("file length"), layout.file_len(), rank.file_len)?;
        self.equal(at("arena bytes"), layout.arena_bytes(), rank.arena_bytes)?;
        for (placed, section) in layout.sections().iter().zip(&rank.sections) {
            let at = |what: &str| at(&format!("section {}: {what}", section.name));
            self.equal(at("offset"), placed.offset, section.offset)?;
            self.equal(at("length"), placed.len, section.len)?;
            for (placed, tensor) in placed.tensors.iter().zip(&section.tensors) {
                let at = format!("tensor {}: offset", tensor.name);
                self.equal(at, placed.offset, tensor.offset)?;
            }
            let blocks = if self.weightless { 0 } else { block_count(section.len) };
            self.equal(at("block count"), blocks, section.blocks.len() as u64)?;
            self.equal(at("root"), fold(&section.blocks).unwrap_or(NO_ROOT), section.root)?;
        }
        Ok(layout)
    }

    fn stored(&self, stored: &StoredFile) -> Result<(), FormatError> {
        let name = &stored.name;
        let count = stored.members.len();
        self.that(count <= MEMBERS_MAX, format!("{name}: member count"), || format!("at most {MEMBERS_MAX}"), count)?;
        let len_ok = stored.len <= STORED_FILE_BYTES_MAX;
        self.that(len_ok, format!("{name}: length"), || format!("at most {STORED_FILE_BYTES_MAX}"), stored.len)?;
        let mut end = 0u64;
        let mut last: Option<&Member> = None;
        for member in &stored.members {
            let at = |what: &str| format!("{name}: member {:?}: {what}", member.name);
            let name_ok = is_name(&member.name) && !member.name.contains('/');
            self.that(name_ok, at("name"), || "printable ASCII without /".into(), "others")?;
            let sorted = last.is_none_or(|last| last.name < member.name);
            self.that(sorted, at("order"), || "names ascending, each once".into(), "another order")?;
            let raw_ok = member.raw_len <= MEMBER_RAW_BYTES_MAX;
            self.that(raw_ok, at("raw length"), || format!("at most {MEMBER_RAW_BYTES_MAX}"), member.raw_len)?;
            self.equal(at("offset"), end, member.offset)?;
            let len_ok = (1..=STORED_FILE_BYTES_MAX).contains(&member.len);
            self.that(len_ok, at("length"), || format!("1 to {STORED_FILE_BYTES_MAX}"), member.len)?;
            end += member.len;
            last = Some(member);
        }
        self.equal(format!("{name}: sum of members"), end, stored.len)
    }

    /// Kernel records and kernel files cover each other exactly.
    fn kernels(&self, manifest: &Manifest) -> Result<(), FormatError> {
        let mut last: Option<&str> = None;
        let mut members = 0;
        for stored in &manifest.kernel_files {
            let name = stored.name.as_str();
            let arch = name.strip_prefix(KERNELS_PREFIX).unwrap_or("");
            self.that(is_arch(arch), "kernel file name", || "kernels.<arch>".into(), format!("{name:?}"))?;
            let sorted = last.is_none_or(|last| last < name);
            self.that(sorted, name, || "names ascending, each once".into(), "another order")?;
            self.stored(stored)?;
            let present = !stored.members.is_empty();
            self.that(present, name, || "at least one member".into(), "none")?;
            members += stored.members.iter().filter(|m| m.name != TUNING_MEMBER).count();
            last = Some(name);
        }
        self.equal("kernel count", members, manifest.kernels.len())?;
        for pair in manifest.kernels.windows(2) {
            let sorted = matches!(pair, [a, b] if (&a.arch, a.key) < (&b.arch, b.key));
            self.that(sorted, "kernel records", || "ascending (arch, key), each once".into(), "another order")?;
        }
        for kernel in &manifest.kernels {
            let at = format!("kernel {}", kernel.key);
            self.that(is_name(&kernel.family), &at, || "a family name".into(), format!("{:?}", kernel.family))?;
            let member = find_kernel(manifest, &kernel.arch, &kernel.key.to_string());
            let same = member.is_some_and(|(_, m)| m.raw_hash == kernel.hash && m.raw_len == kernel.size);
            self.that(same, &at, || "a member with this hash and size".into(), "none")?;
        }
        Ok(())
    }
}

/// The member of `kernels.<arch>` with this name, and its file.
pub(crate) fn find_kernel<'a>(
    manifest: &'a Manifest,
    arch: &str,
    member: &str,
) -> Option<(&'a StoredFile, &'a Member)> {
    let is_file = |f: &&StoredFile| f.name.strip_prefix(KERNELS_PREFIX) == Some(arch);
    let file = manifest.kernel_files.iter().find(is_file)?;
    Some((file, find_member(file, member)?))
}

/// Members are sorted by name.
pub(crate) fn find_member<'a>(file: &'a StoredFile, name: &str) -> Option<&'a Member> {
    let index = file.members.binary_search_by(|m| m.name.as_str().cmp(name)).ok()?;
    file.members.get(index)
}

/// Becomes part of a file name, so it holds nothing a path could use.
pub(crate) fn is_arch(arch: &str) -> bool {
    (1..=32).contains(&arch.len()) && arch.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn plans(rank: &RankFile) -> Vec<SectionPlan> {
    let section = |s: &crate::manifest::Section| SectionPlan {
        name: s.name.clone(),
        tensors: s
            .tensors
            .iter()
            .map(|t| TensorPlan { name: t.name.clone(), dtype: t.dtype.clone(), shape: t.shape.clone(), bytes: t.len })
            .collect(),
    };
    rank.sections.iter().map(section).collect()
}

#[cfg(test)]
mod tests;
