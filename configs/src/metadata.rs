//! The metadata-server file (`--metadata_server_config_file`, COMPAT.md §5): where etcd is.

use std::path::Path;
use std::time::Duration;

use crate::error::{ConfigErrors, Warning};
use crate::section::kind::{Choice, Choices, OneOf, Seconds, Text, Whole};
use crate::section::read::{Findings, read_section};
use crate::section::section;
use crate::yaml::Document;

/// What kind of server keeps the list of workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MetadataServerType {
    /// etcd.
    #[default]
    Etcd,
}

impl Choices for MetadataServerType {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[("etcd", Choice::Is(Self::Etcd))];
}

section! {
    /// The server that keeps the list of workers.
    RawMetadata "metadata server" {
        /// What kind of server it is.
        server_type: OneOf<MetadataServerType> = "etcd";
        /// Its host.
        hostname: Text = "localhost";
        /// Its client port.
        port: Whole<u16, 1, 65535> = "2379";
        /// How long a worker may take to answer a health check, in seconds.
        health_check_timeout: Seconds = "5.0";
        /// How often the list of workers is read, in seconds.
        refresh_interval["refersh_interval"]: Seconds = "10.0";
    }
    unserved {}
    groups &[];
}

/// The metadata-server file, resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetadataConfig {
    /// What kind of server it is.
    pub server_type: MetadataServerType,
    /// Its host.
    pub hostname: String,
    /// Its client port.
    pub port: u16,
    /// How long a worker may take to answer a health check.
    pub health_check_timeout: Duration,
    /// How often the list of workers is read.
    pub refresh_interval: Duration,
}

impl Default for MetadataConfig {
    fn default() -> Self {
        Self {
            server_type: MetadataServerType::Etcd,
            hostname: "localhost".to_owned(),
            port: 2379,
            health_check_timeout: Duration::from_secs(5),
            refresh_interval: Duration::from_secs(10),
        }
    }
}

/// Reads and resolves a file.
///
/// # Errors
/// Everything that is wrong with it.
pub fn load(path: &Path) -> Result<(MetadataConfig, Vec<Warning>), ConfigErrors> {
    resolve(&Document::read(path)?)
}

/// Resolves a document.
///
/// # Errors
/// Everything that is wrong with it.
pub fn resolve(document: &Document) -> Result<(MetadataConfig, Vec<Warning>), ConfigErrors> {
    let mut findings = Findings::new(document);
    let raw = read_section::<RawMetadata>(document.root(), "", &mut findings).unwrap_or_default();
    let defaults = MetadataConfig::default();
    let config = MetadataConfig {
        server_type: raw
            .server_type
            .map_or(defaults.server_type, |given| given.value),
        hostname: raw.hostname.map_or(defaults.hostname, |given| given.value),
        port: raw.port.map_or(defaults.port, |given| given.value),
        health_check_timeout: raw
            .health_check_timeout
            .map_or(defaults.health_check_timeout, |given| given.value),
        refresh_interval: raw
            .refresh_interval
            .map_or(defaults.refresh_interval, |given| given.value),
    };
    Ok((config, findings.finish()?))
}

#[cfg(test)]
mod tests;
