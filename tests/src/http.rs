//! As much HTTP as tests need: one request a connection, the reply whole or as server-sent events.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// No reply may keep still for longer.
const STILL: Duration = Duration::from_secs(30);

/// A reply as it comes.
pub struct Reply {
    /// Status code.
    pub status: u16,
    /// Header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    body: BufReader<TcpStream>,
    is_chunked: bool,
    /// Bytes left of the current chunk.
    left: usize,
}

/// Sends a request; `body` as JSON if there is one.
pub fn ask(address: SocketAddr, method: &str, path: &str, body: Option<&Value>) -> Reply {
    let mut stream = TcpStream::connect(address).expect("a server");
    stream.set_read_timeout(Some(STILL)).expect("a timeout");
    let body = body.map(Value::to_string).unwrap_or_default();
    let head = format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    let head = head + &format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
    stream.write_all((head + &body).as_bytes()).expect("sent");
    Reply::read(BufReader::new(stream))
}

/// A POST whose reply is JSON.
pub fn post(address: SocketAddr, path: &str, body: &Value) -> Value {
    let reply = ask(address, "POST", path, Some(body));
    let status = reply.status;
    let text = reply.text();
    assert_eq!(status, 200, "{text}");
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// A GET whose reply is text.
pub fn get(address: SocketAddr, path: &str) -> String {
    let reply = ask(address, "GET", path, None);
    assert_eq!(reply.status, 200, "{path}");
    reply.text()
}

impl Reply {
    fn read(mut body: BufReader<TcpStream>) -> Reply {
        let mut line = String::new();
        body.read_line(&mut line).expect("a status line");
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or_else(|| panic!("{line:?}"));
        let mut headers = Vec::new();
        loop {
            line.clear();
            body.read_line(&mut line).expect("a header");
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.push((name.to_lowercase(), value.trim().to_owned()));
        }
        let is_chunked = headers.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked");
        Reply { status, headers, body, is_chunked, left: 0 }
    }

    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The whole body.
    pub fn text(mut self) -> String {
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes).expect("a body");
        String::from_utf8(bytes).expect("UTF-8")
    }

    /// The data of all events, up to `[DONE]`.
    pub fn events(self) -> Vec<Value> {
        assert_eq!(self.header("content-type").map(|t| t.starts_with("text/event-stream")), Some(true));
        let mut events = Vec::new();
        for line in BufReader::new(self).lines() {
            let line = line.expect("a line");
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return events,
                Some(data) => events.push(serde_json::from_str(data).unwrap_or_else(|e| panic!("{data}: {e}"))),
                None => assert!(line.is_empty() || line.starts_with(':'), "{line:?}"),
            }
        }
        panic!("no end after {events:?}");
    }
}

impl Read for Reply {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        if !self.is_chunked {
            return self.body.read(to);
        }
        if self.left == 0 {
            let mut size = String::new();
            self.body.read_line(&mut size)?;
            if size.trim().is_empty() {
                // What ends the chunk before.
                size.clear();
                self.body.read_line(&mut size)?;
            }
            self.left = usize::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let most = to.len().min(self.left);
        let read = self.body.read(&mut to[..most])?;
        self.left -= read;
        Ok(read)
    }
}
