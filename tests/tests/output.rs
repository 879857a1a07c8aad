//! What the programs write, and to whom: lost output, lost readers, limits of options.

use std::fs::OpenOptions;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{self, DSV4_RUN, DSV4C, run};

fn text(packed: &Packed) -> &str {
    packed.path().to_str().expect("a path of ASCII")
}

fn full() -> Stdio {
    Stdio::from(OpenOptions::new().write(true).open("/dev/full").expect("/dev/full"))
}

/// Runs with standard output and error sent elsewhere; exit code and what came on the piped one.
fn sent(name: &str, args: &[&str], out: Stdio, err: Stdio) -> (Option<i32>, String) {
    let mut command = Command::new(binaries::path(name));
    let done = command.args(args).stdin(Stdio::null()).stdout(out).stderr(err).output().expect("a program of ours");
    (done.status.code(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
}

#[test]
fn output_that_is_lost_is_an_error() {
    let nano = Packed::nano(1);
    for more in [&["--json"][..], &[]] {
        let args = [&[text(&nano), "generate", "--prompt", "Hi", "--max-tokens", "3"], more].concat();
        let (code, message) = sent(DSV4_RUN, &args, full(), Stdio::piped());
        assert_eq!(code, Some(3), "{message}");
        assert!(message.contains("writing standard output") && message.contains("help: "), "{message}");
    }
    let (code, message) = sent(DSV4C, &["inspect", text(&nano), "--json"], full(), Stdio::piped());
    assert_eq!(code, Some(3), "{message}");
}

#[test]
fn messages_that_are_lost_change_nothing() {
    let nano = Packed::nano(1);
    let args = [text(&nano), "generate", "--prompt", "What is the capital of Spain?"];
    let (code, answer) = sent(DSV4_RUN, &args, Stdio::piped(), full());
    assert_eq!((code, answer.trim()), (Some(0), "The capital of Spain is Madrid."));
    let (code, _) = sent(DSV4_RUN, &["/nowhere", "chat"], Stdio::piped(), full());
    assert_eq!(code, Some(3));
    let (code, _) = sent(DSV4C, &["pack", "/nowhere", "--tp", "1"], Stdio::piped(), full());
    assert_eq!(code, Some(3));
}

#[test]
fn drafts_do_not_need_large_chunks() {
    let nano = Packed::nano(2);
    let base = [text(&nano), "generate", "--prompt", "Count from 3 to 9.", "--quiet"];
    let expected = run(DSV4_RUN, base).ok().to_owned();
    for chunk in ["1", "4"] {
        let args = [&base[..], &["--chunk", chunk, "--draft", "15"]].concat();
        assert_eq!(run(DSV4_RUN, args).ok(), expected, "chunk {chunk}");
    }
}

/// A chat that waits for lines.
fn chat(packed: &Packed) -> Child {
    let mut command = Command::new(binaries::path(DSV4_RUN));
    command.args([text(packed), "chat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().expect("dsv4-run")
}

#[test]
fn chat_refuses_what_is_no_text() {
    let nano = Packed::nano(1);
    let mut chat = chat(&nano);
    chat.stdin.take().expect("piped").write_all(b"Hi\n\xff\xfe\nHello\n").expect("a running program");
    let done = chat.wait_with_output().expect("a program of ours");
    let message = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(3), "{message}");
    assert!(message.contains("reading standard input"), "{message}");
}

#[test]
fn a_rank_that_ends_while_nobody_types_is_noticed() {
    let nano = Packed::nano(2);
    let mut chat = chat(&nano);
    let mut input = chat.stdin.take().expect("piped");
    input.write_all(b"What is 1 + 1?\n").expect("a running program");
    let children = loop {
        let children = binaries::children(chat.id());
        if !children.is_empty() {
            break children;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    std::thread::sleep(Duration::from_secs(1));
    binaries::kill(children[0]);
    let (sender, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(chat.wait_with_output()));
    let done = ended.recv_timeout(Duration::from_secs(10)).expect("rank 0 ends").expect("a program of ours");
    let message = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(5), "{message}");
    assert!(message.contains("rank 1"), "{message}");
    drop(input);
}

#[test]
fn ranks_and_peers_that_cannot_be() {
    let nano = Packed::nano(2);
    for (more, word) in [
        (&["--rank", "5", "--peers", "127.0.0.1:7001,127.0.0.1:7002"][..], "rank below 2"),
        (&["--rank", "0", "--peers", "nonsense,127.0.0.1:7002"], "nonsense: expected HOST:PORT"),
    ] {
        let args = [&[text(&nano), "generate", "--prompt", "x"], more].concat();
        run(DSV4_RUN, args).fails(2, &[word]);
    }
}
