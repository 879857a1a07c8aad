//! Replies as streams.

use std::io::Write;

use super::client::{connect, head, read_until};
use super::*;

fn stream(request: Value) -> Value {
    with(request, json!({"stream": true}))
}

/// A field of all deltas, joined.
fn joined(events: &[Value], field: &str) -> String {
    events.iter().filter_map(|event| event["choices"][0]["delta"][field].as_str()).collect()
}

#[test]
fn chunks_come_in_order() {
    let server = Server::saying("Hm.</think>Good day");
    let request = json!({"messages": [{"role": "user", "content": "q"}], "return_token_ids": true});
    let reply = server.post(CHAT, with(stream(request), json!({"stream_options": {"include_usage": true}})));
    assert_eq!(reply.header("cache-control"), Some("no-cache"));
    let mut events = reply.events();
    let last = events.pop().expect("usage");
    assert_eq!(last["choices"], json!([]));
    let ids = server.tokenizer.encode_plain("Hm.</think>Good day", true).expect("encodes");
    assert_eq!(last["usage"]["completion_tokens"], ids.len() + 1);
    assert_eq!(last["metrics"]["decode_ms"], 500.0);
    assert!(events.iter().all(|event| event["usage"].is_null() && event["id"] == last["id"]));
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk" && event.get("metrics").is_none()));

    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events[0]["prompt_token_ids"], json!(server.engine.seen()[0].prompt));
    assert_eq!(joined(&events, "reasoning_content"), "Hm.");
    assert_eq!(joined(&events, "reasoning"), "Hm.");
    assert_eq!(joined(&events, "content"), "Good day");
    let end = events.last().expect("an end");
    assert_eq!((&end["choices"][0]["delta"], &end["choices"][0]["finish_reason"]), (&json!({}), &json!("stop")));
    assert!(events[..events.len() - 1].iter().all(|event| event["choices"][0]["finish_reason"].is_null()));
    let of = |event: &Value| event["choices"][0]["token_ids"].as_array().expect("ids on every chunk").clone();
    let streamed: Vec<Value> = events.iter().flat_map(of).collect();
    assert_eq!(json!(streamed), json!([ids.as_slice(), &[1]].concat()));
}

#[test]
fn text_comes_as_soon_as_it_is_there() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = tokens(tokenizer, " yellow");
        acts.push(Act::Gate);
        acts.extend(says(tokenizer, " orange"));
        acts
    });
    let mut connection = connect(server.address);
    let body = stream(user("q")).to_string();
    write!(connection, "{}{body}", head("POST", CHAT, &[], body.len())).expect("writes");
    let early = read_until(&mut connection, " yellow");
    assert!(!early.contains("orange"));
    server.engine.open_gates();
    read_until(&mut connection, "data: [DONE]");
}

#[test]
fn whoever_leaves_cancels() {
    let server = Server::start(|tokenizer, _| {
        let mut acts = tokens(tokenizer, " yellow");
        acts.push(Act::Gate);
        acts.extend(says(tokenizer, " orange"));
        acts
    });
    for request in [stream(user("q")), user("q"), with(stream(user("q")), json!({"n": 2}))] {
        let (seen, gone) = (server.engine.seen().len(), server.engine.cancelled());
        let jobs = request["n"].as_u64().unwrap_or(1);
        let mut connection = connect(server.address);
        let body = request.to_string();
        write!(connection, "{}{body}", head("POST", CHAT, &[], body.len())).expect("writes");
        if request["stream"] == true {
            read_until(&mut connection, " yellow");
        }
        eventually("the jobs run", || server.engine.seen().len() as u64 == seen as u64 + jobs);
        assert_eq!(server.engine.cancelled(), gone);
        // While nothing is written: nobody but the connection can notice.
        drop(connection);
        eventually("they are cancelled", || server.engine.cancelled() == gone + jobs);
    }
}

#[test]
fn stop_strings_are_found_across_chunks() {
    let text = "Question one. END\n\nQ: next";
    let server = Server::saying(text);
    for (stop, shown) in [("END\n\nQ", "Question one. "), ("\n\nQ:", "Question one. END"), ("next!", text)] {
        let events = server.post(CHAT, with(stream(user("q")), json!({"stop": [stop]}))).events();
        assert_eq!(joined(&events, "content"), shown);
        assert_eq!(events.last().expect("an end")["choices"][0]["finish_reason"], "stop");
    }
}

#[test]
fn no_chunk_has_half_a_character() {
    let server = Server::start(|tokenizer, _| {
        let byte = |name: &str| Act::Token(tokenizer.token_id(name).expect("a byte"));
        // é, then the first half of another one.
        vec![byte("Ã"), byte("©"), byte("Ã"), Act::Length]
    });
    let request = with(stream(user("q")), json!({"return_token_ids": true}));
    let events = server.post(CHAT, request).events();
    let contents: Vec<&str> = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(contents, ["", "é", "\u{fffd}"]);
    let counts: Vec<usize> =
        events.iter().filter_map(|e| e["choices"][0]["token_ids"].as_array().map(Vec::len)).collect();
    assert_eq!(counts, [0, 2, 1, 0]);
    assert_eq!(events.last().expect("an end")["choices"][0]["finish_reason"], "length");
}

#[test]
fn calls_stream_name_first() {
    let server = Server::saying(
        "Look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"f\">\n<｜DSML｜parameter name=\"s\" string=\"true\">red and blue\
         </｜DSML｜parameter>\n</｜DSML｜invoke>\n<｜DSML｜invoke name=\"g\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
    );
    let events = server.post(CHAT, stream(user("q"))).events();
    assert_eq!(joined(&events, "content"), "Look.");
    let calls: Vec<&Value> =
        events.iter().map(|e| &e["choices"][0]["delta"]["tool_calls"][0]).filter(|c| !c.is_null()).collect();
    for (index, name, arguments) in [(0, "f", r#"{"s": "red and blue"}"#), (1, "g", "{}")] {
        let mut own = calls.iter().filter(|call| call["index"] == index);
        let first = own.next().expect("a beginning");
        assert_eq!((&first["function"]["name"], &first["type"]), (&json!(name), &json!("function")));
        assert!(first["id"].as_str().is_some_and(|id| id.starts_with("call_")));
        let deltas: Vec<&str> = own.map(|call| call["function"]["arguments"].as_str().expect("a delta")).collect();
        assert_eq!(deltas.concat(), arguments);
        assert!(name == "g" || deltas.len() > 1, "{deltas:?}");
    }
    assert_eq!(events.last().expect("an end")["choices"][0]["finish_reason"], "tool_calls");
}

#[test]
fn usage_can_be_in_every_chunk() {
    let server = Server::saying("Hello there");
    let request = with(stream(user("q")), json!({"stream_options": {"continuous_usage_stats": true}}));
    let events = server.post(CHAT, request).events();
    let counts: Vec<u64> = events.iter().map(|e| e["usage"]["completion_tokens"].as_u64().expect("usage")).collect();
    assert_eq!(counts.first(), Some(&0));
    assert!(counts.is_sorted() && counts.last() > Some(&2), "{counts:?}");
    // Without a chunk for it, the last one has the measurements.
    assert!(events.iter().filter(|event| event.get("metrics").is_some()).count() == 1);
    assert!(events.last().is_some_and(|event| event["metrics"]["decode_ms"] == 500.0));
}

#[test]
fn several_answers_share_a_stream() {
    let server = Server::start(|t, seen| says(t, if seen.options.sampling.seed == 3 { "one" } else { "two" }));
    let events = server.post(CHAT, with(stream(user("q")), json!({"n": 2, "seed": 3}))).events();
    for (index, text) in [(0, "one"), (1, "two")] {
        let own = events.iter().map(|event| &event["choices"][0]).filter(|choice| choice["index"] == index);
        let own: Vec<&Value> = own.collect();
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.iter().filter_map(|c| c["delta"]["content"].as_str()).collect::<String>(), text);
        assert_eq!(own.last().expect("an end")["finish_reason"], "stop");
    }
}

#[test]
fn silence_is_broken_by_comments() {
    let quick = ServerConfig { keep_alive: Duration::from_millis(50), ..config() };
    let server = Server::start_with(quick, LIMITS, |tokenizer, _| {
        let mut acts = vec![Act::Gate];
        acts.extend(says(tokenizer, "late"));
        acts
    });
    let mut connection = connect(server.address);
    let body = stream(user("q")).to_string();
    write!(connection, "{}{body}", head("POST", CHAT, &[("Connection", "close")], body.len())).expect("writes");
    // Whoever takes the first chunk for the first token is right.
    for _ in 0..2 {
        let before = read_until(&mut connection, ": keep-alive\n\n");
        assert!(!before.contains("data:"), "{before}");
    }
    server.engine.open_gates();
    let rest = read_until(&mut connection, "data: [DONE]");
    assert!(rest.contains("late"), "{rest}");
}

#[test]
fn what_fails_is_told_where_it_can_be() {
    // The seed says how.
    let server = Server::start(|tokenizer, seen| {
        let mut acts = tokens(tokenizer, "begun");
        match seen.options.sampling.seed {
            0 => return vec![Act::Fail("no memory")],
            1 => acts.push(Act::Fail("lost a rank")),
            2 => acts.push(Act::Deadline),
            3 => return vec![Act::Vanish],
            _ => acts.push(Act::Vanish),
        }
        acts
    });
    for (seed, status, message) in
        [(0, 500, "no memory"), (1, 500, "lost a rank"), (2, 504, "within the time"), (4, 500, "nothing computes")]
    {
        let reply = server.post(CHAT, with(user("q"), json!({"seed": seed})));
        let error = reply.error(status);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(message)), "{error}");
        assert_eq!(reply.header("x-should-retry").is_some(), seed == 2);
    }
    for seed in [0, 3] {
        server.post(CHAT, with(stream(user("q")), json!({"seed": seed}))).error(500);
    }
    for (seed, kind) in [(1, "server_error"), (2, "timeout_error"), (4, "server_error")] {
        let events = server.post(CHAT, with(stream(user("q")), json!({"seed": seed}))).events();
        assert_eq!(joined(&events, "content"), "begun");
        let last = events.last().expect("an error");
        assert_eq!(last["error"]["type"], kind, "{last}");
    }
}
