//! The tree: what no compiler checks.

use std::path::{Path, PathBuf};
use std::process::Command;

use dsv4_model::ModelConfig;
use dsv4_model::tensors::table;

fn root() -> PathBuf {
    Path::new(dsv4_tests::DATA).parent().expect("the workspace").to_owned()
}

/// Text files of the tree by path from the root: tracked, or new and not ignored.
fn sources() -> Vec<(String, String)> {
    let args = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let out = Command::new("git").args(args).current_dir(root()).output();
    let out = out.unwrap_or_else(|e| panic!("git lists the files of the tree: {e}"));
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let names = String::from_utf8(out.stdout).expect("names in UTF-8");
    // Deleted files are still listed; data is not text.
    let text = |name: &str| std::fs::read_to_string(root().join(name)).ok().map(|text| (name.to_owned(), text));
    let all: Vec<_> = names.split_terminator('\0').filter_map(text).collect();
    assert!(all.len() > 50, "{} files", all.len());
    all
}

/// The Rust code of a file without its test modules, which end it, and without comments.
fn code(text: &str) -> Vec<(usize, &str)> {
    let lines = text.lines().enumerate().map(|(n, line)| (n + 1, line));
    let mut lines: Vec<(usize, &str)> = lines.take_while(|(_, line)| line.trim() != "#[cfg(test)]").collect();
    lines.retain(|(_, line)| !line.trim_start().starts_with("//"));
    lines
}

/// Rust files outside tests, examples and fuzzers.
fn is_product(name: &str) -> bool {
    let outside = ["tests", "examples", "fuzz", "benches"];
    name.ends_with(".rs") && !name.split('/').any(|part| outside.contains(&part) || part.contains("tests.rs"))
}

/// Only the table spells tensor names.
#[test]
fn tensor_names_are_spelled_in_one_place() {
    let mut pieces: Vec<String> = Vec::new();
    for config in ["nano/config.json", "golden/dspark_config.json"] {
        let text = std::fs::read_to_string(Path::new(dsv4_tests::DATA).join(config)).unwrap();
        for row in table(&ModelConfig::parse(&text).unwrap()) {
            // What follows the block: `attn.wq_b`, `ffn.experts.{e}.w1`.
            let name = row.name.strip_prefix(&format!("{}.", row.id.block)).unwrap_or(&row.name).to_owned();
            let name = name.split(".{e}").next().unwrap_or_default().to_owned();
            pieces.extend(name.contains('.').then_some(name));
        }
    }
    pieces.extend(
        ["hc_attn_", "hc_ffn_", "hc_head_", ".compressor.", ".indexer.", "tid2eid", "attn_sink"].map(String::from),
    );
    pieces.sort();
    pieces.dedup();
    assert!(pieces.len() > 30, "{pieces:?}");
    let mut found = Vec::new();
    for (name, text) in sources() {
        if !is_product(&name) || name == "artifacts/model/src/tensors.rs" {
            continue;
        }
        for (n, line) in code(&text) {
            // Inside a string, not as an identifier.
            let quoted: String = line.split('"').skip(1).step_by(2).collect::<Vec<_>>().join("\"");
            found.extend(pieces.iter().filter(|p| quoted.contains(*p)).map(|p| format!("{name}:{n}: {p}: {line}")));
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}

/// `unsafe` is where it is allowed, and every block says why it holds.
#[test]
fn unsafe_is_where_it_belongs() {
    let allowed =
        ["kernels/src/device/", "kernels/src/simd", "artifacts/format/src/map.rs", "artifacts/format/src/io/"];
    let mut seen = 0;
    for (name, text) in sources().iter().filter(|(name, _)| name.ends_with(".rs")) {
        let lines: Vec<&str> = text.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
            let is_comment = line.trim_start().starts_with("//");
            let is_quoted = line.contains("\"unsafe") || line.contains("`unsafe`");
            if is_comment || is_quoted || !words.clone().any(|word| word == concat!("un", "safe")) {
                continue;
            }
            assert!(allowed.iter().any(|place| name.starts_with(place)), "{name}:{}: {line}", i + 1);
            // An `unsafe fn` states its contract; a block, above it in its function, why it is kept.
            if line.contains("{") && !line.contains("fn ") {
                let mut above = lines[..i].iter().rev().take_while(|l| !l.contains("fn "));
                assert!(above.any(|l| l.contains("SAFETY")), "{name}:{}: no SAFETY above", i + 1);
            }
            seen += 1;
        }
    }
    assert!(seen > 0, "the search finds what there is");
    let manifest = std::fs::read_to_string(root().join("Cargo.toml")).unwrap();
    assert!(manifest.contains("unsafe_code = \"deny\""));
}

/// Links between documents lead somewhere.
#[test]
fn links_lead_somewhere() {
    let mut links = 0;
    for (name, text) in sources().iter().filter(|(name, _)| name.ends_with(".md")) {
        let dir = root().join(name).parent().expect("a directory").to_owned();
        for target in text.split("](").skip(1).filter_map(|rest| rest.split([')', ' ']).next()) {
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || target.contains("://") || target.starts_with("mailto:") {
                continue;
            }
            links += 1;
            assert!(!file.starts_with('/'), "{name}: {target} is absolute");
            assert!(dir.join(file).exists(), "{name}: {target} does not exist");
        }
    }
    println!("{links} links");
    assert!(root().join("README.md").exists(), "there is a README");
}

/// Nothing knows the machine it was written on.
#[test]
fn no_paths_of_one_machine() {
    let places = ["root", "work", "home"].map(|place| format!("/{place}/"));
    let mut found = Vec::new();
    for (name, text) in sources() {
        if text.len() > 1 << 20 || name.ends_with("tokenizer.json") {
            continue;
        }
        for (n, line) in text.lines().enumerate() {
            for place in &places {
                // Not the middle of a longer path.
                let starts = line.match_indices(place.as_str()).map(|(at, _)| line[..at].chars().next_back());
                let is_path =
                    |before: Option<char>| before.is_none_or(|c| !c.is_alphanumeric() && !"._-}/$~".contains(c));
                if starts.into_iter().any(is_path) {
                    found.push(format!("{name}:{}: {line}", n + 1));
                }
            }
        }
    }
    assert!(found.is_empty(), "{found:#?}");
}
