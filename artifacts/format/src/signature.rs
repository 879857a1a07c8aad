//! SIGNATURE: which bytes it is about, and how it gets into an artifact that is already finished.
//!
//! What is signed is the MANIFEST file: it names and hashes everything else. What a signature looks
//! like and whom to believe is the caller's business; here it is at most 16 KiB of bytes.

use std::fs::{self, File};
use std::io::{self, Read, Write};

use rustix::io::Errno;

use crate::artifact::Artifact;
use crate::error::FormatError;
use crate::header::{MANIFEST_FILE, SIGNATURE_FILE};
use crate::manifest::encode;
use crate::partial::lock_directory;

/// SIGNATURE's largest length.
pub const SIGNATURE_BYTES_MAX: u64 = 16 << 10;

impl Artifact {
    /// MANIFEST's bytes, as they were when this was opened: a reader takes no encoding but this one.
    pub fn manifest_bytes(&self) -> Result<Vec<u8>, FormatError> {
        encode(self.manifest(), &self.path().join(MANIFEST_FILE))
    }

    /// SIGNATURE's content, if there is one. Errors: longer than [`SIGNATURE_BYTES_MAX`], I/O.
    pub fn signature(&self) -> Result<Option<Vec<u8>>, FormatError> {
        let path = self.path().join(SIGNATURE_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(FormatError::io("open", &path, 0, e)),
        };
        let mut bytes = Vec::new();
        let read = file.take(SIGNATURE_BYTES_MAX + 1).read_to_end(&mut bytes);
        let found = read.map_err(|e| FormatError::io("read", &path, 0, e))? as u64;
        if found > SIGNATURE_BYTES_MAX {
            let what = "length".into();
            return Err(FormatError::TooLarge { file: path, what, limit: SIGNATURE_BYTES_MAX, found });
        }
        Ok(Some(bytes))
    }

    /// Writes SIGNATURE, in place of another if there is one. A crash leaves the old state or the new
    /// one: what is being written lies beside the artifact, never in it.
    ///
    /// Errors: [`FormatError::Busy`] while another process adds a file, I/O.
    pub fn set_signature(&self, bytes: &[u8]) -> Result<(), FormatError> {
        assert!(bytes.len() as u64 <= SIGNATURE_BYTES_MAX, "a signature of {} bytes", bytes.len());
        // The name may be a link; its neighbours are those of the directory itself.
        let dir = fs::canonicalize(self.path()).map_err(|e| FormatError::io("resolve", self.path(), 0, e))?;
        let lock = lock_directory(&dir).map_err(|e| match e {
            Errno::WOULDBLOCK => FormatError::Busy { path: dir.clone() },
            e => FormatError::io("lock", &dir, 0, e.into()),
        })?;
        let name = dir.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
        let partial = dir.with_file_name(format!(".{name}.signature.partial"));
        let len = bytes.len() as u64;
        let write = || -> io::Result<()> {
            let mut file = File::create(&partial)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&partial, dir.join(SIGNATURE_FILE))?;
            lock.sync_all()
        };
        write().map_err(|e| {
            // The first error is the one to report.
            let _ = fs::remove_file(&partial);
            FormatError::io("write", &dir.join(SIGNATURE_FILE), len, e)
        })
    }
}
