//! How many ranks each node gets, and which GPUs they have there.

use super::{Deal, InstancePlan, JobPlan};

/// `(node, gpu)` of the ranks of a world, in their order.
#[derive(Debug)]
pub(super) struct Seats<'a> {
    tasks: &'a [u32],
    node: usize,
    gpu: u32,
}

impl<'a> Seats<'a> {
    pub(super) fn of(tasks: &'a [u32]) -> Self {
        Self {
            tasks,
            node: 0,
            gpu: 0,
        }
    }
}

impl Iterator for Seats<'_> {
    type Item = (u32, u32);

    fn next(&mut self) -> Option<(u32, u32)> {
        while self.gpu >= *self.tasks.get(self.node)? {
            self.node += 1;
            self.gpu = 0;
        }
        let seat = (index(self.node), self.gpu);
        self.gpu += 1;
        Some(seat)
    }
}

fn index(node: usize) -> u32 {
    u32::try_from(node).unwrap_or(u32::MAX)
}

/// Ranks on each node for instances of `(tensor, pipeline)` whose ranks follow each other. May need more nodes than
/// `nodes_max`, if no fewer are enough.
pub(super) fn world(
    instances: &[(u32, u32)],
    per_node: u32,
    nodes_max: Option<u32>,
) -> (Vec<u32>, Deal) {
    let ranks: u32 = instances
        .iter()
        .map(|(tensor, pipeline)| tensor * pipeline)
        .sum();
    let least = ranks.div_ceil(per_node).max(1);
    let allowed = nodes_max.unwrap_or(u32::MAX);
    let filled = filled(instances, per_node);
    let most = index(filled.len()).min(allowed).max(least);
    let mut best: Option<(u32, Vec<u32>)> = None;
    for nodes in least..=most {
        let tasks = even(ranks, nodes);
        let split = split_groups(instances, &tasks, per_node);
        if best.as_ref().is_none_or(|(fewest, _)| split < *fewest) {
            best = Some((split, tasks));
        }
        if split == 0 {
            break;
        }
    }
    let (split, dealt) = best.expect("there is at least one number of nodes");
    let fits = index(filled.len()) <= allowed;
    if fits && split_groups(instances, &filled, per_node) < split {
        (filled, Deal::Listed)
    } else {
        (dealt, Deal::Blocks)
    }
}

/// What `srun --distribution=block` does: each node gets as many as any other, the first ones the rest.
pub(crate) fn even(ranks: u32, nodes: u32) -> Vec<u32> {
    let (each, rest) = (ranks / nodes, ranks % nodes);
    (0..nodes)
        .map(|node| each + u32::from(node < rest))
        .collect()
}

/// Each node filled with whole groups, in their order; a group that fits on no node starts on a fresh one.
fn filled(instances: &[(u32, u32)], per_node: u32) -> Vec<u32> {
    let mut tasks: Vec<u32> = Vec::new();
    let groups = instances
        .iter()
        .flat_map(|(tensor, pipeline)| std::iter::repeat_n(*tensor, *pipeline as usize));
    for group in groups {
        match tasks.last_mut() {
            Some(last) if *last + group <= per_node => *last += group,
            _ => {
                let mut left = group;
                while left > 0 {
                    tasks.push(left.min(per_node));
                    left -= left.min(per_node);
                }
            }
        }
    }
    tasks
}

/// How many tensor-parallel groups that fit on one node are on two or more.
fn split_groups(instances: &[(u32, u32)], tasks: &[u32], per_node: u32) -> u32 {
    let mut borders = tasks
        .iter()
        .scan(0_u32, |end, count| {
            *end += count;
            Some(*end)
        })
        .peekable();
    let (mut start, mut split) = (0_u32, 0);
    for (tensor, pipeline) in instances {
        for _ in 0..*pipeline {
            let end = start + tensor;
            while borders.peek().is_some_and(|border| *border <= start) {
                borders.next();
            }
            let inside = borders.peek().is_some_and(|border| *border < end);
            split += u32::from(inside && *tensor <= per_node);
            start = end;
        }
    }
    split
}

/// `(node, gpu)` of each rank of an instance.
pub(super) type InstanceSeats = Vec<(u32, u32)>;

/// Ranks on each node, and the seats of each instance, where each instance may go anywhere.
pub(super) fn steps(instances: &[(u32, u32)], per_node: u32) -> (Vec<u32>, Vec<InstanceSeats>) {
    let mut order: Vec<usize> = (0..instances.len()).collect();
    let size = |at: usize| instances[at].0 * instances[at].1;
    order.sort_by_key(|at| std::cmp::Reverse(size(*at)));
    let mut used: Vec<u32> = Vec::new();
    let mut seats: Vec<InstanceSeats> = vec![Vec::new(); instances.len()];
    // Instances come from the largest to the smallest, so a node that was too full for one of a size stays so.
    let mut first_open = (0_u32, 0_usize);
    for at in order {
        let (tensor, ranks) = (instances[at].0, size(at));
        if ranks > per_node {
            seats[at] = spread(tensor, ranks, per_node, &mut used);
            continue;
        }
        if first_open.0 != ranks {
            first_open = (ranks, 0);
        }
        let room = |taken: &u32| *taken + ranks <= per_node;
        let node = first_open.1
            + used[first_open.1..]
                .iter()
                .position(room)
                .unwrap_or(used.len() - first_open.1);
        if node == used.len() {
            used.push(0);
        }
        first_open.1 = node;
        let first = used[node];
        seats[at] = (first..first + ranks)
            .map(|gpu| (index(node), gpu))
            .collect();
        used[node] += ranks;
    }
    (used, seats)
}

/// An instance that fits on no node: fresh nodes, whole groups on each if a group fits on one.
fn spread(tensor: u32, ranks: u32, per_node: u32, used: &mut Vec<u32>) -> InstanceSeats {
    let on_each = if tensor <= per_node {
        per_node / tensor * tensor
    } else {
        per_node
    };
    let mut seats = Vec::new();
    let mut left = ranks;
    while left > 0 {
        let here = left.min(on_each);
        let node = index(used.len());
        seats.extend((0..here).map(|gpu| (node, gpu)));
        used.push(here);
        left -= here;
    }
    seats
}

/// What is worth knowing about the places of a job.
pub(super) fn notes(job: &JobPlan, per_node: u32) -> Vec<String> {
    let straddles = |instance: &&InstancePlan| {
        instance
            .ranks
            .chunks(instance.tensor as usize)
            .any(|group| group.iter().any(|rank| rank.node != group[0].node))
    };
    job.instances
        .iter()
        .filter(straddles)
        .map(|instance| {
            let why = if instance.tensor > per_node {
                format!(
                    "{} ranks do not fit on a node of {per_node}",
                    instance.tensor
                )
            } else {
                "too few nodes to keep it whole; more `nodes` or `start: steps` would".to_owned()
            };
            format!(
                "a tensor-parallel group of {} is on several nodes: {why}",
                instance.label
            )
        })
        .collect()
}
