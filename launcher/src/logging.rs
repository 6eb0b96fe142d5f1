//! Log lines on stderr: time, level, message, fields. `BATON_LOG` holds a filter that overrides `--log-level`.

use std::fmt;
use std::io::IsTerminal;
use std::time::{SystemTime, UNIX_EPOCH};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::FormatTime;

use crate::cli::LogLevel;

/// Time of day in UTC; the date is in the file's own times.
struct Clock;

impl FormatTime for Clock {
    fn format_time(&self, writer: &mut Writer<'_>) -> fmt::Result {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let seconds = now.as_secs() % 86_400;
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        write!(
            writer,
            "{hours:02}:{minutes:02}:{:02}.{:03}",
            seconds % 60,
            now.subsec_millis()
        )
    }
}

/// Installs the process's logger. Called once, first thing.
pub(crate) fn start(level: LogLevel) {
    let filter = std::env::var("BATON_LOG")
        .ok()
        .and_then(|text| EnvFilter::try_new(text).ok())
        .unwrap_or_else(|| EnvFilter::new(level.directive()));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(Clock)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .init();
}
