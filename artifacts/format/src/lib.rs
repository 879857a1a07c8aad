//! The `.dsv4` artifact: files, sections, blocks, hashes. Knows sections, not models.
