//! Which rank runs on which node and GPU, and who listens on which port: a pure function of the layout.
//!
//! Nodes are numbers, in the order of the job's node list; their names are bound inside the allocation, so a job that
//! starts again on other nodes has the same plan.
//!
//! The ranks of a tensor-parallel group talk at every layer, so a group stays on one node whenever it fits on one:
//! - `steps`: each instance takes GPUs of one node, in a row, if it fits; larger ones take fresh nodes, whole groups on
//!   each. Larger instances are placed first and smaller ones fill what is left.
//! - `one_world` and `jobs`: the ranks of all instances of a job follow each other, contexts first, because the world is
//!   split by rank number. `srun` deals them out in even blocks; where that would cut groups, or take more nodes than are
//!   needed, each node is filled with whole groups and the places are listed for `srun`.
//!
//! A group that is larger than a node straddles, and the plan says so.

pub(crate) mod place;
pub(crate) mod text;

use baton_configs::layout::inspect::Fault;
use baton_configs::layout::job::{JobLayout, StartMode};
use baton_configs::layout::{Layout, RoleLayout};

use place::Seats;

/// Most ranks of one deployment.
pub const RANKS_MAX: u64 = 65_536;

/// What an instance does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It reads prompts.
    Context,
    /// It writes answers.
    Generation,
}

impl Role {
    /// The short name in labels: `ctx` or `gen`.
    #[must_use]
    pub fn short(self) -> &'static str {
        match self {
            Self::Context => "ctx",
            Self::Generation => "gen",
        }
    }

    /// The name of the layout's section.
    #[must_use]
    pub fn section(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Generation => "generation",
        }
    }

    /// The role's part of a layout.
    #[must_use]
    pub fn of(self, layout: &Layout) -> &RoleLayout {
        match self {
            Self::Context => &layout.context,
            Self::Generation => &layout.generation,
        }
    }
}

/// The place of one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankPlan {
    /// Its number in the instance: `pp * tensor_parallel_size + tp`.
    pub rank: u32,
    /// Its stage of the pipeline.
    pub pp: u32,
    /// Its place in the tensor-parallel group.
    pub tp: u32,
    /// Its number in the world that one `srun` starts.
    pub world_rank: u32,
    /// The node, from 0 in the order of the job's node list.
    pub node: u32,
    /// The GPU of that node.
    pub gpu: u32,
}

/// One instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstancePlan {
    /// `ctx0`, `gen0`.
    pub label: String,
    /// What it does.
    pub role: Role,
    /// Ranks of a tensor-parallel group.
    pub tensor: u32,
    /// Stages of the pipeline.
    pub pipeline: u32,
    /// Its HTTP port; `None` lets the kernel choose.
    pub port: Option<u16>,
    /// Its ranks, in their order; the first one leads.
    pub ranks: Vec<RankPlan>,
}

impl InstancePlan {
    /// How many ranks it has on each of its nodes: node, then the ranks' GPUs there, in the order of the ranks.
    #[must_use]
    pub fn by_node(&self) -> Vec<(u32, Vec<u32>)> {
        let mut nodes: Vec<(u32, Vec<u32>)> = Vec::new();
        for rank in &self.ranks {
            match nodes.last_mut() {
                Some((node, gpus)) if *node == rank.node => gpus.push(rank.gpu),
                _ => nodes.push((rank.node, vec![rank.gpu])),
            }
        }
        nodes
    }
}

/// Where the proxy is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyPlan {
    /// Its node.
    pub node: u32,
    /// Its port; 0 lets the kernel choose.
    pub port: u16,
}

/// How `srun` comes to the plan's places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deal {
    /// It deals the ranks out in even blocks.
    Blocks,
    /// It is given the node of each rank.
    Listed,
}

/// One job of Slurm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobPlan {
    /// Its name.
    pub name: String,
    /// Which instances it starts, as `baton launch --only` takes it; `None` is all of them.
    pub only: Option<&'static str>,
    /// Ranks on each node.
    pub tasks: Vec<u32>,
    /// How `srun` comes to them.
    pub deal: Deal,
    /// Its instances, contexts first.
    pub instances: Vec<InstancePlan>,
    /// The proxy, if it runs here.
    pub proxy: Option<ProxyPlan>,
}

impl JobPlan {
    /// How many nodes it has.
    #[must_use]
    pub fn nodes(&self) -> u32 {
        u32::try_from(self.tasks.len()).unwrap_or(u32::MAX).max(1)
    }

    /// Most ranks of one of its nodes; a proxy alone counts as one.
    #[must_use]
    pub fn tasks_max(&self) -> u32 {
        self.tasks.iter().copied().max().unwrap_or(0).max(1)
    }

    /// All its ranks.
    #[must_use]
    pub fn ranks(&self) -> u32 {
        self.tasks.iter().sum()
    }
}

/// A whole deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How the ranks are started.
    pub start: StartMode,
    /// The jobs, in the order in which they are submitted.
    pub jobs: Vec<JobPlan>,
    /// What is worth knowing about the places.
    pub notes: Vec<String>,
}

impl Plan {
    /// Every instance, contexts first.
    pub fn instances(&self) -> impl Iterator<Item = &InstancePlan> {
        self.jobs.iter().flat_map(|job| &job.instances)
    }

    /// The plan as YAML.
    #[must_use]
    pub fn to_yaml(&self) -> String {
        text::yaml(self)
    }

    /// The plan for people: a line for each node.
    #[must_use]
    pub fn summary(&self) -> String {
        text::summary(self)
    }
}

/// Why a layout has no plan: everything that is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the layout has no plan: {}", .0.iter().map(|fault| fault.what.as_str()).collect::<Vec<_>>().join("; "))]
pub struct PlanErrors(pub Vec<Fault>);

/// Plans a layout.
///
/// # Errors
/// Everything that keeps the layout from having a plan, each with the layout's key.
pub fn plan(layout: &Layout) -> Result<Plan, PlanErrors> {
    let Some(job) = &layout.job else {
        return Err(PlanErrors(vec![Fault::new(
            "gpus_per_node",
            "missing, expected how many ranks a node holds, one GPU each".to_owned(),
            "a layout for a cluster says so; `gpus_per_node: 8`",
        )]));
    };
    let mut faults = mismatches(layout);
    let instances = numbered(layout, job, &mut faults);
    if !faults.is_empty() {
        return Err(PlanErrors(faults));
    }
    let proxy = ProxyPlan {
        node: 0,
        port: job.proxy_port,
    };
    let jobs = match job.start {
        StartMode::OneWorld => world_job(job, None, instances).map(|mut world| {
            world.proxy = Some(proxy);
            vec![world]
        }),
        StartMode::Steps => steps_job(job, instances).map(|mut steps| {
            steps.proxy = Some(proxy);
            vec![steps]
        }),
        StartMode::Jobs => role_jobs(job, instances, proxy),
    };
    let jobs = jobs.map_err(PlanErrors)?;
    let notes = jobs
        .iter()
        .flat_map(|planned| place::notes(planned, job.gpus_per_node))
        .collect();
    Ok(Plan {
        start: job.start,
        jobs,
        notes,
    })
}

/// What keeps a context and a generation instance from sharing KV, as far as the options say.
fn mismatches(layout: &Layout) -> Vec<Fault> {
    let tokens = |role: &RoleLayout| role.options.kv_cache.tokens_per_block;
    let (context, generation) = (tokens(&layout.context), tokens(&layout.generation));
    if context == generation {
        return Vec::new();
    }
    vec![Fault::new(
        "generation.engine.kv_cache_config.tokens_per_block",
        format!(
            "is {generation}, but {context} for the context instances: no KV could be handed over"
        ),
        "give both roles the same, best in the top-level `engine`",
    )]
}

/// The instances in the order of the world, with their ports and without places.
fn numbered(layout: &Layout, job: &JobLayout, faults: &mut Vec<Fault>) -> Vec<InstancePlan> {
    let ranks = |role: &RoleLayout| {
        u64::from(role.options.tensor_parallel_size)
            .saturating_mul(u64::from(role.options.pipeline_parallel_size))
    };
    let mut world: u64 = 0;
    let mut largest = (0, Role::Context);
    for role in [Role::Context, Role::Generation] {
        let part = role.of(layout);
        world = world.saturating_add(ranks(part).saturating_mul(u64::from(part.instances)));
        if ranks(part) > largest.0 {
            largest = (ranks(part), role);
        }
    }
    if world > RANKS_MAX {
        let key = format!("{}.engine.tensor_parallel_size", largest.1.section());
        let what = format!("makes a world of {world} ranks, more than {RANKS_MAX}");
        faults.push(Fault::new(&key, what, "is it a mistyped number?"));
        return Vec::new();
    }
    let count = layout.context.instances + layout.generation.instances;
    if let Some(range) = job.ports.filter(|range| range.count() < count) {
        let what = format!(
            "{}-{} are {} ports for {count} instances",
            range.first,
            range.last,
            range.count()
        );
        let last = u32::from(range.first) + count - 1;
        let hint = if last <= u32::from(u16::MAX) {
            format!("ports: {}-{last}", range.first)
        } else {
            "leave `ports` out: each node's kernel then chooses".to_owned()
        };
        faults.push(Fault::new("ports", what, hint));
        return Vec::new();
    }
    let mut ports = job.ports.map(|range| range.first..=range.last);
    let mut instances = Vec::new();
    for role in [Role::Context, Role::Generation] {
        let options = &role.of(layout).options;
        for index in 0..role.of(layout).instances {
            instances.push(InstancePlan {
                label: format!("{}{index}", role.short()),
                role,
                tensor: options.tensor_parallel_size,
                pipeline: options.pipeline_parallel_size,
                port: ports.as_mut().and_then(Iterator::next),
                ranks: Vec::new(),
            });
        }
    }
    instances
}

/// A job whose instances are one world each rank of which knows its part by its number.
fn world_job(
    job: &JobLayout,
    only: Option<Role>,
    mut instances: Vec<InstancePlan>,
) -> Result<JobPlan, Vec<Fault>> {
    let groups: Vec<(u32, u32)> = instances
        .iter()
        .map(|instance| (instance.tensor, instance.pipeline))
        .collect();
    let (tasks, deal) = place::world(&groups, job.gpus_per_node, job.slurm.nodes);
    enough_nodes(job, &tasks, only)?;
    let mut seats = Seats::of(&tasks);
    let mut world_rank = 0;
    for instance in &mut instances {
        instance.ranks = ranks_of(instance, world_rank, || seats.next());
        world_rank += instance.tensor * instance.pipeline;
    }
    let base = &job.slurm.job_name;
    Ok(JobPlan {
        name: only.map_or_else(|| base.clone(), |role| format!("{base}-{}", role.short())),
        only: only.map(Role::short),
        tasks,
        deal,
        instances,
        proxy: None,
    })
}

/// A job in which each instance is a step of its own.
fn steps_job(job: &JobLayout, mut instances: Vec<InstancePlan>) -> Result<JobPlan, Vec<Fault>> {
    let groups: Vec<(u32, u32)> = instances
        .iter()
        .map(|instance| (instance.tensor, instance.pipeline))
        .collect();
    let (tasks, seats) = place::steps(&groups, job.gpus_per_node);
    enough_nodes(job, &tasks, None)?;
    for (instance, seats) in instances.iter_mut().zip(seats) {
        let mut seats = seats.into_iter();
        // Each step is a world of its own.
        instance.ranks = ranks_of(instance, 0, || seats.next());
    }
    Ok(JobPlan {
        name: job.slurm.job_name.clone(),
        only: None,
        tasks,
        deal: Deal::Listed,
        instances,
        proxy: None,
    })
}

fn role_jobs(
    job: &JobLayout,
    instances: Vec<InstancePlan>,
    proxy: ProxyPlan,
) -> Result<Vec<JobPlan>, Vec<Fault>> {
    let (context, generation): (Vec<_>, Vec<_>) = instances
        .into_iter()
        .partition(|instance| instance.role == Role::Context);
    let mut faults = Vec::new();
    let mut jobs = vec![JobPlan {
        name: format!("{}-proxy", job.slurm.job_name),
        only: Some("proxy"),
        tasks: vec![1],
        deal: Deal::Blocks,
        instances: Vec::new(),
        proxy: Some(proxy),
    }];
    for (role, instances) in [(Role::Context, context), (Role::Generation, generation)] {
        match world_job(job, Some(role), instances) {
            Ok(planned) => jobs.push(planned),
            Err(found) => faults.extend(found),
        }
    }
    if faults.is_empty() {
        Ok(jobs)
    } else {
        Err(faults)
    }
}

fn enough_nodes(job: &JobLayout, tasks: &[u32], only: Option<Role>) -> Result<(), Vec<Fault>> {
    let needed = tasks.len();
    let Some(given) = job.slurm.nodes.filter(|given| needed > *given as usize) else {
        return Ok(());
    };
    let ranks: u32 = tasks.iter().sum();
    let whose = only.map_or(String::new(), |role| {
        format!(" of the {} job", role.section())
    });
    let what = format!(
        "{given} nodes of {} ranks for {ranks} ranks{whose}, which need {needed} nodes",
        job.gpus_per_node
    );
    Err(vec![Fault::new(
        "slurm.nodes",
        what,
        format!("`nodes: {needed}`, fewer instances, or leave `nodes` out"),
    )])
}

/// The ranks of an instance on the seats that come next.
fn ranks_of(
    instance: &InstancePlan,
    first_world_rank: u32,
    mut seat: impl FnMut() -> Option<(u32, u32)>,
) -> Vec<RankPlan> {
    (0..instance.tensor * instance.pipeline)
        .map(|rank| {
            let (node, gpu) = seat().expect("there is a seat for each rank of the world");
            RankPlan {
                rank,
                pp: rank / instance.tensor,
                tp: rank % instance.tensor,
                world_rank: first_world_rank + rank,
                node,
                gpu,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests;
