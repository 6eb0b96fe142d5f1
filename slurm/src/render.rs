//! A plan as files: the plan itself, the configurations of its processes, and the batch scripts.
//!
//! Options are sorted and quoted; there is no template, no timestamp and no name of a machine, so the same layout gives
//! the same bytes. A script does one thing: it starts the launcher.

use std::collections::BTreeMap;

use baton_configs::layout::Layout;
use baton_configs::layout::job::{Fabric, JobLayout, Mount, StartMode};
use baton_configs::layout::render::Addresses;
use baton_configs::llm;

use crate::plan::text::script_name;
use crate::plan::{Deal, InstancePlan, JobPlan, Plan, Role};
use crate::script;
use crate::srun::{Launch, Part, Place, RUN_FILE_VERSION, RunFile};

/// One file of a run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// Its name in the folder.
    pub name: String,
    /// Its text.
    pub text: String,
}

/// Where a run keeps its files; absolute, the same on every node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder {
    /// The folder.
    pub path: String,
    /// Its log files.
    pub logs: String,
}

impl RunFolder {
    /// The folder at this path; logs go where the layout says, else beside the files.
    #[must_use]
    pub fn new(path: &str, layout: &Layout) -> Self {
        let logs = match &layout.log_dir {
            Some(own) if own.is_absolute() => own.display().to_string(),
            Some(own) => format!("{path}/{}", own.display()),
            None => format!("{path}/logs"),
        };
        Self {
            path: path.to_owned(),
            logs,
        }
    }

    /// A file of the folder.
    #[must_use]
    pub fn file(&self, name: &str) -> String {
        format!("{}/{name}", self.path)
    }

    /// Where processes write their addresses.
    #[must_use]
    pub fn addresses(&self) -> String {
        self.file(ADDRESSES)
    }
}

/// The folder of addresses in a run folder.
pub const ADDRESSES: &str = "addresses";
/// What the job reads inside its allocation.
pub const RUN_FILE: &str = "run.json";

/// A deployment as files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The files, in a fixed order.
    pub files: Vec<File>,
    /// The scripts among them, in the order in which they are submitted: job name and file name.
    pub scripts: Vec<(String, String)>,
    /// What of the container was added to what the layout says.
    pub added_mounts: Vec<Mount>,
}

/// The files of a planned layout; `None` if the layout has no part for clusters.
#[must_use]
pub fn render(layout: &Layout, plan: &Plan, folder: &RunFolder) -> Option<Rendered> {
    let job = layout.job.as_ref()?;
    let site = Site {
        layout,
        job,
        folder,
    };
    let run = site.run_file(plan);
    let mut files = vec![
        file("ctx_config.yaml", llm::to_yaml(&layout.context.options)),
        file("disagg_config.yaml", site.world_config(plan)),
        file("gen_config.yaml", llm::to_yaml(&layout.generation.options)),
        file("plan.yaml", plan.to_yaml()),
    ];
    if plan.start != StartMode::OneWorld {
        let addresses: Vec<String> = plan
            .instances()
            .map(|instance| format!("{ADDRESSES}/{}.addr", instance.label))
            .collect();
        files.push(file(
            "proxy_config.yaml",
            layout.proxy_yaml(job, &addresses),
        ));
    }
    let mut scripts = Vec::new();
    for planned in &plan.jobs {
        let name = script_name(planned);
        files.push(file(&name, site.script(plan, planned, &run)));
        scripts.push((planned.name.clone(), name));
    }
    files.push(file(RUN_FILE, run.to_json()));
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Some(Rendered {
        files,
        scripts,
        added_mounts: site.added_mounts(),
    })
}

fn file(name: &str, text: String) -> File {
    File {
        name: name.to_owned(),
        text,
    }
}

/// What every part of a deployment has in common.
struct Site<'a> {
    layout: &'a Layout,
    job: &'a JobLayout,
    folder: &'a RunFolder,
}

impl Site<'_> {
    fn world_config(&self, plan: &Plan) -> String {
        let ports: Vec<u16> = plan
            .instances()
            .filter_map(|instance| instance.port)
            .collect();
        self.layout
            .world_yaml(self.job, Addresses::OfTheStep(&ports))
    }

    /// The program as a process of the deployment sees it.
    fn baton_inside(&self) -> String {
        let inside = self
            .job
            .container
            .as_ref()
            .and_then(|container| container.baton.clone());
        inside.unwrap_or_else(|| self.job.baton.clone())
    }

    /// Mounts without which the processes would not see the run folder and the logs.
    fn added_mounts(&self) -> Vec<Mount> {
        let Some(container) = &self.job.container else {
            return Vec::new();
        };
        let mut added: Vec<Mount> = Vec::new();
        for path in [&self.folder.path, &self.folder.logs] {
            let seen = container.outside(path).as_ref() == Some(path);
            let below = |mount: &Mount| path.starts_with(&format!("{}/", mount.host));
            if !seen && !added.iter().any(below) {
                added.push(Mount {
                    host: path.clone(),
                    container: path.clone(),
                    flags: String::new(),
                });
            }
        }
        added
    }

    fn run_file(&self, plan: &Plan) -> RunFile {
        let environment = [
            (Role::Context.section(), &self.layout.context.environment),
            (
                Role::Generation.section(),
                &self.layout.generation.environment,
            ),
            ("proxy", &self.layout.proxy.environment),
        ];
        let mut run = RunFile {
            version: RUN_FILE_VERSION,
            logs: self.folder.logs.clone(),
            environment: environment
                .into_iter()
                .map(|(role, variables)| (role.to_owned(), variables.clone()))
                .collect::<BTreeMap<_, _>>(),
            launches: Vec::new(),
        };
        for planned in &plan.jobs {
            let launches = match plan.start {
                StartMode::Steps => self.steps(planned),
                StartMode::OneWorld | StartMode::Jobs if planned.instances.is_empty() => {
                    vec![self.proxy_launch(&planned.name)]
                }
                StartMode::OneWorld | StartMode::Jobs => vec![self.world(planned)],
            };
            for mut launch in launches {
                if run.has_task_environment(&launch) {
                    launch.command = self.with_task(&launch);
                }
                run.launches.push(launch);
            }
        }
        run
    }

    /// The same command behind the small program that sets a rank's own variables.
    fn with_task(&self, launch: &Launch) -> Vec<String> {
        let mut words = vec![
            self.baton_inside(),
            "slurm".to_owned(),
            "task".to_owned(),
            format!("--run={}", self.folder.file(RUN_FILE)),
            format!("--launch={}", launch.label),
            "--".to_owned(),
        ];
        words.extend(launch.command.iter().cloned());
        words
    }

    fn world(&self, planned: &JobPlan) -> Launch {
        let mut first_gpu = planned.tasks.iter().zip(0_u32..);
        let place = |(count, node): (&u32, u32)| Place {
            node,
            gpus: (0..*count).collect(),
        };
        Launch {
            label: planned.name.clone(),
            options: self.srun_options(),
            free: self.job.slurm.srun_args.clone(),
            places: first_gpu.by_ref().map(place).collect(),
            parts: planned.instances.iter().map(part_of).collect(),
            own_gpus: false,
            command: self.launch_command(planned.only, planned.proxy.is_some()),
        }
    }

    /// One launch for each instance, and one for the proxy, which comes first: it is the last to be needed and the
    /// first to be drained.
    fn steps(&self, planned: &JobPlan) -> Vec<Launch> {
        let mut launches = vec![self.proxy_launch("proxy")];
        for instance in &planned.instances {
            let places: Vec<Place> = instance
                .by_node()
                .into_iter()
                .map(|(node, gpus)| Place { node, gpus })
                .collect();
            let own_gpus = places.iter().any(|place| place.gpus.first() != Some(&0));
            launches.push(Launch {
                label: instance.label.clone(),
                options: self.srun_options(),
                free: self.job.slurm.srun_args.clone(),
                places,
                parts: vec![part_of(instance)],
                own_gpus,
                command: self.launch_command(Some(&instance.label), false),
            });
        }
        for launch in &mut launches {
            launch.options.push(format!("--job-name={}", launch.label));
            launch.options.push("--overlap".to_owned());
        }
        launches
    }

    fn proxy_launch(&self, label: &str) -> Launch {
        let mut options = self.srun_options();
        // The proxy is one process that speaks HTTP only.
        options.retain(|option| {
            !option.starts_with("--mpi=") && !option.starts_with("--cpus-per-task=")
        });
        Launch {
            label: label.to_owned(),
            options,
            free: self.job.slurm.srun_args.clone(),
            places: vec![Place {
                node: 0,
                gpus: vec![0],
            }],
            parts: vec![Part {
                label: "proxy".to_owned(),
                role: "proxy".to_owned(),
                ranks: 1,
            }],
            own_gpus: false,
            command: self.proxy_command(),
        }
    }

    fn srun_options(&self) -> Vec<String> {
        let all_die = self.job.fabric == Fabric::Mpi;
        let mut options = vec![
            "--export=ALL".to_owned(),
            format!("--kill-on-bad-exit={}", u8::from(all_die)),
            format!("--mpi={}", self.job.mpi),
            "--wait=0".to_owned(),
        ];
        if let Some(cpus) = self.job.slurm.cpus_per_task {
            options.push(format!("--cpus-per-task={cpus}"));
        }
        if let Some(container) = &self.job.container {
            options.push(format!("--container-image={}", container.image));
            let mounts: Vec<String> = container
                .mounts
                .iter()
                .chain(&self.added_mounts())
                .map(ToString::to_string)
                .collect();
            options.push(format!("--container-mounts={}", mounts.join(",")));
            if let Some(workdir) = &container.workdir {
                options.push(format!("--container-workdir={workdir}"));
            }
        }
        options
    }

    fn launch_command(&self, only: Option<&str>, with_proxy: bool) -> Vec<String> {
        let mut options = vec![
            format!("--config={}", self.folder.file("disagg_config.yaml")),
            format!("--fabric={}", self.job.fabric.name()),
            format!("--log-dir={}", self.folder.logs),
        ];
        if self.job.discovery.is_none() {
            options.push(format!("--address-dir={}", self.folder.addresses()));
        }
        options.extend(only.map(|only| format!("--only={only}")));
        if with_proxy {
            options.push(format!("--ready-file={}", self.folder.file("ready")));
            options.extend(self.proxy_timeouts());
        }
        options.sort();
        let mut words = vec![self.baton_inside(), "launch".to_owned()];
        words.extend(options);
        words
    }

    fn proxy_command(&self) -> Vec<String> {
        let mut options = vec![
            format!("--config={}", self.folder.file("proxy_config.yaml")),
            format!("--report-addr={}/proxy.addr", self.folder.addresses()),
        ];
        options.extend(self.proxy_timeouts());
        options.sort();
        let mut words = vec![self.baton_inside(), "disaggregated".to_owned()];
        words.extend(options);
        words
    }

    fn proxy_timeouts(&self) -> [String; 2] {
        let proxy = &self.layout.proxy;
        let seconds = |duration: std::time::Duration| duration.as_secs().max(1);
        [
            format!("--request-timeout={}", seconds(proxy.request_timeout)),
            format!(
                "--server-start-timeout={}",
                seconds(proxy.server_start_timeout)
            ),
        ]
    }

    fn script(&self, plan: &Plan, planned: &JobPlan, run: &RunFile) -> String {
        let label = if plan.start == StartMode::Steps {
            "proxy"
        } else {
            planned.name.as_str()
        };
        let launch = run.launch(label).expect("each job has its launches");
        let inside = |command: &str| {
            vec![
                self.job.baton.clone(),
                "slurm".to_owned(),
                command.to_owned(),
                format!("--run={}", self.folder.file(RUN_FILE)),
            ]
        };
        let command = match (plan.start, planned.deal) {
            (StartMode::Steps, _) => inside("steps"),
            (_, Deal::Blocks) => launch.on_all_nodes(),
            (_, Deal::Listed) => {
                let mut words = inside("world");
                words.push(format!("--launch={label}"));
                words
            }
        };
        script::batch(
            &self.sbatch_options(planned),
            &self.job.slurm.sbatch_args,
            &command,
        )
    }

    fn sbatch_options(&self, planned: &JobPlan) -> Vec<String> {
        let slurm = &self.job.slurm;
        let proxy_only = planned.instances.is_empty();
        let logs = self.folder.logs.replace('%', "%%");
        let mut options = vec![
            format!("--job-name={}", planned.name),
            format!("--nodes={}", planned.nodes()),
            format!("--ntasks-per-node={}", planned.tasks_max()),
            "--open-mode=append".to_owned(),
            format!("--output={logs}/%x-%j.log"),
            format!("--signal={}", slurm.signal),
        ];
        let named = [
            ("account", slurm.account.as_ref()),
            ("partition", slurm.partition.as_ref()),
            ("time", slurm.time.as_ref()),
        ];
        for (name, value) in named {
            options.extend(value.map(|value| format!("--{name}={value}")));
        }
        match slurm.requeue {
            Some(true) => options.push("--requeue".to_owned()),
            Some(false) => options.push("--no-requeue".to_owned()),
            None => {}
        }
        if proxy_only {
            options.extend(self.store_host().map(|host| format!("--nodelist={host}")));
        } else {
            let cpus = slurm.cpus_per_task;
            options.extend(cpus.map(|cpus| format!("--cpus-per-task={cpus}")));
            let gpus = slurm.request_gpus;
            options.extend(gpus.then(|| format!("--gpus-per-node={}", self.job.gpus_per_node)));
            options.extend(slurm.exclusive.then(|| "--exclusive".to_owned()));
            options.extend(
                slurm
                    .segment
                    .then(|| format!("--segment={}", planned.nodes())),
            );
        }
        options.sort();
        options
    }

    /// The node on which the proxy must run, where its own store has a fixed address.
    fn store_host(&self) -> Option<String> {
        let host = self.job.discovery.as_ref()?.store.host.as_str();
        let is_address = host.parse::<std::net::IpAddr>().is_ok();
        (!is_address).then(|| host.split('.').next().unwrap_or(host).to_owned())
    }
}

fn part_of(instance: &InstancePlan) -> Part {
    Part {
        label: instance.label.clone(),
        role: instance.role.section().to_owned(),
        ranks: u32::try_from(instance.ranks.len()).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests;
