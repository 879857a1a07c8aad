//! The OpenAI API's route of items.

use super::*;

const WIDE: Limits = Limits { context: 4096, ..LIMITS };

/// Without reasoning.
fn asking(input: Value) -> Value {
    json!({"input": input, "reasoning": {"effort": "none"}})
}

fn wide(text: &'static str) -> Server {
    Server::start_with(config(), WIDE, move |tokenizer, _| says(tokenizer, text))
}

fn tools() -> Value {
    json!([{"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": false}])
}

fn prompt(server: &Server) -> String {
    let seen = server.engine.seen();
    server.tokenizer.decode(&seen.last().expect("a job").prompt, false)
}

/// `item` after its id was seen to begin with `prefix`.
fn without_id(item: &Value, prefix: &str) -> Value {
    let mut item = item.clone();
    let id = item.as_object_mut().and_then(|item| item.remove("id")).expect("an id");
    assert!(id.as_str().and_then(|id| id.strip_prefix(prefix)).is_some_and(|hex| hex.len() == 16), "{id}");
    item
}

#[test]
fn a_whole_response() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = vec![Act::Cached(3)];
        acts.extend(says(tokenizer, "Think.</think>Hello"));
        acts
    });
    let fields = json!({
        "model": "nano", "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 50, "temperature": 0.3,
        "top_p": 0.5, "store": true, "metadata": {"k": "v"}, "include": ["reasoning.encrypted_content"],
        "text": {"format": {"type": "text"}, "verbosity": "low"}, "stream": false, "truncation": "auto",
    });
    let reply = server.post(RESPONSES, fields).json();
    without_id(&reply, "resp_");
    for (field, value) in [
        ("object", json!("response")),
        ("status", json!("completed")),
        ("model", json!("org/nano")),
        ("error", Value::Null),
        ("incomplete_details", Value::Null),
        ("instructions", json!("Be brief.")),
        ("max_output_tokens", json!(50)),
        ("temperature", json!(0.3)),
        ("top_p", json!(0.5)),
        ("metadata", json!({"k": "v"})),
        ("parallel_tool_calls", json!(true)),
        ("tool_choice", json!("auto")),
        ("tools", json!([])),
        ("store", json!(false)),
    ] {
        assert_eq!(reply.get(field), Some(&value), "{field}");
    }
    assert!(reply["created_at"].as_u64().is_some_and(|seconds| seconds > 1_600_000_000));
    let thought = json!({"type": "reasoning", "status": "completed", "summary": [],
        "content": [{"type": "reasoning_text", "text": "Think."}]});
    let said = json!({"type": "message", "role": "assistant", "status": "completed",
        "content": [{"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}]});
    assert_eq!(without_id(&reply["output"][0], "rs_"), thought);
    assert_eq!(without_id(&reply["output"][1], "msg_"), said);
    assert_eq!(reply["output"].as_array().map(Vec::len), Some(2));
    let reasoning = server.tokenizer.encode_plain("Think.</think>", true).expect("encodes").len();
    let tokens = server.tokenizer.encode_plain("Think.</think>Hello", true).expect("encodes").len() + 1;
    let seen = server.engine.seen().remove(0);
    let usage = json!({
        "input_tokens": seen.prompt.len(),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": tokens,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": seen.prompt.len() + tokens,
    });
    assert_eq!(reply["usage"], usage);
    let options = seen.options;
    assert_eq!((options.tokens_max, options.sampling.temperature, options.sampling.top_p), (50, 0.3, 0.5));
    assert_eq!(prompt(&server), "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi<｜Assistant｜><think>");
}

#[test]
fn a_response_that_is_cut_off_says_so() {
    let server = Server::start(|tokenizer, seen| {
        let at = CALL.find(if seen.options.priority == 0 { "[1, 2]" } else { "ok." }).expect("there");
        [tokens(tokenizer, &CALL[..at]), vec![Act::Length]].concat()
    });
    let whole = server.post(RESPONSES, json!({"input": "q"})).json();
    assert_eq!(
        (&whole["status"], &whole["incomplete_details"]["reason"]),
        (&json!("incomplete"), &json!("max_output_tokens"))
    );
    // Half a call is left out; a text shows how far it came.
    let kinds: Vec<&Value> = whole["output"].as_array().expect("items").iter().map(|item| &item["type"]).collect();
    assert_eq!(kinds, ["reasoning", "message"]);
    let half = server.post(RESPONSES, json!({"input": "q", "priority": 1})).json();
    assert_eq!(
        (&half["output"][0]["status"], &half["output"][1]["status"]),
        (&json!("completed"), &json!("incomplete"))
    );
    let events = server.post(RESPONSES, json!({"input": "q", "stream": true})).named_events();
    let [.., done, last] = events.as_slice() else { panic!("no events") };
    assert_eq!((&done["item"]["type"], &done["item"]["status"]), (&json!("function_call"), &json!("incomplete")));
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["output"].as_array().map(Vec::len), Some(2));
}

#[test]
fn calls_go_out_and_back() {
    let server = wide(CALL);
    let question = json!({"type": "message", "role": "user", "content": [{"type": "input_text", "text": "q"}]});
    let request = json!({"input": [question], "tools": tools(), "tool_choice": "auto"});
    let reply = server.post(RESPONSES, request.clone()).json();
    let output = reply["output"].as_array().expect("items").clone();
    let call = &output[2];
    let id = |i: usize| output[i]["call_id"].clone();
    assert!(id(2).as_str().is_some_and(|id| id.starts_with("call_")) && id(2) != id(3));
    let expected = json!({"type": "function_call", "status": "completed", "call_id": id(2), "name": "look",
        "arguments": "{\"at\": \"a \\\"b\\\"\", \"n\": [1, 2]}"});
    assert_eq!((without_id(call, "fc_"), output.len()), (expected, 4));
    assert_eq!((&output[3]["name"], &output[3]["arguments"]), (&json!("wait"), &json!("{}")));
    assert_eq!((&reply["status"], &reply["tools"]), (&json!("completed"), &tools()));
    let first = prompt(&server);
    assert!(first.contains("{\"name\": \"look\", \"parameters\": {\"type\": \"object\"}}"), "{first}");

    let mut items = vec![question];
    items.extend(output.clone());
    items.extend([
        json!({"type": "function_call_output", "call_id": id(3), "output": [{"type": "input_text", "text": "late"},
            {"type": "input_image", "image_url": "u"}]}),
        json!({"type": "function_call_output", "call_id": id(2), "output": "red"}),
        json!({"role": "user", "content": "Go on."}),
    ]);
    assert_eq!(server.post(RESPONSES, with(request, json!({"input": items}))).status, 200);
    let results =
        "<tool_result>red</tool_result>\n\n<tool_result>late\n\n[Unsupported input_image]</tool_result>\n\nGo on.";
    let expected = format!("{first}{CALL}<｜end▁of▁sentence｜><｜User｜>{results}<｜Assistant｜><think>");
    assert_eq!(prompt(&server), expected);

    let none = with(asking(json!("q")), json!({"tools": tools(), "tool_choice": "none"}));
    assert_eq!(server.post(RESPONSES, none).status, 200);
    assert!(!prompt(&server).contains("look"));
    let one = json!({"input": "q", "tools": tools(), "parallel_tool_calls": false});
    assert_eq!(server.post(RESPONSES, one).json()["output"].as_array().map(Vec::len), Some(3));
}

#[test]
fn items_are_put_as_the_model_knows_them() {
    let server = wide("x");
    let items = json!([
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}], "encrypted_content": "e"},
        {"type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
            "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"type": "input_text", "text": "d"}]},
        {"role": "developer", "content": "Now in French."},
    ]);
    assert_eq!(server.post(RESPONSES, with(asking(items), json!({"instructions": "Be brief."}))).status, 200);
    let head = "<｜begin▁of▁sentence｜>Be brief.\n\nBe kind.<｜User｜>a<｜Assistant｜></think>b<｜end▁of▁sentence｜>";
    assert_eq!(prompt(&server), format!("{head}<｜User｜>c\n\nd\n\nNow in French.<｜Assistant｜></think>"));
    let hard = json!({"input": "q", "reasoning": {"effort": "xhigh", "summary": "auto"}});
    let reply = server.post(RESPONSES, hard).json();
    assert_eq!(reply["reasoning"], json!({"effort": "xhigh", "summary": null}));
    assert!(prompt(&server).contains("Reasoning Effort: Beyond maximum"));
}

#[test]
fn events_come_in_order() {
    let server = Server::saying(CALL);
    let events = server.post(RESPONSES, json!({"input": "q", "stream": true})).named_events();
    let numbers: Vec<u64> = events.iter().filter_map(|event| event["sequence_number"].as_u64()).collect();
    assert_eq!(numbers, (0..events.len() as u64).collect::<Vec<u64>>());
    let kind = |event: &Value| event["type"].as_str().expect("a type").to_owned();
    // Deltas in a row once: how many there are is the tokenizer's.
    let mut kinds: Vec<String> = events.iter().map(kind).collect();
    kinds.dedup();
    let item = |part: Option<&str>, delta: &str| {
        let mut kinds = vec!["response.output_item.added".to_owned()];
        kinds.extend(part.map(|part| format!("{part}.added")));
        kinds.extend([format!("{delta}.delta"), format!("{delta}.done")]);
        kinds.extend(part.map(|part| format!("{part}.done")));
        kinds.push("response.output_item.done".to_owned());
        kinds
    };
    let part = Some("response.content_part");
    let call = item(None, "response.function_call_arguments");
    let expected = [
        vec!["response.created".to_owned(), "response.in_progress".to_owned()],
        item(part, "response.reasoning_text"),
        item(part, "response.output_text"),
        call.clone(),
        call,
        vec!["response.completed".to_owned()],
    ];
    assert_eq!(kinds, expected.concat());

    let whole = &events.last().expect("an end")["response"];
    assert_eq!(
        (&events[0]["response"]["status"], &events[0]["response"]["output"]),
        (&json!("in_progress"), &json!([]))
    );
    assert_eq!(events[0]["response"]["id"], whole["id"]);
    assert_eq!(whole["status"], "completed");
    let tokens = server.tokenizer.encode_plain(CALL, true).expect("encodes").len() + 1;
    assert_eq!(whole["usage"]["output_tokens"], tokens);
    let texts = ["Hm.", "I look.", "{\"at\": \"a \\\"b\\\"\", \"n\": [1, 2]}", "{}"];
    for (index, text) in texts.iter().enumerate() {
        let own: Vec<&Value> = events.iter().filter(|event| event["output_index"] == index).collect();
        let (first, last) = (own[0], own[own.len() - 1]);
        assert_eq!((&first["item"]["status"], &last["item"]["status"]), (&json!("in_progress"), &json!("completed")));
        assert_eq!((&first["item"]["id"], &last["item"]), (&last["item"]["id"], &whole["output"][index]));
        let inner = &own[1..own.len() - 1];
        assert!(inner.iter().all(|event| event["item_id"] == last["item"]["id"]));
        let delta = |event: &&Value| event["delta"].as_str().map(str::to_owned);
        assert_eq!(inner.iter().filter_map(delta).collect::<String>(), *text);
        let done = inner.iter().find(|event| event.get("text").or(event.get("arguments")).is_some()).expect("done");
        assert_eq!(done.get("text").or(done.get("arguments")), Some(&json!(text)));
    }
    let texts = events.iter().filter(|event| kind(event).starts_with("response.output_text."));
    assert!(texts.clone().count() > 1 && texts.into_iter().all(|event| event["logprobs"] == json!([])));
}

#[test]
fn a_stream_that_fails_says_so() {
    let server = Server::start(|tokenizer, seen| match seen.options.priority {
        0 => [tokens(tokenizer, "begun"), vec![Act::Fail("lost a rank")]].concat(),
        _ => vec![Act::Fail("no memory")],
    });
    let ask = |way: i32| server.post(RESPONSES, with(asking(json!("q")), json!({"stream": true, "priority": way})));
    let last = ask(0).named_events().pop().expect("an end");
    assert_eq!((&last["type"], &last["response"]["status"]), (&json!("response.failed"), &json!("failed")));
    let failed = json!({"code": "server_error", "message": "the answer failed: lost a rank"});
    assert_eq!(last["response"]["error"], failed);
    assert_eq!(last["response"]["output"][0]["content"][0]["text"], "begun");
    ask(1).error(500);
    server.post(RESPONSES, asking(json!("q"))).error(500);
}

#[test]
fn what_is_wrong_is_named() {
    let server = Server::saying("x");
    for (field, value, param) in [
        ("previous_response_id", json!("resp_1"), "previous_response_id"),
        ("conversation", json!("conv_1"), "conversation"),
        ("prompt", json!({"id": "p"}), "prompt"),
        ("background", json!(true), "background"),
        ("store", json!("no"), "store"),
        ("text", json!({"format": {"type": "json_schema"}}), "text.format"),
        ("text", json!({"format": {"type": "xml"}}), "text.format.type"),
        ("input", Value::Null, "input"),
        ("input", json!([]), "input"),
        ("input", json!(5), "input"),
        ("input", json!([{"role": "bot", "content": "a"}]), "input[0].role"),
        ("input", json!([{"role": "user", "content": [{"type": "input_image"}]}]), "input[0].content[0]"),
        ("input", json!([{"type": "item_reference", "id": "a"}]), "input[0].type"),
        ("input", json!([{"type": "function_call", "call_id": "a"}]), "input[0].name"),
        ("input", json!([{"type": "function_call_output", "output": "a"}]), "input[0].call_id"),
        ("instructions", json!([]), "instructions"),
        ("tools", json!([{"type": "web_search"}]), "tools[0].type"),
        ("tools", json!([{"type": "function"}]), "tools[0].name"),
        ("tool_choice", json!("required"), "tool_choice"),
        ("tool_choice", json!({"type": "function", "name": "f"}), "tool_choice"),
        ("max_output_tokens", json!(0), "max_output_tokens"),
        ("reasoning", json!({"effort": "lots"}), "reasoning.effort"),
        ("temperature", json!(3), "temperature"),
    ] {
        let error = server.post(RESPONSES, with(asking(json!("q")), json!({field: value}))).error(400);
        assert_eq!(error["param"], param, "{value}: {error}");
        assert!(error["message"].as_str().is_some_and(|message| message.starts_with(param)), "{error}");
    }
    assert!(server.engine.seen().is_empty());
    let long = server.post(RESPONSES, asking(json!("word ".repeat(2000)))).error(400);
    assert_eq!((&long["code"], &long["param"]), (&json!("context_length_exceeded"), &json!("input")));
    server.post(RESPONSES, with(asking(json!("q")), json!({"model": "gpt-4"}))).error(404);
}
