//! docs/format.md describes these sources as they are: it carries their hashes, so that neither can
//! change without the other being looked at.

use dsv4_format::Digest;

#[test]
fn the_document_was_read_when_the_format_changed() {
    const SOURCES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
    const DOCUMENT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/format.md");
    let document = std::fs::read_to_string(DOCUMENT).expect("docs/format.md");
    let mut missing = Vec::new();
    for name in ["header.rs", "manifest.rs", "layout.rs", "identity.rs"] {
        let source = std::fs::read(format!("{SOURCES}/{name}")).expect(name);
        let line = format!("{name} {}", Digest::of(&source));
        if !document.contains(&line) {
            missing.push(line);
        }
    }
    let lines = missing.join("\n");
    assert!(missing.is_empty(), "docs/format.md: check the text, then write\n{lines}");
}
