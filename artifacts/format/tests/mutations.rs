//! Pieces of valid files moved, repeated, cut out, put in and mixed, behind hashes that are right for what
//! there is then: refused with a reason, never a panic, never more memory than the file accounts for.
//! (Single bits and bytes: `faults.rs`.)

mod support;

use std::fs;
use std::path::Path;

use dsv4_format::{Artifact, FormatError, Manifest, NoProgress};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use support::{Noise, pack, pack_small};

const HEADER_BYTES: usize = 4096;
const MANIFEST_CASES: u64 = 8000;
const FILE_CASES: u64 = 1500;
const SIGNATURE_CASES: u64 = 1500;
/// MANIFEST as read, decoded and encoded again, and what the test itself holds; two threads that verify with
/// a block each. A length that is believed would take up to gigabytes.
const MEMORY: u64 = 48 << 20;

/// Private memory from now on; what asks for more gets an error.
fn limit_memory(more: u64) {
    let status = fs::read_to_string("/proc/self/status").expect("status");
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")).expect("VmData");
    let now: u64 = data.trim().trim_end_matches(" kB").parse().expect("a number");
    let maximum = getrlimit(Resource::Data).maximum;
    setrlimit(Resource::Data, Rlimit { current: Some((now << 10) + more), maximum }).expect("a limit");
}

/// One to three changes: a piece cut out, repeated, moved, filled, or replaced by one of `other`.
fn mutate(noise: &mut Noise, bytes: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..1 + noise.below(3) {
        // Objects are aligned to 4 or 8: pieces that keep this reach further.
        let grain = [1, 4, 8][noise.below(3) as usize];
        let mut place = |len: usize| noise.below((len / grain) as u64 + 1) as usize * grain;
        let at = place(bytes.len()).min(bytes.len());
        let len = place(96).min(bytes.len() - at);
        let to = place(bytes.len() - len);
        let piece: Vec<u8> = bytes[at..at + len].to_vec();
        match noise.below(7) {
            0 => drop(bytes.drain(at..at + len)),
            1 => drop(bytes.splice(to..to, piece)),
            2 => {
                bytes.drain(at..at + len);
                let to = to.min(bytes.len());
                bytes.splice(to..to, piece);
            }
            3 => bytes[at..at + len].fill([0, 1, 0x7f, 0xff][noise.below(4) as usize]),
            4 => {
                let from = noise.below(other.len() as u64) as usize;
                let theirs = &other[from..(from + len).min(other.len())];
                bytes.splice(at..at + len, theirs.iter().copied());
            }
            5 => bytes.truncate(at),
            _ => {
                let number = [0, 1, 2, 0xff, 0x7fff_ffff, u32::MAX, noise.next() as u32][noise.below(7) as usize];
                bytes.splice(at..(at + 4).min(bytes.len()), number.to_le_bytes());
            }
        }
    }
}

/// A header that is right for `archive`, and it.
fn behind_header(archive: &[u8]) -> Vec<u8> {
    let mut out = vec![0; HEADER_BYTES];
    out[..8].copy_from_slice(b"DSV4MANI");
    out[8..12].copy_from_slice(&dsv4_format::FORMAT_VERSION.to_le_bytes());
    out[16..24].copy_from_slice(&(archive.len() as u64).to_le_bytes());
    out[24..56].copy_from_slice(blake3::hash(archive).as_bytes());
    out.extend_from_slice(archive);
    out
}

fn judged(path: &Path) -> Result<(), FormatError> {
    Artifact::open(path)?.verify(&NoProgress).map(|_| ())
}

/// Has a reason and what to do, and is not that memory ran out.
fn is_refusal(error: &FormatError, case: &str) {
    assert!(!matches!(error, FormatError::Memory { .. }), "{case}: {error}");
    assert!(error.to_string().contains("\n  help: "), "{case}: {error}");
}

/// In memory, where thousands of files are written in seconds.
fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("tempdir")
}

/// `manifest` without what no id covers.
fn covered(manifest: &Manifest, original: &Manifest) -> Manifest {
    let mut manifest = manifest.clone();
    manifest.meta.hash = original.meta.hash;
    for (file, original) in manifest.kernel_files.iter_mut().zip(&original.kernel_files) {
        file.hash = original.hash;
    }
    manifest
}

#[test]
fn a_manifest_of_moved_pieces_is_refused() {
    let dir = fast_dir();
    let [small, two] = ["small.dsv4", "two.dsv4"].map(|name| dir.path().join(name));
    pack_small(&small);
    pack(&two);
    let archives = [&small, &two].map(|path| fs::read(path.join("MANIFEST")).expect("read")[HEADER_BYTES..].to_vec());
    let originals = [&small, &two].map(|path| Artifact::open(path).expect("open").manifest().clone());
    limit_memory(MEMORY);
    let mut reasons = [0u32; 3];
    for case in 0..MANIFEST_CASES {
        let mut noise = Noise::new(case + 1);
        let which = (case % 2) as usize;
        let path = [&small, &two][which];
        let mut archive = archives[which].clone();
        mutate(&mut noise, &mut archive, &archives[1 - which]);
        if archive == archives[which] {
            continue;
        }
        fs::write(path.join("MANIFEST"), behind_header(&archive)).expect("write");
        match Artifact::open(path) {
            Ok(open) => {
                let expected = &originals[which];
                assert_eq!(covered(open.manifest(), expected), *expected, "case {case}");
                is_refusal(&open.verify(&NoProgress).expect_err("a wrong stored hash"), &format!("case {case}"));
            }
            Err(error) => {
                is_refusal(&error, &format!("case {case}"));
                let reason = match error {
                    FormatError::Structure { .. } => 0,
                    FormatError::Manifest { .. } => 1,
                    _ => 2,
                };
                reasons[reason] += 1;
            }
        }
    }
    println!("structure, meaning, others: {reasons:?}");
    // Most break the structure; those that do not are the ones that have to be understood.
    assert!(reasons[0] > 1000 && reasons[1] > 100, "{reasons:?}");
}

#[test]
fn a_compressed_file_of_moved_pieces_is_refused() {
    let dir = fast_dir();
    let path = dir.path().join("small.dsv4");
    pack_small(&path);
    let names = ["meta", "kernels.sm_121a"];
    let whole = names.map(|name| fs::read(path.join(name)).expect("read"));
    let open = Artifact::open(&path).expect("open");
    let expected: Vec<_> = support::meta();
    limit_memory(MEMORY);
    for case in 0..FILE_CASES {
        let mut noise = Noise::new(case + 1);
        let which = (case % 2) as usize;
        let mut bytes = whole[which].clone();
        mutate(&mut noise, &mut bytes, &whole[1 - which]);
        // Of the right length, half of them: then it is the content that is judged.
        if case % 4 < 2 {
            bytes.resize(whole[which].len(), 0);
        }
        if bytes == whole[which] {
            continue;
        }
        let file = path.join(names[which]);
        fs::write(&file, &bytes).expect("write");
        let error = judged(&path).expect_err("another file");
        is_refusal(&error, &format!("case {case}"));
        assert!(error.to_string().contains(names[which]), "case {case}: {error}");
        if which == 0 {
            for (name, content) in &expected {
                match open.meta(name) {
                    // The other member was hit.
                    Ok(found) => assert!(found.as_ref() == Some(content), "case {case}: {name}"),
                    Err(error) => is_refusal(&error, &format!("case {case}, {name}")),
                }
            }
        }
        fs::write(&file, &whole[which]).expect("restore");
    }
    judged(&path).expect("whole again");
}

#[test]
fn a_signature_of_moved_pieces_has_its_form_or_is_refused() {
    let dir = fast_dir();
    let path = dir.path().join("small.dsv4");
    pack_small(&path);
    let base64 = |digits: usize, pad: &str| "Ab+/".repeat(digits / 4 + 1)[..digits - 1].to_owned() + "A" + pad;
    let good = format!("untrusted comment: a\n{}\ntrusted comment: b\n{}\n", base64(99, "="), base64(86, "=="));
    let file = path.join("SIGNATURE");
    fs::write(&file, &good).expect("write");
    judged(&path).expect("the form of a signature");
    let mut refused = 0;
    for case in 0..SIGNATURE_CASES {
        let mut bytes = good.clone().into_bytes();
        mutate(&mut Noise::new(case + 1), &mut bytes, b"trusted comment: untrusted comment: ====\n\n\r\n\xff\xc3");
        fs::write(&file, &bytes).expect("write");
        match judged(&path) {
            Ok(()) => {
                let text = String::from_utf8(bytes).expect("text");
                let lines: Vec<&str> = text.lines().collect();
                assert_eq!(lines.len(), 4, "case {case}");
                assert_eq!((lines[1].len(), lines[3].len()), (100, 88), "case {case}");
            }
            Err(error) => {
                is_refusal(&error, &format!("case {case}"));
                refused += 1;
            }
        }
    }
    assert!((SIGNATURE_CASES / 2..SIGNATURE_CASES).contains(&refused), "{refused}");
}
