//! Two versions of a file's content: JSON by paths, other texts by their first line that differs,
//! anything else by its first byte.

use serde_json::Value;

use super::Item;

/// Of the content of a member named `name`; nothing for equal contents.
pub(super) fn contents(name: &str, a: &[u8], b: &[u8]) -> Vec<Item> {
    if a == b {
        return Vec::new();
    }
    let (Ok(ta), Ok(tb)) = (std::str::from_utf8(a), std::str::from_utf8(b)) else {
        return bytes(name, a, b);
    };
    match json(&format!("{name} $"), ta, tb) {
        Some(items) if !items.is_empty() => items,
        _ => lines(name, ta, tb),
    }
}

/// Differences by path; `None` when one side is not JSON. Empty for another order of keys.
pub(super) fn json(root: &str, a: &str, b: &str) -> Option<Vec<Item>> {
    let (a, b) = (serde_json::from_str::<Value>(a).ok()?, serde_json::from_str::<Value>(b).ok()?);
    let mut out = Vec::new();
    values(root, Some(&a), Some(&b), &mut out);
    Some(out)
}

/// Depth is bounded by the parser, which refuses more than 128 levels.
fn values(at: &str, a: Option<&Value>, b: Option<&Value>, out: &mut Vec<Item>) {
    match (a, b) {
        (a, b) if a == b => {}
        (Some(Value::Object(a)), Some(Value::Object(b))) => {
            let only_b = b.keys().filter(|key| !a.contains_key(*key));
            for key in a.keys().chain(only_b) {
                values(&format!("{at}.{key}"), a.get(key), b.get(key), out);
            }
        }
        (Some(Value::Array(a)), Some(Value::Array(b))) => {
            for i in 0..a.len().max(b.len()) {
                values(&format!("{at}[{i}]"), a.get(i), b.get(i), out);
            }
        }
        (a, b) => out.push(Item { at: at.to_owned(), a: a.cloned(), b: b.cloned() }),
    }
}

/// The first line that differs.
pub(super) fn lines(name: &str, a: &str, b: &str) -> Vec<Item> {
    let (mut la, mut lb) = (a.split('\n'), b.split('\n'));
    for number in 1u64.. {
        let (x, y) = (la.next(), lb.next());
        if x != y {
            let (a, b) = (x.map(Value::from), y.map(Value::from));
            return vec![Item { at: format!("{name} line {number}"), a, b }];
        }
        if x.is_none() {
            break;
        }
    }
    Vec::new()
}

fn bytes(name: &str, a: &[u8], b: &[u8]) -> Vec<Item> {
    let same = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let byte = |side: &[u8]| side.get(same).map(|&byte| Value::from(byte));
    vec![Item { at: format!("{name} byte {same}"), a: byte(a), b: byte(b) }]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn item(at: &str, a: Option<Value>, b: Option<Value>) -> Item {
        Item { at: at.into(), a, b }
    }

    #[test]
    fn json_differs_by_path() {
        let a = r#"{"n": 1, "rope": {"factor": 16, "type": "yarn"}, "list": [1, {"x": 2}, 3], "gone": null}"#;
        let b = r#"{"rope": {"type": "yarn", "factor": 16.5}, "list": [1, {"x": "2"}], "n": 1, "new": [0]}"#;
        assert_eq!(
            json("$", a, b).unwrap(),
            [
                item("$.rope.factor", Some(json!(16)), Some(json!(16.5))),
                item("$.list[1].x", Some(json!(2)), Some(json!("2"))),
                item("$.list[2]", Some(json!(3)), None),
                item("$.gone", Some(Value::Null), None),
                item("$.new", None, Some(json!([0]))),
            ]
        );
        assert_eq!(json("$", r#"{"a": 1, "b": 2}"#, r#"{"b": 2, "a": 1}"#), Some(vec![]));
        assert_eq!(json("$", "{", "{}"), None);
    }

    #[test]
    fn texts_differ_by_their_first_line_and_others_by_a_byte() {
        let found = contents("x.txt", b"one\ntwo\nthree", b"one\n2\n3");
        assert_eq!(found, [item("x.txt line 2", Some("two".into()), Some("2".into()))]);
        assert_eq!(contents("x", b"one\n", b"one"), [item("x line 2", Some("".into()), None)]);
        assert_eq!(contents("x", b"\xff\x01", b"\xff"), [item("x byte 1", Some(json!(1)), None)]);
        assert_eq!(contents("x.json", b"{\"a\": 1}", b"{\"a\":1}").len(), 1);
        assert_eq!(contents("x", b"same", b"same"), []);
    }
}
