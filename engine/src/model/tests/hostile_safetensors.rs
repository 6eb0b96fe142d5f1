//! safetensors files that are truncated, lie or are random: always an error in one line, found before anything is
//! loaded.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use tempfile::TempDir;

use super::{float32, golden_path, try_load};
use crate::model::error::ModelErrorKind;

fn safetensors_header_len(bytes: &[u8]) -> usize {
    let (length, _) = bytes.split_first_chunk::<8>().expect("a length");
    8 + usize::try_from(u64::from_le_bytes(*length)).expect("small")
}

fn directory_with(bytes: &[u8]) -> TempDir {
    let root = TempDir::new().expect("a directory");
    let config = golden_path("tiny-qwen3/config.json");
    fs::copy(config, root.path().join("config.json")).expect("a copy");
    fs::write(root.path().join("model.safetensors"), bytes).expect("it can be written");
    root
}

fn load_directory(root: &Path) -> Result<(), String> {
    match try_load(root.to_str().expect("UTF-8"), &float32()) {
        Ok(_) => Ok(()),
        Err(error) => {
            assert!(
                !matches!(error.kind, ModelErrorKind::Backend(_)),
                "found before loading"
            );
            let text = error.to_string();
            assert_eq!(text.lines().count(), 1, "{text}");
            Err(text)
        }
    }
}

fn safetensors_outcome(bytes: &[u8]) -> Result<(), String> {
    load_directory(directory_with(bytes).path())
}

/// The golden weights with another header text.
fn with_header(rewrite: impl Fn(String) -> String) -> Vec<u8> {
    let bytes = fs::read(golden_path("tiny-qwen3/model.safetensors")).expect("golden weights");
    let header = safetensors_header_len(&bytes);
    let text = String::from_utf8(bytes[8..header].to_vec()).expect("JSON is UTF-8");
    let text = rewrite(text);
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text.as_bytes());
    out.extend(&bytes[header..]);
    out
}

#[test]
fn lying_safetensors_headers_are_one_line() {
    assert_eq!(safetensors_outcome(&with_header(|text| text)), Ok(()));
    let table = r#""lm_head.weight":{"dtype":"BF16","shape":[288,128],"data_offsets":[0,73728]}"#;
    for (lie, words) in [
        (
            r#""lm_head.weight":{"dtype":"BF16","shape":[288,128],"data_offsets":[0,73730]}"#,
            "invalid",
        ),
        (
            r#""lm_head.weight":{"dtype":"BF16","shape":[288,128],"data_offsets":[64,73792]}"#,
            "invalid offset",
        ),
        (
            r#""lm_head.weight":{"dtype":"BF16","shape":[288,128],"data_offsets":[0,18446744073709551615]}"#,
            "invalid",
        ),
        (
            r#""lm_head.weight":{"dtype":"BF16","shape":[18446744073709551615,128],"data_offsets":[0,73728]}"#,
            "overflow",
        ),
        (
            r#""lm_head.weight":{"dtype":"BF16","shape":[128,288],"data_offsets":[0,73728]}"#,
            "has shape [128, 288], the configuration says [288, 128]",
        ),
        (
            r#""lm_head.weight":{"dtype":"I16","shape":[288,128],"data_offsets":[0,73728]}"#,
            "element type I16; served are F32, F16, BF16",
        ),
        (
            r#""lm_heat.weight":{"dtype":"BF16","shape":[288,128],"data_offsets":[0,73728]}"#,
            "tensor `lm_head.weight` is missing",
        ),
        ("nonsense", "header"),
    ] {
        let error = safetensors_outcome(&with_header(|text| {
            assert!(text.contains(table), "{text}");
            text.replace(table, lie)
        }));
        let error = error.expect_err(lie);
        assert!(error.contains(words), "{lie}: {error}");
    }
    let mut bytes = with_header(|text| text);
    for lie in [u64::MAX, 1 << 40, 1 << 24, 3] {
        bytes[..8].copy_from_slice(&u64::to_le_bytes(lie));
        let error = safetensors_outcome(&bytes).expect_err("a lie");
        assert!(
            error.contains("not a readable safetensors header"),
            "{error}"
        );
    }
}

#[test]
fn truncated_safetensors_names_tensor_and_bytes() {
    let bytes = fs::read(golden_path("tiny-qwen3/model.safetensors")).expect("golden weights");
    let header = safetensors_header_len(&bytes);
    let error = safetensors_outcome(&bytes[..header + 73_728 + 5]).expect_err("the table is cut");
    let offset = header + 73_728;
    let end = format!(
        "truncated: tensor `model.embed_tokens.weight` needs 73728 bytes at offset {offset}, 5 are there"
    );
    assert!(error.ends_with(&end), "{error}");
    for len in [0, 3, 8, header - 1] {
        safetensors_outcome(&bytes[..len]).expect_err("the header is cut");
    }
}

#[test]
fn an_index_must_name_files_that_are_there() {
    let bytes = fs::read(golden_path("tiny-qwen3/model.safetensors")).expect("golden weights");
    let root = directory_with(&bytes);
    let index = root.path().join("model.safetensors.index.json");
    for (file, words) in [
        (
            "model-00002-of-00002.safetensors",
            "which is not there: the download is incomplete",
        ),
        ("../../etc/passwd", "which is not a file name"),
        ("/etc/passwd", "which is not a file name"),
    ] {
        fs::write(
            &index,
            format!(r#"{{"weight_map": {{"lm_head.weight": "{file}"}}}}"#),
        )
        .expect("an index");
        let error = load_directory(root.path()).expect_err(file);
        assert!(error.contains(words), "{error}");
    }
    fs::write(&index, "[]").expect("an index");
    assert!(
        load_directory(root.path())
            .expect_err("no map")
            .contains("safetensors index")
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn random_safetensors_headers_never_panic(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 1_u8..), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = fs::read(golden_path("tiny-qwen3/model.safetensors")).expect("golden weights");
        let header = safetensors_header_len(&bytes);
        for (at, mask) in flips {
            bytes[at.index(header)] ^= mask;
        }
        bytes.truncate(cut.index(bytes.len()));
        safetensors_outcome(&bytes).expect_err("it is truncated");
    }
}
