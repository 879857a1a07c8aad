//! Keys and origins.

use super::*;

fn keyed(cors: &[&str]) -> Server {
    let api_keys = vec!["first".to_owned(), "second".to_owned()];
    let cors_origins = cors.iter().map(|origin| (*origin).to_owned()).collect();
    Server::start_with(ServerConfig { api_keys, cors_origins, ..config() }, LIMITS, |t, _| says(t, "x"))
}

#[test]
fn a_key_is_asked_for() {
    let server = keyed(&[]);
    for headers in [
        &[][..],
        &[("Authorization", "Bearer third")],
        &[("Authorization", "first")],
        &[("Authorization", "Bearer firsts")],
        &[("Authorization", "Bearer ")],
        &[("Authorization", "Basic first")],
        &[("x-api-key", "")],
    ] {
        for (method, path) in [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/nowhere")] {
            let reply = call(server.address, method, path, headers, b"{}");
            let error = reply.error(401);
            assert_eq!((&error["code"], &error["type"]), (&json!("invalid_api_key"), &json!("authentication_error")));
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
            assert!(!reply.body.contains("first"));
        }
    }
    for headers in [("Authorization", "Bearer first"), ("authorization", "bearer second"), ("X-API-Key", "second")] {
        assert_eq!(call(server.address, "POST", CHAT, &[headers], user("q").to_string().as_bytes()).status, 200);
    }
    let both = [("Authorization", "Basic proxy"), ("x-api-key", "first")];
    assert_eq!(call(server.address, "GET", "/v1/models", &both, b"").status, 200);
    assert_eq!((server.get("/health").status, server.get("/ready").status), (200, 200));
}

#[test]
fn pages_from_elsewhere_may_not_ask() {
    let server = keyed(&["http://localhost:3000"]);
    let key = ("Authorization", "Bearer first");
    let body = user("q").to_string();
    let post = |origin: &str| call(server.address, "POST", CHAT, &[key, ("Origin", origin)], body.as_bytes());
    assert_eq!(post("http://evil.example").error(403)["code"], "origin_not_allowed");
    post("null").error(403);
    // The test's requests are for `localhost`: a page that comes from there is this server's.
    assert_eq!(post("http://localhost").status, 200);
    let allowed = post("http://localhost:3000");
    assert_eq!((allowed.status, allowed.header("access-control-allow-origin")), (200, Some("http://localhost:3000")));
    assert_eq!(allowed.header("vary"), Some("Origin"));

    let asks =
        [("Origin", "http://localhost:3000"), ("Access-Control-Request-Headers", "authorization,x-stainless-os")];
    let preflight = call(server.address, "OPTIONS", CHAT, &asks, b"");
    assert_eq!(preflight.status, 204);
    assert_eq!(preflight.header("access-control-allow-headers"), Some("authorization,x-stainless-os"));
    assert_eq!(preflight.header("access-control-allow-methods"), Some("GET, POST"));
    let other = call(server.address, "OPTIONS", CHAT, &[("Origin", "http://evil.example")], b"");
    assert_eq!((other.status, other.header("access-control-allow-origin")), (401, None));
    // A refusal can be read by the page, too.
    let refused = call(server.address, "POST", CHAT, &[("Origin", "http://localhost:3000")], b"{}");
    assert_eq!((refused.status, refused.header("access-control-allow-origin")), (401, Some("http://localhost:3000")));
}

#[test]
fn an_address_that_is_taken_is_named() {
    let server = Server::saying("x");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let error = runtime.block_on(bind(ServerConfig::new(server.address))).expect_err("taken").to_string();
    assert!(error.starts_with(&format!("{}: cannot listen there", server.address)), "{error}");
}
