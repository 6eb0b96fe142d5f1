//! A plan as YAML and as a table.

use std::fmt::Write as _;

use super::{Deal, InstancePlan, JobPlan, Plan};
use crate::hostlist::compress_counts;

fn line(out: &mut String, text: &str) {
    // Writing to a String cannot fail.
    let _ = writeln!(out, "{text}");
}

/// The file name of a job's script.
pub(crate) fn script_name(job: &JobPlan) -> String {
    format!("{}.sbatch", job.only.unwrap_or("job"))
}

/// Every place, one a line.
pub(super) fn yaml(plan: &Plan) -> String {
    let mut out = String::from(
        "# Written by baton. Nodes are counted from 0 in the order of the job's node list.\n",
    );
    line(&mut out, &format!("start: {}", plan.start.name()));
    line(&mut out, "jobs:");
    for job in &plan.jobs {
        line(&mut out, &format!("  - name: {}", quoted(&job.name)));
        line(&mut out, &format!("    script: {}", script_name(job)));
        line(&mut out, &format!("    nodes: {}", job.nodes()));
        let tasks: Vec<String> = job.tasks.iter().map(ToString::to_string).collect();
        line(
            &mut out,
            &format!("    ranks_per_node: [{}]", tasks.join(", ")),
        );
        let deal = match job.deal {
            Deal::Blocks => "blocks",
            Deal::Listed => "listed",
        };
        line(&mut out, &format!("    deal: {deal}"));
        if let Some(proxy) = job.proxy {
            let text = format!("    proxy: {{node: {}, port: {}}}", proxy.node, proxy.port);
            line(&mut out, &text);
        }
        if job.instances.is_empty() {
            line(&mut out, "    instances: []");
            continue;
        }
        line(&mut out, "    instances:");
        for instance in &job.instances {
            write_instance(&mut out, instance);
        }
    }
    out
}

fn write_instance(out: &mut String, instance: &InstancePlan) {
    let port = instance
        .port
        .map_or("null".to_owned(), |port| port.to_string());
    line(out, &format!("      - instance: {}", instance.label));
    line(out, &format!("        role: {}", instance.role.section()));
    line(
        out,
        &format!("        tensor_parallel_size: {}", instance.tensor),
    );
    line(
        out,
        &format!("        pipeline_parallel_size: {}", instance.pipeline),
    );
    line(out, &format!("        port: {port}"));
    line(out, "        ranks:");
    for rank in &instance.ranks {
        let text = format!(
            "          - {{rank: {}, pp: {}, tp: {}, world_rank: {}, node: {}, gpu: {}}}",
            rank.rank, rank.pp, rank.tp, rank.world_rank, rank.node, rank.gpu
        );
        line(out, &text);
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A line for each instance, with its nodes and GPUs.
pub(super) fn summary(plan: &Plan) -> String {
    let mut out = String::new();
    for job in &plan.jobs {
        let head = format!(
            "job {}: {} node{}, {} rank{} ({} a node), {}",
            job.name,
            job.nodes(),
            plural(job.nodes()),
            job.ranks(),
            plural(job.ranks()),
            compress_counts(&job.tasks),
            script_name(job)
        );
        line(&mut out, &head);
        if let Some(proxy) = job.proxy {
            line(
                &mut out,
                &format!(
                    "  proxy  node {}  port {}",
                    proxy.node,
                    shown_port(Some(proxy.port))
                ),
            );
        }
        for instance in &job.instances {
            let places: Vec<String> = instance
                .by_node()
                .iter()
                .map(|(node, gpus)| format!("node {node} gpu {}", ranges(gpus)))
                .collect();
            let text = format!(
                "  {}  tp {} pp {}  port {}  {}",
                instance.label,
                instance.tensor,
                instance.pipeline,
                shown_port(instance.port),
                shortened(&places)
            );
            line(&mut out, &text);
        }
    }
    for note in &plan.notes {
        line(&mut out, &format!("note: {note}"));
    }
    out
}

fn plural(count: u32) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn shown_port(port: Option<u16>) -> String {
    port.filter(|port| *port > 0)
        .map_or("any".to_owned(), |port| port.to_string())
}

fn shortened(places: &[String]) -> String {
    const SHOWN: usize = 4;
    if places.len() <= SHOWN + 1 {
        return places.join(", ");
    }
    let more = places.len() - SHOWN;
    format!("{}, and {more} more nodes", places[..SHOWN].join(", "))
}

/// `0-3` for numbers in a row.
fn ranges(numbers: &[u32]) -> String {
    let runs: Vec<String> = numbers
        .chunk_by(|one, next| one + 1 == *next)
        .map(|run| match run {
            [one] => one.to_string(),
            _ => format!("{}-{}", run[0], run[run.len() - 1]),
        })
        .collect();
    runs.join(",")
}
