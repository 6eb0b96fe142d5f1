//! Servers whose address stands in a file: it is read until it is there, and again while its server is down.
//!
//! A server that starts again elsewhere writes its new address into the same file and is found there.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use baton_configs::disagg::{Endpoint, ServerAddress};
use tokio::io::AsyncReadExt;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::cluster::Cluster;
use crate::health::{self, Watching};
use crate::workers::{Origin, Role, Worker};

/// Between two looks at a file that is not there, or whose server is down.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// Bytes of an address file. A longer one is another file.
const FILE_BYTES_MAX: u64 = 1024;

/// One server that is told by a file.
#[derive(Debug)]
pub(crate) struct FileServer {
    pub(crate) role: Role,
    pub(crate) address: ServerAddress,
    pub(crate) watching: Watching,
}

impl FileServer {
    /// Follows the file for as long as the proxy runs.
    pub(crate) async fn follow(self, cluster: Arc<Cluster>) {
        let ServerAddress::File(path) = &self.address else {
            return;
        };
        let mut changes = cluster.changes();
        let mut current: Option<Arc<Worker>> = None;
        // Holds the health checks of the present worker, and of one that has just been retired.
        let mut checks = JoinSet::new();
        loop {
            while current.as_ref().is_some_and(|worker| worker.is_up()) {
                // The cluster outlives this task and holds the sender.
                let _ = changes.changed().await;
            }
            let found = read(path, self.watching.timeouts.probe).await;
            if let Some(worker) = self.settle(&cluster, current.as_ref(), found) {
                checks.spawn(health::watch(worker.clone(), self.watching.clone()));
                current = Some(worker);
            }
            while checks.try_join_next().is_some() {}
            sleep(LOOK_INTERVAL).await;
        }
    }

    /// The new worker, if the file names another address than before.
    fn settle(
        &self,
        cluster: &Cluster,
        current: Option<&Arc<Worker>>,
        found: Result<Endpoint, String>,
    ) -> Option<Arc<Worker>> {
        let endpoint = match (found, current) {
            (Ok(endpoint), Some(worker)) if worker.endpoint() == &endpoint => return None,
            (Ok(endpoint), _) => endpoint,
            // The last known address stays, with what its health checks say.
            (Err(_), Some(_)) => return None,
            (Err(reason), None) => {
                cluster.set_unfound(self.role, &self.address, &reason);
                return None;
            }
        };
        tracing::info!(
            "{} server {} is at {endpoint}",
            self.role.name(),
            self.address
        );
        let worker = cluster.add(self.role, endpoint, Origin::Configured);
        cluster.set_found(self.role, &self.address);
        if let Some(old) = current {
            cluster.remove(old);
        }
        Some(worker)
    }
}

/// The address in a file, or why there is none.
async fn read(path: &Path, patience: Duration) -> Result<Endpoint, String> {
    let read = async {
        let file = tokio::fs::File::open(path).await?;
        let mut text = String::new();
        file.take(FILE_BYTES_MAX).read_to_string(&mut text).await?;
        Ok::<_, std::io::Error>(text)
    };
    let text = match timeout(patience, read).await {
        Ok(Ok(text)) => text,
        Ok(Err(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            return Err("the file is not there yet".to_owned());
        }
        Ok(Err(error)) => return Err(format!("the file cannot be read: {error}")),
        Err(_) => {
            let waited_s = patience.as_secs_f64();
            return Err(format!("the file could not be read within {waited_s:.1} s"));
        }
    };
    text.trim().parse().map_err(|_| {
        let shown: String = text.trim().chars().take(80).collect();
        format!("the file holds {shown:?}, not host:port")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_file_holds_an_address_or_the_reason_says_what() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("addr");
        let look = async || read(&path, Duration::from_secs(5)).await;
        assert_eq!(look().await, Err("the file is not there yet".to_owned()));
        for (text, expected) in [
            ("", "the file holds \"\", not host:port"),
            ("node1", "the file holds \"node1\", not host:port"),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(look().await, Err(expected.to_owned()));
        }
        std::fs::write(&path, "node1:8001\n").unwrap();
        assert_eq!(look().await.unwrap().to_string(), "node1:8001");
        let error = read(folder.path(), Duration::from_secs(5))
            .await
            .unwrap_err();
        assert!(error.starts_with("the file cannot be read: "), "{error}");
    }
}
