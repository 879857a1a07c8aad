//! MANIFEST, opened beside the other files of a real artifact: as it is, or behind a header that is right
//! for it, as another program could write it.
//!
//! Input: 0 or 1, then the file, or (1) its archive. What opens has ids that cover all of it but the hashes
//! of compressed files, which `verify` judges.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use dsv4_format::{Artifact, Manifest, NoProgress};
use dsv4_fuzz::{artifact, scratch, seed_corpus};
use libfuzzer_sys::fuzz_target;

const HEADER_BYTES: usize = 4096;

struct Real {
    path: PathBuf,
    manifests: Vec<Manifest>,
}

fn real() -> &'static Real {
    static REAL: OnceLock<Real> = OnceLock::new();
    REAL.get_or_init(|| {
        let dir = scratch();
        let path = artifact(&dir, "a.dsv4", 1, true);
        let others = [path.clone(), artifact(&dir, "b.dsv4", 2, false)];
        let manifests = others.map(|path| Artifact::open(&path).expect("whole").manifest().clone());
        Real { path, manifests: manifests.into() }
    })
}

fn seeds() -> Vec<Vec<u8>> {
    let dir = scratch();
    let whole = fs::read(artifact(&dir, "a.dsv4", 1, true).join("MANIFEST")).expect("MANIFEST");
    let two = fs::read(artifact(&dir, "b.dsv4", 2, false).join("MANIFEST")).expect("MANIFEST");
    let archive = |bytes: &[u8]| [&[1], &bytes[HEADER_BYTES..]].concat();
    vec![[&[0], &whole[..]].concat(), archive(&whole), archive(&two)]
}

/// The file that an input stands for.
fn file(input: &[u8]) -> Vec<u8> {
    let Some((kind, bytes)) = input.split_first() else { return Vec::new() };
    if kind & 1 == 0 {
        return bytes.to_vec();
    }
    let mut out = vec![0; HEADER_BYTES];
    out[..8].copy_from_slice(b"DSV4MANI");
    out[8] = 1;
    out[16..24].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
    out[24..56].copy_from_slice(blake3::hash(bytes).as_bytes());
    out.extend_from_slice(bytes);
    out
}

fuzz_target!(init: seed_corpus(seeds), |input: &[u8]| {
    let real = real();
    fs::write(real.path.join("MANIFEST"), file(input)).expect("room");
    let error = match Artifact::open(&real.path) {
        Ok(opened) => {
            let mut found = opened.manifest().clone();
            let judged = opened.verify(&NoProgress);
            let same = real.manifests.iter().find(|m| m.artifact_id == found.artifact_id);
            let same = same.expect("an id that nothing else has");
            if found == *same {
                return;
            }
            found.meta.hash = same.meta.hash;
            for (found, same) in found.kernel_files.iter_mut().zip(&same.kernel_files) {
                found.hash = same.hash;
            }
            assert_eq!(found, *same);
            judged.expect_err("a wrong hash of a compressed file")
        }
        Err(error) => error,
    };
    assert!(error.to_string().contains("\n  help: "), "{error}");
});
