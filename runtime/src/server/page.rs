//! GET /: a page to talk to the model and to watch the server. One file, which asks this server and nobody else.
//!
//! Anybody may load it: it says nothing, and asks for the key itself. What a model says must never run in it. So the
//! page makes text nodes of it, and its policy lets nothing run but what has the nonce of this very reply.

use axum::http::{HeaderName, header};
use axum::response::Html;

use super::app::random;

const PAGE: &str = include_str!("page.html");
/// Where the nonce goes.
const PLACE: &str = "NONCE";

pub(super) async fn page() -> ([(HeaderName, String); 4], Html<String>) {
    let nonce = format!("{:016x}{:016x}", random(), random());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; \
         img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let headers = [
        (header::CONTENT_SECURITY_POLICY, policy),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".into()),
        (header::CACHE_CONTROL, "no-store".into()),
        (header::REFERRER_POLICY, "no-referrer".into()),
    ];
    (headers, Html(PAGE.replace(PLACE, &nonce)))
}
