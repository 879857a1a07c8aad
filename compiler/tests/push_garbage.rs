//! Peers that send anything at all: no panic, no memory beyond what is stated, no artifact that is not
//! whole. The peers here speak the protocol by themselves, from its description, so that they can be
//! wrong at any byte and still prove the token.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use dsv4_format::{
    Artifact, CommitInput, Digest, Draft, DraftOptions, FormatError, NoProgress, RankLayout, SectionPlan, SourceId,
    TensorPlan,
};
use dsv4c::CompileError;
use dsv4c::push::{PushOptions, Ranks, ReceiveOptions, Stream, Token, Transfer, push_over, receive_over};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

const RECEIVE_CASES: u64 = 20_000;
const SEND_CASES: u64 = 3_000;
/// For artifacts as small as these: the blocks' buffers, one frame of the largest kind that grows,
/// and stacks of threads. A length that is believed would take up to 4 GiB.
const MEMORY: u64 = 48 << 20;

struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 8) as usize % n.max(1)
    }
}

/// Two ranks of one block each, and `meta`.
fn artifact(dir: &Path, name: &str) -> PathBuf {
    let out = dir.join(name);
    let layout = |rank: u64| {
        let tensor = TensorPlan { name: "w".into(), dtype: "u8".into(), shape: vec![300 + rank], bytes: 300 + rank };
        RankLayout::new(&[SectionPlan { name: "all".into(), tensors: vec![tensor] }]).unwrap()
    };
    let mut draft = Draft::create(&out, vec![layout(0), layout(1)], &DraftOptions::default()).unwrap();
    let ranks = (0..2).map(|rank| {
        let mut writer = draft.rank_writer(rank).unwrap();
        writer.append("w", &vec![rank as u8 + 1; 300 + rank as usize]).unwrap();
        writer.finish().unwrap()
    });
    let ranks = ranks.collect();
    draft.write_meta(&[("tokenizer.json".into(), b"{}".to_vec())]).unwrap();
    let input = CommitInput {
        config_json: format!("{name:?}"),
        source_id: SourceId([7; 32]),
        weight_contract: Digest::of(b"weights"),
        op_contract: Digest::of(b"ops"),
        canary: None,
        ranks,
        receipt: serde_json::Map::new(),
    };
    draft.commit(input, false, &NoProgress).unwrap();
    out
}

fn frame(kind: u8, content: &[u8]) -> Vec<u8> {
    [&[kind][..], &(content.len() as u32).to_le_bytes(), content].concat()
}

fn proof(side: &str, nonces: [&[u8]; 2], offer: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_keyed(&blake3::derive_key("dsv4 push token v1", b""));
    hasher.update(&(side.len() as u64).to_le_bytes()).update(side.as_bytes());
    hasher.update(nonces[0]).update(nonces[1]).update(offer);
    *hasher.finalize().as_bytes()
}

/// Everything a sender says after the greeting, as (frame kind, content).
fn script(artifact: &Path) -> Vec<(u8, Vec<u8>)> {
    let manifest = fs::read(artifact.join("MANIFEST")).unwrap();
    let head = [&3u64.to_le_bytes()[..], &0u32.to_le_bytes(), &(manifest.len() as u32).to_le_bytes()].concat();
    let mut out = vec![(3, [head, manifest].concat())];
    for rank in 0..2u32 {
        let file = fs::read(artifact.join(format!("rank{rank}.weights"))).unwrap();
        out.push((6, [&rank.to_le_bytes()[..], &0u32.to_le_bytes(), &file[2 << 20..4 << 20]].concat()));
    }
    out.push((7, [&0u32.to_le_bytes()[..], &fs::read(artifact.join("meta")).unwrap()].concat()));
    out.push((8, Vec::new()));
    out
}

/// The other end of a session, in memory: `answer` is told the greeting that was received and gives all
/// that will be said.
struct Scripted<F> {
    heard: Vec<u8>,
    needs: usize,
    answer: F,
    say: io::Cursor<Vec<u8>>,
    answered: bool,
}

impl<F: FnMut(&[u8]) -> Vec<u8>> Scripted<F> {
    fn new(greeting: Vec<u8>, needs: usize, answer: F) -> Self {
        Scripted { heard: Vec::new(), needs, answer, say: io::Cursor::new(greeting), answered: false }
    }
}

impl<F: FnMut(&[u8]) -> Vec<u8>> Read for Scripted<F> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.say.read(buf)? {
            0 if !self.answered && self.heard.len() >= self.needs => {
                self.answered = true;
                self.say = io::Cursor::new((self.answer)(&self.heard));
                self.say.read(buf)
            }
            n => Ok(n),
        }
    }
}

impl<F> Write for Scripted<F> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        // Blocks are not needed again.
        let room = (1usize << 16).saturating_sub(self.heard.len());
        self.heard.extend_from_slice(&buf[..buf.len().min(room)]);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnMut(&[u8]) -> Vec<u8>> Stream for Scripted<F> {
    fn read_within(&mut self, _: Option<Duration>) {}
    fn hang_up(&mut self) {}
}

fn greeting() -> Vec<u8> {
    [b"DSV4PUSH\x01\0\0\0".as_slice(), &[9; 32]].concat()
}

/// Damages a conversation at one to three places, mostly where lengths, kinds and numbers are.
fn mutate(noise: &mut Noise, frames: &mut Vec<(u8, Vec<u8>)>) -> Vec<u8> {
    let first = noise.below(6);
    match first {
        0 => {
            let (from, to) = (noise.below(frames.len()), noise.below(frames.len()));
            let moved = frames.remove(from);
            frames.insert(to, moved);
        }
        1 => {
            let at = noise.below(frames.len());
            frames.remove(at);
        }
        2 => {
            let at = noise.below(frames.len());
            let again = frames[at].clone();
            frames.insert(noise.below(frames.len() + 1), again);
        }
        3 => {
            let at = noise.below(frames.len());
            let (_, content) = &mut frames[at];
            let len = noise.below(content.len() + 20);
            content.resize(if noise.below(2) == 0 { len } else { content.len() + len % 20 }, 0xa5);
        }
        _ => {}
    }
    let mut starts = Vec::new();
    let mut bytes = Vec::new();
    for (kind, content) in frames.iter() {
        starts.push(bytes.len());
        bytes.extend(frame(*kind, content));
    }
    let edits = noise.below(4) + usize::from(first > 3);
    for _ in 0..edits {
        if bytes.is_empty() {
            break;
        }
        let start = starts.get(noise.below(starts.len())).copied().unwrap_or(0);
        let at = match noise.below(4) {
            0 => noise.below(bytes.len()),
            1 => start + noise.below(5),
            _ => start + noise.below(80),
        };
        let at = at.min(bytes.len() - 1);
        match noise.below(4) {
            0 => bytes[at] ^= 1 << noise.below(8),
            1 => bytes[at] = noise.next() as u8,
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][noise.below(5)],
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// No private memory beyond `more` than now: what asks for it is killed or gets an error.
fn limit_memory(more: u64) {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let now: u64 = data.trim().trim_end_matches(" kB").parse().unwrap();
    let maximum = getrlimit(Resource::Data).maximum;
    setrlimit(Resource::Data, Rlimit { current: Some((now << 10) + more), maximum }).unwrap();
}

fn fast_dir() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

fn check(case: u64, ended: &Result<Transfer, CompileError>) {
    if let Err(error) = ended {
        assert!(!matches!(error, CompileError::Format(FormatError::Memory { .. })), "case {case}: {error}");
        let text = error.to_string();
        assert!(text.contains("\n  help: "), "case {case}: {text}");
    }
}

/// Half the cases are damaged as they travel; half are what a sender who knows the token would offer.
/// One in sixteen is taken as far as it goes, the others to where the offer is judged: the name is taken.
#[test]
fn a_receiver_survives_any_sender() {
    let dir = fast_dir();
    let small = artifact(dir.path(), "small.dsv4");
    let whole = script(&small);
    let short: Vec<_> =
        whole.iter().map(|(kind, content)| (*kind, content[..content.len().min(9000)].to_vec())).collect();
    let (out, taken) = (dir.path().join("out.dsv4"), artifact(dir.path(), "taken.dsv4"));
    let into = |out: &Path| ReceiveOptions {
        out: out.to_path_buf(),
        token: Token::none(),
        key: None,
        force: false,
        timeout: Duration::ZERO,
    };
    let (into_out, into_taken) = (into(&out), into(&taken));
    let mut ends = [0u64; 4];
    for case in 0..RECEIVE_CASES {
        if case == 200 {
            limit_memory(MEMORY);
        }
        let mut noise = Noise(case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (options, script) = if case % 16 == 0 { (&into_out, &whole) } else { (&into_taken, &short) };
        let answer = |heard: &[u8]| {
            let mut frames = script.clone();
            let authentic = noise.below(2) == 0;
            if authentic {
                // Also inside the offer, which then is announced as it is.
                if noise.below(2) == 0 {
                    let offer = &mut frames[0].1;
                    let at = if noise.below(2) == 0 { noise.below(24) } else { noise.below(offer.len()) };
                    offer[at] ^= 1 << noise.below(8);
                }
                let hash = *blake3::hash(&frames[0].1).as_bytes();
                let said = proof("push", [&[9; 32], &heard[12..44]], &hash);
                let rest = if case % 80 == 0 { frames } else { vec_after(&mut noise, frames) };
                let rest: Vec<u8> = rest.iter().flat_map(|(kind, content)| frame(*kind, content)).collect();
                return [frame(1, &[hash, said].concat()), rest].concat();
            }
            let hash = *blake3::hash(&frames[0].1).as_bytes();
            let said = proof("push", [&[9; 32], &heard[12..44]], &hash);
            frames.insert(0, (1, [hash, said].concat()));
            mutate(&mut noise, &mut frames)
        };
        let mut hello = greeting();
        if case % 16 == 15 {
            hello[case as usize / 16 % 44] ^= 1 << (case % 7);
        }
        let ended = receive_over(options, Scripted::new(hello, 44, answer), &NoProgress);
        check(case, &ended);
        let kind = match &ended {
            Ok(_) => 0,
            Err(CompileError::Format(_)) => 1,
            Err(CompileError::Network { .. }) => 2,
            Err(_) => 3,
        };
        ends[kind] += 1;
        match ended {
            Ok(_) => {
                let there = Artifact::open(&out).unwrap();
                for &rank in there.present_ranks() {
                    let name = format!("rank{rank}.weights");
                    assert!(fs::read(out.join(&name)).unwrap() == fs::read(small.join(&name)).unwrap(), "case {case}");
                }
                there.verify(&NoProgress).unwrap();
                fs::remove_dir_all(&out).unwrap();
            }
            Err(_) => assert!(!out.exists(), "case {case}"),
        }
    }
    // Every way to end was met, so the cases reach where they should.
    assert!(ends.iter().all(|&count| count > 20), "{ends:?}");
}

/// The rest of a conversation, damaged after the offer only.
fn vec_after(noise: &mut Noise, mut frames: Vec<(u8, Vec<u8>)>) -> Vec<(u8, Vec<u8>)> {
    for _ in 0..noise.below(3) {
        let at = 1 + noise.below(frames.len() - 1);
        match noise.below(3) {
            0 => {
                let content = &mut frames[at].1;
                if let Some(byte) = content.get_mut(noise.below(12)) {
                    *byte = noise.next() as u8 & 3;
                }
            }
            1 => frames[at].0 = noise.below(12) as u8,
            _ => {
                let other = 1 + noise.below(frames.len() - 1);
                frames.swap(at, other);
            }
        }
    }
    frames
}

#[test]
fn a_sender_survives_any_receiver() {
    let dir = fast_dir();
    let small = artifact(dir.path(), "small.dsv4");
    let options = PushOptions { artifact: small, which: Ranks::All, token: Token::none(), timeout: Duration::ZERO };
    let mut ends = [0u64; 3];
    for case in 0..SEND_CASES {
        if case == 200 {
            limit_memory(MEMORY);
        }
        let mut noise = Noise(case.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let answer = |heard: &[u8]| {
            // Greeting, then auth: five bytes of head, the offer's hash, the proof.
            let said = proof("receive", [&heard[12..44], &[9; 32]], &heard[49..81]);
            let want = |flags: [u8; 3]| (5, flags.to_vec());
            // A file, then each rank's only block.
            let mut frames = vec![(4, Vec::new()), want([1, 1, 1]), want([0, 1, 0]), (4, Vec::new()), (9, vec![0])];
            if case % 4 != 0 {
                return [frame(2, &said), mutate(&mut noise, &mut frames)].concat();
            }
            frames.insert(0, (2, said.to_vec()));
            if case % 40 == 0 {
                return frames.iter().flat_map(|(kind, content)| frame(*kind, content)).collect();
            }
            mutate(&mut noise, &mut frames)
        };
        let ended = push_over(&options, Scripted::new(greeting(), 44 + 69, answer), &NoProgress);
        check(case, &ended);
        let kind = match &ended {
            Ok(_) => 0,
            Err(CompileError::Network { .. }) => 1,
            Err(_) => 2,
        };
        ends[kind] += 1;
    }
    assert!(ends.iter().all(|&count| count > 20), "{ends:?}");
}
