//! Stories that cross two crates: what the test programs in `tests/` share.
//!
//! Data lies beside this crate: `tiny` (a checkpoint) and `golden` (what an independent reference
//! computed from it), `nano` (a trained checkpoint and the conversations it must reproduce).

pub mod artifacts;
pub mod binaries;
pub mod device;
pub mod driver;
pub mod golden;
pub mod group;
pub mod http;
pub mod nano;

/// The directory of the test data.
pub const DATA: &str = env!("CARGO_MANIFEST_DIR");

/// Says that a story is left out, and why. With `DSV4_NO_SKIPS=1` that is a failure.
pub fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    assert!(std::env::var_os("DSV4_NO_SKIPS").is_none(), "skipped, and DSV4_NO_SKIPS is set: {reason}");
}
