//! Tests of plans: nothing is used twice, groups stay whole, the same layout gives the same plan.

use std::collections::BTreeSet;
use std::time::Instant;

use baton_configs::layout;
use baton_configs::yaml::Document;
use proptest::prelude::*;

use super::*;
use crate::plan::place::even;

fn layout_of(text: &str) -> Layout {
    let document = Document::parse("layout.yaml", text).expect("valid YAML");
    layout::resolve(&document, Some("m"))
        .unwrap_or_else(|error| panic!("{error}"))
        .0
}

fn planned(text: &str) -> Plan {
    plan(&layout_of(text)).unwrap_or_else(|error| panic!("{error}"))
}

fn text_of(
    start: &str,
    per_node: u32,
    context: (u32, u32, u32),
    generation: (u32, u32, u32),
) -> String {
    let role = |name: &str, (instances, tensor, pipeline): (u32, u32, u32)| {
        format!(
            "{name}: {{instances: {instances}, engine: {{tensor_parallel_size: {tensor}, pipeline_parallel_size: {pipeline}}}}}\n"
        )
    };
    format!(
        "start: {start}\ngpus_per_node: {per_node}\nports: 9000-19000\n{}{}",
        role("context", context),
        role("generation", generation)
    )
}

/// What every plan keeps, whatever the layout.
fn holds(plan: &Plan, per_node: u32) {
    let mut ports = BTreeSet::new();
    for job in &plan.jobs {
        let mut seats = BTreeSet::new();
        let mut worlds = BTreeSet::new();
        let mut counts = vec![0_u32; job.tasks.len()];
        for instance in &job.instances {
            let size = instance.tensor * instance.pipeline;
            assert_eq!(instance.ranks.len(), size as usize);
            assert!(ports.insert(instance.port), "a port twice");
            for (index, rank) in instance.ranks.iter().enumerate() {
                assert_eq!(rank.rank as usize, index);
                assert_eq!(rank.rank, rank.pp * instance.tensor + rank.tp);
                assert!(rank.gpu < per_node, "{rank:?}");
                assert!(seats.insert((rank.node, rank.gpu)), "a GPU twice: {rank:?}");
                if plan.start == StartMode::Steps {
                    assert_eq!(rank.world_rank, rank.rank);
                } else {
                    assert!(worlds.insert(rank.world_rank), "a rank twice: {rank:?}");
                }
                counts[rank.node as usize] += 1;
            }
        }
        if job.instances.is_empty() {
            continue;
        }
        assert_eq!(counts, job.tasks);
        assert!(job.tasks.iter().all(|count| (1..=per_node).contains(count)));
        if plan.start != StartMode::Steps {
            assert_eq!(
                worlds.iter().copied().collect::<Vec<_>>(),
                (0..job.ranks()).collect::<Vec<_>>()
            );
            let nodes: Vec<u32> = job
                .instances
                .iter()
                .flat_map(|instance| instance.ranks.iter().map(|rank| rank.node))
                .collect();
            assert!(nodes.is_sorted(), "the world is not dealt in blocks");
            if job.deal == Deal::Blocks {
                assert_eq!(job.tasks, even(job.ranks(), job.nodes()));
            }
        }
    }
    let proxies = plan.jobs.iter().filter(|job| job.proxy.is_some()).count();
    assert_eq!(proxies, 1);
}

/// Tensor-parallel groups that would fit on a node and are on several.
fn split(plan: &Plan, per_node: u32) -> usize {
    plan.instances()
        .filter(|instance| instance.tensor <= per_node)
        .flat_map(|instance| instance.ranks.chunks(instance.tensor as usize))
        .filter(|group| group.iter().any(|rank| rank.node != group[0].node))
        .count()
}

fn sizes() -> impl Strategy<Value = (u32, u32, u32)> {
    (1_u32..7, 1_u32..10, 1_u32..5)
}

proptest! {
    #[test]
    fn no_gpu_port_or_rank_is_used_twice(
        start in prop::sample::select(vec!["one_world", "steps", "jobs"]),
        per_node in 1_u32..10,
        context in sizes(),
        generation in sizes(),
    ) {
        let text = text_of(start, per_node, context, generation);
        let first = planned(&text);
        holds(&first, per_node);
        // Groups that fit on a node are whole in every mode, because nodes are not limited here.
        prop_assert_eq!(split(&first, per_node), 0, "{}", first.summary());
        prop_assert_eq!(first, planned(&text));
    }

    #[test]
    fn with_few_nodes_there_is_a_plan_or_a_reason(
        start in prop::sample::select(vec!["one_world", "steps", "jobs"]),
        per_node in 1_u32..10,
        nodes in 1_u32..12,
        context in sizes(),
        generation in sizes(),
    ) {
        let text = format!("{}slurm: {{nodes: {nodes}}}\n", text_of(start, per_node, context, generation));
        match plan(&layout_of(&text)) {
            Ok(plan) => {
                holds(&plan, per_node);
                prop_assert!(plan.jobs.iter().all(|job| job.nodes() <= nodes));
            }
            Err(PlanErrors(faults)) => {
                prop_assert!(faults.iter().all(|fault| fault.key == "slurm.nodes"));
                prop_assert!(faults.iter().all(|fault| fault.hint.is_some()));
            }
        }
    }
}

#[test]
fn an_even_world_is_left_to_srun_and_an_uneven_one_is_listed() {
    let even_world = planned(&text_of("one_world", 4, (2, 2, 1), (1, 2, 2)));
    assert_eq!(even_world.jobs[0].tasks, [4, 4]);
    assert_eq!(even_world.jobs[0].deal, Deal::Blocks);
    // 2+2+2 and 4 on nodes of 8: five and five would cut the third context instance.
    let uneven = planned(&text_of("one_world", 8, (3, 2, 1), (1, 4, 1)));
    assert_eq!(uneven.jobs[0].tasks, [6, 4]);
    assert_eq!(uneven.jobs[0].deal, Deal::Listed);
    assert_eq!(uneven.notes, Vec::<String>::new());
    // Three each would cut the second of three instances; two nodes are enough all the same.
    let tight = planned(&text_of("jobs", 4, (3, 2, 1), (1, 1, 1)));
    assert_eq!(tight.jobs[1].tasks, [4, 2]);
    assert_eq!(tight.jobs[1].deal, Deal::Listed);
}

#[test]
fn contexts_come_first_and_the_first_rank_leads() {
    let plan = planned(&text_of("one_world", 4, (2, 2, 1), (1, 2, 1)));
    let leaders: Vec<(&str, u32)> = plan
        .instances()
        .map(|instance| (instance.label.as_str(), instance.ranks[0].world_rank))
        .collect();
    assert_eq!(leaders, [("ctx0", 0), ("ctx1", 2), ("gen0", 4)]);
    assert_eq!(
        plan.jobs[0].proxy,
        Some(ProxyPlan {
            node: 0,
            port: 8000
        })
    );
}

#[test]
fn steps_fill_what_larger_instances_leave() {
    let plan = planned(&text_of("steps", 8, (2, 2, 1), (1, 6, 2)));
    // Two nodes of six ranks for the generation instance, and the two left over on each for a context instance.
    assert_eq!(plan.jobs[0].tasks, [8, 8]);
    let places: Vec<_> = plan.instances().map(InstancePlan::by_node).collect();
    assert_eq!(places[0], [(0, vec![6, 7])]);
    assert_eq!(places[1], [(1, vec![6, 7])]);
    assert_eq!(places[2], [(0, (0..6).collect()), (1, (0..6).collect())]);
}

#[test]
fn a_group_larger_than_a_node_straddles_and_the_plan_says_so() {
    let plan = planned(&text_of("steps", 4, (1, 1, 1), (1, 8, 1)));
    assert_eq!(plan.notes.len(), 1);
    assert!(plan.notes[0].contains("gen0"), "{:?}", plan.notes);
    assert!(plan.notes[0].contains("8 ranks do not fit on a node of 4"));
}

#[test]
fn jobs_have_a_role_each_and_the_proxy_one_of_its_own() {
    let plan = planned(&text_of("jobs", 4, (2, 2, 1), (1, 4, 1)));
    let jobs: Vec<(&str, Option<&str>, u32)> = plan
        .jobs
        .iter()
        .map(|job| (job.name.as_str(), job.only, job.nodes()))
        .collect();
    assert_eq!(
        jobs,
        [
            ("baton-proxy", Some("proxy"), 1),
            ("baton-ctx", Some("ctx"), 1),
            ("baton-gen", Some("gen"), 1)
        ]
    );
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let layout = layout_of(
        "gpus_per_node: 4\nports: 9000-9001\ngeneration: {engine: {kv_cache_config: {tokens_per_block: 64}}}\n",
    );
    let PlanErrors(faults) = plan(&layout).expect_err("refused");
    let keys: Vec<&str> = faults.iter().map(|fault| fault.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "generation.engine.kv_cache_config.tokens_per_block",
            "ports"
        ]
    );
    let PlanErrors(faults) = plan(&layout_of("model: m")).expect_err("no part for clusters");
    assert_eq!(faults[0].key, "gpus_per_node");
    let huge = layout_of(
        "gpus_per_node: 8\nengine: {tensor_parallel_size: 4096, pipeline_parallel_size: 64}\n",
    );
    let PlanErrors(faults) = plan(&huge).expect_err("too large");
    assert_eq!(faults[0].key, "context.engine.tensor_parallel_size");
}

#[test]
fn a_large_cluster_is_planned_in_no_time() {
    for start in ["one_world", "steps", "jobs"] {
        let text = text_of(start, 8, (256, 8, 1), (128, 8, 2));
        let layout = layout_of(&text);
        let before = Instant::now();
        let planned = plan(&layout).unwrap_or_else(|error| panic!("{error}"));
        let folder = crate::render::RunFolder::new("/runs/large", &layout);
        let rendered = crate::render::render(&layout, &planned, &folder).expect("files");
        let elapsed = before.elapsed();
        let bytes: usize = rendered.files.iter().map(|file| file.text.len()).sum();
        println!("{start}: 512 nodes of 8 GPUs, {bytes} bytes of files, in {elapsed:?}");
        assert_eq!(
            planned.jobs.iter().map(JobPlan::nodes).sum::<u32>(),
            if start == "jobs" { 513 } else { 512 }
        );
        // The aim is 100 ms; a test machine may be busy.
        assert!(elapsed.as_secs() < 5, "{elapsed:?}");
    }
}
