//! Lists as Slurm writes them, lists that are wrong, and the round trip.

use proptest::prelude::*;

use super::*;

#[track_caller]
fn expands(list: &str, hosts: &[&str]) {
    assert_eq!(expand(list).expect("a host list"), hosts, "{list}");
}

#[test]
fn hosts_of_a_list() {
    expands("login1", &["login1"]);
    expands("a,b.example.org,a", &["a", "b.example.org", "a"]);
    expands("n[1-3]", &["n1", "n2", "n3"]);
    expands("n[08-10,7]", &["n08", "n09", "n10", "n7"]);
    expands("n[9-11]", &["n9", "n10", "n11"]);
    expands("n[001,003-004]x,m2", &["n001x", "n003x", "n004x", "m2"]);
    expands("[1-2]", &["1", "2"]);
    expands(
        "rack[0-1]n[01-02,7]-ib0",
        &[
            "rack0n01-ib0",
            "rack0n02-ib0",
            "rack0n7-ib0",
            "rack1n01-ib0",
            "rack1n02-ib0",
            "rack1n7-ib0",
        ],
    );
    assert_eq!(
        expand("rack[0-1]n[01-03,7]-ib[0-1]")
            .expect("a host list")
            .len(),
        16
    );
    assert_eq!(
        expand("n[0-65535]").expect("as many as allowed").len(),
        ENTRIES_MAX
    );
}

#[track_caller]
fn refused(list: &str, kind: ListErrorKind, position: usize) {
    let error = expand(list).expect_err("not a host list");
    assert_eq!(
        (error.kind, error.position),
        (kind, position),
        "{list}: {error}"
    );
}

#[test]
fn wrong_lists_say_where() {
    use ListErrorKind::*;
    refused("", Empty, 0);
    refused("a,,b", Empty, 2);
    refused("a,", Empty, 2);
    refused("n[]", Empty, 2);
    refused("n[1,]", Empty, 4);
    refused("n[1-]", Empty, 4);
    refused("n[1-3", Unclosed, 1);
    refused("ab[", Unclosed, 2);
    refused("n[1-", Unclosed, 1);
    refused("n1-3]", Unopened, 4);
    refused("n[1[2]]", Nested, 3);
    refused("n[[1]]", Nested, 2);
    refused("n[a-b]", NotANumber, 2);
    refused("n[1-2-3]", NotANumber, 5);
    refused("n[5,3-1]", Backwards, 4);
    refused("n 1", Character, 1);
    refused("nö", Character, 1);
    refused("n[1234567890123456789]", LongNumber, 2);
    refused("a,n[0-65535]", TooMany, 2);
    refused("n[0-999999999999999999][0-999999999999999999]", TooMany, 0);
    refused("n[0-999999999999999999,0-999999999999999999]", TooMany, 0);
    refused(&"x".repeat(256), LongName, 0);
    refused(&"[1]".repeat(400), LongName, 768);
}

#[test]
fn errors_read_well() {
    let error = expand("rack[0-1]n[01-03").expect_err("unclosed");
    assert_eq!(
        error.to_string(),
        "`[` without `]` at position 10 of `rack[0-1]n[01-03`"
    );
    let long = format!("{}\n{}", "a".repeat(100), "b".repeat(100));
    let error = expand(&long).expect_err("a line break").to_string();
    assert_eq!(
        error.len(),
        "character that no host name has at position 100 of `".len() + 32 + 2 + 31 + 1 + 6
    );
    assert!(!error.contains('\n'), "{error}");
}

#[track_caller]
fn compresses(hosts: &[&str], list: &str) {
    assert_eq!(compress(hosts).expect("hosts"), list);
    expands(list, hosts);
}

#[test]
fn lists_of_hosts() {
    compresses(&["login1"], "login1");
    compresses(&["n1", "n2", "n3", "n7"], "n[1-3,7]");
    compresses(&["n08", "n09", "n10", "n011"], "n[08-10,011]");
    compresses(&["n9", "n10", "n11"], "n[9-11]");
    compresses(&["n3", "n1", "n1"], "n[3,1,1]");
    compresses(&["a1", "b1", "b2"], "a1,b[1-2]");
    compresses(
        &["r0n1", "r0n2", "r1n1", "r1n2", "r2n1"],
        "r[0-1]n[1-2],r2n1",
    );
    // As Slurm reads them: nothing after the last bracket, and two brackets at most.
    compresses(&["r0-ib0", "r1-ib0"], "r[0-1]-ib[0]");
    compresses(&["n1-ib", "n2-ib"], "n1-ib,n2-ib");
    compresses(
        &["r0n0g0", "r0n0g1", "r0n1g0", "r0n1g1", "r1n0g0"],
        "r0n[0-1]g[0-1],r1n0g0",
    );
    compresses(&["r0n1g0", "r1n1g0"], "r[0-1]n1g[0]");
    compresses(
        &["x1234567890123456789", "x1234567890123456790"],
        "x1234567890123456789,x1234567890123456790",
    );
}

#[test]
fn names_that_are_none_are_refused() {
    let none: [&str; 0] = [];
    assert_eq!(
        compress(&none).expect_err("nothing").kind,
        ListErrorKind::Empty
    );
    let error = compress(&["a", "b[1]"]).expect_err("brackets");
    assert_eq!((error.kind, error.position), (ListErrorKind::Character, 1));
    assert_eq!(
        compress(&[""]).expect_err("empty").kind,
        ListErrorKind::Empty
    );
    assert_eq!(
        compress(&["x".repeat(256)]).expect_err("long").kind,
        ListErrorKind::LongName
    );
    assert_eq!(
        compress(&vec!["a"; ENTRIES_MAX + 1])
            .expect_err("many")
            .kind,
        ListErrorKind::TooMany
    );
}

#[test]
fn many_hosts_compress_fast() {
    let hosts = expand("rack[000-255]n[000-255]").expect("65,536 hosts");
    assert_eq!(compress(&hosts).expect("hosts"), "rack[000-255]n[000-255]");
}

#[test]
fn counts() {
    assert_eq!(expand_counts("4(x2),3"), Ok(vec![4, 4, 3]));
    assert_eq!(expand_counts("8"), Ok(vec![8]));
    assert_eq!(compress_counts(&[4, 4, 3, 4]), "4(x2),3,4");
    for (text, kind, position) in [
        ("", ListErrorKind::Empty, 0),
        ("4,", ListErrorKind::Empty, 2),
        ("(x2)", ListErrorKind::Empty, 0),
        ("4(x2", ListErrorKind::NotANumber, 1),
        ("3,4(x)", ListErrorKind::Empty, 5),
        ("3,4(x0)", ListErrorKind::Empty, 2),
        ("4x2", ListErrorKind::NotANumber, 0),
        ("-1", ListErrorKind::NotANumber, 0),
        ("4(x65537)", ListErrorKind::TooMany, 0),
        ("1(x65536),1", ListErrorKind::TooMany, 10),
        ("4294967296", ListErrorKind::LongNumber, 0),
        ("1(x99999999999999999999)", ListErrorKind::LongNumber, 3),
    ] {
        let error = expand_counts(text).expect_err("not a list of counts");
        assert_eq!(
            (error.kind, error.position),
            (kind, position),
            "{text}: {error}"
        );
    }
}

/// Names that look alike, so that much can be merged.
fn any_host() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ab]{0,1}[0-9]{1,3}",
        "r[0-2]n(0|1|2|01|02|10)",
        "[a-z0-9._-]{1,12}",
        "n0{0,2}[0-9]{17,20}",
    ]
}

proptest! {
    #[test]
    fn compressing_loses_nothing(hosts in prop::collection::vec(any_host(), 1..40)) {
        let list = compress(&hosts).expect("hosts");
        prop_assert_eq!(expand(&list).expect("what was compressed expands"), hosts);
    }

    #[test]
    fn sorted_hosts_lose_nothing(mut hosts in prop::collection::vec(any_host(), 1..40)) {
        hosts.sort();
        let list = compress(&hosts).expect("hosts");
        prop_assert_eq!(expand(&list).expect("what was compressed expands"), hosts);
    }

    #[test]
    fn no_text_panics(text in "[ab0-9,\\[\\]()x é-]{0,24}") {
        if let Ok(hosts) = expand(&text) {
            prop_assert!(!hosts.is_empty() && hosts.len() <= ENTRIES_MAX);
            let list = compress(&hosts).expect("expanded names are names");
            prop_assert_eq!(expand(&list), Ok(hosts));
        }
        let _ = expand_counts(&text);
    }

    #[test]
    fn counts_lose_nothing(counts in prop::collection::vec(0..4_u32, 1..40)) {
        prop_assert_eq!(expand_counts(&compress_counts(&counts)), Ok(counts));
    }
}
