//! What travels for NIXL: how a process is reached, and how an arena of it is read. Pure but for [`Host::here`].
//!
//! NIXL's own descriptions are opaque and read by NIXL itself, which trusts them; so each carries a checksum, and what
//! was damaged on its way is refused here. Numbers are little-endian, texts and blobs have their length before them.

use xxhash_rust::xxh3::xxh3_64;

use super::find::Plugin;

const ADDRESS_MAGIC: &[u8; 4] = b"BNA1";
const KEY_MAGIC: &[u8; 4] = b"BNK2";

/// Where a process runs, as far as reading its memory goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Host {
    /// Equal exactly for processes of one running kernel that see each other's ids; empty when it cannot be told.
    pub(super) kernel: String,
    /// Whether it is read from other hosts at a price worth paying.
    pub(super) far: bool,
}

impl Host {
    /// That of this process.
    pub(super) fn here() -> Self {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let processes = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
        let adapters = std::fs::read_dir("/sys/class/infiniband");
        let adapters = adapters.is_ok_and(|mut found| found.next().is_some());
        let transports = std::env::var("UCX_TLS").unwrap_or_default();
        Self {
            kernel: match boot.trim() {
                "" => String::new(),
                boot => format!("{boot} {}", processes.display()),
            },
            far: adapters || names_tcp(&transports),
        }
    }

    /// Whether a process there can be read from here.
    pub(super) fn reaches(&self, other: &Self) -> bool {
        let same = !self.kernel.is_empty() && self.kernel == other.kernel;
        same || (self.far && other.far)
    }
}

/// Without an adapter for remote memory, UCX carries reads over TCP in software, at a fraction of what our own stream
/// does; only who asks for it by name gets it.
fn names_tcp(transports: &str) -> bool {
    let wanted = !transports.trim_start().starts_with('^');
    wanted && transports.split(',').any(|name| name.trim() == "tcp")
}

/// How a process is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) plugin: Plugin,
    pub(super) host: Host,
    /// NIXL's description of the agent.
    pub(super) agent: Vec<u8>,
}

impl Address {
    pub(super) fn encode(&self) -> Vec<u8> {
        let kernel = self.host.kernel.as_bytes();
        let kernel = &kernel[..kernel.len().min(usize::from(u8::MAX))];
        let mut body = vec![self.plugin.number(), u8::from(self.host.far)];
        body.push(kernel.len().to_le_bytes()[0]);
        body.extend_from_slice(kernel);
        body.extend_from_slice(&self.agent);
        seal(ADDRESS_MAGIC, &body)
    }

    /// The error says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let body = unseal(ADDRESS_MAGIC, bytes)?;
        let [plugin, far, length, rest @ ..] = body else {
            return Err(format!("it ends after {} bytes", bytes.len()));
        };
        let plugin = Plugin::of_number(*plugin).ok_or_else(|| format!("plug-in {plugin}"))?;
        let (kernel, agent) = rest
            .split_at_checked(usize::from(*length))
            .ok_or_else(|| format!("it ends after {} bytes", bytes.len()))?;
        let kernel = String::from_utf8(kernel.to_vec()).map_err(|error| error.to_string())?;
        Ok(Self {
            plugin,
            host: Host {
                kernel,
                far: *far != 0,
            },
            agent: agent.to_vec(),
        })
    }
}

/// How an arena is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Key {
    /// Where it begins in its process.
    pub(super) start: usize,
    /// Its length; it ends within the address space.
    pub(super) bytes: usize,
    /// The GPU that it is memory of, by its number there; none where it is the host's.
    pub(super) gpu: Option<u64>,
    /// NIXL's description of the memory.
    pub(super) memory: Vec<u8>,
}

impl Key {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(24 + self.memory.len());
        body.extend_from_slice(&(self.start as u64).to_le_bytes());
        body.extend_from_slice(&(self.bytes as u64).to_le_bytes());
        body.extend_from_slice(&self.gpu.unwrap_or(HOST).to_le_bytes());
        body.extend_from_slice(&self.memory);
        seal(KEY_MAGIC, &body)
    }

    /// The error says what is wrong.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let body = unseal(KEY_MAGIC, bytes)?;
        let short = || format!("it ends after {} bytes", bytes.len());
        let (start, rest) = body.split_first_chunk().ok_or_else(short)?;
        let (length, rest) = rest.split_first_chunk().ok_or_else(short)?;
        let (gpu, memory) = rest.split_first_chunk().ok_or_else(short)?;
        let gpu = Some(u64::from_le_bytes(*gpu)).filter(|gpu| *gpu != HOST);
        let range = (u64::from_le_bytes(*start), u64::from_le_bytes(*length));
        let beyond = || format!("{} bytes from {:#x} on are no memory", range.1, range.0);
        let start = usize::try_from(range.0).map_err(|_| beyond())?;
        let length = usize::try_from(range.1).map_err(|_| beyond())?;
        start.checked_add(length).ok_or_else(beyond)?;
        Ok(Self {
            start,
            bytes: length,
            gpu,
            memory: memory.to_vec(),
        })
    }
}

/// Stands for no GPU.
const HOST: u64 = u64::MAX;

fn seal(magic: &[u8; 4], body: &[u8]) -> Vec<u8> {
    let mut out = magic.to_vec();
    out.extend_from_slice(&xxh3_64(body).to_le_bytes());
    out.extend_from_slice(body);
    out
}

fn unseal<'a>(magic: &[u8; 4], bytes: &'a [u8]) -> Result<&'a [u8], String> {
    let rest = bytes
        .strip_prefix(magic)
        .ok_or_else(|| "it does not begin as one".to_owned())?;
    let (sum, body) = rest
        .split_first_chunk()
        .ok_or_else(|| format!("it ends after {} bytes", bytes.len()))?;
    if xxh3_64(body) == u64::from_le_bytes(*sum) {
        Ok(body)
    } else {
        Err("its checksum does not match".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host(kernel: &str, far: bool) -> Host {
        let kernel = kernel.to_owned();
        Host { kernel, far }
    }

    #[test]
    fn one_kernel_reaches_itself_and_adapters_reach_each_other() {
        let (near, far) = (host("a", false), host("b", true));
        assert!(near.reaches(&host("a", false)));
        assert!(!near.reaches(&host("b", false)));
        assert!(!near.reaches(&far) && !far.reaches(&near));
        assert!(far.reaches(&host("c", true)));
        assert!(!host("", false).reaches(&host("", false)));
    }

    #[test]
    fn this_process_reaches_itself() {
        assert!(Host::here().reaches(&Host::here()));
    }

    #[test]
    fn tcp_is_far_only_for_who_names_it() {
        assert!(names_tcp("tcp") && names_tcp("self, tcp"));
        assert!(!names_tcp("") && !names_tcp("all") && !names_tcp("^tcp") && !names_tcp("^ib,tcp"));
    }

    #[test]
    fn a_key_beyond_the_address_space_is_refused() {
        let mut body = u64::MAX.to_le_bytes().to_vec();
        body.extend_from_slice(&1_u64.to_le_bytes());
        body.extend_from_slice(&HOST.to_le_bytes());
        let refused = Key::decode(&seal(KEY_MAGIC, &body)).unwrap_err();
        assert_eq!(refused, "1 bytes from 0xffffffffffffffff on are no memory");
    }

    #[test]
    fn damage_is_found() {
        let key = Key {
            start: 4096,
            bytes: 64,
            gpu: Some(1),
            memory: b"described".to_vec(),
        };
        let whole = key.encode();
        for index in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[index] ^= 1;
            assert!(Key::decode(&damaged).is_err(), "byte {index}");
            assert!(Key::decode(&whole[..index]).is_err(), "cut at {index}");
        }
        assert_eq!(Key::decode(&whole), Ok(key));
        assert!(Address::decode(&whole).is_err());
    }

    proptest! {
        #[test]
        fn addresses_survive_the_wire(kernel in "[ -~]{0,80}", far in any::<bool>(), agent in prop::collection::vec(any::<u8>(), 0..200)) {
            let address = Address { plugin: Plugin::Libfabric, host: host(&kernel, far), agent };
            prop_assert_eq!(Address::decode(&address.encode()), Ok(address));
        }

        #[test]
        fn any_body_decodes_or_fails(body in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Ok(address) = Address::decode(&seal(ADDRESS_MAGIC, &body)) {
                prop_assert_eq!(Address::decode(&address.encode()), Ok(address));
            }
            if let Ok(key) = Key::decode(&seal(KEY_MAGIC, &body)) {
                prop_assert_eq!(Key::decode(&key.encode()), Ok(key));
            }
        }
    }
}
