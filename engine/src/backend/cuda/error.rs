//! Why something about the GPU does not work, and what to do where there is something to do.

use super::super::BackendError;

/// A library, device or call that fails.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// A library that is opened at run time is not on this machine.
    #[error("{library} cannot be opened, which would give {gives}\nhint: {hint}")]
    Missing {
        /// `libnvrtc.so`.
        library: &'static str,
        /// What it is for.
        gives: &'static str,
        /// How to get it.
        hint: &'static str,
    },
    /// There is no driver, hence no GPU.
    #[error("libcuda.so cannot be opened\nhint: it comes with the NVIDIA driver")]
    NoDriver,
    /// The driver shows no device to this process.
    #[error("no cuda device: {0}")]
    NoDevice(String),
    /// A device that is too old for the kernels.
    #[error(
        "{name} has compute capability {major}.{minor}, and the kernels need 8.0 (Ampere) or later"
    )]
    TooOld {
        /// The device.
        name: String,
        /// Its major number.
        major: i32,
        /// Its minor number.
        minor: i32,
    },
    /// A call of a library failed.
    #[error("{call}: {status}")]
    Call {
        /// The function.
        call: &'static str,
        /// What it returned.
        status: String,
    },
    /// The device's memory is used up.
    #[error("out of device memory: {bytes} bytes are not to be had")]
    OutOfMemory {
        /// What was asked for.
        bytes: usize,
    },
    /// A kernel does not compile.
    #[error("kernel {kernel} does not compile for {target}:\n{log}")]
    Compile {
        /// Its file.
        kernel: String,
        /// `sm_90`.
        target: String,
        /// What the compiler says.
        log: String,
    },
    /// Two ranks of an instance have one device.
    #[error(
        "ranks {} and {} compute on the same gpu ({place})\nhint: tensor_parallel_size times pipeline_parallel_size may not be more than the gpus of the machines; give each rank one of its own, or use --device cpu",
        ranks[0], ranks[1]
    )]
    SharedDevice {
        /// Their numbers.
        ranks: [usize; 2],
        /// Where the device is plugged in.
        place: String,
    },
    /// Something that this backend does not do.
    #[error("not served on cuda: {0}")]
    NotServed(String),
}

impl CudaError {
    /// Whether there is simply no GPU on this machine, which is nothing to worry about.
    pub(crate) const fn is_absence(&self) -> bool {
        matches!(self, Self::NoDriver | Self::NoDevice(_))
    }

    /// The same for the engine; `what` needed memory, where that is what is short.
    pub(super) fn of(self, what: impl Into<String>) -> BackendError {
        match self {
            Self::OutOfMemory { bytes } => BackendError::OutOfMemory {
                what: what.into(),
                bytes,
            },
            other => BackendError::Device {
                what: what.into(),
                reason: other.to_string(),
            },
        }
    }
}
