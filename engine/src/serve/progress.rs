//! Loading, shown to people: a bar on a terminal, else a log line every tenth; and to health checks.

use std::io::IsTerminal;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::server::app::App;

/// Log lines are at least this far apart.
const PERCENT_STEP: u64 = 10;
/// And so long.
const LOG_PERIOD_MIN: Duration = Duration::from_secs(1);

const BAR: &str = "loading {msg} {wide_bar} {bytes}/{total_bytes} {percent} %";

/// How far loading is.
#[derive(Debug)]
pub(super) struct Progress {
    app: Arc<App>,
    model: String,
    bar: Option<ProgressBar>,
    logged_percent: AtomicU64,
    logged_at: Mutex<Instant>,
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
            logged_percent: AtomicU64::new(0),
            logged_at: Mutex::new(Instant::now()),
        }
    }

    /// So many bytes of so many are loaded.
    pub(super) fn advance(&self, done: u64, total: u64) {
        let percent = (done.saturating_mul(100) / total.max(1)).min(100);
        self.app
            .set_stage(format!("loading the model, {percent} %"));
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        let logged = self.logged_percent.load(Ordering::Relaxed);
        if percent >= logged + PERCENT_STEP && self.log_is_due() {
            self.logged_percent
                .store(percent - percent % PERCENT_STEP, Ordering::Relaxed);
            tracing::info!(model = %self.model, percent, "loading");
        }
    }

    /// Whether the last line is old enough; a model that loads at once needs none.
    fn log_is_due(&self) -> bool {
        let mut at = self
            .logged_at
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let due = at.elapsed() >= LOG_PERIOD_MIN;
        if due {
            *at = Instant::now();
        }
        due
    }

    /// The weights are there; something else is being done.
    pub(super) fn stage(&self, stage: &str) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        self.app.set_stage(stage.to_owned());
    }
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

    #[test]
    fn health_checks_see_the_percentage() {
        let app = App::new();
        let progress = Progress::new(Arc::clone(&app), "m");
        let stage = || app.loaded().unwrap_err().message;
        assert_eq!(stage(), "loading the model, 0 %");
        progress.advance(43, 100);
        assert_eq!(stage(), "loading the model, 43 %");
        progress.advance(5, 0);
        assert_eq!(stage(), "loading the model, 100 %");
        progress.stage("making the kv pool");
        assert_eq!(stage(), "making the kv pool");
    }
}
