//! Errors as the Anthropic API tells them, on its routes: whoever found the error, be it before any route.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use serde_json::{Value, json};

use super::app::new_id;
use super::error::ApiError;

const PATH: &str = "/v1/messages";
const REQUEST_ID: HeaderName = HeaderName::from_static("request-id");

/// Of a request on one of the API's routes.
#[derive(Clone)]
struct RequestId(String);

/// Goes around everything: gives requests of the API their ids, and their errors its form.
pub(super) async fn shape(mut request: Request, next: Next) -> Response {
    if !request.uri().path().strip_prefix(PATH).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')) {
        return next.run(request).await;
    }
    let id = new_id("req_");
    request.extensions_mut().insert(RequestId(id.clone()));
    let mut response = next.run(request).await;
    if let Some(error) = response.extensions_mut().remove::<ApiError>() {
        let (mut head, _) = response.into_parts();
        head.headers.remove(header::CONTENT_LENGTH);
        response = Response::from_parts(head, Body::from(error_json(&error, &id).to_string()));
    }
    if let Ok(id) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

/// The id that [`shape`] gave.
pub(super) fn request_id(request: &Request) -> String {
    request.extensions().get::<RequestId>().map_or_else(String::new, |id| id.0.clone())
}

pub(super) fn error_json(error: &ApiError, request_id: &str) -> Value {
    let error = json!({"type": kind(error.status), "message": error.message});
    json!({"type": "error", "error": error, "request_id": request_id})
}

fn kind(status: StatusCode) -> &'static str {
    match status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::GATEWAY_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    }
}
