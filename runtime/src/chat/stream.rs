//! A completion's text, as it arrives, to events.
//!
//! States: reasoning, content, then inside a call block: between calls, in a tag's header, in a call, in a value,
//! after the block. Only text that no continuation can turn into a tag is given out, so the events are the same
//! however the text is cut into deltas. What is held back is bounded by the longest tag, except for a value
//! that is not a string: it is checked as JSON when it ends, because JSON that turns out broken cannot be taken back.
//!
//! Tolerated, because sampled markup breaks now and then: a block inside the reasoning (it ends the reasoning), a
//! missing end of call (the next call or the end of the block ends it), a parameter without `string=`, anything
//! between tags (dropped). A call that the text leaves unfinished gets no end event.

use super::control::{DSML, EOS, THINK_CLOSE};
use super::json::{write_escaped, write_string};

const BLOCK_OPEN: &str = "<｜DSML｜tool_calls>";
const BLOCK_CLOSE: &str = "</｜DSML｜tool_calls>";
const CALL_OPEN: &str = "<｜DSML｜invoke";
const CALL_CLOSE: &str = "</｜DSML｜invoke>";
const PARAMETER_OPEN: &str = "<｜DSML｜parameter";
const PARAMETER_CLOSE: &str = "</｜DSML｜parameter>";
/// Stands before a call block and belongs to it.
const BLOCK_GAP: &str = "\n\n";
/// Longest accepted rest of an opening tag; it bounds what a broken tag can hold back.
const HEADER_BYTES_MAX: usize = 4096;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    Reasoning(String),
    Content(String),
    ToolCallStart {
        index: u32,
        name: String,
    },
    /// Deltas of one call join to the text of a JSON object.
    ToolCallArguments {
        index: u32,
        delta: String,
    },
    /// The call is whole; a call without this event was cut off.
    ToolCallEnd {
        index: u32,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ValueKind {
    /// Given out as it arrives, escaped.
    String,
    /// Collected; given out as it is if it is valid JSON, else as a string.
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reasoning,
    Content,
    Block,
    CallHeader,
    Call,
    ParameterHeader,
    Value(ValueKind),
    Done,
}

/// Turns text deltas into events. Feed `push`, then call `finish` once.
#[derive(Debug)]
pub struct StreamParser {
    state: State,
    /// Text that may yet become a tag.
    held: String,
    /// The JSON value being collected.
    value: String,
    /// Calls begun so far; the current one is the last.
    calls: u32,
    /// The current call has no parameter yet.
    first_parameter: bool,
    /// The text stopped inside the tag that opens a block.
    cut_block: bool,
}

impl StreamParser {
    /// `thinking`: the text begins inside the reasoning; `Encoded::thinking_open` of the prompt.
    pub fn new(thinking: bool) -> StreamParser {
        StreamParser {
            state: if thinking { State::Reasoning } else { State::Content },
            held: String::new(),
            value: String::new(),
            calls: 0,
            first_parameter: true,
            cut_block: false,
        }
    }

    /// Takes the next piece of text and returns what became certain, neighbours of one kind joined.
    pub fn push(&mut self, delta: &str) -> Vec<Event> {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(delta);
        let mut events = Vec::new();
        let mut rest = text.as_str();
        while let Some(next) = self.step(rest, &mut events) {
            rest = next;
        }
        let consumed = text.len() - rest.len();
        text.drain(..consumed);
        self.held = text;
        events
    }

    /// The text has ended, by the end token or by a limit. Gives out what was held back and is not markup.
    pub fn finish(&mut self) -> Vec<Event> {
        let held = std::mem::take(&mut self.held);
        let mut events = Vec::new();
        if matches!(self.state, State::Reasoning | State::Content) {
            let mut text = held.strip_suffix(EOS).unwrap_or(&held);
            // The marker is one token that only opens tags: a text that stops behind it was cut inside a call block.
            if let Some(at) = text.rfind('<')
                && text.get(at + 1..).is_some_and(|tag| tag.starts_with(DSML))
            {
                text = &text[..at];
                text = text.strip_suffix(BLOCK_GAP).unwrap_or(text);
                self.cut_block = true;
            }
            self.emit_text(text, &mut events);
        }
        events
    }

    /// What comes next is reasoning, as far as can be said.
    pub fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }

    /// After `finish`: the text did not stop inside the reasoning or a call block.
    pub fn is_complete(&self) -> bool {
        match self.state {
            State::Content => !self.cut_block,
            State::Done => true,
            _ => false,
        }
    }

    /// One transition over the front of `rest`: returns what is left, or `None` when more text is needed, having
    /// left the undecided part as the remainder through `hold`.
    fn step<'a>(&mut self, rest: &'a str, events: &mut Vec<Event>) -> Option<&'a str> {
        if rest.is_empty() {
            return None;
        }
        match self.state {
            State::Reasoning => self.text_step(rest, &[THINK_CLOSE, BLOCK_OPEN], events),
            State::Content => self.text_step(rest, &[BLOCK_OPEN], events),
            State::Block => self.tag_step(rest, &[CALL_OPEN, BLOCK_CLOSE], events),
            State::Call => self.tag_step(rest, &[PARAMETER_OPEN, CALL_CLOSE, CALL_OPEN, BLOCK_CLOSE], events),
            State::CallHeader => self.header_step(rest, false, events),
            State::ParameterHeader => self.header_step(rest, true, events),
            State::Value(kind) => self.value_step(rest, kind, events),
            State::Done => Some(""),
        }
    }

    /// Reasoning or content: everything is text up to one of `tags`.
    fn text_step<'a>(&mut self, rest: &'a str, tags: &[&str], events: &mut Vec<Event>) -> Option<&'a str> {
        match next_tag(rest, tags, Some(EOS)) {
            Next::Tag { at, tag } => {
                let text = &rest[..at];
                if tag == BLOCK_OPEN {
                    self.emit_text(text.strip_suffix(BLOCK_GAP).unwrap_or(text), events);
                    self.state = State::Block;
                } else {
                    self.emit_text(text, events);
                    self.state = State::Content;
                }
                Some(&rest[at + tag.len()..])
            }
            Next::Undecided { at } => {
                // The gap before a block must still be here when the block shows.
                let text = &rest[..at];
                let newlines = text.len() - text.trim_end_matches('\n').len();
                let safe = at - newlines.min(BLOCK_GAP.len());
                self.emit_text(&rest[..safe], events);
                (safe > 0).then(|| &rest[safe..])
            }
        }
    }

    /// Inside a block, outside values: everything up to one of `tags` is dropped.
    fn tag_step<'a>(&mut self, rest: &'a str, tags: &[&str], events: &mut Vec<Event>) -> Option<&'a str> {
        match next_tag(rest, tags, None) {
            Next::Tag { at, tag } => {
                if tag != PARAMETER_OPEN && self.state == State::Call {
                    self.end_call(events);
                }
                self.state = match tag {
                    PARAMETER_OPEN => State::ParameterHeader,
                    CALL_OPEN => State::CallHeader,
                    CALL_CLOSE => State::Block,
                    _ => State::Done,
                };
                Some(&rest[at + tag.len()..])
            }
            Next::Undecided { at } => (at > 0).then(|| &rest[at..]),
        }
    }

    fn header_step<'a>(&mut self, rest: &'a str, parameter: bool, events: &mut Vec<Event>) -> Option<&'a str> {
        match parse_header(rest, parameter) {
            Header::Undecided => None,
            Header::Malformed => {
                self.state = if parameter { State::Call } else { State::Block };
                Some(rest)
            }
            Header::Whole { name, kind, bytes } => {
                if parameter {
                    let mut delta = String::from(if self.first_parameter { "{" } else { ", " });
                    write_string(name, &mut delta);
                    delta.push_str(": ");
                    if kind == ValueKind::String {
                        delta.push('"');
                    }
                    self.first_parameter = false;
                    self.emit_arguments(&delta, events);
                    self.state = State::Value(kind);
                } else {
                    events.push(Event::ToolCallStart { index: self.calls, name: name.to_owned() });
                    self.calls += 1;
                    self.first_parameter = true;
                    self.state = State::Call;
                }
                Some(&rest[bytes..])
            }
        }
    }

    fn value_step<'a>(&mut self, rest: &'a str, kind: ValueKind, events: &mut Vec<Event>) -> Option<&'a str> {
        let (text, ended) = match next_tag(rest, &[PARAMETER_CLOSE], None) {
            Next::Tag { at, .. } => (&rest[..at], true),
            Next::Undecided { at } => (&rest[..at], false),
        };
        let mut delta = String::new();
        match kind {
            ValueKind::String => write_escaped(text, &mut delta),
            ValueKind::Json => self.value.push_str(text),
        }
        if ended {
            match kind {
                ValueKind::String => delta.push('"'),
                ValueKind::Json => {
                    let value = std::mem::take(&mut self.value);
                    if serde_json::from_str::<serde::de::IgnoredAny>(&value).is_ok() {
                        delta.push_str(&value);
                    } else {
                        write_string(&value, &mut delta);
                    }
                }
            }
            self.state = State::Call;
        }
        self.emit_arguments(&delta, events);
        let consumed = text.len() + if ended { PARAMETER_CLOSE.len() } else { 0 };
        (consumed > 0).then(|| &rest[consumed..])
    }

    fn end_call(&mut self, events: &mut Vec<Event>) {
        self.emit_arguments(if self.first_parameter { "{}" } else { "}" }, events);
        events.push(Event::ToolCallEnd { index: self.calls.saturating_sub(1) });
    }

    fn emit_text(&self, text: &str, events: &mut Vec<Event>) {
        match (events.last_mut(), self.state) {
            _ if text.is_empty() => {}
            (Some(Event::Reasoning(last)), State::Reasoning) | (Some(Event::Content(last)), State::Content) => {
                last.push_str(text);
            }
            (_, State::Reasoning) => events.push(Event::Reasoning(text.to_owned())),
            _ => events.push(Event::Content(text.to_owned())),
        }
    }

    fn emit_arguments(&self, delta: &str, events: &mut Vec<Event>) {
        match events.last_mut() {
            _ if delta.is_empty() => {}
            Some(Event::ToolCallArguments { delta: last, .. }) => last.push_str(delta),
            _ => {
                let index = self.calls.saturating_sub(1);
                events.push(Event::ToolCallArguments { index, delta: delta.to_owned() });
            }
        }
    }
}

enum Next<'t> {
    Tag {
        at: usize,
        tag: &'t str,
    },
    /// No tag before `at`; from there on it depends on what follows (nothing may be left).
    Undecided {
        at: usize,
    },
}

/// The first of `tags` in `text`. `last` is a token that counts only at the end of the whole text, so it stays
/// undecided while nothing follows it. Every tag begins with '<' and holds no second one.
fn next_tag<'t>(text: &str, tags: &[&'t str], last: Option<&str>) -> Next<'t> {
    for (at, _) in text.match_indices('<') {
        let here = &text[at..];
        if let Some(tag) = tags.iter().find(|tag| here.starts_with(**tag)) {
            return Next::Tag { at, tag };
        }
        if tags.iter().chain(&last).any(|tag| tag.starts_with(here)) {
            return Next::Undecided { at };
        }
    }
    Next::Undecided { at: text.len() }
}

enum Header<'a> {
    Whole { name: &'a str, kind: ValueKind, bytes: usize },
    Malformed,
    Undecided,
}

/// Reads the rest of an opening tag: ` name="…"` and, for a parameter, ` string="true|false"`, up to the first
/// '>' that makes it whole. Names may hold any character, quotes and '>' included.
fn parse_header(text: &str, parameter: bool) -> Header<'_> {
    for (end, _) in text.match_indices('>') {
        let header = &text[..end];
        if end >= HEADER_BYTES_MAX || header.contains(DSML) {
            return Header::Malformed;
        }
        if let Some((name, kind)) = attributes(header, parameter) {
            return Header::Whole { name, kind, bytes: end + 1 };
        }
    }
    if text.len() >= HEADER_BYTES_MAX || text.contains(DSML) { Header::Malformed } else { Header::Undecided }
}

fn attributes(header: &str, parameter: bool) -> Option<(&str, ValueKind)> {
    if !header.starts_with(char::is_whitespace) {
        return None;
    }
    let quoted = header.trim().strip_prefix("name=\"")?;
    if !parameter {
        return quoted.strip_suffix('"').map(|name| (name, ValueKind::String));
    }
    for (attribute, kind) in [("string=\"true\"", ValueKind::String), ("string=\"false\"", ValueKind::Json)] {
        if let Some(before) = quoted.strip_suffix(attribute)
            && before.ends_with(char::is_whitespace)
            && let Some(name) = before.trim_end().strip_suffix('"')
        {
            return Some((name, kind));
        }
    }
    let name = quoted.strip_suffix('"').filter(|name| !name.contains('"'))?;
    Some((name, ValueKind::Json))
}

#[cfg(test)]
mod tests {
    use super::super::parse::{Completion, parse};
    use super::*;

    fn events(deltas: &[&str], thinking: bool) -> Vec<Event> {
        let mut parser = StreamParser::new(thinking);
        let mut events: Vec<Event> = deltas.iter().flat_map(|delta| parser.push(delta)).collect();
        events.extend(parser.finish());
        events
    }

    #[test]
    fn half_tags_are_held_back() {
        let mut parser = StreamParser::new(true);
        assert_eq!(parser.push("a <"), [Event::Reasoning("a ".to_owned())]);
        assert_eq!(parser.push("/thi"), []);
        assert_eq!(parser.push("s"), [Event::Reasoning("</this".to_owned())]);
        assert_eq!(parser.push("\n\n"), []);
        assert_eq!(parser.push("</think"), []);
        assert_eq!(parser.push(">b\n"), [Event::Reasoning("\n\n".to_owned()), Event::Content("b".to_owned())]);
        assert_eq!(parser.push("\n"), []);
        assert_eq!(parser.push("\n"), [Event::Content("\n".to_owned())]);
        assert_eq!(parser.push("<｜DSML｜tool_calls"), []);
        assert_eq!(parser.push(">"), []);
        assert!(!parser.is_complete());
    }

    #[test]
    fn string_arguments_stream_and_json_arguments_wait() {
        let mut parser = StreamParser::new(false);
        let arguments = |delta: &str| Event::ToolCallArguments { index: 0, delta: delta.to_owned() };
        parser.push("<｜DSML｜tool_calls>\n");
        let start = Event::ToolCallStart { index: 0, name: "f".to_owned() };
        assert_eq!(parser.push("<｜DSML｜invoke name=\"f\">"), [start]);
        let head = parser.push("\n<｜DSML｜parameter name=\"s\" string=\"true\">a\n\"");
        assert_eq!(head, [arguments("{\"s\": \"a\\n\\\"")]);
        assert_eq!(parser.push("b</"), [arguments("b")]);
        assert_eq!(parser.push("｜DSML｜parameter>"), [arguments("\"")]);
        assert_eq!(parser.push("\n<｜DSML｜parameter name=\"n\" string=\"false\">[1,"), [arguments(", \"n\": ")]);
        assert_eq!(parser.push(" 2]"), []);
        assert_eq!(parser.push("</｜DSML｜parameter>"), [arguments("[1, 2]")]);
        assert_eq!(parser.push("\n</｜DSML｜invoke>"), [arguments("}"), Event::ToolCallEnd { index: 0 }]);
        assert_eq!(parser.push("\n</｜DSML｜tool_calls> trailing<｜end▁of▁sentence｜>"), []);
        assert_eq!(parser.finish(), []);
        assert!(parser.is_complete());
    }

    #[test]
    fn a_cut_call_has_no_end() {
        let deltas = [
            "x\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"s\" string=\"true\">unfin</｜DSML｜para",
        ];
        let found = events(&deltas, false);
        assert!(matches!(found.last(), Some(Event::ToolCallArguments { delta, .. }) if delta == "{\"s\": \"unfin"));
        assert!(!found.iter().any(|e| matches!(e, Event::ToolCallEnd { .. })));
    }

    #[test]
    fn a_cut_block_tag_is_not_content() {
        for cut in ["<｜DSML｜", "<｜DSML｜tool", "\n\n<｜DSML｜tool_calls"] {
            let found = parse(&format!("x{cut}"), false);
            assert_eq!(found, Completion { content: "x".to_owned(), complete: false, ..Completion::default() });
        }
        // A lone '<' may well be text.
        assert_eq!(parse("x <", false).content, "x <");
    }

    #[test]
    fn held_text_stays_small() {
        let mut parser = StreamParser::new(true);
        for _ in 0..10_000 {
            parser.push("\n\n\n<｜DSML｜tool ");
            assert!(parser.held.len() < 64);
        }
    }
}
