//! Fields of a JSON object, by name: absent and null are the same, a bad value is an error that names the field.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::{ApiError, Result};
use crate::chat::kind;

/// Most values of a body. A value takes far more memory than its text; this bounds it, at several times what fills
/// any context.
const VALUES_MAX: usize = 4 << 20;

/// Reads a body.
///
/// Errors: no JSON, with line and column; no object; too many values.
pub(super) fn parse_object(body: &[u8]) -> Result<Map<String, Value>> {
    let values = count_values(body);
    if values > VALUES_MAX {
        return Err(ApiError::body(format!("found about {values} JSON values, expected at most {VALUES_MAX}")));
    }
    match serde_json::from_slice(body) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(ApiError::body(format!("found {}, expected an object", kind(&other)))),
        Err(error) => Err(ApiError::body(format!("no valid JSON: {error}"))),
    }
}

/// At least as many as there are values: what stands between them is counted, outside of strings.
fn count_values(body: &[u8]) -> usize {
    let (mut values, mut in_string, mut escaped) = (1, false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b',' | b'[' | b'{' if !in_string => values += 1,
            _ => {}
        }
    }
    values
}

/// A text, or a list of objects in its place.
pub(super) enum Content<'a> {
    Text(&'a str),
    Parts(Vec<Fields<'a>>),
}

/// An object whose fields are read.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    /// What stands before a field's name in messages.
    prefix: String,
}

impl<'a> Fields<'a> {
    pub fn new(map: &'a Map<String, Value>) -> Fields<'a> {
        Fields { map, prefix: String::new() }
    }

    /// The field's full name.
    pub fn name(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    /// Where the object itself stands.
    pub fn place(&self) -> &str {
        self.prefix.strip_suffix('.').unwrap_or(&self.prefix)
    }

    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// An error about the field.
    pub fn wrong(&self, field: &str, value: &Value, expected: impl std::fmt::Display) -> ApiError {
        let found = match value {
            Value::Number(n) => n.to_string(),
            Value::Bool(b) => b.to_string(),
            Value::String(s) if s.chars().count() <= 40 => format!("{s:?}"),
            other => kind(other).to_owned(),
        };
        ApiError::field(&self.name(field), format!("found {found}, expected {expected}"))
    }

    pub fn boolean(&self, field: &str) -> Result<Option<bool>> {
        let read = |value: &Value| value.as_bool().ok_or_else(|| self.wrong(field, value, "true or false"));
        self.get(field).map(read).transpose()
    }

    pub fn string(&self, field: &str) -> Result<Option<&'a str>> {
        let read = |value: &'a Value| value.as_str().ok_or_else(|| self.wrong(field, value, "a string"));
        self.get(field).map(read).transpose()
    }

    pub fn list(&self, field: &str) -> Result<Option<&'a Vec<Value>>> {
        let read = |value: &'a Value| value.as_array().ok_or_else(|| self.wrong(field, value, "a list"));
        self.get(field).map(read).transpose()
    }

    pub fn object(&self, field: &str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_object() {
            Some(map) => Ok(Some(Fields { map, prefix: format!("{}.", self.name(field)) })),
            None => Err(self.wrong(field, value, "an object")),
        }
    }

    /// A string that must be there.
    pub fn required(&self, field: &str) -> Result<&'a str> {
        self.string(field)?.ok_or_else(|| ApiError::field(&self.name(field), "missing, expected a string"))
    }

    /// A list's objects; none is an empty list.
    pub fn objects(&self, field: &str) -> Result<Vec<Fields<'a>>> {
        let item = |(i, value): (usize, &'a Value)| {
            let name = format!("{field}[{i}]");
            match value.as_object() {
                Some(map) => Ok(Fields { map, prefix: format!("{}.", self.name(&name)) }),
                None => Err(self.wrong(&name, value, "an object")),
            }
        };
        self.list(field)?.into_iter().flatten().enumerate().map(item).collect()
    }

    /// What a message says: it must be there.
    pub fn content(&self, field: &str) -> Result<Content<'a>> {
        let expected = "a string or a list of objects";
        match self.get(field) {
            Some(Value::String(text)) => Ok(Content::Text(text)),
            Some(Value::Array(_)) => self.objects(field).map(Content::Parts),
            Some(other) => Err(self.wrong(field, other, expected)),
            None => Err(ApiError::field(&self.name(field), format!("missing, expected {expected}"))),
        }
    }

    /// A whole number; one that a client writes as `16.0` is one.
    pub fn int(&self, field: &str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        let whole = value.as_i64().or_else(|| {
            let float = value.as_f64().filter(|f| f.fract() == 0.0)?;
            // Beyond this range it fits no range of ours, and saturates.
            Some(float as i64)
        });
        let expected = || match (*range.start(), *range.end()) {
            (low, i64::MAX) => format!("a whole number of at least {low}"),
            (low, high) => format!("a whole number in {low}..={high}"),
        };
        match whole {
            Some(n) if range.contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(field, value, expected())),
        }
    }

    pub fn float(&self, field: &str, range: RangeInclusive<f64>) -> Result<Option<f32>> {
        let Some(value) = self.get(field) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if range.contains(&x) => Ok(Some(x as f32)),
            _ => Err(self.wrong(field, value, format!("a number in {}..={}", range.start(), range.end()))),
        }
    }

    /// Ids of tokens, as a list's content.
    pub fn token_ids(&self, field: &str, list: &[Value], vocab_size: u64) -> Result<Vec<u32>> {
        let id = |(i, value): (usize, &Value)| {
            let id = value.as_u64().filter(|id| *id < vocab_size).and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.wrong(&format!("{field}[{i}]"), value, format!("a token id below {vocab_size}")))
        };
        list.iter().enumerate().map(id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_counted_outside_strings() {
        assert!(count_values(br#"{"a": [1, 2, {"b": ",[{\","}]}"#) >= 5);
        assert!(count_values(br#"{"a": ",,,[[[{{{\",,,\\"}"#) <= 3);
        let many = "[".to_owned() + &"1,".repeat(VALUES_MAX) + "1]";
        let error = parse_object(many.as_bytes()).expect_err("too many").json();
        assert!(error["error"]["message"].as_str().is_some_and(|m| m.contains("expected at most 4194304")), "{error}");
    }

    #[test]
    fn whole_numbers_may_be_written_as_others() {
        let map = parse_object(br#"{"a": 16.0, "b": 16.5, "c": 1e300, "d": null, "e": "16"}"#).expect("object");
        let fields = Fields::new(&map);
        assert_eq!(fields.int("a", 0..=20), Ok(Some(16)));
        assert_eq!(fields.int("d", 0..=20), Ok(None));
        assert_eq!(fields.int("none", 0..=20), Ok(None));
        assert_eq!(fields.int("c", 1..=i64::MAX), Ok(Some(i64::MAX)));
        for bad in ["b", "c", "e"] {
            assert!(fields.int(bad, 0..=20).is_err(), "{bad}");
        }
    }
}
