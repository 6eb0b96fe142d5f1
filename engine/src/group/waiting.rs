//! How long joining may take, whether it is to stop, and what is said meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::GroupError;

/// How often a wait looks up.
const SLICE: Duration = Duration::from_millis(200);

/// When a wait is mentioned first, second and third; later ones follow each other like the last.
const MENTION_AFTER: [Duration; 3] = [
    Duration::from_secs(5),
    Duration::from_secs(15),
    Duration::from_secs(60),
];

/// One join, from its start to its deadline.
#[derive(Debug)]
pub(super) struct Waiting<'a> {
    stop: &'a AtomicBool,
    started: Instant,
    limit: Duration,
    mentioned: u32,
}

impl<'a> Waiting<'a> {
    pub(super) fn new(limit: Duration, stop: &'a AtomicBool) -> Self {
        Self {
            stop,
            started: Instant::now(),
            limit,
            mentioned: 0,
        }
    }

    /// How long to sleep at most before the next check; says what is waited for when it is time to.
    pub(super) fn check(&mut self, doing: impl Fn() -> String) -> Result<Duration, GroupError> {
        let left = self.left(&doing)?;
        let waited = self.started.elapsed();
        if waited >= mention_after(self.mentioned) {
            let (waited_s, left_s) = (waited.as_secs(), left.as_secs());
            if self.mentioned == 0 {
                tracing::info!(waited_s, left_s, "still {}", doing());
            } else {
                tracing::warn!(waited_s, left_s, "still {}", doing());
            }
            self.mentioned += 1;
        }
        Ok(left.min(SLICE))
    }

    /// What is left of the time.
    pub(super) fn left(&self, doing: impl Fn() -> String) -> Result<Duration, GroupError> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(GroupError::Stopped { doing: doing() });
        }
        let waited = self.started.elapsed();
        self.limit
            .checked_sub(waited)
            .filter(|left| !left.is_zero())
            .ok_or_else(|| GroupError::TimedOut {
                waiting_for: doing(),
                waited_s: waited.as_secs(),
            })
    }

    /// As [`Waiting::check`], without a word.
    pub(super) fn slice(&self, doing: impl Fn() -> String) -> Result<Duration, GroupError> {
        Ok(self.left(doing)?.min(SLICE))
    }
}

fn mention_after(mentioned: u32) -> Duration {
    let last = MENTION_AFTER[2];
    match mentioned {
        0 => MENTION_AFTER[0],
        1 => MENTION_AFTER[1],
        more => last * (more - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_is_mentioned_at_5_15_60_seconds_and_each_minute() {
        let seconds: Vec<u64> = (0..5).map(|n| mention_after(n).as_secs()).collect();
        assert_eq!(seconds, [5, 15, 60, 120, 180]);
    }

    #[test]
    fn a_wait_ends_by_the_flag_and_by_its_limit() {
        let stop = AtomicBool::new(true);
        let doing = || "waiting for rank 1".to_owned();
        assert_eq!(
            Waiting::new(SLICE, &stop).check(doing),
            Err(GroupError::Stopped { doing: doing() })
        );
        stop.store(false, Ordering::Relaxed);
        assert!(Waiting::new(SLICE, &stop).check(doing).is_ok());
        assert_eq!(
            Waiting::new(Duration::ZERO, &stop).check(doing),
            Err(GroupError::TimedOut {
                waiting_for: doing(),
                waited_s: 0
            })
        );
    }
}
