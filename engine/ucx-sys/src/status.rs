//! UCX's statuses, and the pointers in which some functions hide them.

use std::ffi::{c_int, c_void};

/// `ucs_status_t`: 0 is done, 1 under way, below 0 an error.
#[repr(transparent)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Status(pub c_int);

impl Status {
    /// `UCS_OK`.
    pub const OK: Self = Self(0);
    /// `UCS_INPROGRESS`.
    pub const IN_PROGRESS: Self = Self(1);
    /// `UCS_ERR_UNREACHABLE`.
    pub const UNREACHABLE: Self = Self(-6);
    /// `UCS_ERR_BUSY`.
    pub const BUSY: Self = Self(-15);
    /// `UCS_ERR_CANCELED`.
    pub const CANCELED: Self = Self(-16);
    /// `UCS_ERR_LAST`: the lowest of all statuses.
    pub const LAST: Self = Self(-100);

    /// Nothing for success, itself for everything else.
    ///
    /// # Errors
    /// Every status but [`Status::OK`].
    pub const fn check(self) -> Result<(), Self> {
        match self.0 {
            0 => Ok(()),
            _ => Err(self),
        }
    }
}

/// What a `ucs_status_ptr_t` says: nothing when the operation is done, a pointer to its request when it is under way.
/// (In C these are the macros `UCS_PTR_IS_PTR`, `UCS_PTR_IS_ERR` and `UCS_PTR_STATUS`.)
///
/// # Errors
/// The status that the pointer stands for.
pub fn status_of_pointer(
    pointer: *mut c_void,
) -> Result<Option<std::ptr::NonNull<c_void>>, Status> {
    let value = pointer.addr().cast_signed();
    if (Status::LAST.0 as isize..0).contains(&value) {
        // Within 100 below zero, as was just seen.
        return Err(Status(c_int::try_from(value).unwrap_or(Status::LAST.0)));
    }
    Ok(std::ptr::NonNull::new(pointer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointers_are_done_under_way_or_an_error() {
        assert_eq!(status_of_pointer(std::ptr::null_mut()), Ok(None));
        let mut request = 7_u64;
        let pointer: *mut c_void = (&raw mut request).cast();
        let found = status_of_pointer(pointer).expect("no error");
        assert_eq!(found.map(std::ptr::NonNull::as_ptr), Some(pointer));
        for status in [Status::UNREACHABLE, Status::CANCELED, Status::LAST] {
            let hidden = std::ptr::without_provenance_mut((status.0 as isize).cast_unsigned());
            assert_eq!(status_of_pointer(hidden), Err(status));
        }
        let beyond =
            std::ptr::without_provenance_mut((Status::LAST.0 as isize - 1).cast_unsigned());
        assert!(matches!(status_of_pointer(beyond), Ok(Some(_))));
    }
}
