//! The launcher's only unsafe code: what happens in a child between fork and exec.
#![expect(
    unsafe_code,
    reason = "pre_exec is the only way to tie a child's life to its parent's"
)]

use std::io;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid};

/// Puts the child into a process group of its own and has the kernel kill it when this thread's process dies.
///
/// The death signal is bound to the *thread* that forks, so only the main thread may spawn what this prepares.
pub(crate) fn bind_to_parent(command: &mut tokio::process::Command) {
    let parent = getpid();
    command.process_group(0);
    // SAFETY: the closure runs between fork and exec and only makes async-signal-safe system calls (prctl, getppid)
    // on values copied before the fork; it neither allocates nor locks.
    unsafe {
        command.pre_exec(move || die_with(parent));
    }
}

fn die_with(parent: Pid) -> io::Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    if getppid() == parent {
        Ok(())
    } else {
        // The parent died between fork and prctl; nobody would ever end this child.
        Err(io::Error::from_raw_os_error(nix::libc::ESRCH))
    }
}
