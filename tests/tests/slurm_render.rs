//! `baton slurm` without a cluster: refusals before submission, run folders, and what runs inside a job, with programs in
//! the places of Slurm's that write down what they are asked.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use baton_tests::process::eventually;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::process::Command;

const SOON: Duration = Duration::from_secs(30);

/// A place for run folders, with programs that stand in for Slurm's.
struct Desk {
    folder: TempDir,
}

impl Desk {
    fn new() -> Self {
        let desk = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        std::fs::create_dir(desk.path("bin")).expect("a folder");
        desk
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    fn lines(&self, name: &str) -> Vec<String> {
        self.text(name).lines().map(str::to_owned).collect()
    }

    /// A program on the PATH; `$DESK` is this folder.
    fn program(&self, name: &str, script: &str) {
        let path = self.path("bin").join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a program");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    }

    fn baton(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(baton_tests::binary());
        let path = std::env::var("PATH").unwrap_or_default();
        command
            .args(arguments)
            .current_dir(baton_tests::root())
            .env("PATH", format!("{}:{path}", self.path("bin").display()))
            .env("DESK", self.folder.path())
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Output {
        finished(self.baton(arguments)).await
    }

    /// Renders a layout and returns the run folder.
    async fn rendered(&self, layout: &str) -> String {
        let file = self.path("layout.yaml");
        std::fs::write(&file, layout).expect("a layout");
        let run = self.path("run").display().to_string();
        let file = file.display().to_string();
        let output = self
            .run(&["slurm", "render", "-c", &file, "-o", &run])
            .await;
        assert!(output.status.success(), "{}", stderr(&output));
        run
    }
}

async fn finished(mut command: Command) -> Output {
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await;
    output.expect("it ends within 60 s").expect("it starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const TINY: &str = "model: tests/golden/tiny-llama\n";

/// Each broken layout is refused before anything is submitted, with the lines that are committed beside it.
#[tokio::test]
async fn broken_layouts_are_refused_with_their_lines() {
    let desk = Desk::new();
    desk.program("sbatch", "echo submitted >> $DESK/submitted; echo 1");
    let regenerate = std::env::var_os("BATON_REGENERATE").is_some_and(|value| value == "1");
    let folder = "tests/golden/slurm/broken";
    let mut count = 0;
    for entry in std::fs::read_dir(baton_tests::root().join(folder)).expect("broken layouts") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|ending| ending != "yaml") {
            continue;
        }
        count += 1;
        let name = path
            .file_stem()
            .expect("a name")
            .to_string_lossy()
            .into_owned();
        let layout = format!("{folder}/{name}.yaml");
        let run = desk.path(&name).display().to_string();
        let output = desk
            .run(&["slurm", "submit", "-c", &layout, "-o", &run])
            .await;
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(65), "{name}: {said}");
        assert!(!desk.path(&name).exists(), "{name}: a run folder was made");
        let golden = path.with_extension("txt");
        if regenerate {
            std::fs::write(&golden, &said).expect("written");
        }
        let committed = std::fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(said, committed, "{name}");
        for line in said.trim_start_matches("error: ").lines() {
            let placed = line.starts_with(&layout) || line.starts_with("  hint: ");
            assert!(placed, "{name}: a line without a file: {line}");
        }
    }
    assert!(count >= 15, "{count}");
    assert_eq!(desk.text("submitted"), "");
}

#[tokio::test]
async fn a_dry_run_shows_everything_with_its_source() {
    let desk = Desk::new();
    let run = "/runs/demo";
    for sample in ["slurm_steps", "slurm_jobs", "benchmark_config"] {
        let file = format!("configs/samples/{sample}.yaml");
        let arguments = [
            "slurm",
            "submit",
            "--dry-run",
            "--skip-model-check",
            "-c",
            &file,
            "-o",
            run,
        ];
        let output = desk.run(&arguments).await;
        assert!(output.status.success(), "{}", stderr(&output));
        let golden = baton_tests::root().join(format!("tests/golden/slurm/{sample}.dry-run.txt"));
        if std::env::var_os("BATON_REGENERATE").is_some_and(|value| value == "1") {
            std::fs::write(&golden, stdout(&output)).expect("written");
        }
        let committed = std::fs::read_to_string(&golden).unwrap_or_default();
        assert_eq!(stdout(&output), committed, "{sample}");
    }
    assert!(!Path::new(run).exists());
}

#[tokio::test]
async fn jobs_are_submitted_seen_and_ended() {
    let desk = Desk::new();
    desk.program(
        "sbatch",
        "echo \"$@\" >> $DESK/sbatch; wc -l < $DESK/sbatch | tr -d ' '",
    );
    desk.program(
        "scancel",
        "echo \"$@\" >> $DESK/scancel; echo over > $DESK/state",
    );
    desk.program(
        "squeue",
        "if [ -f $DESK/state ]; then exit 0; fi\n\
         for id in 1 2 3; do echo \"$id|RUNNING|1:00|n$id|None|name $id\"; done",
    );
    let layout = desk.path("layout.yaml");
    std::fs::write(&layout, format!("{TINY}start: jobs\ngpus_per_node: 4\n")).expect("a layout");
    let (layout, run) = (
        layout.display().to_string(),
        desk.path("run").display().to_string(),
    );
    let submit = ["slurm", "submit", "-c", &layout, "-o", &run];
    let output = desk.run(&submit).await;
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output), "1\n2\n3\n");
    let submitted = desk.lines("sbatch");
    for (line, script) in submitted.iter().zip(["proxy", "ctx", "gen"]) {
        assert_eq!(
            *line,
            format!("--parsable --chdir={run} {run}/{script}.sbatch")
        );
    }
    let world = std::fs::read_to_string(format!("{run}/disagg_config.yaml")).expect("a config");
    let model = baton_tests::root().join("tests/golden/tiny-llama");
    assert!(
        world.contains(&format!("model: \"{}\"", model.display())),
        "{world}"
    );

    let again = desk.run(&submit).await;
    assert_eq!(again.status.code(), Some(64));
    assert!(
        stderr(&again).contains("job 1 of the run folder"),
        "{}",
        stderr(&again)
    );

    std::fs::write(format!("{run}/addresses/proxy.addr"), "n1:8000\n").expect("an address");
    let status = desk.run(&["slurm", "status", &run]).await;
    let text = stdout(&status);
    assert!(
        text.contains("name 2") && text.contains("RUNNING"),
        "{text}"
    );
    assert!(text.contains("proxy: http://n1:8000/v1"), "{text}");

    let cancel = desk.run(&["slurm", "cancel", &run]).await;
    assert!(cancel.status.success(), "{}", stderr(&cancel));
    let cancelled = desk.lines("scancel");
    // The proxy is asked to drain first; the others were over by then.
    assert_eq!(
        cancelled.first().map(String::as_str),
        Some("--batch --signal=USR1 1")
    );
    assert_eq!(cancelled.last().map(String::as_str), Some("1 2 3"));
}

#[tokio::test]
async fn a_part_of_a_deployment_is_taken_back() {
    let desk = Desk::new();
    desk.program(
        "sbatch",
        "if [ -f $DESK/one ]; then echo 'sbatch: error: no such partition' >&2; exit 1; fi\ntouch $DESK/one; echo 41",
    );
    desk.program("scancel", "echo \"$@\" >> $DESK/scancel");
    let layout = desk.path("layout.yaml");
    std::fs::write(&layout, format!("{TINY}start: jobs\ngpus_per_node: 4\n")).expect("a layout");
    let (layout, run) = (
        layout.display().to_string(),
        desk.path("run").display().to_string(),
    );
    let output = desk
        .run(&["slurm", "submit", "-c", &layout, "-o", &run])
        .await;
    assert_eq!(output.status.code(), Some(69));
    assert!(
        stderr(&output).contains("no such partition"),
        "{}",
        stderr(&output)
    );
    assert_eq!(desk.text("scancel"), "41\n");
    assert!(!desk.path("run/jobs.json").exists());
}

#[tokio::test]
async fn a_task_has_its_roles_variables_and_its_gpus() {
    let desk = Desk::new();
    let run = desk
        .rendered(&format!(
            "{TINY}start: steps\ngpus_per_node: 4\nengine: {{tensor_parallel_size: 2}}\ncontext:\n  environment: {{ROLE: \"it's context\"}}\n"
        ))
        .await;
    let file = format!("--run={run}/run.json");
    let ask = async |launch: &str, rank: &str, visible: Option<&str>| {
        let launch = format!("--launch={launch}");
        let script = "echo \"$ROLE|$CUDA_VISIBLE_DEVICES|$1\"; exit 7";
        let mut command = desk.baton(&[
            "slurm", "task", &file, &launch, "--", "sh", "-c", script, "x", "a  b",
        ]);
        command
            .env_remove("CUDA_VISIBLE_DEVICES")
            .env("SLURM_PROCID", rank);
        if let Some(visible) = visible {
            command.env("CUDA_VISIBLE_DEVICES", visible);
        }
        finished(command).await
    };
    let output = ask("ctx1", "1", None).await;
    assert_eq!(stdout(&output), "it's context|2,3|a  b\n");
    assert_eq!(output.status.code(), Some(7), "the command's own code");
    assert_eq!(
        stdout(&ask("ctx1", "0", Some("4,5,6,7")).await),
        "it's context|6,7|a  b\n"
    );
    assert_eq!(stdout(&ask("gen0", "0", None).await), "||a  b\n");
    let lost = ask("ctx1", "2", None).await;
    assert_eq!(lost.status.code(), Some(64));
    assert!(stderr(&lost).contains("SLURM_PROCID is 2, but the plan has 2 ranks for ctx1"));
}

#[tokio::test]
async fn a_listed_world_gets_the_hosts_of_its_allocation() {
    let desk = Desk::new();
    desk.program("srun", "echo \"$@\"; cat $SLURM_HOSTFILE");
    let run = desk
        .rendered(&format!(
            "{TINY}gpus_per_node: 8\ncontext: {{instances: 3, engine: {{tensor_parallel_size: 2}}}}\n\
             generation: {{engine: {{tensor_parallel_size: 4}}}}\n"
        ))
        .await;
    let arguments = [
        "slurm",
        "world",
        &format!("--run={run}/run.json"),
        "--launch=baton",
    ];
    let mut command = desk.baton(&arguments);
    command.env("SLURM_JOB_NODELIST", "rack[1-2]n03");
    let output = finished(command).await;
    let text = stdout(&output);
    let (command, hosts) = text.split_once('\n').expect("two parts");
    assert!(command.starts_with("--distribution=arbitrary "), "{text}");
    assert_eq!(
        hosts,
        format!("{}{}", "rack1n03\n".repeat(6), "rack2n03\n".repeat(4))
    );
    let mut outside = desk.baton(&arguments);
    outside
        .env_remove("SLURM_JOB_NODELIST")
        .env_remove("SLURM_NODELIST");
    let output = finished(outside).await;
    assert_eq!(output.status.code(), Some(64));
    assert!(
        stderr(&output).contains("this is no job of Slurm"),
        "{}",
        stderr(&output)
    );
}

/// The program that stands in for `srun`: it notes that it started, and drains on USR1.
const SRUN: &str = r#"
for word; do case $word in --job-name=*) name=${word#--job-name=};; esac; done
trap 'echo "$name" >> $DESK/drained; exit 0' USR1
echo "$name $$ $*" >> $DESK/started
while :; do sleep 0.02; done"#;

#[tokio::test]
async fn steps_are_started_again_and_drained_behind_the_proxy() {
    let desk = Desk::new();
    desk.program("srun", SRUN);
    let run = desk
        .rendered(&format!(
            "{TINY}start: steps\ngpus_per_node: 2\ncontext: {{instances: 2}}\n"
        ))
        .await;
    let mut command = desk.baton(&["slurm", "steps", &format!("--run={run}/run.json")]);
    command.env("SLURM_JOB_NODELIST", "n[1-2]");
    let mut steps = command
        .stdout(Stdio::null())
        .stderr(std::fs::File::create(desk.path("log")).expect("a log"))
        .spawn()
        .expect("it starts");
    let started = async |count: usize| {
        eventually("the steps to start", SOON, async || {
            let lines = desk.lines("started");
            (lines.len() >= count).then_some(lines)
        })
        .await
    };
    let lines = started(4).await;
    let of = |lines: &[String], name: &str| -> String {
        let line = lines.iter().rev().find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no step {name}: {lines:?}"))
            .clone()
    };
    assert!(of(&lines, "proxy").contains("--nodelist=n1 "), "{lines:?}");
    assert!(of(&lines, "ctx1").contains("--nodelist=n1 "), "{lines:?}");
    assert!(of(&lines, "gen0").contains("--nodelist=n2 "), "{lines:?}");
    std::fs::write(format!("{run}/addresses/ctx0.addr"), "old:1").expect("an address");
    let pid = |line: &str| -> Pid {
        let word = line.split(' ').nth(1).expect("a process");
        Pid::from_raw(word.parse().expect("a number"))
    };
    kill(pid(&of(&lines, "ctx0")), Signal::SIGKILL).expect("it runs");
    let lines = started(5).await;
    assert!(lines[4].starts_with("ctx0 "), "{lines:?}");
    assert!(
        !Path::new(&format!("{run}/addresses/ctx0.addr")).exists(),
        "a stale address"
    );
    let own = i32::try_from(steps.id().expect("it runs")).expect("process ids fit");
    kill(Pid::from_raw(own), Signal::SIGUSR1).expect("it runs");
    let status = tokio::time::timeout(SOON, steps.wait())
        .await
        .expect("it drains")
        .expect("its status");
    assert_eq!(status.code(), Some(0), "{}", desk.text("log"));
    let drained = desk.lines("drained");
    assert_eq!(drained.first().map(String::as_str), Some("proxy"));
    assert_eq!(drained.len(), 4, "{drained:?}");
    for line in lines {
        assert!(kill(pid(&line), None).is_err(), "{line} is left");
    }
}

#[tokio::test]
async fn a_step_that_keeps_dying_ends_the_job_with_its_words() {
    let desk = Desk::new();
    desk.program(
        "srun",
        &SRUN.replace(
            "trap",
            "case $name in gen0) echo 'error: no model here' >&2; exit 69;; esac\ntrap",
        ),
    );
    let run = desk
        .rendered(&format!("{TINY}start: steps\ngpus_per_node: 4\n"))
        .await;
    let mut command = desk.baton(&["slurm", "steps", &format!("--run={run}/run.json")]);
    command.env("SLURM_JOB_NODELIST", "n1");
    let output = finished(command).await;
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("error: gen0: exit code 69"), "{said}");
    assert!(said.contains("no model here"), "{said}");
    assert_eq!(desk.lines("drained").len(), 3, "the others drained");
}

#[tokio::test]
async fn without_slurm_there_is_one_line_with_a_hint() {
    let desk = Desk::new();
    let layout = desk.path("layout.yaml");
    std::fs::write(&layout, format!("{TINY}gpus_per_node: 4\n")).expect("a layout");
    let (layout, run) = (
        layout.display().to_string(),
        desk.path("run").display().to_string(),
    );
    let mut command = desk.baton(&["slurm", "submit", "-c", &layout, "-o", &run]);
    command.env("PATH", desk.path("bin"));
    let output = finished(command).await;
    assert_eq!(output.status.code(), Some(69));
    let said = stderr(&output);
    let line = said
        .lines()
        .find(|line| line.starts_with("error: "))
        .unwrap_or_default();
    assert!(
        line.contains("sbatch") && line.ends_with("is not on this machine"),
        "{said}"
    );
    assert!(said.contains("hint: run it on a login node"), "{said}");
}

#[tokio::test]
async fn one_machine_takes_what_it_can_of_a_clusters_layout() {
    let desk = Desk::new();
    let layout = desk.path("layout.yaml");
    let file = layout.display().to_string();
    std::fs::write(
        &layout,
        format!("{TINY}gpus_per_node: 4\nslurm: {{nodes: 2}}\n"),
    )
    .expect("a layout");
    let output = desk.run(&["up", "--dry-run", "-c", &file]).await;
    assert!(output.status.success(), "{}", stderr(&output));
    assert_eq!(stdout(&output).lines().count(), 4);
    let said = stderr(&output);
    assert!(
        said.contains("have no effect on one machine") && said.contains("gpus_per_node, slurm"),
        "{said}"
    );
    std::fs::write(&layout, format!("{TINY}gpus_per_node: 4\nfabric: mpi\n")).expect("a layout");
    let output = desk.run(&["up", "--dry-run", "-c", &file]).await;
    assert_eq!(output.status.code(), Some(65));
    assert!(
        stderr(&output).contains("layout.yaml:3:9: fabric: mpi needs processes"),
        "{}",
        stderr(&output)
    );
}
