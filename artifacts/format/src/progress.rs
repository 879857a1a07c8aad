//! How long operations tell a caller where they are. The bars themselves are drawn by the binaries.

/// Receives byte counts from several threads at once.
pub trait Progress: Sync {
    /// A stage begins; `what` is for people, `total_bytes` is exact.
    fn start(&self, what: &str, total_bytes: u64);
    /// A stage begins that counts things instead of bytes.
    fn start_count(&self, what: &str, total: u64) {
        self.start(what, total);
    }
    /// `bytes` more are done and verified.
    fn add(&self, bytes: u64);
    /// The stage ended well. Not called when it fails.
    fn finish(&self);
}

/// Reports to nobody.
pub struct NoProgress;

impl Progress for NoProgress {
    fn start(&self, _what: &str, _total_bytes: u64) {}
    fn add(&self, _bytes: u64) {}
    fn finish(&self) {}
}
