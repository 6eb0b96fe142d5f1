//! `baton serve` and `baton disaggregated`: from typed flags to a running server, and its end to an outcome.

use std::future::Future;
use std::time::Duration;

use anyhow::anyhow;
use baton_configs::llm::{self, LlmOverrides};
use baton_configs::yaml::Document;
use baton_engine::serve::{ServeError, ServeOptions};
use baton_proxy::{Environment, ProxyError, ProxyOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::cli::{DisaggregatedArgs, ServeArgs, ServerRole};
use crate::exit::{Outcome, WithOutcome};
use crate::files;

/// Runs one instance until it is asked to end.
pub(crate) async fn serve(args: ServeArgs) -> anyhow::Result<Outcome> {
    if args.port == 0 && args.report_addr.is_none() {
        return Err(anyhow!("--port 0 lets the kernel choose a port that nobody would know\nhint: add --report-addr FILE"))
            .outcome(Outcome::Usage);
    }
    let file = args
        .config
        .as_deref()
        .map(Document::read)
        .transpose()
        .outcome(Outcome::Config)?;
    let (llm, warnings) =
        llm::resolve(file.as_ref(), &overrides(&args)).outcome(Outcome::Config)?;
    files::warn(&warnings);
    let mut options = ServeOptions::new(args.model);
    options.revision = args.revision;
    options.host = args.host;
    options.port = args.port;
    options.report_addr = args.report_addr;
    options.instance = args.instance.unwrap_or_else(|| match args.server_role {
        Some(ServerRole::Context) => "context".to_owned(),
        Some(ServerRole::Generation) => "generation".to_owned(),
        None => "server".to_owned(),
    });
    options.llm = llm;
    until_asked(|shutdown| async move {
        baton_engine::serve::serve(options, shutdown)
            .await
            .map_err(of_serve)
    })
    .await
}

/// Runs the proxy until it is asked to end.
pub(crate) async fn disaggregated(args: DisaggregatedArgs) -> anyhow::Result<Outcome> {
    let (config, warnings) = baton_configs::disagg::load(&args.config).outcome(Outcome::Config)?;
    files::warn(&warnings);
    let mut options = ProxyOptions::new(config);
    options.timeouts.server_start = Duration::from_secs(args.server_start_timeout);
    options.timeouts.request = Duration::from_secs(args.request_timeout);
    options.environment = Environment::from_process()
        .map_err(anyhow::Error::msg)
        .outcome(Outcome::Usage)?;
    options.report_addr = args.report_addr;
    options.metrics_log_interval =
        (args.metrics_log_interval > 0).then(|| Duration::from_secs(args.metrics_log_interval));
    until_asked(
        |shutdown| async move { baton_proxy::run(options, shutdown).await.map_err(of_proxy) },
    )
    .await
}

fn overrides(args: &ServeArgs) -> LlmOverrides {
    let engine = &args.engine;
    LlmOverrides {
        max_batch_size: engine.max_batch_size,
        max_num_tokens: engine.max_num_tokens,
        max_seq_len: engine.max_seq_len,
        max_beam_width: engine.max_beam_width,
        enable_chunked_prefill: engine.enable_chunked_prefill.then_some(true),
        tensor_parallel_size: engine.tensor_parallel_size,
        pipeline_parallel_size: engine.pipeline_parallel_size,
        free_gpu_memory_fraction: engine.free_gpu_memory_fraction,
        chat_template: args.chat_template.clone(),
        tokenizer: args.tokenizer.clone(),
        backend: args.backend.clone(),
        ..LlmOverrides::default()
    }
}

/// Lets this process hold as many sockets as the system allows: a request may need one to its client and two to workers.
fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "cannot raise the limit of open files; many clients at once may be turned away");
    }
}

/// Runs a server with a shutdown that the first INT or TERM starts; a second one drops the server where it stands.
async fn until_asked<F, R>(run: F) -> anyhow::Result<Outcome>
where
    F: FnOnce(ShutdownFuture) -> R,
    R: Future<Output = anyhow::Result<()>>,
{
    raise_open_files();
    let mut interrupt = signal(SignalKind::interrupt()).outcome(Outcome::Unavailable)?;
    let mut terminate = signal(SignalKind::terminate()).outcome(Outcome::Unavailable)?;
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
                return Ok(asked.borrow().map_or(Outcome::Success, Outcome::Signal));
            }
            _ = interrupt.recv() => nix::libc::SIGINT,
            _ = terminate.recv() => nix::libc::SIGTERM,
        };
        if asked.borrow().is_some() {
            return Err(anyhow!("asked to end twice; what was in flight is lost"))
                .outcome(Outcome::Signal(number));
        }
        asked.send_replace(Some(number));
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

fn of_serve(error: ServeError) -> anyhow::Error {
    let outcome = match &error {
        ServeError::Listen(_) => Outcome::Address,
        ServeError::Model(_)
        | ServeError::Tokenizer(_)
        | ServeError::ChatTemplate(_)
        | ServeError::NoPool { .. }
        | ServeError::Transceiver(_) => Outcome::Unavailable,
        ServeError::Fault(_) => Outcome::Usage,
        _ => Outcome::Failure,
    };
    crate::exit::coded(outcome, error)
}
