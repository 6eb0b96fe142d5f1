//! The thread that answers requests for ranges of exported arenas, and takes what readers have given up.
//!
//! It reads an arena through its file, so that it needs no pointer into memory that others own. What is on its way is
//! bounded: while so much of it waits, further requests are left with MPI. Invariant: each answer is one status message
//! and, if that is empty, the ranges' bytes in messages of [`CHUNK_BYTES`], all under the reader's tag.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::wire::{REQUEST_BYTES_MAX, Request};
use super::{BATCH_BYTES_MAX, CHUNK_BYTES, CHUNKS_AHEAD, REQUEST, Shared};
use crate::collective::mpi::{FIRST_TAG, Flight, LAST_TAG, Patience};

/// Answers under way at once; what comes more waits in MPI.
const ANSWERS_MAX: usize = 16;

/// How long closing waits for answers that readers are still taking.
const CLOSING_PATIENCE: Duration = Duration::from_secs(5);

/// Longest status; a longer one is cut.
pub(super) const STATUS_BYTES_MAX: usize = 256;

/// Answers requests until the fabric is closed or the world ends.
pub(super) fn run(shared: &Arc<Shared>) {
    let mut desk = Desk {
        shared: Arc::clone(shared),
        requests: Vec::new(),
        answers: Vec::new(),
    };
    let mut patience = Patience::new();
    let mut closing: Option<Instant> = None;
    loop {
        match desk.turn() {
            Ok(true) => patience = Patience::new(),
            Ok(false) => patience.pause(),
            Err(reason) => {
                // The world is one fate: whoever watches over MPI ends it.
                tracing::error!(reason, "the kv transport over MPI ended");
                return;
            }
        }
        if shared.is_closed() {
            let deadline = *closing.get_or_insert_with(|| Instant::now() + CLOSING_PATIENCE);
            if desk.is_idle() || Instant::now() >= deadline {
                return;
            }
        }
    }
}

/// What is under way.
struct Desk {
    shared: Arc<Shared>,
    requests: Vec<(usize, Flight)>,
    answers: Vec<Answer>,
}

impl Desk {
    /// Looks after everything once; whether anything moved.
    fn turn(&mut self) -> Result<bool, String> {
        self.shared.mail.check()?;
        let mut moved = self.take_requests()?;
        moved |= self.read_requests()?;
        let before = self.answers.len();
        for answer in &mut self.answers {
            moved |= answer.advance(&self.shared)?;
        }
        self.answers.retain(|answer| !answer.is_over());
        moved |= self.answers.len() != before;
        moved |= self.drain()?;
        Ok(moved)
    }

    fn is_idle(&self) -> bool {
        self.requests.is_empty() && self.answers.is_empty() && self.shared.drains().is_empty()
    }

    fn take_requests(&mut self) -> Result<bool, String> {
        let mail = &self.shared.mail;
        let mut moved = false;
        while self.requests.len() + self.answers.len() < ANSWERS_MAX {
            let Some((from, bytes)) = mail.arrived(REQUEST)? else {
                break;
            };
            if bytes > REQUEST_BYTES_MAX {
                return Err(format!(
                    "rank {from} of the world sent a request of {bytes} bytes"
                ));
            }
            let flight = mail.expect(from, REQUEST, vec![0; bytes])?;
            self.requests.push((from, flight));
            moved = true;
        }
        Ok(moved)
    }

    fn read_requests(&mut self) -> Result<bool, String> {
        let mut moved = false;
        for (from, mut flight) in std::mem::take(&mut self.requests) {
            if !flight.test()? {
                self.requests.push((from, flight));
                continue;
            }
            moved = true;
            if let Some(answer) = Answer::begin(&self.shared, from, &flight.into_bytes())? {
                self.answers.push(answer);
            }
        }
        Ok(moved)
    }

    fn drain(&mut self) -> Result<bool, String> {
        let mut drains = std::mem::take(&mut *self.shared.drains());
        let mut moved = false;
        for drain in &mut drains {
            moved |= drain.advance(&self.shared)?;
        }
        for over in drains.extract_if(.., |drain| drain.is_over()) {
            self.shared.give_tag_back(over.tag);
        }
        self.shared.drains().append(&mut drains);
        Ok(moved)
    }
}

/// An answer under way.
struct Answer {
    to: usize,
    tag: i32,
    source: Option<File>,
    ranges: VecDeque<Range<u64>>,
    flights: VecDeque<Flight>,
}

impl Answer {
    /// Sends the status. `None` where the request does not even say how to answer it.
    fn begin(shared: &Shared, to: usize, request: &[u8]) -> Result<Option<Self>, String> {
        let Some(request) = Request::decode(request) else {
            tracing::warn!(rank = to, "a kv request over MPI is not understood");
            return Ok(None);
        };
        if !(FIRST_TAG + 1..=LAST_TAG).contains(&request.tag) {
            tracing::warn!(
                rank = to,
                tag = request.tag,
                "a kv request over MPI has no tag"
            );
            return Ok(None);
        }
        let source = open(shared, &request);
        let status = source.as_ref().err().cloned().unwrap_or_default();
        let status = status.as_bytes()[..status.len().min(STATUS_BYTES_MAX)].to_vec();
        let flight = shared.mail.post(to, request.tag, Arc::new(status))?;
        let source = source.ok();
        let ranges = source.is_some().then_some(request.ranges);
        Ok(Some(Self {
            to,
            tag: request.tag,
            source,
            ranges: ranges.unwrap_or_default().into(),
            flights: VecDeque::from([flight]),
        }))
    }

    fn advance(&mut self, shared: &Shared) -> Result<bool, String> {
        let mut moved = false;
        while let Some(first) = self.flights.front_mut()
            && first.test()?
        {
            self.flights.pop_front();
            moved = true;
        }
        while self.flights.len() < CHUNKS_AHEAD
            && let Some(chunk) = self.next_chunk()?
        {
            let flight = shared.mail.post(self.to, self.tag, Arc::new(chunk))?;
            self.flights.push_back(flight);
            moved = true;
        }
        Ok(moved)
    }

    fn is_over(&self) -> bool {
        self.flights.is_empty() && self.ranges.is_empty()
    }

    /// The next bytes of the ranges, [`CHUNK_BYTES`] or what is left.
    fn next_chunk(&mut self) -> Result<Option<Vec<u8>>, String> {
        let Some(source) = self.source.as_ref().filter(|_| !self.ranges.is_empty()) else {
            return Ok(None);
        };
        let mut chunk = Vec::with_capacity(CHUNK_BYTES);
        while chunk.len() < CHUNK_BYTES
            && let Some(range) = self.ranges.front_mut()
        {
            let room = (CHUNK_BYTES - chunk.len()) as u64;
            let part = range.start..range.end.min(range.start.saturating_add(room));
            let start = chunk.len();
            let length = usize::try_from(part.end - part.start).unwrap_or(CHUNK_BYTES);
            chunk.resize(start + length, 0);
            source
                .read_exact_at(&mut chunk[start..], part.start)
                .map_err(|error| format!("reading an arena: {error}"))?;
            range.start = part.end;
            if range.is_empty() {
                self.ranges.pop_front();
            }
        }
        Ok(Some(chunk))
    }
}

/// The file behind an arena, if all that is asked for lies within.
fn open(shared: &Shared, request: &Request) -> Result<File, String> {
    let exported = shared.exported();
    let arena = usize::try_from(request.arena)
        .ok()
        .and_then(|index| exported.get(index))
        .ok_or_else(|| format!("there is no arena {}", request.arena))?;
    let bytes = arena.bytes() as u64;
    let within = |range: &Range<u64>| range.start < range.end && range.end <= bytes;
    if !request.ranges.iter().all(within) {
        return Err(format!("a range is not within the arena's {bytes} bytes"));
    }
    let total = request.ranges.iter().fold(0_u64, |sum, range| {
        sum.saturating_add(range.end - range.start)
    });
    if total > BATCH_BYTES_MAX as u64 {
        return Err(format!(
            "{total} bytes are more than one request may ask for"
        ));
    }
    let file = arena.file().ok_or("it is in no file")?.try_clone();
    file.map_err(|error| error.to_string())
}

/// The rest of an answer that its reader has given up: it is received and forgotten, or the sender would wait for ever.
#[derive(Debug)]
pub(super) struct Drain {
    pub(super) from: usize,
    pub(super) tag: i32,
    /// Whether the status has come and was good.
    pub(super) begun: bool,
    /// Expected already, in order.
    pub(super) flights: VecDeque<Flight>,
    /// Bytes that are not even expected yet.
    pub(super) left: usize,
}

impl Drain {
    fn is_over(&self) -> bool {
        self.flights.is_empty() && self.left == 0
    }

    fn advance(&mut self, shared: &Shared) -> Result<bool, String> {
        let mut moved = false;
        while let Some(first) = self.flights.front_mut()
            && first.test()?
        {
            if !self.begun {
                self.begun = true;
                if first.received() > 0 {
                    self.left = 0;
                }
            }
            self.flights.pop_front();
            moved = true;
        }
        while self.begun && self.left > 0 && self.flights.len() < CHUNKS_AHEAD {
            let next = self.left.min(CHUNK_BYTES);
            let flight = shared.mail.expect(self.from, self.tag, vec![0; next])?;
            self.left -= next;
            self.flights.push_back(flight);
            moved = true;
        }
        Ok(moved)
    }
}
