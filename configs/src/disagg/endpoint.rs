//! `host:port` as users write it.

use std::fmt;
use std::str::FromStr;

use crate::error::ConfigErrorKind;
use crate::section::Shape;
use crate::section::kind::Kind;
use crate::section::read::Findings;
use crate::yaml::{Node, Value, quoted};

/// A worker's `host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Endpoint {
    /// Host name or address, without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Why a text is no `host:port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointError {
    /// What was expected instead.
    pub expected: &'static str,
    /// What would mend it.
    pub hint: Option<String>,
}

impl fmt::Display for EndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "expected {}", self.expected)
    }
}

impl std::error::Error for EndpointError {}

const HOST_AND_PORT: &str = "`host:port`, with a port from 1 to 65535";

impl FromStr for Endpoint {
    type Err = EndpointError;

    /// Reads `host:port` or `[IPv6]:port`; no scheme, no path, no port 0.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let refused = |hint: Option<String>| EndpointError {
            expected: HOST_AND_PORT,
            hint,
        };
        if let Some((_, rest)) = text.split_once("://") {
            let bare = rest.trim_end_matches('/');
            return Err(refused(Some(format!(
                "write it without the scheme: {}",
                quoted(bare)
            ))));
        }
        if let Some(bare) = text.strip_suffix('/') {
            return Err(refused(Some(format!(
                "write it without the slash: {}",
                quoted(bare)
            ))));
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(bracketed) => bracketed.split_once("]:").ok_or_else(|| refused(None))?,
            None if text.matches(':').count() > 1 => {
                let hint = "put an IPv6 address in brackets: \"[::1]:8001\"".to_owned();
                return Err(refused(Some(hint)));
            }
            None => text.split_once(':').ok_or_else(|| refused(None))?,
        };
        let host_is_good = if text.starts_with('[') {
            host.parse::<std::net::Ipv6Addr>().is_ok()
        } else {
            !host.is_empty()
                && host
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
        };
        let digits_only = port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port
            .parse()
            .ok()
            .filter(|port| *port > 0 && digits_only && host_is_good);
        port.map(|port| Self {
            host: host.to_owned(),
            port,
        })
        .ok_or_else(|| refused(None))
    }
}

/// Reads an [`Endpoint`].
#[derive(Debug)]
pub(crate) struct HostPort;

impl Kind for HostPort {
    type Value = Endpoint;
    const SHAPE: Shape = Shape::Endpoint;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<Endpoint> {
        let Value::Text(text) = &node.value else {
            findings.wrong(node, path, HOST_AND_PORT, None);
            return None;
        };
        match text.parse::<Endpoint>() {
            Ok(endpoint) => Some(endpoint),
            Err(error) => {
                let kind = ConfigErrorKind::WrongValue {
                    found: node.found(),
                    expected: error.expected.to_owned(),
                };
                findings.error(node.place, path, kind, error.hint);
                None
            }
        }
    }
}
