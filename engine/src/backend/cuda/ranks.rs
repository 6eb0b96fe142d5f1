//! The GPUs of an instance's ranks, seen by one of them: how they meet, and what they do together on the model's stream.
//!
//! The ranks tell each other over their group what device each has; one that is shared is refused. Then NCCL's communicators are
//! made, one for each stage's sums and one of all ranks for rows between stages, and where a stage's GPUs reach each other's
//! memory, short sums take that way (`one_shot.rs`). `BATON_DEVICE_SUMS=nccl` leaves them to NCCL. Partial sums are of the activations' type, as every
//! activation is: rounding one costs what rounding the residual stream costs anyway; the short way adds them in f32.
//!
//! Invariant: all ranks make the same calls in the same order; recordings that hold them are dropped before the communicators.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::driver::Gpu;
use super::error::CudaError;
use super::nccl::{Communicator, Element, ID_BYTES, Id, Nccl};
use super::one_shot::{Mailbox, OneShot, RANKS_MAX};
use super::peer::HANDLE_BYTES;
use super::tensor::CudaTensor;
use super::watch::Watch;
use super::{CudaBackend, CudaWeight};
use crate::backend::{ActivationDtype, BackendError, RankGroup};
use crate::collective::{Collective, tell_all};
use crate::machine::Processors;

/// `nccl` leaves all sums to NCCL.
const SUMS_VARIABLE: &str = "BATON_DEVICE_SUMS";

/// What a rank tells the others.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Card {
    /// Equal exactly for ranks of one machine; empty when it cannot be told.
    machine: String,
    /// Of the device on its machine.
    place: String,
    /// Lets the others into this rank's mailbox, where it has one.
    mailbox: Option<Vec<u8>>,
    /// From rank 0: of the communicator of all ranks, where there are several stages, then of each stage's, where those have
    /// several ranks.
    ids: Vec<Vec<u8>>,
}

/// Where a rank stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    rank: usize,
    size: usize,
    tensor: usize,
}

impl Standing {
    const fn stages(self) -> usize {
        self.size / self.tensor
    }

    const fn stage(self) -> usize {
        self.rank / self.tensor
    }

    const fn within(self) -> usize {
        self.rank % self.tensor
    }

    const fn members(self) -> Range<usize> {
        let first = self.stage() * self.tensor;
        first..first + self.tensor
    }

    /// Communicators of the instance.
    fn ids(self) -> usize {
        let of_stages = if self.tensor > 1 { self.stages() } else { 0 };
        usize::from(self.stages() > 1) + of_stages
    }

    /// Which is the one of all ranks.
    fn of_all(self) -> Option<usize> {
        (self.stages() > 1).then_some(0)
    }

    /// Which is the one of this rank's stage.
    fn of_stage(self) -> Option<usize> {
        let first = usize::from(self.stages() > 1);
        (self.tensor > 1).then_some(first + self.stage())
    }
}

/// The cards of all ranks; none where one of them does not compute on a GPU. A device that two of them have is refused.
fn cards(said: &[Vec<u8>]) -> Result<Option<Vec<Card>>, CudaError> {
    if said.iter().any(Vec::is_empty) {
        return Ok(None);
    }
    let mut cards: Vec<Card> = Vec::new();
    let mut seen: HashMap<(String, String), usize> = HashMap::new();
    for (rank, said) in said.iter().enumerate() {
        let card: Card = serde_json::from_slice(said)
            .map_err(|error| CudaError::NotServed(format!("what rank {rank} says: {error}")))?;
        let device = (card.machine.clone(), card.place.clone());
        if let Some(other) = seen.insert(device, rank) {
            return Err(CudaError::SharedDevice {
                ranks: [other, rank],
                place: card.place,
            });
        }
        cards.push(card);
    }
    Ok(Some(cards))
}

/// What lets this rank into the mailboxes of its stage; none where they are not on one machine, or one has none.
fn mailboxes(cards: &[Card], standing: Standing) -> Option<Vec<[u8; HANDLE_BYTES]>> {
    let cards = &cards[standing.members()];
    let machine = &cards[0].machine;
    let near = !machine.is_empty() && cards.iter().all(|card| card.machine == *machine);
    let handle = |card: &Card| <[u8; HANDLE_BYTES]>::try_from(card.mailbox.as_deref()?).ok();
    near.then(|| cards.iter().map(handle).collect())?
}

/// The GPUs of the other ranks.
#[derive(Debug)]
pub(super) struct Ranks {
    watch: Watch,
    stage: Option<Arc<Communicator>>,
    all: Option<Arc<Communicator>>,
    short: Option<OneShot>,
    activations: ActivationDtype,
    /// For people.
    description: String,
}

impl Ranks {
    /// Meets the other ranks; none where one of them computes on no GPU.
    pub(super) fn meet(
        (gpu, activations): (&Arc<Gpu>, ActivationDtype),
        group: RankGroup<'_>,
    ) -> Result<Option<Self>, BackendError> {
        let RankGroup { collective, tensor } = group;
        let standing = Standing {
            rank: collective.rank(),
            size: collective.size(),
            tensor,
        };
        let nccl = Nccl::open().map_err(failed)?;
        let mailbox = mailbox(gpu, standing).map_err(failed)?;
        let card = card((nccl, gpu), standing, mailbox.as_ref()).map_err(failed)?;
        let card = serde_json::to_vec(&card).expect("plain data serialises");
        let said = tell_all(collective, &card)?;
        let Some(cards) = cards(&said).map_err(failed)? else {
            tracing::warn!("not all ranks compute on gpus: their sums pass through the hosts");
            return Ok(None);
        };
        let patience = collective.peer_timeout();
        let join = |which: Option<usize>, place: (usize, usize)| {
            let id = which.map(|which| id(&cards[0], which));
            let join = |id| Communicator::join((nccl, gpu), id, place, patience).map(Arc::new);
            id.map(|id| id.and_then(join)).transpose().map_err(failed)
        };
        let all = join(standing.of_all(), (standing.rank, standing.size))?;
        let stage = join(standing.of_stage(), (standing.within(), standing.tensor))?;
        let opened = mailbox
            .zip(mailboxes(&cards, standing))
            .map(|(own, handles)| own.meet(activations, standing.within(), &handles));
        let short = agree(collective, standing, opened)?;
        let way = match short {
            Some(_) => ", short sums in peer memory",
            None => "",
        };
        let description = format!("nccl {}{way}", nccl.version().map_err(failed)?);
        tracing::info!(
            rank = standing.rank,
            way = description,
            "the ranks' gpus have met"
        );
        Ok(Some(Self {
            watch: watch(collective, [&stage, &all], short.as_ref()).map_err(failed)?,
            stage,
            all,
            short,
            activations,
            description,
        }))
    }

    pub(super) fn description(&self) -> &str {
        &self.description
    }

    fn sum(&self, x: &CudaTensor) -> Result<(), CudaError> {
        let (address, count, element) = self.dense(x);
        if let Some(short) = &self.short
            && element != Element::F32
            && OneShot::takes(address, count)
        {
            return short.sum(address, count);
        }
        let stage = self.stage.as_ref();
        let stage = stage.expect("only ranks of a stage sum");
        stage.sum(address, count, element)
    }

    /// Address, elements and their type of a tensor whose rows lie side by side.
    fn dense(&self, x: &CudaTensor) -> (u64, usize, Element) {
        assert!(x.ld == x.cols || x.rows == 1, "rows side by side");
        let element = match self.activations {
            ActivationDtype::F16 if !x.wide => Element::F16,
            ActivationDtype::Bf16 if !x.wide => Element::Bf16,
            _ => Element::F32,
        };
        (x.address(), x.rows * x.cols, element)
    }

    fn all(&self) -> &Communicator {
        let all = self.all.as_ref();
        all.expect("only ranks of several stages hand over rows")
    }
}

fn failed(error: CudaError) -> BackendError {
    error.of("joining the other ranks' gpus")
}

/// Begins to watch over the other ranks. When one is lost, all that waits for them gives up.
fn watch(
    collective: &dyn Collective,
    communicators: [&Option<Arc<Communicator>>; 2],
    short: Option<&OneShot>,
) -> Result<Watch, CudaError> {
    let communicators = communicators.map(Clone::clone);
    let stop = short.map(OneShot::stop);
    let end = move || {
        if let Some(stop) = stop {
            stop.tell();
        }
        let communicators = communicators.iter().flatten();
        communicators.for_each(|communicator| communicator.end());
    };
    Watch::start(collective.lifelines(), collective.peer_timeout(), end)
}

/// This rank's mailbox, where its stage has few ranks.
fn mailbox(gpu: &Arc<Gpu>, standing: Standing) -> Result<Option<Mailbox>, CudaError> {
    let wanted = std::env::var_os(SUMS_VARIABLE).is_none_or(|way| way != "nccl");
    let few = (2..=RANKS_MAX).contains(&standing.tensor);
    let made = (wanted && few).then(|| Mailbox::new(gpu, standing.tensor));
    made.transpose()
}

fn card(
    (nccl, gpu): (Nccl, &Gpu),
    standing: Standing,
    mailbox: Option<&Mailbox>,
) -> Result<Card, CudaError> {
    let count = if standing.rank == 0 {
        standing.ids()
    } else {
        0
    };
    let ids = (0..count).map(|_| Ok(nccl.new_id()?.0.to_vec()));
    // A driver that lets nobody in has no mailbox.
    let handle = mailbox.and_then(|mailbox| mailbox.handle().ok());
    Ok(Card {
        machine: Processors::of_this_process().machine,
        place: gpu.place()?,
        mailbox: handle.map(|handle| handle.to_vec()),
        ids: ids.collect::<Result<_, CudaError>>()?,
    })
}

fn id(leader: &Card, which: usize) -> Result<Id, CudaError> {
    let bytes = leader.ids.get(which).map(Vec::as_slice);
    let id = bytes.and_then(|bytes| <[u8; ID_BYTES]>::try_from(bytes).ok());
    id.map(Id)
        .ok_or_else(|| CudaError::NotServed("rank 0 named no communicator".to_owned()))
}

/// The short way, where every rank of the stage has it.
fn agree(
    collective: &mut dyn Collective,
    standing: Standing,
    opened: Option<Result<OneShot, CudaError>>,
) -> Result<Option<OneShot>, BackendError> {
    let own = opened.and_then(|opened| {
        opened
            .inspect_err(|error| tracing::info!(%error, "the peers' memory is out of reach"))
            .ok()
    });
    let said = tell_all(collective, &[u8::from(own.is_some())])?;
    let agreed = said[standing.members()].iter().all(|word| word == &[1]);
    Ok(own.filter(|_| agreed))
}

impl CudaBackend {
    fn ranks(&self) -> &Ranks {
        let ranks = self.ranks.as_ref();
        ranks.expect("the devices have joined")
    }

    /// A step begins, or one has ended and another is under way.
    pub(super) fn step_goes_on(&self) {
        if let Some(ranks) = &self.ranks {
            ranks.watch.busy();
        }
    }

    /// A step has ended.
    pub(super) fn step_ended(&self) {
        match &self.ranks {
            Some(ranks) if self.flights.is_empty() => ranks.watch.idle(),
            Some(ranks) => ranks.watch.busy(),
            None => {}
        }
    }

    /// What came of a step, unless another rank's loss has spoilt it: then it says that.
    pub(super) fn unless_lost<T>(
        &self,
        outcome: Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let ranks = self.ranks.as_ref();
        match ranks.and_then(|ranks| ranks.watch.trouble()) {
            Some(trouble) => Err(trouble.into()),
            None => outcome,
        }
    }

    pub(super) fn sum_of_ranks(&self, x: &CudaTensor) {
        self.attempt("sum_over_ranks", || self.ranks().sum(x));
    }

    pub(super) fn send_to_rank(&self, x: &CudaTensor, to: usize) {
        self.attempt("send_rows", || {
            let (address, count, element) = self.ranks().dense(x);
            self.ranks().all().send(address, (count, element), to)
        });
    }

    pub(super) fn receive_from_rank(&self, x: &CudaTensor, from: usize) {
        self.attempt("receive_rows", || {
            let (address, count, element) = self.ranks().dense(x);
            self.ranks().all().receive(address, (count, element), from)
        });
    }

    /// Each rank writes its columns into zeros; what all write, summed, is the whole, to the bit.
    pub(super) fn product_of_ranks(
        &self,
        x: &CudaTensor,
        weight: &CudaWeight,
        columns: Range<usize>,
        out: &CudaTensor,
    ) {
        assert!(out.wide && columns.end <= out.cols, "columns of out");
        assert_eq!(columns.len(), weight.rows, "a column a row of the weight");
        self.attempt("linear_over_ranks", || {
            if let Some(buffer) = &out.buffer {
                let bytes = out.rows * out.cols * out.element_bytes();
                self.gpu.zero(buffer.memory(), bytes)?;
            }
            let part = CudaTensor {
                cols: columns.len(),
                offset: columns.start,
                ..out.again()
            };
            self.product(x, (weight, None), (&part, weight.rows))?;
            self.ranks().sum(out)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(machine: &str, place: &str) -> Card {
        Card {
            machine: machine.to_owned(),
            place: place.to_owned(),
            mailbox: Some(vec![7; HANDLE_BYTES]),
            ids: Vec::new(),
        }
    }

    fn said(cards: &[Card]) -> Vec<Vec<u8>> {
        let bytes = |card| serde_json::to_vec(card).unwrap();
        cards.iter().map(bytes).collect()
    }

    #[test]
    fn a_shared_gpu_is_refused_by_name() {
        let two = [card("a", "0000:01:00.0"), card("a", "0000:02:00.0")];
        assert_eq!(cards(&said(&two)).unwrap(), Some(two.to_vec()));
        // The same place on another machine is another device.
        let apart = [card("a", "0000:01:00.0"), card("b", "0000:01:00.0")];
        assert!(cards(&said(&apart)).unwrap().is_some());
        let shared = [&two[..], &two[..1]].concat();
        let error = cards(&said(&shared)).unwrap_err().to_string();
        assert!(
            error.contains("ranks 0 and 2") && error.contains("0000:01:00.0"),
            "{error}"
        );
    }

    #[test]
    fn a_rank_without_a_gpu_leaves_sums_to_the_hosts() {
        let mut words = said(&[card("a", "0000:01:00.0")]);
        words.push(Vec::new());
        assert_eq!(cards(&words).unwrap(), None);
        words[1] = b"nonsense".to_vec();
        assert!(cards(&words).is_err());
    }

    #[test]
    fn mailboxes_are_those_of_a_stage_on_one_machine() {
        let mut all = [
            card("a", "1"),
            card("a", "2"),
            card("b", "1"),
            card("c", "1"),
        ];
        let standing = |rank| Standing {
            rank,
            size: 4,
            tensor: 2,
        };
        assert_eq!(mailboxes(&all, standing(1)).unwrap().len(), 2);
        assert_eq!(mailboxes(&all, standing(2)), None);
        all[0].mailbox = None;
        assert_eq!(mailboxes(&all, standing(1)), None);
    }

    #[test]
    fn every_group_of_ranks_has_a_communicator() {
        let of = |rank, size, tensor| {
            let standing = Standing { rank, size, tensor };
            (standing.ids(), standing.of_all(), standing.of_stage())
        };
        assert_eq!(of(1, 2, 2), (1, None, Some(0)));
        assert_eq!(of(1, 2, 1), (1, Some(0), None));
        assert_eq!(of(3, 4, 2), (3, Some(0), Some(2)));
        let mut leader = card("a", "1");
        leader.ids = vec![vec![1; ID_BYTES], vec![2; 3]];
        assert_eq!(id(&leader, 0).unwrap().0, [1; ID_BYTES]);
        assert!(id(&leader, 1).is_err() && id(&leader, 2).is_err());
    }
}
