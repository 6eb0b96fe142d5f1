//! Golden tests of rendered run folders, and tests of the commands in them.

use std::path::PathBuf;

use baton_configs::yaml::Document;
use baton_configs::{disagg, layout};

use super::*;
use crate::plan::plan;

fn layout_of(text: &str) -> Layout {
    let document = Document::parse("layout.yaml", text).expect("valid YAML");
    layout::resolve(&document, Some("/models/m"))
        .unwrap_or_else(|error| panic!("{error}"))
        .0
}

fn rendered(layout: &Layout) -> Rendered {
    let plan = plan(layout).unwrap_or_else(|error| panic!("{error}"));
    let folder = RunFolder::new("/runs/demo", layout);
    render(layout, &plan, &folder).expect("a part for clusters")
}

fn text_of<'a>(rendered: &'a Rendered, name: &str) -> &'a str {
    let file = rendered.files.iter().find(|file| file.name == name);
    &file
        .unwrap_or_else(|| panic!("{name} is not rendered"))
        .text
}

/// Every file of every sample is the one that is committed.
#[test]
fn samples_render_as_committed() {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..");
    let regenerate = std::env::var_os("BATON_REGENERATE").is_some_and(|value| value == "1");
    for sample in [
        "slurm_one_world",
        "slurm_steps",
        "slurm_jobs",
        "benchmark_config",
    ] {
        let path = root.join(format!("configs/samples/{sample}.yaml"));
        let layout = layout_of(&std::fs::read_to_string(path).expect("a sample"));
        let golden = root.join("tests/golden/slurm").join(sample);
        let rendered = rendered(&layout);
        if regenerate {
            std::fs::create_dir_all(&golden).expect("a folder");
        }
        let mut names: Vec<String> = rendered
            .files
            .iter()
            .map(|file| file.name.clone())
            .collect();
        for file in &rendered.files {
            let path = golden.join(&file.name);
            if regenerate {
                std::fs::write(&path, &file.text).expect("written");
            }
            let committed = std::fs::read_to_string(&path).unwrap_or_default();
            assert!(
                committed == file.text,
                "{} differs; run the tests with BATON_REGENERATE=1 and look at the change:\n{}",
                path.display(),
                file.text
            );
        }
        let mut committed: Vec<String> = std::fs::read_dir(&golden)
            .expect("a folder")
            .map(|entry| {
                entry
                    .expect("an entry")
                    .file_name()
                    .to_string_lossy()
                    .into_owned()
            })
            .collect();
        committed.sort();
        names.sort();
        assert_eq!(committed, names, "{sample}");
    }
}

#[test]
fn the_worlds_config_reads_back_as_the_layout() {
    for text in [
        "gpus_per_node: 4\nmodel: /m\nports: 9000-9010\ncontext: {engine: {tensor_parallel_size: 2}}\n",
        "gpus_per_node: 4\nmodel: /m\ngeneration: {engine: {model: /other, dtype: float32}}\n",
        "gpus_per_node: 4\nmodel: 'a \"quoted\" name'\nengine: {kv_cache_config: {max_tokens: 64}}\nproxy: {node_id: 3, port: 0}\n",
    ] {
        let layout = layout_of(text);
        let rendered = rendered(&layout);
        let text = text_of(&rendered, "disagg_config.yaml");
        let document = Document::parse("disagg_config.yaml", text).expect("valid YAML");
        let (world, warnings) =
            disagg::resolve(&document, 0).unwrap_or_else(|error| panic!("{error}\n{text}"));
        assert_eq!(warnings, []);
        assert_eq!(world.context.options, layout.context.options);
        assert_eq!(world.generation.options, layout.generation.options);
        assert_eq!(world.context.num_instances, layout.context.instances);
        assert_eq!(
            world.proxy.port,
            layout.job.expect("a part for clusters").proxy_port
        );
        let ports: Vec<u16> = world
            .generation
            .endpoints
            .iter()
            .map(|endpoint| endpoint.port)
            .collect();
        assert_eq!(
            ports,
            if text.contains("900") {
                vec![9002]
            } else {
                vec![]
            }
        );
    }
}

#[test]
fn a_script_is_one_command() {
    for text in ["start: one_world\n", "start: steps\n", "start: jobs\n"] {
        let layout = layout_of(&format!("{text}gpus_per_node: 2\n"));
        let rendered = rendered(&layout);
        for (_, name) in &rendered.scripts {
            let script = text_of(&rendered, name);
            let commands: Vec<&str> = script
                .lines()
                .filter(|line| !line.starts_with('#') && !line.starts_with(' ') && !line.is_empty())
                .collect();
            assert_eq!(commands.len(), 1, "{script}");
            assert!(commands[0].starts_with("exec "), "{script}");
        }
    }
}

#[test]
fn hosts_are_bound_inside_the_allocation() {
    let layout = layout_of(
        "start: steps\ngpus_per_node: 8\ncontext: {instances: 1, engine: {tensor_parallel_size: 2}}\n\
         generation: {engine: {tensor_parallel_size: 4, pipeline_parallel_size: 3}}\n",
    );
    let rendered = rendered(&layout);
    let run = RunFile::parse(text_of(&rendered, RUN_FILE)).expect("a run file");
    let hosts = ["rack1", "rack2"].map(str::to_owned);
    let bound = run
        .launch("ctx0")
        .expect("ctx0")
        .on_hosts(&hosts)
        .expect("bound");
    // The four that the generation instance leaves on its second node.
    assert!(
        bound.argv.contains(&"--nodelist=rack2".to_owned()),
        "{bound:?}"
    );
    assert_eq!(bound.hosts, None);
    let bound = run
        .launch("gen0")
        .expect("gen0")
        .on_hosts(&hosts)
        .expect("bound");
    assert!(
        bound.argv.contains(&"--distribution=arbitrary".to_owned()),
        "{bound:?}"
    );
    let expected = format!("{}{}", "rack1\n".repeat(8), "rack2\n".repeat(4));
    assert_eq!(bound.hosts.as_deref(), Some(expected.as_str()));
    let error = run
        .launch("gen0")
        .expect("gen0")
        .on_hosts(&hosts[..1])
        .expect_err("too few");
    assert!(
        error
            .to_string()
            .contains("the plan has 2 nodes, but the allocation has 1"),
        "{error}"
    );
}

#[test]
fn a_task_knows_its_role_and_its_gpus() {
    let layout = layout_of(
        "start: one_world\ngpus_per_node: 4\ncontext: {instances: 1, engine: {tensor_parallel_size: 2}, environment: {A: '1'}}\n\
         generation: {engine: {tensor_parallel_size: 4}}\n",
    );
    let run = RunFile::parse(text_of(&rendered(&layout), RUN_FILE)).expect("a run file");
    let launch = run.launch("baton").expect("the world");
    let role = |rank| launch.task(rank).map(|(part, _)| part.label.as_str());
    assert_eq!(
        [role(0), role(1), role(2), role(5), role(6)],
        [Some("ctx0"), Some("ctx0"), Some("gen0"), Some("gen0"), None]
    );
    assert!(launch.command.contains(&"task".to_owned()), "{launch:?}");
    let layout = layout_of(
        "start: steps\ngpus_per_node: 4\ncontext: {instances: 2, engine: {tensor_parallel_size: 2}}\n",
    );
    let run = RunFile::parse(text_of(&rendered(&layout), RUN_FILE)).expect("a run file");
    let second = run.launch("ctx1").expect("ctx1");
    assert_eq!(
        second.task(1).map(|(_, gpus)| gpus),
        Some([2, 3].as_slice())
    );
    assert!(second.own_gpus);
    assert!(!run.launch("ctx0").expect("ctx0").own_gpus);
}

#[test]
fn the_run_folder_is_mounted_where_no_mount_holds_it() {
    let with = |mounts: &str| {
        let text = format!("gpus_per_node: 2\ncontainer: {{image: i, mounts: [{mounts}]}}\n");
        let added = rendered(&layout_of(&text)).added_mounts;
        added.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(with("'/data:/data'"), ["/runs/demo:/runs/demo"]);
    assert_eq!(with("'/runs:/runs'"), Vec::<String>::new());
    assert_eq!(with("'/runs:/elsewhere'"), ["/runs/demo:/runs/demo"]);
}

#[test]
fn the_proxys_job_runs_where_its_store_has_its_address() {
    let script = |uri: &str| {
        let layout = layout_of(&format!(
            "start: jobs\ngpus_per_node: 2\ndiscovery_uri: {uri}\n"
        ));
        let rendered = rendered(&layout);
        assert!(text_of(&rendered, "proxy_config.yaml").contains("cluster_uri"));
        assert!(!text_of(&rendered, "ctx.sbatch").contains("--address-dir"));
        let world = text_of(&rendered, "disagg_config.yaml");
        let document = Document::parse("disagg_config.yaml", world).expect("valid YAML");
        let (world, _) = disagg::resolve(&document, 0).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            world.context.options.cluster,
            world.generation.options.cluster
        );
        let cluster = world.context.options.cluster.expect("the workers register");
        assert_eq!(
            (cluster.name.as_str(), cluster.context_servers_min),
            ("baton", 2)
        );
        text_of(&rendered, "proxy.sbatch").to_owned()
    };
    assert!(script("http://head.cluster:8000").contains("#SBATCH --nodelist=head\n"));
    assert!(!script("http://10.0.0.1:8000").contains("--nodelist"));
}

#[test]
fn files_of_another_version_are_refused() {
    let layout = layout_of("gpus_per_node: 2\n");
    let text = text_of(&rendered(&layout), RUN_FILE).replace("\"version\": 1", "\"version\": 99");
    let error = RunFile::parse(&text)
        .expect_err("another version")
        .to_string();
    assert!(error.contains("format 99"), "{error}");
    assert!(RunFile::parse("{").is_err());
}
