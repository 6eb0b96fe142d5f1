//! `baton serve` and `baton disaggregated`: from typed flags to a running server, and its end to an outcome.

use std::future::Future;
use std::net::IpAddr;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::anyhow;
use baton_configs::llm::{self, Device, LlmOverrides, LoadFormat};
use baton_configs::yaml::Document;
use baton_engine::ranks::{Fabric, FollowerSpec};
use baton_engine::serve::{ServeError, ServeOptions, WorkerRole};
use baton_proxy::{Environment, ProxyError, ProxyOptions};
use tokio::sync::watch;

use crate::cli::{
    DisaggregatedArgs, EngineArgs, EngineDeviceArg, LoadFormatArg, ServeArgs, ServerRole,
};
use crate::exit::{Outcome, WithOutcome};
use crate::files;
use crate::launch;
use crate::reach;
use crate::signals::EndSignals;
use crate::world::membership::Membership;

/// Runs one instance until it is asked to end. One of several ranks finds the others through its launcher; without a
/// launcher it becomes one itself, and starts all its ranks on this machine.
pub(crate) fn serve(args: &ServeArgs) -> anyhow::Result<Outcome> {
    let membership = Membership::from_environment().outcome(Outcome::Usage)?;
    let options = serve_options(args)?;
    let llm = &options.llm;
    if membership.is_none() && launch::ranks_of(llm) > 1 {
        let arguments: Option<Vec<String>> = std::env::args_os()
            .skip(1)
            .map(|word| word.into_string().ok())
            .collect();
        let arguments = arguments
            .ok_or_else(|| anyhow!("an argument is not UTF-8"))
            .outcome(Outcome::Usage)?;
        return launch::local(llm, arguments, args.log_level);
    }
    crate::on_all_cores()?.block_on(serve_here(options, membership))
}

async fn serve_here(
    mut options: ServeOptions,
    membership: Option<Membership>,
) -> anyhow::Result<Outcome> {
    let supervised = membership.is_some();
    options.advertise = advertise(membership.as_ref());
    if let Some(membership) = membership {
        join(&mut options, membership, tokio::runtime::Handle::current())?;
    }
    until_asked(supervised, |shutdown| async move {
        baton_engine::serve::serve(options, shutdown)
            .await
            .map_err(of_serve)
    })
    .await
}

/// Takes the place that a launcher gave to this process: its threads, and the way to its other ranks. They are called for on
/// `runtime`, which must run by itself.
pub(crate) fn join(
    options: &mut ServeOptions,
    membership: Membership,
    runtime: tokio::runtime::Handle,
) -> anyhow::Result<()> {
    let threads = membership.num_threads;
    options.llm.num_threads.get_or_insert(threads);
    let ranks = options
        .llm
        .tensor_parallel_size
        .saturating_mul(options.llm.pipeline_parallel_size);
    if ranks != membership.ranks && (ranks > 1 || membership.is_instance()) {
        return Err(anyhow!(membership.wrong_size(&options.llm))).outcome(Outcome::Usage);
    }
    // With MPI an instance of one rank has to take part in the start of the world too.
    if ranks > 1 || membership.fabric == Fabric::Mpi {
        options.ranks = Some(membership.leader_ranks(runtime).outcome(Outcome::Usage)?);
    }
    Ok(())
}

/// Runs one follower rank: its launcher writes what it needs to know to its standard input.
pub(crate) fn rank() -> anyhow::Result<Outcome> {
    let spec: FollowerSpec = serde_json::from_reader(std::io::stdin().lock())
        .map_err(|error| anyhow!("`baton rank` is started by a launcher, which says on its standard input what to follow: {error}"))
        .outcome(Outcome::Usage)?;
    let runtime = crate::on_all_cores()?;
    runtime.block_on(async {
        // A rank ends when its leader says so: a signal that all processes of a step get must not end it in the middle
        // of the leader's drain. Its launcher kills it when that is needed.
        let _deaf = EndSignals::new(EndSignals::ALL).outcome(Outcome::Unavailable)?;
        tokio::task::spawn_blocking(move || {
            baton_engine::serve::follow(&spec, &AtomicBool::new(false)).map_err(of_serve)
        })
        .await
        .outcome(Outcome::Failure)??;
        Ok(Outcome::Success)
    })
}

fn serve_options(args: &ServeArgs) -> anyhow::Result<ServeOptions> {
    let file = args
        .config
        .as_deref()
        .map(Document::read)
        .transpose()
        .outcome(Outcome::Config)?;
    let (llm, warnings) = llm::resolve(file.as_ref(), &overrides(args)).outcome(Outcome::Config)?;
    if args.port == 0 && args.report_addr.is_none() && llm.cluster.is_none() {
        return Err(anyhow!("--port 0 lets the kernel choose a port that nobody would know\nhint: add --report-addr FILE, or --disagg-cluster-uri URI to register"))
            .outcome(Outcome::Usage);
    }
    files::warn(&warnings);
    let mut options = ServeOptions::new(args.model.clone());
    options.role = args.server_role.map(|role| match role {
        ServerRole::Context => WorkerRole::Context,
        ServerRole::Generation => WorkerRole::Generation,
    });
    options.revision.clone_from(&args.revision);
    options.host.clone_from(&args.host);
    options.port = args.port;
    options.report_addr.clone_from(&args.report_addr);
    options.instance = args
        .instance
        .clone()
        .unwrap_or_else(|| match args.server_role {
            Some(ServerRole::Context) => "context".to_owned(),
            Some(ServerRole::Generation) => "generation".to_owned(),
            None => "server".to_owned(),
        });
    options.llm = llm;
    Ok(options)
}

/// Runs the proxy until it is asked to end.
pub(crate) async fn disaggregated(args: DisaggregatedArgs) -> anyhow::Result<Outcome> {
    let (mut config, warnings) =
        baton_configs::disagg::load(&args.config).outcome(Outcome::Config)?;
    files::warn(&warnings);
    config.port = args.port.unwrap_or(config.port);
    let membership = Membership::from_environment().outcome(Outcome::Usage)?;
    let supervised = membership.is_some();
    let mut options = ProxyOptions::new(config);
    options.timeouts.server_start = Duration::from_secs(args.server_start_timeout);
    options.timeouts.request = Duration::from_secs(args.request_timeout);
    options.environment = Environment::from_process()
        .map_err(anyhow::Error::msg)
        .outcome(Outcome::Usage)?;
    options.report_addr = args.report_addr;
    options.advertise = advertise(membership.as_ref());
    options.metrics_log_interval =
        (args.metrics_log_interval > 0).then(|| Duration::from_secs(args.metrics_log_interval));
    until_asked(supervised, |shutdown| async move {
        baton_proxy::run(options, shutdown).await.map_err(of_proxy)
    })
    .await
}

/// This machine's address for others: the one that other ranks use, else the likeliest.
fn advertise(membership: Option<&Membership>) -> Option<IpAddr> {
    let of_world = membership.and_then(|membership| membership.host.parse().ok());
    // A world on one machine talks over the loopback; its clients may be elsewhere.
    of_world
        .filter(|ip: &IpAddr| !ip.is_loopback())
        .or_else(reach::likeliest)
}

fn overrides(args: &ServeArgs) -> LlmOverrides {
    LlmOverrides {
        chat_template: args.chat_template.clone(),
        tokenizer: args.tokenizer.clone(),
        backend: args.backend.clone(),
        disagg_cluster_uri: args.disagg_cluster_uri.clone(),
        ..engine_overrides(&args.engine)
    }
}

/// What the options of an engine say.
pub(crate) fn engine_overrides(engine: &EngineArgs) -> LlmOverrides {
    LlmOverrides {
        device: engine.device.map(|device| match device {
            EngineDeviceArg::Auto => Device::Auto,
            EngineDeviceArg::Cpu => Device::Cpu,
            EngineDeviceArg::Cuda => Device::Cuda,
        }),
        load_format: engine.load_format.map(|format| match format {
            LoadFormatArg::Auto => LoadFormat::Auto,
            LoadFormatArg::Dummy => LoadFormat::Dummy,
        }),
        max_batch_size: engine.max_batch_size,
        max_num_tokens: engine.max_num_tokens,
        max_seq_len: engine.max_seq_len,
        max_beam_width: engine.max_beam_width,
        enable_chunked_prefill: engine.enable_chunked_prefill.then_some(true),
        tensor_parallel_size: engine.tensor_parallel_size,
        pipeline_parallel_size: engine.pipeline_parallel_size,
        free_gpu_memory_fraction: engine.free_gpu_memory_fraction,
        ..LlmOverrides::default()
    }
}

/// Lets this process hold as many sockets as the system allows: a request may need one to its client and two to workers,
/// rank 0 one for every rank.
pub(crate) fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files; many clients at once may be turned away");
    }
}

/// Runs a server with a shutdown that the first INT, TERM or USR1 starts; a second one drops the server where it stands,
/// unless it is supervised: a cluster's signal reaches it directly and through its launcher, which kills what is late.
async fn until_asked<F, R>(supervised: bool, run: F) -> anyhow::Result<Outcome>
where
    F: FnOnce(ShutdownFuture) -> R,
    R: Future<Output = anyhow::Result<()>>,
{
    raise_open_files();
    let mut signals = EndSignals::new(EndSignals::ALL).outcome(Outcome::Unavailable)?;
    let (asked, mut seen) = watch::channel(None);
    let shutdown: ShutdownFuture = Box::pin(async move {
        // An error means that the sender is gone, and with it this whole function.
        let _ = seen.wait_for(Option::is_some).await;
    });
    let mut server = Box::pin(run(shutdown));
    loop {
        let number = tokio::select! {
            result = &mut server => {
                result?;
                return Ok(ended(*asked.borrow()));
            }
            signal = signals.next() => signal as i32,
        };
        if supervised && asked.borrow().is_some() {
            continue;
        }
        if asked.borrow().is_some() {
            return Err(anyhow!("asked to end twice; what was in flight is lost"))
                .outcome(Outcome::Signal(number));
        }
        asked.send_replace(Some(number));
    }
}

/// A drain that was planned (USR1 before the wall time) is a success.
fn ended(asked: Option<i32>) -> Outcome {
    match asked {
        None => Outcome::Success,
        Some(number) if number == nix::libc::SIGUSR1 => Outcome::Success,
        Some(number) => Outcome::Signal(number),
    }
}

/// Resolves when the server shall drain and end.
type ShutdownFuture = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

fn of_proxy(error: ProxyError) -> anyhow::Error {
    let outcome = match &error {
        ProxyError::NoServers { .. } => Outcome::Config,
        ProxyError::Bind { .. } => Outcome::Address,
        ProxyError::Report { .. } => Outcome::Unavailable,
        ProxyError::StartTimeout { .. } => Outcome::TimedOut,
        _ => Outcome::Failure,
    };
    crate::exit::coded(outcome, error)
}

pub(crate) fn of_serve(error: ServeError) -> anyhow::Error {
    let outcome = match &error {
        ServeError::Listen(_) => Outcome::Address,
        ServeError::Model(_)
        | ServeError::Tokenizer(_)
        | ServeError::ChatTemplate(_)
        | ServeError::Device(_)
        | ServeError::NoPool { .. }
        | ServeError::Transceiver(_) => Outcome::Unavailable,
        ServeError::Registration(_) | ServeError::Fault(_) => Outcome::Usage,
        _ => Outcome::Failure,
    };
    crate::exit::coded(outcome, error)
}
