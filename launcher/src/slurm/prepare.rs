//! From a layout file to a rendered run: everything that is wrong is found on the way and reported at once.

use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use baton_configs::layout::Layout;
use baton_configs::layout::inspect::{Inspection, inspect};
use baton_configs::yaml::Document;
use baton_slurm::plan::{Plan, PlanErrors, plan};
use baton_slurm::render::{Rendered, RunFolder, render};

use super::preflight;
use crate::cli::slurm::RenderArgs;
use crate::exit::{Outcome, WithOutcome};
use crate::files;

/// Keys whose mistakes would make a plan of the rest misleading.
const PLANNED_KEYS: &[&str] = &[
    "gpus_per_node",
    "instances",
    "num_ctx_servers",
    "num_gen_servers",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "tokens_per_block",
    "nodes",
    "ports",
    "start",
];
/// Keys whose mistakes would make a look at the model misleading.
const MODEL_KEYS: &[&str] = &[
    "model",
    "model_path",
    "dtype",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "mounts",
    "container_mount",
    "image",
    "container_image",
    "container",
];

/// A layout that can be submitted.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The layout.
    pub(super) layout: Layout,
    /// The layout's file, to be kept with the run.
    pub(super) text: String,
    /// Where each value was written.
    pub(super) inspection: Inspection,
    /// Its plan.
    pub(super) plan: Plan,
    /// Its files.
    pub(super) rendered: Rendered,
    /// Where they go.
    pub(super) folder: PathBuf,
    /// The folder of log files.
    pub(super) logs: PathBuf,
    /// What could not be looked at.
    pub(super) notes: Vec<String>,
}

/// Reads, checks, plans and renders.
pub(super) fn prepare(args: &RenderArgs) -> anyhow::Result<Prepared> {
    let text = std::fs::read_to_string(&args.config)
        .with_context(|| format!("cannot read {}", args.config.display()))
        .outcome(Outcome::Config)?;
    let document =
        Document::parse(&args.config.display().to_string(), &text).outcome(Outcome::Config)?;
    let inspection = inspect(&document, args.model.as_deref());
    let mut faults = Vec::new();
    let mut notes = Vec::new();
    let mut planned = None;
    if let Some(layout) = inspection.layout() {
        if !inspection.spoils(PLANNED_KEYS) {
            match plan(layout) {
                Ok(found) => planned = Some(found),
                Err(PlanErrors(found)) => faults.extend(found),
            }
        }
        if !inspection.spoils(MODEL_KEYS) {
            let found = preflight::check(layout, &inspection, !args.skip_model_check);
            faults.extend(found.faults);
            notes = found.notes;
        }
    }
    let (mut layout, warnings) = inspection.clone().finish(faults).outcome(Outcome::Config)?;
    files::warn(&warnings);
    make_absolute(&mut layout)?;
    let plan = planned.ok_or_else(|| anyhow!("a layout without mistakes has no plan"))?;
    let folder = folder(args)?;
    let shown = folder
        .to_str()
        .ok_or_else(|| anyhow!("the run folder {} is not UTF-8", folder.display()))
        .outcome(Outcome::Usage)?;
    let run_folder = RunFolder::new(shown, &layout);
    let rendered = render(&layout, &plan, &run_folder)
        .ok_or_else(|| anyhow!("a planned layout has no part for clusters"))?;
    Ok(Prepared {
        layout,
        text,
        inspection,
        plan,
        rendered,
        folder,
        logs: PathBuf::from(run_folder.logs),
        notes,
    })
}

/// Where the run's files go: what was asked for, else `NAME.run` here.
fn folder(args: &RenderArgs) -> anyhow::Result<PathBuf> {
    let chosen = args.output.clone().unwrap_or_else(|| {
        let stem = args.config.file_stem().unwrap_or_default();
        let mut name = stem.to_owned();
        name.push(".run");
        PathBuf::from(name)
    });
    std::path::absolute(&chosen)
        .with_context(|| format!("{} is no path", chosen.display()))
        .outcome(Outcome::Usage)
}

/// Paths of this machine mean the same from every directory. In a container other paths count.
fn make_absolute(layout: &mut Layout) -> anyhow::Result<()> {
    if let Some(job) = layout.job.as_mut().filter(|job| job.baton.contains('/')) {
        job.baton = std::path::absolute(&job.baton)?
            .to_string_lossy()
            .into_owned();
    }
    let inside = layout
        .job
        .as_ref()
        .is_some_and(|job| job.container.is_some());
    if inside {
        return Ok(());
    }
    let fix = |spec: &mut String| -> anyhow::Result<()> {
        let path = Path::new(spec.as_str());
        if path.is_relative() && path.exists() {
            *spec = std::path::absolute(path)?.to_string_lossy().into_owned();
        }
        Ok(())
    };
    fix(&mut layout.model)?;
    for role in [&mut layout.context, &mut layout.generation] {
        let paths = [&mut role.options.model, &mut role.options.tokenizer];
        paths.into_iter().flatten().try_for_each(fix)?;
    }
    Ok(())
}
