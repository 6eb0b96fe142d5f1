//! The store in which workers register: keys, values and their ends, in this process's memory (COMPAT.md §6.2).
//!
//! Bounded in entries and bytes. Time is the monotonic clock. What has expired is never seen, whether or not the sweep
//! has come by. A proxy that starts again begins empty; workers register anew with their next heartbeat.

pub(crate) mod http;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use baton_configs::cluster::store_token;
use tokio::sync::watch;

/// Entries at most: more than the largest cluster has workers.
const ENTRIES_MAX: usize = 16_384;
/// Bytes of a key.
const KEY_BYTES_MAX: usize = 1024;
/// Bytes of a value.
const VALUE_BYTES_MAX: usize = 64 << 10;
/// Bytes of all keys and values.
const TOTAL_BYTES_MAX: usize = 64 << 20;

/// What callers that change something have to show. It is never logged.
#[derive(Clone, PartialEq, Eq)]
pub struct StoreToken(String);

impl StoreToken {
    /// The token of a job's secret.
    #[must_use]
    pub fn of_secret(secret: &str) -> Self {
        Self(store_token(secret))
    }

    /// Whether `shown` is the token; takes the same time wherever it differs.
    fn is(&self, shown: &str) -> bool {
        let differences = self.0.bytes().zip(shown.bytes());
        let differing = differences.fold(0, |all, (ours, theirs)| all | (ours ^ theirs));
        self.0.len() == shown.len() && differing == 0
    }
}

impl fmt::Debug for StoreToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("StoreToken(..)")
    }
}

/// Why something is not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("a {what} of {bytes} bytes is longer than {limit}")]
    TooLong {
        what: &'static str,
        bytes: usize,
        limit: usize,
    },
    #[error("the store is full: {entries} entries, {bytes} bytes")]
    Full { entries: usize, bytes: usize },
}

#[derive(Debug)]
struct Entry {
    value: String,
    expires: Option<Instant>,
}

impl Entry {
    fn is_live(&self, now: Instant) -> bool {
        self.expires.is_none_or(|end| end > now)
    }
}

/// The entries, pure: what time it is comes from outside.
#[derive(Debug, Default)]
struct Entries {
    map: BTreeMap<String, Entry>,
    bytes: usize,
}

impl Entries {
    fn remove(&mut self, key: &str) -> Option<Entry> {
        let entry = self.map.remove(key)?;
        self.bytes -= key.len() + entry.value.len();
        Some(entry)
    }

    /// The entry, if it has not expired.
    fn live(&mut self, key: &str, now: Instant) -> Option<&mut Entry> {
        self.map.get_mut(key).filter(|entry| entry.is_live(now))
    }

    /// Stores an entry, but only `over` one that is there; returns whether it did.
    fn set(
        &mut self,
        key: &str,
        entry: Entry,
        over: bool,
        now: Instant,
    ) -> Result<bool, StoreError> {
        for (what, bytes, limit) in [
            ("key", key.len(), KEY_BYTES_MAX),
            ("value", entry.value.len(), VALUE_BYTES_MAX),
        ] {
            if bytes > limit {
                return Err(StoreError::TooLong { what, bytes, limit });
            }
        }
        if self.live(key, now).is_some() && !over {
            return Ok(false);
        }
        self.remove(key);
        let bytes = key.len() + entry.value.len();
        if self.is_full_for(bytes) {
            self.sweep(now);
        }
        if self.is_full_for(bytes) {
            return Err(StoreError::Full {
                entries: self.map.len(),
                bytes: self.bytes,
            });
        }
        self.bytes += bytes;
        self.map.insert(key.to_owned(), entry);
        Ok(true)
    }

    fn is_full_for(&self, bytes: usize) -> bool {
        self.map.len() >= ENTRIES_MAX || self.bytes + bytes > TOTAL_BYTES_MAX
    }

    fn with_prefix(&self, prefix: &str, now: Instant) -> BTreeMap<String, String> {
        let from = self.map.range(prefix.to_owned()..);
        from.take_while(|(key, _)| key.starts_with(prefix))
            .filter(|(_, entry)| entry.is_live(now))
            .map(|(key, entry)| (key.clone(), entry.value.clone()))
            .collect()
    }

    /// Drops what has expired.
    fn sweep(&mut self, now: Instant) {
        let mut freed = 0;
        self.map.retain(|key, entry| {
            let stays = entry.is_live(now);
            if !stays {
                freed += key.len() + entry.value.len();
            }
            stays
        });
        self.bytes -= freed;
    }
}

/// The store.
#[derive(Debug)]
pub(crate) struct Store {
    token: Option<StoreToken>,
    entries: Mutex<Entries>,
    changed: watch::Sender<()>,
}

impl Store {
    pub(crate) fn new(token: Option<StoreToken>) -> Self {
        Self {
            token,
            entries: Mutex::default(),
            changed: watch::Sender::new(()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes when an entry is set or deleted. What merely expires is found by [`Store::sweep`].
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Stores a value; false if the key is there already and may not be overwritten.
    pub(crate) fn set(
        &self,
        key: &str,
        value: String,
        expires: Option<Instant>,
        overwrite: bool,
    ) -> Result<bool, StoreError> {
        let entry = Entry { value, expires };
        let stored = self.lock().set(key, entry, overwrite, Instant::now())?;
        if stored {
            self.changed.send_replace(());
        }
        Ok(stored)
    }

    /// The value, if there is one.
    pub(crate) fn get(&self, key: &str) -> Option<String> {
        let mut entries = self.lock();
        let entry = entries.live(key, Instant::now());
        entry.map(|entry| entry.value.clone())
    }

    /// Whether there was such a key.
    pub(crate) fn delete(&self, key: &str) -> bool {
        let entry = self.lock().remove(key);
        let was_there = entry.is_some_and(|entry| entry.is_live(Instant::now()));
        if was_there {
            self.changed.send_replace(());
        }
        was_there
    }

    /// Lets an entry live for `ttl` from now; false if there is none.
    pub(crate) fn expire(&self, key: &str, ttl: Duration) -> bool {
        let now = Instant::now();
        let mut entries = self.lock();
        let entry = entries.live(key, now);
        let is_there = entry.is_some();
        if let Some(entry) = entry {
            entry.expires = Some(now + ttl);
        }
        is_there
    }

    /// Every entry whose key begins so.
    pub(crate) fn with_prefix(&self, prefix: &str) -> BTreeMap<String, String> {
        self.lock().with_prefix(prefix, Instant::now())
    }

    /// Drops what has expired.
    pub(crate) fn sweep(&self) {
        self.lock().sweep(Instant::now());
    }
}

#[cfg(test)]
mod tests;
