//! JSON as Python's `json` module reads and prints it.
//!
//! The model was trained on `json.dumps(value, ensure_ascii=False)`, so tools and arguments are printed exactly
//! so: ", " and ": " as separators, key order kept, floats in Python's shortest form. Tool arguments arrive as
//! JSON text and are read here too, because `serde_json` rounds integers beyond 64 bits and refuses the NaN and
//! Infinity that `json.loads` accepts; either would change the prompt.

use std::collections::HashMap;

use serde_json::Value;

/// Nesting accepted in argument text. It bounds the recursion below, and is deeper than any real schema.
const DEPTH_MAX: u32 = 256;

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Json {
    Null,
    Bool(bool),
    /// Decimal digits with an optional minus: Python integers have no width.
    Int(String),
    Float(f64),
    String(String),
    Array(Vec<Json>),
    Object(Vec<(String, Json)>),
}

impl From<&Value> for Json {
    fn from(value: &Value) -> Self {
        match value {
            Value::Null => Json::Null,
            Value::Bool(b) => Json::Bool(*b),
            Value::Number(n) => match n.as_f64() {
                Some(x) if n.is_f64() => Json::Float(x),
                _ => Json::Int(n.to_string()),
            },
            Value::String(s) => Json::String(s.clone()),
            Value::Array(items) => Json::Array(items.iter().map(Json::from).collect()),
            Value::Object(members) => {
                Json::Object(members.iter().map(|(key, value)| (key.clone(), Json::from(value))).collect())
            }
        }
    }
}

impl Json {
    /// Reads one JSON document with nothing but white space around it; `None` if `json.loads` would refuse it.
    /// Lone surrogates, which a Rust string cannot hold, and nesting beyond `DEPTH_MAX` are refused as well.
    pub(super) fn parse(text: &str) -> Option<Json> {
        let mut reader = Reader { text, at: 0 };
        let value = reader.value(0)?;
        reader.space();
        (reader.at == text.len()).then_some(value)
    }

    pub(super) fn print(&self) -> String {
        let mut out = String::new();
        self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) {
        match self {
            Json::Null => out.push_str("null"),
            Json::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Json::Int(digits) => out.push_str(digits),
            Json::Float(x) => write_float(*x, out),
            Json::String(s) => write_string(s, out),
            Json::Array(items) => {
                out.push('[');
                for (i, item) in items.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    item.write(out);
                }
                out.push(']');
            }
            Json::Object(members) => {
                out.push('{');
                for (i, (key, value)) in members.iter().enumerate() {
                    if i > 0 {
                        out.push_str(", ");
                    }
                    write_string(key, out);
                    out.push_str(": ");
                    value.write(out);
                }
                out.push('}');
            }
        }
    }
}

/// A JSON string with its quotes.
pub(super) fn write_string(s: &str, out: &mut String) {
    out.push('"');
    write_escaped(s, out);
    out.push('"');
}

/// The inside of a JSON string. Escaping works character by character, so a string may be written in parts.
pub(super) fn write_escaped(s: &str, out: &mut String) {
    for c in s.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            c if c < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(c))),
            c => out.push(c),
        }
    }
}

/// Python's `repr(float)`. Rust's `{:?}` has the same shortest digits and the same thresholds for the exponent
/// form; only the exponent is spelled differently (`1e16` for `1e+16`, `1e-5` for `1e-05`).
fn write_float(x: f64, out: &mut String) {
    if x.is_nan() {
        out.push_str("NaN");
    } else if x.is_infinite() {
        out.push_str(if x > 0.0 { "Infinity" } else { "-Infinity" });
    } else {
        let text = format!("{x:?}");
        match text.split_once('e') {
            None => out.push_str(&text),
            Some((digits, exponent)) => {
                let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
                out.push_str(&format!("{digits}e{sign}{exponent:0>2}"));
            }
        }
    }
}

struct Reader<'a> {
    text: &'a str,
    /// Byte offset, always on a character boundary.
    at: usize,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        self.text.get(self.at..).unwrap_or_default()
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Consumes `token` if it comes next.
    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.at += token.len();
        }
        found
    }

    fn space(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn value(&mut self, depth: u32) -> Option<Json> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.space();
        match self.peek()? {
            b'{' => self.object(depth),
            b'[' => self.array(depth),
            b'"' => self.string().map(Json::String),
            _ => self.scalar(),
        }
    }

    fn scalar(&mut self) -> Option<Json> {
        let words = [
            ("null", Json::Null),
            ("true", Json::Bool(true)),
            ("false", Json::Bool(false)),
            ("NaN", Json::Float(f64::NAN)),
            ("Infinity", Json::Float(f64::INFINITY)),
            ("-Infinity", Json::Float(f64::NEG_INFINITY)),
        ];
        for (word, value) in words {
            if self.eat(word) {
                return Some(value);
            }
        }
        self.number()
    }

    fn digits(&mut self) -> usize {
        let start = self.at;
        while self.peek().is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
        self.at - start
    }

    fn number(&mut self) -> Option<Json> {
        let start = self.at;
        self.eat("-");
        if !self.eat("0") && self.digits() == 0 {
            return None;
        }
        let integer_end = self.at;
        if self.eat(".") && self.digits() == 0 {
            return None;
        }
        if self.eat("e") || self.eat("E") {
            let _signed = self.eat("+") || self.eat("-");
            if self.digits() == 0 {
                return None;
            }
        }
        let text = self.text.get(start..self.at)?;
        if self.at > integer_end {
            return text.parse().ok().map(Json::Float);
        }
        Some(Json::Int(if text == "-0" { "0" } else { text }.to_owned()))
    }

    fn array(&mut self, depth: u32) -> Option<Json> {
        self.at += 1;
        let mut items = Vec::new();
        self.space();
        if self.eat("]") {
            return Some(Json::Array(items));
        }
        loop {
            items.push(self.value(depth + 1)?);
            self.space();
            if self.eat("]") {
                return Some(Json::Array(items));
            }
            if !self.eat(",") {
                return None;
            }
        }
    }

    /// A repeated key keeps its first place and its last value, as in a Python dict.
    fn object(&mut self, depth: u32) -> Option<Json> {
        self.at += 1;
        let mut members: Vec<(String, Json)> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        self.space();
        if self.eat("}") {
            return Some(Json::Object(members));
        }
        loop {
            self.space();
            let key = self.string()?;
            self.space();
            if !self.eat(":") {
                return None;
            }
            let value = self.value(depth + 1)?;
            match places.get(&key).and_then(|&i| members.get_mut(i)) {
                Some(member) => member.1 = value,
                None => {
                    places.insert(key.clone(), members.len());
                    members.push((key, value));
                }
            }
            self.space();
            if self.eat("}") {
                return Some(Json::Object(members));
            }
            if !self.eat(",") {
                return None;
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        if !self.eat("\"") {
            return None;
        }
        let mut out = String::new();
        loop {
            let rest = self.rest();
            let plain = rest.find(|c: char| c == '"' || c == '\\' || c < ' ')?;
            out.push_str(rest.get(..plain)?);
            self.at += plain;
            if self.eat("\"") {
                return Some(out);
            }
            if !self.eat("\\") {
                return None; // A bare control character.
            }
            let escape = self.peek()?;
            self.at += 1;
            out.push(match escape {
                b'"' => '"',
                b'\\' => '\\',
                b'/' => '/',
                b'n' => '\n',
                b'r' => '\r',
                b't' => '\t',
                b'b' => '\u{8}',
                b'f' => '\u{c}',
                b'u' => self.unicode_escape()?,
                _ => return None,
            });
        }
    }

    fn unicode_escape(&mut self) -> Option<char> {
        let high = self.hex4()?;
        if !(0xd800..0xdc00).contains(&high) {
            return char::from_u32(high);
        }
        if !self.eat("\\u") {
            return None;
        }
        let low = self.hex4()?;
        if !(0xdc00..0xe000).contains(&low) {
            return None;
        }
        char::from_u32(0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00))
    }

    fn hex4(&mut self) -> Option<u32> {
        let digits = self.rest().get(..4)?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        self.at += 4;
        u32::from_str_radix(digits, 16).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Right-hand sides are what Python 3.11 prints for `json.dumps(json.loads(left), ensure_ascii=False)`.
    #[test]
    fn prints_like_python() {
        for (text, printed) in [
            ("[1,2.0,-3]", "[1, 2.0, -3]"),
            ("1e15", "1000000000000000.0"),
            ("1E16", "1e+16"),
            ("123456789012345678.0", "1.2345678901234568e+17"),
            ("0.0001", "0.0001"),
            ("0.00001", "1e-05"),
            ("1.5e-7", "1.5e-07"),
            ("1e-320", "1e-320"),
            ("1e100", "1e+100"),
            ("0.1", "0.1"),
            ("1e400", "Infinity"),
            ("-1e400", "-Infinity"),
            ("-0", "0"),
            ("-0.0", "-0.0"),
            ("123456789012345678901234567890", "123456789012345678901234567890"),
            ("[NaN, -Infinity]", "[NaN, -Infinity]"),
            (" { \"b\" : 1 , \"a\" : { } , \"b\" : [ ] } ", "{\"b\": [], \"a\": {}}"),
            (r#""\u00e9\u0001\u007f\/\b\f\n\r\t\"\\ \ud83c\udf89""#, "\"é\\u0001\u{7f}/\\b\\f\\n\\r\\t\\\"\\\\ 🎉\""),
            ("\"\u{2028}é\"", "\"\u{2028}é\""),
        ] {
            assert_eq!(Json::parse(text).map(|v| v.print()).as_deref(), Some(printed), "{text}");
        }
    }

    #[test]
    fn refuses_what_python_refuses() {
        for text in [
            "",
            " ",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "[1,]",
            "{\"a\":1,}",
            "{a:1}",
            "[1 2]",
            "\"\n\"",
            "\"\\x\"",
            "\"\\u12\"",
            "\"open",
            "{\"a\"}",
            "nul",
            "1 2",
            "{} x",
            "'a'",
            "\u{feff}1",
            "--1",
            "\u{a0}1",
        ] {
            assert_eq!(Json::parse(text), None, "{text:?}");
        }
        // Python keeps a lone surrogate; no UTF-8 prompt can.
        assert_eq!(Json::parse("\"\\ud800\""), None);
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |n: usize| "[".repeat(n) + &"]".repeat(n);
        assert!(Json::parse(&nested(DEPTH_MAX as usize)).is_some());
        assert!(Json::parse(&nested(1_000_000)).is_none());
    }

    #[test]
    fn request_values_print_the_same() {
        let text = r#"{"z": [1, 2.5, 1e+20, -7], "a": {"k": null, "t": true}, "s": "é\n"}"#;
        let value: Value = serde_json::from_str(text).expect("valid");
        assert_eq!(Json::from(&value).print(), text);
    }
}
