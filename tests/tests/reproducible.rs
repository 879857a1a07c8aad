//! The same checkpoint packed twice is the same artifact, byte for byte.

use std::collections::BTreeMap;
use std::path::Path;

use dsv4_tests::DATA;
use dsv4_tests::binaries::{DSV4C, run};
use serde_json::Value;

/// The only file that may tell when and how.
const RECEIPT: &str = "RECEIPT.json";

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(file).unwrap())).collect()
}

#[test]
fn packing_twice_gives_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    for (name, tp) in [("nano", "1"), ("nano", "2"), ("tiny", "2")] {
        let checkpoint = format!("{DATA}/{name}");
        let mut packed: Vec<(Value, BTreeMap<String, Vec<u8>>)> = Vec::new();
        for (place, jobs, memory) in [("a", "1", "2G"), ("b", "3", "128M")] {
            let dir = temp.path().join(format!("{name}{tp}{place}"));
            std::fs::create_dir(&dir).unwrap();
            let out = dir.join(format!("{place}.dsv4"));
            let out = out.to_str().unwrap();
            let args =
                ["pack", &checkpoint, "--tp", tp, "--arch", "none", "-o", out, "--jobs", jobs, "--memory", memory];
            let report: Value = serde_json::from_str(run(DSV4C, args.iter().chain(&["--json"])).ok()).unwrap();
            run(DSV4C, ["verify", out]).ok();
            packed.push((report, files(Path::new(out))));
        }
        let [(a, mut a_files), (b, mut b_files)] = <[_; 2]>::try_from(packed).unwrap();
        for id in ["artifact_id", "weight_set_id", "source_id"] {
            assert!(a[id].is_string() && a[id] == b[id], "{name}, tp {tp}: {id} {} and {}", a[id], b[id]);
        }
        assert!(a_files.remove(RECEIPT).is_some() && b_files.remove(RECEIPT).is_some());
        assert!(a_files.len() >= 2 + tp.parse::<usize>().unwrap(), "{:?}", a_files.keys());
        assert_eq!(a_files.keys().collect::<Vec<_>>(), b_files.keys().collect::<Vec<_>>());
        for (file, bytes) in &a_files {
            assert!(*bytes == b_files[file], "{name}, tp {tp}: {file} differs");
        }
    }
}
