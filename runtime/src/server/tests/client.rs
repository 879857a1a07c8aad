//! HTTP/1.1 by hand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use serde_json::Value;

use super::PATIENCE;

/// A reply, read to its end.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Reply {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        let line =
            self.head.lines().find_map(|line| line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)));
        line.map(|(_, value)| value)
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The `error` object, after the status was seen to be `status`.
    pub fn error(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{self:?}");
        let json = self.json();
        let error = &json["error"];
        for field in ["message", "type", "param", "code"] {
            assert!(error.get(field).is_some(), "{field}: {json}");
        }
        error.clone()
    }

    /// Events of a stream without the last, which must be the end.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{self:?}");
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let events = self.body.strip_suffix("data: [DONE]\n\n").unwrap_or_else(|| panic!("no end: {}", self.body));
        let data = events.split("\n\n").filter_map(|event| event.strip_prefix("data: "));
        data.map(|data| serde_json::from_str(data).expect("JSON")).collect()
    }
}

impl Reply {
    /// Events of a stream whose names are their data's types.
    pub fn named_events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{self:?}");
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let event = |event: &str| {
            let (name, data) = event.strip_prefix("event: ")?.split_once("\ndata: ")?;
            let data: Value = serde_json::from_str(data).expect("JSON");
            assert_eq!(data["type"], name);
            Some(data)
        };
        let body = self.body.strip_suffix("\n\n").unwrap_or_else(|| panic!("cut off: {}", self.body));
        body.split("\n\n").map(|text| event(text).unwrap_or_else(|| panic!("no event: {text}"))).collect()
    }
}

pub(super) fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("a time limit");
    stream
}

/// A request's text before its body.
pub(super) fn head(method: &str, path: &str, headers: &[(&str, &str)], length: usize) -> String {
    let headers: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Length: {length}\r\n\r\n")
}

pub(super) fn call(address: SocketAddr, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
    let mut stream = connect(address);
    let headers = [headers, &[("Connection", "close")]].concat();
    stream.write_all(head(method, path, &headers, body.len()).as_bytes()).expect("writes");
    // Who is refused before that is told so; the rest may find nobody who reads it.
    let _ = stream.write_all(body);
    read_reply(&mut stream)
}

pub(super) fn read_reply(stream: &mut TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A connection that is reset after its reply has been read all the same.
    let _ = stream.read_to_end(&mut bytes);
    let text = String::from_utf8(bytes).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no reply: {text:?}"));
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).expect("a status");
    let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
    let body = if chunked { unchunk(body) } else { body.to_owned() };
    Reply { status, head: head.to_owned(), body }
}

/// Lengths are of bytes; a chunk may end inside no character here, because events do not.
fn unchunk(mut body: &str) -> String {
    let mut text = String::new();
    while let Some((length, rest)) = body.split_once("\r\n") {
        let length = usize::from_str_radix(length, 16).expect("a length");
        if length == 0 {
            return text;
        }
        let (chunk, rest) = rest.split_at(length);
        text += chunk;
        body = rest.strip_prefix("\r\n").expect("an end of chunk");
    }
    panic!("a stream without its end: {text}");
}

/// Reads until `text` has come; what came so far.
pub(super) fn read_until(stream: &mut TcpStream, text: &str) -> String {
    let until = Instant::now() + PATIENCE;
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while !String::from_utf8_lossy(&all).contains(text) {
        let n = stream.read(&mut buffer).expect("reads");
        // A stream that only keeps itself alive never stops.
        assert!(n > 0 && Instant::now() < until, "ended before {text:?}: {}", String::from_utf8_lossy(&all));
        all.extend_from_slice(&buffer[..n]);
    }
    String::from_utf8_lossy(&all).into_owned()
}
