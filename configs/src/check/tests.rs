//! Tests of file checks: guessed kinds, golden reports, hostile text.

use proptest::prelude::*;

use super::*;
use crate::error::Place;
use crate::explain::explain_document;

const SAMPLES: [(&str, &str, Kind); 13] = [
    (
        "quickstart.yaml",
        include_str!("../../samples/quickstart.yaml"),
        Kind::Layout,
    ),
    (
        "ctx_config.yaml",
        include_str!("../../samples/ctx_config.yaml"),
        Kind::Llm,
    ),
    (
        "gen_config.yaml",
        include_str!("../../samples/gen_config.yaml"),
        Kind::Llm,
    ),
    (
        "context_config_nixl.yml",
        include_str!("../../samples/context_config_nixl.yml"),
        Kind::Llm,
    ),
    (
        "gen_config_nixl.yml",
        include_str!("../../samples/gen_config_nixl.yml"),
        Kind::Llm,
    ),
    (
        "disagg_config.yaml",
        include_str!("../../samples/disagg_config.yaml"),
        Kind::Disagg,
    ),
    (
        "disagg_config_mpi.yaml",
        include_str!("../../samples/disagg_config_mpi.yaml"),
        Kind::Disagg,
    ),
    (
        "disagg_config_cluster.yaml",
        include_str!("../../samples/disagg_config_cluster.yaml"),
        Kind::Disagg,
    ),
    (
        "metadata_config.yaml",
        include_str!("../../samples/metadata_config.yaml"),
        Kind::Metadata,
    ),
    (
        "benchmark_config.yaml",
        include_str!("../../samples/benchmark_config.yaml"),
        Kind::Benchmark,
    ),
    (
        "slurm_one_world.yaml",
        include_str!("../../samples/slurm_one_world.yaml"),
        Kind::Layout,
    ),
    (
        "slurm_steps.yaml",
        include_str!("../../samples/slurm_steps.yaml"),
        Kind::Layout,
    ),
    (
        "slurm_jobs.yaml",
        include_str!("../../samples/slurm_jobs.yaml"),
        Kind::Layout,
    ),
];

fn check(text: &str, kind: Option<Kind>) -> CheckReport {
    match Document::parse("f.yaml", text) {
        Ok(document) => check_document(&document, kind),
        Err(errors) => CheckReport {
            file: "f.yaml".to_owned(),
            kind,
            outcome: Err(errors),
        },
    }
}

#[test]
fn every_sample_file_is_checked_here() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/samples");
    let mut files: Vec<String> = std::fs::read_dir(directory)
        .expect("samples")
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    files.sort();
    let mut known = SAMPLES.map(|(name, _, _)| name.to_owned()).to_vec();
    known.sort();
    assert_eq!(files, known);
}

#[test]
fn samples_are_recognised_and_good() {
    for (name, text, kind) in SAMPLES {
        let report = check(text, None);
        assert_eq!(report.kind, Some(kind), "{name}");
        assert!(report.is_good(), "{name}: {report}");
        if !["quickstart.yaml", "benchmark_config.yaml"].contains(&name) {
            assert_eq!(report.outcome, Ok(Vec::new()), "{name}");
        }
    }
}

#[test]
fn kinds_are_guessed_from_keys() {
    for (text, kind) in [
        ("hostname: x\nport: 1\n", Kind::Disagg),
        (
            "hostname: x\nport: 1\nhealth_check_timeout: 1\n",
            Kind::Metadata,
        ),
        ("max_batch_size: 1\ncontext_servers: {}\n", Kind::Disagg),
        ("cache_transceiver_config: {backend: UCX}\n", Kind::Llm),
        ("model: m\ncontext: {instances: 1}\n", Kind::Layout),
        ("what: is this\n", Kind::Llm),
        (
            "return_perf_metrics: true\nperf_metrics_max_requests: 9\n",
            Kind::Llm,
        ),
        ("model: m\n", Kind::Layout),
        ("dtype: float32\n", Kind::Llm),
        ("model: m\nslurm: {nodes: 2}\n", Kind::Layout),
        ("slurm: {}\nhardware: {}\n", Kind::Benchmark),
    ] {
        let document = Document::parse("f.yaml", text).expect("valid YAML");
        assert_eq!(Kind::guess(&document), kind, "{text}");
    }
    assert_eq!("LAYOUT".parse(), Ok(Kind::Layout));
    assert!("slurm".parse::<Kind>().is_err());
}

#[test]
fn reports_read_well_and_as_json() {
    let good = check("max_batch_size: 2\ncuda_graph_config: {}\n", None);
    assert_eq!(
        good.to_string(),
        "f.yaml: accepted without effect, this engine does it by itself or has no such part: cuda_graph_config\n\
         f.yaml: good (llm)"
    );
    let bad = check("context_servers: {urls: [a:1]}\nportt: 1\nport: x\n", None);
    let json = bad.to_json();
    assert_eq!(json["errors"][0]["nearest"], "port");
    assert_eq!(json["errors"][0]["line"], 2);
    assert_eq!(json["errors"][1]["path"], "port");
    assert!(
        bad.to_string()
            .ends_with("f.yaml: 2 errors (checked as disagg)")
    );
    let no_urls = check("context_servers: {num_instances: 2}\n", None);
    assert_eq!(no_urls.outcome.expect("good").len(), 2);
}

#[test]
fn files_that_cannot_be_read_are_reported() {
    let directory = tempfile::tempdir().expect("a directory");
    let report = check_file(&directory.path().join("none.yaml"), None);
    assert!(!report.is_good());
    let path = directory.path().join("latin1.yaml");
    std::fs::write(&path, b"a: \xff\n").expect("written");
    assert!(
        check_file(&path, None)
            .to_string()
            .contains("byte 3 is not UTF-8 text")
    );
}

fn places_are_inside(errors: &ConfigErrors, text: &str) -> bool {
    // YAML ends lines at a lone carriage return too.
    let lines = u32::try_from(text.split(['\n', '\r']).count()).unwrap_or(u32::MAX);
    let inside = |place: Place| place.line >= 1 && place.line <= lines + 1 && place.column >= 1;
    errors
        .errors()
        .iter()
        .all(|error| error.place.is_none_or(inside))
}

/// Checks as every kind: an answer comes, explain agrees with it, and places are places of the text.
fn survives(text: &str) {
    for kind in Kind::ALL.map(Some).into_iter().chain([None]) {
        let report = check(text, kind);
        if let Err(errors) = &report.outcome {
            assert!(!errors.errors().is_empty());
            assert!(places_are_inside(errors, text), "{errors}\n{text}");
            let hints = errors
                .errors()
                .iter()
                .filter(|error| error.hint.is_some())
                .count();
            let shown = errors.to_string();
            assert_eq!(
                shown.lines().count(),
                errors.errors().len() + hints,
                "{shown:?}"
            );
            assert!(
                !shown.contains(|c: char| c.is_control() && c != '\n'),
                "{shown:?}"
            );
        }
        if let Ok(document) = Document::parse("f.yaml", text) {
            assert_eq!(explain_document(&document, kind).is_ok(), report.is_good());
            let _ = layout::resolve(&document, Some("m")).is_ok();
        }
    }
}

proptest! {
    #[test]
    fn any_text_gets_an_answer(text in ".{0,200}") {
        survives(&text);
    }

    #[test]
    fn any_yaml_like_text_gets_an_answer(text in "[a-z0-9:\\-\\[\\]{}&*<>!|'\"#,%@`~ \n]{0,120}") {
        survives(&text);
    }

    #[test]
    fn any_bytes_in_a_file_get_an_answer(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("f.yaml");
        std::fs::write(&path, &bytes).expect("written");
        let report = check_file(&path, None);
        prop_assert!(!report.to_string().is_empty());
    }

    #[test]
    fn any_change_of_a_sample_gets_an_answer(
        sample in 0..SAMPLES.len(),
        at in 0.0..1.0_f64,
        removed in 0_usize..12,
        inserted in "[ -~\n]{0,8}",
    ) {
        let characters: Vec<char> = SAMPLES[sample].1.chars().collect();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position inside a short text")]
        let start = (at * characters.len() as f64) as usize;
        let end = (start + removed).min(characters.len());
        let mut text: String = characters[..start].iter().collect();
        text.push_str(&inserted);
        text.extend(&characters[end..]);
        survives(&text);
    }
}
