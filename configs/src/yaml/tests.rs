//! Tests of the located tree: places, duplicates, bounds.

use super::*;

fn parse(text: &str) -> Document {
    Document::parse("doc.yaml", text).expect("valid")
}

fn failure(text: &str) -> String {
    Document::parse("doc.yaml", text)
        .expect_err("invalid")
        .to_string()
}

#[test]
fn places_are_those_of_keys_and_values() {
    let document = parse("a: 1\nb:\n  c: [x, 'y']\n");
    let b = document.root().entry("b").expect("b");
    assert_eq!(b.place, Some(Place { line: 2, column: 1 }));
    let c = b.node.entry("c").expect("c");
    assert_eq!(c.place, Some(Place { line: 3, column: 3 }));
    let Value::List(items) = &c.node.value else {
        panic!("not a list")
    };
    assert_eq!(
        items[1].place,
        Some(Place {
            line: 3,
            column: 10
        })
    );
}

#[test]
fn scalars_are_typed_as_users_write_them() {
    let document =
        parse("a: True\nb: yes\nc: '8001'\nd: 0.9\ne: ~\nf: 2048\ng: localhost:8001\nh: -3\n");
    let value = |key: &str| document.root().entry(key).expect("key").node.value.clone();
    assert_eq!(value("a"), Value::Bool(true));
    assert_eq!(value("b"), Value::Bool(true));
    assert_eq!(value("c"), Value::Text("8001".to_owned()));
    assert_eq!(value("d"), Value::Number(0.9));
    assert_eq!(value("e"), Value::Null);
    assert_eq!(value("f"), Value::Whole(2048));
    assert_eq!(value("g"), Value::Text("localhost:8001".to_owned()));
    assert_eq!(value("h"), Value::Whole(-3));
}

#[test]
fn duplicate_keys_are_all_found_and_the_first_kept() {
    let document = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n");
    let texts: Vec<String> = document.defects().iter().map(ToString::to_string).collect();
    assert_eq!(
        texts,
        [
            "doc.yaml:3:1: a: key stands twice, first on line 1",
            "doc.yaml:2:11: b.c: key stands twice, first on line 2",
        ]
    );
    assert_eq!(
        document.root().entry("a").expect("a").node.value,
        Value::Whole(1)
    );
}

#[test]
fn empty_documents_are_refused() {
    for text in ["", "\n\n", "# only a comment\n", "---\n", "~", "null\n"] {
        assert!(
            failure(text).starts_with("doc.yaml: document is empty"),
            "{text:?}: {}",
            failure(text)
        );
    }
}

#[test]
fn bad_yaml_has_a_line() {
    for text in [
        "a: [1, 2",
        "a: b: c\n",
        "? [a]\n: 1\n",
        "a:\n\tb: 1\n",
        "a: *nowhere",
        "a: 1\n---\nb: 2\n",
        "a: \"x\n",
    ] {
        let message = failure(text);
        assert!(message.starts_with("doc.yaml:"), "{text:?}: {message}");
        assert!(message.contains("not valid YAML"), "{text:?}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
}

#[test]
fn deep_large_and_entangled_documents_are_refused() {
    let deep = format!("{}{}", "[".repeat(100), "]".repeat(100));
    let deep_block: String = (0..100).map(|i| format!("{}a:\n", " ".repeat(i))).collect();
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..9 {
        let refs = vec![format!("*a{}", i - 1); 10].join(", ");
        bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
    }
    let many = "- 1\n".repeat(50_001);
    for text in [
        deep,
        deep_block,
        bomb,
        many,
        "x".repeat(DOCUMENT_BYTES_MAX + 1),
    ] {
        let message = failure(&text);
        assert!(message.contains("document refused"), "{message}");
    }
}

#[test]
fn aliases_and_merge_keys_work() {
    let document = parse("x: &x {p: 1}\ny: *x\nz: {<<: *x, q: 2}\n");
    let z = &document.root().entry("z").expect("z").node;
    assert_eq!(z.entry("p").expect("p").node.value, Value::Whole(1));
    assert!(
        document
            .root()
            .entry("y")
            .expect("y")
            .node
            .same_value(&document.root().entry("x").expect("x").node)
    );
}

#[test]
fn quoted_text_reads_back() {
    for text in [
        "",
        "plain",
        "a\"b\\c",
        "line\nbreak\ttab\r",
        "\u{0}\u{7}\u{85}\u{2028}\u{feff}",
        "é✓😀",
        " # x: [",
        "yes",
    ] {
        let document = parse(&format!("a: {}\n", quoted(text)));
        assert_eq!(
            document.root().entry("a").expect("a").node.value,
            Value::Text(text.to_owned())
        );
    }
}
