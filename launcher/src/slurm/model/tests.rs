//! Tests of the header readers.

use std::io::Cursor;

use super::*;

fn golden(family: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/golden/{family}"))
}

#[test]
fn a_directory_says_its_shape() {
    let facts = read(&golden("tiny-llama")).unwrap();
    assert_eq!((facts.heads, facts.kv_heads, facts.layers), (8, 4, 8));
    let error = read(&golden("")).unwrap_err().to_string();
    assert!(error.contains("neither a config.json"), "{error}");
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

/// A header with these entries, each key with the bytes of type and value.
fn header(entries: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3_u32.to_le_bytes());
    out.extend(0_u64.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    for (key, value) in entries {
        text(&mut out, key);
        out.extend(value);
    }
    out
}

fn whole(number: u32) -> Vec<u8> {
    [4_u32.to_le_bytes(), number.to_le_bytes()].concat()
}

fn words(list: &[&str]) -> Vec<u8> {
    let mut out = [ARRAY.to_le_bytes(), STRING.to_le_bytes()].concat();
    out.extend((list.len() as u64).to_le_bytes());
    list.iter().for_each(|word| text(&mut out, word));
    out
}

fn facts(bytes: Vec<u8>) -> Result<ModelFacts, ModelReadError> {
    Header {
        input: BufReader::new(Cursor::new(bytes)),
        file: PathBuf::from("m.gguf"),
        left: HEADER_BYTES_MAX,
    }
    .facts()
}

#[test]
fn a_gguf_header_says_its_shape() {
    let mut list = [ARRAY.to_le_bytes(), 5_i32.to_le_bytes()].concat();
    list.extend(2_u64.to_le_bytes());
    list.extend([3_i32.to_le_bytes(), 3_i32.to_le_bytes()].concat());
    let bytes = header(&[
        ("general.tags", words(&["a", "bcd"])),
        ("llama.attention.head_count", whole(9)),
        ("llama.attention.head_count_kv", list),
        ("llama.block_count", whole(30)),
        ("tokenizer.ggml.tokens", words(&["x"; 100])),
    ]);
    let found = facts(bytes).unwrap();
    assert_eq!((found.heads, found.kv_heads, found.layers), (9, 3, 30));
}

#[test]
fn damaged_headers_end_in_an_error() {
    let good = header(&[
        ("llama.attention.head_count", whole(9)),
        ("llama.block_count", whole(30)),
    ]);
    for end in 0..good.len() {
        assert!(facts(good[..end].to_vec()).is_err(), "cut at {end}");
    }
    let mut long = good.clone();
    long[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(facts(long).unwrap_err().to_string().contains("a key of"));
    let unknown = header(&[("a", 77_u32.to_le_bytes().to_vec())]);
    assert!(
        facts(unknown)
            .unwrap_err()
            .to_string()
            .contains("unknown type 77")
    );
    let deep = header(&[("a", [ARRAY.to_le_bytes(), ARRAY.to_le_bytes()].concat())]);
    assert!(facts(deep).is_err());
}
