//! Keys and signatures: both directions with minisign's own code, and every way to be wrong.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use dsv4_format::{Artifact, NoProgress};
use dsv4c::CompileError;
use dsv4c::pack::{PackOptions, pack};
use dsv4c::sign::{Verifier, keygen, sign};
use minisign_verify::{PublicKey, Signature};

use crate::command::{json, run};
use crate::fixture::{TINY, names};

fn artifact(dir: &Path) -> Artifact {
    let out = dir.join("tiny.dsv4");
    pack(&PackOptions { out: Some(out.clone()), ..PackOptions::new(TINY, 1) }, &NoProgress).unwrap();
    Artifact::open(&out).unwrap()
}

#[test]
fn a_signature_is_of_the_manifest_and_of_nothing_else() {
    let temp = tempfile::tempdir().unwrap();
    let artifact = artifact(temp.path());
    let key = keygen(&temp.path().join("mine")).unwrap();
    let other = keygen(&temp.path().join("other")).unwrap();
    assert_ne!(key.id, other.id);
    let signed = sign(&artifact, &key.secret, false).unwrap();
    assert!(signed.comment.contains(&artifact.manifest().artifact_id.to_string()), "{}", signed.comment);
    let manifest = fs::read(artifact.path().join("MANIFEST")).unwrap();
    let file = artifact.path().join("SIGNATURE");
    let text = fs::read_to_string(&file).unwrap();
    let theirs = PublicKey::from_file(&key.public).unwrap();
    theirs.verify(&manifest, &Signature::decode(&text).unwrap(), false).unwrap();

    let verifier = Verifier::read(&key.public).unwrap();
    assert_eq!(verifier.check(&artifact).unwrap(), signed);
    let error = Verifier::read(&other.public).unwrap().check(&artifact).unwrap_err();
    assert!(error.to_string().contains(&key.id.to_string()) && error.exit_code() == 3, "{error}");
    // Every byte of the manifest counts.
    for at in [0, 24, 4096, manifest.len() - 1] {
        let mut bytes = manifest.clone();
        bytes[at] ^= 1;
        assert!(verifier.check_bytes(&bytes, Some(text.as_bytes()), &file).is_err(), "byte {at}");
    }
    let edits = [
        text.replace("file:MANIFEST", "file:MANIFESt"),
        text.replacen("\nRU", "\nRW", 1),
        text.lines().take(3).collect::<Vec<_>>().join("\n"),
        format!("{text}more\n"),
        text.repeat(2),
        String::new(),
    ];
    for edit in edits {
        fs::write(&file, &edit).unwrap();
        let error = verifier.check(&artifact).unwrap_err();
        assert!(matches!(error, CompileError::Signature { .. }) && error.exit_code() == 3, "{edit}: {error}");
    }
    fs::remove_file(&file).unwrap();
    let error = verifier.check(&artifact).unwrap_err();
    assert!(error.to_string().contains("no signature"), "{error}");
}

#[test]
fn nothing_is_overwritten_and_the_secret_is_for_its_owner() {
    let temp = tempfile::tempdir().unwrap();
    let name = temp.path().join("k.v1");
    let key = keygen(&name).unwrap();
    assert_eq!(names(temp.path()), ["k.v1.key", "k.v1.pub"]);
    assert_eq!(fs::metadata(&key.secret).unwrap().permissions().mode() & 0o777, 0o600);
    let before = (fs::read(&key.secret).unwrap(), fs::read(&key.public).unwrap());
    assert!(matches!(keygen(&name), Err(CompileError::Occupied { .. })));
    fs::remove_file(&key.public).unwrap();
    assert!(matches!(keygen(&name), Err(CompileError::Occupied { .. })));
    assert_eq!((names(temp.path()), fs::read(&key.secret).unwrap()), (vec!["k.v1.key".into()], before.0));
    fs::rename(&key.secret, &key.public).unwrap();
    assert!(matches!(keygen(&name), Err(CompileError::Occupied { .. })));
    assert_eq!(names(temp.path()), ["k.v1.pub"]);

    let artifact = artifact(temp.path());
    let key = keygen(&temp.path().join("new")).unwrap();
    sign(&artifact, &key.secret, false).unwrap();
    let first = artifact.signature().unwrap();
    assert!(matches!(sign(&artifact, &key.secret, false), Err(CompileError::Occupied { .. })));
    assert_eq!(artifact.signature().unwrap(), first);
    sign(&artifact, &key.secret, true).unwrap();
    assert!(!names(temp.path()).iter().any(|name| name.contains("partial")));
}

#[test]
fn keys_that_are_none_are_told_apart() {
    let temp = tempfile::tempdir().unwrap();
    let artifact = artifact(temp.path());
    let key = keygen(&temp.path().join("k")).unwrap();
    let text = fs::read_to_string(&key.secret).unwrap();
    let bad = temp.path().join("bad");
    let (comment, body) = text.split_once('\n').unwrap();
    // The first digits are the algorithm and the password's: "RWQA" is Ed and a zero.
    let protected = body.replacen("RWQA", "RWRT", 1);
    // A digit of the seed.
    let seed = body.char_indices().map(|(i, c)| {
        if i == 90 && c == 'A' {
            'B'
        } else if i == 90 {
            'A'
        } else {
            c
        }
    });
    for (text, words) in [
        (fs::read_to_string(&key.public).unwrap(), "perhaps a public key"),
        (format!("{comment}\n{protected}"), "password"),
        (format!("{comment}\n{}", seed.collect::<String>()), "public half is not its own"),
        (String::new(), "something else"),
        ("x".repeat(4097), "at least 4097"),
    ] {
        fs::write(&bad, text).unwrap();
        let error = sign(&artifact, &bad, false).unwrap_err();
        assert!(error.to_string().contains(words) && error.exit_code() == 3, "{error}");
    }
    assert!(Verifier::read(&key.secret).is_err());
    assert!(sign(&artifact, &temp.path().join("none"), false).is_err());
    assert_eq!(artifact.signature().unwrap(), None);
}

#[test]
fn the_command_signs_and_verifies() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path();
    artifact(dir);
    let verify = ["verify", "tiny.dsv4", "--json"];
    assert!(json(&verify, dir)["signature"].is_null());
    let (code, _, err) = run(&["verify", "tiny.dsv4", "--key", "k.pub"], dir);
    assert!(code == 3 && err.contains("k.pub"), "{err}");
    let (code, out, _) = run(&["keygen", "-o", "k"], dir);
    assert!(code == 0 && out.contains("k.key") && out.contains("k.pub"), "{out}");
    assert_eq!(run(&["keygen", "-o", "k"], dir).0, 3);
    let (code, _, err) = run(&["verify", "tiny.dsv4", "--key", "k.pub"], dir);
    assert!(code == 3 && err.contains("no signature"), "{err}");
    assert_eq!(run(&["sign", "tiny.dsv4", "--key", "k.key"], dir).0, 0);
    assert_eq!(run(&["sign", "tiny.dsv4", "--key", "k.key"], dir).0, 3);
    assert_eq!(run(&["sign", "tiny.dsv4", "--key", "k.key", "--force"], dir).0, 0);
    assert_eq!(json(&verify, dir)["signature"], "unchecked");
    let (code, out, _) = run(&["verify", "tiny.dsv4"], dir);
    assert!(code == 0 && out.contains("unchecked without --key"), "{out}");
    let found = json(&["verify", "tiny.dsv4", "--json", "--key", "k.pub"], dir);
    assert!(found["signature"]["comment"].as_str().unwrap().contains("file:MANIFEST"), "{found}");
    // Packing the same again leaves the signature.
    assert_eq!(run(&["pack", TINY, "--tp", "1", "--arch", "none", "-o", "tiny.dsv4"], dir).0, 0);
    assert_eq!(json(&verify, dir)["signature"], "unchecked");
}

/// The stock program, where it is installed.
#[test]
fn minisign_and_this_program_accept_each_other() {
    let temp = tempfile::tempdir().unwrap();
    let minisign = |args: &[&str]| Command::new("minisign").args(args).current_dir(temp.path()).output();
    if minisign(&["-v"]).is_err() {
        eprintln!("SKIPPED: minisign's own program: it is not installed here");
        return;
    }
    let minisign = |args: &[&str]| {
        let out = minisign(args).unwrap();
        (out.status.success(), String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned())
    };
    let artifact = artifact(temp.path());
    let ours = keygen(&temp.path().join("ours")).unwrap();
    let signed = sign(&artifact, &ours.secret, false).unwrap();
    let verify = ["-V", "-m", "tiny.dsv4/MANIFEST", "-x", "tiny.dsv4/SIGNATURE", "-p"];
    let (good, text) = minisign(&[&verify[..], &["ours.pub"]].concat());
    assert!(good && text.contains(&signed.comment), "{text}");
    // Our secret key in its hands, and its signature and key in ours.
    let (good, text) = minisign(&["-S", "-s", "ours.key", "-m", "tiny.dsv4/MANIFEST", "-x", "tiny.dsv4/SIGNATURE"]);
    assert!(good, "{text}");
    Verifier::read(&ours.public).unwrap().check(&artifact).unwrap();
    artifact.verify(&NoProgress).unwrap();
    assert!(minisign(&["-G", "-W", "-s", "theirs.key", "-p", "theirs.pub"]).0);
    let theirs = temp.path().join("theirs.key");
    sign(&artifact, &theirs, true).unwrap();
    let (good, text) = minisign(&[&verify[..], &["theirs.pub"]].concat());
    assert!(good, "{text}");
    assert!(!minisign(&[&verify[..], &["ours.pub"]].concat()).0);
}
