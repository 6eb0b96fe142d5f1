//! The MPI plug-in: a small C interface that the product opens at run time.
//!
//! MPI's own binary interface differs from site to site; this one is ours and numbered. Each function returns 0, or 1
//! with a text that `baton_mpi_error` gives, or 2 after a fault of its own. Nothing unwinds into the caller, and no call
//! but `init`, `split`, `abort` and `finalize` waits: what takes time is started and asked about.
#![expect(
    unsafe_code,
    reason = "a C interface of exported names and raw pointers, over MPI's own"
)]

use std::cell::RefCell;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

use world::{Group, Request, World};

mod world;

/// The interface's number; the other side wants the same.
const ABI: u32 = 2;

const DONE: c_int = 0;
const FAILED: c_int = 1;
const BROKEN: c_int = 2;

thread_local! {
    static LAST_ERROR: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs one call: its error becomes a status and a text, a panic too.
fn status(work: impl FnOnce() -> Result<(), String>) -> c_int {
    let (status, text) = match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => return DONE,
        Ok(Err(text)) => (FAILED, text),
        Err(_) => (BROKEN, "the MPI plug-in is at fault".to_owned()),
    };
    LAST_ERROR.with(|last| *last.borrow_mut() = text);
    status
}

/// Copies a text with its closing zero, cut to the room.
///
/// # Safety
/// `target` has room for `room` bytes.
unsafe fn copy_text(text: &str, target: *mut c_char, room: usize) {
    if room == 0 {
        return;
    }
    let mut bytes = text.as_bytes()[..text.floor_char_boundary(room - 1)].to_vec();
    bytes.push(0);
    // SAFETY: the caller vouches for the room, which the text and its zero do not exceed.
    unsafe { target.cast::<u8>().copy_from(bytes.as_ptr(), bytes.len()) };
}

/// Writes an answer.
///
/// # Safety
/// `target` can be written.
unsafe fn answer<T>(target: *mut T, value: T) {
    // SAFETY: the caller vouches for it.
    unsafe { target.write(value) };
}

/// The interface's number.
#[unsafe(no_mangle)]
pub extern "C" fn baton_mpi_abi() -> u32 {
    ABI
}

/// What went wrong last on this thread.
///
/// # Safety
/// `text` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_error(text: *mut c_char, room: usize) {
    LAST_ERROR.with(|last| {
        // SAFETY: the caller vouches for the room.
        unsafe { copy_text(&last.borrow(), text, room) }
    });
}

/// Starts MPI for many threads; all ranks of the world take part. Once in a process.
///
/// # Safety
/// `rank` and `size` can be written; `library` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_init(
    rank: *mut c_int,
    size: *mut c_int,
    library: *mut c_char,
    room: usize,
) -> c_int {
    status(|| {
        let world = World::open()?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(rank, world.rank) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(size, world.size) };
        // SAFETY: the caller vouches for the room.
        unsafe { copy_text(&world.library, library, room) };
        Ok(())
    })
}

/// Ends MPI; all ranks of the world take part, and nothing may be under way.
#[unsafe(no_mangle)]
pub extern "C" fn baton_mpi_finalize() -> c_int {
    status(World::close)
}

/// Ends all processes of the world, this one too.
#[unsafe(no_mangle)]
pub extern "C" fn baton_mpi_abort(code: c_int) -> c_int {
    status(|| World::abort(code))
}

/// Splits the world into groups by `colour`, in the order of `key`; all ranks of the world take part. A negative colour is
/// in no group and gets none.
///
/// # Safety
/// The four answers can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_split(
    colour: c_int,
    key: c_int,
    group: *mut *mut Group,
    rank: *mut c_int,
    size: *mut c_int,
) -> c_int {
    status(|| {
        let (own, place) = match Group::split(colour, key)? {
            Some(own) => {
                let place = (own.rank, own.size);
                (Box::into_raw(Box::new(own)), place)
            }
            None => (std::ptr::null_mut(), (-1, 0)),
        };
        // SAFETY: the caller vouches for it.
        unsafe { answer(group, own) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(rank, place.0) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(size, place.1) };
        Ok(())
    })
}

/// The host of a group's rank.
///
/// # Safety
/// `group` is one of `baton_mpi_split`; `host` has room for `room` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_host(
    group: *const Group,
    rank: c_int,
    host: *mut c_char,
    room: usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the group.
        let group = unsafe { &*group };
        let name = usize::try_from(rank)
            .ok()
            .and_then(|rank| group.hosts.get(rank))
            .ok_or_else(|| format!("there is no rank {rank}"))?;
        // SAFETY: the caller vouches for the room.
        unsafe { copy_text(name, host, room) };
        Ok(())
    })
}

/// Starts to send bytes.
///
/// # Safety
/// `group` is one of `baton_mpi_split`; the bytes stay as they are until the request is done; `request` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_start_send(
    group: *const Group,
    to: c_int,
    tag: c_int,
    bytes: *const c_void,
    length: usize,
    request: *mut *mut Request,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the group.
        let group = unsafe { &*group };
        // SAFETY: the caller vouches for the bytes.
        let started = unsafe { group.start_send(to, tag, bytes, length) }?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(request, Box::into_raw(Box::new(started))) };
        Ok(())
    })
}

/// Starts to receive bytes, at most `length`.
///
/// # Safety
/// `group` is one of `baton_mpi_split`; the bytes are nobody else's until the request is done; `request` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_start_receive(
    group: *const Group,
    from: c_int,
    tag: c_int,
    bytes: *mut c_void,
    length: usize,
    request: *mut *mut Request,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the group.
        let group = unsafe { &*group };
        // SAFETY: the caller vouches for the bytes.
        let started = unsafe { group.start_receive(from, tag, bytes, length) }?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(request, Box::into_raw(Box::new(started))) };
        Ok(())
    })
}

/// Whether a message of `tag` from `from` can be received (1) or not yet (0), and its length.
///
/// # Safety
/// `group` is one of `baton_mpi_split`; `found` and `length` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_probe(
    group: *const Group,
    from: c_int,
    tag: c_int,
    found: *mut c_int,
    length: *mut usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the group.
        let group = unsafe { &*group };
        let came = group.probe(from, tag)?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(found, c_int::from(came.is_some())) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(length, came.unwrap_or(0)) };
        Ok(())
    })
}

/// Whether a message of `tag` from any rank can be received (1) or not yet (0), whose it is, and its length.
///
/// # Safety
/// `group` is one of `baton_mpi_split`; `found`, `from` and `length` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_probe_any(
    group: *const Group,
    tag: c_int,
    found: *mut c_int,
    from: *mut c_int,
    length: *mut usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the group.
        let group = unsafe { &*group };
        let came = group.probe_any(tag)?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(found, c_int::from(came.is_some())) };
        let (sender, bytes) = came.unwrap_or((-1, 0));
        // SAFETY: the caller vouches for it.
        unsafe { answer(from, sender) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(length, bytes) };
        Ok(())
    })
}

/// Whether a request is done (1) or not (0), and how many bytes were received. One that is done, or failed, is gone.
///
/// # Safety
/// `request` was started and is not gone; `done` and `length` can be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn baton_mpi_test(
    request: *mut Request,
    done: *mut c_int,
    length: *mut usize,
) -> c_int {
    status(|| {
        // SAFETY: the caller vouches for the request, and uses it for nothing else meanwhile.
        let tested = unsafe { &mut *request }.test();
        if !matches!(tested, Ok(None)) {
            // SAFETY: it was made by `Box::into_raw`, and the caller will not name it again.
            drop(unsafe { Box::from_raw(request) });
        }
        let finished = tested?;
        // SAFETY: the caller vouches for it.
        unsafe { answer(done, c_int::from(finished.is_some())) };
        // SAFETY: the caller vouches for it.
        unsafe { answer(length, finished.unwrap_or(0)) };
        Ok(())
    })
}
