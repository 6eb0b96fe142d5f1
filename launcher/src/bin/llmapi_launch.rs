//! `llmapi-launch CMD…`: the name that scripts use for `baton llmapi-launch CMD…`. It becomes the `baton` beside it.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

fn main() -> ExitCode {
    let beside = std::env::current_exe()
        .ok()
        .map(|own| own.with_file_name("baton"))
        .filter(|baton| baton.is_file());
    let baton = beside.unwrap_or_else(|| PathBuf::from("baton"));
    let error = Command::new(&baton)
        .arg("llmapi-launch")
        .args(std::env::args_os().skip(1))
        .exec();
    // When stderr is gone there is nobody to tell.
    let _ = writeln!(
        std::io::stderr(),
        "error: cannot run {}: {error}\nhint: put `baton` beside `llmapi-launch`, or on PATH",
        baton.display()
    );
    ExitCode::from(69)
}
