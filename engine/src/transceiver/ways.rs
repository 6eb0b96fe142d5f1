//! The ways of a fetch: over which of our transports all the ranks that it takes from are reached, best first.
//!
//! A fetch goes over one transport, because a page is with one transport at a time: over the first of ours that all the
//! ranks it takes from have too, and that reaches them all.
//!
//! Each is judged when it is asked for and not before: that may take a look at files, and mostly the first way is gone, to those
//! who are connected already.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::state::{RankRecord, printable};
use crate::handoff::HandoffError;
use crate::transport::{EndpointRecord, PeerId, Transport};

/// One way to all ranks of a fetch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    /// Which of our transports.
    pub(super) wire: usize,
    /// One endpoint a rank, in the order in which they were asked for.
    pub(super) endpoints: Vec<EndpointRecord>,
}

/// Connections that we opened. Only the desk changes it; the engine thread has those wake up whom a fetch will need, before the desk
/// itself is awake.
#[derive(Debug, Default)]
pub(super) struct Opened(Mutex<HashMap<EndpointRecord, PeerId>>);

impl Opened {
    pub(super) fn get(&self, endpoint: &EndpointRecord) -> Option<PeerId> {
        self.0.lock().get(endpoint).copied()
    }

    pub(super) fn insert(&self, endpoint: EndpointRecord, peer: PeerId) {
        self.0.lock().insert(endpoint, peer);
    }

    pub(super) fn remove(&self, endpoint: &EndpointRecord) {
        self.0.lock().remove(endpoint);
    }

    pub(super) fn remove_peer(&self, peer: PeerId) {
        self.0.lock().retain(|_, known| *known != peer);
    }

    /// Who is connected of those that a way leads to.
    pub(super) fn towards(&self, way: &Way) -> Vec<PeerId> {
        let peers = way.endpoints.iter().filter_map(|to| self.get(to));
        peers.collect()
    }
}

/// What ways there may be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ground<'a> {
    pub(super) transports: &'a [Arc<dyn Transport>],
    /// Whoever is connected can be reached.
    pub(super) opened: &'a Opened,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Ways {
    /// Of each rank, in the order in which they were asked for.
    ranks: Vec<Vec<EndpointRecord>>,
    /// How many transports have been judged.
    judged: usize,
    /// The last of these, where it leads there and has not been taken.
    ahead: Option<Way>,
}

impl Ways {
    /// To these ranks of those that there are.
    pub(super) fn to(records: &[RankRecord], ranks: &[usize]) -> Result<Self, HandoffError> {
        let endpoints = |&rank: &usize| {
            let record = records.iter().find(|record| record.rank as usize == rank);
            let record =
                record.ok_or_else(|| HandoffError::State(format!("no endpoint of rank {rank}")));
            record.map(|record| record.endpoints.clone())
        };
        let ranks: Result<_, _> = ranks.iter().map(endpoints).collect();
        Ok(Self {
            ranks: ranks?,
            judged: 0,
            ahead: None,
        })
    }

    /// The next one, if there is one more.
    pub(super) fn peek(&mut self, ground: Ground<'_>) -> Option<&Way> {
        while self.ahead.is_none() && self.judged < ground.transports.len() {
            self.ahead = self.over(self.judged, ground);
            self.judged += 1;
        }
        self.ahead.as_ref()
    }

    /// The same, taken.
    pub(super) fn next(&mut self, ground: Ground<'_>) -> Option<Way> {
        self.peek(ground)?;
        self.ahead.take()
    }

    /// The last one that is left: the one that needs least in common.
    pub(super) fn last(mut self, ground: Ground<'_>) -> Option<Way> {
        std::iter::from_fn(|| self.next(ground)).last()
    }

    /// The next one, left there; an error that names both sides' transports when there is none.
    pub(super) fn expect(&mut self, ground: Ground<'_>) -> Result<&Way, HandoffError> {
        self.peek(ground);
        self.ahead
            .as_ref()
            .ok_or_else(|| nothing_in_common(&self.ranks, ground))
    }

    /// The one over this transport.
    fn over(&self, wire: usize, ground: Ground<'_>) -> Option<Way> {
        let transport = &ground.transports[wire];
        let reached = self.ranks.iter().map(|endpoints| {
            let mut endpoints = endpoints.iter();
            endpoints.find(|endpoint| {
                endpoint.transport == transport.capability().name
                    && (ground.opened.get(endpoint).is_some() || transport.reaches(endpoint))
            })
        });
        let endpoints: Option<Vec<_>> = reached.map(Option::<&_>::cloned).collect();
        endpoints.map(|endpoints| Way { wire, endpoints })
    }
}

fn nothing_in_common(ranks: &[Vec<EndpointRecord>], ground: Ground<'_>) -> HandoffError {
    let transports = ground.transports.iter();
    let here: Vec<_> = transports.map(|t| t.capability().name).collect();
    let endpoints = ranks.iter().flatten();
    let mut there: Vec<_> = endpoints.map(|e| printable(&e.transport)).collect();
    there.sort();
    there.dedup();
    HandoffError::State(format!(
        "no common transport: {} here, {} there",
        here.join(", "),
        there.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::link::on_loopback;
    use crate::transport::{TransportSink, shm, tcp};

    fn transports() -> Vec<Arc<dyn Transport>> {
        let sink: TransportSink = Arc::new(|_| {});
        vec![
            Arc::new(shm::start(on_loopback(), Arc::clone(&sink)).unwrap()),
            Arc::new(tcp::start(on_loopback(), sink).unwrap()),
        ]
    }

    fn record(rank: u32, endpoints: Vec<EndpointRecord>) -> RankRecord {
        RankRecord { rank, endpoints }
    }

    #[test]
    fn each_way_leads_to_all_and_whoever_is_connected_is_not_judged() {
        let (transports, opened) = (transports(), Opened::default());
        let ground = Ground {
            transports: &transports,
            opened: &opened,
        };
        let all: Vec<_> = transports.iter().map(|t| t.endpoint()).collect();
        // Of another host, as far as can be told.
        let mut far = all.clone();
        far[0].metadata = "00".to_owned();
        let records = [record(0, all.clone()), record(1, far.clone())];
        let wires = |mut ways: Ways| -> Vec<_> {
            std::iter::from_fn(|| ways.next(ground).map(|way| way.wire)).collect()
        };
        assert_eq!(wires(Ways::to(&records, &[0]).unwrap()), [0, 1]);
        assert_eq!(wires(Ways::to(&records, &[0, 1]).unwrap()), [1]);
        let peer = PeerId(7);
        opened.insert(far[0].clone(), peer);
        let mut ways = Ways::to(&records, &[0, 1]).unwrap();
        let first = ways.expect(ground).unwrap().clone();
        assert_eq!(first.endpoints, [all[0].clone(), far[0].clone()]);
        assert_eq!(opened.towards(&first), [peer]);
        // It was looked at and not taken.
        assert_eq!(ways.peek(ground), Some(&first));
        assert_eq!(wires(ways), [0, 1]);
        let last = Ways::to(&records, &[1]).unwrap().last(ground).unwrap();
        assert_eq!((last.wire, opened.towards(&last)), (1, Vec::new()));
        opened.remove_peer(peer);
        assert_eq!(wires(Ways::to(&records, &[1]).unwrap()), [1]);
    }

    #[test]
    fn where_nothing_leads_there_both_sides_are_named() {
        let (transports, opened) = (transports(), Opened::default());
        let ground = Ground {
            transports: &transports[..1],
            opened: &opened,
        };
        let records = [record(3, vec![transports[1].endpoint()])];
        let mut ways = Ways::to(&records, &[3]).unwrap();
        let none = ways.expect(ground).unwrap_err().to_string();
        assert!(
            none.ends_with("no common transport: shm here, tcp there"),
            "{none}"
        );
        let unknown = Ways::to(&records, &[4]).unwrap_err().to_string();
        assert!(unknown.ends_with("no endpoint of rank 4"), "{unknown}");
    }
}
