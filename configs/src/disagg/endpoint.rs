//! `host:port` and `file:PATH`, as users write where a server is.

use std::fmt;
use std::path::{Path, PathBuf};
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

/// Where a server is found.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ServerAddress {
    /// At an address that does not change.
    At(Endpoint),
    /// Where a file says, which holds `host:port` as `--report-addr` writes it. The file may come later, and may change
    /// when the server starts again elsewhere.
    File(PathBuf),
}

impl ServerAddress {
    /// The same with a file's path taken from `folder` when it is relative.
    pub(crate) fn in_folder(self, folder: &Path) -> Self {
        match self {
            Self::At(endpoint) => Self::At(endpoint),
            Self::File(path) => Self::File(folder.join(path)),
        }
    }

    /// The address, where it does not change.
    #[must_use]
    pub fn fixed(&self) -> Option<&Endpoint> {
        match self {
            Self::At(endpoint) => Some(endpoint),
            Self::File(_) => None,
        }
    }
}

impl From<Endpoint> for ServerAddress {
    fn from(endpoint: Endpoint) -> Self {
        Self::At(endpoint)
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At(endpoint) => endpoint.fmt(f),
            Self::File(path) => write!(f, "{FILE_SCHEME}{}", path.display()),
        }
    }
}

impl FromStr for ServerAddress {
    type Err = EndpointError;

    /// Reads `file:PATH`, or what [`Endpoint`] reads.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        match text.strip_prefix(FILE_SCHEME) {
            Some("") => Err(EndpointError {
                expected: "`file:` and the path of a file that holds `host:port`",
                hint: None,
            }),
            // `file:///path` is how others write an absolute path.
            Some(path) => {
                let path = path
                    .strip_prefix("//")
                    .filter(|rest| rest.starts_with('/'))
                    .unwrap_or(path);
                Ok(Self::File(PathBuf::from(path)))
            }
            None => text.parse().map(Self::At),
        }
    }
}

const FILE_SCHEME: &str = "file:";

/// Reads a [`ServerAddress`].
#[derive(Debug)]
pub(crate) struct Address;

impl Kind for Address {
    type Value = ServerAddress;
    const SHAPE: Shape = Shape::Endpoint;

    fn read(node: &Node, path: &str, findings: &mut Findings) -> Option<ServerAddress> {
        let Value::Text(text) = &node.value else {
            findings.wrong(node, path, HOST_AND_PORT, None);
            return None;
        };
        match text.parse::<ServerAddress>() {
            Ok(address) => Some(address),
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
