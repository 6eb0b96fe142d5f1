//! The CUDA driver, opened at run time: one device, its context and its one stream, memory, modules, graphs.
//!
//! Everything is ordered by the one stream: a copy or kernel sees what was put there before it, and memory that is given
//! back may be handed out again at once, because whoever uses it next comes later in the stream. Nothing here waits but
//! [`Gpu::synchronize`] and what says so. Invariant: every owner of something of the driver's holds an `Arc` of its [`Gpu`], so
//! the context outlives it. Another stream is another [`Gpu`] of the same device (`peer.rs`). Absent: unified memory.

#![expect(unsafe_code, reason = "the driver is a C library")]

use std::cell::Cell;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::ptr;
use std::sync::Arc;

use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUresult};

use super::error::CudaError;

/// An address in the device's memory.
pub(super) type DevicePtr = u64;

thread_local! {
    /// The context that is current on this thread, as an address.
    static BOUND: Cell<usize> = const { Cell::new(0) };
}

pub(super) fn check(call: &'static str, status: CUresult) -> Result<(), CudaError> {
    match status {
        CUresult::CUDA_SUCCESS => Ok(()),
        status => Err(CudaError::Call {
            call,
            status: format!("{status:?}"),
        }),
    }
}

/// A device and the stream that all its work is put on.
pub(super) struct Gpu {
    device: sys::CUdevice,
    ordinal: usize,
    context: sys::CUcontext,
    stream: sys::CUstream,
    pub(super) name: String,
    /// Compute capability.
    pub(super) capability: (i32, i32),
    /// Multiprocessors.
    pub(super) processors: usize,
}

// SAFETY: the driver's handles may be used from any thread whose current context is theirs; each call binds it first.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Gpu {}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Gpu({})", self.name)
    }
}

impl Gpu {
    /// The first device that this process may see (`CUDA_VISIBLE_DEVICES`).
    pub(super) fn open() -> Result<Arc<Self>, CudaError> {
        Self::open_at(0)
    }

    /// How many devices this process may see; at least one.
    pub(super) fn count() -> Result<usize, CudaError> {
        // SAFETY: it opens the library and looks for nothing in it.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoDriver);
        }
        // SAFETY: it may be called at any time, any number of times.
        check("cuInit", unsafe { sys::cuInit(0) })
            .map_err(|error| CudaError::NoDevice(error.to_string()))?;
        let mut count = 0;
        // SAFETY: the target is a valid integer.
        check("cuDeviceGetCount", unsafe {
            sys::cuDeviceGetCount(&raw mut count)
        })?;
        match usize::try_from(count) {
            Ok(count) if count > 0 => Ok(count),
            _ => Err(CudaError::NoDevice("the driver shows none".to_owned())),
        }
    }

    /// One of these devices, with a stream of its own. All that are opened of one device share its context.
    pub(super) fn open_at(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        let count = Self::count()?;
        let number = c_int::try_from(ordinal).ok().filter(|_| ordinal < count);
        let number = number.ok_or_else(|| {
            CudaError::NoDevice(format!("number {ordinal} of {count} that the driver shows"))
        })?;
        let mut device = 0;
        // SAFETY: there are more devices than that, and the target is a valid integer.
        check("cuDeviceGet", unsafe {
            sys::cuDeviceGet(&raw mut device, number)
        })?;
        let name = text_of("cuDeviceGetName", sys::cuDeviceGetName, device)?;
        let major = attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
        )?;
        let minor = attribute(
            device,
            Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
        )?;
        if major < 8 {
            return Err(CudaError::TooOld { name, major, minor });
        }
        let processors = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let mut context = ptr::null_mut();
        // SAFETY: the device exists; the context is released when the Gpu is dropped.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
        })?;
        let mut gpu = Self {
            device,
            ordinal,
            context,
            stream: ptr::null_mut(),
            name,
            capability: (major, minor),
            processors: usize::try_from(processors).unwrap_or(1),
        };
        gpu.bind()?;
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the context is current; the stream is destroyed when the Gpu is dropped.
        check("cuStreamCreate", unsafe {
            sys::cuStreamCreate(&raw mut gpu.stream, flags)
        })?;
        Ok(Arc::new(gpu))
    }

    /// Makes the context this thread's current one.
    pub(super) fn bind(&self) -> Result<(), CudaError> {
        let address = self.context.addr();
        if BOUND.get() == address {
            return Ok(());
        }
        // SAFETY: the context is alive as long as self is.
        check("cuCtxSetCurrent", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })?;
        BOUND.set(address);
        Ok(())
    }

    /// What tells it from all other devices of its machine: where it is plugged in, such as `0000:3A:00.0`.
    pub(super) fn place(&self) -> Result<String, CudaError> {
        text_of("cuDeviceGetPCIBusId", sys::cuDeviceGetPCIBusId, self.device)
    }

    /// Its number among the devices that this process may see.
    pub(super) const fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// For libraries that put work on the stream.
    pub(super) const fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// For calls that name it.
    pub(super) const fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// The compiler's name of this device's instruction set.
    pub(super) fn target(&self) -> String {
        format!("sm_{}{}", self.capability.0, self.capability.1)
    }

    /// Waits until everything that was put on the stream is done.
    pub(super) fn synchronize(&self) -> Result<(), CudaError> {
        self.bind()?;
        // SAFETY: the stream is alive as long as self is.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(self.stream)
        })
    }

    /// Bytes that are free, and all.
    pub(super) fn memory(&self) -> Result<(usize, usize), CudaError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both targets are valid integers.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&raw mut free, &raw mut total)
        })?;
        Ok((free, total))
    }

    /// Puts a fill of the first bytes with zeros on the stream.
    pub(super) fn zero(&self, target: &DeviceMemory, bytes: usize) -> Result<(), CudaError> {
        assert!(bytes <= target.bytes, "a fill fits its target");
        self.bind()?;
        // SAFETY: the range is of an allocation that lives until work on the stream is done (see the module).
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(target.address, 0, bytes, self.stream)
        })
    }

    /// Puts a copy to the device on the stream. Pageable bytes are taken over before it returns; pinned ones must stay as
    /// they are until the stream has passed.
    pub(super) fn upload(
        &self,
        target: &DeviceMemory,
        offset: usize,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        assert!(
            offset + bytes.len() <= target.bytes,
            "an upload fits its target"
        );
        self.bind()?;
        // SAFETY: the source is a live slice and the target range was checked.
        check("cuMemcpyHtoDAsync", unsafe {
            let to = target.address + offset as u64;
            sys::cuMemcpyHtoDAsync_v2(to, bytes.as_ptr().cast(), bytes.len(), self.stream)
        })
    }

    /// Copies from the device when all work before is done, and waits for it.
    pub(super) fn download(
        &self,
        source: &DeviceMemory,
        offset: usize,
        bytes: &mut [u8],
    ) -> Result<(), CudaError> {
        assert!(
            offset + bytes.len() <= source.bytes,
            "a download fits its source"
        );
        self.bind()?;
        // SAFETY: the target is a live slice until the wait below, and the source range was checked.
        check("cuMemcpyDtoHAsync", unsafe {
            let from = source.address + offset as u64;
            sys::cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr().cast(), from, bytes.len(), self.stream)
        })?;
        self.synchronize()
    }

    /// Puts a copy from the device's first bytes to pinned memory on the stream. The target may be read when the stream has
    /// passed, and not before.
    pub(super) fn download_later(
        &self,
        source: &DeviceMemory,
        target: &mut PinnedMemory,
        bytes: usize,
    ) -> Result<(), CudaError> {
        assert!(
            bytes <= source.bytes && bytes <= target.bytes,
            "a download fits both sides"
        );
        self.bind()?;
        // SAFETY: both ranges were checked, and pinned memory is freed only when the stream has passed.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(target.start.cast(), source.address, bytes, self.stream)
        })
    }

    /// Puts a kernel on the stream.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, and its accesses for them and this shape stay within memory that
    /// lives until the stream has passed.
    pub(super) unsafe fn launch(
        &self,
        function: Function,
        shape: LaunchShape,
        args: &mut Args,
    ) -> Result<(), CudaError> {
        let ([x, y, z], [threads]) = (shape.grid, [shape.threads]);
        if x == 0 || y == 0 || z == 0 {
            return Ok(());
        }
        self.bind()?;
        let mut pointers = args.pointers();
        // SAFETY: the function's module is never unloaded; the rest is the caller's promise.
        check("cuLaunchKernel", unsafe {
            sys::cuLaunchKernel(
                function.0,
                x,
                y,
                z,
                threads,
                1,
                1,
                shape.shared_bytes,
                self.stream,
                pointers.as_mut_ptr(),
                ptr::null_mut(),
            )
        })
    }

    /// From now on work is recorded instead of done. Memory may be allocated meanwhile: it belongs to no recording.
    pub(super) fn begin_capture(&self) -> Result<(), CudaError> {
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and captures nothing yet: captures do not nest.
        check("cuStreamBeginCapture", unsafe {
            sys::cuStreamBeginCapture_v2(self.stream, mode)
        })
    }

    /// Ends a recording.
    pub(super) fn end_capture(self: &Arc<Self>) -> Result<Graph, CudaError> {
        let mut graph = ptr::null_mut();
        // SAFETY: the stream is capturing, by the caller's begin_capture.
        check("cuStreamEndCapture", unsafe {
            sys::cuStreamEndCapture(self.stream, &raw mut graph)
        })?;
        let mut executable = ptr::null_mut();
        // SAFETY: the graph was just made.
        let made = check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut executable, graph, 0)
        });
        // SAFETY: the graph was just made, and what is instantiated does not need it.
        check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) })?;
        made?;
        Ok(Graph {
            executable,
            gpu: Arc::clone(self),
        })
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // What fails here fails because the device is lost; there is nobody to tell.
        drop(self.synchronize());
        if !self.stream.is_null() {
            // SAFETY: nobody else has the stream.
            drop(check("cuStreamDestroy", unsafe {
                sys::cuStreamDestroy_v2(self.stream)
            }));
        }
        if BOUND.get() == self.context.addr() {
            BOUND.set(0);
        }
        // SAFETY: retained once in open.
        drop(check("cuDevicePrimaryCtxRelease", unsafe {
            sys::cuDevicePrimaryCtxRelease_v2(self.device)
        }));
    }
}

/// What the driver says of a device in words.
fn text_of(
    call: &'static str,
    ask: unsafe fn(*mut c_char, c_int, sys::CUdevice) -> CUresult,
    device: sys::CUdevice,
) -> Result<String, CudaError> {
    let mut text = [0 as c_char; 128];
    // SAFETY: the device exists and the buffer has the length that is told.
    check(call, unsafe { ask(text.as_mut_ptr(), 128, device) })?;
    // SAFETY: the driver ends the text with a zero.
    let text = unsafe { CStr::from_ptr(text.as_ptr()) };
    Ok(text.to_string_lossy().into_owned())
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32, CudaError> {
    let mut value: c_int = 0;
    // SAFETY: the device exists and the target is a valid integer.
    check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, attribute, device)
    })?;
    Ok(value)
}

/// An allocation on the device.
#[derive(Debug)]
pub(super) struct DeviceMemory {
    address: DevicePtr,
    bytes: usize,
    gpu: Arc<Gpu>,
}

impl DeviceMemory {
    /// `bytes` bytes of unspecified content; at least 256-byte aligned.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut address = 0;
        // SAFETY: the target is a valid integer; the memory is freed when self is dropped.
        let status = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes.max(1)) };
        if status == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(CudaError::OutOfMemory { bytes });
        }
        check("cuMemAlloc", status)?;
        Ok(Self {
            address,
            bytes,
            gpu: Arc::clone(gpu),
        })
    }

    pub(super) const fn address(&self) -> DevicePtr {
        self.address
    }

    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        drop(self.gpu.bind());
        // SAFETY: allocated in new, freed nowhere else; the driver waits for work that uses it.
        drop(check("cuMemFree", unsafe {
            sys::cuMemFree_v2(self.address)
        }));
    }
}

/// Host memory that the device copies from and to directly.
#[derive(Debug)]
pub(super) struct PinnedMemory {
    start: *mut u8,
    bytes: usize,
    gpu: Arc<Gpu>,
}

// SAFETY: it is plain memory with one owner.
unsafe impl Send for PinnedMemory {}

impl PinnedMemory {
    /// Zeroed.
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        gpu.bind()?;
        let bytes = bytes.max(1);
        let mut start = ptr::null_mut();
        // SAFETY: the target is a valid pointer; the memory is freed when self is dropped.
        check("cuMemHostAlloc", unsafe {
            sys::cuMemHostAlloc(&raw mut start, bytes, 0)
        })?;
        let start = start.cast::<u8>();
        // SAFETY: the range was just allocated.
        unsafe { ptr::write_bytes(start, 0, bytes) };
        Ok(Self {
            start,
            bytes,
            gpu: Arc::clone(gpu),
        })
    }

    /// To fill before an upload, when no copy from it is under way.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: the memory is initialised, this long, and borrowed as self is.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.bytes) }
    }

    /// Where the device and the host find it.
    pub(super) fn address(&self) -> DevicePtr {
        self.start.addr() as DevicePtr
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts(self.start, self.bytes) }
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // A copy may be under way.
        drop(self.gpu.synchronize());
        // SAFETY: allocated in new, freed nowhere else.
        drop(check("cuMemFreeHost", unsafe {
            sys::cuMemFreeHost(self.start.cast())
        }));
    }
}

/// A kernel that can be launched. Its module stays loaded as long as the process lives: there is a handful of them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Function(sys::CUfunction);

// SAFETY: a handle that the driver guards.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// A loaded cubin.
#[derive(Debug, Clone, Copy)]
pub(super) struct Module(sys::CUmodule);

// SAFETY: a handle that the driver guards.
unsafe impl Send for Module {}

impl Module {
    pub(super) fn load(gpu: &Gpu, cubin: &[u8]) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut module = ptr::null_mut();
        // SAFETY: the driver reads as much as the image's own header says, and refuses what is none; images come whole from the
        // compiler or from the cache, which checks them.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&raw mut module, cubin.as_ptr().cast())
        })?;
        Ok(Self(module))
    }

    /// A kernel by name; it may use so much dynamic shared memory.
    pub(super) fn function(
        self,
        gpu: &Gpu,
        name: &str,
        shared_bytes: u32,
    ) -> Result<Function, CudaError> {
        gpu.bind()?;
        let c_name = CString::new(name).expect("kernel names have no zero bytes");
        let mut function = ptr::null_mut();
        // SAFETY: the module is loaded and the name ends with a zero.
        check("cuModuleGetFunction", unsafe {
            sys::cuModuleGetFunction(&raw mut function, self.0, c_name.as_ptr())
        })?;
        if shared_bytes > 48 << 10 {
            let attribute =
                sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let bytes = c_int::try_from(shared_bytes).unwrap_or(c_int::MAX);
            // SAFETY: the function was just found.
            check("cuFuncSetAttribute", unsafe {
                sys::cuFuncSetAttribute(function, attribute, bytes)
            })?;
        }
        Ok(Function(function))
    }
}

/// How a kernel is spread.
#[derive(Debug, Clone, Copy)]
pub(super) struct LaunchShape {
    pub(super) grid: [u32; 3],
    /// Of a block.
    pub(super) threads: u32,
    /// Dynamic.
    pub(super) shared_bytes: u32,
}

/// A kernel's arguments, by value.
#[derive(Debug, Default)]
pub(super) struct Args {
    words: Vec<u64>,
    starts: Vec<usize>,
}

impl Args {
    /// Appends one; the order is the kernel's.
    pub(super) fn with<T: bytemuck::NoUninit>(mut self, value: T) -> Self {
        let bytes = bytemuck::bytes_of(&value);
        self.starts.push(self.words.len());
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.words.push(u64::from_ne_bytes(word));
        }
        self
    }

    fn pointers(&mut self) -> Vec<*mut c_void> {
        let words = &mut self.words;
        let at = |&start: &usize| (&raw mut words[start]).cast();
        self.starts.iter().map(at).collect()
    }
}

/// Recorded work.
#[derive(Debug)]
pub(super) struct Graph {
    executable: sys::CUgraphExec,
    gpu: Arc<Gpu>,
}

// SAFETY: a handle with one owner.
unsafe impl Send for Graph {}

impl Graph {
    /// Puts the recorded work on the stream.
    pub(super) fn launch(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: graph and stream are alive. What was recorded uses memory of the pool, which is never freed.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(self.executable, self.gpu.stream)
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        drop(self.gpu.synchronize());
        // SAFETY: instantiated in end_capture, destroyed nowhere else.
        drop(check("cuGraphExecDestroy", unsafe {
            sys::cuGraphExecDestroy(self.executable)
        }));
    }
}
