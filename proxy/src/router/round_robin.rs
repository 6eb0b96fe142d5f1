//! Next in turn. The turn moves past the server that was chosen, so that those left share evenly what a dead one had.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Router;
use crate::workers::Worker;

#[derive(Debug, Default)]
pub(super) struct RoundRobin {
    /// Index to look at first.
    turn: AtomicUsize,
}

impl Router for RoundRobin {
    fn choose(
        &self,
        servers: &[Arc<Worker>],
        eligible: &dyn Fn(&Arc<Worker>) -> bool,
    ) -> Option<usize> {
        let count = servers.len();
        let mut chosen = None;
        let _ = self
            .turn
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |turn| {
                chosen = (0..count)
                    .map(|step| (turn + step) % count)
                    .find(|index| eligible(&servers[*index]));
                chosen.map(|index| (index + 1) % count)
            });
        chosen
    }
}
