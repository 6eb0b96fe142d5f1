//! Which ranks of a world are which instance: contexts first, contiguous, in the config's order; the first rank of each
//! leads (COMPAT.md §4.4). Pure.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use baton_configs::disagg::{DisaggDocument, InstanceGroup};
use baton_configs::llm;

/// What an instance is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Context,
    Generation,
    /// Its address stands in both sections.
    Both,
}

impl Role {
    /// As `--server-role` takes it; a mixed server needs no label.
    pub(crate) const fn option(self) -> Option<&'static str> {
        match self {
            Self::Context => Some("CONTEXT"),
            Self::Generation => Some("GENERATION"),
            Self::Both => None,
        }
    }

    /// Whether it reads prompts.
    pub(crate) const fn reads(self) -> bool {
        matches!(self, Self::Context | Self::Both)
    }

    /// Whether it writes answers.
    pub(crate) const fn writes(self) -> bool {
        matches!(self, Self::Generation | Self::Both)
    }
}

/// One instance of a world.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Planned {
    /// `ctx0`, `gen1`.
    pub(crate) label: String,
    pub(crate) role: Role,
    /// Its ranks in the world.
    pub(crate) ranks: Range<u32>,
    pub(crate) tensor_parallel: u32,
    pub(crate) pipeline_parallel: u32,
    /// Model argument.
    pub(crate) model: String,
    /// Text of its options file.
    pub(crate) options: String,
    /// The port that the config names; 0 lets the kernel choose.
    pub(crate) port: u16,
}

/// What of a config a world runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Only(Vec<String>);

impl FromStr for Only {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let words: Vec<String> = text.split(',').map(|word| word.trim().to_owned()).collect();
        for word in &words {
            let stem = word.trim_end_matches(|c: char| c.is_ascii_digit());
            let known = match stem {
                "ctx" | "gen" => true,
                "proxy" => word == "proxy",
                _ => false,
            };
            if !known {
                return Err(format!(
                    "`{word}` is none of ctx, gen, proxy, ctx0, ctx1, …, gen0, …"
                ));
            }
        }
        Ok(Self(words))
    }
}

impl Only {
    fn instance(&self, label: &str) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|word| word == label || *word == label[..3])
    }

    /// Whether the proxy runs too.
    pub(crate) fn proxy(&self) -> bool {
        self.0.is_empty() || self.0.iter().any(|word| word == "proxy")
    }
}

/// Why a config and a world do not fit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PlanError {
    /// The sum of the ranks is another number.
    Size {
        world: u32,
        needed: u64,
        sum: String,
    },
    /// An instance has no model.
    NoModel { section: &'static str },
    /// `--only` names what the config does not have.
    Nothing { only: String },
}

impl fmt::Display for PlanError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Size { world, needed, sum } => write!(
                f,
                "the world has {world} ranks, but the config's instances have {needed}: {sum}\nhint: start exactly {needed} ranks: srun -n {needed}, or mpirun -n {needed}"
            ),
            Self::NoModel { section } => write!(
                f,
                "{section}: `model` is not given\nhint: name the model at the top level of the config, or in both sections"
            ),
            Self::Nothing { only } => write!(
                f,
                "--only {only} leaves nothing to run\nhint: the config's instances are numbered from 0: ctx0, gen0"
            ),
        }
    }
}

impl std::error::Error for PlanError {}

/// Splits a world of `size` ranks; without a size only the instances are worked out.
pub(crate) fn split(
    document: &DisaggDocument,
    only: &Only,
    size: Option<u32>,
) -> Result<Vec<Planned>, PlanError> {
    let mut instances = Vec::new();
    let mut next: u32 = 0;
    for candidate in candidates(document)? {
        if !only.instance(&candidate.label) {
            continue;
        }
        let ranks = u32::try_from(candidate.ranks()).unwrap_or(u32::MAX);
        let begin = next;
        next = begin.saturating_add(ranks);
        instances.push(Planned {
            ranks: begin..next,
            ..candidate.planned
        });
    }
    if instances.is_empty() && !only.proxy() {
        return Err(PlanError::Nothing {
            only: only.0.join(","),
        });
    }
    match size {
        Some(world) if world != next => Err(PlanError::Size {
            world,
            needed: u64::from(next),
            sum: sum(&instances),
        }),
        _ => Ok(instances),
    }
}

struct Candidate {
    label: String,
    planned: Planned,
}

impl Candidate {
    fn new(label: String, role: Role, model: &str, group: &InstanceGroup, index: usize) -> Self {
        let mut options = group.options.clone();
        options.transceiver.get_or_insert_default();
        let planned = Planned {
            label: label.clone(),
            role,
            ranks: 0..0,
            tensor_parallel: options.tensor_parallel_size,
            pipeline_parallel: options.pipeline_parallel_size,
            model: model.to_owned(),
            options: llm::to_yaml(&options),
            port: group
                .endpoints
                .get(index)
                .map_or(0, |endpoint| endpoint.port),
        };
        Self { label, planned }
    }

    fn ranks(&self) -> u64 {
        u64::from(self.planned.tensor_parallel) * u64::from(self.planned.pipeline_parallel)
    }
}

fn candidates(document: &DisaggDocument) -> Result<Vec<Candidate>, PlanError> {
    let model = |group: &InstanceGroup, section| {
        group
            .options
            .model
            .clone()
            .or_else(|| document.proxy.model.clone())
            .ok_or(PlanError::NoModel { section })
    };
    let (context, generation) = (&document.context, &document.generation);
    let mut found = Vec::new();
    for index in 0..context.num_instances as usize {
        let shared = context
            .endpoints
            .get(index)
            .filter(|endpoint| generation.endpoints.contains(endpoint));
        // The two sections' options are the same then: the config's reader holds that.
        let role = if shared.is_some() {
            Role::Both
        } else {
            Role::Context
        };
        let model = model(context, "context_servers")?;
        found.push(Candidate::new(
            format!("ctx{index}"),
            role,
            &model,
            context,
            index,
        ));
    }
    for index in 0..generation.num_instances as usize {
        let endpoint = generation.endpoints.get(index);
        if endpoint.is_some_and(|endpoint| context.endpoints.contains(endpoint)) {
            continue;
        }
        let model = model(generation, "generation_servers")?;
        let label = format!("gen{index}");
        found.push(Candidate::new(
            label,
            Role::Generation,
            &model,
            generation,
            index,
        ));
    }
    Ok(found)
}

/// `ctx0 2 (tp 2 × pp 1) + gen0 4 (tp 2 × pp 2)`.
fn sum(instances: &[Planned]) -> String {
    let terms: Vec<String> = instances
        .iter()
        .map(|instance| {
            format!(
                "{} {} (tp {} × pp {})",
                instance.label,
                instance.ranks.len(),
                instance.tensor_parallel,
                instance.pipeline_parallel
            )
        })
        .collect();
    terms.join(" + ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_configs::disagg;
    use baton_configs::yaml::Document;

    fn document(text: &str) -> DisaggDocument {
        let document = Document::parse("disagg_config.yaml", text).unwrap();
        disagg::resolve(&document, 0).unwrap().0
    }

    const WORLD: &str = "model: m\ncontext_servers:\n  num_instances: 2\n  tensor_parallel_size: 2\ngeneration_servers:\n  num_instances: 1\n  tensor_parallel_size: 2\n  pipeline_parallel_size: 2\n";

    fn labels(instances: &[Planned]) -> Vec<(&str, Range<u32>)> {
        instances
            .iter()
            .map(|instance| (instance.label.as_str(), instance.ranks.clone()))
            .collect()
    }

    #[test]
    fn contexts_come_first_and_blocks_are_contiguous() {
        let instances = split(&document(WORLD), &Only::default(), Some(8)).unwrap();
        assert_eq!(
            labels(&instances),
            [("ctx0", 0..2), ("ctx1", 2..4), ("gen0", 4..8)]
        );
        assert!(instances.iter().all(|instance| instance.model == "m"));
    }

    #[test]
    fn a_wrong_world_size_shows_the_sum() {
        let error = split(&document(WORLD), &Only::default(), Some(7)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("the world has 7 ranks, but the config's instances have 8: ctx0 2 (tp 2 × pp 1) + ctx1 2 (tp 2 × pp 1) + gen0 4 (tp 2 × pp 2)\nhint: start exactly 8 ranks"),
            "{text}"
        );
    }

    #[test]
    fn a_part_of_the_config_has_a_world_of_its_own() {
        let only: Only = "ctx1,gen".parse().unwrap();
        let instances = split(&document(WORLD), &only, Some(6)).unwrap();
        assert_eq!(labels(&instances), [("ctx1", 0..2), ("gen0", 2..6)]);
        assert!(!only.proxy());
        assert!("ctx,proxy".parse::<Only>().unwrap().proxy());
        assert!("worker".parse::<Only>().is_err());
        assert!("proxy1".parse::<Only>().is_err());
        let nothing = split(&document(WORLD), &"gen7".parse().unwrap(), None).unwrap_err();
        assert_eq!(
            nothing,
            PlanError::Nothing {
                only: "gen7".to_owned()
            }
        );
    }

    #[test]
    fn an_address_in_both_sections_is_one_mixed_server() {
        let text = "model: m\ncontext_servers: {num_instances: 2, urls: ['a:1', 'a:2']}\ngeneration_servers: {num_instances: 2, urls: ['a:2', 'a:3']}\n";
        let instances = split(&document(text), &Only::default(), Some(3)).unwrap();
        let roles: Vec<(&str, Role, u16)> = instances
            .iter()
            .map(|instance| (instance.label.as_str(), instance.role, instance.port))
            .collect();
        assert_eq!(
            roles,
            [
                ("ctx0", Role::Context, 1),
                ("ctx1", Role::Both, 2),
                ("gen1", Role::Generation, 3)
            ]
        );
    }
}
