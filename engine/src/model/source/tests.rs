//! Tests of what a MODEL argument means: files, directories, the hub cache.

use std::fs;
use std::path::{Path, PathBuf};

use baton_configs::llm::LoadFormat::{Auto, Dummy};
use tempfile::TempDir;

use super::*;

fn touch(path: impl AsRef<Path>) -> PathBuf {
    let path = path.as_ref().to_owned();
    fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
    fs::write(&path, "").expect("a file");
    path
}

/// A cache with `org/name` at two commits; `refs/main` and `refs/v1` name the first.
fn cache() -> (TempDir, HubCache) {
    let root = TempDir::new().expect("a directory");
    let repository = root.path().join("models--org--name");
    for commit in ["aaaa", "bbbb"] {
        touch(
            repository
                .join("snapshots")
                .join(commit)
                .join("config.json"),
        );
        touch(
            repository
                .join("snapshots")
                .join(commit)
                .join("model.safetensors"),
        );
    }
    for reference in ["main", "v1", "refs/pr/3"] {
        let path = touch(repository.join("refs").join(reference));
        fs::write(path, "aaaa\n").expect("a ref");
    }
    let roots = vec![root.path().join("elsewhere"), root.path().to_owned()];
    (root, HubCache { roots })
}

fn snapshot_of(source: &ModelSource) -> String {
    match &source.files {
        ModelFiles::HuggingFace(directory) => file_name(directory),
        ModelFiles::Gguf(path) => panic!("{} is no directory", path.display()),
    }
}

#[test]
fn hub_id_takes_main_or_the_revision() {
    let (_root, cache) = cache();
    let find = |revision| find("org/name", revision, Auto, &cache);
    let main = find(None).expect("main is there");
    assert_eq!(
        (main.name.as_str(), snapshot_of(&main)),
        ("org/name", "aaaa".to_owned())
    );
    for (revision, commit) in [("v1", "aaaa"), ("refs/pr/3", "aaaa"), ("bbbb", "bbbb")] {
        let found = find(Some(revision)).expect("the revision is there");
        assert_eq!(snapshot_of(&found), commit, "{revision}");
    }
    for outside in ["v2", "../..", "/etc", "refs/../../..", ""] {
        assert!(find(Some(outside)).is_err(), "{outside}");
    }
}

#[test]
fn hub_id_without_refs_takes_the_newest_snapshot() {
    let (root, cache) = cache();
    let repository = root.path().join("models--org--name");
    fs::remove_dir_all(repository.join("refs")).expect("refs were there");
    let older = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let aged = fs::File::open(repository.join("snapshots/aaaa")).expect("a directory");
    aged.set_modified(older).expect("it is ours");
    let found = find("org/name", None, Auto, &cache).expect("a snapshot is there");
    assert_eq!(snapshot_of(&found), "bbbb");
}

#[test]
fn missing_hub_id_lists_where_it_looked_and_how_to_get_it() {
    let (root, cache) = cache();
    let error = find("org/other", Some("v1"), Auto, &cache).expect_err("it is not there");
    let root = root.path().display();
    assert_eq!(
        error.to_string(),
        format!(
            "org/other: no such model on this machine; looked at org/other, \
             {root}/elsewhere/models--org--other/snapshots/v1, {root}/models--org--other/snapshots/v1\n\
             hint: fetch it with `hf download org/other --revision v1`, or give the path of its files"
        )
    );
}

#[test]
fn what_is_no_hub_id_is_a_path() {
    for spec in [
        "model.gguf",
        "dir/model.gguf",
        "./org/name",
        "/org/name",
        "a/b/c",
        "org/",
        "",
        "../name",
        "org/na me",
    ] {
        let cache = HubCache {
            roots: vec![PathBuf::from("/nowhere")],
        };
        let error = find(spec, None, Auto, &cache)
            .expect_err("it is not there")
            .to_string();
        assert!(
            error.contains("no such model") && !error.contains("/nowhere"),
            "{error}"
        );
    }
}

#[test]
fn cache_roots_follow_the_variables() {
    let roots = |set: &[(&str, &str)]| {
        HubCache::from_variables(|name| {
            let value = set.iter().find(|(key, _)| *key == name);
            value.map(|(_, value)| OsString::from(value))
        })
        .roots
    };
    assert_eq!(
        roots(&[
            ("HF_HUB_CACHE", "/a"),
            ("HF_HOME", "/b"),
            ("XDG_CACHE_HOME", "/c"),
            ("HOME", "/d")
        ]),
        [
            "/a",
            "/b/hub",
            "/c/huggingface/hub",
            "/d/.cache/huggingface/hub"
        ]
        .map(PathBuf::from)
    );
    assert_eq!(
        roots(&[("HF_HOME", "/d/.cache/huggingface"), ("HOME", "/d")]),
        [PathBuf::from("/d/.cache/huggingface/hub")]
    );
    assert!(roots(&[]).is_empty());
}

#[test]
fn directories_say_what_they_are() {
    let root = TempDir::new().expect("a directory");
    let at = |name: &str, files: &[&str]| {
        let directory = root.path().join(name);
        fs::create_dir_all(&directory).expect("a directory");
        for file in files {
            touch(directory.join(file));
        }
        directory
    };
    let find = |directory: &Path, format| {
        find(
            directory.to_str().expect("UTF-8"),
            None,
            format,
            &HubCache::default(),
        )
    };
    let gguf = at("one", &["m.Q4.gguf", "README.md"]);
    let source = find(&gguf, Auto).expect("one GGUF file");
    assert_eq!(source.files, ModelFiles::Gguf(gguf.join("m.Q4.gguf")));
    assert_eq!(source.name, "one");
    let source = find(&gguf.join("m.Q4.gguf"), Auto).expect("a file");
    assert_eq!(source.name, "m.Q4");
    let both = at("both", &["m.gguf", "config.json", "model.safetensors"]);
    assert_eq!(
        find(&both, Auto).expect("hf").files,
        ModelFiles::HuggingFace(both)
    );
    let bare = at("bare", &["config.json"]);
    assert_eq!(
        find(&bare, Dummy).expect("dummy").files,
        ModelFiles::HuggingFace(bare.clone())
    );
    for (directory, words) in [
        (
            at("two", &["a.gguf", "b.gguf"]),
            "holds 2 GGUF files: a.gguf, b.gguf\nhint: ",
        ),
        (
            at("none", &["README.md"]),
            "neither a .gguf file nor config.json",
        ),
        (
            at("torch", &["config.json", "pytorch_model.bin"]),
            "pickled weights",
        ),
        (
            at("half", &["model.safetensors"]),
            "safetensors but no config.json",
        ),
        (bare, "config.json but no *.safetensors"),
    ] {
        let error = find(&directory, Auto).expect_err("not a model").to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_path_has_no_revision() {
    let root = TempDir::new().expect("a directory");
    let file = touch(root.path().join("m.gguf"));
    let spec = file.to_str().expect("UTF-8");
    let error = find(spec, Some("v1"), Auto, &HubCache::default()).expect_err("no revision");
    assert!(
        error
            .to_string()
            .contains("a path has no revision, but `v1`"),
        "{error}"
    );
}
