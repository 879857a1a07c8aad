//! The conversations that the trained checkpoint must reproduce, token for token.

use std::path::Path;

use serde_json::{Map, Value};

use crate::DATA;

const EOS: &str = "<｜end▁of▁sentence｜>";
const THINK_CLOSE: &str = "</think>";

/// One conversation and the answer to it.
pub struct Case {
    /// `add`, `tool`, …
    pub kind: String,
    /// Messages and, where there are any, tools: what `generate --messages` reads.
    pub input: Value,
    /// Whether reasoning is asked for.
    pub thinking: bool,
    /// The encoded prompt.
    pub prompt: String,
    /// Its ids.
    pub prompt_tokens: Vec<u32>,
    /// The answer's ids, the end token included.
    pub completion_tokens: Vec<u32>,
    /// The answer as text, markup and end token included.
    pub completion: String,
}

/// All conversations.
pub fn cases() -> Vec<Case> {
    let text = std::fs::read_to_string(Path::new(DATA).join("nano/conversations.json")).expect("conversations.json");
    let value: Value = serde_json::from_str(&text).expect("JSON");
    value["cases"].as_array().expect("a list").iter().map(Case::read).collect()
}

impl Case {
    fn read(value: &Value) -> Case {
        let text = |key: &str| value[key].as_str().unwrap_or_else(|| panic!("{key} is text")).to_owned();
        let ids = |key: &str| {
            let list = value[key].as_array().unwrap_or_else(|| panic!("{key} is a list"));
            list.iter().map(|id| id.as_u64().expect("an id") as u32).collect::<Vec<u32>>()
        };
        let mut input = Map::from_iter([("messages".to_owned(), value["messages"].clone())]);
        if let Some(tools) = value.get("tools") {
            input.insert("tools".to_owned(), tools.clone());
        }
        Case {
            kind: text("kind"),
            input: Value::Object(input),
            thinking: value["thinking"].as_bool().expect("a flag"),
            prompt: text("prompt"),
            prompt_tokens: ids("prompt_tokens"),
            completion_tokens: ids("completion_tokens"),
            completion: text("completion"),
        }
    }

    /// The answer as text, without the end token.
    pub fn text(&self) -> &str {
        self.completion.strip_suffix(EOS).unwrap_or_else(|| panic!("{} does not end", self.completion))
    }

    /// Reasoning and content of the answer.
    pub fn parts(&self) -> (&str, &str) {
        let (reasoning, rest) = match self.thinking {
            true => self.text().split_once(THINK_CLOSE).expect("reasoning ends"),
            false => ("", self.text()),
        };
        (reasoning, rest.split_once("\n\n<｜DSML｜tool_calls>").map_or(rest, |(content, _)| content))
    }

    /// The calls of the answer, read off its markup: name and arguments.
    pub fn calls(&self) -> Vec<(String, Value)> {
        let blocks = self.completion.split("<｜DSML｜invoke name=\"").skip(1);
        let call = |block: &str| {
            let (name, rest) = block.split_once("\">").expect("a name");
            let parameters = rest.split("<｜DSML｜parameter name=\"").skip(1).map(|parameter| {
                let (key, rest) = parameter.split_once("\" string=\"").expect("a key");
                let (is_text, rest) = rest.split_once("\">").expect("a kind");
                let (value, _) = rest.split_once("</｜DSML｜parameter>").expect("a value");
                let value = match is_text {
                    "true" => Value::from(value),
                    _ => serde_json::from_str(value).unwrap_or_else(|e| panic!("{value}: {e}")),
                };
                (key.to_owned(), value)
            });
            (name.to_owned(), Value::Object(parameters.collect()))
        };
        blocks.map(call).collect()
    }
}
