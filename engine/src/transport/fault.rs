//! Faults on demand: what a bad wire or a bad peer does, for tests of this process and of whole deployments.
//!
//! A plan is plain data given at construction. [`FaultPlan::from_environment`] reads it from
//! `BATON_TEST_TRANSPORT_FAULT`, a test hook that whoever builds the transceiver may honour; nothing reads the
//! variable behind its back. The text is a comma-separated list: `flip_byte=3,every=2`.

use std::collections::HashMap;
use std::sync::Mutex;

use super::TransferId;

/// Environment variable with a fault plan; a test hook.
pub const FAULT_VARIABLE: &str = "BATON_TEST_TRANSPORT_FAULT";

/// Transfers whose progress is remembered at most; older ones start again at byte 0.
const TRACKED_TRANSFERS_MAX: usize = 4096;

/// What goes wrong with outgoing transfers. Byte positions count a transfer's payload from 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultPlan {
    /// Applies to every n-th outgoing transfer; 1 is all of them.
    pub every: u64,
    /// Inverts this byte on the wire.
    pub flip_byte: Option<u64>,
    /// Cuts the connection before this byte.
    pub cut_after_bytes: Option<u64>,
    /// Goes silent before this byte, with the connection open.
    pub stall_after_bytes: Option<u64>,
    /// Pieces carry the epoch of an earlier process.
    pub stale_epoch: bool,
    /// Requests carry a nonce that is not the lease's.
    pub forged_nonce: bool,
}

impl Default for FaultPlan {
    fn default() -> Self {
        Self {
            every: 1,
            flip_byte: None,
            cut_after_bytes: None,
            stall_after_bytes: None,
            stale_epoch: false,
            forged_nonce: false,
        }
    }
}

/// Why a plan's text was not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{FAULT_VARIABLE}: `{item}` is not a fault\nhint: flip_byte=N, cut_after_bytes=N, stall_after_bytes=N, stale_epoch, forged_nonce, every=N (N ≥ 1), joined by commas"
)]
pub struct FaultSyntaxError {
    item: String,
}

impl FaultPlan {
    /// Whether nothing goes wrong.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self
            == Self {
                every: self.every,
                ..Self::default()
            }
    }

    /// Reads a plan's text; the empty text is the empty plan.
    ///
    /// # Errors
    /// When an item is not a fault.
    pub fn parse(text: &str) -> Result<Self, FaultSyntaxError> {
        let mut plan = Self::default();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            let wrong = || FaultSyntaxError {
                item: item.to_owned(),
            };
            let (name, value) = match item.split_once('=') {
                Some((name, value)) => (name, Some(value.parse::<u64>().map_err(|_| wrong())?)),
                None => (item, None),
            };
            match (name, value) {
                ("every", Some(n)) if n > 0 => plan.every = n,
                ("flip_byte", Some(n)) => plan.flip_byte = Some(n),
                ("cut_after_bytes", Some(n)) => plan.cut_after_bytes = Some(n),
                ("stall_after_bytes", Some(n)) => plan.stall_after_bytes = Some(n),
                ("stale_epoch", None) => plan.stale_epoch = true,
                ("forged_nonce", None) => plan.forged_nonce = true,
                _ => return Err(wrong()),
            }
        }
        Ok(plan)
    }

    /// Reads the plan from [`FAULT_VARIABLE`], with a warning when it asks for any fault.
    ///
    /// # Errors
    /// When the variable is set to something else than a plan.
    pub fn from_environment() -> Result<Self, FaultSyntaxError> {
        let text = std::env::var(FAULT_VARIABLE).unwrap_or_default();
        let plan = Self::parse(&text)?;
        if !plan.is_empty() {
            tracing::warn!(plan = %text, "transport faults are switched on by a test variable");
        }
        Ok(plan)
    }
}

/// What to do at a byte of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    Flip,
    Cut,
    Stall,
}

/// A plan with the count of each transfer's bytes so far.
#[derive(Debug)]
pub(crate) struct Faults {
    plan: FaultPlan,
    progress: Mutex<Progress>,
}

#[derive(Debug, Default)]
struct Progress {
    begun: u64,
    transfers: HashMap<TransferId, (u64, u64)>,
}

impl Faults {
    pub(crate) fn new(plan: FaultPlan) -> Self {
        Self {
            plan,
            progress: Mutex::default(),
        }
    }

    /// The first fault among the next `length` payload bytes of a transfer, with its offset; counts the bytes.
    pub(crate) fn next(&self, transfer: TransferId, length: usize) -> Option<(usize, Fault)> {
        if self.plan.is_empty() {
            return None;
        }
        let mut progress = self.progress.lock().unwrap_or_else(|e| e.into_inner());
        if progress.transfers.len() >= TRACKED_TRANSFERS_MAX {
            progress.transfers.clear();
        }
        if !progress.transfers.contains_key(&transfer) {
            progress.begun += 1;
            let ordinal = progress.begun;
            progress.transfers.insert(transfer, (ordinal, 0));
        }
        let (ordinal, sent) = progress.transfers.get_mut(&transfer)?;
        let start = *sent;
        *sent += length as u64;
        if !ordinal.is_multiple_of(self.plan.every) {
            return None;
        }
        [
            (self.plan.flip_byte, Fault::Flip),
            (self.plan.cut_after_bytes, Fault::Cut),
            (self.plan.stall_after_bytes, Fault::Stall),
        ]
        .into_iter()
        .filter_map(|(at, fault)| {
            let offset = usize::try_from(at?.checked_sub(start)?).ok()?;
            (offset < length).then_some((offset, fault))
        })
        .min_by_key(|(offset, _)| *offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plans_and_names_what_is_none() {
        let plan = FaultPlan::parse("flip_byte=3, every=2").unwrap();
        assert_eq!(plan.flip_byte, Some(3));
        assert_eq!(plan.every, 2);
        assert!(FaultPlan::parse("").unwrap().is_empty());
        assert!(FaultPlan::parse("every=4").unwrap().is_empty());
        for wrong in [
            "flip",
            "flip_byte",
            "flip_byte=x",
            "every=0",
            "stale_epoch=1",
        ] {
            let error = FaultPlan::parse(wrong).unwrap_err();
            assert!(error.to_string().contains(&format!("`{wrong}`")), "{error}");
        }
    }

    #[test]
    fn a_fault_hits_one_byte_of_every_nth_transfer() {
        let faults = Faults::new(FaultPlan::parse("flip_byte=150,every=2").unwrap());
        let hits = |transfer| -> Vec<_> {
            (0..3)
                .map(|_| faults.next(TransferId(transfer), 100))
                .collect()
        };
        assert_eq!(hits(7), [None, None, None]);
        assert_eq!(hits(8), [None, Some((50, Fault::Flip)), None]);
        assert_eq!(hits(9), [None, None, None]);
    }
}
