//! Stories that cross two crates.
