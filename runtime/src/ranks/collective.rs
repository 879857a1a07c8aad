//! Sums and gathers among ranks over TCP.
//!
//! Every element's sum is `((x0 + x1) + x2) + …` in rank order, whichever form moves the data and
//! wherever it is computed, so all ranks hold the same bits. Small or two-rank sums are exchanged
//! whole; larger ones among more ranks are summed slice by slice (slice `i` by rank `i`) and the
//! finished slices exchanged, which moves `2/size` of the bytes.
//!
//! Frame: mark, kind, sequence number, element count (24 bytes), then the floats. No length is
//! taken from the wire: a receiver knows what must come and compares. Sending and receiving
//! advance together, so two ranks that both write megabytes do not block each other.

use std::time::Duration;

use dsv4_kernels::collective::{Collective, CollectiveError};
use rustix::event::{PollFd, PollFlags};

use super::error::PeerError;
use super::socket::{Deadline, Incoming, Link, Outgoing, wait};

// The payload is the memory of the floats; the wire is little-endian.
const _: () = assert!(cfg!(target_endian = "little"));

/// Up to this many bytes latency counts more than bandwidth.
const WHOLE_BYTES_MAX: usize = 64 << 10;
const MARK: u32 = u32::from_le_bytes(*b"dcol");
const HEADER_BYTES: usize = 24;

/// What a frame carries. The values are on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
enum Kind {
    ReduceWhole = 1,
    ReduceSlice = 2,
    SpreadSlice = 3,
    Gather = 4,
    Barrier = 5,
}

impl Kind {
    fn name(kind: u32) -> &'static str {
        match kind {
            1 => "all_reduce",
            2 => "all_reduce (summing slices)",
            3 => "all_reduce (exchanging slices)",
            4 => "gather",
            5 => "the wait for all ranks to be loaded,",
            _ => "an unknown collective",
        }
    }
}

/// Collectives over one connection per peer. After the first error every call fails: the ranks no
/// longer hold equal state.
pub struct TcpCollective {
    rank: u32,
    size: u32,
    /// In rank order, without this rank.
    links: Vec<Link>,
    /// What the peers sent, in rank order; grows to the largest collective and stays.
    received: Vec<f32>,
    sequence: u64,
    within: Duration,
    failed: Option<String>,
}

impl TcpCollective {
    pub(super) fn new(rank: u32, size: u32, links: Vec<Link>, within: Duration) -> TcpCollective {
        let received = Vec::new();
        TcpCollective { rank, size, links, received, sequence: 0, within, failed: None }
    }

    /// Waits until every rank has come here, at most `within`. For phases whose lengths differ
    /// by more than a collective's deadline, such as loading weights.
    pub fn barrier(&mut self, within: Duration) -> Result<(), PeerError> {
        self.attempt(|this| this.reduce_whole(Kind::Barrier, &mut [], within))
    }

    fn attempt(&mut self, run: impl FnOnce(&mut TcpCollective) -> Result<(), PeerError>) -> Result<(), PeerError> {
        if let Some(first) = &self.failed {
            return Err(PeerError::Failed { first: first.clone() });
        }
        let result = run(self);
        self.sequence += 1;
        if let Err(error) = &result {
            self.failed = Some(error.to_string());
            // The other ranks must not wait for this one. Only the sending half is closed: what
            // was sent still arrives, and with it the peer's own view of a mismatch.
            for link in &self.links {
                let _already_closed = link.stream.shutdown(std::net::Shutdown::Write);
            }
        }
        result
    }

    fn reduce(&mut self, data: &mut [f32]) -> Result<(), PeerError> {
        if self.size <= 2 || size_of_val(data) <= WHOLE_BYTES_MAX {
            self.reduce_whole(Kind::ReduceWhole, data, self.within)
        } else {
            self.reduce_sliced(data)
        }
    }

    fn reduce_whole(&mut self, kind: Kind, data: &mut [f32], within: Duration) -> Result<(), PeerError> {
        let deadline = Deadline::within(within);
        let length = data.len();
        let received = reserve(&mut self.received, length * self.links.len());
        let mine: &[u8] = bytemuck::cast_slice(data);
        let transfers = split(received, length, self.links.len())
            .into_iter()
            .map(|from| Transfer { out: Some(mine), into: Some(bytemuck::cast_slice_mut(from)) });
        let header = Header::new(kind, self.sequence, length);
        exchange(&self.links, transfers.collect(), header, &deadline)?;
        sum_in_rank_order(self.rank as usize, data, received);
        Ok(())
    }

    fn reduce_sliced(&mut self, data: &mut [f32]) -> Result<(), PeerError> {
        let deadline = Deadline::within(self.within);
        let (own, size, length) = (self.rank as usize, self.size as usize, data.len());
        let start = |slice: usize| length * slice / size;
        let mine = start(own)..start(own + 1);
        let peers = || (0..size).filter(|peer| *peer != own);

        let received = reserve(&mut self.received, mine.len() * self.links.len());
        let parts = split(received, mine.len(), self.links.len());
        let transfers = peers().zip(parts).map(|(peer, from)| Transfer {
            out: Some(bytemuck::cast_slice(&data[start(peer)..start(peer + 1)])),
            into: Some(bytemuck::cast_slice_mut(from)),
        });
        let header = Header::new(Kind::ReduceSlice, self.sequence, length);
        exchange(&self.links, transfers.collect(), header, &deadline)?;
        sum_in_rank_order(own, &mut data[mine], received);

        let mut slices = Vec::with_capacity(size);
        let mut rest = data;
        for slice in 0..size {
            let (head, tail) = rest.split_at_mut(start(slice + 1) - start(slice));
            slices.push(head);
            rest = tail;
        }
        let summed: &[f32] = slices.remove(own);
        let transfers = slices.into_iter().map(|slice| Transfer {
            out: Some(bytemuck::cast_slice(summed)),
            into: Some(bytemuck::cast_slice_mut(slice)),
        });
        let header = Header::new(Kind::SpreadSlice, self.sequence, length);
        exchange(&self.links, transfers.collect(), header, &deadline)
    }

    fn gather_to_first(&mut self, mine: &[f32], out: &mut [f32]) -> Result<(), PeerError> {
        let deadline = Deadline::within(self.within);
        let header = Header::new(Kind::Gather, self.sequence, mine.len());
        let transfers: Vec<Transfer<'_>> = if self.rank == 0 {
            let (own, others) = out.split_at_mut(mine.len());
            own.copy_from_slice(mine);
            split(others, mine.len(), self.links.len())
                .into_iter()
                .map(|from| Transfer { out: None, into: Some(bytemuck::cast_slice_mut(from)) })
                .collect()
        } else {
            vec![Transfer { out: Some(bytemuck::cast_slice(mine)), into: None }]
        };
        // Rank 0 is the first link of every other rank; rank 0 itself uses all of its links.
        exchange(&self.links[..transfers.len()], transfers, header, &deadline)
    }
}

impl Collective for TcpCollective {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn size(&self) -> u32 {
        self.size
    }

    fn all_reduce(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.attempt(|this| this.reduce(data)).map_err(|error| CollectiveError(error.to_string()))
    }

    fn gather(&mut self, mine: &[f32], out: &mut [f32]) -> Result<(), CollectiveError> {
        let expected = if self.rank == 0 { self.size as usize * mine.len() } else { 0 };
        assert_eq!(out.len(), expected, "gather of {} values on rank {}", mine.len(), self.rank);
        self.attempt(|this| this.gather_to_first(mine, out)).map_err(|error| CollectiveError(error.to_string()))
    }
}

impl std::fmt::Debug for TcpCollective {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TcpCollective of rank {} of {}", self.rank, self.size)
    }
}

/// The first `length` values of `memory`, which grows if it must.
fn reserve(memory: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if memory.len() < length {
        memory.resize(length, 0.0);
    }
    &mut memory[..length]
}

/// `count` consecutive parts of `length` values each; `chunks` cannot make empty ones.
fn split(mut values: &mut [f32], length: usize, count: usize) -> Vec<&mut [f32]> {
    let mut parts = Vec::with_capacity(count);
    for _ in 0..count {
        let (part, rest) = values.split_at_mut(length);
        parts.push(part);
        values = rest;
    }
    parts
}

/// Replaces `mine` by the sum over all ranks; `others` holds the other ranks' values in rank
/// order. The running sum is the left operand of every addition on every rank.
fn sum_in_rank_order(own: usize, mine: &mut [f32], others: &mut [f32]) {
    fn add(sum: &mut [f32], values: &[f32]) {
        sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
    }
    let length = mine.len();
    if length == 0 {
        return;
    }
    if own == 0 {
        others.chunks_exact(length).for_each(|other| add(mine, other));
        return;
    }
    let (sum, rest) = others.split_at_mut(length);
    for (index, other) in rest.chunks_exact(length).enumerate() {
        if index + 1 == own {
            add(sum, mine);
        }
        add(sum, other);
    }
    if rest.len() / length + 1 == own {
        add(sum, mine);
    }
    mine.copy_from_slice(sum);
}

/// A frame's header.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Header {
    mark: u32,
    kind: u32,
    sequence: u64,
    elements: u64,
}

impl Header {
    fn new(kind: Kind, sequence: u64, elements: usize) -> Header {
        Header { mark: MARK, kind: kind as u32, sequence, elements: elements as u64 }
    }

    fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.mark.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..].copy_from_slice(&self.elements.to_le_bytes());
        bytes
    }

    fn decode(bytes: [u8; HEADER_BYTES]) -> Header {
        let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        Header { mark: half(0), kind: half(4), sequence: word(8), elements: word(16) }
    }

    /// For messages: which collective this is.
    fn describe(self) -> String {
        let Header { kind, sequence, elements, .. } = self;
        format!("{} number {sequence} of {elements} values", Kind::name(kind))
    }

    /// Compares a peer's header with this rank's.
    fn check(self, found: Header, link: &Link) -> Result<(), PeerError> {
        let peer = || link.peer.clone();
        if found == self {
            return Ok(());
        }
        if found.mark != self.mark {
            return Err(PeerError::Garbled {
                peer: peer(),
                during: "collective",
                found: format!("the header {:02x?}", found.encode()),
                expected: "the header of a collective",
            });
        }
        let (found, expected) = (found.describe(), self.describe());
        Err(PeerError::OutOfStep { peer: peer(), found, expected })
    }
}

/// What one peer is sent and where its answer goes.
struct Transfer<'a> {
    out: Option<&'a [u8]>,
    into: Option<&'a mut [u8]>,
}

/// Runs one transfer per link, all at once, under one header.
fn exchange(
    links: &[Link],
    transfers: Vec<Transfer<'_>>,
    header: Header,
    deadline: &Deadline,
) -> Result<(), PeerError> {
    let header_bytes = header.encode();
    let mut headers = vec![[0; HEADER_BYTES]; links.len()];
    let mut flows: Vec<(&Link, Option<Outgoing<'_>>, Option<Incoming<'_>>)> = links
        .iter()
        .zip(transfers)
        .zip(&mut headers)
        .map(|((link, transfer), theirs)| {
            let out = transfer.out.map(|body| Outgoing::new(&header_bytes, body));
            (link, out, transfer.into.map(|body| Incoming::new(theirs, body)))
        })
        .collect();
    // Everything is offered to the sockets before the first wait: a small frame is gone in one
    // call, and a peer that is ahead can be read right after.
    for (link, out, _) in &mut flows {
        if let Some(out) = out {
            out.advance(&link.stream).map_err(|error| link.broken(error, header.describe()))?;
        }
    }
    let mut fds = Vec::with_capacity(flows.len());
    loop {
        flows.retain_mut(|(_, out, into)| {
            out.take_if(|out| out.done());
            into.take_if(|into| into.done());
            out.is_some() || into.is_some()
        });
        // For errors: the peer that has sent the least.
        let got = |into: &Option<Incoming<'_>>| into.as_ref().map_or(usize::MAX, Incoming::got);
        let slowest = flows.iter().min_by_key(|(_, _, into)| got(into)).map(|(link, ..)| *link);
        let Some(slowest) = slowest else { return Ok(()) };
        fds.clear();
        fds.extend(flows.iter().map(|(link, out, into)| {
            let mut flags = PollFlags::empty();
            flags.set(PollFlags::OUT, out.is_some());
            flags.set(PollFlags::IN, into.is_some());
            PollFd::new(&link.stream, flags)
        }));
        match wait(&mut fds, deadline) {
            Ok(true) => {}
            Ok(false) => return Err(slowest.stuck(deadline, header.describe())),
            Err(source) => {
                let peer = slowest.peer.clone();
                return Err(PeerError::Socket { peer, during: "collective", source });
            }
        }
        for ((link, out, into), fd) in flows.iter_mut().zip(&fds) {
            if fd.revents().is_empty() {
                continue;
            }
            // Reading comes first: a peer that found the ranks out of step says so in its header
            // and closes, and then writing fails.
            if let Some(into) = into {
                let read = into.advance(&link.stream);
                if let Some(theirs) = into.header().and_then(|bytes| bytes.first_chunk()) {
                    header.check(Header::decode(*theirs), link)?;
                }
                read.map_err(|error| link.broken(error, header.describe()))?;
            }
            if let Some(out) = out {
                out.advance(&link.stream).map_err(|error| link.broken(error, header.describe()))?;
            }
        }
    }
}
