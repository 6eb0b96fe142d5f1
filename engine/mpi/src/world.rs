//! The world, its groups and what is under way in them, over rsmpi.
//!
//! MPI is asked to return its errors instead of ending the process; the caller decides what ends.

use std::ffi::{c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::ffi;
use mpi::topology::{Color, SimpleCommunicator};
use mpi::traits::{AsRaw, Communicator, CommunicatorCollectives};

/// Bytes of a host's name between ranks.
const HOST_BYTES: usize = 256;

/// Twice the longest MPI_MAX_ERROR_STRING that is known (MPICH's 512; Open MPI has 256).
const ERROR_BYTES: usize = 1024;

/// MPI, while it is on.
static UNIVERSE: Mutex<Option<Universe>> = Mutex::new(None);

/// All ranks.
#[derive(Debug)]
pub(crate) struct World {
    pub(crate) rank: c_int,
    pub(crate) size: c_int,
    /// Name and version of the MPI library.
    pub(crate) library: String,
}

impl World {
    pub(crate) fn open() -> Result<Self, String> {
        let mut universe = UNIVERSE.lock().unwrap_or_else(PoisonError::into_inner);
        if universe.is_some() {
            return Err("MPI is on already".to_owned());
        }
        let (opened, threading) = mpi::initialize_with_threading(Threading::Multiple)
            .ok_or_else(|| "this process has used MPI already".to_owned())?;
        let world = opened.world();
        *universe = Some(opened);
        if threading != Threading::Multiple {
            return Err(format!(
                "this MPI library gives threads at level {threading:?} only; `multiple` is needed"
            ));
        }
        return_errors(world.as_raw())?;
        Ok(Self {
            rank: world.rank(),
            size: world.size(),
            library: library_version(),
        })
    }

    pub(crate) fn close() -> Result<(), String> {
        let universe = UNIVERSE
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        drop(universe.ok_or_else(|| "MPI is not on".to_owned())?);
        Ok(())
    }

    pub(crate) fn abort(code: c_int) -> Result<(), String> {
        // SAFETY: the world is always there while MPI is on, and asking otherwise ends the process as well.
        checked(unsafe { ffi::MPI_Abort(ffi::RSMPI_COMM_WORLD, code) })
    }
}

/// The first line of what the library says of itself.
fn library_version() -> String {
    let version = mpi::environment::library_version().unwrap_or_default();
    let line = version.lines().next().unwrap_or_default();
    line.trim_end_matches('\0').trim().to_owned()
}

/// Ranks of the world that talk to each other.
pub struct Group {
    comm: SimpleCommunicator,
    pub(crate) rank: c_int,
    pub(crate) size: c_int,
    pub(crate) hosts: Vec<String>,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group")
            .field("rank", &self.rank)
            .field("hosts", &self.hosts)
            .finish_non_exhaustive()
    }
}

impl Group {
    /// This rank's group, `None` for a negative colour.
    pub(crate) fn split(colour: c_int, key: c_int) -> Result<Option<Self>, String> {
        if UNIVERSE
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none()
        {
            return Err("MPI is not on".to_owned());
        }
        let colour = match colour {
            0.. => Color::with_value(colour),
            _ => Color::undefined(),
        };
        let Some(comm) = SimpleCommunicator::world().split_by_color_with_key(colour, key) else {
            return Ok(None);
        };
        return_errors(comm.as_raw())?;
        let (rank, size) = (comm.rank(), comm.size());
        let mut own = [0_u8; HOST_BYTES];
        let name = mpi::environment::processor_name().unwrap_or_default();
        for (byte, of_name) in own.iter_mut().zip(name.bytes()).take(HOST_BYTES - 1) {
            *byte = of_name;
        }
        let count = usize::try_from(size).map_err(|error| error.to_string())?;
        let mut all = vec![0_u8; count * HOST_BYTES];
        comm.all_gather_into(&own[..], &mut all[..]);
        let hosts = all.chunks(HOST_BYTES).map(until_zero).collect();
        Ok(Some(Self {
            comm,
            rank,
            size,
            hosts,
        }))
    }

    /// # Safety
    /// The bytes stay as they are until the request is done.
    pub(crate) unsafe fn start_send(
        &self,
        to: c_int,
        tag: c_int,
        bytes: *const c_void,
        length: usize,
    ) -> Result<Request, String> {
        let count = count(length)?;
        let mut request = MaybeUninit::uninit();
        // SAFETY: the caller vouches for the bytes; the communicator is alive and the request is written on success.
        checked(unsafe {
            ffi::MPI_Isend(
                bytes,
                count,
                ffi::RSMPI_UINT8_T,
                to,
                tag,
                self.comm.as_raw(),
                request.as_mut_ptr(),
            )
        })?;
        // SAFETY: MPI_Isend succeeded, so it wrote the request.
        Ok(Request(unsafe { request.assume_init() }))
    }

    /// # Safety
    /// The bytes are nobody else's until the request is done.
    pub(crate) unsafe fn start_receive(
        &self,
        from: c_int,
        tag: c_int,
        bytes: *mut c_void,
        length: usize,
    ) -> Result<Request, String> {
        let count = count(length)?;
        let mut request = MaybeUninit::uninit();
        // SAFETY: the caller vouches for the bytes; the communicator is alive and the request is written on success.
        checked(unsafe {
            ffi::MPI_Irecv(
                bytes,
                count,
                ffi::RSMPI_UINT8_T,
                from,
                tag,
                self.comm.as_raw(),
                request.as_mut_ptr(),
            )
        })?;
        // SAFETY: MPI_Irecv succeeded, so it wrote the request.
        Ok(Request(unsafe { request.assume_init() }))
    }

    /// The length of the next message, if it has come.
    pub(crate) fn probe(&self, from: c_int, tag: c_int) -> Result<Option<usize>, String> {
        let came = self.probe_from(from, tag)?;
        Ok(came.map(|(_, length)| length))
    }

    /// Sender and length of the next message of any rank, if it has come.
    pub(crate) fn probe_any(&self, tag: c_int) -> Result<Option<(c_int, usize)>, String> {
        // SAFETY: a constant of the MPI library, which the bindings take over when they are opened.
        let any = unsafe { ffi::RSMPI_ANY_SOURCE };
        self.probe_from(any, tag)
    }

    fn probe_from(&self, from: c_int, tag: c_int) -> Result<Option<(c_int, usize)>, String> {
        let (mut found, mut status) = (0, MaybeUninit::uninit());
        let comm = self.comm.as_raw();
        // SAFETY: the communicator is alive; both answers are this function's own.
        checked(unsafe { ffi::MPI_Iprobe(from, tag, comm, &mut found, status.as_mut_ptr()) })?;
        if found == 0 {
            return Ok(None);
        }
        // SAFETY: a message was found, so MPI_Iprobe wrote the status.
        let status = unsafe { status.assume_init() };
        Ok(Some((status.MPI_SOURCE, received(&status)?)))
    }
}

/// Something under way.
#[derive(Debug)]
pub struct Request(ffi::MPI_Request);

impl Request {
    /// Bytes received, once it is done; 0 for one that sends.
    pub(crate) fn test(&mut self) -> Result<Option<usize>, String> {
        let (mut done, mut status) = (0, MaybeUninit::zeroed());
        // SAFETY: the request was started and has not been seen done, else it would be gone.
        checked(unsafe { ffi::MPI_Test(&mut self.0, &mut done, status.as_mut_ptr()) })?;
        if done == 0 {
            return Ok(None);
        }
        // SAFETY: it was zeroed, which is a status, and MPI_Test may have filled it in.
        received(&unsafe { status.assume_init() }).map(Some)
    }
}

fn received(status: &ffi::MPI_Status) -> Result<usize, String> {
    let mut count = 0;
    // SAFETY: the status is a finished operation's, the count this function's own.
    checked(unsafe { ffi::MPI_Get_count(status, ffi::RSMPI_UINT8_T, &mut count) })?;
    // A send has no count.
    Ok(usize::try_from(count).unwrap_or(0))
}

fn return_errors(comm: ffi::MPI_Comm) -> Result<(), String> {
    // SAFETY: the communicator is alive and the handler is MPI's own.
    checked(unsafe { ffi::MPI_Comm_set_errhandler(comm, ffi::RSMPI_ERRORS_RETURN) })
}

fn count(length: usize) -> Result<c_int, String> {
    c_int::try_from(length).map_err(|_| format!("{length} bytes are too many for one MPI message"))
}

fn checked(code: c_int) -> Result<(), String> {
    if code == 0 {
        return Ok(());
    }
    let mut text = [0_u8; ERROR_BYTES];
    let mut length = 0;
    // SAFETY: no MPI writes more than ERROR_BYTES; both answers are this function's own.
    let told =
        unsafe { ffi::MPI_Error_string(code, text.as_mut_ptr().cast::<c_char>(), &mut length) };
    if told == 0 {
        Err(until_zero(&text))
    } else {
        Err(format!("MPI error {code}"))
    }
}

fn until_zero(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
