//! Which ranks are taken and which refused, and the control connections.

use std::io::Write;
use std::time::{Duration, Instant};

use super::super::control::{CONTROL_BYTES_MAX, Control, ControlReceiver};
use super::super::error::PeerError;
use super::super::hello::{Identity, Token};
use super::super::mesh::{Mesh, connect};
use super::{facts, identity, link_and_peer, listeners, on_ranks, seconds, start, start_all};

fn error(result: &Result<Mesh, PeerError>) -> String {
    match result {
        Ok(mesh) => panic!("{mesh:?} was connected"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_public_door_waits_for_a_late_rank() {
    let (held, places) = listeners(2);
    drop(held);
    let join = |rank: u32| connect(rank, &places, Token::new([1; 32]), facts("x"), seconds(20));
    std::thread::scope(|scope| {
        let late = scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            join(0)
        });
        let early = join(1).unwrap();
        assert!(matches!(early.control, Control::Worker(_)));
        assert!(matches!(late.join().unwrap().unwrap().control, Control::Leader(_)));
    });
}

#[test]
fn another_artifact_is_refused_on_both_sides_with_both_values() {
    let mut other = identity(1, 2);
    other.facts = facts("b2");
    other.facts.push(("backend".into(), "cpu".into()));
    let results = start_all(vec![identity(0, 2), other], seconds(20));
    let (zero, one) = (error(&results[0]), error(&results[1]));
    assert!(zero.starts_with("rank 1 ("), "{zero}");
    assert!(zero.contains("artifact_id: found \"b2\", expected \"a1\""), "{zero}");
    assert!(zero.contains("backend: found \"cpu\", expected absent"), "{zero}");
    assert!(!zero.contains("numerics"), "{zero}");
    assert!(one.starts_with("rank 0 ("), "{one}");
    assert!(one.contains("artifact_id: found \"a1\", expected \"b2\""), "{one}");
    assert!(one.contains("backend: found absent, expected \"cpu\""), "{one}");
}

#[test]
fn another_rank_count_is_refused_on_both_sides() {
    let (mut held, places) = listeners(3);
    let listener = held.remove(0);
    let second = held.remove(0);
    let results = std::thread::scope(|scope| {
        let zero = scope.spawn(|| start(identity(0, 2), listener, &places[..2], seconds(20)));
        let one = start(identity(1, 3), second, &places, seconds(20));
        [zero.join().unwrap(), one]
    });
    assert!(error(&results[0]).contains("tp: found \"3\", expected \"2\""));
    assert!(error(&results[1]).contains("tp: found \"2\", expected \"3\""));
}

#[test]
fn a_wrong_token_is_refused_on_both_sides_and_not_told() {
    let mut other = identity(1, 2);
    let secret = [0xab; 32];
    other.token = Token::new(secret);
    assert_eq!(format!("{:?}", other.token), "Token(secret)");
    let results = start_all(vec![identity(0, 2), other], seconds(20));
    for result in &results {
        let Err(PeerError::Token { .. }) = result else { panic!("{result:?}") };
        let told = error(result);
        assert!(!told.contains("abab") && !told.contains("171") && !told.contains("0707"));
    }
}

#[test]
fn a_rank_that_comes_twice_is_refused_on_both_sides() {
    let (held, places) = listeners(3);
    let (spare, _) = listeners(1);
    let mut held: Vec<_> = held.into_iter().chain(spare).collect();
    // Ranks 0 and twice 1 of 3: rank 2 never comes, so rank 0 waits until the second 1 is there.
    let (again, _, one, zero) = (held.pop(), held.pop(), held.pop(), held.pop());
    let results = std::thread::scope(|scope| {
        let zero = scope.spawn(|| start(identity(0, 3), zero.unwrap(), &places, seconds(20)));
        let ones: Vec<_> = [one, again]
            .into_iter()
            .map(|one| {
                let places = &places;
                scope.spawn(move || start(identity(1, 3), one.unwrap(), places, seconds(20)))
            })
            .collect();
        let ones: Vec<_> = ones.into_iter().map(|one| one.join().unwrap()).collect();
        (zero.join().unwrap(), ones)
    });
    let (zero, ones) = results;
    assert!(matches!(zero, Err(PeerError::Duplicate { .. })), "{zero:?}");
    let duplicate = |one: &Result<_, _>| matches!(one, Err(PeerError::Duplicate { .. }));
    assert!(ones.iter().any(duplicate), "{ones:?}");
    // The other one waits for rank 2 and is told that rank 0 has gone.
    assert!(ones.iter().all(Result::is_err), "{ones:?}");
}

#[test]
fn ranks_whose_lists_differ_are_refused_on_both_sides() {
    // Rank 2's list has the first two places exchanged.
    let (held, places) = listeners(3);
    let swapped = [places[1].clone(), places[0].clone(), places[2].clone()];
    let results = std::thread::scope(|scope| {
        let starts: Vec<_> = held
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| {
                let places = if rank == 2 { &swapped } else { places.as_slice() };
                scope.spawn(move || start(identity(rank as u32, 3), listener, places, seconds(20)))
            })
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect::<Vec<_>>()
    });
    let told = error(&results[2]);
    assert!(told.contains("says it is rank 1, expected 0"), "{told}");
    assert!(results.iter().all(Result::is_err));
    assert!(results[..2].iter().any(|r| matches!(r, Err(PeerError::Place { found: 0, expected: 1, .. }))));
}

#[test]
fn a_rank_that_never_comes_is_named_with_its_address() {
    let (mut held, places) = listeners(2);
    let mut deadlines = seconds(20);
    deadlines.connect = Duration::from_millis(300);
    let one = held.pop().unwrap();
    let begin = Instant::now();
    // Rank 0 waits for a caller.
    let absent = start(identity(0, 2), held.pop().unwrap(), &places, deadlines);
    let told = error(&absent);
    assert!(told.starts_with(&format!("rank 1 ({}) is missing", places[1])), "{told}");
    // Rank 1 calls; rank 0 no longer listens.
    let absent = start(identity(1, 2), one, &places, deadlines);
    let told = error(&absent);
    assert!(told.starts_with(&format!("rank 0 ({}) is missing", places[0])), "{told}");
    assert!(told.contains("refused"), "{told}");
    assert!(begin.elapsed() < Duration::from_secs(10));
}

#[test]
fn impossible_groups_are_refused_before_anything_is_opened() {
    let refused = |rank: u32, peers: usize, fact: (String, String), count: usize| {
        let peers = vec!["127.0.0.1:1".to_owned(); peers];
        let result = connect(rank, &peers, Token::new([0; 32]), vec![fact; count], seconds(1));
        assert!(matches!(result, Err(PeerError::Setup { .. })), "{result:?}");
        error(&result)
    };
    let fact = ("name".to_owned(), "value".to_owned());
    assert!(refused(0, 0, fact.clone(), 1).contains("the rank count is 0, expected 1 to 8"));
    assert!(refused(0, 9, fact.clone(), 1).contains("the rank count is 9"));
    assert!(refused(2, 2, fact.clone(), 1).contains("the rank is 2, expected below 2"));
    assert!(refused(0, 2, fact.clone(), 2).contains("given twice"));
    assert!(refused(0, 2, fact, 33).contains("the count of facts is 33, expected at most 32"));
    assert!(refused(0, 2, ("n".into(), "v".repeat(257)), 1).contains("1 and 257 bytes"));
}

#[test]
fn the_largest_hello_fits() {
    let full = |rank| {
        let facts = (0..32).map(|i| (format!("{i:0256}"), format!("{:0256}", i * i))).collect();
        Identity { facts, ..identity(rank, 2) }
    };
    let results = start_all(vec![full(0), full(1)], seconds(20));
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn commands_arrive_in_order_and_end_in_order() {
    let longest = CONTROL_BYTES_MAX as usize;
    let frames = [vec![1, 2, 3], vec![], vec![9; longest], vec![4]];
    let received = on_ranks(3, seconds(30), |mesh| match mesh.control {
        Control::Leader(mut sender) => {
            frames.iter().for_each(|frame| sender.send_control(frame).unwrap());
            sender.check().unwrap();
            let error = sender.send_control(&vec![0; longest + 1]).unwrap_err();
            assert!(matches!(error, PeerError::FrameTooLong { .. }), "{error}");
            sender.close().unwrap();
            Vec::new()
        }
        Control::Worker(mut receiver) => {
            let received = std::iter::from_fn(|| receiver.recv_control().unwrap()).collect();
            assert_eq!(receiver.recv_control().unwrap(), None);
            received
        }
    });
    for received in &received[1..] {
        assert!(received[..] == frames);
    }
}

#[test]
fn either_end_of_control_notices_that_the_other_is_gone() {
    let errors = on_ranks(2, seconds(30), |mesh| match mesh.control {
        Control::Leader(sender) => {
            drop(mesh.collective);
            drop(sender);
            String::new()
        }
        Control::Worker(mut receiver) => receiver.recv_control().unwrap_err().to_string(),
    });
    assert!(errors[1].contains("is gone during control"), "{}", errors[1]);
    let errors = on_ranks(2, seconds(30), |mesh| match mesh.control {
        Control::Leader(sender) => loop {
            if let Err(error) = sender.check() {
                return error.to_string();
            }
            std::thread::sleep(Duration::from_millis(5));
        },
        Control::Worker(_) => String::new(),
    });
    assert!(errors[0].starts_with("rank 1 ("), "{}", errors[0]);
}

#[test]
fn a_bad_control_frame_is_bounded() {
    let against = |bytes: &[u8], close: bool| {
        let (link, mut peer) = link_and_peer();
        let mut receiver = ControlReceiver::new(link, Duration::from_millis(200));
        peer.write_all(bytes).unwrap();
        let peer = (!close).then_some(peer);
        let error = receiver.recv_control().unwrap_err();
        drop(peer);
        error
    };
    let header = |kind: u32, length: u32| [*b"dctl", kind.to_le_bytes(), length.to_le_bytes()].concat();
    match against(&header(1, 1 << 31), false) {
        PeerError::FrameTooLong { found: 0x8000_0000, limit, .. } => {
            assert_eq!(limit, u64::from(CONTROL_BYTES_MAX));
        }
        other => panic!("{other}"),
    }
    let cases = [vec![0x5a; 12], header(3, 0), header(2, 1)];
    for bytes in cases {
        let error = against(&bytes, false);
        assert!(matches!(error, PeerError::Garbled { .. }), "{error}");
    }
    let half = [header(1, 100), vec![0; 50]].concat();
    assert!(matches!(against(&half, true), PeerError::Lost { .. }));
    assert!(matches!(against(&half, false), PeerError::Stuck { .. }));
    assert!(matches!(against(&half[..5], false), PeerError::Stuck { .. }));
}
