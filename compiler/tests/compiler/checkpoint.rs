//! What is wrong with a checkpoint is found at opening and named.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use dsv4c::CompileError;
use dsv4c::checkpoint::Checkpoint;

use crate::fixture::{NANO, Shard, TINY, copy};

fn refused(dir: &Path) -> CompileError {
    match Checkpoint::open(dir) {
        Ok(_) => panic!("{} was accepted", dir.display()),
        Err(error) => error,
    }
}

/// A damaged copy of tiny, and why it was refused.
fn damaged(damage: impl FnOnce(&Path, &mut Shard)) -> CompileError {
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(TINY, &temp.path().join("tiny"));
    let file = dir.join("tiny.safetensors");
    let mut shard = Shard::read(&file);
    damage(&dir, &mut shard);
    shard.write(&file);
    refused(&dir)
}

#[test]
fn whole_ones_open_also_through_links() {
    let temp = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(NANO).unwrap() {
        let path = entry.unwrap().path();
        symlink(&path, temp.path().join(path.file_name().unwrap())).unwrap();
    }
    for dir in [Path::new(NANO), Path::new(TINY), temp.path()] {
        Checkpoint::open(dir).unwrap();
    }
}

#[test]
fn an_expert_dtype_may_be_absent() {
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(NANO, &temp.path().join("nano"));
    let config = fs::read_to_string(dir.join("config.json")).unwrap();
    let without = config.replace("\"expert_dtype\": \"fp4\",", "");
    assert_ne!(config, without);
    fs::write(dir.join("config.json"), without).unwrap();
    Checkpoint::open(&dir).unwrap();
}

#[test]
fn a_truncated_shard_is_named_with_what_is_missing() {
    let error = damaged(|_, shard| shard.data.truncate(shard.data.len() - 100));
    assert!(
        matches!(error, CompileError::Truncated { ref file, expected, found } if file.ends_with("tiny.safetensors") && expected - found == 100),
        "{error}"
    );
    assert!(error.to_string().contains("100 are missing"), "{error}");
}

#[test]
fn extra_bytes_at_the_end_are_refused() {
    let error = damaged(|_, shard| shard.data.push(0));
    assert!(error.to_string().contains("end of the file"), "{error}");
}

#[test]
fn absurd_header_lengths_are_refused_before_anything_is_read() {
    for (length, expected) in [(u64::MAX, "at most 100000000"), (99_000_000, "truncated")] {
        let temp = tempfile::tempdir().unwrap();
        let dir = copy(TINY, &temp.path().join("tiny"));
        let file = dir.join("tiny.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        fs::write(&file, bytes).unwrap();
        let error = refused(&dir).to_string();
        assert!(error.contains("tiny.safetensors") && error.contains(expected), "{error}");
    }
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(TINY, &temp.path().join("tiny"));
    fs::write(dir.join("tiny.safetensors"), [1, 2, 3]).unwrap();
    assert!(refused(&dir).to_string().contains("at least 8 bytes"));
}

#[test]
fn overlaps_holes_and_repeated_names_are_refused() {
    // hc_head_scale, [278544, 278548], is four bytes; the next tensor starts where it ends.
    let overlap = damaged(|_, shard| shard.edit("[278544,278548]", "[278540,278544]"));
    assert!(overlap.to_string().contains("hc_head_scale") && overlap.to_string().contains("overlaps"), "{overlap}");
    let hole = damaged(|_, shard| {
        let last = shard.data.len();
        let entries = shard.entries();
        let first =
            entries.values().find(|e| e["data_offsets"][1] == last).unwrap()["data_offsets"][0].as_u64().unwrap();
        shard.edit(&format!("[{first},{last}]"), &format!("[{},{}]", first + 4, last + 4));
        shard.data.extend([0; 4]);
    });
    assert!(hole.to_string().contains("a hole before it"), "{hole}");
    let twice = damaged(|_, shard| shard.edit("\"hc_head_base\"", "\"hc_head_scale\""));
    assert!(twice.to_string().contains("\"hc_head_scale\" twice"), "{twice}");
}

#[test]
fn everything_that_differs_from_the_table_is_one_report() {
    let error = damaged(|_, shard| {
        shard.edit("\"layers.1.attn.wkv.weight\"", "\"layers.1.attn.wkw.weight\"");
        shard.edit("\"layers.2.ffn.gate.bias\"", "\"layers.2.ffn.gate.base\"");
        shard.edit("\"hc_head_base\":{\"dtype\":\"F32\"", "\"hc_head_base\":{\"dtype\":\"U32\"");
        shard.edit(
            "\"hc_head_fn\":{\"dtype\":\"F32\",\"shape\":[4,1024]",
            "\"hc_head_fn\":{\"dtype\":\"F32\",\"shape\":[1024,4]",
        );
    });
    let CompileError::Tensors { mismatch, .. } = &error else { panic!("{error}") };
    assert_eq!(mismatch.missing, ["layers.1.attn.wkv.weight", "layers.2.ffn.gate.bias"]);
    assert_eq!(mismatch.extra.len(), 2);
    assert_eq!(mismatch.wrong_dtype, ["hc_head_base in tiny.safetensors: expected F32, found U32"]);
    assert_eq!(mismatch.wrong_shape, ["hc_head_fn in tiny.safetensors: expected [4, 1024], found [1024, 4]"]);
    let text = error.to_string();
    for expected in ["2 missing", "2 not of this model", "layers.1.attn.wkw.weight in tiny.safetensors", "help:"] {
        assert!(text.contains(expected), "{text}");
    }
}

#[test]
fn a_long_report_is_cut_and_counted() {
    let error = damaged(|dir, _| {
        let path = dir.join("config.json");
        let config = fs::read_to_string(&path).unwrap();
        fs::write(path, config.replace("\"n_routed_experts\": 8", "\"n_routed_experts\": 16")).unwrap();
    });
    let text = error.to_string();
    // 8 experts more in 5 blocks, three matrices with scales.
    assert!(text.contains("240 missing") && text.contains("and 220 more"), "{text}");
    assert!(text.lines().count() < 60, "{text}");
}

/// A config of a few bytes asks for a million names; none is made.
#[test]
fn a_config_of_a_far_larger_model_is_refused_by_the_numbers() {
    let error = damaged(|dir, _| {
        let path = dir.join("config.json");
        let config = fs::read_to_string(&path).unwrap();
        fs::write(path, config.replace("\"n_routed_experts\": 8", "\"n_routed_experts\": 16384")).unwrap();
    });
    let CompileError::TensorCount { expected, found, .. } = error else { panic!("{error}") };
    // 5 blocks of 16376 experts more, three matrices with scales each.
    assert_eq!(expected - found, 5 * 16_376 * 6);
    assert!(error.to_string().contains("help:"), "{error}");
    let error = damaged(|_, shard| *shard = Shard { header: "{}".into(), data: Vec::new() });
    assert!(matches!(error, CompileError::TensorCount { found: 0, .. }), "{error}");
}

#[test]
fn another_model_is_refused_by_the_field() {
    let error = damaged(|dir, _| {
        let path = dir.join("config.json");
        let config = fs::read_to_string(&path).unwrap();
        fs::write(path, config.replace("deepseek_v4", "deepseek_v3")).unwrap();
    });
    assert!(error.to_string().contains("model_type: expected \"deepseek_v4\", found \"deepseek_v3\""), "{error}");
}

#[test]
fn a_directory_without_the_files_says_which() {
    let temp = tempfile::tempdir().unwrap();
    assert!(refused(temp.path()).to_string().contains("expected config.json"));
    let dir = copy(TINY, &temp.path().join("tiny"));
    fs::copy(dir.join("tiny.safetensors"), dir.join("more.safetensors")).unwrap();
    assert!(refused(&dir).to_string().contains("found 2 *.safetensors files"));
    assert!(refused(&dir.join("nowhere")).to_string().contains("found nothing"));
}

/// A copy of nano whose index was edited, and why it was refused.
fn index_edited(edit: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) -> String {
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(NANO, &temp.path().join("nano"));
    let path = dir.join("model.safetensors.index.json");
    let mut index: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    edit(index["weight_map"].as_object_mut().unwrap());
    fs::write(&path, index.to_string()).unwrap();
    let error = refused(&dir);
    assert!(matches!(error, CompileError::Index { .. }), "{error}");
    error.to_string()
}

#[test]
fn index_and_shards_agree_both_ways() {
    let error = index_edited(|map| drop(map.remove("norm.weight")));
    assert!(error.contains("norm.weight") && error.contains("found none"), "{error}");
    let error = index_edited(|map| drop(map.insert("ghost".into(), "model-00001-of-00002.safetensors".into())));
    assert!(error.contains("ghost") && error.contains("it is not there"), "{error}");
    let error = index_edited(|map| drop(map.insert("embed.weight".into(), "model-00002-of-00002.safetensors".into())));
    assert!(error.contains("embed.weight"), "{error}");
    let error = index_edited(|map| drop(map.insert("ghost".into(), "model-00003-of-00003.safetensors".into())));
    assert!(error.contains("model-00003-of-00003.safetensors") && error.contains("no such file"), "{error}");
    for name in
        ["../nano/model-00001-of-00002.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "..", "config.json", ""]
    {
        let error = index_edited(|map| drop(map.insert("embed.weight".into(), name.into())));
        assert!(error.contains("beside the index"), "{error}");
    }
}

#[test]
fn a_name_twice_in_the_index_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let dir = copy(NANO, &temp.path().join("nano"));
    let path = dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"hc_head_base\"", "\"hc_head_fn\"")).unwrap();
    assert!(refused(&dir).to_string().contains("\"hc_head_fn\" twice"));
}
