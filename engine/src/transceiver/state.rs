//! The opaque state of a ticket: what a context instance tells a generation instance, through the proxy.
//!
//! Versioned JSON, because it travels inside JSON and people debug it. It comes back from outside, so reading
//! it is total: hostile bytes end in an error. The nonce makes a lease's ticket unguessable.

use serde::{Deserialize, Serialize};

use super::reshard::Side;
use crate::handoff::{HandoffError, KvLayout};
use crate::model::shard::Grid;
use crate::page::PageShape;
use crate::transport::EndpointRecord;

/// Of the state and of the messages; both sides must have the same.
pub(super) const PROTOCOL_VERSION: u32 = 8;

/// Longest state that is read.
const STATE_BYTES_MAX: usize = 256 << 10;

/// A [`KvLayout`] with the names that cross the wire. Sizes are the whole model's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LayoutRecord {
    model_fingerprint: u64,
    layers: u64,
    kv_heads: u64,
    head_dim: u64,
    dtype: String,
    tokens_per_block: u64,
    tensor_parallel: u32,
    pipeline_parallel: u32,
}

impl LayoutRecord {
    fn new(layout: &KvLayout) -> Self {
        Self {
            model_fingerprint: layout.model_fingerprint,
            layers: layout.page.layers as u64,
            kv_heads: layout.page.kv_heads as u64,
            head_dim: layout.page.head_dim as u64,
            dtype: layout.page.dtype.name().to_owned(),
            tokens_per_block: layout.page.tokens_per_block as u64,
            tensor_parallel: layout.tensor_parallel,
            pipeline_parallel: layout.pipeline_parallel,
        }
    }

    /// Names the first field that no re-sharding mends, with both values.
    fn check(&self, there: &Self) -> Result<(), HandoffError> {
        let fingerprint = |layout: &Self| format!("{:016x}", layout.model_fingerprint);
        let fields = [
            // Scales are a part of the fingerprint, and of 8-bit KV only.
            ("kv dtype", self.dtype.clone(), there.dtype.clone()),
            ("model fingerprint", fingerprint(self), fingerprint(there)),
            ("layers", self.layers.to_string(), there.layers.to_string()),
            (
                "kv heads",
                self.kv_heads.to_string(),
                there.kv_heads.to_string(),
            ),
            (
                "head size",
                self.head_dim.to_string(),
                there.head_dim.to_string(),
            ),
        ];
        match fields.into_iter().find(|(_, here, there)| here != there) {
            None => Ok(()),
            Some((name, here, there)) => Err(HandoffError::Layout(format!(
                "{name} {here} here, {} there",
                printable(&there)
            ))),
        }
    }
}

/// This instance's layout: as it crosses the wire, and as re-sharding reckons with it.
#[derive(Debug, Clone)]
pub(super) struct OwnLayout {
    pub(super) record: LayoutRecord,
    pub(super) side: Side,
    whole: PageShape,
}

impl OwnLayout {
    /// Otherwise what is wrong with it.
    pub(super) fn new(layout: &KvLayout) -> Result<Self, String> {
        let grid = Grid {
            tensor: layout.tensor_parallel as usize,
            pipeline: layout.pipeline_parallel as usize,
        };
        Ok(Self {
            record: LayoutRecord::new(layout),
            side: Side::new(layout.page, grid)?,
            whole: layout.page,
        })
    }

    /// The other side, if its KV can be converted into ours and ours into its.
    pub(super) fn convertible(&self, there: &LayoutRecord) -> Result<Side, HandoffError> {
        self.record.check(there)?;
        let size = |size: u64| usize::try_from(size).unwrap_or(usize::MAX);
        let whole = PageShape {
            tokens_per_block: size(there.tokens_per_block),
            ..self.whole
        };
        let grid = Grid {
            tensor: size(there.tensor_parallel.into()),
            pipeline: size(there.pipeline_parallel.into()),
        };
        Side::new(whole, grid).map_err(|what| HandoffError::Layout(format!("there: {what}")))
    }
}

/// How one rank of the context instance is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RankRecord {
    pub(super) rank: u32,
    /// One per transport that it has, best first.
    pub(super) endpoints: Vec<EndpointRecord>,
}

/// The state itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct OpaqueState {
    pub(super) version: u32,
    /// The context instance, for messages.
    pub(super) instance: String,
    /// Random per process start: tells a restarted instance from the one that made the ticket.
    pub(super) epoch: u64,
    pub(super) layout: LayoutRecord,
    pub(super) ranks: Vec<RankRecord>,
    pub(super) nonce: Nonce,
    pub(super) token_count: u64,
}

/// The version alone, read first so that another version is named rather than called malformed.
#[derive(Debug, Deserialize)]
struct VersionOnly {
    version: u32,
}

impl OpaqueState {
    pub(super) fn encode(&self) -> Result<Vec<u8>, HandoffError> {
        serde_json::to_vec(self).map_err(|e| HandoffError::State(e.to_string()))
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self, HandoffError> {
        if bytes.len() > STATE_BYTES_MAX {
            return Err(HandoffError::State(format!(
                "{} bytes, at most {STATE_BYTES_MAX} allowed",
                bytes.len()
            )));
        }
        let malformed = |e: serde_json::Error| HandoffError::State(printable(&e.to_string()));
        let decoded: Result<Self, _> = serde_json::from_slice(bytes);
        let version = match &decoded {
            Ok(state) => state.version,
            // One of another version may be anything else.
            Err(_) => serde_json::from_slice(bytes)
                .map_or(PROTOCOL_VERSION, |known: VersionOnly| known.version),
        };
        if version != PROTOCOL_VERSION {
            return Err(HandoffError::State(format!(
                "version {version} there, {PROTOCOL_VERSION} here"
            )));
        }
        decoded.map_err(malformed)
    }
}

/// The secret of a lease: 122 random bits, hexadecimal on the wire. Comparing takes the same time whatever differs.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Nonce([u8; 16]);

impl Nonce {
    pub(super) fn random() -> Self {
        Self(*uuid::Uuid::new_v4().as_bytes())
    }

    /// Another one: what a peer that guesses would send.
    pub(super) fn forged(self) -> Self {
        Self(self.0.map(|byte| !byte))
    }
}

impl PartialEq for Nonce {
    fn eq(&self, other: &Self) -> bool {
        let difference = self
            .0
            .iter()
            .zip(other.0)
            .fold(0, |sum, (a, b)| sum | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

impl Eq for Nonce {}

impl std::fmt::Debug for Nonce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonce(..)")
    }
}

impl From<Nonce> for String {
    fn from(nonce: Nonce) -> Self {
        format!("{:032x}", u128::from_be_bytes(nonce.0))
    }
}

impl TryFrom<String> for Nonce {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        let hexadecimal = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        match u128::from_str_radix(&text, 16) {
            Ok(value) if hexadecimal => Ok(Self(value.to_be_bytes())),
            _ => Err("a nonce is 32 hexadecimal digits"),
        }
    }
}

/// A peer's text for our messages: one line, bounded.
pub(super) fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{KvDtype, PageShape};
    use proptest::prelude::*;

    fn layout() -> KvLayout {
        KvLayout {
            model_fingerprint: 42,
            page: PageShape {
                layers: 2,
                kv_heads: 3,
                tokens_per_block: 32,
                head_dim: 64,
                dtype: KvDtype::F32,
            },
            tensor_parallel: 1,
            pipeline_parallel: 1,
        }
    }

    fn state() -> OpaqueState {
        OpaqueState {
            version: PROTOCOL_VERSION,
            instance: "ctx-0".to_owned(),
            epoch: u64::MAX,
            layout: OwnLayout::new(&layout()).unwrap().record,
            ranks: vec![RankRecord {
                rank: 0,
                endpoints: vec![EndpointRecord {
                    transport: "tcp".to_owned(),
                    address: "127.0.0.1:1".to_owned(),
                    metadata: String::new(),
                }],
            }],
            nonce: Nonce::random(),
            token_count: 77,
        }
    }

    #[test]
    fn a_state_survives_the_wire() {
        let state = state();
        assert_eq!(
            OpaqueState::decode(&state.encode().unwrap()).unwrap(),
            state
        );
    }

    #[test]
    fn another_version_is_named() {
        let mut newer = state();
        newer.version = 9;
        let error = OpaqueState::decode(&newer.encode().unwrap()).unwrap_err();
        let expected =
            format!("hand-off state not understood: version 9 there, {PROTOCOL_VERSION} here");
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn a_layout_difference_names_field_and_both_values() {
        let here = OwnLayout::new(&layout()).unwrap();
        let there = |other: &KvLayout| here.convertible(&LayoutRecord::new(other));
        assert_eq!(there(&layout()), Ok(here.side));
        let mut other = layout();
        other.page.dtype = KvDtype::F16;
        other.page.tokens_per_block = 64;
        assert_eq!(
            there(&other).unwrap_err().to_string(),
            "kv layouts differ: kv dtype float32 here, float16 there"
        );
        other.page.dtype = KvDtype::F32;
        other.tensor_parallel = 3;
        other.pipeline_parallel = 2;
        let side = there(&other).unwrap();
        assert_eq!((side.ranks(), side.tokens_per_block()), (6, 64));
        other.tensor_parallel = 2;
        assert_eq!(
            there(&other).unwrap_err().to_string(),
            "kv layouts differ: there: tensor_parallel_size 2 neither divides 3 key/value heads nor is a multiple of them"
        );
    }

    #[test]
    fn a_nonce_equals_itself_only() {
        let nonce = Nonce::random();
        assert_eq!(Nonce::try_from(String::from(nonce)), Ok(nonce));
        assert_ne!(nonce, nonce.forged());
        assert!(Nonce::try_from("+".repeat(32)).is_err());
        assert_eq!(format!("{nonce:?}"), "Nonce(..)");
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(OpaqueState::decode(&bytes).is_err());
        }

        #[test]
        fn a_damaged_state_never_panics(at in any::<proptest::sample::Index>(), with in any::<u8>()) {
            let mut bytes = state().encode().unwrap();
            let at = at.index(bytes.len());
            bytes[at] = with;
            drop(OpaqueState::decode(&bytes));
            bytes.truncate(at);
            prop_assert!(OpaqueState::decode(&bytes).is_err());
        }
    }
}
