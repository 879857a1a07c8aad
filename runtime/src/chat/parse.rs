//! A whole completion to its message: the events of `StreamParser`, folded.
//!
//! There is one grammar and one implementation of it; streaming and whole parsing cannot disagree.

use super::stream::{Event, StreamParser};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParsedCall {
    pub name: String,
    /// The text of a JSON object, always valid.
    pub arguments: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Completion {
    pub reasoning_content: String,
    pub content: String,
    /// Finished calls only; a call that was cut off is left out.
    pub tool_calls: Vec<ParsedCall>,
    /// False when the text stops inside the reasoning or inside a call block.
    pub complete: bool,
}

/// Parses what follows the prompt; the end token may be there or not. Never fails: whatever is not markup is
/// content. `thinking` is `Encoded::thinking_open` of the prompt.
pub fn parse(text: &str, thinking: bool) -> Completion {
    let mut parser = StreamParser::new(thinking);
    let mut events = parser.push(text);
    events.extend(parser.finish());
    fold(events, parser.is_complete())
}

fn fold(events: Vec<Event>, complete: bool) -> Completion {
    let mut out = Completion { complete, ..Completion::default() };
    let mut open: Option<ParsedCall> = None;
    for event in events {
        match event {
            Event::Reasoning(text) => out.reasoning_content.push_str(&text),
            Event::Content(text) => out.content.push_str(&text),
            Event::ToolCallStart { name, .. } => open = Some(ParsedCall { name, arguments: String::new() }),
            Event::ToolCallArguments { delta, .. } => {
                if let Some(call) = &mut open {
                    call.arguments.push_str(&delta);
                }
            }
            Event::ToolCallEnd { .. } => out.tool_calls.extend(open.take()),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(body: &str) -> String {
        format!("\n\n<｜DSML｜tool_calls>\n{body}\n</｜DSML｜tool_calls>")
    }

    fn param(name: &str, string: bool, value: &str) -> String {
        format!("<｜DSML｜parameter name=\"{name}\" string=\"{string}\">{value}</｜DSML｜parameter>")
    }

    fn invoke(name: &str, body: &str) -> String {
        format!("<｜DSML｜invoke name=\"{name}\">\n{body}\n</｜DSML｜invoke>")
    }

    fn calls(text: &str) -> Vec<(String, String)> {
        parse(text, false).tool_calls.into_iter().map(|c| (c.name, c.arguments)).collect()
    }

    fn one(arguments: &str) -> Vec<(String, String)> {
        vec![("f".to_owned(), arguments.to_owned())]
    }

    #[test]
    fn values_that_are_no_json_become_strings() {
        for (value, printed) in [
            ("True", "\"True\""),
            ("NaN", "\"NaN\""),
            ("", "\"\""),
            ("[1, 2", "\"[1, 2\""),
            ("{\"a\": \"b\nc\"}", "\"{\\\"a\\\": \\\"b\\nc\\\"}\""),
            ("1} , {", "\"1} , {\""),
            (" 12 ", " 12 "),
            ("{\"a\": [1, 2.50]}", "{\"a\": [1, 2.50]}"),
            ("1e999", "1e999"),
        ] {
            let arguments = format!("{{\"k\": {printed}}}");
            assert_eq!(calls(&block(&invoke("f", &param("k", false, value)))), one(&arguments));
            serde_json::from_str::<serde::de::IgnoredAny>(&arguments).expect("valid JSON");
        }
    }

    #[test]
    fn string_values_are_taken_as_they_are() {
        let value = "a \"q\"\n<b>\\ </｜DSML｜invoke> <｜DSML｜parameter name=\"x\" string=\"true\"> </think> </｜DSML｜tool_calls>\t";
        let found = calls(&block(&invoke("f", &param("k", true, value))));
        let object: serde_json::Value = serde_json::from_str(&found[0].1).expect("valid JSON");
        assert_eq!(object["k"], value);
        // Names are escaped too.
        let odd = calls(&block(&invoke("f", &param("a\"b\n", true, "v"))));
        assert_eq!(odd, one("{\"a\\\"b\\n\": \"v\"}"));
    }

    #[test]
    fn a_block_ends_reasoning() {
        let text = format!("I call.{}", block(&invoke("f", "")));
        let found = parse(&text, true);
        assert_eq!((found.reasoning_content.as_str(), found.content.as_str()), ("I call.", ""));
        assert_eq!(found.tool_calls, vec![ParsedCall { name: "f".to_owned(), arguments: "{}".to_owned() }]);
        assert!(found.complete);
    }

    #[test]
    fn text_around_the_block() {
        let with =
            |before: &str, after: &str| parse(&format!("{before}{}{after}", block(&invoke("f", ""))), false).content;
        assert_eq!(with("a\n", " b<｜end▁of▁sentence｜>"), "a\n");
        assert_eq!(with("", ""), "");
        // Only "\n\n" belongs to the block.
        assert_eq!(parse("a\n<｜DSML｜tool_calls>", false).content, "a\n");
        assert_eq!(parse("a</think>b\n\n", false).content, "a</think>b\n\n");
        assert_eq!(parse("a</think>b</think>\n", true).content, "b</think>\n");
        // The end token goes only at the very end.
        assert_eq!(
            parse("a<｜end▁of▁sentence｜>b\n\n<｜end▁of▁sentence｜>", false).content,
            "a<｜end▁of▁sentence｜>b\n\n"
        );
        assert_eq!(parse("why<｜end▁of▁sentence｜>", true).reasoning_content, "why");
    }

    #[test]
    fn missing_closing_tags_end_at_the_next_tag() {
        let first = param("k", false, "1");
        let text = block(&format!("<｜DSML｜invoke name=\"f\">{first}{}", invoke("g", "junk")));
        let expected = vec![("f".to_owned(), "{\"k\": 1}".to_owned()), ("g".to_owned(), "{}".to_owned())];
        assert_eq!(calls(&text), expected);
        assert_eq!(calls(&block(&format!("<｜DSML｜invoke name=\"f\">{first}"))), one("{\"k\": 1}"));
    }

    #[test]
    fn malformed_headers_are_skipped() {
        let good = param("k", true, "v");
        let body = format!("<｜DSML｜parameter nome=\"a\" string=\"true\">x</｜DSML｜parameter>\n{good}");
        assert_eq!(calls(&block(&invoke("f", &body))), one("{\"k\": \"v\"}"));
        assert_eq!(
            calls(&block(&format!("<｜DSML｜invoke>\n</｜DSML｜invoke>{}", invoke("f", &good)))),
            one("{\"k\": \"v\"}")
        );
        let endless = format!("<｜DSML｜invoke name=\"{}\">", "n".repeat(10_000));
        assert_eq!(calls(&block(&format!("{endless}{}", invoke("f", &good)))), one("{\"k\": \"v\"}"));
        // Without the attribute, what reads as JSON is JSON.
        let bare = |value: &str| {
            calls(&block(&invoke("f", &format!("<｜DSML｜parameter name=\"k\">{value}</｜DSML｜parameter>"))))
        };
        assert_eq!(bare("12"), one("{\"k\": 12}"));
        assert_eq!(bare("a b"), one("{\"k\": \"a b\"}"));
    }

    #[test]
    fn cut_texts_hold_no_half_call() {
        let whole = format!(
            "Hi{}",
            block(&format!("{}\n{}", invoke("f", &param("k", true, "v")), invoke("g", &param("n", false, "[1]"))))
        );
        let full = parse(&whole, false);
        assert_eq!((full.tool_calls.len(), full.complete), (2, true));
        for (at, _) in whole.char_indices() {
            let cut = parse(&whole[..at], false);
            assert!(full.tool_calls.starts_with(&cut.tool_calls), "{:?}", &whole[..at]);
            assert!(!cut.content.contains("｜DSML｜"), "{:?}", &whole[..at]);
            assert_eq!(cut.complete, at <= "Hi\n\n<｜DSML".len(), "{:?}", &whole[..at]);
        }
    }
}
