//! The transceivers of an instance's ranks as one: one epoch, one secret, one list of endpoints in every ticket.
//!
//! The leading rank starts first and says on what terms the others follow; their answers say how they are reached. What
//! goes on between the desks is `desk/ranks.rs`.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::inbox::Command;
use super::state::{Nonce, RankRecord};
use super::{Transceiver, TransceiverParams, TransceiverStartError};
use crate::handoff::HandoffSink;
use crate::model::Model;

/// What a rank that follows has to know; travels among the ranks of one instance only.
#[derive(Debug, Serialize, Deserialize)]
struct GroupTerms {
    instance: String,
    epoch: u64,
    /// Proves to the leading rank that a report comes from one of its own.
    secret: Nonce,
    leader: RankRecord,
    /// The leading rank's addresses, for ranks of its own machine.
    bind_host: String,
    advertise_host: String,
}

impl Transceiver {
    /// Starts the leading rank's transceiver and those of the ranks that follow its model, if there are any.
    ///
    /// # Errors
    /// When one of them cannot be started.
    pub fn lead(
        params: TransceiverParams,
        model: &mut dyn Model,
        sink: HandoffSink,
    ) -> Result<Self, TransceiverStartError> {
        let page = params.layout.page;
        let (bind_host, advertise_host) = (params.bind_host.clone(), params.advertise_host.clone());
        let mut leader = Self::start(params, sink)?;
        if leader.layout.side.ranks() == 1 {
            leader.info.set_card(&leader.template);
            return Ok(leader);
        }
        let terms = leader.take_lead(bind_host, advertise_host)?;
        let answers = model
            .join_handoff(page, &terms)
            .map_err(TransceiverStartError::Ranks)?;
        leader.joined(&answers)?;
        leader.info.set_card(&leader.template);
        Ok(leader)
    }

    /// Makes this the leading rank's. Returns the terms on which the others follow.
    pub(super) fn take_lead(
        &self,
        bind_host: String,
        advertise_host: String,
    ) -> Result<Vec<u8>, TransceiverStartError> {
        let secret = Nonce::random();
        let ranks = self.layout.side.ranks();
        // A desk that has ended gives nothing to follow; the first hand-off says so.
        drop(self.inbox.command(Command::Lead { ranks, secret }));
        let terms = GroupTerms {
            instance: self.template.instance.clone(),
            epoch: self.template.epoch,
            secret,
            leader: self.template.ranks[0].clone(),
            bind_host,
            advertise_host,
        };
        serde_json::to_vec(&terms).map_err(TransceiverStartError::Terms)
    }

    /// Has tickets name the ranks that follow, from their answers.
    pub(super) fn joined(&mut self, answers: &[Vec<u8>]) -> Result<(), TransceiverStartError> {
        for answer in answers {
            let record = serde_json::from_slice(answer).map_err(TransceiverStartError::Terms)?;
            self.template.ranks.push(record);
        }
        let (there, ranks) = (self.template.ranks.len(), self.layout.side.ranks());
        if there == ranks {
            Ok(())
        } else {
            Err(TransceiverStartError::Missing { there, ranks })
        }
    }

    /// Starts the transceiver of a rank that follows, on the leading one's terms. Returns it with how it is reached.
    ///
    /// # Errors
    /// When no transport can be started, or the terms are not understood.
    pub(crate) fn follow(
        params: TransceiverParams,
        terms: &[u8],
        sink: HandoffSink,
    ) -> Result<(Self, Vec<u8>), TransceiverStartError> {
        let terms: GroupTerms =
            serde_json::from_slice(terms).map_err(TransceiverStartError::Terms)?;
        let follower = Self::start(on_terms(params, &terms), sink)?;
        let record = follower.report_to(terms)?;
        Ok((follower, record))
    }

    /// Has this one's desk report to the leading rank's. Returns how it is reached.
    fn report_to(&self, terms: GroupTerms) -> Result<Vec<u8>, TransceiverStartError> {
        let (leader, secret) = (terms.leader, terms.secret);
        // As above.
        drop(self.inbox.command(Command::Follow { leader, secret }));
        serde_json::to_vec(&self.template.ranks[0]).map_err(TransceiverStartError::Terms)
    }
}

/// A rank's own params, on the leading rank's terms.
fn on_terms(mut params: TransceiverParams, terms: &GroupTerms) -> TransceiverParams {
    params.instance.clone_from(&terms.instance);
    params.epoch = Some(terms.epoch);
    let own: Option<IpAddr> = params.bind_host.parse().ok();
    if own.is_some_and(|own| own.is_loopback()) {
        // The group meets on this machine alone; generation servers may come from others.
        params.bind_host.clone_from(&terms.bind_host);
        params.advertise_host.clone_from(&terms.advertise_host);
    }
    params
}
