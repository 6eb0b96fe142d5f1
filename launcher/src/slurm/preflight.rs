//! What can be known of a model before a job is submitted: whether it is there, whether its heads and layers can be
//! divided as the layout wants, and whether both roles would write the same KV.

use std::path::{Path, PathBuf};

use baton_configs::layout::Layout;
use baton_configs::layout::inspect::{Fault, Inspection};
use baton_configs::llm::LlmOptions;
use baton_engine::model::load::kv_dtype;
use baton_slurm::plan::Role;

use super::model::{self, ModelFacts};

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// What keeps the deployment from serving.
    pub(super) faults: Vec<Fault>,
    /// What could not be looked at.
    pub(super) notes: Vec<String>,
}

/// Looks at both roles' models, unless that was declined.
pub(super) fn check(layout: &Layout, inspection: &Inspection, look_at_model: bool) -> Findings {
    let mut findings = Findings::default();
    let mut seen: Vec<(String, Option<ModelFacts>)> = Vec::new();
    let mut facts = [None, None];
    for (role, facts) in [Role::Context, Role::Generation]
        .into_iter()
        .zip(&mut facts)
    {
        let options = &role.of(layout).options;
        let Some(spec) = options.model.clone().filter(|_| look_at_model) else {
            continue;
        };
        let known = seen.iter().find(|(model, _)| *model == spec).cloned();
        let (_, found) = known.unwrap_or_else(|| {
            let key = model_key(role, inspection);
            let found = facts_of(&spec, &key, layout, &mut findings);
            seen.push((spec.clone(), found.clone()));
            (spec.clone(), found)
        });
        if let Some(shape) = &found {
            divide(role, options, shape, &mut findings);
        }
        *facts = found;
    }
    if let [Some(context), Some(generation)] = &facts {
        same_shape(context, generation, inspection, &mut findings);
    }
    same_dtype(layout, inspection, &mut findings);
    dedup(&mut findings.faults, inspection);
    findings
}

/// Two roles that take a value from one key have one mistake.
fn dedup(faults: &mut Vec<Fault>, inspection: &Inspection) {
    let mut said: Vec<(Option<String>, String)> = Vec::new();
    faults.retain(|fault| {
        let origin = inspection
            .origin_of(&fault.key)
            .map(|origin| origin.to_string());
        let line = (origin.clone(), fault.what.clone());
        let fresh = origin.is_none() || !said.contains(&line);
        said.push(line);
        fresh
    });
}

fn model_key(role: Role, inspection: &Inspection) -> String {
    let own = format!("{}.engine.model", role.section());
    if inspection.origin_of(&own).is_some() {
        own
    } else {
        "model".to_owned()
    }
}

/// The model's shape, if its files are on this machine.
fn facts_of(spec: &str, key: &str, layout: &Layout, findings: &mut Findings) -> Option<ModelFacts> {
    let container = layout.job.as_ref().and_then(|job| job.container.as_ref());
    let path = match container {
        Some(container) if spec.starts_with('/') => {
            let Some(outside) = container.outside(spec) else {
                findings.notes.push(format!(
                    "model {spec} is in no mount of the container, so it was not looked at: the image must hold it"
                ));
                return None;
            };
            PathBuf::from(outside)
        }
        _ => PathBuf::from(spec),
    };
    if !path.exists() {
        if is_hub_id(spec) {
            findings.notes.push(format!(
                "model {spec} is the id of a model in a hub cache, so it was not looked at: the nodes must have it"
            ));
        } else {
            findings.faults.push(Fault::new(
                key,
                format!("{} does not exist", path.display()),
                "name a GGUF file or a directory that the nodes see; --skip-model-check if only they do",
            ));
        }
        return None;
    }
    match model::read(&path) {
        Ok(facts) => Some(facts),
        Err(error) => {
            let hint = "name a GGUF file, or a directory with config.json";
            findings
                .faults
                .push(Fault::new(key, error.to_string(), hint));
            None
        }
    }
}

/// `org/name`: no path that anybody would write.
fn is_hub_id(spec: &str) -> bool {
    let plain = !spec.starts_with(['/', '.', '~']) && spec.matches('/').count() == 1;
    plain
        && Path::new(spec)
            .extension()
            .is_none_or(|ending| ending != "gguf")
}

/// Whether heads and layers can be dealt out to the ranks of an instance.
fn divide(role: Role, options: &LlmOptions, shape: &ModelFacts, findings: &mut Findings) {
    let tensor = u64::from(options.tensor_parallel_size);
    let pipeline = u64::from(options.pipeline_parallel_size);
    let key = |name: &str| format!("{}.engine.{name}", role.section());
    if !divides(tensor, shape) {
        let possible: Vec<String> = (1..=shape.heads)
            .filter(|size| divides(*size, shape))
            .map(|size| size.to_string())
            .collect();
        let what = format!(
            "{tensor} ranks cannot share {} heads and {} KV heads evenly",
            shape.heads, shape.kv_heads
        );
        let hint = format!("possible: {}", possible.join(", "));
        findings
            .faults
            .push(Fault::new(&key("tensor_parallel_size"), what, hint));
    }
    if pipeline > shape.layers {
        let what = format!("{pipeline} stages for {} layers", shape.layers);
        findings.faults.push(Fault::new(
            &key("pipeline_parallel_size"),
            what,
            "each stage needs a layer at least",
        ));
    }
}

/// Heads are dealt out; KV heads are dealt out, or each has a whole number of ranks.
fn divides(tensor: u64, shape: &ModelFacts) -> bool {
    let kv = shape.kv_heads;
    shape.heads.is_multiple_of(tensor) && (kv.is_multiple_of(tensor) || tensor.is_multiple_of(kv))
}

/// KV that one model writes is of no use to one of another shape.
fn same_shape(
    context: &ModelFacts,
    generation: &ModelFacts,
    inspection: &Inspection,
    findings: &mut Findings,
) {
    let shape = |facts: &ModelFacts| (facts.layers, facts.kv_heads, facts.head_size);
    if shape(context) == shape(generation) {
        return;
    }
    let text = |facts: &ModelFacts| {
        let size = facts
            .head_size
            .map_or("unknown".to_owned(), |size| size.to_string());
        format!(
            "{} layers, {} KV heads of size {size}",
            facts.layers, facts.kv_heads
        )
    };
    let what = format!(
        "has {}, but the context instances' model has {}: no KV could be handed over",
        text(generation),
        text(context)
    );
    findings.faults.push(Fault::new(
        &model_key(Role::Generation, inspection),
        what,
        "both roles need the same model, though not the same precision of weights",
    ));
}

fn same_dtype(layout: &Layout, inspection: &Inspection, findings: &mut Findings) {
    let context = kv_dtype(&layout.context.options);
    let generation = kv_dtype(&layout.generation.options);
    if context == generation {
        return;
    }
    let candidates = [
        "generation.engine.kv_cache_config.dtype",
        "generation.engine.dtype",
        "context.engine.kv_cache_config.dtype",
        "context.engine.dtype",
    ];
    let written = candidates
        .iter()
        .find(|key| inspection.origin_of(key).is_some())
        .unwrap_or(&candidates[0]);
    let what = format!(
        "KV would be {} on the context instances and {} on the generation instances: none could be handed over",
        context.name(),
        generation.name()
    );
    findings.faults.push(Fault::new(
        written,
        what,
        "give both roles the same `kv_cache_config.dtype`",
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(heads: u64, kv_heads: u64) -> ModelFacts {
        ModelFacts {
            heads,
            kv_heads,
            head_size: Some(64),
            layers: 30,
        }
    }

    #[test]
    fn heads_are_shared_evenly_or_not_at_all() {
        let possible = |shape: &ModelFacts| -> Vec<u64> {
            (1..=shape.heads)
                .filter(|size| divides(*size, shape))
                .collect()
        };
        assert_eq!(possible(&shape(9, 3)), [1, 3, 9]);
        assert_eq!(possible(&shape(8, 4)), [1, 2, 4, 8]);
        // Two ranks share each of three KV heads, or one has them all; two ranks cannot.
        assert_eq!(possible(&shape(6, 3)), [1, 3, 6]);
    }

    #[test]
    fn hub_ids_are_not_paths() {
        assert!(is_hub_id("TinyLlama/TinyLlama-1.1B-Chat-v1.0"));
        for path in ["/a/b", "./a", "m", "a/b/c", "dir/m.gguf"] {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
