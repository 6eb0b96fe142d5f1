//! What a value of the cluster part must look like, and which values exclude each other.

use std::time::Duration;

use crate::cluster::{self, ClusterConfig};
use crate::error::ConfigErrorKind;
use crate::layout::job::{Fabric, JobLayout, Mount, PortRange, StartMode};
use crate::layout::raw::RawLayout;
use crate::section::Located;
use crate::section::read::Findings;
use crate::yaml::{Node, quoted};

/// Options of `sbatch` that the plan decides, long and short.
pub(super) const SBATCH_PLANNED: &[(&str, &str)] = &[
    ("--nodes", "-N"),
    ("--ntasks", "-n"),
    ("--ntasks-per-node", ""),
    ("--array", "-a"),
    ("--wrap", ""),
    ("--parsable", ""),
    ("--test-only", ""),
];

/// Options of `srun` that the plan decides.
pub(super) const SRUN_PLANNED: &[(&str, &str)] = &[
    ("--nodes", "-N"),
    ("--ntasks", "-n"),
    ("--ntasks-per-node", ""),
    ("--nodelist", "-w"),
    ("--distribution", "-m"),
    ("--multi-prog", ""),
    ("--mpi", ""),
];

fn wrong(given: &Located<String>, expected: &str, hint: Option<&str>, findings: &mut Findings) {
    let kind = ConfigErrorKind::WrongValue {
        found: quoted(&given.value),
        expected: expected.to_owned(),
    };
    findings.error(given.place, &given.path, kind, hint.map(str::to_owned));
}

/// `FIRST-LAST` of ports that need no privilege.
pub(super) fn port_range(given: &Located<String>, findings: &mut Findings) -> Option<PortRange> {
    const EXPECTED: &str = "FIRST-LAST, two ports from 1024 to 65535, the smaller one first";
    let ports = given.value.split_once('-').and_then(|(first, last)| {
        let port = |text: &str| text.trim().parse::<u16>().ok().filter(|port| *port >= 1024);
        Some((port(first)?, port(last)?))
    });
    match ports {
        Some((first, last)) if first <= last => Some(PortRange { first, last }),
        _ => {
            wrong(given, EXPECTED, Some("such as \"8100-8199\""), findings);
            None
        }
    }
}

/// A time limit as Slurm reads it.
pub(super) fn time(given: &Located<String>, findings: &mut Findings) {
    const EXPECTED: &str = "a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes or days-hours:minutes:seconds";
    if !is_time(&given.value) {
        wrong(given, EXPECTED, Some("such as \"02:00:00\""), findings);
    }
}

fn is_time(text: &str) -> bool {
    if ["UNLIMITED", "INFINITE"]
        .iter()
        .any(|word| text.eq_ignore_ascii_case(word))
    {
        return true;
    }
    let number = |text: &str| {
        !text.is_empty() && text.len() <= 6 && text.bytes().all(|byte| byte.is_ascii_digit())
    };
    let clock = |text: &str| text.split(':').count() <= 3 && text.split(':').all(number);
    match text.split_once('-') {
        Some((days, rest)) => number(days) && clock(rest),
        None => clock(text),
    }
}

/// `[B:]USR1[@SECONDS]`: what the launcher drains on.
pub(super) fn signal(given: &Located<String>, start: StartMode, findings: &mut Findings) {
    const EXPECTED: &str = "[B:]USR1@SECONDS or TERM@SECONDS, with up to 65535 seconds";
    let (name, seconds) = match given.value.split_once('@') {
        Some((name, seconds)) => (name, Some(seconds)),
        None => (given.value.as_str(), None),
    };
    let (to_batch, name) = match name.strip_prefix("B:") {
        Some(name) => (true, name),
        None => (false, name),
    };
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let term = matches!(name, "TERM" | "15");
    let known = term || matches!(name, "USR1" | "10");
    if !known || seconds.is_some_and(|text| text.parse::<u16>().is_err()) {
        wrong(
            given,
            EXPECTED,
            Some("the deployment drains on these signals only"),
            findings,
        );
    } else if term && to_batch && start != StartMode::Steps {
        let what = format!(
            "{} reaches srun, which ends its tasks at once on TERM instead of letting them drain",
            quoted(&given.value)
        );
        let hint = "use \"B:USR1@60\", which srun hands on".to_owned();
        let kind = ConfigErrorKind::Conflict { what };
        findings.error(given.place, &given.path, kind, Some(hint));
    }
}

/// A word that becomes part of a script line.
pub(super) fn one_line(given: &Located<String>, findings: &mut Findings) {
    if given.value.chars().any(char::is_control) {
        wrong(given, "text without line breaks", None, findings);
    }
}

/// An absolute path.
pub(super) fn absolute(given: &Located<String>, findings: &mut Findings) {
    if !is_absolute(&given.value) {
        wrong(
            given,
            "an absolute path, without line breaks",
            None,
            findings,
        );
    }
}

fn is_absolute(path: &str) -> bool {
    path.starts_with('/') && !path.chars().any(char::is_control)
}

type Words = Located<Vec<(String, Node)>>;

/// Free-form options: words, of which the first is an option, and none decides what the plan decides.
pub(super) fn arguments(
    given: Option<&Words>,
    planned: &[(&str, &str)],
    findings: &mut Findings,
) -> Vec<String> {
    let Some(given) = given else {
        return Vec::new();
    };
    for (index, (word, node)) in given.value.iter().enumerate() {
        let at = Located {
            value: word.clone(),
            place: node.place,
            path: format!("{}[{index}]", given.path),
        };
        one_line(&at, findings);
        let is_option = word.starts_with('-');
        let follows_option = index > 0 && given.value[index - 1].0.starts_with('-');
        if !is_option && !follows_option {
            let hint = "one word an entry: [\"--constraint\", \"h100\"] or [\"--constraint=h100\"]";
            wrong(
                &at,
                "an option, which starts with a dash",
                Some(hint),
                findings,
            );
        }
        if let Some((long, _)) = planned.iter().find(|option| is_same(word, **option)) {
            let kind = ConfigErrorKind::Conflict {
                what: format!("{} is decided by the plan", quoted(word)),
            };
            let hint = format!("remove it; {}", instead_of(long));
            findings.error(at.place, &at.path, kind, Some(hint));
        }
    }
    given.value.iter().map(|(word, _)| word.clone()).collect()
}

fn is_same(word: &str, (long, short): (&str, &str)) -> bool {
    let name = word.split('=').next().unwrap_or(word);
    let grouped = !short.is_empty() && word.starts_with(short) && !word.starts_with("--");
    name == long || grouped
}

fn instead_of(option: &str) -> &'static str {
    match option {
        "--nodes" | "--ntasks" | "--ntasks-per-node" => {
            "`gpus_per_node`, `instances` and the parallel sizes give the numbers"
        }
        "--mpi" => "the layout's own key `mpi` gives it",
        "--nodelist" | "--distribution" | "--multi-prog" => {
            "the ranks' places follow from the layout"
        }
        _ => "a deployment is one plain job",
    }
}

/// `HOST:CONTAINER[:FLAGS]` each.
pub(super) fn mounts(given: &Words, findings: &mut Findings) -> Vec<Mount> {
    let mut mounts: Vec<Mount> = Vec::new();
    for (index, (text, node)) in given.value.iter().enumerate() {
        let at = Located {
            value: text.clone(),
            place: node.place,
            path: format!("{}[{index}]", given.path),
        };
        let Some(mount) = mount(text) else {
            let expected =
                "HOST:CONTAINER or HOST:CONTAINER:FLAGS, both paths absolute and without comma";
            wrong(&at, expected, None, findings);
            continue;
        };
        if let Some(first) = mounts.iter().find(|one| one.container == mount.container) {
            let what = format!(
                "{} is mounted twice, first from {}",
                mount.container, first.host
            );
            findings.conflict(at.place, &at.path, what);
        }
        mounts.push(mount);
    }
    mounts
}

fn mount(text: &str) -> Option<Mount> {
    let mut parts = text.splitn(3, ':');
    let (host, container) = (parts.next()?, parts.next().unwrap_or(""));
    // A single path is mounted at the same place.
    let container = if container.is_empty() {
        host
    } else {
        container
    };
    let flags = parts.next().unwrap_or("");
    let good = is_absolute(host) && is_absolute(container) && !text.contains(',');
    let flags_good = flags
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "+-_".contains(c));
    (good && flags_good).then(|| Mount {
        host: host.to_owned(),
        container: container.to_owned(),
        flags: flags.to_owned(),
    })
}

/// Names that a process can have in its environment.
pub(crate) fn environment<'a>(
    names: impl Iterator<Item = &'a String>,
    given: &Located<()>,
    findings: &mut Findings,
) {
    for name in names {
        let letter = |c: char| c.is_ascii_alphabetic() || c == '_';
        let good =
            name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit());
        if !good {
            let kind = ConfigErrorKind::WrongValue {
                found: quoted(name),
                expected: "the name of a variable: letters, digits and `_`".to_owned(),
            };
            findings.error(given.place, &given.path, kind, None);
        }
    }
}

/// Values that exclude each other.
pub(super) fn together(
    job: &JobLayout,
    raw: &RawLayout,
    proxy_port: Option<&Located<u16>>,
    findings: &mut Findings,
) {
    if let (Fabric::Mpi, Some(mpi)) = (job.fabric, &raw.mpi)
        && mpi.value == "none"
    {
        let what =
            "is none, but `fabric: mpi` needs what srun offers MPI; `srun --mpi=list` shows it";
        findings.conflict(mpi.place, &mpi.path, what.to_owned());
    }
    let inside = |range: PortRange| (range.first..=range.last).contains(&job.proxy_port);
    if let (Some(range), Some(given)) = (job.ports.filter(|range| inside(*range)), &raw.ports) {
        let at = proxy_port.map_or((given.place, given.path.as_str()), |port| {
            (port.place, port.path.as_str())
        });
        let what = format!(
            "the proxy's port {} is one of the instances' ports {}-{}",
            job.proxy_port, range.first, range.last
        );
        findings.conflict(at.0, at.1, what);
    }
}

/// The store that the workers of this job register in, if the start mode and the proxy's port allow one.
pub(super) fn discovery(
    job: &JobLayout,
    uri: &Located<String>,
    findings: &mut Findings,
) -> Option<ClusterConfig> {
    if job.start != StartMode::Jobs {
        let what = format!(
            "is for `start: jobs`; with `start: {}` the processes find each other inside the job",
            job.start.name()
        );
        findings.conflict(uri.place, &uri.path, what);
        return None;
    }
    let store = cluster::store_of(uri, findings)?;
    if store.port != job.proxy_port {
        let what = format!(
            "the store is in the proxy, which binds port {}, not {}",
            job.proxy_port, store.port
        );
        findings.conflict(uri.place, &uri.path, what);
    }
    Some(ClusterConfig {
        store,
        name: job.slurm.job_name.clone(),
        context_servers_min: 1,
        generation_servers_min: 1,
        heartbeat_interval: Duration::from_secs(5),
        inactive_timeout: Duration::from_secs(10),
    })
}
