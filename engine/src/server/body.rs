//! Request bodies: bounded one by one and together, read within a deadline.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Body;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use crate::server::error::ApiError;

/// Most bytes of one body.
const BODY_BYTES_MAX: usize = 32 << 20;

/// Most kibibytes of all bodies that are being read, so that many large ones cannot fill the memory.
const BODIES_KIB_MAX: usize = 512 << 10;

/// How long a client may take to send its body, the wait for a place included.
const BODY_DEADLINE: Duration = Duration::from_secs(60);

/// Held as long as a body is in memory.
#[derive(Debug)]
pub(crate) struct BodyPlace {
    _permit: OwnedSemaphorePermit,
}

/// Reads bodies.
#[derive(Debug)]
pub(crate) struct Bodies {
    places: Arc<Semaphore>,
    time_allowed: Duration,
}

impl Bodies {
    /// Nothing read yet.
    pub(crate) fn new() -> Self {
        Self::within(BODY_DEADLINE)
    }

    fn within(time_allowed: Duration) -> Self {
        Self {
            places: Arc::new(Semaphore::new(BODIES_KIB_MAX)),
            time_allowed,
        }
    }

    /// Reads a body whole.
    pub(crate) async fn read<B>(&self, body: B) -> Result<(Bytes, BodyPlace), ApiError>
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let deadline = Instant::now() + self.time_allowed;
        let place = self.place(&body, deadline).await?;
        let limited = Limited::new(body, BODY_BYTES_MAX);
        match timeout_at(deadline, limited.collect()).await {
            Err(_) => Err(ApiError::slow_body(self.time_allowed.as_secs())),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                Err(ApiError::large_body(BODY_BYTES_MAX))
            }
            Ok(Err(error)) => Err(ApiError::bad_request(format!(
                "the request body could not be read: {error}"
            ))),
            Ok(Ok(body)) => Ok((body.to_bytes(), place)),
        }
    }

    /// A place of the body's size; of the largest size where it is not announced.
    async fn place(&self, body: &impl Body, deadline: Instant) -> Result<BodyPlace, ApiError> {
        let announced = body.size_hint().exact();
        let largest = BODY_BYTES_MAX as u64;
        let size = announced.unwrap_or(largest);
        if size > largest {
            return Err(ApiError::large_body(BODY_BYTES_MAX));
        }
        let kibibytes = u32::try_from(size.div_ceil(1024)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.places).acquire_many_owned(kibibytes);
        match timeout_at(deadline, permit).await {
            Ok(Ok(permit)) => Ok(BodyPlace { _permit: permit }),
            Ok(Err(_)) | Err(_) => Err(ApiError::unavailable(
                "too many large request bodies are being read",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use http_body_util::{Empty, Full};
    use hyper::body::Frame;

    use super::*;

    /// The body of a client that has stopped sending.
    struct Silent;

    impl Body for Silent {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_place_is_as_large_as_its_body_and_given_back() {
        let bodies = Bodies::new();
        let (body, place) = bodies
            .read(Full::new(Bytes::from(vec![b'a'; 5000])))
            .await
            .unwrap();
        assert_eq!(body.len(), 5000);
        assert_eq!(bodies.places.available_permits(), BODIES_KIB_MAX - 5);
        drop(place);
        assert_eq!(bodies.places.available_permits(), BODIES_KIB_MAX);
        let (_, empty) = bodies.read(Empty::<Bytes>::new()).await.unwrap();
        assert_eq!(bodies.places.available_permits(), BODIES_KIB_MAX);
        drop(empty);
    }

    #[tokio::test]
    async fn who_finds_no_place_in_time_is_sent_away() {
        let bodies = Bodies::within(Duration::from_millis(20));
        let all = u32::try_from(BODIES_KIB_MAX).unwrap();
        let taken = bodies.places.acquire_many(all).await.unwrap();
        let body = Full::new(Bytes::from_static(b"a"));
        assert_eq!(bodies.read(body.clone()).await.unwrap_err().status, 503);
        drop(taken);
        assert!(bodies.read(body).await.is_ok());
    }

    #[tokio::test]
    async fn a_body_that_does_not_come_is_given_up() {
        let bodies = Bodies::within(Duration::from_millis(20));
        assert_eq!(bodies.read(Silent).await.unwrap_err().status, 408);
        assert_eq!(bodies.places.available_permits(), BODIES_KIB_MAX);
    }
}
