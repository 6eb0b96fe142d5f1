//! The holding side: a context instance's part. It offers pages that hold a pattern, and says how their leases ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use baton_engine::handoff::{Handoff, HandoffEvent, LeaseEnd, Offer};
use baton_engine::page::Page;
use baton_engine::transceiver::transports;

use super::control::{Control, ControlError};
use super::cpu::CpuLook;
use super::message::{Answer, Ask, PROTOCOL, Setting, to_hex};
use super::node::{GRACE, Node};
use super::pages::{self, Side};
use super::transports::Skipped;
use crate::exit::{Outcome, WithOutcome};

/// How long the fetching side may be busy with itself: comparing gigabytes takes a while.
const IDLE: Duration = Duration::from_secs(600);

/// What is there between [`Ask::Prepare`] and [`Ask::Clear`].
#[derive(Debug)]
struct Held {
    node: Node,
    setting: Setting,
    pages: Vec<Arc<Page>>,
    offered: usize,
    next_lease: u64,
    cpu: CpuLook,
}

/// Does what the other side asks for until it says that it is over.
///
/// # Errors
/// When it goes without a word.
pub(super) fn serve(control: &mut Control) -> anyhow::Result<Outcome> {
    let mut held = None;
    loop {
        let ask: Ask = control
            .hear("ask for something", IDLE)
            .map_err(of_control)?;
        let over = ask == Ask::End;
        let answer = answer(&mut held, ask, &control.host).unwrap_or_else(|error| Answer::Failed {
            reason: format!("{error:#}"),
        });
        match control.say(&answer) {
            Ok(()) => {}
            Err(_) if over => {}
            Err(error) => return Err(of_control(error)),
        }
        if over {
            return Ok(Outcome::Success);
        }
    }
}

/// The exit code of a broken line.
pub(super) fn of_control(error: ControlError) -> anyhow::Error {
    let outcome = match &error {
        ControlError::TimedOut { .. } | ControlError::Unreachable(_) => Outcome::TimedOut,
        ControlError::Bind { .. } => Outcome::Address,
        _ => Outcome::Failure,
    };
    crate::exit::coded(outcome, error)
}

fn answer(held: &mut Option<Held>, ask: Ask, host: &str) -> anyhow::Result<Answer> {
    let prepared = "nothing is prepared";
    match ask {
        Ask::Hello { .. } => Ok(Answer::Hello {
            protocol: PROTOCOL,
            host: host_name(),
            missing: missing(),
        }),
        Ask::Prepare(setting) => {
            // What was held before makes room first.
            *held = None;
            let held = held.insert(Held::prepare(setting, host)?);
            Ok(Answer::Ready {
                endpoint: held.node.transceiver.info().endpoint().to_owned(),
            })
        }
        Ask::Offer { round } => held.as_mut().context(prepared)?.offer(round),
        Ask::Settle => held.as_mut().context(prepared)?.settle(),
        Ask::Clear => {
            *held = None;
            Ok(Answer::Done)
        }
        Ask::End => Ok(Answer::Done),
    }
}

/// This machine, for people.
pub(super) fn host_name() -> String {
    nix::unistd::gethostname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

fn missing() -> Vec<Skipped> {
    let absent = transports().into_iter().filter_map(|known| {
        let reason = known.state.err()?;
        let transport = known.name.to_owned();
        Some(Skipped { transport, reason })
    });
    absent.collect()
}

impl Held {
    fn prepare(setting: Setting, host: &str) -> anyhow::Result<Self> {
        let ordinal = setting.device.ordinal(Side::Holding)?;
        let node = Node::start(&setting, ordinal, host)?;
        let count = setting.page_count()?;
        let shape = setting.geometry.page().context("no such page")?;
        let mut pages = pages::allocate(ordinal, shape, count, setting.run)?;
        pages::fill(&mut pages, setting.run).context("filling the pages")?;
        Ok(Self {
            node,
            pages: pages.into_iter().map(Arc::new).collect(),
            offered: 0,
            next_lease: 1,
            cpu: CpuLook::default(),
            setting,
        })
    }

    fn offer(&mut self, round: usize) -> anyhow::Result<Answer> {
        self.cpu = CpuLook::now();
        let each = self.setting.geometry.pages;
        let count = self.pages.len();
        let mut states = Vec::new();
        for request in 0..self.setting.concurrency {
            let source = |index| pages::source_of(request * each + index, round, count);
            let offer = Offer {
                ctx_request_id: self.next_lease,
                token_count: self.setting.geometry.token_count(),
                pages: (0..each)
                    .map(|index| Arc::clone(&self.pages[source(index)]))
                    .collect(),
            };
            states.push(to_hex(&self.node.transceiver.offer(offer)?));
            self.next_lease += 1;
            self.offered += 1;
        }
        Ok(Answer::Offered { states })
    }

    /// Waits for the round's leases; those that the other side never came for are called back after the deadline.
    fn settle(&mut self) -> anyhow::Result<Answer> {
        let deadline = Instant::now() + Duration::from_millis(self.setting.timeout_ms) + GRACE;
        let (mut delivered, mut lost) = (0, 0);
        while self.offered > 0 {
            match self.node.next(deadline) {
                Some((_, HandoffEvent::LeaseEnded { end, .. })) => {
                    self.offered -= 1;
                    match end {
                        LeaseEnd::Delivered => delivered += 1,
                        LeaseEnd::Expired | LeaseEnd::Cancelled => lost += 1,
                    }
                }
                Some(_) => {}
                None => {
                    return Err(anyhow!("{} leases have not ended", self.offered))
                        .outcome(Outcome::TimedOut);
                }
            }
        }
        Ok(Answer::Settled {
            delivered,
            lost,
            cpu: CpuLook::now().since(&self.cpu),
        })
    }
}
