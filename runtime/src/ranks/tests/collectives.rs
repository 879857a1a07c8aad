//! Sums and gathers: exact bits, and every way to be out of step, late or gone.

use std::io::Write;
use std::time::{Duration, Instant};

use dsv4_kernels::collective::Collective;

use super::super::collective::TcpCollective;
use super::super::error::PeerError;
use super::{link_and_peer, on_ranks, random, seconds};

/// Values whose sum depends on the order: mixed signs, exponents from 2^-12 to 2^12, some zeros.
fn values(rank: u32, count: usize) -> Vec<f32> {
    let value = |index: usize| {
        let bits = random(u64::from(rank) + 1, index as u64);
        let mantissa = (bits >> 40) as f32 / (1 << 24) as f32 - 0.5;
        if bits.is_multiple_of(17) { -0.0 } else { mantissa * 2f32.powi((bits % 25) as i32 - 12) }
    };
    (0..count).map(value).collect()
}

fn sum_in_order(ranks: impl Iterator<Item = u32>, count: usize) -> Vec<u32> {
    let sum = ranks.map(|rank| values(rank, count)).reduce(|mut sum, next| {
        sum.iter_mut().zip(next).for_each(|(sum, value)| *sum += value);
        sum
    });
    sum.unwrap_or_default().into_iter().map(f32::to_bits).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_sum_has_the_same_bits_on_every_rank_and_in_every_form() {
    // 64 KiB is the last size of the whole form; the sizes after it are cut, one unevenly.
    const SIZES: [usize; 7] = [0, 1, 7, 64 << 8, (64 << 8) + 1, 5 << 18, 7];
    for tp in [2, 3, 4, 8] {
        let sums = on_ranks(tp, seconds(30), |mesh| {
            let mut collective = mesh.collective;
            assert_eq!(collective.size(), tp);
            SIZES.map(|size| {
                let mut data = values(collective.rank(), size);
                collective.all_reduce(&mut data).unwrap();
                bits(&data)
            })
        });
        for (index, size) in SIZES.into_iter().enumerate() {
            let expected = sum_in_order(0..tp, size);
            for (rank, sums) in sums.iter().enumerate() {
                assert!(sums[index] == expected, "tp {tp}, {size} values, rank {rank}");
            }
            if tp > 2 && size > 1000 {
                let reverse = sum_in_order((0..tp).rev(), size);
                assert!(reverse != expected, "the data would not show another order");
            }
        }
    }
}

#[test]
fn one_rank_sums_alone() {
    let sums = on_ranks(1, seconds(5), |mut mesh| {
        let mut data = values(3, 9);
        mesh.collective.all_reduce(&mut data).unwrap();
        let mut out = [0.0; 9];
        mesh.collective.gather(&data, &mut out).unwrap();
        bits(&out)
    });
    assert_eq!(sums, [bits(&values(3, 9))]);
}

#[test]
fn a_gather_puts_every_rank_in_its_place() {
    for tp in [2, 3, 8] {
        for size in [0, 1, 5, 300_000] {
            let gathered = on_ranks(tp, seconds(30), |mut mesh| {
                let rank = mesh.collective.rank();
                let mine = values(rank, size);
                let mut out = vec![f32::NAN; if rank == 0 { size * tp as usize } else { 0 }];
                mesh.collective.gather(&mine, &mut out).unwrap();
                // The next collective finds the connections clean.
                let mut one = [1.0];
                mesh.collective.all_reduce(&mut one).unwrap();
                assert_eq!(one, [tp as f32]);
                bits(&out)
            });
            let expected: Vec<f32> = (0..tp).flat_map(|rank| values(rank, size)).collect();
            assert!(gathered[0] == bits(&expected), "tp {tp}, {size} values");
        }
    }
}

#[test]
fn ranks_out_of_step_are_told_both_steps() {
    // Rank 1 sums 8 values where the others sum 7.
    let errors = on_ranks(3, seconds(20), |mut mesh| {
        let mut first = [1.0];
        mesh.collective.all_reduce(&mut first).unwrap();
        let mut data = vec![0.0; if mesh.collective.rank() == 1 { 8 } else { 7 }];
        let error = mesh.collective.all_reduce(&mut data).unwrap_err().to_string();
        let again = mesh.collective.all_reduce(&mut data).unwrap_err().to_string();
        assert!(again.contains("after one had failed") && again.contains(&error), "{again}");
        error
    });
    let both = |found: u32, expected: u32| {
        format!(
            "found all_reduce number 1 of {found} values, expected all_reduce number 1 of \
             {expected} values"
        )
    };
    assert!(errors[1].contains(&both(7, 8)), "{}", errors[1]);
    let blamed = [0, 2].map(|rank: usize| errors[rank].contains(&both(8, 7)));
    assert!(blamed.contains(&true), "{errors:?}");
}

#[test]
fn a_sum_meets_a_gather() {
    let errors = on_ranks(2, seconds(20), |mut mesh| {
        if mesh.collective.rank() == 0 {
            mesh.collective.all_reduce(&mut [0.0; 4]).unwrap_err().to_string()
        } else {
            mesh.collective.gather(&[0.0; 4], &mut []).unwrap();
            mesh.collective.all_reduce(&mut [0.0; 4]).unwrap_err().to_string()
        }
    });
    assert!(errors[0].contains("found gather number 0 of 4 values"), "{}", errors[0]);
    assert!(errors[1].contains("found all_reduce number 0"), "{}", errors[1]);
}

#[test]
fn a_silent_rank_is_named_at_the_deadline() {
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    let mut deadlines = seconds(20);
    deadlines.collective = Duration::from_millis(1500);
    let errors = on_ranks(3, deadlines, |mut mesh| {
        if mesh.collective.rank() == 2 {
            // Silent but connected until rank 0 has given up.
            let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(20));
            return String::new();
        }
        // More than the sockets can hold, so that writing waits as well.
        let error = mesh.collective.all_reduce(&mut vec![1.0; 6 << 20]).unwrap_err();
        if mesh.collective.rank() == 0 {
            done.send(()).unwrap();
        }
        error.to_string()
    });
    assert!(errors[..2].iter().any(|error| error.starts_with("rank 2 (")), "{errors:?}");
    assert!(errors[..2].iter().any(|error| error.contains("is stuck during")), "{errors:?}");
}

#[test]
fn a_barrier_waits_longer_than_a_collective() {
    let mut deadlines = seconds(20);
    deadlines.collective = Duration::from_millis(100);
    on_ranks(2, deadlines, |mut mesh| {
        if mesh.collective.rank() == 1 {
            std::thread::sleep(Duration::from_millis(400));
        }
        mesh.collective.barrier(Duration::from_secs(20)).unwrap();
    });
}

#[test]
fn a_rank_that_ends_is_seen_at_once() {
    let begin = Instant::now();
    let errors = on_ranks(4, seconds(60), |mut mesh| {
        if mesh.collective.rank() == 3 {
            return String::new();
        }
        mesh.collective.all_reduce(&mut vec![1.0; 1 << 20]).unwrap_err().to_string()
    });
    assert!(begin.elapsed() < Duration::from_secs(20));
    for error in &errors[..3] {
        assert!(error.contains("is gone during all_reduce"), "{error}");
    }
}

/// What rank 0 of two says when its peer sends `bytes` and then closes or falls silent.
fn against(bytes: &[u8], close: bool) -> PeerError {
    let (link, mut peer) = link_and_peer();
    let mut collective = TcpCollective::new(0, 2, vec![link], Duration::from_millis(300));
    peer.write_all(bytes).unwrap();
    let peer = (!close).then_some(peer);
    let error = collective.barrier(Duration::from_millis(300)).unwrap_err();
    drop(peer);
    error
}

#[test]
fn a_frame_that_is_not_the_expected_one_is_refused() {
    let mut header = b"dcol".to_vec();
    header.extend([1u32.to_le_bytes(), 0u32.to_le_bytes(), 0u32.to_le_bytes()].concat());
    header.extend((1u64 << 31).to_le_bytes());
    match against(&header, false) {
        PeerError::OutOfStep { found, expected, .. } => {
            assert_eq!(found, "all_reduce number 0 of 2147483648 values");
            assert_eq!(expected, "the wait for all ranks to be loaded, number 0 of 0 values");
        }
        other => panic!("{other}"),
    }
    let error = against(&[0xa5; 100], false);
    assert!(matches!(error, PeerError::Garbled { .. }), "{error}");
    let error = against(&header[..11], true);
    assert!(matches!(error, PeerError::Lost { .. }), "{error}");
    let error = against(&header[..11], false);
    assert!(matches!(error, PeerError::Stuck { .. }), "{error}");
}
