//! Keys and signatures, in minisign's file formats: what is signed here, minisign verifies
//! (`minisign -V -m ART/MANIFEST -x ART/SIGNATURE -p NAME.pub`), and the other way round.
//!
//! A signature is of the MANIFEST file, which names and hashes everything else: ed25519 over the
//! file's BLAKE2b-512 hash, and a second time over that signature and its trusted comment. Signing is
//! ed25519-dalek's, checking minisign-verify's, so one does not repeat the other's mistakes. Absent:
//! secret keys under a password (they are told apart and refused), and the old signatures of unhashed files.

mod base64;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use blake2::{Blake2b512, Digest};
use dsv4_format::Artifact;
use ed25519_dalek::{Signer, SigningKey};
use minisign_verify::{PublicKey, Signature};
use rustix::rand::{GetRandomFlags, getrandom};

use crate::error::CompileError;

/// Ed25519, in key files.
const KEY: [u8; 2] = *b"Ed";
/// Ed25519 over a BLAKE2b-512 hash, in signatures.
const HASHED: [u8; 2] = *b"ED";
const NO_PASSWORD: [u8; 2] = [0; 2];
const CHECKSUM: [u8; 2] = *b"B2";
const UNTRUSTED: &str = "untrusted comment: ";
const TRUSTED: &str = "trusted comment: ";
const KEY_FILE_BYTES_MAX: u64 = 4096;

// A secret key: three algorithm names, 48 bytes about the password, key id, key pair, checksum.
const SECRET_BYTES: usize = 158;
const SECRET_ID: usize = 54;
const SECRET_PAIR: usize = 62;
const SECRET_CHECK: usize = 126;
const PUBLIC_BYTES: usize = 42;
const SIGNATURE_BYTES: usize = 74;

/// Names a key pair; minisign prints it as one hexadecimal number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyId([u8; 8]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:016X}", u64::from_le_bytes(self.0))
    }
}

/// A key pair that was made.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub id: KeyId,
    pub secret: PathBuf,
    pub public: PathBuf,
}

/// Makes `NAME.key` (secret, for its owner only, without a password) and `NAME.pub`. Neither is ever
/// overwritten: a lost secret key cannot be made again.
pub fn keygen(name: &Path) -> Result<NewKey, CompileError> {
    let file = |extension: &str| {
        let mut path = name.as_os_str().to_os_string();
        path.push(extension);
        PathBuf::from(path)
    };
    let (secret, public) = (file(".key"), file(".pub"));
    let mut random = [0; 40];
    // Blocks until the kernel has gathered randomness; 40 bytes are never given in part.
    let given = getrandom(&mut random[..], GetRandomFlags::empty());
    given.map_err(|e| CompileError::io("take random bytes for", &secret)(e.into()))?;
    let (mut id, mut seed) = ([0; 8], [0; 32]);
    id.copy_from_slice(&random[..8]);
    seed.copy_from_slice(&random[8..]);
    let key = SecretKey { id: KeyId(id), pair: SigningKey::from_bytes(&seed) };
    write_new(&public, 0o644, &key.public_text())?;
    if let Err(error) = write_new(&secret, 0o600, &key.text()) {
        // Of no use alone, and it was not there before.
        let _ = fs::remove_file(&public);
        return Err(error);
    }
    Ok(NewKey { id: key.id, secret, public })
}

fn write_new(path: &Path, mode: u32, text: &str) -> Result<(), CompileError> {
    let mut file = match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            return Err(CompileError::Occupied { path: path.to_path_buf(), found: "a file, perhaps a key in use" });
        }
        Err(e) => return Err(CompileError::io("create", path)(e)),
    };
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(|e| {
        let _ = fs::remove_file(path);
        CompileError::io("write", path)(e)
    })
}

struct SecretKey {
    id: KeyId,
    pair: SigningKey,
}

impl SecretKey {
    fn read(path: &Path) -> Result<SecretKey, CompileError> {
        let fault = |found: &str| CompileError::Key {
            file: path.to_path_buf(),
            expected: "a secret key of minisign's format without a password",
            found: found.to_owned(),
            help: "give the .key file that `dsv4c keygen` (or `minisign -G -W`) made",
        };
        let text = read_text(path, KEY_FILE_BYTES_MAX)?;
        let bytes = two_lines(&text).and_then(base64::decode::<SECRET_BYTES>);
        let bytes = bytes.ok_or_else(|| fault("something else, perhaps a public key"))?;
        if bytes[..2] != KEY || bytes[4..6] != CHECKSUM {
            return Err(fault("a key of another kind"));
        }
        if bytes[2..4] != NO_PASSWORD {
            return Err(fault("one under a password"));
        }
        let (mut id, mut pair) = ([0; 8], [0; 64]);
        id.copy_from_slice(&bytes[SECRET_ID..SECRET_PAIR]);
        pair.copy_from_slice(&bytes[SECRET_PAIR..SECRET_CHECK]);
        // The checksum is zero without a password; that the two halves are a pair says more.
        let pair = SigningKey::from_keypair_bytes(&pair);
        let pair = pair.map_err(|_| fault("one whose public half is not its own: the file is damaged"))?;
        Ok(SecretKey { id: KeyId(id), pair })
    }

    fn text(&self) -> String {
        let mut bytes = [0; SECRET_BYTES];
        bytes[..2].copy_from_slice(&KEY);
        bytes[2..4].copy_from_slice(&NO_PASSWORD);
        bytes[4..6].copy_from_slice(&CHECKSUM);
        bytes[SECRET_ID..SECRET_PAIR].copy_from_slice(&self.id.0);
        bytes[SECRET_PAIR..SECRET_CHECK].copy_from_slice(&self.pair.to_keypair_bytes());
        format!("{UNTRUSTED}dsv4c secret key {}\n{}\n", self.id, base64::encode(&bytes))
    }

    fn public_text(&self) -> String {
        let mut bytes = [0; PUBLIC_BYTES];
        bytes[..2].copy_from_slice(&KEY);
        bytes[2..10].copy_from_slice(&self.id.0);
        bytes[10..].copy_from_slice(self.pair.verifying_key().as_bytes());
        format!("{UNTRUSTED}minisign public key {}\n{}\n", self.id, base64::encode(&bytes))
    }

    fn sign(&self, bytes: &[u8], comment: &str) -> String {
        let signature = self.pair.sign(&Blake2b512::digest(bytes)).to_bytes();
        let mut body = [0; SIGNATURE_BYTES];
        body[..2].copy_from_slice(&HASHED);
        body[2..10].copy_from_slice(&self.id.0);
        body[10..].copy_from_slice(&signature);
        let global = self.pair.sign(&[&signature[..], comment.as_bytes()].concat()).to_bytes();
        let (body, global) = (base64::encode(&body), base64::encode(&global));
        format!("{UNTRUSTED}signature by dsv4c, key {}\n{body}\n{TRUSTED}{comment}\n{global}\n", self.id)
    }
}

/// A signature, made or found right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signed {
    pub key: KeyId,
    /// Signed along with the MANIFEST: what the signer says about it.
    pub comment: String,
}

/// Signs an artifact: writes its SIGNATURE. One that is there already is replaced only with `force`.
pub fn sign(artifact: &Artifact, key: &Path, force: bool) -> Result<Signed, CompileError> {
    let secret = SecretKey::read(key)?;
    if !force && artifact.signature()?.is_some() {
        let path = artifact.path().join("SIGNATURE");
        return Err(CompileError::Occupied { path, found: "a signature; --force replaces it" });
    }
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let comment = format!("timestamp:{now}\tfile:MANIFEST\tartifact:{}\thashed", artifact.manifest().artifact_id);
    let text = secret.sign(&artifact.manifest_bytes()?, &comment);
    artifact.set_signature(text.as_bytes())?;
    Ok(Signed { key: secret.id, comment })
}

/// A public key that signatures are checked with.
pub struct Verifier {
    id: KeyId,
    key: PublicKey,
}

impl Verifier {
    /// Reads a `.pub` file.
    pub fn read(path: &Path) -> Result<Verifier, CompileError> {
        let text = read_text(path, KEY_FILE_BYTES_MAX)?;
        let read = || {
            let bytes = two_lines(&text).and_then(base64::decode::<PUBLIC_BYTES>)?;
            let (algorithm, rest) = bytes.split_first_chunk::<2>()?;
            let id = rest.first_chunk::<8>()?;
            let key = PublicKey::decode(&text).ok()?;
            (*algorithm == KEY).then_some(Verifier { id: KeyId(*id), key })
        };
        read().ok_or_else(|| CompileError::Key {
            file: path.to_path_buf(),
            expected: "a public key of minisign's format",
            found: "something else".into(),
            help: "give the .pub file that `dsv4c keygen` (or `minisign -G`) made",
        })
    }

    /// Requires the artifact to be signed with this key.
    pub fn check(&self, artifact: &Artifact) -> Result<Signed, CompileError> {
        let file = artifact.path().join("SIGNATURE");
        self.check_bytes(&artifact.manifest_bytes()?, artifact.signature()?.as_deref(), &file)
    }

    /// Requires `signature` (`file` in messages) to be one of `manifest` with this key.
    pub fn check_bytes(&self, manifest: &[u8], signature: Option<&[u8]>, file: &Path) -> Result<Signed, CompileError> {
        let fault = |found: String, help| CompileError::Signature {
            file: file.to_path_buf(),
            expected: format!("MANIFEST signed with key {}", self.id),
            found,
            help,
        };
        const DAMAGED: &str = "the file is damaged or of another program; fetch the artifact again";
        let Some(bytes) = signature else {
            return Err(fault("no signature".into(), "have the artifact signed (`dsv4c sign`), or do without --key"));
        };
        let parts = std::str::from_utf8(bytes).ok().and_then(four_lines);
        let Some((text, body, comment)) = parts else {
            return Err(fault("something that is no minisign signature".into(), DAMAGED));
        };
        let (id, hashed) = (KeyId(body.1), body.0 == HASHED);
        if id != self.id {
            let help = "use the public key of who signed this, or fetch the artifact from whom you trust";
            return Err(fault(format!("one with key {id}"), help));
        }
        if !hashed {
            let help = "sign again with `dsv4c sign`, or with minisign 0.8 or later";
            return Err(fault("one of another algorithm, not of the hash".into(), help));
        }
        let signature = Signature::decode(text).map_err(|e| fault(e.to_string(), DAMAGED))?;
        self.key.verify(manifest, &signature, false).map_err(|_| {
            let help = "do not use this artifact: MANIFEST or SIGNATURE is not what was signed; fetch both again";
            fault("a signature that does not fit".into(), help)
        })?;
        Ok(Signed { key: self.id, comment: comment.to_owned() })
    }
}

/// A key file's second line; there is no third.
fn two_lines(text: &str) -> Option<&str> {
    let mut lines = text.lines();
    lines.next()?.starts_with(UNTRUSTED).then_some(())?;
    let line = lines.next()?;
    lines.next().is_none().then_some(line)
}

type Body = ([u8; 2], [u8; 8]);

/// A signature's text, the algorithm and key id in it, and its trusted comment. Nothing may hide
/// behind the fourth line.
fn four_lines(text: &str) -> Option<(&str, Body, &str)> {
    let lines: Vec<&str> = text.split_terminator('\n').collect();
    let [untrusted, body, trusted, global] = lines[..] else { return None };
    if !untrusted.starts_with(UNTRUSTED) || untrusted.chars().chain(trusted.chars()).any(|c| c == '\r') {
        return None;
    }
    let body: [u8; SIGNATURE_BYTES] = base64::decode(body)?;
    base64::decode::<64>(global)?;
    let (algorithm, rest) = body.split_first_chunk::<2>()?;
    Some((text, (*algorithm, *rest.first_chunk::<8>()?), trusted.strip_prefix(TRUSTED)?))
}

fn read_text(path: &Path, limit: u64) -> Result<String, CompileError> {
    let file = File::open(path).map_err(CompileError::io("open", path))?;
    let mut text = String::new();
    let read = file.take(limit + 1).read_to_string(&mut text);
    let found = read.map_err(CompileError::io("read", path))? as u64;
    if found > limit {
        return Err(CompileError::TooLarge { file: path.to_path_buf(), limit, found });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of the README of minisign-verify: made by another program.
    #[test]
    fn a_foreign_signature_and_its_alterations() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("theirs.pub");
        let key = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
        fs::write(&file, format!("{UNTRUSTED}theirs\n{key}\n")).unwrap();
        let verifier = Verifier::read(&file).unwrap();
        assert_eq!(verifier.id.to_string(), "E7620F1842B4E81F");
        let good = "untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1633700835\tfile:test\tprehashed
wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==";
        let check = |text: &str| verifier.check_bytes(b"test", Some(text.as_bytes()), Path::new("x"));
        assert_eq!(check(good).unwrap().comment, "timestamp:1633700835\tfile:test\tprehashed");
        assert!(check(&format!("{good}\n")).is_ok());
        // Every letter of all but the untrusted comment counts.
        let start = good.find('\n').unwrap() + 1;
        for at in start..good.len() {
            let mut bytes = good.as_bytes().to_vec();
            bytes[at] = if bytes[at] == b'Q' { b'R' } else { b'Q' };
            let text = String::from_utf8(bytes).unwrap();
            assert!(check(&text).is_err(), "letter {at}: {text}");
        }
        for other in [format!("{good}\nmore"), format!("{good}\n\n"), good.replace('\n', "\r\n"), String::new()] {
            assert!(check(&other).is_err(), "{other:?}");
        }
        assert!(verifier.check_bytes(b"test!", Some(good.as_bytes()), Path::new("x")).is_err());
        assert!(verifier.check_bytes(b"test", None, Path::new("x")).is_err());
        // The old kind of signature, by the same key.
        let old = good.replacen("RUQf", "RWQf", 1);
        assert!(check(&old).unwrap_err().to_string().contains("another algorithm"));
    }
}
