//! Tests of benchmark files taken for layouts.

use super::*;
use crate::layout::job::{Mount, StartMode};
use crate::layout::{Layout, resolve};

fn parse(text: &str) -> Document {
    Document::parse("config.yaml", text).expect("valid YAML")
}

fn resolved(text: &str) -> (Layout, String) {
    let (layout, warnings) = resolve(&parse(text), None).unwrap_or_else(|error| panic!("{error}"));
    let warnings: Vec<String> = warnings.iter().map(ToString::to_string).collect();
    (layout, warnings.join("\n"))
}

#[test]
fn the_sample_is_the_layout_that_it_means() {
    let (layout, warnings) = resolved(include_str!("../../samples/benchmark_config.yaml"));
    assert_eq!(
        (layout.context.instances, layout.generation.instances),
        (2, 1)
    );
    assert_eq!(layout.context.options.tensor_parallel_size, 2);
    assert_eq!(layout.generation.options.tensor_parallel_size, 8);
    assert_eq!(layout.generation.options.max_batch_size, 64);
    let job = layout.job.expect("a part for clusters");
    assert_eq!((job.start, job.gpus_per_node), (StartMode::Steps, 4));
    assert_eq!(job.proxy_port, 8333);
    assert_eq!(job.slurm.time.as_deref(), Some("01:30:00"));
    assert_eq!(
        job.slurm.sbatch_args,
        ["--gres=gpu:4", "--comment=two words"]
    );
    let mount = Mount {
        host: "/lustre".to_owned(),
        container: "/lustre".to_owned(),
        flags: String::new(),
    };
    assert_eq!(job.container.expect("a container").mounts[0], mount);
    let variable = |map: &std::collections::BTreeMap<String, String>, name: &str| {
        map.get(name).cloned().unwrap_or_default()
    };
    assert_eq!(variable(&layout.context.environment, "NCCL_DEBUG"), "INFO");
    assert_eq!(
        variable(&layout.generation.environment, "NCCL_DEBUG"),
        "WARN"
    );
    assert_eq!(variable(&layout.context.environment, "ONLY"), "");
    assert_eq!(variable(&layout.proxy.environment, "LEVEL"), "info");
    for named in [
        "benchmark",
        "profiling",
        "accuracy",
        "slurm.script_file",
        "environment.trtllm_repo",
    ] {
        assert!(warnings.contains(named), "{named} is not in: {warnings}");
    }
    assert_eq!(warnings.lines().count(), 1, "{warnings}");
}

#[test]
fn mistakes_stand_where_they_were_written() {
    let error = resolve(
        &parse(
            "hardware: {gpus_per_node: 0}\nenvironment: {model_path: m, worker_env_var: 'A B=1'}\n\
             worker_config:\n  ctx: {max_batch_size: 0}\n  gen: {kv_cache_config: {tokens_per_block: 3}}\nslurm: {job_time: soon}\n",
        ),
        None,
    )
    .expect_err("refused")
    .to_string();
    for line in [
        "config.yaml:1:27: hardware.gpus_per_node: found 0",
        "config.yaml:2:46: environment.worker_env_var: found text \"A B=1\"",
        "config.yaml:4:25: worker_config.ctx.max_batch_size: found 0",
        "config.yaml:5:45: worker_config.gen.kv_cache_config.tokens_per_block: found 3",
        "config.yaml:6:19: slurm.job_time: found \"soon\"",
    ] {
        assert!(error.contains(line), "{line} is not in:\n{error}");
    }
}

#[test]
fn defaults_are_those_of_the_scripts() {
    let (layout, _) = resolved("worker_config: {}\nenvironment: {model_path: m}\n");
    let job = layout.job.expect("a part for clusters");
    assert_eq!(job.gpus_per_node, 4);
    assert_eq!(job.slurm.time.as_deref(), Some("02:00:00"));
    assert_eq!(
        (layout.context.instances, layout.generation.instances),
        (1, 1)
    );
    assert!(!job.slurm.segment);
    assert_eq!(job.container, None);
}

#[test]
fn words_are_split_as_a_shell_does() {
    let split = |text| shell_words(text).unwrap_or_default().join("|");
    assert_eq!(split("a  b=c"), "a|b=c");
    assert_eq!(split("--x='a b' \"c \\\" d\" e\\ f"), "--x=a b|c \" d|e f");
    assert_eq!(shell_words("'open"), None);
    assert_eq!(shell_words(""), Some(Vec::new()));
}
