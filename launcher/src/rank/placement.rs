//! Which node runs which rank: as the PMI mapping says it, else from the tasks of each node and the way they are dealt.

/// Ranks whose places are worked out; a larger world gets none.
const RANKS_MAX: u32 = 1 << 20;

/// How ranks are dealt out to nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Deal {
    /// A node is filled before the next.
    Block,
    /// One rank a node, round and round.
    Cyclic,
    /// So many ranks a node, round and round.
    Plane(u32),
}

impl Deal {
    /// The way that `SLURM_DISTRIBUTION` (with `SLURM_DIST_PLANESIZE`) names; only its first level is about nodes.
    pub(super) fn of(distribution: &str, plane: Option<u32>) -> Option<Self> {
        let nodes = distribution.split([':', ',']).next()?;
        let (word, size) = nodes.split_once('=').unwrap_or((nodes, ""));
        match word.to_ascii_lowercase().as_str() {
            "block" => Some(Self::Block),
            "cyclic" => Some(Self::Cyclic),
            "plane" => size.parse().ok().or(plane).map(Self::Plane),
            // `arbitrary` follows a host file.
            _ => None,
        }
    }

    fn chunk(self) -> u32 {
        match self {
            Self::Block => u32::MAX,
            Self::Cyclic => 1,
            Self::Plane(size) => size.max(1),
        }
    }
}

/// The node of each rank. Empty: not known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Placement {
    nodes: Vec<usize>,
}

impl Placement {
    /// Deals out as many ranks as the nodes have tasks.
    pub(super) fn dealt(tasks_per_node: &[u32], deal: Deal) -> Self {
        let sum = tasks_per_node
            .iter()
            .try_fold(0_u32, |sum, tasks| sum.checked_add(*tasks));
        if sum.is_none_or(|sum| sum > RANKS_MAX) {
            return Self::default();
        }
        let mut left = tasks_per_node.to_vec();
        let mut nodes = Vec::new();
        while left.iter().any(|tasks| *tasks > 0) {
            for (node, tasks) in left.iter_mut().enumerate() {
                let dealt = deal.chunk().min(*tasks);
                *tasks -= dealt;
                nodes.extend((0..dealt).map(|_| node));
            }
        }
        Self { nodes }
    }

    /// Reads PMI's process mapping, `(vector,(FIRST_NODE,NODES,RANKS_PER_NODE),…)`, blocks in the order of ranks.
    /// Exact for any distribution. Anything else is no mapping.
    pub(super) fn mapped(text: &str) -> Option<Self> {
        let compact: String = text.chars().filter(|c| !c.is_whitespace()).collect();
        let blocks = compact.strip_prefix("(vector,(")?.strip_suffix("))")?;
        let mut nodes = Vec::new();
        for block in blocks.split("),(") {
            let mut numbers = block.split(',').map(|number| number.parse::<u32>().ok());
            let (first, count, ranks) = (numbers.next()??, numbers.next()??, numbers.next()??);
            if numbers.next().is_some() {
                return None;
            }
            let total = u32::try_from(nodes.len()).ok()?;
            let sum = count.checked_mul(ranks)?.checked_add(total)?;
            if sum > RANKS_MAX {
                return None;
            }
            for node in first..first.checked_add(count)? {
                let node = usize::try_from(node).ok()?;
                nodes.extend((0..ranks).map(|_| node));
            }
        }
        Some(Self { nodes })
    }

    /// Ranks whose place is known.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn node_of(&self, rank: u32) -> Option<usize> {
        self.nodes.get(usize::try_from(rank).ok()?).copied()
    }

    /// Ranks on a node, in order.
    pub(super) fn ranks_on(&self, node: usize) -> impl Iterator<Item = u32> {
        (0..)
            .zip(&self.nodes)
            .filter(move |(_, of)| **of == node)
            .map(|(rank, _)| rank)
    }
}
