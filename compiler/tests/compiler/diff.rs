//! What two artifacts are said to differ in, and that nothing else is.

use std::fs;
use std::path::Path;

use dsv4_format::{
    Artifact, Canary, CommitInput, Digest, Draft, DraftOptions, KernelInput, NoProgress, RankLayout, SectionPlan,
    SourceId, TensorPlan,
};
use dsv4c::diff::{Diff, Item, diff};
use dsv4c::pack::{PackOptions, pack};
use serde_json::Value;

use crate::command::{json, run};
use crate::fixture::{NANO, Shard, TINY, copy};

fn packed(checkpoint: &Path, tp: u32, rank: Option<u32>, out: &Path) {
    pack(&PackOptions { out: Some(out.to_path_buf()), rank, ..PackOptions::new(checkpoint, tp) }, &NoProgress).unwrap();
}

fn compare(a: &Path, b: &Path) -> Diff {
    diff(&Artifact::open(a).unwrap(), &Artifact::open(b).unwrap(), &NoProgress).unwrap()
}

fn shown<'d>(diff: &'d Diff, kind: &str) -> &'d [Item] {
    diff.kind(kind).map_or(&[], |kind| &kind.shown)
}

fn places(diff: &Diff, kind: &str) -> Vec<String> {
    shown(diff, kind).iter().map(|item| item.at.clone()).collect()
}

/// Requires exactly these kinds to have differences.
fn assert_kinds(diff: &Diff, kinds: &[&str]) {
    let found = diff.to_json();
    let found: Vec<&String> = found["differences"].as_object().unwrap().keys().collect();
    assert_eq!(found, kinds, "{}", diff.to_text());
}

#[test]
fn a_copy_is_the_same_and_says_what_is_missing() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    packed(Path::new(TINY), 2, None, &a);
    packed(Path::new(TINY), 2, Some(1), &b);
    let found = compare(&a, &b);
    assert!(found.is_equal() && found.require_equal().is_ok());
    assert_kinds(&found, &[]);
    assert_eq!(found.notes(), ["files of ranks [0, 1] are in the first, of [1] in the second"]);
    assert!(found.to_text().contains("are the same artifact"));
}

#[test]
fn a_field_of_the_config_is_named_with_both_values() {
    let temp = tempfile::tempdir().unwrap();
    let other = copy(TINY, &temp.path().join("other"));
    let file = other.join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
    let before = config["rms_norm_eps"].clone();
    config["rms_norm_eps"] = serde_json::json!(0.125);
    config["a_new_field"] = serde_json::json!({"x": [1, 2]});
    fs::write(&file, config.to_string()).unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    packed(Path::new(TINY), 1, None, &a);
    packed(&other, 1, None, &b);
    let found = compare(&a, &b);
    assert!(!found.is_equal());
    assert_kinds(&found, &["ids", "config"]);
    assert_eq!(places(&found, "ids"), ["artifact_id"]);
    let expected = [
        Item { at: "$.rms_norm_eps".into(), a: Some(before), b: Some(serde_json::json!(0.125)) },
        Item { at: "$.a_new_field".into(), a: None, b: Some(serde_json::json!({"x": [1, 2]})) },
    ];
    assert_eq!(shown(&found, "config"), expected);
}

/// One bit of one weight: one block, one tensor, one byte. Without both files: the block's tensors.
#[test]
fn one_weight_is_found() {
    let temp = tempfile::tempdir().unwrap();
    let other = copy(NANO, &temp.path().join("other"));
    let shard = other.join("model-00002-of-00002.safetensors");
    let mut bytes = Shard::read(&shard);
    let name = bytes.entries().keys().find(|name| name.ends_with("shared_experts.w2.weight")).unwrap().clone();
    let place = bytes.range(&name).start;
    bytes.data[place] ^= 1;
    bytes.write(&shard);
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    packed(Path::new(NANO), 1, None, &a);
    packed(&other, 1, None, &b);
    let found = compare(&a, &b);
    assert_kinds(&found, &["ids", "blocks", "weights"]);
    assert_eq!(found.kind("blocks").unwrap().count, 1);
    assert_eq!(places(&found, "ids"), ["artifact_id", "weight_set_id", "source_id"]);
    let [item] = shown(&found, "weights") else { panic!("{}", found.to_text()) };
    assert_eq!(item.at, format!("rank 0 {}", name.strip_suffix(".weight").unwrap()));
    let byte = |value: u8| Some(Value::from(format!("byte 0 is {value:#04x}")));
    assert_eq!((&item.a, &item.b), (&byte(bytes.data[place] ^ 1), &byte(bytes.data[place])));

    // Only hashes are left to compare.
    fs::remove_file(b.join("rank0.weights")).unwrap();
    let rest = compare(&a, &b);
    assert_kinds(&rest, &["ids", "blocks", "weights"]);
    let count = rest.kind("weights").unwrap().count;
    assert!(count > 1 && rest.kind("blocks").unwrap().count == 1, "{count}");
    assert!(rest.to_text().contains("in a block of"), "{}", rest.to_text());
}

#[test]
fn another_number_of_ranks_is_the_same_checkpoint_cut_differently() {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    packed(Path::new(TINY), 1, None, &a);
    packed(Path::new(TINY), 2, None, &b);
    let found = compare(&a, &b);
    assert_kinds(&found, &["ids", "tp"]);
    assert_eq!(shown(&found, "tp"), [Item { at: "ranks".into(), a: Some(1.into()), b: Some(2.into()) }]);
    assert!(found.notes().iter().any(|note| note.contains("same checkpoint tensors")), "{:?}", found.notes());
}

/// An artifact whose every part can be chosen.
struct Parts {
    tensors: Vec<(&'static str, u64, u8)>,
    meta: Vec<(&'static str, &'static str)>,
    kernels: Vec<(&'static str, u8, u8)>,
    tuning: &'static str,
    contract: &'static str,
    logits: Vec<f32>,
}

impl Parts {
    fn new() -> Parts {
        Parts {
            tensors: vec![("first", 100, 1), ("wide", 9 << 20, 2), ("last", 70_000, 3)],
            meta: vec![("tokenizer.json", r#"{"vocab": {"a": 1, "b": 2}}"#), ("weight_contract.txt", "one\ntwo\n")],
            kernels: vec![("rms_norm", 1, 1), ("rope", 2, 2)],
            tuning: "[rope]\nthreads = 256\n",
            contract: "v1",
            logits: vec![0.5, -1.0],
        }
    }

    fn pack(&self, out: &Path) {
        let plan = |&(name, bytes, _): &(&str, u64, u8)| TensorPlan {
            name: name.into(),
            dtype: "u8".into(),
            shape: vec![bytes],
            bytes,
        };
        let section = SectionPlan { name: "all".into(), tensors: self.tensors.iter().map(plan).collect() };
        let layout = RankLayout::new(&[section]).unwrap();
        let mut draft = Draft::create(out, vec![layout], &DraftOptions::default()).unwrap();
        let mut writer = draft.rank_writer(0).unwrap();
        for &(name, bytes, value) in &self.tensors {
            let content: Vec<u8> = (0..bytes).map(|i| (i as u8).wrapping_mul(3).wrapping_add((i >> 8) as u8)).collect();
            let mut content = content;
            let at = content.len() - 1;
            content[at] = value;
            writer.append(name, &content).unwrap();
        }
        let rank = writer.finish().unwrap();
        let meta: Vec<_> =
            self.meta.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())).collect();
        draft.write_meta(&meta).unwrap();
        let kernel = |&(family, key, cubin): &(&str, u8, u8)| KernelInput {
            family: family.into(),
            key: Digest([key; 32]),
            cubin: vec![cubin; 50],
        };
        let kernels: Vec<_> = self.kernels.iter().map(kernel).collect();
        draft.write_kernels("sm_121a", &kernels, Some(self.tuning)).unwrap();
        let input = CommitInput {
            config_json: "{}".into(),
            source_id: SourceId([7; 32]),
            weight_contract: Digest::of(self.contract.as_bytes()),
            op_contract: Digest::of(b"ops"),
            canary: Some(Canary { tokens: vec![3], logits: self.logits.clone() }),
            ranks: vec![rank],
            receipt: serde_json::Map::new(),
        };
        draft.commit(input, false, &NoProgress).unwrap();
    }
}

/// Changes `change` and returns what is said to differ.
fn changed(change: impl FnOnce(&mut Parts)) -> Diff {
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    let mut parts = Parts::new();
    parts.pack(&a);
    change(&mut parts);
    parts.pack(&b);
    compare(&a, &b)
}

#[test]
fn every_part_is_named() {
    let found = changed(|p| p.meta[0].1 = r#"{"vocab": {"a": 1, "b": 5}}"#);
    assert_kinds(&found, &["ids", "meta"]);
    assert_eq!(places(&found, "meta"), ["tokenizer.json", "tokenizer.json $.vocab.b"]);

    let found = changed(|p| {
        p.meta.remove(0);
    });
    assert_eq!((places(&found, "meta"), &shown(&found, "meta")[0].b), (vec!["tokenizer.json".into()], &None));

    let found = changed(|p| (p.contract, p.meta[1].1) = ("v2", "one\n2\n"));
    assert_kinds(&found, &["ids", "contracts", "meta"]);
    assert_eq!(places(&found, "contracts"), ["weight_contract", "weight_contract.txt line 2"]);

    let found = changed(|p| p.kernels[0].2 = 9);
    assert_kinds(&found, &["ids", "kernels"]);
    assert!(places(&found, "kernels")[0].starts_with("sm_121a key 0101"), "{}", found.to_text());
    let found = changed(|p| p.kernels[1].1 = 9);
    assert_eq!(places(&found, "kernels"), ["sm_121a rope"]);
    assert!(found.to_text().contains("a: key 0202"), "{}", found.to_text());

    let found = changed(|p| p.tuning = "[rope]\nthreads = 128\n");
    assert_kinds(&found, &["ids", "tuning"]);
    assert_eq!(places(&found, "tuning"), ["sm_121a line 2"]);

    let found = changed(|p| p.logits[1] = 1.0);
    assert_kinds(&found, &["ids", "canary"]);
    assert_eq!(places(&found, "canary"), ["logit 1"]);
}

#[test]
fn tensors_are_compared_by_name_wherever_they_lie() {
    // The last byte of a tensor of three blocks, beside others in those blocks.
    let found = changed(|p| p.tensors[1].2 = 77);
    assert_kinds(&found, &["ids", "blocks", "weights"]);
    assert_eq!(places(&found, "blocks"), ["rank 0 all block 2"]);
    let [item] = shown(&found, "weights") else { panic!("{}", found.to_text()) };
    assert_eq!(
        (item.at.as_str(), &item.b),
        ("rank 0 wide", &Some(Value::from(format!("byte {} is 0x4d", (9 << 20) - 1))))
    );

    // All move; one is new, one has another length, and only one of those that stay has other bytes.
    let found = changed(|p| {
        p.tensors.insert(0, ("new", 5000, 0));
        p.tensors[1].1 = 101;
        p.tensors[3].2 = 8;
    });
    assert_kinds(&found, &["ids", "sections", "tensors", "blocks", "weights"]);
    assert_eq!(places(&found, "tensors"), ["rank 0 first", "rank 0 wide", "rank 0 last", "rank 0 new"]);
    assert_eq!(places(&found, "weights"), ["rank 0 last"]);
}

#[test]
fn many_differences_are_counted_and_few_shown() {
    let found = changed(|p| p.logits = (0..300).map(|i| i as f32).collect());
    let kind = found.kind("canary").unwrap();
    assert_eq!((kind.count, kind.shown.len()), (3, 3));
    let many: Vec<f32> = (0..300).map(|i| i as f32).collect();
    let temp = tempfile::tempdir().unwrap();
    let (a, b) = (temp.path().join("a.dsv4"), temp.path().join("b.dsv4"));
    let mut parts = Parts::new();
    parts.logits = many.clone();
    parts.pack(&a);
    parts.logits = many.iter().map(|x| x + 0.5).collect();
    parts.pack(&b);
    let found = compare(&a, &b);
    let kind = found.kind("canary").unwrap();
    assert_eq!((kind.count, kind.shown.len()), (300, 20));
    assert!(found.to_text().contains("and 280 more"), "{}", found.to_text());
}

#[test]
fn the_command_has_its_exit_codes() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    packed(Path::new(TINY), 1, None, &dir.join("a.dsv4"));
    packed(Path::new(TINY), 2, None, &dir.join("b.dsv4"));
    assert_eq!(json(&["diff", "a.dsv4", "a.dsv4", "--json"], dir)["equal"], true);
    let (code, out, err) = run(&["diff", "a.dsv4", "b.dsv4", "--json"], dir);
    let found: Value = serde_json::from_str(&out).unwrap();
    assert!(code == 3 && found["equal"] == false && err.contains("differs"), "{err}");
    assert_eq!(found["differences"]["tp"]["shown"][0]["b"], 2);
    let (code, out, err) = run(&["diff", "a.dsv4", "nowhere"], dir);
    assert!(code == 3 && out.is_empty() && err.contains("nowhere"), "{err}");
}
