//! How the ranks of a world find rank 0: through their PMIx server, or on a port that both sides derive from the job's
//! identity, with a secret from the environment.
//!
//! Whoever answers at an address has to prove the secret (`channel.rs`), so a wrong address, a neighbour's job on the
//! derived port or a leftover process only costs a try. Every wait ends, and says at 5, 15 and 60 s what it waits for.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant as Moment};

use anyhow::{Context, anyhow};
use baton_engine::secret::Secret;
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep};
use xxhash_rust::xxh3::xxh3_64;

use super::channel::{self, Channel, ChannelError};
use super::protocol::Hello;
use crate::exit::{Outcome, WithOutcome};
use crate::marks::Marks;
use crate::pmix::{Pmix, PmixError};
use crate::rank::{RankFacts, Starter};
use crate::reach;

/// The job's secret in the environment: 64 hexadecimal digits, the same for all ranks.
pub(crate) const SECRET_VARIABLE: &str = "BATON_JOB_SECRET";
/// Under this key rank 0 publishes where it listens.
const KEY: &str = "baton.world";
/// Derived ports lie below what systems give to clients.
const PORT_FIRST: u64 = 20_000;
const PORT_COUNT: u64 = 12_000;
/// How many derived ports are tried: some may belong to somebody else.
const PORT_TRIES: u64 = 8;
/// Between two rounds of tries; grows to the second one.
const RETRY_MIN: Duration = Duration::from_millis(50);
const RETRY_MAX: Duration = Duration::from_secs(1);

/// What all ranks of a world agree on before they meet.
#[derive(Debug)]
pub(crate) struct Ground {
    /// Names job and step.
    pub(crate) name: String,
    /// Ranks in the world.
    pub(crate) size: u32,
    pmix: Option<Pmix>,
    secret: Option<Secret>,
}

impl Ground {
    /// Looks at what is there. Blocks while PMIx is asked.
    ///
    /// # Errors
    /// When ranks could find each other only without proof, or not at all.
    pub(crate) fn explore(facts: &RankFacts) -> anyhow::Result<Self> {
        let secret = match std::env::var(SECRET_VARIABLE) {
            Ok(text) => Some(
                Secret::from_hex(text.trim())
                    .with_context(|| SECRET_VARIABLE)
                    .outcome(Outcome::Usage)?,
            ),
            Err(_) => None,
        };
        let alone = facts.size == Some(1);
        let pmix = if facts.pmix && !alone {
            open_pmix(secret.is_some())?
        } else {
            None
        };
        let size = match (facts.size, &pmix) {
            (Some(size), _) => size,
            (None, Some(pmix)) => pmix.job_size(),
            (None, None) => {
                return Err(anyhow!(
                    "this is rank {} of a world whose size nobody tells\nhint: start it with srun --mpi=pmix, or with an mpirun that sets a size",
                    facts.rank
                ))
                .outcome(Outcome::Unavailable);
            }
        };
        if let Some(pmix) = &pmix
            && pmix.rank() != facts.rank
        {
            return Err(anyhow!(
                "the environment says that this is rank {}, the PMIx server that it is rank {}\nhint: start every rank with srun or mpirun itself, not from a shell that inherited another rank's variables",
                facts.rank,
                pmix.rank()
            ))
            .outcome(Outcome::Usage);
        }
        if let Some(pmix) = &pmix
            && facts.size.is_some_and(|size| size != pmix.job_size())
        {
            tracing::warn!(
                environment = size,
                pmix = pmix.job_size(),
                "the environment and the PMIx server tell different sizes of the world; is SLURM_NTASKS set by hand?"
            );
        }
        if !alone && pmix.is_none() && secret.is_none() {
            // All ranks are in the same place; one of each node says so.
            let error = if facts.local_rank.unwrap_or(0) == 0 {
                no_way(facts)
            } else {
                anyhow!("as the first rank of this node says")
            };
            return Err(error).outcome(Outcome::Unavailable);
        }
        Ok(Self {
            name: name(facts),
            size,
            pmix,
            secret,
        })
    }

    /// Rank 0: listens, and tells the others where. Blocks while PMIx is told.
    ///
    /// # Errors
    /// When no port can be had, or PMIx refuses.
    pub(crate) fn host(self, facts: &RankFacts) -> anyhow::Result<(std::net::TcpListener, Secret)> {
        let one_host = self.size == 1 || facts.hosts.len() == 1;
        let secret = self.secret.clone().unwrap_or_else(Secret::generate);
        let derived: Vec<u16> = match &self.secret {
            Some(_) if self.size > 1 => ports(&self.name).collect(),
            _ => Vec::new(),
        };
        let bind: IpAddr = if one_host {
            [127, 0, 0, 1].into()
        } else {
            [0, 0, 0, 0].into()
        };
        let listener = derived
            .iter()
            .find_map(|port| std::net::TcpListener::bind((bind, *port)).ok());
        let listener = match listener {
            Some(listener) => listener,
            None if derived.is_empty() || self.pmix.is_some() => {
                std::net::TcpListener::bind((bind, 0))
                    .context("cannot listen for the other ranks")
                    .outcome(Outcome::Address)?
            }
            None => {
                return Err(anyhow!(
                    "all of this job's ports are taken on this machine: {derived:?}\nhint: see who listens there (ss -ltnp); a leftover of an earlier run?"
                ))
                .outcome(Outcome::Address);
            }
        };
        listener.set_nonblocking(true).outcome(Outcome::Address)?;
        let port = listener.local_addr().outcome(Outcome::Address)?.port();
        if let Some(pmix) = self.pmix {
            let board = Board {
                addresses: own_addresses(one_host, port),
                secret: secret.to_hex(),
            };
            pmix.publish(KEY, &board.to_text())
                .outcome(Outcome::Unavailable)?;
            leave_pmix(pmix);
        }
        Ok((listener, secret))
    }

    /// Another rank: where rank 0 may be, and the secret. Blocks until PMIx knows.
    ///
    /// # Errors
    /// When rank 0 tells nothing by the deadline.
    pub(crate) fn find(
        self,
        facts: &RankFacts,
        deadline: Moment,
    ) -> anyhow::Result<(Vec<String>, Secret)> {
        if let Some(pmix) = self.pmix {
            let fetched = pmix.fetch(0, KEY, deadline);
            leave_pmix(pmix);
            let text = fetched
                .map_err(|error| {
                    anyhow!(
                        "rank 0{} has not told where it is: {error}\nhint: its own last lines say why",
                        on(facts.host_of(0))
                    )
                })
                .outcome(Outcome::TimedOut)?;
            let board = Board::from_text(&text)?;
            return Ok((board.addresses, Secret::from_hex(&board.secret)?));
        }
        let host = facts
            .host_of(0)
            .or_else(|| facts.hosts.first().map(String::as_str));
        let (Some(host), Some(secret)) = (host, self.secret) else {
            return Err(no_way(facts)).outcome(Outcome::Unavailable);
        };
        let local = facts.hosts.len() == 1;
        let host = if local { "127.0.0.1" } else { host };
        Ok((
            ports(&self.name)
                .map(|port| format!("{host}:{port}"))
                .collect(),
            secret,
        ))
    }
}

fn open_pmix(has_other_way: bool) -> anyhow::Result<Option<Pmix>> {
    match Pmix::open() {
        Ok(pmix) => Ok(Some(pmix)),
        Err(error @ PmixError::Library { .. }) if !has_other_way => Err(anyhow!(
            "{error}\nhint: or set {SECRET_VARIABLE}, the same for all ranks, to meet without PMIx"
        ))
        .outcome(Outcome::Unavailable),
        Err(error) if !has_other_way => Err(error).outcome(Outcome::Unavailable),
        Err(error) => {
            tracing::debug!(%error, "going on without PMIx");
            Ok(None)
        }
    }
}

/// A rank that ends without taking leave takes mpirun's whole world with it.
fn leave_pmix(pmix: Pmix) {
    if let Err(error) = pmix.finalize() {
        tracing::warn!(%error, "cannot take leave of the PMIx server");
    }
}

fn no_way(facts: &RankFacts) -> anyhow::Error {
    let remedy = match facts.starter {
        Starter::Srun => "add --mpi=pmix to srun",
        _ => "start them with an mpirun that brings PMIx (Open MPI, PRRTE)",
    };
    anyhow!(
        "the ranks cannot find and trust each other: {} gave rank {} no PMIx server, and {SECRET_VARIABLE} is not set\nhint: {remedy}, or export {SECRET_VARIABLE}=$(openssl rand -hex 32) before starting them",
        facts.starter.command(),
        facts.rank
    )
}

fn on(host: Option<&str>) -> String {
    host.map(|host| format!(" on {host}")).unwrap_or_default()
}

/// Job and step; all ranks of a world see the same, ranks of another world something else.
fn name(facts: &RankFacts) -> String {
    match (&facts.job, &facts.step, &facts.namespace) {
        (Some(job), Some(step), _) => format!("job {job} step {step}"),
        (_, _, Some(namespace)) => format!("world {namespace}"),
        (Some(job), None, None) => format!("job {job}"),
        (None, _, None) => "world".to_owned(),
    }
}

fn ports(name: &str) -> impl Iterator<Item = u16> {
    let first = xxh3_64(name.as_bytes());
    (0..PORT_TRIES).map(move |index| {
        let port = PORT_FIRST + first.wrapping_add(index * 997) % PORT_COUNT;
        u16::try_from(port).expect("the range lies within 16 bits")
    })
}

/// What rank 0 publishes.
#[derive(Debug, PartialEq, Eq)]
struct Board {
    addresses: Vec<String>,
    secret: String,
}

impl Board {
    fn to_text(&self) -> String {
        format!("{} {}", self.secret, self.addresses.join(" "))
    }

    fn from_text(text: &str) -> anyhow::Result<Self> {
        let mut words = text.split(' ').map(str::to_owned);
        let secret = words.next().unwrap_or_default();
        let addresses: Vec<String> = words.collect();
        if addresses.is_empty() {
            return Err(anyhow!(
                "rank 0 runs another version: it published `{}` words",
                text.len()
            ))
            .outcome(Outcome::Failure);
        }
        Ok(Self { addresses, secret })
    }
}

/// Where others may reach this machine, the likeliest first.
fn own_addresses(one_host: bool, port: u16) -> Vec<String> {
    let others = if one_host {
        Vec::new()
    } else {
        reach::addresses()
    };
    others
        .into_iter()
        .chain([IpAddr::from([127, 0, 0, 1])])
        .map(|ip| SocketAddr::new(ip, port).to_string())
        .collect()
}

/// Makes a listener of the async kind.
pub(crate) fn async_listener(listener: std::net::TcpListener) -> anyhow::Result<TcpListener> {
    TcpListener::from_std(listener).outcome(Outcome::Address)
}

/// Connects to rank 0 at the first of these addresses that proves to be it.
///
/// # Errors
/// When none does by the deadline, or rank 0 turns this rank away.
pub(crate) async fn reach(
    addresses: &[String],
    (secret, world): (&Secret, &str),
    hello: &Hello,
    deadline: Instant,
) -> anyhow::Result<Channel> {
    let begun = Instant::now();
    let mut marks = Marks::default();
    let mut mark = marks.advance();
    let mut pause = RETRY_MIN;
    loop {
        let mut last = String::new();
        for address in addresses {
            match channel::connect(address, secret, world, hello).await {
                Ok(channel) => return Ok(channel),
                Err(ChannelError::Refused(reason)) => {
                    return Err(anyhow!("rank 0 turned this rank away: {reason}"))
                        .outcome(Outcome::Usage);
                }
                Err(error) => last = format!("{address}: {error}"),
            }
        }
        if Instant::now() >= deadline {
            return Err(anyhow!(
                "rank 0 was not reached within {} s; tried {}; the last answer was {last}\nhint: its own last lines say why; is a firewall between the nodes?",
                begun.elapsed().as_secs(),
                addresses.join(", ")
            ))
            .outcome(Outcome::TimedOut);
        }
        if begun.elapsed() >= mark {
            tracing::warn!(
                waited_s = begun.elapsed().as_secs(),
                last,
                "waiting for rank 0"
            );
            mark = marks.advance();
        }
        sleep(pause).await;
        pause = (pause * 2).min(RETRY_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rank::{self, Environment};

    #[test]
    fn derived_ports_are_distinct_in_range_and_the_same_on_all_ranks() {
        let one: Vec<u16> = ports("job 7 step 0").collect();
        assert_eq!(one, ports("job 7 step 0").collect::<Vec<_>>());
        assert_ne!(one, ports("job 8 step 0").collect::<Vec<_>>());
        let mut distinct = one.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), one.len());
        assert!(one.iter().all(|port| (20_000..32_000).contains(port)));
    }

    #[test]
    fn the_notice_survives_the_board() {
        let board = Board {
            addresses: vec!["10.0.0.1:5".to_owned(), "127.0.0.1:5".to_owned()],
            secret: "ab".to_owned(),
        };
        assert_eq!(Board::from_text(&board.to_text()).unwrap(), board);
        assert!(Board::from_text("ab").is_err());
    }

    #[test]
    fn ranks_without_pmix_and_secret_are_told_what_to_do() {
        let environment = Environment::from_pairs([
            ("SLURM_JOB_ID", "7"),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", "1"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_NODEID", "0"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "node1"),
        ]);
        let facts = rank::discover(&environment).unwrap();
        assert_eq!(name(&facts), "job 7 step 0");
        let text = no_way(&facts).to_string();
        assert!(
            text.contains("srun") && text.contains("--mpi=pmix") && text.contains(SECRET_VARIABLE),
            "{text}"
        );
    }
}
