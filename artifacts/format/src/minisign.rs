//! The form of SIGNATURE: the text that minisign writes. Whether it is anybody's signature of this
//! artifact is for whoever holds a public key to say; here only what cannot be one is refused.

use std::path::Path;

use crate::error::FormatError;

/// Algorithm, key number, ed25519 signature.
const SIGNATURE_BYTES: usize = 2 + 8 + 64;
/// Ed25519 signature of the one before and the trusted comment.
const GLOBAL_BYTES: usize = 64;
const UNTRUSTED: &str = "untrusted comment: ";
const TRUSTED: &str = "trusted comment: ";

/// Four lines: a comment, base64 of 74 bytes, a comment, base64 of 64 bytes.
pub(crate) fn check(bytes: &[u8], file: &Path) -> Result<(), FormatError> {
    let fault = |at: &str, expected: String, found: &str| FormatError::Signature {
        file: file.to_path_buf(),
        at: at.into(),
        expected,
        found: found.chars().take(80).flat_map(char::escape_debug).collect(),
    };
    let text = std::str::from_utf8(bytes).map_err(|e| fault("text", "UTF-8".into(), &e.to_string()))?;
    let lines: Vec<&str> = text.lines().collect();
    let [untrusted, signature, trusted, global] = lines[..] else {
        return Err(fault("text", "4 lines".into(), &format!("{} lines", lines.len())));
    };
    for (at, prefix, line) in [("line 1", UNTRUSTED, untrusted), ("line 3", TRUSTED, trusted)] {
        if !line.starts_with(prefix) {
            return Err(fault(at, format!("{prefix:?} and a text"), line));
        }
    }
    for (at, bytes, line) in [("line 2", SIGNATURE_BYTES, signature), ("line 4", GLOBAL_BYTES, global)] {
        if !is_base64(line, bytes) {
            return Err(fault(at, format!("base64 of {bytes} bytes"), line));
        }
    }
    Ok(())
}

/// Whether `text` is the one padded base64 form of some `bytes` bytes: the unused bits of the last
/// digit are zero.
fn is_base64(text: &str, bytes: usize) -> bool {
    let digit = |c: u8| match c {
        b'A'..=b'Z' => Some(c - b'A'),
        b'a'..=b'z' => Some(c - b'a' + 26),
        b'0'..=b'9' => Some(c - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = (bytes * 8).div_ceil(6);
    let unused_bits = digits * 6 - bytes * 8;
    let text = text.as_bytes();
    text.len() == bytes.div_ceil(3) * 4
        && text[digits..].iter().all(|c| *c == b'=')
        && text[..digits].iter().all(|c| digit(*c).is_some())
        && digit(text[digits - 1]).is_some_and(|last| last & ((1 << unused_bits) - 1) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1556193335\tfile:test
y/rUw2y8/hOUYjZU71eHp/Wo1KZ40fGy2VJEDl34XMJM+TX48Ss/17u3IvIfbVR1FkZZSNCisQbuQY+bHwhEBg==
";

    #[test]
    fn a_signature_passes() {
        check(GOOD.as_bytes(), Path::new("SIGNATURE")).expect("good");
    }

    #[test]
    fn anything_else_is_named_by_its_line() {
        let line = |n: usize, new: &str| {
            let mut lines: Vec<&str> = GOOD.lines().collect();
            lines[n] = new;
            lines.join("\n")
        };
        let long = "R".repeat(100);
        for (text, at) in [
            (String::new(), "text: expected 4 lines, found 0 lines"),
            (GOOD.repeat(2), "text: expected 4 lines, found 8 lines"),
            (line(0, "comment: x"), "line 1"),
            (line(1, "RUQf6LRCGA9i"), "line 2: expected base64 of 74 bytes"),
            (line(1, &long), "line 2"),
            (GOOD.replace("Zwo=", "Zwp="), "line 2"),
            (GOOD.replace("RUQf", "RU*f"), "line 2"),
            (line(2, ""), "line 3"),
            (GOOD.replace("EBg==", "EBh=="), "line 4: expected base64 of 64 bytes"),
        ] {
            let error = check(text.as_bytes(), Path::new("SIGNATURE")).expect_err(at).to_string();
            assert!(error.starts_with("SIGNATURE: ") && error.contains(at), "{error}");
        }
        let error = check(&[0xff, 0xfe], Path::new("SIGNATURE")).expect_err("bytes").to_string();
        assert!(error.contains("UTF-8"), "{error}");
    }
}
