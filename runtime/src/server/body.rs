//! A request's body, read to its end or to a limit.

use std::future::poll_fn;
use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::Request;
use axum::http::header;

use super::error::{ApiError, Result};

/// Longest that a body may take.
const BODY_WITHIN: Duration = Duration::from_secs(120);

/// The body's bytes, whatever it says that they are.
///
/// Errors: more than `bytes_max`, slow, cut off.
pub(super) async fn read(request: Request, bytes_max: usize) -> Result<Vec<u8>> {
    let told = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if told.is_some_and(|bytes| bytes > bytes_max as u64) {
        return Err(ApiError::body_too_long(bytes_max));
    }
    let reading = read_all(request.into_body(), bytes_max);
    tokio::time::timeout(BODY_WITHIN, reading).await.unwrap_or(Err(ApiError::body_too_slow(BODY_WITHIN)))
}

async fn read_all(mut body: Body, bytes_max: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame.map_err(|error| ApiError::body(format!("cut off: {error}")))?;
        // What is no data are trailers.
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > bytes_max {
            return Err(ApiError::body_too_long(bytes_max));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}
