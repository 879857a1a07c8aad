//! Manifests that are wrong in one place, with ids recomputed, so that only the rule under test can
//! refuse them.

use std::path::Path;

use super::check;
use crate::error::FormatError;
use crate::manifest::{
    ArtifactId, Canary, Digest, KernelRecord, KernelSetId, Manifest, Member, RankFile, Section, SourceId, StoredFile,
    Tensor, WeightSetId,
};
use crate::section::fold;

fn tensor(name: &str, offset: u64, len: u64) -> Tensor {
    Tensor { name: name.into(), dtype: "f32".into(), shape: vec![len], offset, len }
}

fn section(name: &str, offset: u64, len: u64, tensors: Vec<Tensor>) -> Section {
    let blocks: Vec<[u8; 32]> = (0..len.div_ceil(4 << 20)).map(|i| [i as u8 + 1; 32]).collect();
    Section { name: name.into(), offset, len, root: fold(&blocks).expect("blocks"), blocks, tensors }
}

fn stored(name: &str, members: &[(&str, u64)]) -> StoredFile {
    let mut end = 0;
    let member = |&(name, len): &(&str, u64)| {
        end += len;
        Member { name: name.into(), raw_len: 3 * len, raw_hash: Digest([len as u8; 32]), offset: end - len, len }
    };
    let members = members.iter().map(member).collect();
    StoredFile { name: name.into(), len: end, hash: Digest([9; 32]), members }
}

fn sound() -> Manifest {
    const MIB: u64 = 1 << 20;
    let rank = |rank: u32| RankFile {
        rank,
        file_len: 12 * MIB + 4096,
        arena_bytes: 10 * MIB,
        sections: vec![
            section(
                "a",
                2 * MIB,
                8 * MIB,
                vec![tensor("x", 0, 7 * MIB), tensor("y", 7 * MIB, 5), tensor("z", 7 * MIB + 256, 6)],
            ),
            section("b", 10 * MIB, 2 * MIB, vec![tensor("w", 0, 1)]),
        ],
    };
    let key = |n: u8| Digest([n; 32]);
    let kernel = |n: u8, arch: &str, len: u64| KernelRecord {
        family: "rope".into(),
        key: key(n),
        arch: arch.into(),
        hash: Digest([len as u8; 32]),
        size: 3 * len,
    };
    let (one, two) = (key(1).to_string(), key(2).to_string());
    let mut manifest = Manifest {
        artifact_id: ArtifactId([0; 32]),
        weight_set_id: WeightSetId([0; 32]),
        source_id: SourceId([1; 32]),
        kernel_set_id: KernelSetId([0; 32]),
        tp: 2,
        weight_contract: Digest([2; 32]),
        op_contract: Digest([3; 32]),
        config_json: "{}".into(),
        ranks: vec![rank(0), rank(1)],
        meta: stored("meta", &[("a.json", 10), ("b.json", 20)]),
        kernel_files: vec![
            stored("kernels.sm_120", &[(&two, 30)]),
            stored("kernels.sm_121a", &[(&one, 40), ("tuning.toml", 5)]),
        ],
        kernels: vec![kernel(2, "sm_120", 30), kernel(1, "sm_121a", 40)],
        canary: Some(Canary { tokens: vec![1], logits: vec![0.5] }),
        weights_seed: None,
    };
    seal(&mut manifest);
    manifest
}

/// The same without weights.
fn weightless() -> Manifest {
    let mut manifest = sound();
    manifest.weights_seed = Some(7);
    manifest.canary = None;
    for section in manifest.ranks.iter_mut().flat_map(|rank| &mut rank.sections) {
        (section.root, section.blocks) = (Digest([0; 32]), Vec::new());
    }
    seal(&mut manifest);
    manifest
}

fn seal(manifest: &mut Manifest) {
    (manifest.weight_set_id, manifest.kernel_set_id, manifest.artifact_id) = manifest.computed_ids();
}

#[test]
fn a_sound_manifest_passes() {
    let layouts = check(&sound(), Path::new("MANIFEST")).expect("sound");
    assert_eq!(layouts.len(), 2);
    let of_a_seed = check(&weightless(), Path::new("MANIFEST")).expect("sound");
    assert_eq!(of_a_seed[1].arena_bytes(), layouts[1].arena_bytes());
}

#[test]
fn without_weights_nothing_may_look_as_if_there_were_some() {
    type Change = fn(&mut Manifest);
    let cases: &[(&str, Change)] = &[
        ("rank 1: section a: block count: expected 2, found 0", |m| m.weights_seed = None),
        ("section a: block count: expected 0, found 1", |m| m.ranks[0].sections[0].blocks.push([0; 32])),
        ("section b: root", |m| m.ranks[1].sections[1].root.0[0] = 1),
        ("canary: expected none without weights", |m| m.canary = sound().canary),
    ];
    for (expected, change) in cases {
        let mut manifest = weightless();
        change(&mut manifest);
        if manifest.weights_seed.is_none() {
            manifest.ranks[0] = sound().ranks[0].clone();
        }
        seal(&mut manifest);
        let text = check(&manifest, Path::new("MANIFEST")).expect_err(expected).to_string();
        assert!(text.contains(expected), "wanted {expected:?}, got {text}");
    }
    let ids = [7, 8].map(|seed| {
        let mut manifest = weightless();
        manifest.weights_seed = Some(seed);
        seal(&mut manifest);
        (manifest.weight_set_id, manifest.artifact_id)
    });
    assert!(ids[0].0 != ids[1].0 && ids[0].1 != ids[1].1);
}

#[test]
fn each_rule_refuses_what_breaks_it() {
    type Change = fn(&mut Manifest);
    let cases: &[(&str, Change)] = &[
        ("tp: expected 1 to 8, found 0", |m| m.tp = 0),
        ("tp: expected 1 to 8, found 9", |m| m.tp = 9),
        ("rank count: expected 3, found 2", |m| m.tp = 3),
        ("rank 1: number: expected 1, found 0", |m| m.ranks[1].rank = 0),
        ("rank 0: file length", |m| m.ranks[0].file_len += 4096),
        ("rank 0: arena bytes", |m| m.ranks[0].arena_bytes -= 1),
        ("1 to 65536 sections, found 0", |m| m.ranks[1].sections.clear()),
        ("1 to 1048576 tensors", |m| m.ranks[1].sections[1].tensors.clear()),
        ("rank 0: section \"a\", tensor \"\"", |m| m.ranks[0].sections[1].name = "a".into()),
        ("tensor name used once", |m| m.ranks[0].sections[1].tensors[0].name = "x".into()),
        ("printable", |m| m.ranks[0].sections[0].tensors[1].name = "a\tb".into()),
        ("section b: offset: expected 10485760, found 8388608", |m| m.ranks[0].sections[1].offset = 8 << 20),
        ("section a: length: expected 8388608", |m| m.ranks[0].sections[0].len = 10 << 20),
        ("tensor y: offset: expected 7340032, found 7340288", |m| m.ranks[0].sections[0].tensors[1].offset += 256),
        ("tensor z: offset", |m| m.ranks[0].sections[0].tensors[2].offset += 1),
        ("tensor z: offset", |m| m.ranks[0].sections[0].tensors[1].len = 257),
        ("section b: offset", |m| m.ranks[0].sections.swap(0, 1)),
        ("tensor \"x\": expected 1 to 17592186044416 bytes", |m| m.ranks[0].sections[0].tensors[0].len = u64::MAX),
        ("section a: block count: expected 2, found 1", |m| m.ranks[0].sections[0].blocks.truncate(1)),
        ("section b: block count: expected 1, found 0", |m| m.ranks[0].sections[1].blocks.clear()),
        ("section a: root", |m| m.ranks[0].sections[0].blocks[1][31] ^= 1),
        ("section a: root", |m| m.ranks[0].sections[0].blocks.swap(0, 1)),
        ("section b: root", |m| m.ranks[1].sections[1].root.0[0] ^= 1),
        ("config length", |m| m.config_json.clear()),
        ("config length", |m| m.config_json = " ".repeat((1 << 20) + 1)),
        ("name of the meta file", |m| m.meta.name = "../meta".into()),
        ("meta: member \"../x\": name", |m| m.meta.members[0].name = "../x".into()),
        ("meta: member \"b.json\": order", |m| m.meta.members[0].name = "c.json".into()),
        ("meta: member \"a.json\": order", |m| m.meta.members[1].name = "a.json".into()),
        ("member \"b.json\": offset: expected 10, found 11", |m| m.meta.members[1].offset = 11),
        ("member \"b.json\": offset: expected 9, found 10", |m| m.meta.members[0].len = 9),
        ("member \"a.json\": length: expected 1 to", |m| m.meta.members[0].len = u64::MAX),
        ("member \"a.json\": raw length", |m| m.meta.members[0].raw_len = u64::MAX),
        ("meta: sum of members: expected 30, found 31", |m| m.meta.len = 31),
        ("meta: length: expected at most", |m| m.meta.len = u64::MAX),
        ("kernel file name", |m| m.kernel_files[0].name = "kernels.../x".into()),
        ("kernel file name", |m| m.kernel_files[0].name = "rank0.weights".into()),
        ("names ascending", |m| m.kernel_files.swap(0, 1)),
        ("names ascending", |m| m.kernel_files[1].name = "kernels.sm_120".into()),
        ("kernel count: expected 2, found 1", |m| m.kernels.truncate(1)),
        ("kernel count: expected 1, found 2", |m| m.kernel_files.truncate(1)),
        ("kernel records", |m| m.kernels.swap(0, 1)),
        ("a member with this hash and size, found none", |m| m.kernels[1].size += 1),
        ("a member with this hash and size, found none", |m| m.kernels[1].hash.0[3] ^= 1),
        ("a member with this hash and size, found none", |m| m.kernels[1].key.0[3] ^= 1),
        ("a member with this hash and size, found none", |m| m.kernels[0].arch = "sm_119".into()),
        ("a family name", |m| m.kernels[0].family.clear()),
        ("canary tokens", |m| m.canary.as_mut().expect("canary").tokens.clear()),
        ("canary logits", |m| m.canary.as_mut().expect("canary").logits.clear()),
        ("canary logits", |m| m.canary.as_mut().expect("canary").logits[0] = f32::INFINITY),
    ];
    for (expected, change) in cases {
        let mut manifest = sound();
        change(&mut manifest);
        seal(&mut manifest);
        let error = check(&manifest, Path::new("MANIFEST")).expect_err(expected);
        assert!(matches!(error, FormatError::Manifest { .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.starts_with("MANIFEST: ") && text.contains(expected), "wanted {expected:?}, got {text}");
    }
}

#[test]
fn every_field_that_can_change_a_token_changes_the_artifact_id() {
    type Change = fn(&mut Manifest);
    let changes: &[Change] = &[
        |m| m.source_id.0[0] ^= 1,
        |m| m.weight_contract.0[0] ^= 1,
        |m| m.op_contract.0[0] ^= 1,
        |m| m.config_json.push(' '),
        |m| m.ranks[1].sections[0].root.0[0] ^= 1,
        |m| m.ranks[1].sections[0].tensors[0].dtype.push('x'),
        |m| m.ranks[1].sections[0].tensors[0].shape.push(1),
        |m| m.ranks[1].sections[0].tensors[0].name.push('x'),
        |m| m.ranks[1].sections[1].name.push('x'),
        |m| m.meta.members[0].raw_hash.0[0] ^= 1,
        |m| m.meta.members[0].name.push('x'),
        |m| m.kernels[0].hash.0[0] ^= 1,
        |m| m.kernels[0].key.0[0] ^= 1,
        |m| m.kernels[0].family.push('x'),
        |m| m.kernel_files[1].members[1].raw_hash.0[0] ^= 1,
        |m| m.canary = None,
        |m| m.canary.as_mut().expect("canary").tokens[0] = 2,
        |m| m.canary.as_mut().expect("canary").logits[0] = -0.5,
    ];
    let base = sound();
    let mut seen = std::collections::BTreeSet::from([base.artifact_id]);
    for (n, change) in changes.iter().enumerate() {
        let mut manifest = sound();
        change(&mut manifest);
        let stale = manifest.clone();
        seal(&mut manifest);
        assert!(seen.insert(manifest.artifact_id), "change {n}");
        let error = check(&stale, Path::new("MANIFEST")).expect_err("stale ids");
        assert!(matches!(error, FormatError::Manifest { .. }));
    }
    // How members are compressed is no part of it.
    let mut manifest = sound();
    manifest.meta.hash.0[0] ^= 1;
    manifest.meta.members[1].len += 7;
    manifest.meta.len += 7;
    seal(&mut manifest);
    assert_eq!(manifest.artifact_id, base.artifact_id);
}
