//! What an artifact's MANIFEST says, for people and programs. No weight is read.

use std::collections::BTreeMap;
use std::fmt::Write;

use dsv4_format::{Artifact, FORMAT_VERSION, Manifest};
use serde_json::{Value, json};

/// The artifact for programs; keys are only ever added.
pub fn to_json(artifact: &Artifact) -> Value {
    let m = artifact.manifest();
    let sections = m.ranks.iter().flat_map(|rank| {
        rank.sections.iter().map(|s| {
            json!({
                "rank": rank.rank, "name": s.name, "offset": s.offset, "bytes": s.len,
                "tensors": s.tensors.len(), "blocks": s.blocks.len(), "root": s.root.to_string(),
            })
        })
    });
    let kernels = m.kernels.iter().map(|k| {
        json!({
            "family": k.family, "key": k.key.to_string(), "arch": k.arch,
            "hash": k.hash.to_string(), "size": k.size,
        })
    });
    let ranks = m.ranks.iter().map(|r| {
        json!({
            "rank": r.rank, "file_bytes": r.file_len, "arena_bytes": r.arena_bytes,
            "present": artifact.has_rank(r.rank),
        })
    });
    let meta = m.meta.members.iter().map(|member| json!({"name": member.name, "bytes": member.raw_len}));
    json!({
        "artifact_id": m.artifact_id.to_string(),
        "weight_set_id": m.weight_set_id.to_string(),
        "source_id": m.source_id.to_string(),
        "kernel_set_id": m.kernel_set_id.to_string(),
        "weight_contract": m.weight_contract.to_string(),
        "op_contract": m.op_contract.to_string(),
        "weights_seed": m.weights_seed,
        "tp": m.tp,
        "format": FORMAT_VERSION,
        "model": model(m),
        "ranks": ranks.collect::<Vec<_>>(),
        "sections": sections.collect::<Vec<_>>(),
        "kernels": kernels.collect::<Vec<_>>(),
        "kernel_files": kernel_files(m).iter().map(KernelFile::to_json).collect::<Vec<_>>(),
        "meta": meta.collect::<Vec<_>>(),
        "canary_tokens": m.canary.as_ref().map(|c| c.tokens.len()),
    })
}

/// config.json as the artifact keeps it.
fn model(manifest: &Manifest) -> Value {
    // The text is hashed into the id, so what does not parse was packed so: shown as it is.
    serde_json::from_str(&manifest.config_json).unwrap_or_else(|_| Value::String(manifest.config_json.clone()))
}

/// The artifact for people.
pub fn to_text(artifact: &Artifact) -> String {
    let m = artifact.manifest();
    let config = model(m);
    let number = |field: &str| config.get(field).map_or_else(|| "?".to_owned(), Value::to_string);
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<16}{value}"); // writing to a String cannot fail
    };
    line("artifact", &m.artifact_id.to_string());
    line("weight set", &m.weight_set_id.to_string());
    line("source", &m.source_id.to_string());
    line("kernel set", &m.kernel_set_id.to_string());
    line("format", &FORMAT_VERSION.to_string());
    line(
        "model",
        &format!(
            "{} layers, hidden size {}, {} experts, vocabulary {}",
            number("num_hidden_layers"),
            number("hidden_size"),
            number("n_routed_experts"),
            number("vocab_size")
        ),
    );
    line("tp", &m.tp.to_string());
    if let Some(seed) = m.weights_seed {
        line("weights", &format!("none: they are made from seed {seed}, by dsv4-run bench alone"));
    }
    for rank in &m.ranks {
        let here = if artifact.has_rank(rank.rank) { "" } else { " (not here)" };
        line(
            &format!("rank {}", rank.rank),
            &format!("{} bytes, memory {} bytes{here}", rank.file_len, rank.arena_bytes),
        );
        for s in &rank.sections {
            line("", &format!("{:<28}{:>7} tensors{:>16} bytes", s.name, s.tensors.len(), s.len));
        }
    }
    for member in &m.meta.members {
        line("meta", &format!("{}, {} bytes", member.name, member.raw_len));
    }
    for file in kernel_files(m) {
        let (count, bytes) = file.total();
        let text = format!("{}: {count} kernels, {bytes} bytes, {} bytes stored", file.arch, file.stored);
        line("kernels", &text);
        for (family, (count, bytes)) in &file.families {
            line("", &format!("{family:<28}{count:>7} kernels{bytes:>16} bytes"));
        }
    }
    if m.kernels.is_empty() {
        line("kernels", "none: this artifact runs on the CPU backend");
    }
    out
}

/// The kernels of one architecture.
struct KernelFile<'a> {
    arch: &'a str,
    /// Bytes of the file, compressed.
    stored: u64,
    /// Number of kernels (compiled units) and bytes of their cubins.
    families: BTreeMap<&'a str, (usize, u64)>,
}

fn kernel_files(manifest: &Manifest) -> Vec<KernelFile<'_>> {
    let mut out: Vec<KernelFile<'_>> = Vec::new();
    // Both are sorted by architecture, and each of a file's kernels is of its own.
    for kernel in &manifest.kernels {
        if out.last().is_none_or(|last| last.arch != kernel.arch) {
            let is_file = |name: &str| name.strip_prefix("kernels.") == Some(&kernel.arch);
            let stored = manifest.kernel_files.iter().find(|f| is_file(&f.name)).map_or(0, |f| f.len);
            out.push(KernelFile { arch: &kernel.arch, stored, families: BTreeMap::new() });
        }
        let Some(file) = out.last_mut() else { continue };
        let (count, bytes) = file.families.entry(&kernel.family).or_default();
        (*count, *bytes) = (*count + 1, *bytes + kernel.size);
    }
    out
}

impl KernelFile<'_> {
    fn total(&self) -> (usize, u64) {
        self.families.values().fold((0, 0), |(n, sum), (count, bytes)| (n + count, sum + bytes))
    }

    fn to_json(&self) -> Value {
        let (count, bytes) = self.total();
        let families = self
            .families
            .iter()
            .map(|(family, (count, bytes))| json!({"family": family, "kernels": count, "bytes": bytes}));
        json!({
            "arch": self.arch, "kernels": count, "bytes": bytes, "stored_bytes": self.stored,
            "families": families.collect::<Vec<_>>(),
        })
    }
}
