//! One side's transceiver: the engine's own, over one transport, with its events in a queue and their times.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use baton_configs::transceiver::TransceiverConfig;
use baton_engine::handoff::{HandoffEvent, HandoffSink, KvLayout};
use baton_engine::transceiver::{Transceiver, TransceiverParams};
use baton_engine::transport::fault::FaultPlan;

use super::message::Setting;
use super::transports;
use crate::exit::{Outcome, WithOutcome};

/// How long past a round's own deadline its last events may come.
pub(super) const GRACE: Duration = Duration::from_secs(15);

/// A running transceiver.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) transceiver: Transceiver,
    events: Receiver<(Instant, HandoffEvent)>,
}

impl Node {
    /// Starts one at this address of the machine, for pages of this GPU or of the host's memory.
    ///
    /// # Errors
    /// When the transport is not there or does not start.
    pub(super) fn start(
        setting: &Setting,
        device: Option<usize>,
        host: &str,
    ) -> anyhow::Result<Self> {
        let page = setting
            .geometry
            .page()
            .ok_or_else(|| anyhow!("the other side asks for pages that cannot be made"))
            .outcome(Outcome::Failure)?;
        let layout = KvLayout {
            model_fingerprint: 0,
            page,
            tensor_parallel: 1,
            pipeline_parallel: 1,
        };
        let config = TransceiverConfig {
            backend: transports::choice(&setting.transport)?,
            kv_transfer_timeout: Duration::from_millis(setting.timeout_ms),
            ..TransceiverConfig::default()
        };
        let mut params = TransceiverParams::new(config, layout, host);
        "bench".clone_into(&mut params.instance);
        params.device = device;
        params.leave_out_checksums = !setting.checksums;
        params.limits.fetches_running = params.limits.fetches_running.max(setting.concurrency);
        params.faults = FaultPlan::from_environment().outcome(Outcome::Usage)?;
        if !params.faults.is_empty() {
            tracing::warn!(faults = ?params.faults, "the wire is spoilt on purpose");
        }
        // Bounded by the pages and requests of one round.
        let (sender, events) = channel();
        let sink: HandoffSink = Arc::new(move |event| drop(sender.send((Instant::now(), event))));
        let transceiver = Transceiver::start(params, sink)
            .with_context(|| setting.transport.clone())
            .outcome(Outcome::Unavailable)?;
        let used = transceiver.info().transport();
        if used != setting.transport {
            return Err(anyhow!(
                "asked for {}, the transceiver took {used}: {}",
                setting.transport,
                transceiver.info().reason()
            ))
            .outcome(Outcome::Unavailable);
        }
        Ok(Self {
            transceiver,
            events,
        })
    }

    /// The next event and its time; `None` when none comes by the deadline.
    pub(super) fn next(&self, deadline: Instant) -> Option<(Instant, HandoffEvent)> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.events.recv_timeout(left).ok()
    }
}
