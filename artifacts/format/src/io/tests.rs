use super::*;

/// Every byte differs from its neighbours and repeats only after 2^32.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

#[test]
fn reads_any_range_of_a_file_with_a_ragged_end_in_both_modes() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("shard");
    let bytes = pattern((9 << 20) + 1234);
    std::fs::write(&path, &bytes).expect("write");
    let len = bytes.len();
    let ranges = [
        (0, len),
        (1, 1),
        (4095, 2),
        (4096, 4096),
        (8, (5 << 20) + 3),
        ((4 << 20) - 1, (4 << 20) + 2),
        (len - 1, 1),
        (len - 1234, 1234),
        (len, 0),
    ];
    for refuse in [false, true] {
        let file = DirectFile::open(&path).expect("open");
        if refuse {
            file.refuse(ReadMode::Direct).expect("through the cache");
            assert!(!file.is_direct());
        }
        for (start, n) in ranges {
            let mut buf = vec![0xa5; n];
            file.read_exact_at(&mut buf, start as u64).expect("read");
            assert!(buf == bytes[start..start + n], "{n} bytes at {start}, refused {refuse}");
        }
        let mut aligned = AlignedBuf::new(2 << 20).expect("buffer");
        file.read_exact_at(&mut aligned, 6 << 20).expect("read");
        assert!(aligned[..] == bytes[6 << 20..8 << 20]);
    }
}

#[test]
fn reading_past_the_end_names_the_length() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("short");
    std::fs::write(&path, [7; 10]).expect("write");
    let file = DirectFile::open(&path).expect("open");
    for (offset, len) in [(0, 11), (10, 1), (u64::MAX, 2)] {
        let mut buf = vec![0; len];
        let error = file.read_exact_at(&mut buf, offset).expect_err("past the end");
        assert!(matches!(error, FormatError::PastEnd { found: 10, .. }), "{error}");
    }
}

#[test]
fn a_file_cut_after_opening_is_an_error_not_an_endless_loop() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("cut");
    std::fs::write(&path, vec![7; 3 << 20]).expect("write");
    let file = DirectFile::open(&path).expect("open");
    OpenOptions::new().write(true).open(&path).and_then(|f| f.set_len(5000)).expect("cut");
    let mut buf = vec![0; 1 << 20];
    let error = file.read_exact_at(&mut buf, 0).expect_err("cut");
    assert!(matches!(error, FormatError::Io { action: "read", .. }), "{error}");
}

/// A checkpoint's shards are open all together.
#[test]
fn a_file_takes_one_descriptor() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("shard");
    std::fs::write(&path, [7; 10]).expect("write");
    let files: Vec<DirectFile> = (0..20).map(|_| DirectFile::open(&path).expect("open")).collect();
    let link = |entry: io::Result<std::fs::DirEntry>| std::fs::read_link(entry.expect("entry").path()).ok();
    let open = std::fs::read_dir("/proc/self/fd").expect("descriptors").filter_map(link);
    assert_eq!(open.filter(|target| *target == path).count(), files.len());
}

#[test]
fn writes_reach_the_file_in_both_modes() {
    let dir = tempfile::tempdir().expect("tempdir");
    for refuse in [false, true] {
        let path = dir.path().join(format!("out{refuse}"));
        let mut file = DirectFile::create(&path, 6 << 20).expect("create");
        if refuse {
            file.refuse(ReadMode::Direct).expect("through the cache");
        }
        let mut buf = AlignedBuf::new(2 << 20).expect("buffer");
        buf.copy_from_slice(&pattern(2 << 20));
        file.write_all_at(&buf, 2 << 20).expect("write");
        file.sync().expect("sync");
        let found = std::fs::read(&path).expect("read");
        assert_eq!(found.len(), 6 << 20);
        assert!(found[2 << 20..4 << 20] == buf[..]);
        assert!(found[..2 << 20].iter().chain(&found[4 << 20..]).all(|&b| b == 0));
        file.truncate((4 << 20) - 5).expect("truncate");
        assert_eq!((file.len(), std::fs::metadata(&path).expect("metadata").len()), (4_194_299, 4_194_299));
    }
}

/// Tiles of a shard are read by several threads, and end where tensors do.
#[test]
fn reads_that_end_anywhere_in_any_order_leave_little_cached() {
    const TILE: u64 = (2 << 20) + 4096 * 100;
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("shard");
    std::fs::write(&path, pattern(20 * TILE as usize)).expect("write");
    for refusals in 0..3 {
        let file = DirectFile::open(&path).expect("open");
        file.sync().expect("sync");
        file.evict();
        [ReadMode::Direct, ReadMode::DontCache][..refusals]
            .iter()
            .for_each(|mode| file.refuse(*mode).expect("refused"));
        let mut buf = AlignedBuf::new(TILE as usize).expect("buffer");
        (0..20).rev().for_each(|tile| file.read_exact_at(&mut buf, tile * TILE).expect("read"));
        match file.cached_bytes() {
            Some(cached) if !is_in_memory(&file) => assert!(cached <= 8 << 20, "{cached} bytes, {:?}", file.mode()),
            _ => println!("SKIP residency: not to be known here"),
        }
    }
}

/// Where the page cache is all there is of a file.
fn is_in_memory(file: &DirectFile) -> bool {
    rustix::fs::fstatfs(file.file()).expect("a file system").f_type == 0x0102_1994
}

/// The kernel tells a write that was lost to the first who syncs, and to nobody after that.
#[test]
fn a_sync_that_failed_is_not_forgotten() {
    let dir = tempfile::tempdir().expect("tempdir");
    let file = DirectFile::create(&dir.path().join("out"), 4096).expect("create");
    file.sync().expect("nothing is lost yet");
    let lost = file.sync_with(|_| Err(io::Error::from_raw_os_error(libc::EIO)));
    assert_eq!(lost.expect_err("EIO").raw_os_error(), Some(libc::EIO));
    let error = file.sync().expect_err("still lost");
    assert!(matches!(error, FormatError::Io { action: "sync", .. }), "{error}");
}
