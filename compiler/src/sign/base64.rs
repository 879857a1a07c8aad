//! Base64 with padding, as minisign's files use it. One text for one content: a reader that took
//! spare bits or missing padding would let a signature be rewritten.

const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

pub(super) fn encode(bytes: &[u8]) -> String {
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |i: usize| u32::from(chunk.get(i).copied().unwrap_or(0));
        let bits = byte(0) << 16 | byte(1) << 8 | byte(2);
        for digit in 0..4 {
            let value = (bits >> (18 - 6 * digit) & 63) as usize;
            out.push(if digit <= chunk.len() { char::from(DIGITS[value]) } else { '=' });
        }
    }
    out
}

/// Exactly `N` bytes, or nothing.
pub(super) fn decode<const N: usize>(text: &str) -> Option<[u8; N]> {
    let digits = text.trim_end_matches('=').bytes();
    let mut out = Vec::with_capacity(N + 3);
    let (mut bits, mut held) = (0u32, 0);
    for digit in digits.take(N * 4 / 3 + 2) {
        let value = DIGITS.iter().position(|&d| d == digit)? as u32;
        bits = (bits << 6 | value) & 0xffff;
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    let out: [u8; N] = out.try_into().ok()?;
    (encode(&out) == text).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_4648_vectors() {
        for (plain, text) in [("", ""), ("f", "Zg=="), ("fo", "Zm8="), ("foo", "Zm9v"), ("fooba", "Zm9vYmE=")] {
            assert_eq!(encode(plain.as_bytes()), text);
        }
        assert_eq!(decode(""), Some([]));
        assert_eq!(decode("Zg=="), Some(*b"f"));
        assert_eq!(decode("Zm8="), Some(*b"fo"));
        assert_eq!(decode("Zm9v"), Some(*b"foo"));
        assert_eq!(decode("+/+/"), Some([0xfb, 0xff, 0xbf]));
    }

    #[test]
    fn every_content_has_one_text() {
        for text in ["Zg", "Zg=", "Zg===", "Zh==", "Z===", "Zg==\n", " Zg==", "Zm9v", "Z-==", "Zg==Zg=="] {
            assert_eq!(decode::<1>(text), None, "{text:?}");
        }
    }
}
