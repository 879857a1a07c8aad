//! dsv4-run.
