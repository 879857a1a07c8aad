//! The server with the trained checkpoint: whatever the company, the form of the reply and the number of ranks, the
//! conversations come out token for token; and it ends in order.

use std::io::Read;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, Running, children, kill, run, start};
use dsv4_tests::http::{ask, get, post};
use dsv4_tests::nano::{Case, cases};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

const WITHIN: Duration = Duration::from_secs(30);

/// A server of a test's own.
struct Server {
    running: Running,
    address: SocketAddr,
}

impl Server {
    fn start(artifact: &Path, more: &[&str]) -> Server {
        let artifact = artifact.to_str().expect("a path");
        let running = start(DSV4_RUN, [&[artifact, "serve", "--port", "0"], more].concat());
        let begun = Instant::now();
        loop {
            let said = running.err();
            let place = said.split_once(" at http://").and_then(|(_, rest)| rest.split_once("/v1"));
            if let Some((address, _)) = place {
                let address = address.parse().expect("an address");
                return Server { running, address };
            }
            assert!(begun.elapsed() < WITHIN, "no address: {said}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn terminate(&self) {
        kill_process(Pid::from_raw(self.running.id() as i32).expect("an id"), Signal::TERM).expect("a signal");
    }

    /// Asks it to end: it does, with success.
    fn end(self) {
        self.terminate();
        self.running.finish().ok();
    }

    /// The value of a metric, by its line up to the value.
    fn metric(&self, name: &str) -> u64 {
        let text = get(self.address, "/metrics");
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("{name}: {text}"))
    }

    fn await_metric(&self, name: &str, value: u64) {
        let begun = Instant::now();
        while self.metric(name) != value {
            assert!(begun.elapsed() < WITHIN, "{name} is {}, not {value}", self.metric(name));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn chat(case: &Case, stream: bool) -> Value {
    let mut body = case.input.clone();
    body["temperature"] = 0.into();
    body["chat_template_kwargs"] = json!({"thinking": case.thinking});
    body["return_token_ids"] = true.into();
    body["stream"] = stream.into();
    body["stream_options"] = if stream { json!({"include_usage": true}) } else { Value::Null };
    body
}

/// Joins the events of a stream to what a reply that came at once would be.
fn joined(events: &[Value]) -> Value {
    let (mut content, mut reasoning, mut ids) = (String::new(), String::new(), Vec::new());
    let (mut calls, mut finish): (Vec<Value>, Value) = (Vec::new(), Value::Null);
    for choice in events.iter().filter_map(|event| event["choices"].get(0)) {
        let delta = &choice["delta"];
        content += delta["content"].as_str().unwrap_or_default();
        reasoning += delta["reasoning_content"].as_str().unwrap_or_default();
        ids.extend(choice["token_ids"].as_array().into_iter().flatten().cloned());
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let at = call["index"].as_u64().expect("an index") as usize;
            let more = call["function"]["arguments"].as_str().unwrap_or_default();
            if at == calls.len() {
                calls.push(json!({"function": {"name": call["function"]["name"], "arguments": more}}));
            } else {
                let text = calls[at]["function"]["arguments"].as_str().expect("text").to_owned() + more;
                calls[at]["function"]["arguments"] = text.into();
            }
        }
        if !choice["finish_reason"].is_null() {
            finish = choice["finish_reason"].clone();
        }
    }
    let usage = events.last().expect("events")["usage"].clone();
    let message = json!({"content": content, "reasoning_content": reasoning, "tool_calls": calls});
    json!({"usage": usage, "choices": [{"finish_reason": finish, "message": message, "token_ids": ids}]})
}

fn check(case: &Case, reply: &Value) {
    let (kind, choice) = (&case.kind, &reply["choices"][0]);
    let (message, (reasoning, content)) = (&choice["message"], case.parts());
    assert_eq!(choice["token_ids"], json!(case.completion_tokens), "{kind}: {reply}");
    assert_eq!(message["content"].as_str().unwrap_or_default(), content, "{kind}");
    assert_eq!(message["reasoning_content"].as_str().unwrap_or_default(), reasoning, "{kind}");
    let calls: Vec<(String, Value)> = message["tool_calls"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|call| {
            let text = call["function"]["arguments"].as_str().expect("text");
            let name = call["function"]["name"].as_str().expect("a name");
            (name.to_owned(), serde_json::from_str(text).unwrap_or_else(|e| panic!("{kind}: {text}: {e}")))
        })
        .collect();
    assert_eq!(calls, case.calls(), "{kind}");
    assert_eq!(choice["finish_reason"], if calls.is_empty() { "stop" } else { "tool_calls" }, "{kind}");
    assert_eq!(reply["usage"]["prompt_tokens"], case.prompt_tokens.len(), "{kind}");
    assert_eq!(reply["usage"]["completion_tokens"], case.completion_tokens.len(), "{kind}");
}

/// All conversations, alone one after another, then at once, arriving at odd times, streamed and not.
fn exact(tp: u32, more: &[&str]) {
    let (packed, cases) = (Packed::nano(tp), cases());
    let server = Server::start(packed.path(), more);
    let address = server.address;
    let ask_for = |case: &Case, stream: bool| {
        let body = chat(case, stream);
        let path = "/v1/chat/completions";
        check(
            case,
            &match stream {
                true => joined(&ask(address, "POST", path, Some(&body)).events()),
                false => post(address, path, &body),
            },
        );
    };
    for (number, case) in cases.iter().enumerate() {
        ask_for(case, number % 2 == 0);
    }
    std::thread::scope(|scope| {
        for (number, case) in cases.iter().enumerate() {
            let ask_for = &ask_for;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis((number * number * 7 % 100) as u64));
                ask_for(case, number % 2 == 1);
            });
        }
    });
    let count = 2 * cases.len() as u64;
    assert_eq!(server.metric("requests_total{finish=\"stop\"}"), count);
    let tokens: usize = cases.iter().map(|case| case.completion_tokens.len()).sum();
    assert_eq!(server.metric("generation_tokens_total"), 2 * tokens as u64);
    assert_eq!(server.metric("num_requests_running") + server.metric("kv_cache_tokens"), 0);
    if more.contains(&"--draft") {
        let accepted = server.metric("spec_decode_num_accepted_tokens_total{method=\"mtp\"}");
        assert!(accepted > tokens as u64, "{accepted} drafts accepted of {tokens} tokens twice");
    }
    server.end();
}

#[test]
fn conversations_of_one_rank() {
    exact(1, &["--max-seqs", "8", "--backend", "cpu"]);
}

#[test]
fn conversations_of_two_ranks_with_drafts() {
    exact(2, &["--max-seqs", "8", "--draft", "3", "--backend", "cpu"]);
}

#[test]
fn conversations_in_small_pieces_and_float() {
    let more = ["--max-seqs", "3", "--draft", "2", "--chunk", "24", "--decode-bound-ms", "1", "--numerics", "float"];
    exact(1, &[&more[..], &["--backend", "cpu"]].concat());
}

fn endless() -> Value {
    json!({"prompt": "Tell me a story.", "max_tokens": 4000, "ignore_eos": true, "stream": true, "temperature": 0})
}

/// Who goes away takes nobody's time; who waits is served.
#[test]
fn clients_that_leave_free_their_place() {
    let packed = Packed::nano(1);
    let server = Server::start(packed.path(), &["--max-seqs", "1", "--max-queue", "2", "--backend", "cpu"]);
    let place = |body: &Value| ask(server.address, "POST", "/v1/completions", Some(body));
    let mut first = place(&endless());
    first.read_exact(&mut [0; 200]).expect("a stream");
    let waits = std::thread::spawn({
        let (address, body) = (server.address, json!({"prompt": "What", "max_tokens": 3, "temperature": 0}));
        move || post(address, "/v1/completions", &body)
    });
    server.await_metric("num_requests_waiting", 1);
    let gone = std::thread::spawn({
        let (address, body) = (server.address, endless());
        move || ask(address, "POST", "/v1/completions", Some(&body)).status
    });
    server.await_metric("num_requests_waiting", 2);
    let refused = place(&endless());
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").and_then(|s| s.parse::<u64>().ok()).is_some_and(|s| (1..=60).contains(&s)));
    let refused: Value = serde_json::from_str(&refused.text()).expect("JSON");
    assert!(refused["error"]["message"].is_string(), "{refused}");
    drop(first);
    assert_eq!(waits.join().expect("a reply")["usage"]["completion_tokens"], 3);
    assert_eq!(gone.join().expect("a reply"), 200);
    server.await_metric("requests_total{finish=\"cancelled\"}", 2);
    server.await_metric("num_requests_running", 0);
    server.end();
}

/// What runs is finished, nothing new is taken.
#[test]
fn it_ends_in_order() {
    let packed = Packed::nano(2);
    let server = Server::start(packed.path(), &["--max-seqs", "2", "--backend", "cpu"]);
    let mut body = endless();
    body["max_tokens"] = 300.into();
    let mut stream = ask(server.address, "POST", "/v1/completions", Some(&body));
    let mut first = [0; 100];
    stream.read_exact(&mut first).expect("a stream");
    server.terminate();
    let begun = Instant::now();
    while ask(server.address, "GET", "/ready", None).status != 503 {
        assert!(begun.elapsed() < WITHIN, "still ready");
    }
    let refused = ask(server.address, "POST", "/v1/completions", Some(&body));
    assert!(refused.status == 503 && refused.header("retry-after").is_some());
    let rest = stream.text();
    assert!(rest.ends_with("data: [DONE]\n\n") && rest.contains("\"finish_reason\":\"length\""), "{rest}");
    server.running.finish().ok();
}

/// A rank that dies ends the server, and its clients hear of it.
#[test]
fn a_lost_rank_is_told() {
    let packed = Packed::nano(2);
    let server = Server::start(packed.path(), &["--backend", "cpu"]);
    let mut stream = ask(server.address, "POST", "/v1/completions", Some(&endless()));
    stream.read_exact(&mut [0; 100]).expect("a stream");
    children(server.running.id()).into_iter().for_each(kill);
    let rest = stream.text();
    assert!(rest.contains("\"error\"") && rest.ends_with("data: [DONE]\n\n"), "{rest}");
    server.running.finish().fails(5, &["rank 1"]);
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let packed = Packed::nano(1);
    let artifact = packed.path().to_str().expect("a path");
    let serve = |more: &[&str]| run(DSV4_RUN, [&[artifact, "serve", "--backend", "cpu"], more].concat());
    serve(&["--host", "0.0.0.0"]).fails(2, &["0.0.0.0:8000", "API key", "--api-key-file"]);
    serve(&["--cors-origin", "nothing/at all"]).fails(2, &["CORS origin", "nothing/at all"]);
    let empty = packed.scratch().join("keys");
    std::fs::write(&empty, "\n \n").expect("written");
    serve(&["--api-key-file", empty.to_str().expect("a path")]).fails(3, &["keys", "a key a line", "openssl"]);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    serve(&["--port", &port]).fails(4, &[&port, "cannot listen", "another port"]);
    // Closed without a key, open with one.
    std::fs::write(&empty, "a-key\n").expect("written");
    let server = Server::start(packed.path(), &["--api-key-file", empty.to_str().expect("a path"), "--backend", "cpu"]);
    assert_eq!(ask(server.address, "GET", "/v1/models", None).status, 401);
    assert_eq!(get(server.address, "/health"), "ok\n");
    server.end();
}
