//! Local ranks: the greeting, the ports, real child processes, and how they end.

use std::ffi::OsString;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio, exit};
use std::time::{Duration, Instant};

use dsv4_kernels::collective::Collective;

use super::super::control::Control;
use super::super::error::PeerError;
use super::super::local::{LocalRanks, join_local};
use super::{facts, seconds};

/// Arguments that make this test program run only `child_rank`, which then finds the arguments
/// that `spawn` adds. `mode` is a filter that matches no test.
fn child_args(mode: &str) -> Vec<OsString> {
    let name = "ranks::tests::locals::child_rank";
    [name, "--exact", "--nocapture", "--", mode].map(OsString::from).to_vec()
}

fn spawn(mode: &str, tp: u32) -> LocalRanks {
    LocalRanks::spawn(&std::env::current_exe().unwrap(), &child_args(mode), tp).unwrap()
}

/// The other side of the tests below: a local rank if this process was started as one.
#[test]
fn child_rank() {
    let args: Vec<String> = std::env::args().collect();
    let value = |flag: &str| args.iter().skip_while(|arg| *arg != flag).nth(1).cloned();
    let (Some(rank), Some(leader)) = (value("--local-rank"), value("--local-leader")) else {
        return;
    };
    let mode = value("--").unwrap();
    if mode == "mode-exit-9" {
        exit(9);
    }
    let leader: SocketAddr = leader.parse().unwrap();
    let seat = join_local(rank.parse().unwrap(), leader, std::io::stdin(), || exit(5)).unwrap();
    let artifact = if mode == "mode-other" { "b2" } else { "a1" };
    let mut mesh = match seat.connect(facts(artifact), seconds(20)) {
        Ok(mesh) => mesh,
        Err(error) => {
            eprintln!("{error}");
            exit(5)
        }
    };
    let Control::Worker(mut control) = mesh.control else { exit(70) };
    if mode == "mode-busy" {
        std::thread::sleep(Duration::from_secs(60));
    }
    loop {
        match control.recv_control() {
            Ok(Some(command)) if command == b"sum" => {
                let mut data = [mesh.collective.rank() as f32 + 1.0; 5];
                mesh.collective.all_reduce(&mut data).unwrap();
            }
            Ok(Some(command)) if command == b"exit" => exit(11),
            Ok(None) if mode == "mode-stay" => std::thread::sleep(Duration::from_secs(60)),
            Ok(None) => exit(0),
            Ok(Some(_)) | Err(_) => exit(5),
        }
    }
}

/// The middle of the next test: rank 0 if this process was started as such. Its child never looks
/// at its connections.
#[test]
fn leader_process() {
    if !std::env::args().any(|arg| arg == "as-leader") {
        return;
    }
    let mut ranks = spawn("mode-busy", 2);
    let _mesh = ranks.connect(facts("a1"), seconds(20)).unwrap();
    println!("\nchild {}", ranks.processes()[0]);
    std::thread::sleep(Duration::from_secs(60));
}

#[test]
fn a_busy_child_ends_when_rank_0_is_killed() {
    let name = "ranks::tests::locals::leader_process";
    let mut leader = Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture", "--", "as-leader"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(leader.stdout.take().unwrap()).lines().map(Result::unwrap);
    let child = lines.into_iter().find_map(|line| line.strip_prefix("child ").map(str::to_owned)).unwrap();
    // Gone, or ended and waiting for whoever adopted it.
    let ended = || match std::fs::read_to_string(format!("/proc/{child}/stat")) {
        Ok(stat) => stat.contains(") Z "),
        Err(_) => true,
    };
    assert!(!ended());
    leader.kill().unwrap();
    leader.wait().unwrap();
    let begin = Instant::now();
    while !ended() {
        assert!(begin.elapsed() < Duration::from_secs(10), "process {child} still runs");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn children_sum_with_rank_0_and_end_in_order() {
    for tp in [1, 2, 4] {
        let mut ranks = spawn("mode-work", tp);
        let mut mesh = ranks.connect(facts("a1"), seconds(20)).unwrap();
        let Control::Leader(mut control) = mesh.control else { panic!() };
        for _ in 0..3 {
            control.send_control(b"sum").unwrap();
            let mut data = [1.0; 5];
            mesh.collective.all_reduce(&mut data).unwrap();
            assert_eq!(data, [(tp * (tp + 1) / 2) as f32; 5]);
        }
        ranks.check().unwrap();
        control.close().unwrap();
        ranks.finish(Duration::from_secs(20)).unwrap();
    }
}

#[test]
fn a_child_that_ends_too_early_is_reported_with_its_status() {
    let begin = Instant::now();
    let result = LocalRanks::spawn(&std::env::current_exe().unwrap(), &child_args("mode-exit-9"), 3)
        .and_then(|mut ranks| ranks.connect(facts("a1"), seconds(60)));
    match result {
        Err(PeerError::Child { status, .. }) => assert!(status.contains('9'), "{status}"),
        other => panic!("{other:?}"),
    }
    assert!(begin.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_child_that_ends_at_work_is_reported_with_its_status() {
    let mut ranks = spawn("mode-work", 2);
    let mut mesh = ranks.connect(facts("a1"), seconds(20)).unwrap();
    let Control::Leader(mut control) = mesh.control else { panic!() };
    control.send_control(b"exit").unwrap();
    let error = mesh.collective.all_reduce(&mut [1.0; 5]).unwrap_err().to_string();
    assert!(error.contains("is gone during all_reduce"), "{error}");
    match ranks.find_ended(Duration::from_secs(10)) {
        Some(PeerError::Child { rank: 1, status, .. }) => assert!(status.contains("11"), "{status}"),
        other => panic!("{other:?}"),
    }
    assert!(matches!(ranks.finish(Duration::ZERO), Err(PeerError::Child { rank: 1, .. })));
}

#[test]
fn a_child_with_another_artifact_is_named_with_both_values() {
    let mut ranks = spawn("mode-other", 2);
    let error = ranks.connect(facts("a1"), seconds(20)).unwrap_err();
    assert!(error.to_string().contains("artifact_id: found \"b2\", expected \"a1\""), "{error}");
    match ranks.find_ended(Duration::from_secs(10)) {
        Some(PeerError::Child { rank: 1, status, .. }) => assert!(status.contains('5'), "{status}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_child_that_stays_is_killed() {
    let mut ranks = spawn("mode-stay", 2);
    let mesh = ranks.connect(facts("a1"), seconds(20)).unwrap();
    let Control::Leader(control) = mesh.control else { panic!() };
    control.close().unwrap();
    let error = ranks.finish(Duration::from_millis(200)).unwrap_err();
    let PeerError::ChildStays { rank: 1, process, .. } = error else { panic!("{error}") };
    assert!(!Path::new(&format!("/proc/{process}")).exists());
}

#[test]
fn dropping_rank_0_leaves_no_process() {
    let ranks = spawn("mode-work", 3);
    let processes = ranks.processes();
    assert_eq!(processes.len(), 2);
    assert!(processes.iter().all(|process| Path::new(&format!("/proc/{process}")).exists()));
    drop(ranks);
    for process in processes {
        assert!(!Path::new(&format!("/proc/{process}")).exists(), "{process}");
    }
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let error = LocalRanks::spawn(Path::new("/nonexistent/dsv4-run"), &[], 2).unwrap_err();
    assert!(error.to_string().contains("rank 1: cannot start /nonexistent/dsv4-run"), "{error}");
}

#[test]
fn a_seat_needs_the_greeting_and_watches_its_input() {
    let leader = SocketAddr::from(([127, 0, 0, 1], 1));
    let cases = [vec![], vec![1; 43], [b"dsv4sear".to_vec(), vec![0; 36]].concat()];
    for bytes in cases {
        let error = join_local(1, leader, Cursor::new(bytes), || ()).unwrap_err();
        assert!(matches!(error, PeerError::Greeting { rank: 1, .. }), "{error}");
    }
    // An input that stays open until the test says so.
    let (held, input) = std::os::unix::net::UnixStream::pair().unwrap();
    let greeting = [b"dsv4seat".to_vec(), 6u32.to_le_bytes().to_vec(), vec![3; 32]].concat();
    let input = Cursor::new(greeting).chain(input);
    let (gone, wait) = std::sync::mpsc::channel();
    let seat = join_local(4, leader, input, move || gone.send(()).unwrap()).unwrap();
    assert_eq!((seat.rank(), seat.tp()), (4, 6));
    assert!(wait.recv_timeout(Duration::from_millis(100)).is_err());
    drop(held);
    wait.recv_timeout(Duration::from_secs(10)).unwrap();
}
