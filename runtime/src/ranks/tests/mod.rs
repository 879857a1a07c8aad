//! Ranks as threads of one process, over real sockets.

mod collectives;
mod locals;
mod mutations;
mod peers;
mod strangers;

use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Duration;

use super::error::{Peer, PeerError};
use super::hello::{Facts, Identity, Token};
use super::mesh::{Deadlines, Mesh, Places, Start};
use super::socket::Link;

fn seconds(seconds: u64) -> Deadlines {
    let duration = Duration::from_secs(seconds);
    Deadlines { connect: duration, collective: duration }
}

fn facts(artifact: &str) -> Facts {
    vec![("artifact_id".into(), artifact.into()), ("numerics".into(), "published".into())]
}

fn identity(rank: u32, tp: u32) -> Identity {
    Identity { rank, tp, token: Token::new([7; 32]), facts: facts("a1"), port: 0 }
}

/// Bound listeners, one per rank, and where they are.
fn listeners(count: usize) -> (Vec<TcpListener>, Vec<String>) {
    let bind = |_| {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let place = listener.local_addr().unwrap().to_string();
        (listener, place)
    };
    (0..count).map(bind).unzip()
}

fn start(
    identity: Identity,
    listener: TcpListener,
    places: &[String],
    deadlines: Deadlines,
) -> Result<Mesh, PeerError> {
    Start::new(identity, listener, Places::Listed(places.to_vec()), deadlines)?.run(&mut || Ok(()))
}

/// Starts one rank per identity at the same time; what each of them got, in order.
fn start_all(identities: Vec<Identity>, deadlines: Deadlines) -> Vec<Result<Mesh, PeerError>> {
    let (listeners, places) = listeners(identities.len());
    std::thread::scope(|scope| {
        let starts: Vec<_> = identities
            .into_iter()
            .zip(listeners)
            .map(|(identity, listener)| {
                let places = &places;
                scope.spawn(move || start(identity, listener, places, deadlines))
            })
            .collect();
        starts.into_iter().map(|start| start.join().unwrap()).collect()
    })
}

/// Runs `run` on every rank of a mesh at the same time.
fn on_ranks<T: Send>(tp: u32, deadlines: Deadlines, run: impl Fn(Mesh) -> T + Sync) -> Vec<T> {
    let identities = (0..tp).map(|rank| identity(rank, tp)).collect();
    let meshes = start_all(identities, deadlines);
    std::thread::scope(|scope| {
        let run = &run;
        let ranks: Vec<_> = meshes.into_iter().map(|mesh| scope.spawn(move || run(mesh.unwrap()))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A link to rank 1, and the other end for a test that plays rank 1 badly.
fn link_and_peer() -> (Link, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let ours = TcpStream::connect(address).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    let peer = Peer { rank: Some(1), address: address.to_string() };
    (Link::new(peer, ours).unwrap(), theirs)
}

/// A counter-based generator (splitmix64): every value is known from `seed` and `index`.
fn random(seed: u64, index: u64) -> u64 {
    let mut z = (seed << 32 ^ index).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
