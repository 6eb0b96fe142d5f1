//! Sums over ranks: 2 and 4 of them as threads over loopback, from one row of a small model to 8 MiB.
//!
//! First every sum is compared, then the clock runs on rank 0. The bound is the host's memory: every byte is copied into
//! the kernel and out of it once for each peer. Prints the time of a sum and the MB/s of its values.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use baton_engine::collective::Collective;
use baton_engine::collective::tcp::TcpGroup;
use baton_engine::group::{Leader, join};
use baton_engine::ranks::{Fabric, FollowerSpec, LeaderRanks};
use baton_engine::secret::Secret;

const PATIENCE: Duration = Duration::from_secs(60);

/// Bytes of values, and how often they are summed.
const SIZES: [(usize, u32); 8] = [
    (4, 2_000),
    (4 << 10, 2_000),
    (16 << 10, 2_000),
    (32 << 10, 1_000),
    (64 << 10, 1_000),
    (128 << 10, 500),
    (1 << 20, 100),
    (8 << 20, 20),
];

/// Runs as the best of so many.
const ROUNDS: usize = 5;

#[expect(clippy::print_stdout, reason = "a bench prints what it measured")]
fn main() {
    for size in [2, 4] {
        for (bytes, microseconds) in best_times(size) {
            #[expect(clippy::cast_precision_loss, reason = "8 MiB have few bits")]
            let rate = bytes as f64 / microseconds;
            println!("{size} ranks {bytes:>8} bytes {microseconds:>10.1} us {rate:>8.0} MB/s");
        }
    }
}

/// Bytes and microseconds of the best round on rank 0.
fn best_times(size: usize) -> Vec<(usize, f64)> {
    let ranks = LeaderRanks {
        identity: "bench".to_owned(),
        secret: Secret::generate(),
        host: "127.0.0.1".to_owned(),
        hosts: Vec::new(),
        join_timeout: PATIENCE,
        peer_timeout: PATIENCE,
        fabric: Fabric::Tcp,
        call: Arc::new(|_| Ok(())),
    };
    let stop = AtomicBool::new(false);
    let leader = Leader::bind(&ranks).expect("loopback can be listened on");
    let address = leader.address();
    std::thread::scope(|scope| {
        for rank in 1..size {
            let spec = FollowerSpec {
                rank,
                size,
                leader: address.clone(),
                identity: ranks.identity.clone(),
                secret: ranks.secret.to_hex(),
                host: ranks.host.clone(),
                hosts: Vec::new(),
                join_timeout_ms: 60_000,
                peer_timeout_ms: 60_000,
                fabric: Fabric::Tcp,
                num_threads: None,
            };
            let stop = &stop;
            scope.spawn(move || measure(join(&spec, stop).expect("the leader is there")));
        }
        measure(leader.gather(size, &ranks, &stop).expect("all ranks come"))
    })
}

fn measure(mut group: TcpGroup) -> Vec<(usize, f64)> {
    SIZES
        .map(|(bytes, times)| {
            let best = (0..ROUNDS)
                .map(|_| round(&mut group, bytes / 4, times))
                .min()
                .expect("there are rounds");
            (bytes, best.as_secs_f64() * 1e6 / f64::from(times))
        })
        .into()
}

fn round(group: &mut TcpGroup, count: usize, times: u32) -> Duration {
    let size = group.size();
    let mut values = vec![1.0_f32; count];
    group
        .all_reduce_sum(0..size, &mut values)
        .expect("nobody is lost");
    let sum = f32::from(u16::try_from(size).expect("few ranks"));
    assert!(values.iter().all(|value| *value == sum), "a wrong sum");
    values.fill(0.0);
    let start = Instant::now();
    for _ in 0..times {
        group
            .all_reduce_sum(0..size, &mut values)
            .expect("nobody is lost");
    }
    start.elapsed()
}
