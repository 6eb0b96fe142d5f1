//! How many requests are worked on at once and how many may wait for that; more are told to come again.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::error::Failure;

/// Hands out the places.
#[derive(Debug)]
pub(crate) struct Admission {
    places: Arc<Semaphore>,
    active: Arc<AtomicI64>,
    waiting: AtomicUsize,
    waiting_max: usize,
    patience: Duration,
}

/// A request's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _permit: OwnedSemaphorePermit,
    active: Arc<AtomicI64>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }
}

struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    pub(crate) fn new(active_max: usize, waiting_max: usize, patience: Duration) -> Self {
        Self {
            places: Arc::new(Semaphore::new(active_max.min(Semaphore::MAX_PERMITS))),
            active: Arc::new(AtomicI64::new(0)),
            waiting: AtomicUsize::new(0),
            waiting_max,
            patience,
        }
    }

    /// A place, at once or after waiting in the queue.
    pub(crate) async fn enter(&self) -> Result<Place, Failure> {
        if let Ok(permit) = self.places.clone().try_acquire_owned() {
            return Ok(self.seat(permit));
        }
        let queued = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if queued >= self.waiting_max {
            return Err(Failure::Unavailable(format!(
                "the queue is full: {} requests are worked on and {queued} wait",
                self.active()
            )));
        }
        match timeout(self.patience, self.places.clone().acquire_owned()).await {
            Ok(Ok(permit)) => Ok(self.seat(permit)),
            Ok(Err(_)) | Err(_) => Err(Failure::Unavailable(format!(
                "no place became free within {:.1} s: {} requests are worked on",
                self.patience.as_secs_f64(),
                self.active()
            ))),
        }
    }

    fn seat(&self, permit: OwnedSemaphorePermit) -> Place {
        self.active.fetch_add(1, Ordering::Relaxed);
        Place {
            _permit: permit,
            active: self.active.clone(),
        }
    }

    /// Requests that hold a place.
    pub(crate) fn active(&self) -> i64 {
        self.active.load(Ordering::Relaxed)
    }

    /// Requests that wait for one.
    pub(crate) fn waiting(&self) -> i64 {
        i64::try_from(self.waiting.load(Ordering::Relaxed)).unwrap_or(i64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn queue_is_bounded_in_length_and_in_time() {
        let admission = Arc::new(Admission::new(1, 1, Duration::from_millis(100)));
        let first = admission.enter().await.unwrap();
        let second = tokio::spawn({
            let admission = admission.clone();
            async move { admission.enter().await }
        });
        tokio::task::yield_now().await;
        assert_eq!((admission.active(), admission.waiting()), (1, 1));
        let third = admission.enter().await.unwrap_err();
        assert!(third.to_string().contains("queue is full"), "{third}");
        drop(first);
        let second = second.await.unwrap().unwrap();
        assert_eq!((admission.active(), admission.waiting()), (1, 0));
        let late = admission.enter().await.unwrap_err();
        assert!(late.to_string().contains("within 0.1 s"), "{late}");
        drop(second);
        assert_eq!((admission.active(), admission.waiting()), (0, 0));
    }
}
