//! `baton launch`, `llmapi-launch`, `disaggregated_mpi_worker`, and `baton serve` with several ranks on one machine:
//! from rank facts and options to a world, and its end to an outcome.

use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant as Moment};

use anyhow::Context;
use baton_configs::disagg::{self, DisaggDocument, ServerAddress};
use baton_configs::llm::{Device, LlmOptions};
use baton_configs::yaml::Document;
use baton_engine::ranks::Fabric;
use baton_engine::secret::Secret;
use tokio::time::Instant;

use crate::bind::{self, Binding};
use crate::cli::{FabricArg, LaunchArgs, LlmapiLaunchArgs, LogLevel, MpiWorkerArgs, WorldArgs};
use crate::exit::{self, Outcome, WithOutcome};
use crate::files;
use crate::pmix;
use crate::rank::{self, Environment, RankFacts};
use crate::reach;
use crate::world::bootstrap::{self, Ground};
use crate::world::coordinator::{Policy, ProxySpec, ProxyStart, Timeouts, WorldSpec};
use crate::world::instance::InstanceSpec;
use crate::world::membership;
use crate::world::plan::{self, Only, Planned};
use crate::world::protocol::{AgentHello, Program, Streams, VERSION};
use crate::world::{self, Own, Way};

/// What a world runs.
enum Work {
    Command(Vec<String>),
    Deployment {
        config: PathBuf,
        only: Only,
        address_dir: Option<PathBuf>,
        ready_file: Option<PathBuf>,
    },
}

/// Runs `baton launch`.
pub(crate) fn launch(args: LaunchArgs) -> anyhow::Result<Outcome> {
    let only = args.only.unwrap_or_default();
    let Some(config) = args.config else {
        return world(&Work::Command(args.command), &args.world);
    };
    if args.dry_run {
        return dry_run(&config, &only);
    }
    let work = Work::Deployment {
        config,
        only,
        address_dir: args.address_dir,
        ready_file: args.ready_file,
    };
    world(&work, &args.world)
}

/// Runs `llmapi-launch`: no options of its own, so everything is as by default.
pub(crate) fn llmapi_launch(args: LlmapiLaunchArgs) -> anyhow::Result<Outcome> {
    let options = WorldArgs {
        log_level: LogLevel::Warning,
        ..WorldArgs::default()
    };
    world(&Work::Command(args.command), &options)
}

/// Runs `disaggregated_mpi_worker`.
pub(crate) fn mpi_worker(args: MpiWorkerArgs) -> anyhow::Result<Outcome> {
    let work = Work::Deployment {
        config: args.config,
        only: Only::default(),
        address_dir: None,
        ready_file: None,
    };
    world(&work, &args.world)
}

/// Ranks that an instance's options ask for.
pub(crate) fn ranks_of(llm: &LlmOptions) -> u32 {
    llm.tensor_parallel_size
        .saturating_mul(llm.pipeline_parallel_size)
}

/// Runs the ranks of one server on this machine, as `baton serve --tp_size N` without a launcher asks.
pub(crate) fn local(
    llm: &LlmOptions,
    arguments: Vec<String>,
    log_level: LogLevel,
) -> anyhow::Result<Outcome> {
    let (ranks, environment) = (ranks_of(llm), Environment::of_process());
    if llm.device == Device::Cuda {
        bind::check_devices(&environment, ranks).outcome(Outcome::Config)?;
    }
    let options = WorldArgs {
        // Longer than the server's own drain.
        drain_timeout: 35,
        log_level,
        ..WorldArgs::default()
    };
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).outcome(Outcome::Address)?;
    listener.set_nonblocking(true).outcome(Outcome::Address)?;
    let instance = InstanceSpec {
        label: "server".to_owned(),
        ranks,
        program: Program::Baton,
        arguments,
        streams: Streams::Inherited,
        is_server: false,
        ..InstanceSpec::proxy()
    };
    let mut spec = WorldSpec {
        local: true,
        policy: Policy::Command,
        instances: vec![instance],
        ..empty_world(
            format!("local {}", std::process::id()),
            ranks,
            Secret::generate(),
            &options,
        )
    };
    let bindings: Vec<Binding> = (0..ranks)
        .map(|rank| bind::of_this_process(&environment, rank, ranks))
        .collect();
    let hello = hello((0, ranks), host_name(), &bindings[0]);
    spec.local_environment = bindings
        .into_iter()
        .map(|binding| binding.environment)
        .collect();
    let own = Own {
        hello,
        environment: Vec::new(),
    };
    crate::on_this_thread()?
        .block_on(async { world::lead(spec, bootstrap::async_listener(listener)?, own).await })
}

/// One task of a world: rank 0 leads, the others join.
fn world(work: &Work, options: &WorldArgs) -> anyhow::Result<Outcome> {
    let environment = Environment::of_process();
    let facts = rank::discover(&environment).outcome(Outcome::Usage)?;
    if facts.in_batch_script && facts.rank == 0 {
        tracing::debug!("in a batch script, not in a step: this is a world of one rank");
    }
    let start = Moment::now();
    let timeout = Duration::from_secs(options.server_start_timeout);
    let ground = Ground::explore(&facts)?;
    let (name, size) = (ground.name.clone(), ground.size);
    let (local_rank, local_size) = (facts.local_rank.unwrap_or(0), facts.local_size.unwrap_or(1));
    let binding = bind::of_this_process(&environment, local_rank, local_size);
    let host = facts.this_host.clone().unwrap_or_else(host_name);
    let own = Own {
        hello: hello((facts.rank, size), host, &binding),
        environment: for_children(&facts, &environment),
    };
    if facts.rank > 0 {
        let (addresses, secret) = ground.find(&facts, start + timeout)?;
        let way = Way {
            addresses,
            secret,
            world: name,
            deadline: Instant::now() + timeout.saturating_sub(start.elapsed()),
            peer_timeout: Duration::from_secs(options.peer_timeout),
        };
        return crate::on_this_thread()?.block_on(world::join(way, own));
    }
    crate::servers::raise_open_files();
    let (listener, secret) = ground.host(&facts)?;
    let mut spec = empty_world(name, size, secret, options);
    spec.public = reach::likeliest().unwrap_or(spec.public);
    spec.hosts = (0..size)
        .map(|rank| facts.host_of(rank).map(str::to_owned))
        .collect();
    let filled = fill(&mut spec, work, &facts, options);
    crate::on_this_thread()?.block_on(async {
        let listener = bootstrap::async_listener(listener)?;
        match filled {
            Ok(()) => world::lead(spec, listener, own).await,
            Err(error) => {
                let outcome = exit::of(&error);
                // Said before the others are told to go: mpirun ends this process with the first of them that ends. When
                // stderr is gone there is nobody to tell.
                let _ = writeln!(std::io::stderr(), "error: {error:#}");
                world::dismiss(spec, listener, own.hello, outcome).await;
                Ok(outcome)
            }
        }
    })
}

fn empty_world(name: String, size: u32, secret: Secret, options: &WorldArgs) -> WorldSpec {
    WorldSpec {
        name,
        size,
        local: false,
        local_environment: Vec::new(),
        public: Ipv4Addr::LOCALHOST.into(),
        secret,
        hosts: Vec::new(),
        policy: Policy::Command,
        instances: Vec::new(),
        proxy: None,
        fabric: match options.fabric {
            FabricArg::Tcp => Fabric::Tcp,
            FabricArg::Mpi => Fabric::Mpi,
        },
        timeouts: Timeouts {
            start: Duration::from_secs(options.server_start_timeout),
            peer: Duration::from_secs(options.peer_timeout),
            drain: Duration::from_secs(options.drain_timeout),
        },
        restarts_max: options.max_restarts,
        log_dir: options.log_dir.clone(),
        address_dir: None,
        ready_file: None,
    }
}

/// What rank 0 runs, from the command or the config.
fn fill(
    spec: &mut WorldSpec,
    work: &Work,
    facts: &RankFacts,
    options: &WorldArgs,
) -> anyhow::Result<()> {
    match work {
        Work::Command(command) => {
            let (program, arguments) = command.split_first().context("no command was given")?;
            spec.instances = vec![InstanceSpec {
                label: membership::COMMAND.to_owned(),
                ranks: spec.size,
                program: Program::Other(program.clone()),
                arguments: arguments.to_vec(),
                streams: Streams::Inherited,
                is_server: false,
                ..InstanceSpec::proxy()
            }];
            Ok(())
        }
        Work::Deployment {
            config,
            only,
            address_dir,
            ready_file,
        } => {
            let document = read(config)?;
            let planned = plan::split(&document, only, Some(spec.size)).outcome(Outcome::Usage)?;
            spec.policy = Policy::Deployment;
            spec.instances = planned
                .iter()
                .map(|planned| instance(planned, options))
                .collect();
            spec.address_dir.clone_from(address_dir);
            spec.ready_file.clone_from(ready_file);
            if only.proxy() {
                spec.proxy = Some(proxy(document, planned, options));
            }
            tracing::info!(
                ranks = spec.size,
                instances = spec.instances.len(),
                starter = facts.starter.command(),
                "a world"
            );
            Ok(())
        }
    }
}

fn read(config: &Path) -> anyhow::Result<DisaggDocument> {
    let document = Document::read(config).outcome(Outcome::Config)?;
    let (document, warnings) =
        disagg::resolve(&document, disagg::default_node_id()).outcome(Outcome::Config)?;
    files::warn(&warnings);
    Ok(document)
}

fn instance(planned: &Planned, options: &WorldArgs) -> InstanceSpec {
    let mut arguments = vec!["serve".to_owned(), planned.model.clone()];
    let mut option =
        |name: &str, value: &str| arguments.extend([name.to_owned(), value.to_owned()]);
    option("--config", "{dir}/llm.yaml");
    option("--instance", &planned.label);
    option("--log-level", options.log_level.directive());
    if let Some(role) = planned.role.option() {
        option("--server-role", role);
    }
    InstanceSpec {
        label: planned.label.clone(),
        first: planned.ranks.start,
        ranks: planned.tensor_parallel * planned.pipeline_parallel,
        arguments,
        files: vec![("llm.yaml".to_owned(), planned.options.clone())],
        port: planned.port,
        ..InstanceSpec::proxy()
    }
}

fn proxy(document: DisaggDocument, planned: Vec<Planned>, options: &WorldArgs) -> ProxySpec {
    let options = options.clone();
    let start = move |addresses: &[String]| {
        let mut config = document.proxy.clone();
        let (mut context, mut generation) = (Vec::new(), Vec::new());
        for (planned, address) in planned.iter().zip(addresses) {
            let endpoint = ServerAddress::At(files::endpoint(address)?);
            if planned.role.reads() {
                context.push(endpoint.clone());
            }
            if planned.role.writes() {
                generation.push(endpoint);
            }
        }
        config.context_servers.servers = context;
        config.generation_servers.servers = generation;
        let timeout = options.server_start_timeout.to_string();
        let request_timeout = options.request_timeout.to_string();
        let arguments = [
            "disaggregated",
            "--config",
            "{dir}/disagg_config.yaml",
            "--server-start-timeout",
            &timeout,
            "--request-timeout",
            &request_timeout,
            "--log-level",
            options.log_level.directive(),
        ];
        Ok(ProxyStart {
            arguments: arguments.map(str::to_owned).to_vec(),
            files: vec![("disagg_config.yaml".to_owned(), disagg::to_yaml(&config))],
        })
    };
    ProxySpec {
        start: Box::new(start),
    }
}

fn dry_run(config: &Path, only: &Only) -> anyhow::Result<Outcome> {
    let document = read(config)?;
    let planned = plan::split(&document, only, None).outcome(Outcome::Usage)?;
    let mut text = String::from("ranks      instance  tp  pp  model\n");
    for planned in &planned {
        let ranks = format!(
            "{}-{}",
            planned.ranks.start,
            planned.ranks.end.saturating_sub(1)
        );
        text.push_str(&format!(
            "{ranks:<10} {:<9} {:<3} {:<3} {}\n",
            planned.label, planned.tensor_parallel, planned.pipeline_parallel, planned.model
        ));
    }
    if only.proxy() {
        let (host, port) = (&document.proxy.hostname, document.proxy.port);
        text.push_str(&format!("rank 0's host: proxy at {host}:{port}\n"));
    }
    let size = planned.last().map_or(0, |planned| planned.ranks.end);
    text.push_str(&format!("start with exactly {size} ranks\n"));
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Success)
}

fn hello((rank, size): (u32, u32), host: String, binding: &Binding) -> AgentHello {
    AgentHello {
        rank,
        size,
        host,
        pid: std::process::id(),
        version: VERSION,
        environment: binding.environment.clone(),
        num_threads: binding.threads,
    }
}

/// What lets a child of a PMIx rank be that rank again, for those that use MPI themselves.
fn for_children(facts: &RankFacts, environment: &Environment) -> Vec<(String, String)> {
    pmix::CHILD_ENVIRONMENT
        .iter()
        .filter(|(name, _)| facts.pmix && !environment.is_set(name))
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
        .collect()
}

fn host_name() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "localhost".to_owned())
}
