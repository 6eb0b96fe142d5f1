//! What `--dry-run` prints: the plan, the scripts, and every variable and mount with its source.

use std::collections::BTreeMap;

use baton_slurm::render::{RUN_FILE, Rendered};
use baton_slurm::srun::RunFile;

use super::prepare::Prepared;

/// The whole report.
pub(super) fn text(prepared: &Prepared) -> String {
    let mut out = String::from("plan:\n");
    indented(&mut out, &prepared.plan.summary());
    for note in &prepared.notes {
        out.push_str(&format!("  note: {note}\n"));
    }
    out.push_str(&format!("files of {}:\n", prepared.folder.display()));
    let mut names: Vec<&str> = prepared
        .rendered
        .files
        .iter()
        .map(|file| file.name.as_str())
        .collect();
    names.push("layout.yaml");
    names.sort_unstable();
    out.push_str(&format!("  {}\n", names.join(" ")));
    for (_, name) in &prepared.rendered.scripts {
        out.push_str(&format!("script {name}:\n"));
        indented(&mut out, file_text(&prepared.rendered, name));
    }
    out.push_str("environment:\n");
    rows(&mut out, &environment(prepared));
    out.push_str("mounts:\n");
    rows(&mut out, &mounts(prepared));
    out
}

fn indented(out: &mut String, text: &str) {
    for line in text.lines() {
        out.push_str(format!("  {line}").trim_end());
        out.push('\n');
    }
}

fn file_text<'a>(rendered: &'a Rendered, name: &str) -> &'a str {
    let file = rendered.files.iter().find(|file| file.name == name);
    file.map_or("", |file| file.text.as_str())
}

/// Columns: whose, what, from where.
fn rows(out: &mut String, rows: &[[String; 3]]) {
    if rows.is_empty() {
        out.push_str("  none\n");
    }
    let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let (first, second) = (width(0), width(1));
    for [whose, what, source] in rows {
        let line = format!("  {whose:first$}  {what:second$}  # {source}\n");
        out.push_str(&line);
    }
}

fn source(prepared: &Prepared, key: &str) -> String {
    prepared
        .inspection
        .origin_of(key)
        .map_or("the plan".to_owned(), |origin| origin.to_string())
}

fn environment(prepared: &Prepared) -> Vec<[String; 3]> {
    let layout = &prepared.layout;
    let whose: [(&str, &BTreeMap<String, String>); 3] = [
        ("context", &layout.context.environment),
        ("generation", &layout.generation.environment),
        ("proxy", &layout.proxy.environment),
    ];
    let mut found = Vec::new();
    for (role, variables) in whose {
        for (name, value) in variables {
            let from = source(prepared, &format!("{role}.environment.{name}"));
            found.push([role.to_owned(), format!("{name}={value}"), from]);
        }
    }
    let run = RunFile::parse(file_text(&prepared.rendered, RUN_FILE));
    for launch in run.iter().flat_map(|run| &run.launches) {
        if launch.own_gpus {
            let places = launch.places.iter().map(|place| {
                let gpus: Vec<String> = place.gpus.iter().map(ToString::to_string).collect();
                format!(
                    "CUDA_VISIBLE_DEVICES={} of node {}",
                    gpus.join(","),
                    place.node
                )
            });
            found.extend(places.map(|what| [launch.label.clone(), what, "the plan".to_owned()]));
        }
    }
    found
}

fn mounts(prepared: &Prepared) -> Vec<[String; 3]> {
    let job = prepared.layout.job.as_ref();
    let container = job.and_then(|job| job.container.as_ref());
    let own = container
        .into_iter()
        .flat_map(|container| &container.mounts);
    let mut found: Vec<[String; 3]> = own
        .enumerate()
        .map(|(index, mount)| {
            let from = source(prepared, &format!("container.mounts[{index}]"));
            ["all".to_owned(), mount.to_string(), from]
        })
        .collect();
    let added = prepared.rendered.added_mounts.iter();
    found.extend(added.map(|mount| {
        let why = "added: the processes read their files there".to_owned();
        ["all".to_owned(), mount.to_string(), why]
    }));
    found
}
