//! The fetching side: a generation instance's part. It poisons pages, fetches into them on the clock, compares them off it.

use std::time::{Duration, Instant};

use anyhow::Context;
use baton_engine::handoff::{
    Fetch, Handoff, HandoffError, HandoffEvent, HandoffStats, HandoffTicket,
};
use baton_engine::page::Page;
use baton_engine::request::RequestId;

use super::control::{Control, ControlError};
use super::cpu::{CpuLook, CpuTime};
use super::message::{Answer, Ask, Setting, from_hex};
use super::node::{GRACE, Node};
use super::pages::{self, Side};
use super::reference::{gigabytes_per_second, median};
use super::report::{Figures, Status};
use super::wire;

/// How long the other side may take to allocate and fill its pages: some seconds a gigabyte.
const PREPARE: Duration = Duration::from_secs(300);
/// How long it may take for what needs no work.
const PROMPT: Duration = Duration::from_secs(30);

/// Why a case did not pass.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) status: Status,
    pub(super) detail: String,
    /// Whether the other side is lost with it.
    pub(super) is_final: bool,
}

impl From<ControlError> for Failure {
    fn from(error: ControlError) -> Self {
        let status = match &error {
            ControlError::TimedOut { .. } => Status::Timeout,
            _ => Status::TransferError,
        };
        Self {
            status,
            is_final: !matches!(error, ControlError::Failed { .. }),
            detail: error.to_string(),
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::of(Status::TransferError, format!("{error:#}"))
    }
}

impl From<HandoffError> for Failure {
    fn from(error: HandoffError) -> Self {
        let status = match &error {
            HandoffError::Checksum(_) => Status::Mismatch,
            HandoffError::TimedOut(_) => Status::Timeout,
            _ => Status::TransferError,
        };
        Self::of(status, error.to_string())
    }
}

impl Failure {
    fn of(status: Status, detail: String) -> Self {
        Self {
            status,
            detail,
            is_final: false,
        }
    }
}

/// What the rounds of a case gave so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) bytes_verified: u64,
    pub(super) wire: Option<String>,
    requests: Vec<Duration>,
    rounds: Vec<Duration>,
    cpu: CpuTime,
}

/// What one round gave.
#[derive(Debug)]
struct Round {
    requests: Vec<Duration>,
    all: Duration,
    cpu: CpuTime,
}

/// Rounds of a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Rounds {
    /// Verified only.
    pub(crate) warmup: usize,
    /// Verified and timed.
    pub(crate) timed: usize,
}

/// Runs all rounds of a case.
///
/// # Errors
/// At the first that does not pass.
pub(super) fn run(
    control: &mut Control,
    setting: &Setting,
    rounds: Rounds,
    tally: &mut Tally,
) -> Result<Figures, Failure> {
    let mut fetching = Fetching::prepare(control, setting)?;
    let ready = control.ask(&Ask::Prepare(setting.clone()), "prepare its pages", PREPARE)?;
    let Answer::Ready { endpoint } = ready else {
        return Err(control.foreign(&ready).into());
    };
    for index in 0..rounds.warmup + rounds.timed {
        let round = fetching.round(control, index)?;
        // What it is known by once a peer is connected.
        let wire = fetching.node.transceiver.wire(&setting.transport);
        tally.wire = Some(wire::describe(&setting.transport, &endpoint, wire));
        tally.bytes_verified += setting.round_bytes();
        if index >= rounds.warmup {
            tally.requests.extend(round.requests);
            tally.rounds.push(round.all);
            tally.cpu = tally.cpu.plus(round.cpu);
        }
    }
    // The next case's pages need the room.
    drop(fetching);
    control.ask(&Ask::Clear, "let its pages go", PROMPT)?;
    Ok(tally.figures(setting))
}

impl Tally {
    fn figures(&mut self, setting: &Setting) -> Figures {
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let round = median(&mut self.rounds);
        let all = u32::try_from(self.rounds.len()).unwrap_or(u32::MAX);
        Figures {
            median_ms: milliseconds(median(&mut self.requests)),
            p99_ms: milliseconds(percentile_99(&self.requests)),
            gb_per_s: gigabytes_per_second(setting.round_bytes(), round),
            samples: self.requests.len(),
            cpu_ms: milliseconds(Duration::from_nanos(self.cpu.all_ns) / all.max(1)),
            checksum_share: self.cpu.checksum_share(),
        }
    }
}

/// Nearest rank, of sorted times.
fn percentile_99(sorted: &[Duration]) -> Duration {
    sorted[(sorted.len() * 99).div_ceil(100).max(1) - 1]
}

/// A transceiver and the pages that it fills.
#[derive(Debug)]
struct Fetching<'a> {
    setting: &'a Setting,
    node: Node,
    /// All requests' pages, one request's after the other's.
    pages: Vec<Page>,
    next_request: u64,
}

impl<'a> Fetching<'a> {
    fn prepare(control: &Control, setting: &'a Setting) -> anyhow::Result<Self> {
        let ordinal = setting.device.ordinal(Side::Fetching)?;
        let node = Node::start(setting, ordinal, &control.host)?;
        let shape = setting.geometry.page().context("no such page")?;
        // Another stir than the other side's: no piece lies there where it lies here.
        let pages = pages::allocate(ordinal, shape, setting.page_count()?, !setting.run)?;
        Ok(Self {
            setting,
            node,
            pages,
            next_request: 1,
        })
    }

    fn round(&mut self, control: &mut Control, index: usize) -> Result<Round, Failure> {
        pages::poison(&mut self.pages).context("poisoning the pages")?;
        let states = self.states(control, index)?;
        let before = CpuLook::now();
        let fetches = self.fetches(states);
        let deadline = Instant::now() + Duration::from_millis(self.setting.timeout_ms) + GRACE;
        let began: Vec<Instant> = fetches
            .into_iter()
            .map(|fetch| {
                let now = Instant::now();
                self.node.transceiver.fetch(fetch);
                now
            })
            .collect();
        let (requests, last) = self.ends(&began, deadline)?;
        let own = CpuLook::now().since(&before);
        let theirs = self.settled(control)?;
        self.compare(index)?;
        Ok(Round {
            requests,
            all: last.duration_since(began[0]),
            cpu: own.plus(theirs),
        })
    }

    fn states(&self, control: &mut Control, round: usize) -> Result<Vec<Vec<u8>>, Failure> {
        let answer = control.ask(&Ask::Offer { round }, "offer its pages", PROMPT)?;
        let states = match &answer {
            Answer::Offered { states } if states.len() == self.setting.concurrency => states,
            _ => return Err(control.foreign(&answer).into()),
        };
        let bytes: Option<Vec<Vec<u8>>> = states.iter().map(|text| from_hex(text)).collect();
        bytes.ok_or_else(|| control.foreign(&answer).into())
    }

    /// One fetch a request; takes all pages.
    fn fetches(&mut self, states: Vec<Vec<u8>>) -> Vec<Fetch> {
        let each = self.setting.geometry.pages;
        let mut pages = (0_u32..).zip(std::mem::take(&mut self.pages));
        let first = self.next_request;
        self.next_request += states.len() as u64;
        (first..)
            .zip(states)
            .map(|(id, opaque_state)| Fetch {
                request: RequestId(id),
                ticket: HandoffTicket {
                    ctx_request_id: id,
                    disagg_request_id: None,
                    opaque_state,
                    first_tokens: vec![1],
                    first_logprobs: Vec::new(),
                },
                token_count: self.setting.geometry.token_count(),
                first_token: 0,
                pages: pages.by_ref().take(each).collect(),
            })
            .collect()
    }

    /// Waits until all requests of a round have ended well and all their pages are back.
    fn ends(
        &mut self,
        began: &[Instant],
        deadline: Instant,
    ) -> Result<(Vec<Duration>, Instant), Failure> {
        let first = self.next_request - began.len() as u64;
        let mut back: Vec<(u32, Page)> = Vec::new();
        let mut requests = Vec::new();
        let mut last = began[0];
        while requests.len() < began.len() {
            let Some((when, event)) = self.node.next(deadline) else {
                let detail = "the transceiver has not decided all fetches in time".to_owned();
                return Err(Failure::of(Status::Timeout, detail));
            };
            match event {
                HandoffEvent::PagesReturned { pages } => back.extend(pages),
                HandoffEvent::FetchEnded { request, outcome } => {
                    self.check(&outcome?)?;
                    let index = request
                        .0
                        .checked_sub(first)
                        .and_then(|at| usize::try_from(at).ok());
                    let start = index
                        .and_then(|index| began.get(index))
                        .context("a foreign request ended")?;
                    requests.push(when.duration_since(*start));
                    last = last.max(when);
                }
                HandoffEvent::LeaseEnded { .. } | HandoffEvent::Ranks(_) => {}
            }
        }
        if back.len() != self.setting.geometry.pages * began.len() {
            let detail = format!("{} pages came back", back.len());
            return Err(Failure::of(Status::TransferError, detail));
        }
        back.sort_unstable_by_key(|(block, _)| *block);
        self.pages = back.into_iter().map(|(_, page)| page).collect();
        Ok((requests, last))
    }

    /// The bytes that the transceiver says it moved, over the transport that it says it used.
    fn check(&self, stats: &HandoffStats) -> Result<(), Failure> {
        let expected = self.setting.geometry.request_bytes() as u64;
        if stats.bytes != expected {
            let detail = format!("{} bytes came instead of {expected}", stats.bytes);
            return Err(Failure::of(Status::Mismatch, detail));
        }
        let transport = stats.transport();
        if transport != self.setting.transport {
            let detail = format!("the bytes went over {transport}");
            return Err(Failure::of(Status::TransferError, detail));
        }
        Ok(())
    }

    /// Waits until the other side holds no lease; what it spent.
    fn settled(&self, control: &mut Control) -> Result<CpuTime, Failure> {
        let limit = Duration::from_millis(self.setting.timeout_ms) + GRACE + PROMPT;
        let answer = control.ask(&Ask::Settle, "end its leases", limit)?;
        match answer {
            Answer::Settled { lost: 0, cpu, .. } => Ok(cpu),
            Answer::Settled { lost, .. } => {
                let detail = format!("{lost} leases ended without an acknowledgement");
                Err(Failure::of(Status::TransferError, detail))
            }
            _ => Err(control.foreign(&answer).into()),
        }
    }

    fn compare(&mut self, round: usize) -> Result<(), Failure> {
        let difference = pages::first_difference(&mut self.pages, self.setting.run, round)
            .context("comparing the pages")?;
        match difference {
            None => Ok(()),
            Some((page, offset)) => {
                let each = self.setting.geometry.pages;
                let detail = format!(
                    "byte {offset} of piece {} of request {} is not the one that was sent",
                    page % each,
                    page / each
                );
                Err(Failure::of(Status::Mismatch, detail))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_99th_of_few_is_the_longest() {
        let times = |count: u64| (1..=count).map(Duration::from_secs).collect::<Vec<_>>();
        assert_eq!(percentile_99(&times(1)), Duration::from_secs(1));
        assert_eq!(percentile_99(&times(5)), Duration::from_secs(5));
        assert_eq!(percentile_99(&times(100)), Duration::from_secs(99));
        assert_eq!(percentile_99(&times(200)), Duration::from_secs(198));
    }
}
