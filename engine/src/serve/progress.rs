//! Loading, shown to people: a line that is drawn anew on a terminal, else log lines some seconds apart; and to health checks.
//!
//! What was read from files has a pace. What is mapped, or made, has none: it says nothing about a disk.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::model::load::LoadProgress;
use crate::server::app::App;

/// A log line is so much further than the one before, in percent, or so much later.
const PERCENT_STEP: u64 = 10;
const LOG_PERIOD_MAX: Duration = Duration::from_secs(30);
/// And never sooner; a model that loads at once needs none.
const LOG_PERIOD_MIN: Duration = Duration::from_secs(3);
/// Before this much has been read, nobody knows a pace.
const PACE_AFTER: Duration = Duration::from_millis(200);

const BAR: &str = "loading {msg} {wide_bar} {bytes}/{total_bytes} {percent} %{prefix}";

/// How far loading is.
#[derive(Debug)]
pub(super) struct Progress {
    app: Arc<App>,
    model: String,
    bar: Option<ProgressBar>,
    logged: Mutex<Logged>,
}

/// The last log line.
#[derive(Debug, Default, Clone, Copy)]
struct Logged {
    percent: u64,
    at: Duration,
}

impl Logged {
    /// Whether it is time for another.
    fn is_old(self, percent: u64, now: Duration) -> bool {
        let since = now.saturating_sub(self.at);
        let is_further = percent >= self.percent + PERCENT_STEP;
        since >= LOG_PERIOD_MIN && (is_further || since >= LOG_PERIOD_MAX)
    }
}

/// How fast files have been read so far.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Pace {
    gb_per_s: f64,
    /// Until all is there.
    left: Duration,
}

impl Pace {
    fn of(step: &LoadProgress<'_>) -> Option<Self> {
        if step.bytes_read == 0 || step.elapsed < PACE_AFTER {
            return None;
        }
        let per_s = step.bytes_read as f64 / step.elapsed.as_secs_f64();
        let left = step.bytes_total.saturating_sub(step.bytes_done) as f64 / per_s;
        Some(Self {
            gb_per_s: per_s / 1e9,
            left: Duration::try_from_secs_f64(left).unwrap_or(Duration::MAX),
        })
    }

    /// `, 3.21 GB/s, 14 s left`.
    fn text(self) -> String {
        let seconds = self.left.as_secs_f64().ceil();
        format!(", {:.2} GB/s, {seconds:.0} s left", self.gb_per_s)
    }
}

impl Progress {
    /// A beginning.
    pub(super) fn new(app: Arc<App>, model: &str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style =
                ProgressStyle::with_template(BAR).unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(0)
                .with_style(style)
                .with_message(model.to_owned())
        });
        app.set_stage("loading the model, 0 %".to_owned());
        Self {
            app,
            model: model.to_owned(),
            bar,
            logged: Mutex::default(),
        }
    }

    /// Loading has come so far.
    pub(super) fn advance(&self, step: LoadProgress<'_>) {
        let (done, total) = (step.bytes_done, step.bytes_total);
        let percent = (done.saturating_mul(100) / total.max(1)).min(100);
        self.app
            .set_stage(format!("loading the model, {percent} %"));
        let pace = Pace::of(&step);
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_prefix(pace.map_or_else(String::new, Pace::text));
            if done >= total {
                // What is said next is not to be drawn over.
                bar.finish_and_clear();
            }
            return;
        }
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if !logged.is_old(percent, step.elapsed) {
            return;
        }
        *logged = Logged {
            percent,
            at: step.elapsed,
        };
        // Where there is no pace, nothing is said of it.
        let gb_per_s = pace.map(|pace| hundredths(pace.gb_per_s));
        let seconds_left = pace.map(|pace| pace.left.as_secs());
        tracing::info!(model = %self.model, percent, gb_per_s, seconds_left, "loading");
    }

    /// The weights are there; something else is being done.
    pub(super) fn stage(&self, stage: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.app.set_stage(stage.to_owned());
    }
}

/// For people to read.
fn hundredths(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(done: u64, total: u64, read: u64, ms: u64) -> LoadProgress<'static> {
        LoadProgress {
            tensor: "t",
            bytes_done: done,
            bytes_total: total,
            bytes_read: read,
            elapsed: Duration::from_millis(ms),
        }
    }

    #[test]
    fn health_checks_see_the_percentage() {
        let app = App::new();
        let progress = Progress::new(Arc::clone(&app), "m");
        let stage = || app.loaded().unwrap_err().message;
        assert_eq!(stage(), "loading the model, 0 %");
        progress.advance(step(43, 100, 0, 1));
        assert_eq!(stage(), "loading the model, 43 %");
        progress.advance(step(5, 0, 0, 2));
        assert_eq!(stage(), "loading the model, 100 %");
        progress.stage("making the kv pool");
        assert_eq!(stage(), "making the kv pool");
    }

    #[test]
    fn the_pace_is_that_of_files() {
        let text = |step| Pace::of(&step).map(Pace::text);
        let gb = 1_000_000_000;
        let half = text(step(6 * gb, 12 * gb, 6 * gb, 2000));
        assert_eq!(half.as_deref(), Some(", 3.00 GB/s, 2 s left"));
        // What was made is there, and says nothing about the rest.
        let some = text(step(6 * gb, 7 * gb, gb / 2, 1000));
        assert_eq!(some.as_deref(), Some(", 0.50 GB/s, 2 s left"));
        assert_eq!(
            text(step(7 * gb, 7 * gb, 7 * gb, 7000)).as_deref(),
            Some(", 1.00 GB/s, 0 s left")
        );
        assert_eq!(text(step(6 * gb, 12 * gb, 0, 2000)), None, "mapped");
        assert_eq!(text(step(6 * gb, 12 * gb, 6 * gb, 100)), None, "too early");
    }

    #[test]
    fn log_lines_are_few() {
        let last = Logged {
            percent: 20,
            at: Duration::from_secs(10),
        };
        assert!(!last.is_old(90, Duration::from_secs(12)), "too soon");
        assert!(last.is_old(30, Duration::from_secs(13)));
        assert!(!last.is_old(29, Duration::from_secs(39)), "hardly further");
        assert!(last.is_old(20, Duration::from_secs(40)), "slow, but alive");
    }
}
