//! A push from one directory to another: over loopback, interrupted, damaged on the way, refused.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use dsv4_format::{Artifact, FormatError, NoProgress, Outcome};
use dsv4c::CompileError;
use dsv4c::pack::{PackOptions, pack};
use dsv4c::push::{PushOptions, Ranks, ReceiveOptions, Receiver, Token, Transfer, push};
use dsv4c::sign::{Verifier, keygen, sign};

use crate::command::run;
use crate::fixture::{NANO, SmallDisk, TINY, assert_same, names};

type Ended = Result<Transfer, CompileError>;

fn packed(checkpoint: &str, tp: u32, out: &Path) {
    pack(&PackOptions { out: Some(out.to_path_buf()), ..PackOptions::new(checkpoint, tp) }, &NoProgress).unwrap();
}

fn pushing(artifact: &Path, which: Ranks) -> PushOptions {
    PushOptions { artifact: artifact.into(), which, token: Token::none(), timeout: Duration::from_secs(20) }
}

fn receiving(out: &Path) -> ReceiveOptions {
    let (token, timeout) = (Token::none(), Duration::from_secs(20));
    ReceiveOptions { out: out.into(), token, key: None, force: false, timeout }
}

/// Both sides in threads; `between` gets the receiver's address and returns the one to push to.
fn transfer_by(send: PushOptions, receive: ReceiveOptions, between: impl FnOnce(&str) -> String) -> (Ended, Ended) {
    let receiver = Receiver::bind("127.0.0.1:0", receive).unwrap();
    let address = between(&receiver.address().unwrap());
    std::thread::scope(|scope| {
        let received = scope.spawn(move || receiver.accept(&NoProgress, &|line| panic!("{line}")));
        let sent = push(&send, &address, &NoProgress);
        (sent, received.join().unwrap())
    })
}

fn transfer(send: PushOptions, receive: ReceiveOptions) -> (Ended, Ended) {
    transfer_by(send, receive, str::to_owned)
}

/// One connection passed on; `change` sees every piece on its way to the receiver with the number of
/// bytes before it, and ends the connection by `false`.
fn proxy(to: &str, mut change: impl FnMut(u64, &mut [u8]) -> bool + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let to = to.to_owned();
    std::thread::spawn(move || {
        let (mut sender, _) = listener.accept().unwrap();
        let mut receiver = TcpStream::connect(to).unwrap();
        let (mut back_from, mut back_to) = (receiver.try_clone().unwrap(), sender.try_clone().unwrap());
        let back = std::thread::spawn(move || {
            let _ = std::io::copy(&mut back_from, &mut back_to);
            let _ = back_to.shutdown(Shutdown::Write);
        });
        let (mut buf, mut at) = (vec![0; 50_000], 0);
        while let Ok(n @ 1..) = sender.read(&mut buf) {
            if !change(at, &mut buf[..n]) || receiver.write_all(&buf[..n]).is_err() {
                break;
            }
            at += n as u64;
        }
        let _ = receiver.shutdown(Shutdown::Both);
        let _ = sender.shutdown(Shutdown::Both);
        back.join().unwrap();
    });
    address
}

struct Two {
    _temp: tempfile::TempDir,
    here: PathBuf,
    there: PathBuf,
}

impl Two {
    /// `here/x.dsv4` and a directory `there`.
    fn new(checkpoint: &str, tp: u32) -> Two {
        let temp = tempfile::tempdir().unwrap();
        for side in ["here", "there"] {
            fs::create_dir(temp.path().join(side)).unwrap();
        }
        let (here, there) = (temp.path().join("here/x.dsv4"), temp.path().join("there/x.dsv4"));
        packed(checkpoint, tp, &here);
        Two { _temp: temp, here, there }
    }

    /// Names beside the received artifact.
    fn beside(&self) -> Vec<String> {
        names(self.there.parent().unwrap())
    }
}

#[test]
fn all_of_an_artifact_arrives_byte_for_byte() {
    let two = Two::new(NANO, 2);
    let key = keygen(&two.here.with_file_name("k")).unwrap();
    sign(&Artifact::open(&two.here).unwrap(), &key.secret, false).unwrap();
    let receive = ReceiveOptions { key: Some(Verifier::read(&key.public).unwrap()), ..receiving(&two.there) };
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receive);
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!((sent.outcome, received.outcome), (Outcome::Created, Outcome::Created));
    assert_eq!((sent.bytes, sent.kept_bytes, sent.ranks), (received.bytes, 0, vec![0, 1]));
    assert_same(&two.here, &two.there);
    assert_eq!(two.beside(), ["x.dsv4"]);
    Artifact::open(&two.there).unwrap().verify(&NoProgress).unwrap();
    let receipt = fs::read_to_string(two.there.join("RECEIPT.json")).unwrap();
    assert!(receipt.contains("received_from") && receipt.contains(&sent.artifact_id), "{receipt}");

    let (sent, received) = transfer(pushing(&two.here, Ranks::Present), receiving(&two.there));
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!((sent.outcome, sent.bytes, received.bytes), (Outcome::AlreadyThere, 0, 0));
    assert!(sent.kept_bytes > 0 && sent.kept_bytes == received.kept_bytes);
    assert_eq!(two.beside(), ["x.dsv4"]);
}

#[test]
fn a_rank_joins_the_artifact_that_is_there() {
    let two = Two::new(NANO, 2);
    for (rank, outcome) in [(1, Outcome::Created), (0, Outcome::RankAdded)] {
        let (sent, _) = transfer(pushing(&two.here, Ranks::These(vec![rank])), receiving(&two.there));
        assert_eq!(sent.unwrap().outcome, outcome);
        let there = Artifact::open(&two.there).unwrap();
        assert!(there.has_rank(rank));
        assert_eq!(there.verify(&NoProgress).unwrap().absent.is_empty(), outcome == Outcome::RankAdded);
        assert_eq!(two.beside(), ["x.dsv4"]);
    }
    assert_same(&two.here, &two.there);
    // A signature made since then comes along, one that is there stays.
    let key = keygen(&two.here.with_file_name("k")).unwrap();
    sign(&Artifact::open(&two.here).unwrap(), &key.secret, false).unwrap();
    for _ in 0..2 {
        let (sent, _) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
        assert_eq!(sent.unwrap().outcome, Outcome::AlreadyThere);
        assert_same(&two.here, &two.there);
        let other =
            keygen(&two.here.with_file_name("other")).or_else(|_| keygen(&two.here.with_file_name("more"))).unwrap();
        fs::copy(two.there.join("SIGNATURE"), two.here.with_file_name("kept")).unwrap();
        sign(&Artifact::open(&two.here).unwrap(), &other.secret, true).unwrap();
        let (sent, _) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
        assert_eq!(sent.unwrap().outcome, Outcome::AlreadyThere);
        let kept = fs::read(two.here.with_file_name("kept")).unwrap();
        assert_eq!(fs::read(two.there.join("SIGNATURE")).unwrap(), kept);
        fs::write(two.here.join("SIGNATURE"), kept).unwrap();
    }
}

/// Cut after some bytes, again and again: never the final name, and only what is missing is sent.
#[test]
fn an_interrupted_push_resumes() {
    let two = Two::new(NANO, 1);
    let whole = fs::metadata(two.here.join("rank0.weights")).unwrap().len();
    let mut kept = 0;
    // Blocks of 4 and 2 MiB are sent as they were read, in any order: of 20 MiB at most 14 arrive, with block 0 or not.
    for cut in [9 << 20, 7 << 20] {
        let (sent, received) =
            transfer_by(pushing(&two.here, Ranks::All), receiving(&two.there), |to| proxy(to, move |at, _| at < cut));
        let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
        assert_eq!((sent.exit_code(), received.exit_code()), (5, 5), "{sent}\n{received}");
        assert_eq!(two.beside(), [".x.dsv4.partial"]);
        assert!(Artifact::open(&two.there.with_file_name(".x.dsv4.partial")).is_err());
    }
    // What is there stays there, damaged blocks do not count.
    let left = two.there.with_file_name(".x.dsv4.partial").join("rank0.weights");
    let mut bytes = fs::read(&left).unwrap();
    let first = (2 << 20) + (1 << 20);
    bytes[first] ^= 1;
    fs::write(&left, &bytes).unwrap();
    let original = fs::read(two.here.join("rank0.weights")).unwrap();
    // Sections of this artifact are cut into blocks of 4 MiB, from 2 MiB on.
    let artifact = Artifact::open(&two.here).unwrap();
    let mut missing = 0;
    for block in artifact.rank_reader(0).unwrap().blocks() {
        let range = block.file_offset as usize..block.file_offset as usize + block.len;
        if bytes[range.clone()] == original[range] {
            kept += block.len as u64;
        } else {
            missing += block.len as u64;
        }
    }
    assert!(kept >= 4 << 20 && missing > 4 << 20, "{kept} {missing}");
    let files = fs::metadata(two.here.join("meta")).unwrap().len();
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!((sent.bytes, sent.kept_bytes), (missing + files, kept));
    assert_eq!((received.bytes, received.kept_bytes), (missing + files, kept));
    assert!(sent.bytes < whole);
    assert_same(&two.here, &two.there);
    assert_eq!(two.beside(), ["x.dsv4"]);
}

#[test]
fn a_damaged_block_is_asked_for_again() {
    let two = Two::new(NANO, 1);
    let all = {
        let artifact = Artifact::open(&two.here).unwrap();
        artifact.manifest().ranks[0].arena_bytes + artifact.manifest().meta.len
    };
    let (sent, received) = transfer_by(pushing(&two.here, Ranks::All), receiving(&two.there), |to| {
        let mut damaged = false;
        proxy(to, move |at, piece| {
            // Once, far inside the first block.
            if at > 2 << 20 && !damaged {
                piece[0] ^= 0x10;
                damaged = true;
            }
            true
        })
    });
    let (sent, received) = (sent.unwrap(), received.unwrap());
    assert_eq!(sent.bytes, received.bytes);
    assert!(sent.bytes == all + (4 << 20) || sent.bytes == all + (2 << 20), "{} of {all}", sent.bytes);
    assert_same(&two.here, &two.there);
}

#[test]
fn a_way_that_always_damages_is_given_up() {
    let two = Two::new(NANO, 1);
    let (sent, received) = transfer_by(pushing(&two.here, Ranks::All), receiving(&two.there), |to| {
        // A byte in every 3 MiB or so: never a whole block in order.
        let mut next = 2 << 20;
        proxy(to, move |at, piece| {
            if at > next {
                piece[0] ^= 1;
                next = at + (1 << 20);
            }
            true
        })
    });
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    assert_eq!((sent.exit_code(), received.exit_code()), (5, 5), "{sent}\n{received}");
    assert_eq!(two.beside(), [".x.dsv4.partial"]);
}

#[test]
fn a_damaged_source_is_not_sent() {
    let two = Two::new(NANO, 1);
    let file = two.here.join("rank0.weights");
    let mut bytes = fs::read(&file).unwrap();
    bytes[7 << 20] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    assert!(matches!(sent, CompileError::Format(FormatError::Block { .. })) && sent.exit_code() == 3, "{sent}");
    assert!(received.to_string().contains("rank0.weights") && received.exit_code() == 5, "{received}");
    bytes[7 << 20] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let meta = two.here.join("meta");
    let mut bytes = fs::read(&meta).unwrap();
    bytes[100] ^= 1;
    fs::write(&meta, &bytes).unwrap();
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    assert!(matches!(sent, CompileError::Format(FormatError::Hash { .. })), "{sent}");
    assert!(received.exit_code() == 5, "{received}");
    assert_eq!(two.beside(), [".x.dsv4.partial"]);
}

#[test]
fn another_artifact_of_that_name_stays_unless_forced() {
    let two = Two::new(NANO, 1);
    packed(TINY, 1, &two.there);
    let before = Artifact::open(&two.there).unwrap().manifest().artifact_id;
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receiving(&two.there));
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    assert!(matches!(received, CompileError::Format(FormatError::Exists { .. })), "{received}");
    assert_eq!((sent.exit_code(), received.exit_code()), (5, 3));
    assert!(sent.to_string().contains("an artifact is already here"), "{sent}");
    assert_eq!(Artifact::open(&two.there).unwrap().manifest().artifact_id, before);
    assert_eq!(two.beside(), ["x.dsv4"]);

    let force = || ReceiveOptions { force: true, ..receiving(&two.there) };
    let (sent, _) = transfer(pushing(&two.here, Ranks::All), force());
    assert_eq!(sent.unwrap().outcome, Outcome::Replaced);
    assert_same(&two.here, &two.there);
    // The same by force is a repair: only the block that is damaged travels.
    let file = two.there.join("rank0.weights");
    let mut bytes = fs::read(&file).unwrap();
    bytes[3 << 20] ^= 1;
    fs::write(&file, &bytes).unwrap();
    let (sent, _) = transfer(pushing(&two.here, Ranks::All), force());
    let sent = sent.unwrap();
    let block = sent.bytes - fs::metadata(two.here.join("meta")).unwrap().len();
    assert!(sent.outcome == Outcome::Replaced && (block == 4 << 20 || block == 2 << 20), "{}", sent.bytes);
    assert_same(&two.here, &two.there);
    assert_eq!(two.beside(), ["x.dsv4"]);
    // What is no artifact is never replaced.
    fs::write(two.there.join("thesis"), "mine").unwrap();
    let (_, received) = transfer(pushing(&two.here, Ranks::All), force());
    assert!(matches!(received.unwrap_err(), CompileError::Format(FormatError::Occupied { .. })));
}

#[test]
fn a_wrong_token_is_turned_away_and_the_waiting_goes_on() {
    let two = Two::new(TINY, 1);
    let dir = two.here.parent().unwrap();
    let token = |text: &str| {
        let file = dir.join("token");
        fs::write(&file, text).unwrap();
        Token::read(&file).unwrap()
    };
    let right = token("0123456789abcdef\n");
    let receive = ReceiveOptions { token: right.clone(), ..receiving(&two.there) };
    let receiver = Receiver::bind("127.0.0.1:0", receive).unwrap();
    let address = receiver.address().unwrap();
    let lines = Mutex::new(Vec::new());
    let log = |line: &str| lines.lock().unwrap().push(line.to_owned());
    std::thread::scope(|scope| {
        let received = scope.spawn(|| receiver.accept(&NoProgress, &log));
        // Garbage, an older release, and nothing at all.
        TcpStream::connect(&address).unwrap().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut old = TcpStream::connect(&address).unwrap();
        old.write_all(b"DSV4PUSH\0\0\0\0").unwrap();
        let mut greeting = [0; 12];
        old.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"DSV4PUSH\x01\0\0\0");
        drop(TcpStream::connect(&address).unwrap());
        for wrong in [Token::none(), token("0123456789abcdeF")] {
            let send = PushOptions { token: wrong, ..pushing(&two.here, Ranks::All) };
            let error = push(&send, &address, &NoProgress).unwrap_err();
            assert!(error.exit_code() == 5 && error.to_string().contains("token"), "{error}");
        }
        assert!(two.beside().is_empty());
        let send = PushOptions { token: right, ..pushing(&two.here, Ranks::All) };
        push(&send, &address, &NoProgress).unwrap();
        received.join().unwrap().unwrap();
    });
    let lines = lines.into_inner().unwrap();
    assert_eq!(lines.len(), 5, "{lines:#?}");
    assert!(lines[1].contains("version") && lines[1].contains("expected 1, found 0"), "{}", lines[1]);
    for text in ["short", ""] {
        fs::write(dir.join("token"), text).unwrap();
        assert!(Token::read(&dir.join("token")).is_err());
    }
    assert_same(&two.here, &two.there);
}

/// A receiver that cannot prove the token learns nothing but a hash.
#[test]
fn a_wrong_receiver_gets_no_offer() {
    let two = Two::new(TINY, 1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let wrong = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&[b"DSV4PUSH\x01\0\0\0", &[7; 32][..]].concat()).unwrap();
        let mut all = vec![0; 44 + 69];
        stream.read_exact(&mut all).unwrap();
        // A welcome with the sender's own proof.
        stream.write_all(&[&[2, 32, 0, 0, 0], &all[44 + 37..]].concat()).unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        rest.len()
    });
    let error = push(&pushing(&two.here, Ranks::All), &address, &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Peer { at: "token", .. }), "{error}");
    // The refusal only.
    assert!(wrong.join().unwrap() < 1100);
}

#[test]
fn offers_that_are_not_right_are_refused() {
    let two = Two::new(NANO, 2);
    let key = keygen(&two.here.with_file_name("k")).unwrap();
    let keyed = || ReceiveOptions { key: Some(Verifier::read(&key.public).unwrap()), ..receiving(&two.there) };
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), keyed());
    assert_eq!((sent.unwrap_err().exit_code(), received.unwrap_err().exit_code()), (5, 3));
    let other = keygen(&two.here.with_file_name("other")).unwrap();
    sign(&Artifact::open(&two.here).unwrap(), &other.secret, false).unwrap();
    let (_, received) = transfer(pushing(&two.here, Ranks::All), keyed());
    assert!(matches!(received.unwrap_err(), CompileError::Signature { .. }));
    assert!(two.beside().is_empty());
    // Before connecting: nobody listens at that address.
    let absent = pushing(&two.here, Ranks::These(vec![2]));
    let error = push(&absent, "127.0.0.1:1", &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::NoSuchRank { rank: 2, .. })), "{error}");
    fs::remove_file(two.here.join("rank1.weights")).unwrap();
    let error = push(&pushing(&two.here, Ranks::All), "127.0.0.1:1", &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Format(FormatError::RankMissing { rank: 1, .. })), "{error}");
    let error = push(&pushing(&two.here, Ranks::Present), "127.0.0.1:1", &NoProgress).unwrap_err();
    assert!(matches!(error, CompileError::Network { .. }) && error.exit_code() == 5, "{error}");
}

#[test]
fn silence_ends_a_push_and_a_receive() {
    let two = Two::new(TINY, 1);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let timeout = Duration::from_millis(300);
    let started = Instant::now();
    let send = PushOptions { timeout, ..pushing(&two.here, Ranks::All) };
    let error = push(&send, &address, &NoProgress).unwrap_err();
    assert!(error.exit_code() == 5 && error.to_string().contains("timed out"), "{error}");
    // A sender that stops in the middle without closing.
    let receive = ReceiveOptions { timeout, ..receiving(&two.there) };
    let (_, received) = transfer_by(send, receive, |to| {
        proxy(to, |at, _| {
            if at > 1 << 20 {
                std::thread::sleep(Duration::from_secs(2));
            }
            true
        })
    });
    let error = received.unwrap_err();
    assert!(error.exit_code() == 5 && error.to_string().contains("timed out"), "{error}");
    assert!(started.elapsed() < Duration::from_secs(15));
}

#[test]
fn a_full_disk_is_said_to_both_and_stays_free() {
    let two = Two::new(NANO, 1);
    let Some(disk) = SmallDisk::mount(12) else { return };
    let out = disk.path().join("x.dsv4");
    let (sent, received) = transfer(pushing(&two.here, Ranks::All), receiving(&out));
    let (sent, received) = (sent.unwrap_err(), received.unwrap_err());
    assert!(matches!(received, CompileError::Format(FormatError::NoSpace { .. })), "{received}");
    assert!(sent.to_string().contains("the disk is full"), "{sent}");
    assert_eq!(names(&disk.path().join(".x.dsv4.partial")), ["MANIFEST"]);
}

/// Killed outright, either side: a partial that resumes, and no final name.
#[test]
fn killed_commands_leave_what_resumes() {
    let two = Two::new(NANO, 2);
    let (here, there) = (two.here.parent().unwrap(), two.there.parent().unwrap());
    let start = |args: &[&str], dir: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dsv4c"));
        command.args(args).current_dir(dir).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let listen = || {
        let mut receiver = start(&["receive", "--listen", "127.0.0.1:0", "-o", "x.dsv4", "--json"], there);
        let mut line = Vec::new();
        let stderr = receiver.stderr.as_mut().unwrap();
        let mut byte = [0];
        while stderr.read_exact(&mut byte).is_ok() && byte[0] != b'\n' {
            line.push(byte[0]);
        }
        let line = String::from_utf8(line).unwrap();
        (receiver, line.strip_prefix("waiting at ").unwrap().to_owned())
    };
    for kill_receiver in [false, true] {
        let (mut receiver, address) = listen();
        // The second push has only the rest to send.
        let middle_bytes = if kill_receiver { 1 << 20 } else { 5 << 20 };
        let (reached, middle) = std::sync::mpsc::channel();
        let slow = proxy(&address, move |at, _| {
            if at > middle_bytes {
                let _ = reached.send(());
                std::thread::sleep(Duration::from_millis(50));
            }
            true
        });
        let mut sender = start(&["push", "x.dsv4", &slow, "--rank", "0"], here);
        middle.recv().unwrap();
        let (killed, other) = if kill_receiver { (&mut receiver, &mut sender) } else { (&mut sender, &mut receiver) };
        killed.kill().unwrap();
        killed.wait().unwrap();
        assert_eq!(other.wait().unwrap().code(), Some(5));
        assert_eq!(names(there), [".x.dsv4.partial"]);
    }
    let (receiver, address) = listen();
    let (code, out, err) = run(&["push", "x.dsv4", &address, "--rank", "0", "--json"], here);
    assert_eq!(code, 0, "{err}");
    let sent: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(sent["kept_bytes"].as_u64().unwrap() >= 4 << 20, "{sent}");
    let received = receiver.wait_with_output().unwrap();
    assert_eq!(received.status.code(), Some(0));
    let received: serde_json::Value = serde_json::from_slice(&received.stdout).unwrap();
    assert_eq!((&received["outcome"], &received["bytes"]), (&"created".into(), &sent["bytes"]));
    assert_eq!(names(there), ["x.dsv4"]);
    assert_eq!(run(&["verify", "x.dsv4"], there).0, 0);
    let (code, _, err) = run(&["push", "x.dsv4", "nowhere.invalid:1"], here);
    assert!(code == 5 && err.contains("nowhere.invalid"), "{err}");
    assert_eq!(run(&["push", "x.dsv4", "127.0.0.1:1", "--rank", "0", "--all"], here).0, 2);
}
