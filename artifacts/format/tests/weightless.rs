//! Artifacts without weights: everything of one but rank files, and nothing that passes for them.

mod support;

use std::fs;
use std::path::Path;

use dsv4_format::{Artifact, Committed, Digest, Draft, FormatError, NoProgress, Outcome, Receiving};
use support::{input, layouts, meta, pack};

fn make(out: &Path, seed: u64, force: bool) -> Result<Committed, FormatError> {
    let plan = Digest::of(&seed.to_le_bytes());
    let mut draft = Draft::weightless(out, layouts(), seed, plan, "a test", false)?;
    draft.write_meta(&meta())?;
    let mut input = input(Vec::new(), "{}");
    input.canary = None;
    draft.commit(input, force, &NoProgress)
}

fn names(dir: &Path) -> Vec<String> {
    let name = |e: std::io::Result<fs::DirEntry>| e.expect("entry").file_name().into_string().expect("name");
    let mut names: Vec<String> = fs::read_dir(dir).expect("dir").map(name).collect();
    names.sort();
    names
}

#[test]
fn it_has_everything_but_rank_files() {
    let dir = tempfile::tempdir().expect("tempdir");
    let out = dir.path().join("a.dsv4");
    assert_eq!(make(&out, 7, false).expect("make").outcome, Outcome::Created);
    assert_eq!(names(&out), ["MANIFEST", "RECEIPT.json", "meta"]);
    let artifact = Artifact::open(&out).expect("open");
    assert_eq!((artifact.weights_seed(), artifact.present_ranks().len()), (Some(7), 0));
    for (rank, layout) in (0..2).zip(layouts()) {
        assert_eq!(artifact.arena_bytes(rank).expect("bytes"), layout.arena_bytes());
        assert_eq!(artifact.layout(rank).expect("layout").sections(), layout.sections());
    }
    let report = artifact.verify(&NoProgress).expect("verify");
    assert_eq!((report.ranks, report.absent, report.weights_seed), (vec![], vec![], Some(7)));
    // The same again is there; another seed, or the same model with weights, is another artifact.
    assert_eq!(make(&out, 7, false).expect("again").outcome, Outcome::AlreadyThere);
    assert!(matches!(make(&out, 8, false), Err(FormatError::Exists { .. })));
    assert_eq!(make(&out, 8, true).expect("force").outcome, Outcome::Replaced);
    assert_eq!(names(dir.path()), ["a.dsv4"]);
}

#[test]
fn no_rank_of_it_loads() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, full) = (dir.path().join("a.dsv4"), dir.path().join("full.dsv4"));
    make(&out, 7, false).expect("make");
    let artifact = Artifact::open(&out).expect("open");
    for error in [artifact.load_rank(0, 1, &NoProgress).err(), artifact.rank_reader(1).err()] {
        let error = error.expect("no weights");
        assert!(matches!(error, FormatError::Weightless { seed: 7, .. }), "{error}");
        assert!(error.to_string().contains("dsv4-run bench"), "{error}");
    }
    assert!(matches!(artifact.load_rank(2, 1, &NoProgress), Err(FormatError::NoSuchRank { .. })));
    // Real weights of the same layout beside it are not its own.
    pack(&full);
    fs::copy(full.join("rank0.weights"), out.join("rank0.weights")).expect("copy");
    let artifact = Artifact::open(&out).expect("open");
    assert!(
        !artifact.has_rank(0) && matches!(artifact.load_rank(0, 1, &NoProgress), Err(FormatError::Weightless { .. }))
    );
    assert!(matches!(artifact.verify(&NoProgress), Err(FormatError::UnknownFile { .. })));
}

#[test]
fn it_is_received_without_ranks() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (out, there) = (dir.path().join("a.dsv4"), dir.path().join("b.dsv4"));
    make(&out, 7, false).expect("make");
    let artifact = Artifact::open(&out).expect("open");
    let manifest = artifact.manifest_bytes().expect("bytes");
    assert!(matches!(Receiving::begin(&there, &manifest, &[0], false), Err(FormatError::Weightless { .. })));
    let receiving = Receiving::begin(&there, &manifest, &[], false).expect("begin");
    receiving.examine(&NoProgress).expect("examine");
    assert_eq!((receiving.missing_blocks().len(), receiving.missing_files()), (0, vec![true]));
    let bytes = fs::read(out.join("meta")).expect("read");
    let mut buf = dsv4_format::io::AlignedBuf::new(bytes.len().next_multiple_of(4096)).expect("buffer");
    buf[..bytes.len()].copy_from_slice(&bytes);
    assert!(receiving.put_file(0, &mut buf, bytes.len()).expect("put"));
    assert_eq!(receiving.finish(None, Default::default()).expect("finish"), Outcome::Created);
    assert_eq!(Artifact::open(&there).expect("open").manifest(), artifact.manifest());
}
