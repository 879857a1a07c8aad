use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

/// Gives wrong bytes, or an error, for the first `bad` reads.
struct Faulty {
    good: Vec<u8>,
    bad: u32,
    errors: bool,
    reads: AtomicU32,
}

impl ReadAt for Faulty {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
        let nth = self.reads.fetch_add(1, Ordering::Relaxed);
        let start = offset as usize;
        buf.copy_from_slice(&self.good[start..start + buf.len()]);
        if nth < self.bad {
            if self.errors {
                let source = std::io::Error::from_raw_os_error(5);
                return Err(FormatError::io("read", Path::new("disk"), 0, source));
            }
            buf[17] ^= 4;
        }
        Ok(())
    }
}

fn outcome(bad: u32, errors: bool) -> (Result<(), FormatError>, u32) {
    let len = 2 << 20;
    let good: Vec<u8> = (0..2 * len as u32).map(|i| (i.wrapping_mul(40_503) >> 7) as u8).collect();
    let block = Block {
        section_index: 0,
        section: "layer 0",
        index: 0,
        count: 1,
        file_offset: len as u64,
        arena_offset: 0,
        len,
        hash: *blake3::hash(&good[len..]).as_bytes(),
    };
    let source = Faulty { good, bad, errors, reads: AtomicU32::new(0) };
    let mut buf = vec![0; len];
    let result = read_verified(&source, Path::new("disk"), &block, &mut buf);
    if result.is_ok() {
        assert!(buf == source.good[len..]);
    }
    (result, source.reads.into_inner())
}

#[test]
fn a_bad_block_is_read_twice_more_and_then_named() {
    for errors in [false, true] {
        for bad in 0..3 {
            let (result, reads) = outcome(bad, errors);
            assert!(result.is_ok(), "{bad} bad reads");
            assert_eq!(reads, bad + 1);
        }
        let (result, reads) = outcome(3, errors);
        assert_eq!(reads, 3);
        let error = result.expect_err("three bad reads");
        match error {
            FormatError::BlockRead { reads: 3, .. } => assert!(errors),
            FormatError::Block { ref section, block: 0, offset, reads: 3, .. } => {
                assert!(!errors);
                assert_eq!((section.as_str(), offset), ("layer 0", 2 << 20));
            }
            other => panic!("unexpected {other}"),
        }
    }
}

mod stages {
    //! Whole loads of a small file, with faults put between the disk and the stages.

    use std::collections::HashMap;
    use std::io;
    use std::ops::DerefMut;
    use std::path::PathBuf;
    use std::sync::atomic::AtomicU64;
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::sync::{Mutex, MutexGuard};
    use std::time::Duration;

    use super::super::readers::{Tag, read_blocks, read_with_ring};
    use super::super::run::{Moved, Reading, load, run};
    use super::super::stage::{Judge, Stage};
    use super::*;
    use crate::io::ring::{Done, Read, Requests, probe, with_ring};
    use crate::progress::{NoProgress, Progress};

    const LEN: usize = 128 << 10;
    const COUNT: usize = 48;
    const START: u64 = 2 << 20;

    struct Disk {
        _dir: tempfile::TempDir,
        path: PathBuf,
        content: Vec<u8>,
    }

    impl Disk {
        fn new() -> Disk {
            let dir = tempfile::tempdir().expect("tempdir");
            let path = dir.path().join("rank0.weights");
            let words = (0..((START as usize + COUNT * LEN) / 4) as u32).map(|i| i.wrapping_mul(2_654_435_761));
            let content: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
            std::fs::write(&path, &content).expect("write");
            let disk = Disk { _dir: dir, path, content };
            disk.open().sync().expect("sync");
            disk
        }

        fn open(&self) -> DirectFile {
            DirectFile::open(&self.path).expect("open")
        }

        fn weights(&self) -> &[u8] {
            &self.content[START as usize..]
        }

        fn blocks(&self) -> Vec<Block<'static>> {
            let parts = self.weights().chunks(LEN).enumerate();
            let block = |(i, bytes): (usize, &[u8])| Block {
                section_index: i,
                section: "layer 3",
                index: 0,
                count: 1,
                file_offset: START + (i * LEN) as u64,
                arena_offset: (i * LEN) as u64,
                len: LEN,
                hash: *blake3::hash(bytes).as_bytes(),
            };
            parts.map(block).collect()
        }
    }

    /// Where the page cache is all there is of a file.
    fn on_tmpfs(file: &DirectFile) -> bool {
        rustix::fs::fstatfs(file.file()).expect("a file system").f_type == 0x0102_1994
    }

    fn offset(block: usize) -> u64 {
        START + (block * LEN) as u64
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Fault {
        Flip,
        Errno(i32),
        /// Only so many bytes.
        Short(usize),
        Panic,
    }

    /// What happens to the next requests of a block, by its place in the file.
    #[derive(Default)]
    struct Faults {
        of: Mutex<HashMap<u64, Vec<Fault>>>,
        requests: AtomicU64,
    }

    impl Faults {
        fn at(block: usize, faults: &[Fault]) -> Faults {
            let faults = faults.iter().rev().copied().collect();
            Faults { of: Mutex::new(HashMap::from([(offset(block), faults)])), requests: AtomicU64::new(0) }
        }

        fn next(&self, offset: u64) -> Option<Fault> {
            self.requests.fetch_add(1, Ordering::Relaxed);
            let mut of: MutexGuard<_> = self.of.lock().expect("no panic");
            let fault = of.get_mut(&offset)?.pop();
            drop(of);
            assert_ne!(fault, Some(Fault::Panic), "expected by this test");
            fault
        }
    }

    /// For reading threads.
    struct FaultySource<'a>(&'a DirectFile, &'a Faults);

    impl ReadAt for FaultySource<'_> {
        fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FormatError> {
            let fault = self.1.next(offset);
            self.0.read_exact_at(buf, offset)?;
            match fault {
                Some(Fault::Errno(code)) => {
                    let source = io::Error::from_raw_os_error(code);
                    return Err(FormatError::io("read", self.0.path(), 0, source));
                }
                Some(Fault::Flip) => buf[buf.len() / 2] ^= 1,
                _ => {}
            }
            Ok(())
        }
    }

    /// For the ring.
    struct FaultyRing<'a, R>(&'a mut R, &'a Faults);

    impl<'b, B: DerefMut<Target = [u8]>, R: Requests<Tag<'b>, B>> Requests<Tag<'b>, B> for FaultyRing<'_, R> {
        fn under_way(&self) -> usize {
            self.0.under_way()
        }

        fn has_room(&self) -> bool {
            self.0.has_room()
        }

        fn start(&mut self, tag: Tag<'b>, buf: B, read: Read) {
            self.0.start(tag, buf, read);
        }

        fn wait(&mut self) -> io::Result<Option<Done<Tag<'b>, B>>> {
            let Some((tag, mut buf, mut result)) = self.0.wait()? else { return Ok(None) };
            match self.1.next(tag.0.block.file_offset) {
                Some(Fault::Flip) => buf[tag.0.block.len / 2] ^= 1,
                Some(Fault::Errno(code)) => result = Err(io::Error::from_raw_os_error(code)),
                Some(Fault::Short(n)) => {
                    // What was not read has other bytes.
                    buf[tag.1.have() + n..tag.0.block.len].fill(0x55);
                    result = Ok(n);
                }
                _ => {}
            }
            Ok(Some((tag, buf, result)))
        }
    }

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Kind {
        Ring,
        Threads,
    }

    fn kinds() -> Vec<Kind> {
        match probe(4) {
            Ok(_) => vec![Kind::Ring, Kind::Threads],
            Err(e) => {
                println!("SKIP io_uring: {e}");
                vec![Kind::Threads]
            }
        }
    }

    fn go<D: Destination>(
        kind: Kind,
        file: &DirectFile,
        blocks: &[Block<'static>],
        faults: &Faults,
        dest: &mut D,
        judge: Judge<'_>,
        floor: Option<Floor<'_>>,
    ) -> Result<Moved, FormatError> {
        let options = LoadOptions { threads: 2, floor, ..LoadOptions::default() };
        let ring = |stage: &Stage<'_, D::Buffer>| {
            with_ring(probe(4).expect("as before"), file.file(), 4, |ring| {
                read_with_ring(stage, file, &mut FaultyRing(ring, faults));
            });
        };
        let threads = |stage: &Stage<'_, D::Buffer>| read_blocks(stage, &FaultySource(file, faults));
        let reading = match kind {
            Kind::Ring => Reading { read: &ring, threads: 1, depth: 4 },
            Kind::Threads => Reading { read: &threads, threads: 3, depth: 3 },
        };
        run(file.path(), blocks, dest, reading, judge, &options, &NoProgress)
    }

    fn arena() -> AlignedBuf {
        AlignedBuf::new(COUNT * LEN).expect("arena")
    }

    fn in_place(kind: Kind, disk: &Disk, faults: &Faults) -> (Result<Moved, FormatError>, AlignedBuf) {
        let (file, mut arena) = (disk.open(), arena());
        let result = go(kind, &file, &disk.blocks(), faults, &mut InPlace::new(&mut arena), &|_, _| Ok(()), None);
        (result, arena)
    }

    /// A device with few pinned slots and a copy engine that takes its time, as a GPU has.
    struct FakeDevice {
        pinned: usize,
        work: Option<Sender<(AlignedBuf, usize, u64)>>,
        done: Receiver<AlignedBuf>,
        engine: Option<std::thread::JoinHandle<Vec<u8>>>,
        under_way: usize,
        copies_left: usize,
    }

    impl FakeDevice {
        fn new(pinned: usize, copies_left: usize) -> FakeDevice {
            let (work, jobs) = channel::<(AlignedBuf, usize, u64)>();
            let (give_back, done) = channel();
            let engine = std::thread::spawn(move || {
                let mut memory = vec![0xee; COUNT * LEN];
                for (mut slot, len, at) in jobs {
                    std::thread::sleep(Duration::from_micros(300));
                    memory[at as usize..at as usize + len].copy_from_slice(&slot[..len]);
                    // Whoever still reads this slot finds other bytes.
                    slot.fill(0xdd);
                    let _gone = give_back.send(slot);
                }
                memory
            });
            FakeDevice { pinned, work: Some(work), done, engine: Some(engine), under_way: 0, copies_left }
        }

        fn memory(mut self) -> Vec<u8> {
            self.work = None;
            self.engine.take().expect("once").join().expect("no panic")
        }
    }

    impl Device for FakeDevice {
        type Slot = AlignedBuf;

        fn slot(&mut self) -> Result<AlignedBuf, FormatError> {
            self.pinned = self.pinned.checked_sub(1).expect("no more slots than were pinned");
            AlignedBuf::new(BLOCK_BYTES as usize)
        }

        fn copy(&mut self, slot: AlignedBuf, len: usize, arena_offset: u64) -> Result<(), FormatError> {
            let lost = || FormatError::io("copy", Path::new("device"), 0, io::Error::from_raw_os_error(libc::EIO));
            self.copies_left = self.copies_left.checked_sub(1).ok_or_else(lost)?;
            self.under_way += 1;
            self.work.as_ref().expect("open").send((slot, len, arena_offset)).expect("a copy engine");
            Ok(())
        }

        fn copied(&mut self, wait: bool) -> Result<Option<AlignedBuf>, FormatError> {
            let slot = if wait && self.under_way > 0 { self.done.recv().ok() } else { self.done.try_recv().ok() };
            self.under_way -= usize::from(slot.is_some());
            Ok(slot)
        }
    }

    #[test]
    fn every_way_gives_the_same_bytes() {
        let (disk, none) = (Disk::new(), Faults::default());
        let (file, blocks) = (disk.open(), disk.blocks());
        for kind in kinds() {
            let (result, arena) = in_place(kind, &disk, &none);
            assert_eq!(result.expect("load").retries, 0);
            assert!(arena[..] == *disk.weights(), "{kind:?} in place");
            let mut arena = self::arena();
            let mut dest = Staged::new(HostCopy::new(&mut arena), 3);
            go(kind, &file, &blocks, &none, &mut dest, &|_, _| Ok(()), None).expect("load");
            drop(dest);
            assert!(arena[..] == *disk.weights(), "{kind:?} staged");
            for slots in [1, 5, 64] {
                let mut dest = Staged::new(FakeDevice::new(slots, usize::MAX), slots);
                go(kind, &file, &blocks, &none, &mut dest, &|_, _| Ok(()), None).expect("load");
                assert!(dest.into_device().memory() == disk.weights(), "{kind:?}, {slots} slots");
            }
        }
    }

    #[test]
    fn a_block_is_read_twice_more_and_then_named() {
        let disk = Disk::new();
        for kind in kinds() {
            for fault in [Fault::Flip, Fault::Errno(libc::EIO)] {
                for times in 1..=2 {
                    let (result, arena) = in_place(kind, &disk, &Faults::at(17, &vec![fault; times]));
                    let moved = result.unwrap_or_else(|e| panic!("{kind:?} {fault:?} {times} times: {e}"));
                    assert_eq!(moved.retries, times as u64);
                    assert!(arena[..] == *disk.weights());
                }
                let faults = Faults::at(17, &[fault; 3]);
                match in_place(kind, &disk, &faults).0.err() {
                    Some(FormatError::Block { file, section, block: 0, offset: at, reads: 3, .. }) => {
                        assert_eq!((fault, at, section.as_str()), (Fault::Flip, offset(17), "layer 3"));
                        assert_eq!(file, disk.path);
                    }
                    Some(FormatError::BlockRead { file, section, block: 0, offset: at, reads: 3, source }) => {
                        assert_eq!(source.raw_os_error(), Some(libc::EIO));
                        assert_eq!((at, section.as_str()), (offset(17), "layer 3"));
                        assert_ne!(fault, Fault::Flip);
                        assert_eq!(file, disk.path);
                    }
                    other => panic!("{kind:?} {fault:?}: {other:?}"),
                }
            }
        }
    }

    #[test]
    fn what_is_no_fault_is_continued_in_the_ring() {
        let disk = Disk::new();
        if !kinds().contains(&Kind::Ring) {
            return;
        }
        let faults = [
            Fault::Short(4096),
            Fault::Errno(libc::EINTR),
            Fault::Short(5000),
            Fault::Errno(libc::EAGAIN),
            Fault::Short(4096 + 17),
        ];
        let (result, arena) = in_place(Kind::Ring, &disk, &Faults::at(40, &faults));
        assert_eq!(result.expect("load").retries, 0);
        assert!(arena[..] == *disk.weights());
        // Nothing more, before the end: as of a file that was cut.
        let (result, _) = in_place(Kind::Ring, &disk, &Faults::at(40, &[Fault::Short(0); 3]));
        assert!(matches!(result, Err(FormatError::BlockRead { .. })));
    }

    #[test]
    fn a_file_system_that_refuses_o_direct_at_the_first_read() {
        let disk = Disk::new();
        if !kinds().contains(&Kind::Ring) || !disk.open().is_direct() {
            println!("SKIP refusal of O_DIRECT: not to be had here in the first place");
            return;
        }
        let (file, blocks) = (disk.open(), disk.blocks());
        let expected = [(libc::EINVAL, ReadMode::DontCache), (libc::EOPNOTSUPP, ReadMode::Windows)];
        for (code, mode) in expected {
            let (faults, mut arena) = (Faults::at(2, &[Fault::Errno(code)]), arena());
            let moved = go(Kind::Ring, &file, &blocks, &faults, &mut InPlace::new(&mut arena), &|_, _| Ok(()), None);
            assert_eq!(moved.expect("load").retries, 0);
            assert!(arena[..] == *disk.weights());
            // Of the flag only a kernel without it makes the mode after it.
            assert!(file.mode() == mode || file.mode() == ReadMode::Windows, "{:?}", file.mode());
        }
    }

    #[test]
    fn modes_through_the_cache_leave_nothing_in_it() {
        let disk = Disk::new();
        for kind in kinds() {
            for refusals in 0..3 {
                let (file, mut arena) = (disk.open(), arena());
                assert!(std::fs::read(&disk.path).expect("read") == disk.content);
                let modes = [ReadMode::Direct, ReadMode::DontCache, ReadMode::Windows];
                modes[..refusals].iter().for_each(|mode| file.refuse(*mode).expect("refused"));
                let io = if kind == Kind::Ring { Io::Uring } else { Io::Threads };
                let options = LoadOptions { io, ..LoadOptions::default() };
                let dest = &mut InPlace::new(&mut arena);
                let report = load(&file, &disk.blocks(), dest, &|_, _| Ok(()), &options, &NoProgress).expect("load");
                assert!(arena[..] == *disk.weights());
                assert_eq!(report.bytes, (COUNT * LEN) as u64);
                assert!(report.mode as usize >= refusals, "{report:?}");
                match report.cached_bytes_after.filter(|_| !on_tmpfs(&file)) {
                    None => println!("SKIP residency: not to be known here"),
                    Some(bytes) => assert!(bytes <= 1 << 20, "{report:?}"),
                }
            }
        }
    }

    #[test]
    fn a_file_cut_after_opening_ends_the_load() {
        for kind in kinds() {
            let disk = Disk::new();
            let (file, mut arena) = (disk.open(), arena());
            let cut = std::fs::File::options().write(true).open(&disk.path);
            cut.and_then(|f| f.set_len(offset(20) + 5000)).expect("cut");
            let none = Faults::default();
            let dest = &mut InPlace::new(&mut arena);
            let result = go(kind, &file, &disk.blocks(), &none, dest, &|_, _| Ok(()), None);
            match result.err() {
                Some(FormatError::BlockRead { source, .. }) => {
                    assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof, "{kind:?}");
                }
                other => panic!("{kind:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_failure_ends_the_load_at_once() {
        let disk = Disk::new();
        let (file, blocks) = (disk.open(), disk.blocks());
        for kind in kinds() {
            // All the others together take a second and more: as long may the one that fails.
            let slow = |_: &Block<'_>, _: &[u8]| {
                std::thread::sleep(Duration::from_millis(50));
                Ok(())
            };
            // Of reading.
            let faults = Faults::at(1, &[Fault::Errno(libc::EIO); 3]);
            let mut arena = arena();
            let result = go(kind, &file, &blocks, &faults, &mut InPlace::new(&mut arena), &slow, None);
            assert!(matches!(result, Err(FormatError::BlockRead { .. })), "{kind:?}");
            let requests = faults.requests.into_inner();
            assert!(requests < COUNT as u64, "{kind:?}: {requests} requests");
            // Of judging.
            let none = Faults::default();
            let judge = |block: &Block<'_>, bytes: &[u8]| match block.section_index {
                3 => Err(FormatError::NoSuchRank { path: disk.path.clone(), rank: 3, tp: 1 }),
                _ => slow(block, bytes),
            };
            let mut arena = self::arena();
            let result = go(kind, &file, &blocks, &none, &mut InPlace::new(&mut arena), &judge, None);
            assert!(matches!(result, Err(FormatError::NoSuchRank { .. })), "{kind:?}");
            assert!(none.requests.into_inner() < COUNT as u64);
            // Of the device.
            let none = Faults::default();
            let mut dest = Staged::new(FakeDevice::new(4, 6), 4);
            let result = go(kind, &file, &blocks, &none, &mut dest, &|_, _| Ok(()), None);
            assert!(matches!(result, Err(FormatError::Io { action: "copy", .. })), "{kind:?}");
            assert!(none.requests.into_inner() < COUNT as u64);
        }
    }

    #[test]
    fn a_panic_in_a_stage_ends_the_load_instead_of_hanging_it() {
        let disk = Disk::new();
        for kind in kinds() {
            let faults = Faults::at(5, &[Fault::Panic]);
            let load = || in_place(kind, &disk, &faults).0.is_ok();
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).is_err(), "{kind:?}: reader");
            let judge = |block: &Block<'_>, _: &[u8]| {
                assert_ne!(block.section_index, 9, "expected by this test");
                Ok(())
            };
            let (file, blocks, none) = (disk.open(), disk.blocks(), Faults::default());
            let load = || {
                let mut arena = arena();
                go(kind, &file, &blocks, &none, &mut InPlace::new(&mut arena), &judge, None).is_ok()
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).is_err(), "{kind:?}: hasher");
        }
    }

    #[test]
    fn little_memory_pauses_and_enough_of_it_resumes() {
        let disk = Disk::new();
        for kind in kinds() {
            let (file, blocks, none, looks) = (disk.open(), disk.blocks(), Faults::default(), AtomicU64::new(0));
            let look = || {
                let low = looks.fetch_add(1, Ordering::Relaxed) < 4;
                if low {
                    assert_eq!(none.requests.load(Ordering::Relaxed), 0, "{kind:?} reads while memory is low");
                }
                Some(("MemFree", if low { 99 } else { 1 << 40 }))
            };
            let floor = Floor::new(100, &look);
            let mut arena = arena();
            let dest = &mut InPlace::new(&mut arena);
            let moved = go(kind, &file, &blocks, &none, dest, &|_, _| Ok(()), Some(floor)).expect("recovers");
            assert!(arena[..] == *disk.weights());
            assert!(moved.paused >= Duration::from_millis(150), "{:?}", moved.paused);
        }
    }

    #[test]
    fn memory_that_stays_low_ends_the_load_and_says_so() {
        let disk = Disk::new();
        for kind in kinds() {
            // Low only once some blocks are in.
            let (file, blocks, none) = (disk.open(), disk.blocks(), Faults::default());
            let looks = AtomicU64::new(0);
            let look = || {
                let low = none.requests.load(Ordering::Relaxed) > 2;
                looks.fetch_add(u64::from(low), Ordering::Relaxed);
                Some(("MemAvailable", if low { 77 } else { 1 << 40 }))
            };
            let floor = Floor { patience: Duration::from_millis(250), ..Floor::new(100, &look) };
            // Blocks that the watchdog has time to see: none passes before it has.
            let judge = |_: &Block<'_>, _: &[u8]| {
                while looks.load(Ordering::Relaxed) < 2 {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(())
            };
            let mut arena = arena();
            let result = go(kind, &file, &blocks, &none, &mut InPlace::new(&mut arena), &judge, Some(floor));
            let error = result.err().expect("low memory");
            assert!(
                matches!(error, FormatError::LowMemory { figure: "MemAvailable", floor: 100, found: 77, .. }),
                "{error}"
            );
            assert!(error.to_string().contains("--floor"), "{error}");
            assert!(none.requests.into_inner() < COUNT as u64, "{kind:?} went on reading");
        }
    }

    /// However fast the disk is: between two looks no more memory is taken than the last one found.
    #[test]
    fn the_floor_holds_between_two_looks() {
        let disk = Disk::new();
        let (file, blocks) = (disk.open(), disk.blocks());
        // Half of it is six blocks.
        let enough = (100 + 12 * LEN) as u64;
        for kind in kinds() {
            for staged in [false, true] {
                let (none, looks) = (Faults::default(), AtomicU64::new(0));
                let look = || {
                    let nth = looks.fetch_add(1, Ordering::Relaxed);
                    let requests = none.requests.load(Ordering::Relaxed);
                    assert!(requests <= 6 * nth, "{kind:?}, staged {staged}: {requests} requests before look {nth}");
                    Some(("MemFree", enough))
                };
                let (floor, mut arena) = (Some(Floor::new(100, &look)), arena());
                let done = if staged {
                    let mut dest = Staged::new(HostCopy::new(&mut arena), 64);
                    go(kind, &file, &blocks, &none, &mut dest, &|_, _| Ok(()), floor)
                } else {
                    go(kind, &file, &blocks, &none, &mut InPlace::new(&mut arena), &|_, _| Ok(()), floor)
                };
                done.expect("load");
                assert!(arena[..] == *disk.weights());
            }
        }
    }

    /// Counts signs of life.
    struct Alive(AtomicU64);

    impl Progress for Alive {
        fn start(&self, _: &str, _: u64) {}
        fn add(&self, bytes: u64) {
            self.0.fetch_add(u64::from(bytes == 0), Ordering::Relaxed);
        }
        fn finish(&self) {}
    }

    #[test]
    fn a_load_that_waits_for_memory_shows_life() {
        let (disk, looks, alive) = (Disk::new(), AtomicU64::new(0), Alive(AtomicU64::new(0)));
        let look = || Some(("MemFree", if looks.fetch_add(1, Ordering::Relaxed) < 4 { 99 } else { 1 << 40 }));
        let options = LoadOptions { floor: Some(Floor::new(100, &look)), ..LoadOptions::default() };
        let (file, mut arena) = (disk.open(), arena());
        load(&file, &disk.blocks(), &mut InPlace::new(&mut arena), &|_, _| Ok(()), &options, &alive).expect("load");
        // The first look is made before there is a watchdog.
        assert_eq!(alive.0.into_inner(), 3);
    }

    #[test]
    fn a_watchdog_that_panics_ends_the_load_also_while_it_is_paused() {
        let disk = Disk::new();
        for kind in kinds() {
            let (file, blocks, none, looks) = (disk.open(), disk.blocks(), Faults::default(), AtomicU64::new(0));
            let look = || {
                assert!(looks.fetch_add(1, Ordering::Relaxed) < 2, "expected by this test");
                Some(("MemFree", 99))
            };
            let load = || {
                let mut arena = arena();
                let floor = Some(Floor::new(100, &look));
                go(kind, &file, &blocks, &none, &mut InPlace::new(&mut arena), &|_, _| Ok(()), floor).is_ok()
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(load)).is_err(), "{kind:?}");
        }
    }
}
