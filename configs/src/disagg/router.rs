//! The `router` block of a server section (COMPAT.md §9): every known type is checked, those served are kept.

use std::collections::BTreeMap;

use crate::error::{ConfigErrorKind, nearest};
use crate::section::kind::{Choice, Choices, Count, Flag, OneOf, Share, Size, Text, name_of};
use crate::section::read::{Findings, read_section};
use crate::section::{Section, section};
use crate::yaml::{Node, Value, join};

/// How a role's server is chosen (COMPAT.md §9).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum RouterConfig {
    /// Next in turn.
    #[default]
    RoundRobin,
}

impl RouterConfig {
    /// The name as files spell it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::RoundRobin => "round_robin",
        }
    }
}

/// The router types that files may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RouterType {
    RoundRobin,
    LoadBalancing,
    KvCacheAware,
    Conversation,
}

impl Choices for RouterType {
    const TABLE: &'static [(&'static str, Choice<Self>)] = &[
        ("round_robin", Choice::Is(Self::RoundRobin)),
        ("load_balancing", Choice::Is(Self::LoadBalancing)),
        ("kv_cache_aware", Choice::Is(Self::KvCacheAware)),
        ("conversation", Choice::Is(Self::Conversation)),
    ];
}

section! {
    /// How one of a role's servers is chosen for a request.
    RawRoundRobin "router" {}
    checked {
        /// The way of choosing. `round_robin` takes the next in turn and is what this version serves;
        /// `load_balancing`, `kv_cache_aware` and `conversation` are known, checked, and refused by name.
        kind as "type": OneOf<RouterType> = "round_robin";
    }
    unserved {}
    groups &[];
}

section! {
    /// Chooses the server with the least work.
    RawLoadBalancing "router, load_balancing" {}
    checked {
        /// The way of choosing.
        kind as "type": OneOf<RouterType> = "round_robin";
        /// Count tokens instead of requests.
        use_tokens: Flag = "false";
        /// Most requests in a batch of the server.
        max_batch_size: Count = "null";
        /// Most tokens in a batch of the server.
        max_num_tokens: Count = "null";
    }
    unserved {}
    groups &[];
}

section! {
    /// Chooses the server that has most of the prompt in its KV cache.
    RawKvCacheAware "router, kv_cache_aware" {}
    checked {
        /// The way of choosing.
        kind as "type": OneOf<RouterType> = "round_robin";
        /// Count tokens instead of requests.
        use_tokens: Flag = "false";
        /// Requests at which a server counts as full.
        max_batch_size: Count = "64";
        /// Most tokens in a batch of the server.
        max_num_tokens: Count = "null";
        /// Tokens per block of the servers.
        tokens_per_block: Count = "32";
        /// Tokenizer that is not the model's.
        custom_tokenizer: Text = "null";
        /// Add a finished request's blocks to the table without asking the server.
        backfill_block_hashes_on_finish: Flag = "false";
    }
    unserved {}
    groups &[];
}

section! {
    /// Keeps a conversation on its server.
    RawConversation "router, conversation" {}
    checked {
        /// The way of choosing.
        kind as "type": OneOf<RouterType> = "round_robin";
        /// Share of a prompt that must match a session.
        match_threshold: Share = "0.75";
        /// Tokens per hashed block.
        tokens_per_block: Count = "128";
        /// Hash token ids instead of characters.
        use_token_ids: Flag = "false";
        /// Blocks at the start that are not hashed.
        hash_skip_count: Size = "0";
        /// Most sessions that are remembered.
        max_sessions: Count = "100000";
        /// Most requests in a batch of the server.
        max_batch_size: Count = "null";
        /// Most tokens in a batch of the server.
        max_num_tokens: Count = "null";
    }
    unserved {}
    groups &[];
}

/// What a `router` block asks for.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct RouterWish {
    pub(crate) kind: RouterType,
    /// The arguments, those of the section that count for its router among them (COMPAT.md §4.2).
    pub(crate) arguments: BTreeMap<String, Node>,
}

/// Reads a `router` block; `engine` is the section's engine options, some of which are arguments too.
pub(crate) fn read(
    node: Option<&Node>,
    path: &str,
    engine: &Node,
    findings: &mut Findings,
) -> Option<RouterWish> {
    let Some(node) = node.filter(|node| !node.is_null()) else {
        return Some(RouterWish::new(RouterType::RoundRobin));
    };
    let kind = read_type(node, path, findings)?;
    match kind {
        RouterType::RoundRobin => read_section::<RawRoundRobin>(node, path, findings).map(drop),
        RouterType::LoadBalancing => {
            read_section::<RawLoadBalancing>(node, path, findings).map(drop)
        }
        RouterType::KvCacheAware => read_section::<RawKvCacheAware>(node, path, findings).map(drop),
        RouterType::Conversation => read_section::<RawConversation>(node, path, findings).map(drop),
    }?;
    let mut wish = RouterWish::new(kind);
    if kind == RouterType::RoundRobin {
        return Some(wish);
    }
    for entry in node.entries().iter().filter(|entry| entry.key != "type") {
        wish.arguments.insert(entry.key.clone(), entry.node.clone());
    }
    let block_size = engine
        .entry("kv_cache_config")
        .and_then(|kv| kv.node.entry("tokens_per_block"));
    let from_section = ["max_batch_size", "max_num_tokens"].map(|key| engine.entry(key));
    for entry in from_section.into_iter().chain([block_size]).flatten() {
        wish.arguments
            .entry(entry.key.clone())
            .or_insert_with(|| entry.node.clone());
    }
    Some(wish)
}

/// Reads the type before anything else, because it decides which arguments there are.
fn read_type(node: &Node, path: &str, findings: &mut Findings) -> Option<RouterType> {
    let Some(entry) = node.entry("type") else {
        return Some(RouterType::RoundRobin);
    };
    let named = match &entry.node.value {
        Value::Null => return Some(RouterType::RoundRobin),
        Value::Text(name) => name.as_str(),
        _ => "",
    };
    let found = RouterType::TABLE
        .iter()
        .find(|(name, _)| name.eq_ignore_ascii_case(named));
    if let Some((_, Choice::Is(kind))) = found {
        return Some(*kind);
    }
    let names = crate::section::kind::listed(RouterType::served_names());
    let hint =
        nearest(named, RouterType::served_names()).map(|name| format!("did you mean `{name}`?"));
    findings.wrong(
        &entry.node,
        &join(path, "type"),
        &format!("one of {names}"),
        hint,
    );
    None
}

impl RouterWish {
    fn new(kind: RouterType) -> Self {
        Self {
            kind,
            arguments: BTreeMap::new(),
        }
    }

    /// The router, if this version serves it; else the refusal is recorded.
    pub(crate) fn served(
        &self,
        node: Option<&Node>,
        path: &str,
        findings: &mut Findings,
    ) -> Option<RouterConfig> {
        if self.kind == RouterType::RoundRobin {
            return Some(RouterConfig::RoundRobin);
        }
        let arguments = self
            .arguments
            .iter()
            .map(|(key, value)| format!("{key} {}", value.shown()));
        let arguments = arguments.collect::<Vec<_>>().join(", ");
        let name = name_of(self.kind);
        let found = if arguments.is_empty() {
            format!("`{name}`")
        } else {
            format!("`{name}` ({arguments})")
        };
        let kind = ConfigErrorKind::NotServed {
            found,
            what: "routers other than `round_robin`".to_owned(),
        };
        findings.error(
            node.and_then(|node| node.place),
            &join(path, "type"),
            kind,
            None,
        );
        None
    }
}

/// The tables of all types, for schema and documentation.
pub(crate) const TABLES: &[&crate::section::SectionTable] = &[
    RawRoundRobin::TABLE,
    RawLoadBalancing::TABLE,
    RawKvCacheAware::TABLE,
    RawConversation::TABLE,
];
