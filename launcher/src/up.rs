//! `baton up`: a whole layout on this machine, as supervised children of this process.
//!
//! Phases, each a function that awaits: start the instances → learn their addresses → start the proxy → wait until it
//! can serve → serve → drain. Ports that the kernel chose stay with their process over restarts, so the proxy's
//! list of workers holds for the life of the deployment.

use std::ffi::OsString;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::sys::signal::Signal;
use tokio::time::Instant;

use crate::child::ChildSpec;
use crate::cli::{LogLevel, UpArgs};
use crate::exit::{Outcome, WithOutcome};
use crate::files::{self, Deployment, InstancePlan};
use crate::http::HttpClient;
use crate::output::LineSink;
use crate::signals::EndSignals;
use crate::supervisor::{Event, FirstCause, Supervisor};

/// How often an address file or the proxy's health is looked at while starting.
const START_POLL: Duration = Duration::from_millis(20);
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);

/// A deployment being brought up.
struct Up {
    supervisor: Supervisor,
    plan: Deployment,
    folder: PathBuf,
    binary: OsString,
    log_level: LogLevel,
    deadline: Instant,
    label_width: usize,
    /// The proxy's slot, once it is started.
    proxy: Option<usize>,
}

/// How serving ended.
enum End {
    Asked(Signal),
    Broken(FirstCause),
}

/// Runs `baton up`.
pub(crate) async fn run(args: UpArgs) -> anyhow::Result<Outcome> {
    let plan = files::deployment(&args)?;
    let folder = args
        .log_dir
        .as_deref()
        .or(plan.log_dir())
        .unwrap_or(Path::new("baton-logs"))
        .to_path_buf();
    let binary = std::env::current_exe()
        .context("cannot find this program's own file")?
        .into_os_string();
    if args.dry_run {
        return dry_run(&plan, &folder, &binary, args.log_level);
    }
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make the log directory {}", folder.display()))
        .outcome(Outcome::Unavailable)?;
    let mut up = Up {
        supervisor: Supervisor::new(
            EndSignals::new(EndSignals::BY_HAND).context("cannot watch for signals")?,
        ),
        label_width: plan
            .instances()
            .iter()
            .map(|instance| instance.label.len())
            .max()
            .unwrap_or(0)
            .max("proxy".len()),
        plan,
        folder,
        binary,
        log_level: args.log_level,
        deadline: Instant::now() + Duration::from_secs(args.server_start_timeout),
        proxy: None,
    };
    let result = up.bring_up_and_serve(&args).await;
    let drained = up
        .supervisor
        .drain(up.proxy, Duration::from_secs(args.drain_timeout))
        .await;
    match result {
        Ok(End::Asked(signal)) if drained => {
            tracing::info!("all processes ended");
            Ok(Outcome::Signal(signal as i32))
        }
        Ok(End::Asked(signal)) => {
            Err(anyhow!("some processes had to be killed")).outcome(Outcome::Signal(signal as i32))
        }
        Ok(End::Broken(cause)) => Err(cause.into()),
        Err(error) => Err(error),
    }
}

fn dry_run(
    plan: &Deployment,
    folder: &Path,
    binary: &OsString,
    level: LogLevel,
) -> anyhow::Result<Outcome> {
    let mut text = String::new();
    for instance in plan.instances() {
        text.push_str(
            &instance_spec(instance, instance.port, folder, binary, level).command_line(),
        );
        text.push('\n');
    }
    text.push_str(&proxy_spec(plan, folder, binary, level).command_line());
    text.push('\n');
    std::io::stdout().write_all(text.as_bytes())?;
    Ok(Outcome::Success)
}

impl Up {
    async fn bring_up_and_serve(&mut self, args: &UpArgs) -> anyhow::Result<End> {
        let mut addresses = Vec::new();
        let instances: Vec<InstancePlan> = self.plan.instances().to_vec();
        for instance in &instances {
            files::write(&instance.config_path(&self.folder), &instance.config_text)?;
            let spec = instance_spec(
                instance,
                instance.port,
                &self.folder,
                &self.binary,
                self.log_level,
            );
            self.start(spec)?;
        }
        for (index, instance) in instances.iter().enumerate() {
            let file = address_file(&self.folder, &instance.label);
            let address = match self.address(&instance.label, &file).await? {
                ControlFlow::Continue(address) => address,
                ControlFlow::Break(signal) => return Ok(End::Asked(signal)),
            };
            self.keep_port(index, instance, &address)?;
            addresses.push(address);
        }
        files::write(
            &self.folder.join("disagg_config.yaml"),
            &self.plan.proxy_config(&addresses)?,
        )?;
        let proxy = proxy_spec(&self.plan, &self.folder, &self.binary, self.log_level);
        self.proxy = Some(self.start(proxy)?);
        let proxy = match self
            .address("proxy", &address_file(&self.folder, "proxy"))
            .await?
        {
            ControlFlow::Continue(address) => address,
            ControlFlow::Break(signal) => return Ok(End::Asked(signal)),
        };
        files::write(
            &self.folder.join("disagg_config.yaml"),
            &self.plan.proxy_config_at(&addresses, &proxy)?,
        )?;
        if let Some(path) = &args.report_addr {
            files::write(path, &proxy)?;
        }
        if let ControlFlow::Break(signal) = self.ready(&proxy).await? {
            return Ok(End::Asked(signal));
        }
        self.announce(&instances, &addresses, &proxy)?;
        if let Some(path) = &args.ready_file {
            files::write(path, &proxy)?;
        }
        self.serve().await
    }

    fn start(&mut self, spec: ChildSpec) -> anyhow::Result<usize> {
        // What an earlier run left there would be taken for this run's address.
        let stale = address_file(&self.folder, &spec.label);
        if let Err(error) = std::fs::remove_file(&stale)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            return Err(error).with_context(|| format!("cannot remove {}", stale.display()));
        }
        let index = self.plan.index_of(&spec.label);
        let sink = LineSink::open(&spec.label, index, self.label_width, &spec.log_file)
            .with_context(|| format!("cannot write {}", spec.log_file.display()))
            .outcome(Outcome::Unavailable)?;
        let label = spec.label.clone();
        self.supervisor
            .start(spec, sink)
            .with_context(|| format!("cannot start {label}"))
    }

    /// Events while starting: any process that ends now has a reason that a restart would not mend.
    /// Breaks with the signal that asked this process to end.
    async fn step(&mut self, waiting_for: &str) -> anyhow::Result<ControlFlow<Signal>> {
        let tick = (Instant::now() + START_POLL).min(self.deadline);
        match self.supervisor.next(Some(tick)).await {
            Event::Exited { index, status } => {
                let outcome = status
                    .and_then(|status| status.code())
                    .map_or(Outcome::Failure, files::outcome_of_code);
                Err(self.supervisor.cause(index, status)).outcome(outcome)
            }
            Event::Asked(signal) => Ok(ControlFlow::Break(signal)),
            Event::RestartDue { .. } => Ok(ControlFlow::Continue(())),
            Event::Deadline if Instant::now() >= self.deadline => Err(anyhow!(
                "not ready in time: still waiting for {waiting_for}"
            ))
            .outcome(Outcome::TimedOut),
            Event::Deadline => Ok(ControlFlow::Continue(())),
        }
    }

    async fn address(
        &mut self,
        label: &str,
        file: &Path,
    ) -> anyhow::Result<ControlFlow<Signal, String>> {
        loop {
            match std::fs::read_to_string(file) {
                Ok(text) if !text.trim().is_empty() => {
                    return Ok(ControlFlow::Continue(text.trim().to_owned()));
                }
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("cannot read {}", file.display()));
                }
            }
            if let ControlFlow::Break(signal) =
                self.step(&format!("{label} to bind its socket")).await?
            {
                return Ok(ControlFlow::Break(signal));
            }
        }
    }

    fn keep_port(
        &mut self,
        index: usize,
        instance: &InstancePlan,
        address: &str,
    ) -> anyhow::Result<()> {
        let port = address
            .rsplit(':')
            .next()
            .and_then(|port| port.parse().ok());
        let port = port.ok_or_else(|| {
            anyhow!(
                "{} reported `{address}`, which is not host:port",
                instance.label
            )
        })?;
        let spec = instance_spec(instance, port, &self.folder, &self.binary, self.log_level);
        self.supervisor.set_restart_spec(index, spec);
        Ok(())
    }

    async fn ready(&mut self, proxy: &str) -> anyhow::Result<ControlFlow<Signal>> {
        let http = HttpClient::new(HEALTH_TIMEOUT);
        let url = format!("http://{proxy}/health");
        loop {
            if let Ok((200, _)) = http.get(&url, HEALTH_TIMEOUT).await {
                return Ok(ControlFlow::Continue(()));
            }
            if let ControlFlow::Break(signal) = self
                .step("the proxy's /health; its log says on whom it waits")
                .await?
            {
                return Ok(ControlFlow::Break(signal));
            }
        }
    }

    fn announce(
        &self,
        instances: &[InstancePlan],
        addresses: &[String],
        proxy: &str,
    ) -> anyhow::Result<()> {
        let mut text = format!("\n{:<12} {:<28} log\n", "process", "endpoint");
        let mut row = |label: &str, address: &str| {
            let log = log_file(&self.folder, label);
            text.push_str(&format!(
                "{label:<12} {:<28} {}\n",
                format!("http://{address}"),
                log.display()
            ));
        };
        for (instance, address) in instances.iter().zip(addresses) {
            row(&instance.label, address);
        }
        row("proxy", proxy);
        text.push_str(&format!("\nready: OpenAI API at http://{proxy}/v1\n\n"));
        std::io::stdout()
            .write_all(text.as_bytes())
            .context("cannot write to stdout")
    }

    async fn serve(&mut self) -> anyhow::Result<End> {
        loop {
            match self.supervisor.next(None).await {
                Event::Exited { index, status } => {
                    if let Err(cause) = self.supervisor.plan_restart(index, status) {
                        return Ok(End::Broken(cause));
                    }
                }
                Event::RestartDue { index } => {
                    self.supervisor
                        .restart(index)
                        .context("cannot start a process again")?;
                }
                Event::Asked(signal) => {
                    tracing::info!(%signal, "draining; once more kills");
                    return Ok(End::Asked(signal));
                }
                Event::Deadline => {}
            }
        }
    }
}

fn address_file(folder: &Path, label: &str) -> PathBuf {
    folder.join(format!("{label}.addr"))
}

fn log_file(folder: &Path, label: &str) -> PathBuf {
    folder.join(format!("{label}.log"))
}

fn instance_spec(
    instance: &InstancePlan,
    port: u16,
    folder: &Path,
    binary: &OsString,
    level: LogLevel,
) -> ChildSpec {
    let mut argv = vec![
        binary.clone(),
        "serve".into(),
        instance.model.clone().into(),
    ];
    let mut option = |name: &str, value: OsString| argv.extend([name.into(), value]);
    option("--host", instance.host.clone().into());
    option("--port", port.to_string().into());
    option("--server-role", instance.role.into());
    option("--instance", instance.label.clone().into());
    option("--config", instance.config_path(folder).into());
    option(
        "--report-addr",
        address_file(folder, &instance.label).into(),
    );
    option("--log-level", level.directive().into());
    ChildSpec {
        label: instance.label.clone(),
        argv,
        environment: instance.environment.clone(),
        log_file: log_file(folder, &instance.label),
    }
}

fn proxy_spec(plan: &Deployment, folder: &Path, binary: &OsString, level: LogLevel) -> ChildSpec {
    let mut argv = vec![binary.clone(), "disaggregated".into()];
    let mut option = |name: &str, value: OsString| argv.extend([name.into(), value]);
    let (start_s, request_s) = plan.proxy_timeouts_s();
    option("--config", folder.join("disagg_config.yaml").into());
    option("--server-start-timeout", start_s.to_string().into());
    option("--request-timeout", request_s.to_string().into());
    option("--report-addr", address_file(folder, "proxy").into());
    option("--log-level", level.directive().into());
    ChildSpec {
        label: "proxy".to_owned(),
        argv,
        environment: plan.proxy_environment(),
        log_file: log_file(folder, "proxy"),
    }
}
