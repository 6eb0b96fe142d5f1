//! One rank's launcher: starts, signals and watches processes as the coordinator says, and decides nothing itself.
//!
//! Invariant: no process outlives its agent. An agent that loses its coordinator kills what it started and ends.

use std::collections::HashMap;
use std::ffi::OsString;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, anyhow};
use nix::sys::signal::Signal;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::protocol::{End, Order, Program, Report, SlotId, Start, Streams};
use crate::child::{Child, ChildSpec, ChildStreams, Input};
use crate::output::LineSink;
use crate::signals::EndSignals;
use crate::supervisor::Event;

/// How often a file that a process will write is looked for.
const ADDRESS_POLL: Duration = Duration::from_millis(20);
/// How long killed processes are waited for.
const KILL_GRACE: Duration = Duration::from_secs(5);
/// Columns for labels.
const LABEL_WIDTH: usize = 7;

/// How an agent's life ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The coordinator said so, and with which exit code.
    Told(u8),
    /// The coordinator is gone.
    Abandoned,
}

#[derive(Debug)]
struct Slot {
    id: SlotId,
    child: Child,
    sink: Option<LineSink>,
    /// Looks for the file with the process's address.
    watch: Option<JoinHandle<()>>,
    /// The folder of its files.
    _folder: Option<TempDir>,
}

/// One rank's launcher.
#[derive(Debug)]
pub(crate) struct Agent {
    reports: mpsc::Sender<Report>,
    /// For all its processes, before what an order says.
    environment: Vec<(String, String)>,
    slots: HashMap<usize, Slot>,
    started_count: usize,
    exits: mpsc::Receiver<Event>,
    exits_sender: mpsc::Sender<Event>,
}

impl Agent {
    /// An agent that tells what happens through `reports`.
    pub(crate) fn new(reports: mpsc::Sender<Report>, environment: Vec<(String, String)>) -> Self {
        let (exits_sender, exits) = mpsc::channel(64);
        Self {
            reports,
            environment,
            slots: HashMap::new(),
            started_count: 0,
            exits,
            exits_sender,
        }
    }

    /// Obeys until told to leave, or until nobody is there to obey. Nothing that it started runs when this returns.
    pub(crate) async fn run(
        mut self,
        mut orders: mpsc::Receiver<Order>,
        signals: &mut EndSignals,
    ) -> Leave {
        let leave = loop {
            tokio::select! {
                order = orders.recv() => match order {
                    None => break Leave::Abandoned,
                    Some(Order::Leave { code }) => break Leave::Told(code),
                    Some(order) => self.obey(order).await,
                },
                Some(event) = self.exits.recv() => self.exited(event).await,
                asked = signals.next() => self.tell(Report::Asked { signal: asked as i32 }).await,
            }
        };
        self.end_all().await;
        leave
    }

    async fn tell(&self, report: Report) {
        // Without a coordinator the order channel is closed too, which the loop sees next.
        let _ = self.reports.send(report).await;
    }

    async fn obey(&mut self, order: Order) {
        match order {
            Order::Alive | Order::Leave { .. } => {}
            Order::Signal { slot, signal } => self.signal(&slot, signal),
            Order::Start(start) => {
                let slot = start.slot.clone();
                if let Err(error) = self.start(*start) {
                    let reason = format!("{error:#}");
                    self.tell(Report::NotStarted { slot, reason }).await;
                }
            }
        }
    }

    fn signal(&self, slot: &SlotId, number: i32) {
        let Ok(signal) = Signal::try_from(number) else {
            return;
        };
        for slot in self.slots.values().filter(|running| running.id == *slot) {
            slot.child.signal(signal);
        }
    }

    fn start(&mut self, start: Start) -> anyhow::Result<()> {
        let folder = folder_of(&start)?;
        let address_file = folder.as_ref().map(|folder| folder.path().join("address"));
        let sink = sink_of(&start)?;
        let spec = ChildSpec {
            label: start.slot.label(),
            argv: argv(&start, folder.as_ref().map(TempDir::path))?,
            environment: [self.environment.clone(), start.environment].concat(),
            log_file: PathBuf::new(),
        };
        let input = match (start.input, start.streams) {
            (Some(text), _) => Input::Text(text),
            (None, Streams::Inherited) => Input::Inherited,
            (None, Streams::Labelled) => Input::Empty,
        };
        let index = self.started_count;
        let streams = ChildStreams {
            sink: sink.clone(),
            input,
        };
        let child = Child::start_with(&spec, streams, index, self.exits_sender.clone())
            .with_context(|| format!("cannot run {}", spec.argv[0].display()))?;
        self.started_count += 1;
        let watch = address_file.filter(|_| start.reports_address).map(|file| {
            tokio::spawn(report_address(
                file,
                start.slot.clone(),
                self.reports.clone(),
            ))
        });
        self.slots.insert(
            index,
            Slot {
                id: start.slot,
                child,
                sink,
                watch,
                _folder: folder,
            },
        );
        Ok(())
    }

    async fn exited(&mut self, event: Event) {
        let Event::Exited { index, status } = event else {
            return;
        };
        let Some(mut slot) = self.slots.remove(&index) else {
            return;
        };
        slot.child.mark_ended();
        if let Some(watch) = &slot.watch {
            watch.abort();
        }
        let tail = slot.sink.as_ref().map(LineSink::tail).unwrap_or_default();
        self.tell(Report::Ended {
            slot: slot.id,
            end: end_of(status),
            tail,
        })
        .await;
    }

    /// Kills what is left and waits for it.
    async fn end_all(&mut self) {
        for slot in self.slots.values() {
            slot.child.signal(Signal::SIGKILL);
        }
        let deadline = Instant::now() + KILL_GRACE;
        while !self.slots.is_empty() {
            match timeout_at(deadline, self.exits.recv()).await {
                Ok(Some(Event::Exited { index, .. })) => {
                    if let Some(mut slot) = self.slots.remove(&index) {
                        slot.child.mark_ended();
                    }
                }
                Ok(_) => {}
                Err(_) => {
                    tracing::error!("processes survive SIGKILL; leaving them to the kernel");
                    return;
                }
            }
        }
    }
}

/// A private folder with the process's files, when it has any or shall report its address.
fn folder_of(start: &Start) -> anyhow::Result<Option<TempDir>> {
    if start.files.is_empty() && !start.reports_address {
        return Ok(None);
    }
    let folder = tempfile::Builder::new()
        .prefix("baton-rank-")
        .tempdir()
        .context("cannot make a folder for a process's files\nhint: set TMPDIR to a folder that can be written")?;
    for (name, text) in &start.files {
        let plain = Path::new(name)
            .file_name()
            .is_some_and(|plain| plain == name.as_str());
        if !plain {
            return Err(anyhow!("`{name}` is no plain file name"));
        }
        fs::write(folder.path().join(name), text)
            .with_context(|| format!("cannot write {name}"))?;
    }
    Ok(Some(folder))
}

fn sink_of(start: &Start) -> anyhow::Result<Option<LineSink>> {
    if start.streams == Streams::Inherited {
        return Ok(None);
    }
    let label = start.slot.label();
    let colour =
        start.slot.rank as usize + start.slot.instance.bytes().map(usize::from).sum::<usize>();
    let Some(folder) = &start.log_dir else {
        return Ok(Some(LineSink::terminal(&label, colour, LABEL_WIDTH)));
    };
    let folder = Path::new(folder);
    let file = folder.join(format!("{label}.log"));
    fs::create_dir_all(folder)
        .and_then(|()| LineSink::open(&label, colour, LABEL_WIDTH, &file))
        .map(Some)
        .with_context(|| format!("cannot write the log file {}", file.display()))
}

fn argv(start: &Start, folder: Option<&Path>) -> anyhow::Result<Vec<OsString>> {
    let program = match &start.program {
        Program::Baton => std::env::current_exe()
            .context("cannot find this program's own file")?
            .into_os_string(),
        Program::Other(name) => OsString::from(name),
    };
    let mut argv = vec![program];
    argv.extend(start.arguments.iter().map(|argument| {
        match (argument.strip_prefix("{dir}/"), folder) {
            (Some(name), Some(folder)) => folder.join(name).into_os_string(),
            _ => OsString::from(argument),
        }
    }));
    if let (true, Some(folder)) = (start.reports_address, folder) {
        argv.extend([
            "--report-addr".into(),
            folder.join("address").into_os_string(),
        ]);
    }
    Ok(argv)
}

/// Waits for the file that holds an address; ends with the process, which aborts it.
async fn report_address(file: PathBuf, slot: SlotId, reports: mpsc::Sender<Report>) {
    let mut poll = interval(ADDRESS_POLL);
    poll.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        poll.tick().await;
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        if !text.trim().is_empty() {
            let address = text.trim().to_owned();
            // Without a coordinator the agent ends anyway.
            let _ = reports.send(Report::Bound { slot, address }).await;
            return;
        }
    }
}

fn end_of(status: Option<ExitStatus>) -> End {
    let Some(status) = status else {
        return End::Unknown;
    };
    match (status.code(), status.signal()) {
        (Some(code), _) => End::Code(code),
        (None, Some(number)) => End::Signal(number),
        (None, None) => End::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    fn start(arguments: &[&str]) -> Start {
        Start {
            slot: SlotId {
                instance: "ctx0".to_owned(),
                rank: 0,
                epoch: 1,
            },
            program: Program::Other("sh".to_owned()),
            arguments: arguments.iter().map(|word| (*word).to_owned()).collect(),
            environment: Vec::new(),
            files: Vec::new(),
            input: None,
            reports_address: false,
            streams: Streams::Labelled,
            log_dir: None,
        }
    }

    struct Running {
        orders: mpsc::Sender<Order>,
        reports: mpsc::Receiver<Report>,
        agent: JoinHandle<Leave>,
    }

    fn run() -> Running {
        let (orders, received) = mpsc::channel(8);
        let (sender, reports) = mpsc::channel(8);
        let mut signals = EndSignals::new(EndSignals::ALL).unwrap();
        let agent = Agent::new(sender, Vec::new());
        Running {
            orders,
            reports,
            agent: tokio::spawn(async move { agent.run(received, &mut signals).await }),
        }
    }

    impl Running {
        async fn order(&self, start: Start) {
            self.orders
                .send(Order::Start(Box::new(start)))
                .await
                .unwrap();
        }

        async fn report(&mut self) -> Report {
            let limit = Duration::from_secs(20);
            timeout(limit, self.reports.recv()).await.unwrap().unwrap()
        }
    }

    #[tokio::test]
    async fn a_process_gets_its_files_input_and_environment_and_its_end_is_told() {
        let mut running = run();
        let mut start = start(&[
            "-c",
            "read line; cat $0; echo $line $WORD >&2; exit 7",
            "{dir}/a.yaml",
        ]);
        start.files = vec![("a.yaml".to_owned(), "text of the file\n".to_owned())];
        start.input = Some("hello\n".to_owned());
        start.environment = vec![("WORD".to_owned(), "world".to_owned())];
        running.order(start).await;
        let Report::Ended { end, mut tail, .. } = running.report().await else {
            panic!("no end")
        };
        tail.sort();
        assert_eq!(end, End::Code(7));
        assert_eq!(tail, ["hello world", "text of the file"]);
        drop(running.orders);
        assert_eq!(running.agent.await.unwrap(), Leave::Abandoned);
    }

    #[tokio::test]
    async fn leaving_kills_what_runs() {
        let mut running = run();
        let mut start = start(&["-c", "echo $$ >$1; while :; do sleep 0.2; done", "sh"]);
        start.reports_address = true;
        // `--report-addr` is $0's next word here, so $1 is the word and $2 the file.
        start.arguments[1] = "echo $$ >$2; while :; do sleep 0.2; done".to_owned();
        running.order(start).await;
        let Report::Bound { address: pid, .. } = running.report().await else {
            panic!("no address")
        };
        let code = Order::Leave { code: 3 };
        running.orders.send(code).await.unwrap();
        assert_eq!(running.agent.await.unwrap(), Leave::Told(3));
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn what_cannot_be_started_is_told() {
        let mut running = run();
        let mut start = start(&[]);
        start.program = Program::Other("/no/such/program".to_owned());
        running.order(start).await;
        let Report::NotStarted { reason, .. } = running.report().await else {
            panic!("started")
        };
        assert!(reason.contains("/no/such/program"), "{reason}");
    }
}
