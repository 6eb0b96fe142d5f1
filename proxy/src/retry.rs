//! Whether a failed request is tried again, and which servers it must not meet again.
//!
//! A request has one budget for both of its phases. Every server that failed it is excluded from the rest of its life.

use std::sync::Arc;

use crate::cluster::Cluster;
use crate::error::UpstreamFailure;
use crate::workers::Worker;

/// A request's retries.
#[derive(Debug)]
pub(crate) struct Retries {
    left: u32,
    excluded: Vec<Arc<Worker>>,
}

impl Retries {
    pub(crate) fn new(max_retries: u32) -> Self {
        Self {
            left: max_retries,
            excluded: Vec::new(),
        }
    }

    /// Servers that failed this request.
    pub(crate) fn excluded(&self) -> &[Arc<Worker>] {
        &self.excluded
    }

    /// Takes note of a failure for which `blamed` has to answer. True when the request may be tried once more.
    pub(crate) fn allow(
        &mut self,
        failure: &UpstreamFailure,
        blamed: &Arc<Worker>,
        cluster: &Cluster,
    ) -> bool {
        if self.left == 0 || !failure.is_retryable() {
            return false;
        }
        self.excluded.push(blamed.clone());
        if !cluster.group(blamed.role()).has_choice(&self.excluded) {
            return false;
        }
        self.left -= 1;
        true
    }
}
