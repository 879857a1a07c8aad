//! dsv4c.
