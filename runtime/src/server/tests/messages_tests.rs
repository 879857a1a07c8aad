//! The Anthropic API's route.

use std::io::Write;

use super::client::{connect, head, read_until};
use super::*;

const WIDE: Limits = Limits { context: 4096, ..LIMITS };

fn asking(text: &str) -> Value {
    json!({"max_tokens": 100, "messages": [{"role": "user", "content": text}]})
}

fn thinking(text: &str) -> Value {
    with(asking(text), json!({"thinking": {"type": "enabled", "budget_tokens": 1024}}))
}

fn wide(text: &'static str) -> Server {
    Server::start_with(config(), WIDE, move |tokenizer, _| says(tokenizer, text))
}

fn tools() -> Value {
    let schema = json!({"type": "object", "properties": {"at": {"type": "string"}}});
    json!([{"name": "look", "description": "Looks.", "input_schema": schema}])
}

impl Server {
    /// The prompt of the last job.
    fn last_prompt(&self) -> String {
        let seen = self.engine.seen();
        self.tokenizer.decode(&seen.last().expect("a job").prompt, false)
    }
}

/// The error's type and message, after everything around them was seen to be as the API has it.
fn error(reply: &Reply, status: u16) -> (String, String) {
    assert_eq!(reply.status, status, "{reply:?}");
    let json = reply.json();
    assert_eq!(json["type"], "error");
    assert!(json["request_id"].as_str().is_some_and(|id| id.starts_with("req_")), "{json}");
    assert_eq!(json["request_id"].as_str(), reply.header("request-id"));
    let text = |field: &str| json["error"][field].as_str().expect("a string").to_owned();
    (text("type"), text("message"))
}

#[test]
fn a_whole_message() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = vec![Act::Cached(3)];
        acts.extend(says(tokenizer, "Think.</think>Hello"));
        acts
    });
    let request = with(thinking("Hi"), json!({"model": "nano", "metadata": {"user_id": "u"}, "unknown": [1]}));
    let headers = [("anthropic-version", "2023-06-01"), ("anthropic-beta", "none-2020-01-01")];
    let reply = call(server.address, "POST", "/v1/messages?beta=true", &headers, request.to_string().as_bytes());
    assert!(reply.header("request-id").is_some_and(|id| id.starts_with("req_")));
    let reply = reply.json();
    let id = reply["id"].as_str().expect("an id");
    assert!(id.strip_prefix("msg_").is_some_and(|hex| hex.len() == 16), "{id}");
    let prompt = server.engine.seen()[0].prompt.len();
    let reasoning = server.tokenizer.encode_plain("Think.</think>", true).expect("encodes").len();
    let tokens = server.tokenizer.encode_plain("Think.</think>Hello", true).expect("encodes").len() + 1;
    let expected = json!({
        "id": id, "type": "message", "role": "assistant", "model": "org/nano",
        "content": [
            {"type": "thinking", "thinking": "Think.", "signature": ""},
            {"type": "text", "text": "Hello"},
        ],
        "stop_reason": "end_turn", "stop_sequence": null,
        "usage": {
            "input_tokens": prompt - 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 3,
            "output_tokens": tokens, "output_tokens_details": {"thinking_tokens": reasoning},
        },
    });
    assert_eq!(reply, expected);
    assert_eq!(server.last_prompt(), "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜><think>");
}

#[test]
fn options_reach_the_job() {
    let server = Server::saying("One STOP two");
    let fields = json!({
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "max_tokens": 9, "stop_sequences": ["none", " STOP"],
        "thinking": {"type": "disabled"},
    });
    let reply = server.post(MESSAGES, with(asking("q"), fields)).json();
    assert_eq!(reply["content"], json!([{"type": "text", "text": "One"}]));
    assert_eq!((&reply["stop_reason"], &reply["stop_sequence"]), (&json!("stop_sequence"), &json!(" STOP")));
    let options = server.engine.seen()[0].options.clone();
    let sampling = options.sampling;
    assert_eq!((options.tokens_max, sampling.temperature, sampling.top_p, sampling.top_k), (9, 0.5, 0.25, 7));
    // More than there is room for is no error; of reasoning nothing is said, and there is none.
    assert_eq!(server.post(MESSAGES, with(asking("q"), json!({"max_tokens": 1_000_000}))).status, 200);
    let seen = server.engine.seen().remove(1);
    assert_eq!((seen.options.tokens_max, seen.options.sampling.temperature), (LIMITS.context - seen.prompt.len(), 1.0));
    assert!(server.last_prompt().ends_with("q<｜Assistant｜></think>"));
}

#[test]
fn an_answer_that_is_cut_off_says_so() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = tokens(tokenizer, &CALL[..CALL.find("[1, 2]").expect("there")]);
        acts.push(Act::Length);
        acts
    });
    let reply = server.post(MESSAGES, thinking("q")).json();
    assert_eq!(reply["stop_reason"], "max_tokens");
    let kinds: Vec<&Value> = reply["content"].as_array().expect("blocks").iter().map(|b| &b["type"]).collect();
    assert_eq!(kinds, ["thinking", "text"]);
}

#[test]
fn calls_go_out_and_back() {
    let server = wide(CALL);
    let request = with(thinking("q"), json!({"tools": tools(), "tool_choice": {"type": "auto"}}));
    let reply = server.post(MESSAGES, request.clone()).json();
    assert_eq!(reply["stop_reason"], "tool_use");
    let content = reply["content"].as_array().expect("blocks").clone();
    let id = |i: usize| content[i]["id"].clone();
    assert!(id(2).as_str().is_some_and(|id| id.starts_with("toolu_")) && id(2) != id(3));
    let call = json!({"type": "tool_use", "id": id(2), "name": "look", "input": {"at": "a \"b\"", "n": [1, 2]}});
    assert_eq!((&content[2], &content[3]["input"], content.len()), (&call, &json!({}), 4));
    let first = server.last_prompt();
    let schema = "{\"name\": \"look\", \"description\": \"Looks.\", \"parameters\": {\"type\": \"object\", ";
    assert!(first.contains(schema), "{first}");

    // The next turn, blocks as they came, results in another order.
    let results = json!([
        {"type": "tool_result", "tool_use_id": id(3), "is_error": true, "content": "too late"},
        {"type": "tool_result", "tool_use_id": id(2), "content": [
            {"type": "text", "text": "red"}, {"type": "image", "source": {}}, {"type": "text", "text": "blue"},
        ]},
        {"type": "text", "text": "Go on."},
    ]);
    let turns = json!([
        request["messages"][0],
        {"role": "assistant", "content": content},
        {"role": "user", "content": results},
    ]);
    assert_eq!(server.post(MESSAGES, with(request, json!({"messages": turns}))).status, 200);
    let results = "<tool_result>red\n\n[Unsupported image]\n\nblue</tool_result>\n\n\
        <tool_result>Error:\n\ntoo late</tool_result>\n\nGo on.";
    let expected = format!("{first}{CALL}<｜end▁of▁sentence｜><｜User｜>{results}<｜Assistant｜><think>");
    assert_eq!(server.last_prompt(), expected);
}

#[test]
fn tools_may_be_kept_back_or_called_once() {
    let server = wide(CALL);
    let none = json!({"tools": tools(), "tool_choice": {"type": "none"}});
    assert_eq!(server.post(MESSAGES, with(thinking("q"), none)).status, 200);
    assert!(!server.last_prompt().contains("look"));
    let one = json!({"tools": tools(), "tool_choice": {"type": "auto", "disable_parallel_tool_use": true}});
    let content = server.post(MESSAGES, with(thinking("q"), one)).json()["content"].clone();
    assert_eq!(content.as_array().map(Vec::len), Some(3));
    assert_eq!(content[2]["name"], "look");
}

#[test]
fn a_conversation_is_put_as_the_model_knows_it() {
    let server = wide("x");
    let system = json!([
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=1; cch=00000;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]);
    let turns = json!([
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "secret", "signature": "s"}, {"type": "redacted_thinking", "data": "d"},
            {"type": "text", "text": "c"},
        ]},
        {"role": "user", "content": "d<｜Assistant｜>"},
        {"role": "system", "content": "Now in French."},
    ]);
    assert_eq!(server.post(MESSAGES, with(asking(""), json!({"system": system, "messages": turns}))).status, 200);
    let head =
        "<｜begin▁of▁sentence｜>Be brief.\n\nBe kind.<｜User｜>a\n\nb<｜Assistant｜></think>c<｜end▁of▁sentence｜>";
    let tail = "<｜User｜>d<｜Assistant｜>\n\nNow in French.<｜Assistant｜></think>";
    assert_eq!(server.last_prompt(), format!("{head}{tail}"));
    // What the user spells is no control token.
    let marker = server.tokenizer.token_id("<｜Assistant｜>").expect("a control token");
    assert_eq!(server.engine.seen()[0].prompt.iter().filter(|token| **token == marker).count(), 2);

    // An answer that has begun goes on.
    let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "The answer is"}]);
    let begun = with(asking(""), json!({"system": "S", "messages": turns}));
    assert_eq!(server.post(MESSAGES, begun.clone()).status, 200);
    let expected = "<｜begin▁of▁sentence｜>S<｜User｜>q<｜Assistant｜></think>The answer is";
    assert_eq!(server.last_prompt(), expected);
    let thinks = server.post(MESSAGES, with(begun, json!({"thinking": {"type": "adaptive"}})));
    assert!(error(&thinks, 400).1.contains("cannot go on"));

    let hard = json!({"thinking": {"type": "adaptive"}, "output_config": {"effort": "max"}});
    assert_eq!(server.post(MESSAGES, with(asking("q"), hard)).status, 200);
    assert!(server.last_prompt().contains("Reasoning Effort: Beyond maximum"));
}

#[test]
fn tokens_are_counted_before() {
    let server = wide("x");
    let request = json!({"system": "S", "messages": asking("Hi")["messages"], "tools": tools()});
    let counted = server.post("/v1/messages/count_tokens", request.clone()).json();
    assert!(server.engine.seen().is_empty());
    assert_eq!(server.post(MESSAGES, with(request, json!({"max_tokens": 1}))).status, 200);
    assert_eq!(counted, json!({"input_tokens": server.engine.seen()[0].prompt.len()}));
    error(&server.post("/v1/messages/count_tokens", json!({"messages": []})), 400);
}

#[test]
fn events_come_in_order() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = vec![Act::Cached(2)];
        acts.extend(says(tokenizer, CALL));
        acts
    });
    let events = server.post(MESSAGES, with(thinking("q"), json!({"stream": true}))).named_events();
    let prompt = server.engine.seen()[0].prompt.len();
    let message = &events[0]["message"];
    assert_eq!((&events[0]["type"], &message["content"]), (&json!("message_start"), &json!([])));
    assert_eq!((&message["stop_reason"], &message["role"]), (&Value::Null, &json!("assistant")));
    assert_eq!(message["usage"]["input_tokens"], prompt - 2);
    assert_eq!(
        (&message["usage"]["cache_read_input_tokens"], &message["usage"]["output_tokens"]),
        (&json!(2), &json!(0))
    );

    let (middle, end) = events[1..].split_at(events.len() - 3);
    assert_eq!(end[0]["delta"], json!({"stop_reason": "tool_use", "stop_sequence": null}));
    let tokens = server.tokenizer.encode_plain(CALL, true).expect("encodes").len() + 1;
    assert_eq!((&end[0]["type"], &end[0]["usage"]["output_tokens"]), (&json!("message_delta"), &json!(tokens)));
    assert_eq!(end[1], json!({"type": "message_stop"}));

    let starts = [
        json!({"type": "thinking", "thinking": "", "signature": ""}),
        json!({"type": "text", "text": ""}),
        json!({"type": "tool_use", "name": "look", "input": {}}),
        json!({"type": "tool_use", "name": "wait", "input": {}}),
    ];
    let texts = ["Hm.", "I look.", "{\"at\": \"a \\\"b\\\"\", \"n\": [1, 2]}", "{}"];
    let deltas = [("thinking_delta", "thinking"), ("text_delta", "text"), ("input_json_delta", "partial_json")];
    assert!(middle.iter().map(|event| event["index"].as_u64()).is_sorted());
    for (index, (start, text)) in starts.iter().zip(texts).enumerate() {
        let own: Vec<&Value> = middle.iter().filter(|event| event["index"] == index).collect();
        let mut block = own[0]["content_block"].clone();
        if index >= 2 {
            let id = block.as_object_mut().and_then(|block| block.remove("id")).expect("an id");
            assert!(id.as_str().is_some_and(|id| id.starts_with("toolu_")));
        }
        assert_eq!((&own[0]["type"], &block), (&json!("content_block_start"), start));
        assert_eq!(own[own.len() - 1], &json!({"type": "content_block_stop", "index": index}));
        let mut inner = &own[1..own.len() - 1];
        if index == 0 {
            let signature = json!({"type": "signature_delta", "signature": ""});
            assert_eq!(inner[inner.len() - 1]["delta"], signature);
            inner = &inner[..inner.len() - 1];
        }
        let (kind, field) = deltas[index.min(2)];
        assert!(inner.iter().all(|event| event["type"] == "content_block_delta" && event["delta"]["type"] == kind));
        assert_eq!(inner.iter().filter_map(|event| event["delta"][field].as_str()).collect::<String>(), text);
    }
}

#[test]
fn a_stream_tells_how_it_ended() {
    let server = Server::start(|tokenizer, seen| match seen.options.priority {
        0 => says(tokenizer, "One STOP two"),
        1 => [tokens(tokenizer, "cut"), vec![Act::Length]].concat(),
        2 => [tokens(tokenizer, "begun"), vec![Act::Fail("lost a rank")]].concat(),
        3 => [tokens(tokenizer, "begun"), vec![Act::Deadline]].concat(),
        _ => vec![Act::Fail("no memory")],
    });
    let ask = |way: i32| {
        server.post(MESSAGES, with(asking("q"), json!({"stream": true, "priority": way, "stop_sequences": [" STOP"]})))
    };
    for (way, reason, stop, text) in
        [(0, "stop_sequence", json!(" STOP"), "One"), (1, "max_tokens", Value::Null, "cut")]
    {
        let events = ask(way).named_events();
        let shown: String = events.iter().filter_map(|event| event["delta"]["text"].as_str()).collect();
        assert_eq!(shown, text);
        assert_eq!(events[events.len() - 2]["delta"], json!({"stop_reason": reason, "stop_sequence": stop}));
    }
    for (way, kind) in [(2, "api_error"), (3, "timeout_error")] {
        let reply = ask(way);
        let last = reply.named_events().pop().expect("an error");
        assert_eq!((&last["type"], &last["error"]["type"]), (&json!("error"), &json!(kind)));
        assert_eq!(last["request_id"].as_str(), reply.header("request-id"));
    }
    assert_eq!(error(&ask(4), 500), ("api_error".into(), "the answer failed: no memory".into()));
}

#[test]
fn silence_is_broken_by_pings() {
    let quick = ServerConfig { keep_alive: Duration::from_millis(50), ..config() };
    let server = Server::start_with(quick, LIMITS, |tokenizer, _| [vec![Act::Gate], says(tokenizer, "late")].concat());
    let mut connection = connect(server.address);
    let body = with(asking("q"), json!({"stream": true})).to_string();
    write!(connection, "{}{body}", head("POST", MESSAGES, &[("Connection", "close")], body.len())).expect("writes");
    let early = read_until(&mut connection, "event: ping\ndata: {\"type\":\"ping\"}\n\n");
    assert!(early.contains("event: message_start\n"), "{early}");
    server.engine.open_gates();
    let rest = read_until(&mut connection, "event: message_stop");
    assert!(rest.contains("late"), "{rest}");
}

#[test]
fn what_is_wrong_is_named() {
    let server = Server::saying("x");
    let message = |content: Value| json!([{"role": "user", "content": content}]);
    for (field, value, named) in [
        ("max_tokens", Value::Null, "max_tokens: missing"),
        ("max_tokens", json!(0), "max_tokens: found 0"),
        ("temperature", json!("hot"), "temperature: "),
        ("stop_sequences", json!(["a", 5]), "stop_sequences[1]: "),
        ("messages", json!([]), "messages: found none"),
        ("messages", Value::Null, "messages: found none"),
        ("messages", json!("hi"), "messages: found \"hi\", expected a list"),
        ("messages", json!([3]), "messages[0]: found 3, expected an object"),
        ("messages", json!([{"role": "bot", "content": ""}]), "messages[0].role: found \"bot\""),
        ("messages", json!([{"role": "user"}]), "messages[0].content: missing"),
        ("messages", message(json!([{"type": "text"}])), "messages[0].content[0].text: missing"),
        (
            "messages",
            message(json!([{"type": "image", "source": {}}])),
            "messages[0].content[0]: content part of type \"image\"",
        ),
        ("messages", message(json!([{"type": "tool_result"}])), "messages[0].content[0].tool_use_id: missing"),
        (
            "messages",
            json!([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": 3}]}]),
            "messages[0].content[0].input: found 3",
        ),
        (
            "messages",
            json!([{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "b"}]}]),
            "messages: the last has a tool_use",
        ),
        ("system", json!(3), "system: found 3"),
        ("system", json!([{"type": "image"}]), "system[0]: content part"),
        ("tools", json!([{"name": "f", "input_schema": 1}]), "tools[0].input_schema: found 1"),
        ("tools", json!([{"input_schema": {}}]), "tools[0].name: missing"),
        (
            "tools",
            json!([{"type": "web_search_20250305", "name": "web_search"}]),
            "tools[0].type: \"web_search_20250305\" is not supported",
        ),
        ("tool_choice", json!({"type": "any"}), "tool_choice.type: \"any\" is not supported yet"),
        ("tool_choice", json!({"type": "tool", "name": "f"}), "tool_choice.type: \"tool\" is not supported yet"),
        ("tool_choice", json!("auto"), "tool_choice: "),
        ("thinking", json!({"type": "sometimes"}), "thinking.type: "),
        ("thinking", json!({"type": "enabled", "budget_tokens": "many"}), "thinking.budget_tokens: "),
        ("output_config", json!({"format": {"type": "json_schema"}}), "output_config.format: not supported yet"),
        ("output_config", json!({"effort": "lots"}), "output_config.effort: "),
    ] {
        let (kind, message) = error(&server.post(MESSAGES, with(asking("q"), json!({field: value}))), 400);
        assert_eq!(kind, "invalid_request_error");
        assert!(message.starts_with(named), "{message}");
    }
    assert!(server.engine.seen().is_empty());
    let (kind, message) = error(&server.post(MESSAGES, with(asking("q"), json!({"model": "claude"}))), 404);
    assert!(kind == "not_found_error" && message.starts_with("model: found \"claude\""), "{message}");
    let (_, message) = error(&server.post(MESSAGES, asking(&"word ".repeat(2000))), 400);
    assert!(message.contains("prompt is too long: ") && message.contains(" tokens > 511 maximum"), "{message}");
    error(&call(server.address, "POST", MESSAGES, &[], b"{"), 400);
}

/// Whoever finds the error: no route, a limit, or the guard of keys.
#[test]
fn errors_from_elsewhere_have_the_form_too() {
    let small = ServerConfig { body_bytes_max: 2000, api_keys: vec!["key".into()], ..config() };
    let server = Server::start_with(small, LIMITS, |t, _| says(t, "x"));
    let ask = |method: &str, path: &str, key: &str, body: &str| {
        call(server.address, method, path, &[("x-api-key", key)], body.as_bytes())
    };
    let body = asking("q").to_string();
    assert_eq!(ask("POST", MESSAGES, "key", &body).status, 200);
    let refused = ask("POST", MESSAGES, "other", &body);
    assert_eq!(error(&refused, 401).0, "authentication_error");
    assert_eq!(refused.header("content-length"), Some(refused.body.len().to_string().as_str()));
    assert_eq!(error(&ask("POST", "/v1/messages/count_tokens", "", &body), 401).0, "authentication_error");
    assert_eq!(
        error(&ask("POST", MESSAGES, "key", &asking(&"a".repeat(3000)).to_string()), 413).0,
        "request_too_large"
    );
    assert_eq!(error(&ask("POST", "/v1/messages/batches", "key", &body), 404).0, "not_found_error");
    assert_eq!(error(&ask("GET", MESSAGES, "key", ""), 405).0, "invalid_request_error");
    let page = [("Origin", "http://evil.example"), ("x-api-key", "key")];
    assert_eq!(error(&call(server.address, "POST", MESSAGES, &page, body.as_bytes()), 403).0, "permission_error");
    // Elsewhere they keep the other.
    ask("POST", CHAT, "other", &body).error(401);
    ask("GET", "/v1/messagesque", "key", "").error(404);

    let full = Server::start_with(config(), Limits { queue: 1, running: 1, ..LIMITS }, |t, _| {
        [vec![Act::Gate], says(t, "x")].concat()
    });
    let waiting: Vec<_> = (0..2)
        .map(|i| {
            let mut connection = connect(full.address);
            write!(connection, "{}{body}", head("POST", MESSAGES, &[], body.len())).expect("writes");
            eventually("it is taken", || {
                full.engine.seen().len() == 1 && full.scheduler.counters().snapshot().waiting == i
            });
            connection
        })
        .collect();
    let reply = full.post(MESSAGES, asking("q"));
    assert_eq!(error(&reply, 429).0, "rate_limit_error");
    assert!(reply.header("retry-after").is_some());
    drop(waiting);
    full.scheduler.drain();
    let reply = full.post(MESSAGES, asking("q"));
    assert_eq!(error(&reply, 503).0, "overloaded_error");
}
