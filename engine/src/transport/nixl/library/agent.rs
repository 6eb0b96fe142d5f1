//! One NIXL agent: registered memory, what it tells of itself, what it knows of others, and reads.
//!
//! Invariant: destroying an agent ends everything that it does, finished or not: its endpoints are closed and its
//! queues thrown away, within milliseconds and without asking a peer. After that nothing writes memory that was
//! registered with it. Nothing else is that certain: NIXL's release of a request under way only forgets it.
#![expect(
    unsafe_code,
    reason = "NIXL is opened at run time and called through its C interface"
)]

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::{self, NonNull};
use std::time::Duration;

use nix::libc;

use crate::page::arena::Arena;

use super::{AgentConfig, Handle, Library, OfHandle, Opaque, leave_without_handlers};

/// NIXL's numbers for ordinary memory, and for that of a GPU.
const DRAM: c_int = 0;
const VRAM: c_int = 1;

/// Which memory an address is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Place {
    /// The host's.
    Host,
    /// That of the GPU with this number in its process.
    Gpu(u64),
}

impl Place {
    /// An arena's.
    pub(in super::super) fn of(arena: &Arena) -> Self {
        arena
            .device()
            .map_or(Self::Host, |device| Self::Gpu(device.ordinal() as u64))
    }

    const fn kind(self) -> c_int {
        match self {
            Self::Host => DRAM,
            Self::Gpu(_) => VRAM,
        }
    }

    const fn device(self) -> u64 {
        match self {
            Self::Host => 0,
            Self::Gpu(number) => number,
        }
    }
}

/// NIXL's number for a read.
const READ: c_int = 0;

/// NIXL's status of what is done, and of what is under way.
const DONE: c_int = 0;
const IN_PROGRESS: c_int = 1;

/// A name that nobody else has is this long at most; it comes from a peer.
const NAME_BYTES_MAX: usize = 256;

/// Who drives the transport under an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Progress {
    /// A thread of NIXL's, which wakes up at least this often (whole milliseconds; 0 would spin).
    Thread(Duration),
    /// The one who asks for the status of a request.
    Caller,
}

/// One stretch of a read. Both ends are registered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Stretch {
    /// Address in the peer.
    pub(in super::super) remote: usize,
    /// Address here.
    pub(in super::super) local: usize,
    /// Length.
    pub(in super::super) bytes: usize,
}

/// A read under way. It is done with [`Agent::finish`], or ends with its agent.
#[derive(Debug)]
pub(in super::super) struct Request(NonNull<Opaque>);

impl Request {
    fn into_raw(self) -> Handle {
        self.0.as_ptr()
    }
}

// SAFETY: a request is only named, to the agent that made it, by its one owner.
unsafe impl Send for Request {}

/// See the module.
#[derive(Debug)]
pub(in super::super) struct Agent {
    library: &'static Library,
    raw: NonNull<Opaque>,
}

// SAFETY: NIXL binds an agent to no thread.
unsafe impl Send for Agent {}

impl Agent {
    /// An agent of this name, which nobody else may have, with one plug-in.
    pub(in super::super) fn start(
        library: &'static Library,
        name: &str,
        plugin: &CStr,
        progress: Progress,
    ) -> Result<Self, String> {
        let name = CString::new(name).map_err(|error| error.to_string())?;
        let delay = match progress {
            Progress::Thread(delay) => delay,
            Progress::Caller => Duration::ZERO,
        };
        let config = AgentConfig {
            progress_thread: progress != Progress::Caller,
            listen_thread: false,
            listen_port: 0,
            thread_sync: 0,
            workers: 1,
            progress_delay_us: u64::try_from(delay.as_micros()).unwrap_or(u64::MAX),
            listen_delay_us: 0,
            telemetry: false,
        };
        let mut raw = ptr::null_mut();
        // SAFETY: name and configuration are read before it returns; the answer is this function's own.
        let status = unsafe { (library.create_agent)(name.as_ptr(), &config, &mut raw) };
        let raw = made(status, raw, "create an agent")?;
        let agent = Self { library, raw };
        agent.start_plugin(plugin)?;
        leave_without_handlers();
        Ok(agent)
    }

    fn start_plugin(&self, plugin: &CStr) -> Result<(), String> {
        let (mut memories, mut params) = (ptr::null_mut(), ptr::null_mut());
        let (agent, name) = (self.raw.as_ptr(), plugin.as_ptr());
        // SAFETY: the agent lives; the answers are this function's own.
        let status =
            unsafe { (self.library.plugin_params)(agent, name, &mut memories, &mut params) };
        checked(status, "load the plug-in")?;
        let _memories = Owned(memories, self.library.destroy_memories);
        let params = Owned(params, self.library.destroy_params);
        let mut backend = ptr::null_mut();
        // SAFETY: agent and parameters live; the answer is this function's own.
        let status = unsafe { (self.library.create_backend)(agent, name, params.0, &mut backend) };
        // What the handle names belongs to the agent; the handle itself is not needed, there is one plug-in.
        let _backend = Owned(backend, self.library.destroy_backend);
        checked(status, "start the plug-in")
    }

    /// Makes memory known to the plug-in. The caller keeps it until it is deregistered or the agent gone.
    pub(in super::super) fn register(
        &self,
        (start, bytes): (usize, usize),
        place: Place,
    ) -> Result<(), String> {
        let list = self.memory(&[(start, bytes)], place)?;
        // SAFETY: agent and list live; the caller keeps the memory.
        let status = unsafe { (self.library.register)(self.raw.as_ptr(), list.0, ptr::null_mut()) };
        checked(status, "register memory")
    }

    /// Takes memory of the host's back that was registered with these very numbers.
    pub(in super::super) fn deregister(&self, start: usize, bytes: usize) -> Result<(), String> {
        let list = self.memory(&[(start, bytes)], Place::Host)?;
        // SAFETY: agent and list live.
        let status =
            unsafe { (self.library.deregister)(self.raw.as_ptr(), list.0, ptr::null_mut()) };
        checked(status, "deregister memory")
    }

    /// How others connect to this agent, for their [`Agent::load`].
    pub(in super::super) fn connection(&self) -> Result<Vec<u8>, String> {
        self.metadata(&[], Place::Host)
    }

    /// How others read this registered memory, for their [`Agent::load`] after that of the connection.
    pub(in super::super) fn description(
        &self,
        range: (usize, usize),
        place: Place,
    ) -> Result<Vec<u8>, String> {
        self.metadata(&[range], place)
    }

    fn metadata(&self, memory: &[(usize, usize)], place: Place) -> Result<Vec<u8>, String> {
        let list = self.memory(memory, place)?;
        let (mut data, mut length) = (ptr::null_mut(), 0);
        let (agent, none) = (self.raw.as_ptr(), ptr::null_mut());
        // SAFETY: agent and list live; the answers are this function's own.
        let status =
            unsafe { (self.library.local_metadata)(agent, list.0, &mut data, &mut length, none) };
        checked(status, "describe itself")?;
        let data = Allocated(data);
        if data.0.is_null() || length == 0 {
            return Err("NIXL described itself with nothing".to_owned());
        }
        // SAFETY: NIXL allocated this many bytes, wrote them and gave them away.
        let bytes = unsafe { std::slice::from_raw_parts(data.0.cast::<u8>(), length) };
        Ok(bytes.to_vec())
    }

    /// Takes in what another agent told of itself; gives that agent's name.
    pub(in super::super) fn load(&self, metadata: &[u8]) -> Result<CString, String> {
        let mut name = ptr::null_mut();
        let (data, length) = (metadata.as_ptr().cast(), metadata.len());
        // SAFETY: the agent lives, the bytes are read before it returns, the answer is this function's own.
        let status =
            unsafe { (self.library.load_metadata)(self.raw.as_ptr(), data, length, &mut name) };
        checked(status, "take in what the peer told of itself")?;
        let name = Allocated(name.cast());
        if name.0.is_null() {
            return Err("NIXL named no peer".to_owned());
        }
        // SAFETY: NIXL allocated the text, ended it with a zero and gave it away.
        let text = unsafe { CStr::from_ptr(name.0.cast()) };
        if text.count_bytes() > NAME_BYTES_MAX {
            return Err(format!("the peer's name has {} bytes", text.count_bytes()));
        }
        Ok(text.to_owned())
    }

    /// Starts a read of stretches of one peer, from the one place to the other. The local memory is written until the request is finished or the agent
    /// is gone, whatever else happens; the caller keeps it, and lets nobody use it, until then.
    pub(in super::super) fn read(
        &self,
        peer: &CStr,
        stretches: &[Stretch],
        (from, to): (Place, Place),
    ) -> Result<Request, String> {
        let remote = self.stretches(stretches.iter().map(|s| (s.remote, s.bytes)), from)?;
        let local = self.stretches(stretches.iter().map(|s| (s.local, s.bytes)), to)?;
        let (agent, none, mut raw) = (self.raw.as_ptr(), ptr::null_mut(), ptr::null_mut());
        // SAFETY: agent and lists live and are read before it returns; the answer is this function's own.
        let status = unsafe {
            let create = self.library.create_request;
            create(
                agent,
                READ,
                local.0,
                remote.0,
                peer.as_ptr(),
                &mut raw,
                none,
            )
        };
        let request = Request(made(status, raw, "prepare a read")?);
        // SAFETY: agent and request live; the caller keeps the memory as it must be kept.
        let status = unsafe { (self.library.post)(agent, request.0.as_ptr(), none) };
        // A failed one is left to the end of the agent: whether parts of it are under way is not known.
        checked(status, "start a read").map(|()| request)
    }

    /// Whether a read is done. An error leaves it in doubt: only the end of the agent ends it.
    pub(in super::super) fn is_done(&self, request: &Request) -> Result<bool, String> {
        // SAFETY: agent and request live.
        let status = unsafe { (self.library.status)(self.raw.as_ptr(), request.0.as_ptr()) };
        checked(status, "read").map(|()| status == DONE)
    }

    /// Frees a read that is done.
    pub(in super::super) fn finish(&self, request: Request) -> Result<(), String> {
        let raw = request.into_raw();
        // SAFETY: agent and request live, and nobody names the request any more.
        let status = unsafe { (self.library.release)(self.raw.as_ptr(), raw) };
        checked(status, "end a read")?;
        // SAFETY: what it named has been released, and nobody names it any more.
        let status = unsafe { (self.library.destroy_request)(raw) };
        checked(status, "free a read")
    }

    fn memory(&self, ranges: &[(usize, usize)], place: Place) -> Result<Owned, String> {
        let list = list(
            self.library.create_memory_list,
            self.library.destroy_memory_list,
            place,
        )?;
        for (start, bytes) in ranges {
            let add = self.library.add_memory;
            // SAFETY: the list lives; there is no metadata to read.
            let status = unsafe { add(list.0, *start, *bytes, place.device(), ptr::null(), 0) };
            checked(status, "describe memory")?;
        }
        Ok(list)
    }

    fn stretches(
        &self,
        ranges: impl Iterator<Item = (usize, usize)>,
        place: Place,
    ) -> Result<Owned, String> {
        let list = list(
            self.library.create_stretch_list,
            self.library.destroy_stretch_list,
            place,
        )?;
        for (start, bytes) in ranges {
            // SAFETY: the list lives.
            let status =
                unsafe { (self.library.add_stretch)(list.0, start, bytes, place.device()) };
            checked(status, "describe a stretch")?;
        }
        Ok(list)
    }
}

fn list(create: super::CreateList, destroy: OfHandle, place: Place) -> Result<Owned, String> {
    let mut raw = ptr::null_mut();
    // SAFETY: the answer is this function's own.
    let status = unsafe { create(place.kind(), &mut raw) };
    made(status, raw, "make a list").map(|raw| Owned(raw.as_ptr(), destroy))
}

impl Drop for Agent {
    fn drop(&mut self) {
        // SAFETY: the agent lives and is never named again; requests that it had are never named without it.
        let status = unsafe { (self.library.destroy_agent)(self.raw.as_ptr()) };
        if status != DONE {
            tracing::error!(status, "a NIXL agent was not destroyed");
        }
    }
}

/// A handle with the function that frees it.
struct Owned(Handle, OfHandle);

impl Drop for Owned {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: the handle is what this function frees, and is never named again.
            let _freed = unsafe { (self.1)(self.0) };
        }
    }
}

/// Memory that the library took from the C library and gave away.
struct Allocated(*mut c_void);

impl Drop for Allocated {
    fn drop(&mut self) {
        // SAFETY: it came from `malloc`, or is null, and is never named again.
        unsafe { libc::free(self.0) };
    }
}

fn made(status: c_int, raw: Handle, what: &str) -> Result<NonNull<Opaque>, String> {
    checked(status, what)?;
    NonNull::new(raw).ok_or_else(|| format!("NIXL said that it could {what}, and gave nothing"))
}

fn checked(status: c_int, what: &str) -> Result<(), String> {
    let reason = match status {
        DONE | IN_PROGRESS => return Ok(()),
        -1 => "an argument is not valid",
        -2 => "its plug-in failed",
        -3 => "the state does not allow it",
        -4 => "an exception was thrown",
        -6 => "the peer or its memory is not known",
        _ => "no reason was given",
    };
    Err(format!("NIXL could not {what}: {reason} (status {status})"))
}
