//! Little-endian encoding of the messages between ranks.
//!
//! Owns [`Writer`] and [`Reader`]. A list is its `u32` count and then its elements. The reader
//! checks a count against the caller's limit and against the bytes that are left before it takes
//! memory, so no message can make it allocate more than a small multiple of its own length.
//! Absent: any knowledge of particular messages.

/// Why a message does not decode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends inside a field.
    #[error(
        "message field {field} at byte {offset}: found {left} bytes, expected {needed}\n  help: run the same build of dsv4-run on every rank"
    )]
    Short { field: &'static str, offset: usize, left: usize, needed: u64 },
    /// A list is longer than this message may have.
    #[error(
        "message field {field} at byte {offset}: found {count} elements, expected at most {limit}\n  help: run the same build of dsv4-run on every rank"
    )]
    Long { field: &'static str, offset: usize, count: u32, limit: u32 },
    /// A field names something that this version does not have.
    #[error("message field {field}: found unknown kind {found}\n  help: run the same build of dsv4-run on every rank")]
    Kind { field: &'static str, found: u8 },
    /// A text is not UTF-8.
    #[error(
        "message field {field} at byte {offset}: found bytes that are not UTF-8, expected text\n  help: run the same build of dsv4-run on every rank"
    )]
    Text { field: &'static str, offset: usize },
    /// The message goes on after its last field.
    #[error(
        "message: found {left} bytes after the last field at byte {offset}, expected none\n  help: run the same build of dsv4-run on every rank"
    )]
    Trailing { offset: usize, left: usize },
}

/// Builds a message. Lists must have fewer than 2^32 elements; a longer one is our own defect.
#[derive(Debug, Default, Clone)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// An empty message.
    pub fn new() -> Writer {
        Writer::default()
    }

    /// Starts the next message in the same memory.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// The message so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The message.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub fn u8(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn f32(&mut self, value: f32) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    /// Bytes of a length that both sides know: no count.
    pub fn fixed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Count, then bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.fixed(bytes);
    }

    /// Length in bytes, then UTF-8.
    pub fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    pub fn u32s(&mut self, values: &[u32]) {
        self.count(values.len());
        self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    pub fn u64s(&mut self, values: &[u64]) {
        self.count(values.len());
        self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    pub fn f32s(&mut self, values: &[f32]) {
        self.count(values.len());
        self.bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    }

    fn count(&mut self, len: usize) {
        assert!(u32::try_from(len).is_ok(), "a list of {len} elements in a message");
        self.u32(len as u32);
    }
}

/// Reads a message field by field. `field` names the value in errors.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { bytes, offset: 0 }
    }

    pub fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.fixed::<1>(field).map(|[byte]| byte)
    }

    pub fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.fixed(field).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.fixed(field).map(u64::from_le_bytes)
    }

    pub fn f32(&mut self, field: &'static str) -> Result<f32, WireError> {
        self.fixed(field).map(f32::from_le_bytes)
    }

    /// `N` bytes without a count.
    pub fn fixed<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], WireError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(field, N as u64)?);
        Ok(out)
    }

    /// At most `limit` bytes, borrowed from the message.
    pub fn bytes(&mut self, field: &'static str, limit: u32) -> Result<&'a [u8], WireError> {
        self.list(field, limit, 1)
    }

    /// At most `limit` bytes of UTF-8, borrowed from the message.
    pub fn text(&mut self, field: &'static str, limit: u32) -> Result<&'a str, WireError> {
        let offset = self.offset;
        std::str::from_utf8(self.bytes(field, limit)?).map_err(|_| WireError::Text { field, offset })
    }

    pub fn u32s(&mut self, field: &'static str, limit: u32) -> Result<Vec<u32>, WireError> {
        self.elements(field, limit, u32::from_le_bytes)
    }

    pub fn u64s(&mut self, field: &'static str, limit: u32) -> Result<Vec<u64>, WireError> {
        self.elements(field, limit, u64::from_le_bytes)
    }

    pub fn f32s(&mut self, field: &'static str, limit: u32) -> Result<Vec<f32>, WireError> {
        self.elements(field, limit, f32::from_le_bytes)
    }

    /// The message must end here.
    pub fn finish(self) -> Result<(), WireError> {
        match self.bytes.len() - self.offset {
            0 => Ok(()),
            left => Err(WireError::Trailing { offset: self.offset, left }),
        }
    }

    fn elements<const N: usize, T>(
        &mut self,
        field: &'static str,
        limit: u32,
        decode: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, WireError> {
        let (chunks, _) = self.list(field, limit, N as u64)?.as_chunks::<N>();
        Ok(chunks.iter().map(|chunk| decode(*chunk)).collect())
    }

    fn list(&mut self, field: &'static str, limit: u32, element_bytes: u64) -> Result<&'a [u8], WireError> {
        let offset = self.offset;
        let count = self.u32(field)?;
        if count > limit {
            return Err(WireError::Long { field, offset, count, limit });
        }
        self.take(field, u64::from(count) * element_bytes)
    }

    fn take(&mut self, field: &'static str, needed: u64) -> Result<&'a [u8], WireError> {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        let short = WireError::Short { field, offset: self.offset, left: rest.len(), needed };
        let len = usize::try_from(needed).map_err(|_| short.clone())?;
        let taken = rest.get(..len).ok_or(short)?;
        self.offset += len;
        Ok(taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(7);
        w.u32(0x0102_0304);
        w.u64(u64::MAX - 1);
        w.f32(-0.0);
        w.u32s(&[1, 2, 3]);
        w.u64s(&[1 << 40]);
        w.f32s(&[f32::NAN, 1.5]);
        w.bytes(&[]);
        w.text("größe");
        w.into_bytes()
    }

    fn read(bytes: &[u8]) -> Result<(), WireError> {
        let mut r = Reader::new(bytes);
        assert_eq!(r.u8("a")?, 7);
        assert_eq!(r.u32("b")?, 0x0102_0304);
        assert_eq!(r.u64("c")?, u64::MAX - 1);
        assert_eq!(r.f32("d")?.to_bits(), (-0.0f32).to_bits());
        assert_eq!(r.u32s("e", 3)?, [1, 2, 3]);
        assert_eq!(r.u64s("f", 3)?, [1 << 40]);
        let floats = r.f32s("g", 2)?;
        assert!(floats[0].is_nan() && floats[1] == 1.5);
        assert!(r.bytes("h", 0)?.is_empty());
        assert_eq!(r.text("i", 7)?, "größe");
        r.finish()
    }

    #[test]
    fn a_message_reads_back_and_every_cut_of_it_is_refused() {
        let bytes = sample();
        assert_eq!(bytes[..5], [7, 4, 3, 2, 1]);
        assert_eq!(read(&bytes), Ok(()));
        for end in 0..bytes.len() {
            assert!(matches!(read(&bytes[..end]), Err(WireError::Short { .. })), "cut at {end}");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert_eq!(read(&longer), Err(WireError::Trailing { offset: bytes.len(), left: 1 }));
    }

    #[test]
    fn a_count_is_checked_before_memory_is_taken() {
        let lying = u32::MAX.to_le_bytes();
        assert_eq!(
            Reader::new(&lying).u64s("ids", 10),
            Err(WireError::Long { field: "ids", offset: 0, count: u32::MAX, limit: 10 })
        );
        assert_eq!(
            Reader::new(&lying).u64s("ids", u32::MAX),
            Err(WireError::Short { field: "ids", offset: 4, left: 0, needed: 8 * 0xffff_ffff })
        );
        let bad_text = [1, 0, 0, 0, 0xff];
        assert_eq!(Reader::new(&bad_text).text("name", 1), Err(WireError::Text { field: "name", offset: 0 }));
    }
}
