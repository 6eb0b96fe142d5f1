//! A coordinator among agents that the tests play themselves, over real connections.

use std::time::Duration;

use baton_engine::ranks::{Fabric, RankCall};
use baton_engine::secret::Secret;
use nix::sys::signal::Signal;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::{Coordinator, Policy, ProxySpec, Timeouts, Verdict, WorldSpec};
use crate::exit::Outcome;
use crate::world::channel::{self, Channel, ChannelError};
use crate::world::instance::InstanceSpec;
use crate::world::protocol::{
    AgentHello, Answer, End, Hello, Order, Program, Report, SlotId, Start, Streams, VERSION,
};

const LIMIT: Duration = Duration::from_secs(20);

/// A world whose coordinator runs and whose agents are the test.
struct World {
    secret: Secret,
    address: String,
    orders: mpsc::Receiver<Order>,
    reports: mpsc::Sender<Report>,
    coordinator: JoinHandle<Verdict>,
}

fn hello(rank: u32, size: u32) -> AgentHello {
    AgentHello {
        rank,
        size,
        host: format!("node{rank}"),
        pid: 1000 + rank,
        version: VERSION,
        environment: vec![("DEVICE".to_owned(), rank.to_string())],
        num_threads: 3,
    }
}

fn instance(label: &str, first: u32, ranks: u32) -> InstanceSpec {
    InstanceSpec {
        label: label.to_owned(),
        first,
        ranks,
        arguments: vec!["serve".to_owned()],
        ..InstanceSpec::proxy()
    }
}

fn spec(size: u32, instances: Vec<InstanceSpec>) -> WorldSpec {
    WorldSpec {
        name: "job 1 step 0".to_owned(),
        size,
        local: false,
        local_environment: Vec::new(),
        public: [127, 0, 0, 1].into(),
        secret: Secret::generate(),
        hosts: (0..size).map(|rank| Some(format!("node{rank}"))).collect(),
        policy: Policy::Deployment,
        instances,
        proxy: None,
        fabric: Fabric::Tcp,
        timeouts: Timeouts {
            start: LIMIT,
            peer: LIMIT,
            drain: LIMIT,
        },
        restarts_max: 2,
        log_dir: None,
        address_dir: None,
        ready_file: None,
    }
}

impl World {
    async fn start(spec: WorldSpec) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let secret = spec.secret.clone();
        let (order, orders) = mpsc::channel(64);
        let (reports, told) = mpsc::channel(64);
        let own = (hello(0, spec.size), order, told);
        let coordinator = Coordinator::new(spec, listener, own).unwrap();
        Self {
            secret,
            address,
            orders,
            reports,
            coordinator: tokio::spawn(coordinator.run()),
        }
    }

    async fn try_join(&self, hello: AgentHello) -> Result<Channel, ChannelError> {
        let hello = Hello::Agent(hello);
        channel::connect(&self.address, &self.secret, "job 1 step 0", &hello).await
    }

    async fn join(&self, rank: u32, size: u32) -> Channel {
        self.try_join(hello(rank, size)).await.unwrap()
    }

    /// Rank 0's next order.
    async fn order(&mut self) -> Order {
        timeout(LIMIT, self.orders.recv()).await.unwrap().unwrap()
    }

    async fn start_order(&mut self) -> Start {
        start_of(self.order().await)
    }

    async fn report(&self, report: Report) {
        self.reports.send(report).await.unwrap();
    }

    async fn call(&self, instance: &str, epoch: u32, size: usize) -> Option<String> {
        let call = RankCall {
            leader: "127.0.0.1:9".to_owned(),
            size,
            tensor_parallel: size,
            pipeline_parallel: 1,
        };
        let hello = Hello::Leader {
            instance: instance.to_owned(),
            epoch,
            call,
        };
        let mut channel = channel::connect(&self.address, &self.secret, "job 1 step 0", &hello)
            .await
            .unwrap();
        let answer: Answer = timeout(LIMIT, channel.incoming.next())
            .await
            .unwrap()
            .unwrap();
        answer.refusal
    }

    async fn verdict(self) -> Verdict {
        timeout(LIMIT, self.coordinator).await.unwrap().unwrap()
    }
}

fn start_of(order: Order) -> Start {
    match order {
        Order::Start(start) => *start,
        other => panic!("not a start: {other:?}"),
    }
}

async fn next(channel: &mut Channel) -> Order {
    timeout(LIMIT, channel.incoming.next())
        .await
        .unwrap()
        .unwrap()
}

async fn tell(channel: &mut Channel, report: Report) {
    channel.outgoing.send(&report, LIMIT).await.unwrap();
}

fn ended(slot: &SlotId, end: End) -> Report {
    Report::Ended {
        slot: slot.clone(),
        end,
        tail: vec!["last words".to_owned()],
    }
}

fn slot(instance: &str, rank: u32, epoch: u32) -> SlotId {
    SlotId {
        instance: instance.to_owned(),
        rank,
        epoch,
    }
}

#[tokio::test]
async fn ranks_that_never_come_are_named_with_their_hosts() {
    let mut late = spec(3, vec![instance("ctx0", 0, 3)]);
    late.timeouts.start = Duration::from_millis(500);
    let world = World::start(late).await;
    let _one = world.join(1, 3).await;
    let Verdict::Broken { outcome, cause } = world.verdict().await else {
        panic!("not broken")
    };
    assert_eq!(outcome, Outcome::TimedOut);
    assert!(cause.starts_with("2 of 3 ranks came within"), "{cause}");
    assert!(cause.contains("missing: rank 2 (node2)\nhint:"), "{cause}");
}

#[tokio::test]
async fn a_rank_that_does_not_fit_is_turned_away_and_told_why() {
    let world = World::start(spec(3, vec![instance("ctx0", 0, 3)])).await;
    let _one = world.join(1, 3).await;
    for (hello, word) in [
        (hello(1, 3), "process 1001 on node1"),
        (hello(2, 4), "SLURM_NTASKS"),
        (
            AgentHello {
                version: 0,
                ..hello(2, 3)
            },
            "same baton on every node",
        ),
    ] {
        let error = world.try_join(hello).await.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    world.report(Report::Asked { signal: 15 }).await;
    assert_eq!(world.verdict().await, Verdict::Asked(15));
}

#[tokio::test]
async fn a_leader_gets_its_followers_once_and_only_with_the_right_size() {
    let mut world = World::start(spec(3, vec![instance("ctx0", 0, 3)])).await;
    let mut followers = [world.join(1, 3).await, world.join(2, 3).await];
    let start = world.start_order().await;
    assert_eq!(start.slot, slot("ctx0", 0, 1));
    assert!(
        start
            .environment
            .contains(&("DEVICE".to_owned(), "0".to_owned()))
    );
    let refusal = world.call("ctx0", 1, 4).await.unwrap();
    assert!(
        refusal.contains("ctx0 has 3 ranks in this world"),
        "{refusal}"
    );
    assert_eq!(world.call("ctx0", 1, 3).await, None);
    for (rank, follower) in (1..).zip(&mut followers) {
        let start = start_of(next(follower).await);
        assert_eq!(start.slot, slot("ctx0", rank, 1));
        assert_eq!(
            (start.program, start.arguments),
            (Program::Baton, vec!["rank".to_owned()])
        );
        let input = start.input.unwrap();
        assert!(input.contains("job 1 step 0 ctx0 epoch 1"), "{input}");
        assert_eq!(start.streams, Streams::Labelled);
    }
    assert!(world.call("ctx0", 1, 3).await.unwrap().contains("already"));
    assert!(world.call("ctx0", 2, 3).await.unwrap().contains("epoch"));
    assert!(
        world
            .call("gen0", 1, 3)
            .await
            .unwrap()
            .contains("no instance gen0")
    );
}

#[tokio::test]
async fn a_dead_follower_ends_its_instance_which_is_started_again() {
    let mut world = World::start(spec(
        3,
        vec![instance("ctx0", 0, 2), instance("gen0", 2, 1)],
    ))
    .await;
    let (mut follower, mut other) = (world.join(1, 3).await, world.join(2, 3).await);
    let leader = world.start_order().await.slot;
    assert_eq!(world.call("ctx0", 1, 2).await, None);
    let slot = start_of(next(&mut follower).await).slot;
    assert_eq!(start_of(next(&mut other).await).slot.instance, "gen0");
    serve_health(&world, &leader).await;
    tell(&mut follower, ended(&slot, End::Signal(9))).await;
    // The leader does not end by itself, so it is killed after a while.
    let kill = Order::Signal {
        slot: leader.clone(),
        signal: Signal::SIGKILL as i32,
    };
    assert_eq!(world.order().await, kill);
    world.report(ended(&leader, End::Signal(9))).await;
    let again = world.start_order().await;
    assert_eq!(again.slot.epoch, 2);
    // News of the first life changes nothing.
    world.report(ended(&leader, End::Signal(9))).await;
    assert_eq!(world.call("ctx0", 2, 2).await, None);
}

/// Reports the leader bound at an address that answers /health with 200, and waits until that was seen.
async fn serve_health(world: &World, leader: &SlotId) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    world
        .report(Report::Bound {
            slot: leader.clone(),
            address,
        })
        .await;
    let answer = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await.unwrap();
        let ok = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        stream.write_all(ok.as_bytes()).await.unwrap();
        // The other side closes once it has read the answer.
        let _ = stream.read(&mut request).await;
    };
    timeout(LIMIT, answer).await.unwrap();
    // The answer is an event behind this one's in the coordinator's queue only once it was handled; a refused call
    // goes through the same queue.
    assert!(world.call("nobody", 1, 1).await.is_some());
}

#[tokio::test]
async fn what_never_served_ends_the_world_with_its_last_lines() {
    let mut world = World::start(spec(1, vec![instance("ctx0", 0, 1)])).await;
    let leader = world.start_order().await.slot;
    world.report(ended(&leader, End::Code(65))).await;
    let Verdict::Broken { outcome, cause } = world.verdict().await else {
        panic!("not broken")
    };
    assert_eq!(outcome, Outcome::Config);
    assert!(
        cause.starts_with("ctx0 on rank 0 (node0): exit code 65\n    last words"),
        "{cause}"
    );
}

#[tokio::test]
async fn a_commands_end_is_the_worlds_end() {
    let mut command = spec(2, vec![instance("command", 0, 2)]);
    command.policy = Policy::Command;
    let mut world = World::start(command).await;
    let mut other = world.join(1, 2).await;
    let leader = world.start_order().await.slot;
    world.report(ended(&leader, End::Signal(11))).await;
    assert_eq!(next(&mut other).await, Order::Leave { code: 0 });
    let verdict = world.verdict().await;
    assert_eq!(verdict.code(), 139);
}

#[tokio::test]
async fn a_lost_host_ends_a_world_that_cannot_do_without() {
    let mut world = World::start(spec(
        2,
        vec![instance("ctx0", 0, 1), instance("gen0", 1, 1)],
    ))
    .await;
    let mut other = world.join(1, 2).await;
    let leader = world.start_order().await.slot;
    assert_eq!(start_of(next(&mut other).await).slot, slot("gen0", 0, 1));
    drop(other);
    let Verdict::Broken { cause, .. } = world.verdict().await else {
        panic!("not broken")
    };
    assert!(cause.starts_with("rank 1 (node1) is lost: "), "{cause}");
    assert_eq!(leader.instance, "ctx0");
}

#[tokio::test]
async fn the_proxy_drains_before_the_servers() {
    let mut with_proxy = spec(1, vec![instance("ctx0", 0, 1)]);
    with_proxy.proxy = Some(ProxySpec {
        start: Box::new(|addresses| {
            Ok(super::ProxyStart {
                arguments: addresses.to_vec(),
                files: Vec::new(),
            })
        }),
    });
    let mut world = World::start(with_proxy).await;
    let server = world.start_order().await.slot;
    world
        .report(Report::Bound {
            slot: server.clone(),
            address: "127.0.0.1:9".to_owned(),
        })
        .await;
    let proxy = world.start_order().await;
    assert_eq!(proxy.arguments, ["127.0.0.1:9"]);
    world
        .report(Report::Asked {
            signal: Signal::SIGUSR1 as i32,
        })
        .await;
    for slot in [&proxy.slot, &server] {
        let term = Order::Signal {
            slot: slot.clone(),
            signal: Signal::SIGTERM as i32,
        };
        assert_eq!(world.order().await, term);
        world.report(ended(slot, End::Code(0))).await;
    }
    assert_eq!(world.order().await, Order::Leave { code: 0 });
    let verdict = world.verdict().await;
    assert_eq!(verdict.code(), 0);
}
