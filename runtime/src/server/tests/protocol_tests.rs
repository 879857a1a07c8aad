//! What is not a good request, and what is not a good moment for one.

use std::io::Write;
use std::net::Shutdown;

use super::client::{connect, head, read_reply, read_until};
use super::*;

#[test]
fn bad_values_are_refused_by_name() {
    let server = Server::saying("x");
    for (field, value) in [
        ("max_tokens", json!(0)),
        ("max_completion_tokens", json!("9")),
        ("min_tokens", json!(-1)),
        ("ignore_eos", json!(1)),
        ("stop", json!(5)),
        ("stop", json!("")),
        ("seed", json!(1.5)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("1")),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("min_p", json!(2)),
        ("presence_penalty", json!(3)),
        ("frequency_penalty", json!(-3)),
        ("repetition_penalty", json!(0)),
        ("logit_bias", json!([1])),
        ("logit_bias", json!({"x": 1})),
        ("logit_bias", json!({"2048": 1})),
        ("n", json!(0)),
        ("n", json!(17)),
        ("best_of", json!(3)),
        ("logprobs", json!(2)),
        ("top_logprobs", json!(2)),
        ("top_logprobs", json!(21)),
        ("stream", json!("yes")),
        ("stream_options", json!(true)),
        ("return_token_ids", json!([])),
        ("chat_template_kwargs", json!("thinking")),
        ("reasoning_effort", json!(3)),
        ("thinking", json!(true)),
        ("tools", json!({})),
        ("tool_choice", json!("required")),
        ("tool_choice", json!({"type": "function", "function": {"name": "f"}})),
        ("tool_choice", json!("sometimes")),
        ("parallel_tool_calls", json!("no")),
        ("response_format", json!({"type": "json_object"})),
        ("response_format", json!({"type": "json_schema", "json_schema": {}})),
        ("priority", json!(3_000_000_000u64)),
        ("messages", json!([])),
        ("messages", json!("hi")),
        ("messages", Value::Null),
        ("model", json!(3)),
    ] {
        let error = server.post(CHAT, with(user("q"), json!({field: value}))).error(400);
        assert_eq!(error["param"], field, "{value}: {error}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(error["message"].as_str().is_some_and(|m| m.starts_with(field)), "{error}");
    }
    for (field, value, param) in [
        ("stop", json!(["a", 5]), "stop[1]"),
        ("logit_bias", json!({"7": 101}), "logit_bias.7"),
        ("stream_options", json!({"include_usage": 1}), "stream_options.include_usage"),
        ("chat_template_kwargs", json!({"thinking": "on"}), "chat_template_kwargs.thinking"),
        ("thinking", json!({"type": "auto"}), "thinking.type"),
        ("response_format", json!({"type": "xml"}), "response_format.type"),
        ("messages", json!([{"role": "user", "content": "a"}, {"role": "bot"}]), "messages[1].role"),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}]), "messages[0].content[0]"),
        ("tools", json!([{"type": "function"}]), "tools[0].function"),
    ] {
        let error = server.post(CHAT, with(user("q"), json!({field: value}))).error(400);
        assert_eq!(error["param"], param, "{value}: {error}");
    }
    let many: Vec<String> = (0..17).map(|i| i.to_string()).collect();
    assert_eq!(server.post(CHAT, with(user("q"), json!({"stop": many}))).error(400)["param"], "stop");
    assert_eq!(server.post(COMPLETIONS, json!({"prompt": "a", "suffix": "b"})).error(400)["param"], "suffix");
    assert_eq!(server.post(COMPLETIONS, json!({"prompt": "a", "logprobs": true})).error(400)["param"], "logprobs");
    assert!(server.engine.seen().is_empty());
}

#[test]
fn bodies_that_are_no_json_say_where() {
    let server = Server::saying("x");
    let send = |body: &[u8]| call(server.address, "POST", CHAT, &[], body).error(400);
    for (body, message) in [
        (&b""[..], "EOF while parsing"),
        (b"{\"messages\": [\n {\"role\": user}]}", "line 2 column"),
        (b"[1]", "found a list, expected an object"),
        (b"{\"a\": \"\xff\"}", "invalid unicode"),
        (&[b'['; 100_000], "recursion limit"),
        (b"\x00\x01\x02", "expected value at line 1"),
    ] {
        let error = send(body);
        assert!(error["message"].as_str().is_some_and(|m| m.contains(message)), "{message}: {error}");
        assert_eq!(error["code"], "invalid_json");
    }
}

#[test]
fn unknown_routes_and_methods_are_errors_of_the_api() {
    let server = Server::saying("x");
    for path in ["/v1", "/v1/nothing", "/version", "/v1/chat/completions/"] {
        assert_eq!(server.get(path).error(404)["code"], "unknown_url", "{path}");
    }
    let reply = call(server.address, "GET", CHAT, &[], b"");
    assert_eq!(reply.error(405)["code"], "method_not_allowed");
    assert_eq!(reply.header("allow"), Some("POST"));
    call(server.address, "DELETE", "/v1/models", &[], b"").error(405);
    let error = server.post(CHAT, with(user("q"), json!({"model": "gpt-4"}))).error(404);
    assert_eq!((&error["code"], &error["param"]), (&json!("model_not_found"), &json!("model")));
    server.post(COMPLETIONS, json!({"prompt": "a", "model": "gpt-4"})).error(404);
}

#[test]
fn models_say_what_is_served() {
    let server = Server::saying("x");
    let list = server.get("/v1/models").json();
    let entry = &list["data"][0];
    assert_eq!((&list["object"], list["data"].as_array().map(Vec::len)), (&json!("list"), Some(1)));
    assert_eq!(
        (&entry["id"], &entry["root"], &entry["max_model_len"]),
        (&json!("org/nano"), &json!("org/Nano-Base"), &json!(512))
    );
    assert_eq!(entry["dsv4"], json!({"artifact": "a1b2", "backend": {"kind": "cpu"}, "numerics": "float"}));
    for id in ["org/nano", "org%2Fnano", "nano"] {
        assert_eq!(server.get(&format!("/v1/models/{id}")).json(), *entry);
    }
    for id in ["other", "%ff"] {
        assert_eq!(server.get(&format!("/v1/models/{id}")).error(404)["code"], "model_not_found");
    }
}

#[test]
fn long_bodies_are_refused_early() {
    let small = ServerConfig { body_bytes_max: 2000, ..config() };
    let server = Server::start_with(small, LIMITS, |t, _| says(t, "x"));
    let long = user(&"a".repeat(3000)).to_string();
    let told = call(server.address, "POST", CHAT, &[], long.as_bytes()).error(413);
    assert!(told["message"].as_str().is_some_and(|m| m.contains("2000 bytes")), "{told}");
    // In chunks: nobody says how long it will be.
    let mut connection = connect(server.address);
    let chunked = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    connection.write_all(chunked.as_bytes()).expect("writes");
    read_reply(&mut connection).error(413);
    assert_eq!(server.post(CHAT, user("short")).status, 200);
}

#[test]
fn chopped_requests_hurt_nobody() {
    let server = Server::saying("x");
    let body = user("q").to_string();
    let whole = format!("{}{body}", head("POST", CHAT, &[("Connection", "close")], body.len()));
    for cut in (0..whole.len()).step_by(7) {
        let mut connection = connect(server.address);
        connection.write_all(&whole.as_bytes()[..cut]).expect("writes");
        let _ = connection.shutdown(Shutdown::Both);
    }
    // In many small parts it is a request all the same.
    let mut connection = connect(server.address);
    connection.set_nodelay(true).expect("an option");
    for part in whole.as_bytes().chunks(11) {
        connection.write_all(part).expect("writes");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(read_reply(&mut connection).json()["choices"][0]["message"]["content"], "x");
    assert_eq!(server.engine.seen().len(), 1);
}

/// Asks, and leaves the answer be.
fn ask(server: &Server, request: Value) -> std::net::TcpStream {
    let mut connection = connect(server.address);
    let body = request.to_string();
    write!(connection, "{}{body}", head("POST", CHAT, &[("Connection", "close")], body.len())).expect("writes");
    connection
}

fn gated() -> impl Fn(&Tokenizer, &Seen) -> Vec<Act> {
    |tokenizer, _| {
        let mut acts = tokens(tokenizer, " yellow");
        acts.push(Act::Gate);
        acts.extend(says(tokenizer, " orange"));
        acts
    }
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let server = Server::start_with(config(), Limits { queue: 2, running: 1, ..LIMITS }, gated());
    let mut kept = vec![ask(&server, user("q"))];
    eventually("one runs", || server.engine.seen().len() == 1);
    kept.extend([ask(&server, user("q")), ask(&server, user("q"))]);
    eventually("two wait", || server.scheduler.counters().snapshot().waiting == 2);
    let reply = server.post(CHAT, with(user("q"), json!({"stream": true})));
    assert_eq!(reply.error(429)["type"], "rate_limit_error");
    assert!(reply.header("retry-after").and_then(|s| s.parse::<u64>().ok()).is_some_and(|s| (1..=60).contains(&s)));
    // What could never wait is told so when there is time to look at it.
    let never = with(user("q"), json!({"n": 3}));
    assert_eq!(server.post(CHAT, never.clone()).error(429)["code"], "queue_full");
    server.engine.open_gates();
    for mut connection in kept {
        assert_eq!(read_reply(&mut connection).json()["choices"][0]["message"]["content"], " yellow orange");
    }
    assert_eq!(server.post(CHAT, never).error(400)["param"], "messages");
}

#[test]
fn a_server_that_ends_finishes_what_it_began() {
    let mut server = Server::start(gated());
    let mut running = ask(&server, with(user("q"), json!({"stream": true})));
    read_until(&mut running, " yellow");
    assert_eq!((server.get("/ready").status, server.get("/health").status), (200, 200));
    server.begin_shutdown();
    eventually("it drains", || server.get("/ready").status == 503);
    let refused = server.post(CHAT, user("q"));
    assert_eq!(refused.error(503)["code"], "shutting_down");
    assert_eq!(refused.header("retry-after"), Some("10"));
    assert_eq!(server.get("/health").status, 200);
    server.engine.open_gates();
    let rest = read_until(&mut running, "data: [DONE]");
    assert!(rest.contains(" orange"), "{rest}");
    server.join().expect("a good end");
    assert!(std::net::TcpStream::connect(server.address).is_err());
}

/// Half a request is no reason to stay.
#[test]
fn idle_and_half_connections_do_not_hold_the_end_up() {
    let mut server = Server::saying("x");
    let idle = connect(server.address);
    let mut half = connect(server.address);
    half.write_all(b"POST /v1/chat/completions HTTP/1.1\r\nHost:").expect("writes");
    assert_eq!(server.get("/health").status, 200);
    let begun = std::time::Instant::now();
    server.begin_shutdown();
    server.join().expect("a good end");
    assert!(begun.elapsed() < Duration::from_secs(8));
    drop((idle, half));
}

#[test]
fn without_an_engine_the_server_is_not_healthy() {
    let server = Server::saying("x");
    server.engine.end();
    eventually("it is noticed", || server.get("/health").status == 503);
    assert_eq!(server.get("/ready").status, 503);
    server.post(CHAT, user("q")).error(503);
}

#[test]
fn metrics_are_for_measuring_tools() {
    let server = Server::saying("x");
    server.scheduler.counters().draft_tokens.add(5);
    let reply = server.get("/metrics");
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(reply.body.contains("\nspec_decode_num_draft_tokens_total{method=\"mtp\"} 5\n"), "{}", reply.body);
}
