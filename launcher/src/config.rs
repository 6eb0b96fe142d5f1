//! `baton config`: prints what the pure cores in `baton-configs` return.

use std::io::Write;

use anyhow::anyhow;
use baton_configs::check::{self, Kind};
use baton_configs::yaml::Document;
use baton_configs::{explain, schema};

use crate::cli::{ConfigCheckArgs, ConfigCommand, ConfigExplainArgs};
use crate::exit::{Outcome, WithOutcome};

/// Runs a `baton config` sub-command.
pub(crate) fn run(command: &ConfigCommand) -> anyhow::Result<Outcome> {
    match command {
        ConfigCommand::Check(args) => check_files(args),
        ConfigCommand::Explain(args) => explain_file(args),
        ConfigCommand::Schema { kind: None } => {
            print(&Kind::ALL.map(|kind| kind.name().to_owned()).join("\n"))?;
            Ok(Outcome::Success)
        }
        ConfigCommand::Schema { kind: Some(name) } => {
            print(&schema::schema_text(name.parse().outcome(Outcome::Usage)?))?;
            Ok(Outcome::Success)
        }
    }
}

fn kind(name: Option<&str>) -> anyhow::Result<Option<Kind>> {
    name.map(str::parse).transpose().outcome(Outcome::Usage)
}

fn print(text: &str) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{}", text.trim_end())
        .map_err(|error| anyhow!("cannot write to stdout: {error}"))
}

fn check_files(args: &ConfigCheckArgs) -> anyhow::Result<Outcome> {
    let kind = kind(args.kind.as_deref())?;
    let reports: Vec<_> = args
        .files
        .iter()
        .map(|path| check::check_file(path, kind))
        .collect();
    let good = reports.iter().all(check::CheckReport::is_good);
    if args.json {
        let list: Vec<_> = reports.iter().map(check::CheckReport::to_json).collect();
        print(&serde_json::to_string_pretty(&list)?)?;
    } else {
        for report in &reports {
            print(&report.to_string())?;
        }
    }
    Ok(if good {
        Outcome::Success
    } else {
        Outcome::Config
    })
}

fn explain_file(args: &ConfigExplainArgs) -> anyhow::Result<Outcome> {
    let kind = kind(args.kind.as_deref())?;
    if let Some(key) = &args.key {
        print(&explain::explain_key(key, kind).outcome(Outcome::Usage)?)?;
    }
    if let Some(path) = &args.file {
        let document = Document::read(path).outcome(Outcome::Config)?;
        let explanation = explain::explain_document(&document, kind).outcome(Outcome::Config)?;
        if args.json {
            print(&serde_json::to_string_pretty(&explanation.to_json())?)?;
        } else {
            print(&explanation.to_string())?;
            crate::files::warn(&explanation.warnings);
        }
    }
    Ok(Outcome::Success)
}
