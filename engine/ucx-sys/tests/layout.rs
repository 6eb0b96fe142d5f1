//! Holds the structures and constants of this crate against UCX's headers, with a C program made from their own tables.
//!
//! Sizes may be smaller here: later versions append. Needs a C compiler and the package libucx-dev.

use std::fmt::Write;
use std::process::Command;

use baton_ucx_sys::{CONSTANTS, LAYOUTS};

/// A program that prints a line `name value` for all that is to be compared.
fn program() -> String {
    let mut text = String::from(
        "#include <stddef.h>\n#include <stdio.h>\n#include <ucp/api/ucp.h>\n#include <ucs/config/types.h>\n\
         #include <ucs/debug/log_def.h>\nint main(void) {\n",
    );
    for (name, _) in CONSTANTS {
        writeln!(
            text,
            "printf(\"{name} %llu\\n\", (unsigned long long){name});"
        )
        .expect("a string takes everything");
    }
    for layout in LAYOUTS {
        let name = layout.name;
        writeln!(text, "printf(\"{name} %zu\\n\", sizeof({name}));")
            .expect("a string takes everything");
        for (field, _) in layout.fields {
            writeln!(
                text,
                "printf(\"{name}.{field} %zu\\n\", offsetof({name}, {field}));"
            )
            .expect("a string takes everything");
        }
    }
    text.push_str("return 0; }\n");
    text
}

fn printed_by_c() -> Vec<(String, u64)> {
    let folder = tempfile::tempdir().expect("a folder");
    let (source, binary) = (folder.path().join("layout.c"), folder.path().join("layout"));
    std::fs::write(&source, program()).expect("a file is written");
    let compiled = Command::new("cc")
        .arg(&source)
        .arg("-o")
        .arg(&binary)
        .output();
    let compiled = compiled.expect("a C compiler is there: apt-get install build-essential");
    assert!(
        compiled.status.success(),
        "UCX's headers are there (apt-get install libucx-dev, or scripts/test --yes) and have what is named here:\n{}",
        String::from_utf8_lossy(&compiled.stderr)
    );
    let run = Command::new(&binary).output().expect("the program runs");
    let text = String::from_utf8(run.stdout).expect("UTF-8");
    let lines = text.lines().map(|line| {
        let (name, value) = line.split_once(' ').expect("a name and a value");
        (name.to_owned(), value.parse().expect("a number"))
    });
    lines.collect()
}

#[test]
fn structures_and_constants_are_those_of_the_headers() {
    let mut printed = printed_by_c().into_iter();
    let mut next = |name: &str| {
        let (printed_name, value) = printed.next().unwrap();
        assert_eq!(printed_name, name);
        value
    };
    for (name, value) in CONSTANTS {
        assert_eq!(next(name), *value, "{name}");
    }
    for layout in LAYOUTS {
        let bytes = next(layout.name);
        assert!(
            layout.bytes as u64 <= bytes,
            "{} has {bytes} bytes",
            layout.name
        );
        for (field, offset) in layout.fields {
            let name = format!("{}.{field}", layout.name);
            assert_eq!(next(&name), *offset as u64, "{name}");
        }
    }
    assert_eq!(printed.next(), None);
}
