//! The signals that ask a process to end, as one stream.

use std::fs;
use std::future::poll_fn;
use std::task::Poll;

use nix::sys::signal::Signal;
use tokio::signal::unix::{Signal as SignalStream, SignalKind, signal};

/// The signals that ask a process to end.
#[derive(Debug)]
pub(crate) struct EndSignals {
    streams: Vec<(Signal, SignalStream)>,
}

impl EndSignals {
    /// A person's ways to end a program.
    pub(crate) const BY_HAND: &[Signal] = &[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    /// These, and what `sbatch --signal=USR1@N` sends before a job's time is over.
    pub(crate) const ALL: &[Signal] = &[
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGUSR1,
    ];

    /// Receives these from now on. A signal that this process was started to ignore (`nohup`) stays ignored.
    pub(crate) fn new(wanted: &[Signal]) -> std::io::Result<Self> {
        let ignored = ignored_signals();
        let heard = wanted
            .iter()
            .filter(|number| ignored & (1 << (**number as i32 - 1)) == 0);
        let streams =
            heard.map(|number| Ok((*number, signal(SignalKind::from_raw(*number as i32))?)));
        Ok(Self {
            streams: streams.collect::<std::io::Result<_>>()?,
        })
    }

    /// The next one. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            for (number, stream) in &mut self.streams {
                if stream.poll_recv(context).is_ready() {
                    return Poll::Ready(*number);
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// Bit n-1 stands for signal n. Where /proc does not tell, none is ignored.
fn ignored_signals() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
