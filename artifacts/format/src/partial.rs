//! A directory being written as `.NAME.partial` beside its final place.
//!
//! The directory itself carries an exclusive flock: a second writer is refused, and a killed one
//! leaves no lock behind. What a killed writer left in it is discarded (or resumed, where the caller
//! can), as far as every name is one that a writer of this kind gives; anything else is somebody's data and is never removed. Only
//! [`Partial::publish`] gives the final name, after everything inside is on the medium.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::FormatError;
use crate::header::MANIFEST_FILE;
use crate::journal::JOURNAL_FILE;

/// The locked directory; what is in it is removed on drop unless it was published.
pub struct Partial {
    out: PathBuf,
    parent: PathBuf,
    path: PathBuf,
    /// Which names are this kind of writer's own.
    is_own: fn(&str) -> bool,
    /// False once the directory is no longer ours to remove.
    owned: bool,
    /// Holds the flock.
    dir: File,
}

impl Partial {
    /// Makes and locks an empty directory for what will be `out`. `is_own` knows the names that may
    /// be discarded.
    ///
    /// Errors: [`FormatError::Busy`] while another process has it, [`FormatError::Occupied`] when it
    /// holds what no writer of this kind put there (nothing is removed then).
    pub fn create(out: &Path, is_own: fn(&str) -> bool) -> Result<Self, FormatError> {
        let (parent, path) = places(out)?;
        let dir = lock_partial(&path)?;
        let mut partial = Partial { out: out.to_path_buf(), parent, path, is_own, owned: false, dir };
        if let Some(name) = foreign(&partial.path, is_own)? {
            let found = format!("a directory with {name:?} in it");
            return Err(FormatError::Occupied { path: partial.path.clone(), found });
        }
        partial.owned = true;
        empty(&partial.path, is_own)?;
        Ok(partial)
    }

    /// As [`Partial::create`], but what an interrupted writer left stays, now and on drop.
    pub(crate) fn resume(out: &Path, is_own: fn(&str) -> bool) -> Result<Self, FormatError> {
        let (parent, path) = places(out)?;
        let dir = lock_partial(&path)?;
        let partial = Partial { out: out.to_path_buf(), parent, path, is_own, owned: false, dir };
        match foreign(&partial.path, is_own)? {
            None => Ok(partial),
            Some(name) => {
                let found = format!("a directory with {name:?} in it");
                Err(FormatError::Occupied { path: partial.path.clone(), found })
            }
        }
    }

    /// Removes what is in it.
    pub(crate) fn clear(&self) -> Result<(), FormatError> {
        empty(&self.path, self.is_own)
    }

    /// What is in it is of no more use to anybody.
    pub(crate) fn discard_on_drop(&mut self) {
        self.owned = true;
    }

    /// Somebody will go on with what is in it.
    pub(crate) fn keep_on_drop(&mut self) {
        self.owned = false;
    }

    /// Whether the path still leads to the locked directory: not once it has its final name.
    pub(crate) fn is_here(&self) -> bool {
        let same = |locked: fs::Metadata| {
            fs::symlink_metadata(&self.path)
                .is_ok_and(|there| (there.dev(), there.ino()) == (locked.dev(), locked.ino()))
        };
        self.dir.metadata().is_ok_and(same)
    }

    /// Returns when the directory and the names in it are on the medium.
    pub(crate) fn sync_names(&self) -> Result<(), FormatError> {
        self.sync()?;
        sync_directory(&self.parent)
    }

    /// Where the files are written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn out(&self) -> &Path {
        &self.out
    }

    /// Gives the final name, which nothing has yet. Files must have been synced; the directory is
    /// synced before the rename, its parent after it.
    pub fn publish(&mut self) -> Result<(), FormatError> {
        self.sync()?;
        match self.rename(RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                self.rename(RenameFlags::empty()).map_err(|e| self.not_named(e.into()))?;
            }
            Err(e) => return Err(self.not_named(e.into())),
        }
        self.owned = false;
        sync_directory(&self.parent)
    }

    /// As [`Partial::publish`], where `out` is a directory of the same kind: the two exchange their
    /// places, and the old one is removed on drop.
    pub(crate) fn replace(&mut self) -> Result<(), FormatError> {
        self.sync()?;
        match self.rename(RenameFlags::EXCHANGE) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOSYS) => self.replace_in_two_steps()?,
            Err(e) => return Err(self.not_named(e.into())),
        }
        sync_directory(&self.parent)
    }

    /// For file systems that cannot exchange: for a moment the name is free, and a crash then leaves
    /// the old directory under `.NAME.partial.old`.
    fn replace_in_two_steps(&mut self) -> Result<(), FormatError> {
        let mut old = self.path.clone().into_os_string();
        old.push(".old");
        let old = PathBuf::from(old);
        // Left by such a crash. `out` is there again, so nobody needs it.
        if fs::symlink_metadata(&old).is_ok() {
            remove(&old, self.is_own)?;
        }
        fs::rename(&self.out, &old).map_err(|e| FormatError::io("set aside", &self.out, 0, e))?;
        if let Err(e) = fs::rename(&self.path, &self.out) {
            // Put the old one back; if even that fails, the first error is the one to report.
            let _ = fs::rename(&old, &self.out);
            return Err(self.not_named(e));
        }
        self.owned = false;
        remove(&old, self.is_own)
    }

    fn sync(&self) -> Result<(), FormatError> {
        self.dir.sync_all().map_err(|e| FormatError::io("sync", &self.path, 0, e))
    }

    fn rename(&self, flags: RenameFlags) -> Result<(), Errno> {
        renameat_with(CWD, &self.path, CWD, &self.out, flags)
    }

    fn not_named(&self, e: io::Error) -> FormatError {
        FormatError::io("give the final name to", &self.path, 0, e)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.owned {
            // Nowhere to report to; the next writer discards what stays.
            let _ = remove(&self.path, self.is_own);
        }
    }
}

/// The parent directory and the partial's path.
fn places(out: &Path) -> Result<(PathBuf, PathBuf), FormatError> {
    let Some(name) = out.file_name().and_then(|name| name.to_str()) else {
        return Err(FormatError::Occupied {
            path: out.to_path_buf(),
            found: "a path without a readable last name".into(),
        });
    };
    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let partial = parent.join(format!(".{name}.partial"));
    Ok((parent, partial))
}

/// Whether the file system of `out` may have room for files of `bytes` in its partial directory, beside or in place of
/// what an interrupted writer left there. Reserves nothing; where the system does not tell, the reservation will.
///
/// Errors: [`FormatError::NoSpace`], a name that no partial can have.
pub fn require_room(out: &Path, bytes: u64) -> Result<(), FormatError> {
    let (parent, partial) = places(out)?;
    let Ok(disk) = rustix::fs::statvfs(&parent) else { return Ok(()) };
    // Also what is kept for the superuser, who may be asking.
    let free = disk.f_bfree.saturating_mul(disk.f_frsize);
    let entries = fs::read_dir(&partial).into_iter().flatten().flatten();
    let held: u64 = entries.filter_map(|entry| entry.metadata().ok()).map(|meta| meta.blocks() * 512).sum();
    if disk.f_blocks > 0 && bytes > free.saturating_add(held) {
        return Err(FormatError::NoSpace { path: partial, needed: bytes });
    }
    Ok(())
}

/// Returns when the directory's entries are on the medium.
pub(crate) fn sync_directory(path: &Path) -> Result<(), FormatError> {
    let synced = File::open(path).and_then(|dir| dir.sync_all());
    synced.map_err(|e| FormatError::io("sync", path, 0, e))
}

/// The first name in a directory that is not `is_own`.
pub(crate) fn foreign(dir: &Path, is_own: fn(&str) -> bool) -> Result<Option<String>, FormatError> {
    let examine = |e| FormatError::io("examine", dir, 0, e);
    for entry in fs::read_dir(dir).map_err(examine)? {
        let name = entry.map_err(examine)?.file_name();
        if !name.to_str().is_some_and(is_own) {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

/// Removes the files of `dir` that are `is_own`; others stay. MANIFEST and JOURNAL go first: without
/// them nobody takes what a crash in between leaves for something that can be gone on with.
fn empty(dir: &Path, is_own: fn(&str) -> bool) -> Result<(), FormatError> {
    let failed = |path: &Path, e| FormatError::io("remove", path, 0, e);
    for name in [MANIFEST_FILE, JOURNAL_FILE].into_iter().filter(|name| is_own(name)) {
        remove_file(&dir.join(name))?;
    }
    sync_directory(dir)?;
    for entry in fs::read_dir(dir).map_err(|e| failed(dir, e))? {
        let entry = entry.map_err(|e| failed(dir, e))?;
        if entry.file_name().to_str().is_some_and(is_own) {
            fs::remove_file(entry.path()).map_err(|e| failed(&entry.path(), e))?;
        }
    }
    Ok(())
}

/// Removes a file that may be there.
pub(crate) fn remove_file(path: &Path) -> Result<(), FormatError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(FormatError::io("remove", path, 0, e)),
        _ => Ok(()),
    }
}

/// Removes a directory of such files; fails, and leaves it, when there is anything else in it.
fn remove(dir: &Path, is_own: fn(&str) -> bool) -> Result<(), FormatError> {
    if let Some(name) = foreign(dir, is_own)? {
        return Err(FormatError::Occupied {
            path: dir.to_path_buf(),
            found: format!("a directory with {name:?} in it"),
        });
    }
    empty(dir, is_own)?;
    fs::remove_dir(dir).map_err(|e| FormatError::io("remove", dir, 0, e))
}

/// Locks a directory as long as the result lives; `WOULDBLOCK` if another process has it.
pub(crate) fn lock_directory(path: &Path) -> Result<File, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let dir = rustix::fs::open(path, flags, Mode::empty())?;
    rustix::fs::flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
    Ok(dir.into())
}

/// Makes the partial directory and locks it. Between opening and locking its owner may have renamed
/// or removed it, so the lock counts only if the path still leads to the locked directory.
fn lock_partial(path: &Path) -> Result<File, FormatError> {
    let failed = |action, e| FormatError::io(action, path, 0, e);
    for _ in 0..16 {
        match fs::create_dir(path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failed("create", e)),
            _ => {}
        }
        let dir = match lock_directory(path) {
            Ok(dir) => dir,
            Err(Errno::NOENT) => continue,
            Err(Errno::WOULDBLOCK) => break,
            Err(e) => return Err(failed("lock", e.into())),
        };
        let locked = dir.metadata().map_err(|e| failed("examine", e))?;
        match fs::symlink_metadata(path) {
            Ok(there) if (there.dev(), there.ino()) == (locked.dev(), locked.ino()) => return Ok(dir),
            _ => continue,
        }
    }
    Err(FormatError::Busy { path: path.to_path_buf() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_own(name: &str) -> bool {
        name.starts_with("part")
    }

    fn directory(path: &Path, files: &[&str]) {
        fs::create_dir(path).expect("dir");
        for name in files {
            fs::write(path.join(name), name).expect("write");
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.expect("entry").file_name().into_string().expect("name");
        let mut names: Vec<_> = fs::read_dir(dir).expect("dir").map(name).collect();
        names.sort();
        names
    }

    /// What file systems without an exchange of names do, with what a crash in the middle left.
    #[test]
    fn two_steps_replace_and_clear_an_earlier_attempt() {
        let dir = tempfile::tempdir().expect("tempdir");
        let out = dir.path().join("x");
        directory(&out, &["part1"]);
        directory(&dir.path().join(".x.partial.old"), &["part0"]);
        let mut partial = Partial::create(&out, is_own).expect("partial");
        fs::write(partial.path().join("part2"), b"new").expect("write");
        partial.replace_in_two_steps().expect("replace");
        drop(partial);
        assert_eq!((names(dir.path()), names(&out)), (vec!["x".into()], vec!["part2".into()]));
    }

    #[test]
    fn two_steps_do_not_remove_what_is_not_theirs() {
        let dir = tempfile::tempdir().expect("tempdir");
        let (out, old) = (dir.path().join("x"), dir.path().join(".x.partial.old"));
        directory(&out, &["part1"]);
        directory(&old, &["part0", "thesis"]);
        let mut partial = Partial::create(&out, is_own).expect("partial");
        let error = partial.replace_in_two_steps().expect_err("occupied");
        assert!(matches!(error, FormatError::Occupied { ref path, .. } if *path == old), "{error}");
        drop(partial);
        assert_eq!((names(&out), names(&old)), (vec!["part1".into()], vec!["part0".into(), "thesis".into()]));
        assert_eq!(names(dir.path()), [".x.partial.old", "x"]);
    }

    /// A crash after the first removals must leave nothing that says it can be gone on with.
    #[test]
    fn what_could_be_gone_on_with_is_removed_first() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("x");
        fs::create_dir(&path).expect("dir");
        // Directories stop a removal; whatever the order of names, one of them comes before the last file.
        for n in 0..20 {
            fs::create_dir(path.join(format!("part{n}"))).expect("dir");
        }
        for name in [JOURNAL_FILE, MANIFEST_FILE] {
            fs::write(path.join(name), name).expect("write");
        }
        for n in 20..40 {
            fs::create_dir(path.join(format!("part{n}"))).expect("dir");
        }
        let own = |name: &str| name.starts_with("part") || name == JOURNAL_FILE || name == MANIFEST_FILE;
        empty(&path, own).expect_err("a directory is no file");
        assert!(!path.join(MANIFEST_FILE).exists() && !path.join(JOURNAL_FILE).exists());
    }

    #[test]
    fn dropping_removes_its_own_files_only() {
        let dir = tempfile::tempdir().expect("tempdir");
        let partial = Partial::create(&dir.path().join("x"), is_own).expect("partial");
        let path = partial.path().to_path_buf();
        fs::write(path.join("part2"), b"new").expect("write");
        fs::write(path.join("notes"), b"mine").expect("write");
        drop(partial);
        assert_eq!(names(&path), ["notes", "part2"]);
        fs::remove_file(path.join("notes")).expect("remove");
        drop(Partial::create(&dir.path().join("x"), is_own).expect("partial"));
        assert!(names(dir.path()).is_empty());
    }
}
