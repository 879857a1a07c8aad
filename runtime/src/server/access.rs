//! Who may ask: API keys, and the origins of web pages.
//!
//! A browser sends along where a page comes from, and sends some requests without asking first. So pages from
//! elsewhere are refused here, not only kept from reading the reply: a page must not make this machine compute.

use std::hint::black_box;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::app::App;
use super::error::{ApiError, ServerError};
use super::{Result, ServerConfig};

/// Routes that say nothing that is secret: for those who watch over the server, and the page, which asks for the key.
const OPEN: [&str; 3] = ["/health", "/ready", "/"];

/// Refuses what would let in everybody, or nobody.
pub(super) fn check(config: &ServerConfig) -> std::result::Result<(), ServerError> {
    if config.api_keys.is_empty() && !config.address.ip().to_canonical().is_loopback() {
        return Err(ServerError::NoKey { address: config.address });
    }
    for (i, key) in config.api_keys.iter().enumerate() {
        let found = match key.as_str() {
            "" => "none",
            key if !key.bytes().all(|b| b.is_ascii_graphic()) => "others",
            _ => continue,
        };
        return Err(ServerError::Key { number: i + 1, found });
    }
    for origin in &config.cors_origins {
        let host = origin.split_once("://").map(|(_, host)| host);
        let sound = host.is_some_and(|host| !host.is_empty() && !host.contains(['/', ' ', '*', ',']));
        if origin != "*" && (!sound || HeaderValue::from_str(origin).is_err()) {
            return Err(ServerError::Origin { found: origin.clone() });
        }
    }
    Ok(())
}

/// Goes before every route.
pub(super) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let origin = request.headers().get(header::ORIGIN).cloned();
    let allowed = origin.filter(|origin| is_listed(&app.config, origin));
    let mut response = if request.method() == Method::OPTIONS && allowed.is_some() {
        preflight(request.headers())
    } else {
        match admit(&app.config, &request) {
            Ok(()) => next.run(request).await,
            Err(error) => error.into_response(),
        }
    };
    if let Some(origin) = allowed {
        response.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    }
    if !app.config.cors_origins.is_empty() {
        response.headers_mut().append(header::VARY, HeaderValue::from_static("Origin"));
    }
    response
}

fn admit(config: &ServerConfig, request: &Request) -> Result<()> {
    let headers = request.headers();
    if let Some(origin) = headers.get(header::ORIGIN)
        && request.method() == Method::POST
        && !is_listed(config, origin)
        && !is_own(config, origin, headers)
    {
        return Err(ApiError::origin(&String::from_utf8_lossy(origin.as_bytes())));
    }
    if config.api_keys.is_empty() || OPEN.contains(&request.uri().path()) {
        return Ok(());
    }
    match given_key(headers) {
        None => Err(ApiError::no_key("there is none")),
        Some(given) if is_one_of(&config.api_keys, given) => Ok(()),
        Some(_) => Err(ApiError::no_key("another was sent")),
    }
}

/// From either of the two headers that clients use.
fn given_key(headers: &HeaderMap) -> Option<&[u8]> {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked("Bearer ".len())?;
        scheme.eq_ignore_ascii_case(b"Bearer ").then(|| key.trim_ascii())
    });
    bearer.or_else(|| headers.get("x-api-key").map(HeaderValue::as_bytes))
}

/// Whether the key is one of `keys`, in a time that says nothing about them.
fn is_one_of(keys: &[String], given: &[u8]) -> bool {
    keys.iter().fold(false, |found, key| {
        let key = key.as_bytes();
        let bytes = given.iter().zip(key.iter().cycle());
        let differ = bytes.fold(0, |differ, (a, b)| black_box(differ | (a ^ b)));
        found | ((key.len() == given.len()) & (differ == 0))
    })
}

fn is_listed(config: &ServerConfig, origin: &HeaderValue) -> bool {
    config.cors_origins.iter().any(|listed| listed == "*" || listed.as_bytes() == origin.as_bytes())
}

/// A page that this very server, or a proxy before it, has sent. Without a key the name must be this machine's: any
/// other may have been made to lead here by whoever wrote the page.
fn is_own(config: &ServerConfig, origin: &HeaderValue, headers: &HeaderMap) -> bool {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    let page = origin.to_str().ok().and_then(|origin| origin.split_once("://")).map(|(_, host)| host);
    page.is_some() && page == host && (!config.api_keys.is_empty() || host.is_some_and(is_local))
}

/// Whether a host, with or without a port, is this machine by its name alone.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<std::net::IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

/// The answer to a browser that asks whether it may ask.
fn preflight(headers: &HeaderMap) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    let asked = headers.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let asked = asked.unwrap_or_else(|| HeaderValue::from_static("authorization, content-type, x-api-key"));
    let answer = response.headers_mut();
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
    answer.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, asked);
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(address: &str) -> ServerConfig {
        ServerConfig::new(address.parse().expect("address"))
    }

    /// A name that was made to lead here is in both headers alike.
    #[test]
    fn without_a_key_only_this_machines_names_are_its_own() {
        let own = |config: &ServerConfig, host: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::HOST, HeaderValue::from_str(host).expect("a host"));
            is_own(config, &HeaderValue::from_str(&format!("http://{host}")).expect("an origin"), &headers)
        };
        let mut config = config("127.0.0.1:8000");
        for host in ["localhost:8000", "LOCALHOST", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000"] {
            assert!(own(&config, host), "{host}");
        }
        let others = ["evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example:8000", "192.168.1.2:8000"];
        others.iter().for_each(|host| assert!(!own(&config, host), "{host}"));
        // Who has a key may call the server as its network does.
        config.api_keys.push("key".into());
        others.iter().for_each(|host| assert!(own(&config, host), "{host}"));
    }

    #[test]
    fn an_open_address_needs_a_key() {
        assert!(check(&config("127.0.0.2:1")).is_ok());
        assert!(check(&config("[::1]:1")).is_ok());
        assert!(check(&config("[::ffff:127.0.0.1]:1")).is_ok());
        for open in ["0.0.0.0:80", "192.168.1.2:80", "[::]:80"] {
            let error = check(&config(open)).expect_err("open").to_string();
            assert!(error.contains(open) && error.contains("help: give --api-key-file"), "{error}");
            assert!(check(&ServerConfig { api_keys: vec!["k".into()], ..config(open) }).is_ok());
        }
    }

    #[test]
    fn keys_and_origins_must_fit_a_header() {
        for key in ["", "a b", "ä"] {
            let keyed = ServerConfig { api_keys: vec!["good".into(), key.into()], ..config("127.0.0.1:1") };
            let error = check(&keyed).expect_err("no key").to_string();
            assert!(error.starts_with("API key 2:"), "{error}");
        }
        let with = |origin: &str| check(&ServerConfig { cors_origins: vec![origin.into()], ..config("127.0.0.1:1") });
        for origin in ["http://localhost:3000", "app://x", "*"] {
            assert!(with(origin).is_ok(), "{origin}");
        }
        for origin in ["localhost", "http://", "http://a/", "http://*.a", "http://a\n"] {
            assert!(with(origin).is_err(), "{origin:?}");
        }
    }

    #[test]
    fn keys_are_compared_whole() {
        let keys = ["abc".to_owned(), "de".to_owned()];
        for (given, expected) in
            [("abc", true), ("de", true), ("ab", false), ("abca", false), ("dede", false), ("", false), ("abd", false)]
        {
            assert_eq!(is_one_of(&keys, given.as_bytes()), expected, "{given}");
        }
    }
}
