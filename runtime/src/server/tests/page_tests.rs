//! The page, the numbers that it shows, and the dashboard for those of /metrics.

use std::collections::BTreeSet;

use super::*;

const DASHBOARD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/grafana.json");

fn keyed() -> Server {
    Server::start_with(ServerConfig { api_keys: vec!["k".into()], ..config() }, LIMITS, |t, _| says(t, "x"))
}

/// What stands between `before` and `after`, each time.
fn between<'a>(text: &'a str, before: &str, after: &str) -> Vec<&'a str> {
    text.split(before).skip(1).filter_map(|rest| rest.split(after).next()).collect()
}

#[test]
fn the_page_runs_only_what_the_server_sent() {
    let server = Server::saying("x");
    let reply = server.get("/");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    assert_eq!(reply.header("referrer-policy"), Some("no-referrer"));
    let policy = reply.header("content-security-policy").expect("a policy").to_owned();
    for part in ["default-src 'none'", "connect-src 'self'", "base-uri 'none'", "frame-ancestors 'none'"] {
        assert!(policy.split("; ").any(|found| found == part), "{part}: {policy}");
    }
    assert!(!policy.contains("unsafe") && !policy.contains('*'), "{policy}");

    // One nonce, of script, style and policy alike, and another with the next reply.
    let allowed: BTreeSet<_> = between(&policy, "'nonce-", "'").into_iter().collect();
    let given: BTreeSet<_> = between(&reply.body, "nonce=\"", "\"").into_iter().collect();
    assert_eq!((allowed.len(), &given), (1, &allowed));
    assert!(given.iter().all(|nonce| nonce.len() == 32 && nonce.bytes().all(|b| b.is_ascii_hexdigit())), "{given:?}");
    assert_ne!(server.get("/").header("content-security-policy"), Some(policy.as_str()));
    let tags = ["<script", "<style"].map(|tag| reply.body.matches(tag).count());
    assert_eq!((tags, reply.body.matches("nonce=\"").count()), ([1, 1], 2));
}

#[test]
fn the_page_takes_nothing_from_elsewhere_and_text_only_as_text() {
    let page = Server::saying("x").get("/").body;
    let forbidden = [
        "://",
        "src=",
        "@import",
        "url(",
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "document.write",
        "eval(",
        "new Function",
        "DOMParser",
        "setHTML",
        "srcdoc",
        " style=\"",
        " onclick=",
        " onload=",
        "localStorage",
    ];
    for word in forbidden {
        assert!(!page.contains(word), "{word}");
    }
    // What the script looks up is there.
    for id in between(&page, "$(\"", "\")") {
        assert!(page.contains(&format!(" id=\"{id}\"")), "{id}");
    }
    // All that it asks are routes, from wherever it lies.
    assert_eq!(between(&page, "call(\"", "\""), ["v1/chat/completions", "stats"]);
}

#[test]
fn the_page_is_open_and_its_numbers_are_not() {
    let server = keyed();
    assert_eq!(server.get("/").status, 200);
    assert_eq!(server.get("/?key=k").status, 200);
    for path in ["/stats", "//", "/stats/", "/page.html"] {
        assert_eq!(server.get(path).error(401)["code"], "invalid_api_key", "{path}");
    }
    let key = [("Authorization", "Bearer k")];
    assert_eq!(call(server.address, "GET", "/stats", &key, b"").status, 200);

    for (path, headers) in [("/", &[][..]), ("/stats", &key[..])] {
        let whole = call(server.address, "GET", path, headers, b"");
        let head = call(server.address, "HEAD", path, headers, b"");
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
        for header in ["content-type", "cache-control", "x-content-type-options", "referrer-policy"] {
            assert_eq!(head.header(header), whole.header(header), "{path}: {header}");
        }
        assert!(head.header("content-length").is_some_and(|n| n != "0"), "{path}: {}", head.head);
        assert_eq!(call(server.address, "POST", path, &key, b"{}").error(405)["code"], "method_not_allowed");
    }
    assert_eq!(call(server.address, "HEAD", "/stats", &[], b"").status, 401);
}

#[test]
fn numbers_are_those_of_the_scheduler() {
    let server = Server::start_with(
        ServerConfig { draft: 3, thinking: false, ..config() },
        Limits { queue: 7, running: 2, context: 512 },
        |t, _| says(t, "x"),
    );
    let counters = server.scheduler.counters();
    for (number, value) in [
        (&counters.tokens, 11),
        (&counters.prompt_tokens, 12),
        (&counters.cached_tokens, 13),
        (&counters.cache_tokens, 14),
        (&counters.draft_tokens, 15),
        (&counters.accepted_tokens, 16),
        (&counters.drafts, 17),
        (&counters.refused, 18),
        (&counters.decode_steps, 19),
        (&counters.prefill_steps, 20),
        (&counters.step_us, 2_500_000),
        (&counters.gap_us, 30_000),
        (&counters.finished[0], 21),
        (&counters.finished[4], 22),
    ] {
        number.set(value);
    }
    let reply = server.get("/stats");
    assert_eq!((reply.status, reply.header("content-type")), (200, Some("application/json")));
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    assert_eq!(reply.header("x-content-type-options"), Some("nosniff"));
    let mut stats = reply.json();
    let uptime = stats["uptime_seconds"].take();
    let memory = stats["memory"].take();
    let expected = json!({
        "model": "org/nano",
        "artifact": "a1b2",
        "backend": {"kind": "cpu"},
        "numerics": "float",
        "ready": true,
        "uptime_seconds": null,
        "defaults": {"temperature": 1.0, "thinking": false},
        "requests": {
            "running": 0, "waiting": 0, "running_max": 2, "waiting_max": 7,
            "finished": {"stop": 21, "length": 0, "deadline": 0, "cancelled": 0, "failed": 22}, "refused": 18,
        },
        "tokens": {"generated": 11, "prompt": 12, "cached": 13},
        "kv_cache": {"tokens": 14, "tokens_max": 1024, "context": 512},
        "drafts": {"drafted": 15, "accepted": 16, "steps": 17, "draft_max": 3},
        "steps": {"decode": 19, "prefill": 20, "seconds": 2.5},
        "longest_gap_seconds": 0.03,
        "memory": null,
    });
    assert_eq!(stats, expected);

    let number = |of: &str| memory[of].as_u64().unwrap_or_else(|| panic!("{of}: {memory}"));
    let (resident, available) = (number("process_bytes"), number("machine_available_bytes"));
    let total = number("machine_total_bytes");
    assert!(1 << 20 < resident && resident < total && available <= total, "{memory}");
    std::thread::sleep(Duration::from_millis(20));
    let later = server.get("/stats").json()["uptime_seconds"].as_f64();
    assert!(later > uptime.as_f64().map(|uptime| uptime + 0.02), "{later:?} after {uptime}");
}

#[test]
fn a_request_is_seen_while_it_runs() {
    let mut server = Server::start(|t, _| [tokens(t, "x"), vec![Act::Gate], says(t, "y")].concat());
    let running = |server: &Server| server.get("/stats").json()["requests"]["running"] == 1;
    assert!(!running(&server));
    let address = server.address;
    let asking = std::thread::spawn(move || call(address, "POST", CHAT, &[], user("q").to_string().as_bytes()).status);
    eventually("it runs", || running(&server));
    server.begin_shutdown();
    eventually("nothing new is taken", || server.get("/stats").json()["ready"] == false);
    server.engine.open_gates();
    assert_eq!(asking.join().expect("no panic"), 200);
}

/// Names of metrics in an expression: words that are no functions, outside labels and ranges.
fn metrics_of(expression: &str) -> BTreeSet<String> {
    let mut bare = String::new();
    let mut skipped = None;
    for c in expression.chars() {
        match (skipped, c) {
            (None, '{') => skipped = Some('}'),
            (None, '[') => skipped = Some(']'),
            (Some(end), c) if c == end => skipped = None,
            (None, c) => bare.push(c),
            _ => (),
        }
    }
    // Labels to keep are no metrics.
    let parts = bare.split(" by (").enumerate();
    let parts = parts.map(|(i, part)| if i == 0 { part } else { part.split_once(')').map_or("", |(_, rest)| rest) });
    let bare = parts.collect::<Vec<_>>().join(" ");
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    let mut rest = bare.as_str();
    while let Some(start) = rest.find(is_word) {
        let (word, after) = rest[start..].split_at(rest[start..].find(|c| !is_word(c)).unwrap_or(rest.len() - start));
        let is_called = after.trim_start().starts_with('(');
        if !is_called && !word.starts_with(|c: char| c.is_ascii_digit()) {
            names.insert(word.to_owned());
        }
        rest = after;
    }
    names
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let text = std::fs::read_to_string(DASHBOARD).expect("the dashboard");
    let board: Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(board["schemaVersion"], 39);
    let page = Server::saying("x").get("/metrics").body;
    let there: BTreeSet<String> =
        page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next().map(str::to_owned)).collect();

    let variables = board["templating"]["list"].as_array().expect("variables");
    assert!(variables.iter().any(|v| v["type"] == "datasource" && v["query"] == "prometheus"), "{variables:?}");
    let source = json!({"type": "prometheus", "uid": "${datasource}"});
    let panels = board["panels"].as_array().expect("panels");
    let mut asked = BTreeSet::new();
    for panel in panels {
        assert_eq!(panel["datasource"], source, "{}", panel["title"]);
        for target in panel["targets"].as_array().expect("targets") {
            assert_eq!(target["datasource"], source, "{}", panel["title"]);
            let expression = target["expr"].as_str().expect("an expression");
            let names = metrics_of(expression);
            assert!(!names.is_empty(), "{expression}");
            assert!(names.is_subset(&there), "{expression}: {names:?} of {there:?}");
            // Several servers may be watched by one Prometheus.
            assert_eq!(expression.matches("{instance=~\"$instance\"}").count(), expression.matches('{').count());
            asked.extend(names);
        }
    }
    for name in ["requests_total", "num_requests_waiting", "step_gap_seconds", "spec_decode_num_accepted_tokens_total"]
    {
        assert!(asked.contains(name), "{name}: {asked:?}");
    }
    let ids: BTreeSet<_> = panels.iter().filter_map(|panel| panel["id"].as_u64()).collect();
    assert_eq!(ids.len(), panels.len());
}

#[test]
fn metrics_of_expressions() {
    let names = |expression| metrics_of(expression).into_iter().collect::<Vec<_>>();
    assert_eq!(names("60 * sum by (finish) (rate(a_total{x=~\"$y\"}[$__i]))"), ["a_total"]);
    assert_eq!(names("sum(rate(a[1m])) / on () group_left () (b + max by (c, d) (e))"), ["a", "b", "e"]);
}
