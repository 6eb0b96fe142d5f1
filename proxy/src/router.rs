//! How one server of a role is chosen (COMPAT.md §9).

use std::fmt::Debug;
use std::sync::Arc;

use baton_configs::disagg::RouterConfig;

use crate::workers::Worker;

mod round_robin;

/// Chooses a server.
pub(crate) trait Router: Debug + Send + Sync {
    /// Index of a server for which `eligible` holds; `None` when there is none. Called from many tasks at once.
    fn choose(
        &self,
        servers: &[Arc<Worker>],
        eligible: &dyn Fn(&Arc<Worker>) -> bool,
    ) -> Option<usize>;
}

/// The router that a role's configuration asks for.
pub(crate) fn for_config(config: &RouterConfig) -> Box<dyn Router> {
    match config {
        RouterConfig::RoundRobin => Box::new(round_robin::RoundRobin::default()),
    }
}
