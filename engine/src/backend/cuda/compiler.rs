//! NVRTC, opened at run time: CUDA source to a cubin for one architecture. It needs no GPU.
//!
//! `BATON_NVRTC` may name the library's file, where it is in no folder that the loader searches (a Python package, say).

#![expect(unsafe_code, reason = "the compiler is a C library")]

use std::ffi::{CString, c_char, c_int};
use std::path::Path;
use std::ptr;
use std::sync::OnceLock;

use cudarc::nvrtc::sys;

use super::error::CudaError;

/// Names NVRTC's file.
pub(super) const FILE_VARIABLE: &str = "BATON_NVRTC";

/// The compiler.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compiler {
    /// Major and minor.
    pub(super) version: (i32, i32),
}

fn check(call: &'static str, status: sys::nvrtcResult) -> Result<(), CudaError> {
    match status {
        sys::nvrtcResult::NVRTC_SUCCESS => Ok(()),
        status => Err(CudaError::Call {
            call,
            status: format!("{status:?}"),
        }),
    }
}

impl Compiler {
    /// Opens the library.
    pub(super) fn open() -> Result<Self, CudaError> {
        if let Some(file) = std::env::var_os(FILE_VARIABLE) {
            keep_open(Path::new(&file));
        }
        // SAFETY: it opens the library and looks for nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::Missing {
                library: "libnvrtc.so",
                gives: "kernels compiled for the GPU that is there",
                hint: "install the CUDA toolkit's NVRTC, or the Python package nvidia-cuda-nvrtc and set BATON_NVRTC to its libnvrtc.so",
            });
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both targets are valid integers.
        check("nvrtcVersion", unsafe {
            sys::nvrtcVersion(&raw mut major, &raw mut minor)
        })?;
        Ok(Self {
            version: (major, minor),
        })
    }

    /// Compiles a source for a target, `sm_90`, with definitions `NAME=VALUE`.
    pub(super) fn cubin(
        self,
        (kernel, source): (&str, &str),
        target: &str,
        defines: &[String],
    ) -> Result<Vec<u8>, CudaError> {
        let program = Program::new(kernel, source)?;
        let mut options = vec![c_string(&format!("--gpu-architecture={target}"))];
        options.extend(
            defines
                .iter()
                .map(|define| c_string(&format!("-D{define}"))),
        );
        let pointers: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(pointers.len()).expect("a handful of options");
        // SAFETY: the program is alive, and there are as many options, each ending with a zero.
        let status = unsafe { sys::nvrtcCompileProgram(program.0, count, pointers.as_ptr()) };
        if status != sys::nvrtcResult::NVRTC_SUCCESS {
            return Err(CudaError::Compile {
                kernel: kernel.to_owned(),
                target: target.to_owned(),
                log: program.log().unwrap_or_else(|error| error.to_string()),
            });
        }
        program.cubin()
    }
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options have no zero bytes")
}

/// Opens a library by its file and keeps it open, so that it is found by its name from then on.
fn keep_open(file: &Path) {
    static OPEN: OnceLock<Option<libloading::Library>> = OnceLock::new();
    OPEN.get_or_init(|| {
        // SAFETY: NVRTC's initialisers have no requirements.
        let opened = unsafe { libloading::Library::new(file) };
        opened
            .inspect_err(
                |error| tracing::warn!(file = %file.display(), %error, "cannot open NVRTC"),
            )
            .ok()
    });
}

struct Program(sys::nvrtcProgram);

impl Program {
    fn new(kernel: &str, source: &str) -> Result<Self, CudaError> {
        let (source, name) = (c_string(source), c_string(kernel));
        let mut program = ptr::null_mut();
        // SAFETY: both texts end with a zero, and no headers are told of.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                0,
                ptr::null(),
                ptr::null(),
            )
        })?;
        Ok(Self(program))
    }

    fn log(&self) -> Result<String, CudaError> {
        let mut bytes = 0;
        // SAFETY: the program is alive.
        check("nvrtcGetProgramLogSize", unsafe {
            sys::nvrtcGetProgramLogSize(self.0, &raw mut bytes)
        })?;
        let mut log = vec![0_u8; bytes];
        // SAFETY: the buffer has the size that was asked for.
        check("nvrtcGetProgramLog", unsafe {
            sys::nvrtcGetProgramLog(self.0, log.as_mut_ptr().cast())
        })?;
        Ok(String::from_utf8_lossy(&log)
            .trim_end_matches('\0')
            .to_owned())
    }

    fn cubin(&self) -> Result<Vec<u8>, CudaError> {
        let mut bytes = 0;
        // SAFETY: the program is alive.
        check("nvrtcGetCUBINSize", unsafe {
            sys::nvrtcGetCUBINSize(self.0, &raw mut bytes)
        })?;
        let mut cubin = vec![0_u8; bytes];
        // SAFETY: the buffer has the size that was asked for.
        check("nvrtcGetCUBIN", unsafe {
            sys::nvrtcGetCUBIN(self.0, cubin.as_mut_ptr().cast())
        })?;
        Ok(cubin)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made in new, destroyed nowhere else.
        drop(check("nvrtcDestroyProgram", unsafe {
            sys::nvrtcDestroyProgram(&raw mut self.0)
        }));
    }
}
