//! The CUDA device: the driver through cudarc, loaded at run time, so that one binary starts with and without a driver.
//!
//! cudarc's lowest level is used on purpose: its safe level tracks events for every allocation, which breaks capture,
//! and pools memory, which this runtime has no use for since it allocates once.

use std::collections::{BTreeMap, HashMap};
use std::ffi::CString;
use std::sync::{Arc, Mutex, OnceLock, Weak};

use cudarc::driver::{result, sys};

use super::graph::Work;
use super::kernel::{CUDA_ARCHS, CUDA_IMAGES, KERNEL_FILES, NVCC_MAJOR, host_kernel};
use super::{Launch, lock};
use crate::error::{Error, Result};
use crate::profile::range;

pub(super) struct Cuda {
    loaded: Arc<Loaded>,
    stream: sys::CUstream,
}

/// A GPU with its kernels, which all handles to it share.
struct Loaded {
    context: sys::CUcontext,
    device: sys::CUdevice,
    modules: Vec<sys::CUmodule>,
    functions: HashMap<&'static str, Function>,
    name: String,
    capability: (i32, i32),
    /// Whether the driver took the code for sm_90a.
    wgmma: bool,
}

struct Function {
    handle: sys::CUfunction,
    /// The same kernel with the arguments of several tickets; not of one that no training launches.
    array: Option<sys::CUfunction>,
    max_threads: u32,
    shared_bytes: u32,
    /// The most that this GPU gives it.
    most_shared: u32,
}

// SAFETY: the driver's handles may be used from any thread; each call sets the context of its thread first.
unsafe impl Send for Cuda {}
// SAFETY: as above; the driver serialises calls on one stream.
unsafe impl Sync for Cuda {}
// SAFETY: as above; it does not change once it is loaded.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

fn failed(what: &str) -> impl Fn(result::DriverError) -> Error {
    move |error| {
        let text = error.error_string().map(|text| text.to_string_lossy().into_owned()).unwrap_or_default();
        Error::Device(format!("CUDA: {what}: {text} ({error:?})"))
    }
}

/// The driver, initialised once: its version, or why it cannot be used. cudarc panics where the library is missing or
/// too old for a symbol, so both are asked first.
fn driver() -> &'static std::result::Result<i32, String> {
    static DRIVER: OnceLock<std::result::Result<i32, String>> = OnceLock::new();
    DRIVER.get_or_init(|| {
        if CUDA_IMAGES.is_empty() {
            return Err("this binary was built without nvcc: it holds no GPU code".into());
        }
        // SAFETY: looks the library up by name.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver (libcuda) on this machine".into());
        }
        let mut version = 0;
        // SAFETY: writes one integer; needs no initialisation.
        unsafe { sys::cuDriverGetVersion(&mut version).result() }
            .map_err(|error| format!("the CUDA driver gives no version: {error:?}"))?;
        // 12.8 has every function that is called here; code of a newer nvcc wants a driver of its own major version.
        let needed = NVCC_MAJOR.map_or(0, |major| 1000 * major).max(12_080);
        if version < needed {
            return Err(format!(
                "the CUDA driver is too old: expected {} or newer, got {}",
                text(needed),
                text(version)
            ));
        }
        result::init().map_err(|error| format!("the CUDA driver cannot start: {error:?}"))?;
        Ok(version)
    })
}

fn text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

pub(super) fn count() -> usize {
    driver().as_ref().map_or(0, |_| result::device::get_count().unwrap_or(0) as usize)
}

/// A GPU of this machine.
#[derive(Clone, Debug)]
pub struct Gpu {
    /// As the driver calls it.
    pub name: String,
    /// Compute capability, major and minor.
    pub capability: (i32, i32),
    /// Memory in all.
    pub memory_bytes: usize,
}

impl Gpu {
    /// What the driver tells without a context.
    pub(super) fn find(index: usize) -> Result<Self> {
        let device = result::device::get(index as i32).map_err(failed("no such device"))?;
        let attribute = |which| {
            // SAFETY: the device is valid.
            unsafe { result::device::get_attribute(device, which) }.map_err(failed("device attribute"))
        };
        Ok(Gpu {
            name: result::device::get_name(device).map_err(failed("device name"))?,
            capability: (
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
                attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
            ),
            // SAFETY: the device is valid.
            memory_bytes: unsafe { result::device::total_mem(device) }.map_err(failed("device memory"))?,
        })
    }
}

pub(super) fn status() -> String {
    match driver() {
        Ok(version) => format!("CUDA driver {}, {} GPU(s)", text(*version), count()),
        Err(why) => why.clone(),
    }
}

impl Loaded {
    /// The GPU of this number: as others have it already, or with its kernels loaded now.
    fn find(index: usize) -> Result<Arc<Self>> {
        static LOADED: Mutex<BTreeMap<usize, Weak<Loaded>>> = Mutex::new(BTreeMap::new());
        // Held while they load, so that another thread waits for them.
        let mut all = lock(&LOADED);
        if let Some(loaded) = all.get(&index).and_then(Weak::upgrade) {
            return Ok(loaded);
        }
        let device = result::device::get(index as i32).map_err(failed("no such device"))?;
        let Gpu { name, capability, .. } = Gpu::find(index)?;
        // SAFETY: the device is valid; the context is released in Drop. Threads that wait let others run, who decode images
        // or have streams of their own; where the driver refuses that, they do not.
        let context = unsafe {
            let _ = sys::cuDevicePrimaryCtxSetFlags_v2(device, sys::CUctx_flags::CU_CTX_SCHED_YIELD as u32);
            result::primary_ctx::retain(device)
        }
        .map_err(failed("no context"))?;
        let (modules, functions) = (Vec::new(), HashMap::new());
        let mut loaded = Loaded { context, device, modules, functions, name, capability, wgmma: false };
        loaded.enter()?;
        loaded.load_kernels()?;
        let loaded = Arc::new(loaded);
        all.insert(index, Arc::downgrade(&loaded));
        Ok(loaded)
    }

    fn enter(&self) -> Result<()> {
        // SAFETY: the context is valid until Drop.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("context"))
    }

    /// Loads every kernel now: a module that loads during a capture would break it.
    fn load_kernels(&mut self) -> Result<()> {
        for (&(stem, image), &(_, kernels)) in CUDA_IMAGES.iter().zip(KERNEL_FILES) {
            // The driver reads the image's header as words.
            let mut words = vec![0u64; image.len().div_ceil(8)];
            bytemuck::cast_slice_mut(&mut words)[..image.len()].copy_from_slice(image);
            // SAFETY: the image is a fat binary that nvcc made, and is copied by the driver.
            let module = unsafe { result::module::load_data(words.as_ptr().cast()) }.map_err(failed(&format!(
                "kernels/{stem}.cu, made for {CUDA_ARCHS:?}, does not load on {}",
                self.name
            )))?;
            self.modules.push(module);
            for &kernel in kernels {
                let missing = || Error::Device(format!("CUDA: kernel {kernel} is not in its image"));
                let (handle, most_shared) = self.function(module, kernel)?.ok_or_else(missing)?;
                let array = self.function(module, &format!("{kernel}_array"))?.map(|(handle, _)| handle);
                let attribute = |which| {
                    // SAFETY: the function is valid.
                    unsafe { result::function::get_function_attribute(handle, which) }
                        .map_err(failed("function attribute"))
                };
                let max_threads = attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)? as u32;
                if kernel.contains("_wgmma_") {
                    // Which code it is, where the driver has a choice (CUDA_FORCE_PTX_JIT): that of sm_80 is a trap.
                    let made_for = attribute(sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION)?;
                    self.wgmma = self.capability == (9, 0) && CUDA_ARCHS.contains(&"90a") && made_for >= 90;
                }
                // Both compilers lay the struct out alike, so the host's entry knows its size.
                let shared_bytes = host_kernel(kernel).map_or(0, |sets| sets[0].shared_bytes);
                self.functions.insert(kernel, Function { handle, array, max_threads, shared_bytes, most_shared });
            }
        }
        Ok(())
    }

    /// A module's function of this name, which may have all the shared memory that there is, and how much that is; `None` if
    /// there is no such function.
    fn function(&self, module: sys::CUmodule, name: &str) -> Result<Option<(sys::CUfunction, u32)>> {
        let symbol = CString::new(name).expect("a C identifier");
        // SAFETY: the module is loaded.
        let handle = match unsafe { result::module::get_function(module, symbol) } {
            Err(error) if error.0 == sys::cudaError_enum::CUDA_ERROR_NOT_FOUND => return Ok(None),
            handle => handle.map_err(failed(name))?,
        };
        // SAFETY: device and function are valid. Above 48 KiB, shared memory must be asked for; asking for all of it costs
        // nothing.
        unsafe {
            let limit = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
            let bytes = result::device::get_attribute(self.device, limit).map_err(failed("attribute"))?;
            // What a kernel declares itself (LOCAL) is part of the limit.
            let declared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
            let declared = result::function::get_function_attribute(handle, declared).map_err(failed("attribute"))?;
            let shared = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            result::function::set_function_attribute(handle, shared, bytes - declared).map_err(failed("attribute"))?;
            Ok(Some((handle, (bytes - declared) as u32)))
        }
    }
}

impl Cuda {
    pub(super) fn open(index: usize) -> Result<Self> {
        driver().as_ref().map_err(|why| Error::Device(format!("device cuda: {why}; use --device host")))?;
        if index >= count() {
            return Err(Error::Device(format!("device cuda:{index}: this machine has {} GPU(s)", count())));
        }
        Self::on(Loaded::find(index)?)
    }

    fn on(loaded: Arc<Loaded>) -> Result<Self> {
        loaded.enter()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("no stream"))?;
        Ok(Cuda { loaded, stream })
    }

    /// Another stream on the same GPU.
    pub(super) fn reopen(&self) -> Result<Self> {
        Self::on(self.loaded.clone())
    }

    fn enter(&self) -> Result<()> {
        self.loaded.enter()
    }

    pub(super) fn description(&self) -> String {
        format!("cuda sm_{}{} {}", self.loaded.capability.0, self.loaded.capability.1, self.loaded.name)
    }

    /// Whether this GPU runs the code for sm_90a, which no other does.
    pub(super) fn has_wgmma(&self) -> bool {
        self.loaded.wgmma
    }

    pub(super) fn has_shared_memory_for(&self, kernel: &str) -> bool {
        self.loaded.functions.get(kernel).is_some_and(|function| function.shared_bytes <= function.most_shared)
    }

    /// Whether a kernel can be launched in this shape for several tickets at once, whose number is then the grid's z.
    pub(super) fn launches_arrays(&self, kernel: &str, launch: &Launch) -> bool {
        let fits = u64::from(launch.grid[1]) * u64::from(launch.grid[2]) <= 65_535;
        fits && self.loaded.functions.get(kernel).is_some_and(|function| function.array.is_some())
    }

    /// A tensor of bf16 and a box of it, sizes innermost first, as the driver encodes them.
    pub(super) fn tensor_map(&self, address: u64, size: [u64; 4], boxed: [u64; 4]) -> Result<[u64; 16]> {
        self.enter()?;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // Bytes between elements of all axes but the innermost.
        let pitches: [u64; 3] = std::array::from_fn(|axis| 2 * size[..=axis].iter().product::<u64>());
        let boxed = boxed.map(|length| length as u32);
        // SAFETY: all arrays have as many elements as axes, and the map is one of the driver's.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                size.len() as u32,
                address as *mut _,
                size.as_ptr(),
                pitches.as_ptr(),
                boxed.as_ptr(),
                [1; 4].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed(&format!("tensor map of {size:?} in boxes of {boxed:?}")))?;
        Ok(map.opaque)
    }

    pub(super) fn free_memory(&self) -> Option<usize> {
        self.enter().ok()?;
        result::mem_get_info().ok().map(|(free, _)| free)
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<u64> {
        self.enter()?;
        // SAFETY: the memory is set before anything reads it; the stream waits for nothing else.
        unsafe {
            let address = result::malloc_sync(bytes.max(1)).map_err(|error| {
                let (free, total) = result::mem_get_info().unwrap_or((0, 0));
                let hint = format!("{bytes} bytes asked for, {free} of {total} free; try a smaller --batch");
                failed(&hint)(error)
            })?;
            result::memset_d8_async(address, 0, bytes, self.stream).map_err(failed("memset"))?;
            Ok(address)
        }
    }

    pub(super) fn free(&self, address: u64) {
        if self.enter().is_ok() {
            // SAFETY: the address came from `alloc`; cuMemFree waits for work that uses it.
            let _ = unsafe { result::free_sync(address) };
        }
    }

    /// Page-locked memory of the host, set to zero. Not write-combined, which is slow to read back.
    pub(super) fn alloc_host(&self, bytes: usize) -> Result<*mut u8> {
        self.enter()?;
        let hint = format!("{bytes} bytes of page-locked host memory; try a smaller --batch or fewer DILT_WORKERS");
        // SAFETY: the memory is set before anything reads it.
        unsafe {
            let address = result::malloc_host(bytes.max(1), 0).map_err(failed(&hint))?.cast::<u8>();
            address.write_bytes(0, bytes);
            Ok(address)
        }
    }

    pub(super) fn free_host(&self, address: *mut u8) {
        if self.enter().is_ok() {
            // SAFETY: the address came from `alloc_host`; copies from it are over when `write` returns.
            let _ = unsafe { result::free_host(address.cast()) };
        }
    }

    pub(super) fn write(&self, data: &[u8], to: u64) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller holds an exclusive view of as many bytes; the copy is over before this returns.
        unsafe { result::memcpy_htod_async(to, data, self.stream) }.map_err(failed("copy to the device"))?;
        self.synchronize()
    }

    pub(super) fn read(&self, from: u64, data: &mut [u8]) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller holds a view of as many bytes; the copy is over before this returns.
        unsafe { result::memcpy_dtoh_async(data, from, self.stream) }.map_err(failed("copy from the device"))?;
        self.synchronize()
    }

    pub(super) fn run(&self, work: &Work) -> Result<()> {
        self.enter()?;
        match work {
            Work::Launch { kernel, launch, args } => {
                let _range = range(kernel);
                let function = self
                    .loaded
                    .functions
                    .get(kernel)
                    .ok_or_else(|| Error::Device("there is no kernel of this name in kernels/".into()))?;
                if launch.block == 0 || launch.block > function.max_threads {
                    let most = function.max_threads;
                    return Err(Error::Device(format!("expected 1 to {most} threads a block")));
                }
                let (handle, [x, y, z]) = match (args.tickets(), launch.grid) {
                    (1, grid) => (function.handle, grid),
                    (tickets, [x, y, z]) => {
                        let array = function.array.expect("launches_arrays has been asked");
                        (array, [x, y * z, tickets as u32])
                    }
                };
                let mut params = [args.as_ptr().cast_mut()];
                // SAFETY: promised by the caller of Device::launch; the driver copies the argument struct.
                unsafe {
                    let block = (launch.block, 1, 1);
                    let shared = function.shared_bytes;
                    result::launch_kernel(handle, (x, y, z), block, shared, self.stream, &mut params)
                }
                .map_err(failed("launch"))
            }
            Work::Copy { from, to, bytes } => {
                // SAFETY: the caller of Device::copy holds views of both ranges.
                unsafe { result::memcpy_dtod_async(*to, *from, *bytes, self.stream) }.map_err(failed("copy"))
            }
            Work::Zero { to, bytes } => {
                // SAFETY: the caller of Device::zero holds an exclusive view.
                unsafe { result::memset_d8_async(*to, 0, *bytes, self.stream) }.map_err(failed("memset"))
            }
        }
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream is valid until Drop.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("a kernel failed"))
    }

    /// A graph that does some work, one piece after the other.
    pub(super) fn capture(&self, work: &[Work]) -> Result<Graph> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is valid and not the default one.
        unsafe { result::stream::begin_capture(self.stream, mode) }.map_err(failed("capture"))?;
        let captured = work.iter().try_for_each(|work| self.run(work).map_err(|error| work.named(error)));
        // SAFETY: a capture is under way on this stream; the graph is destroyed once instantiated.
        unsafe {
            let graph = result::stream::end_capture(self.stream).map_err(failed("capture"));
            let graph = captured.and(graph)?;
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).map_err(failed("capture"))?;
            Ok(Graph(executable.map_err(failed("capture"))?))
        }
    }

    pub(super) fn replay(&self, graph: &Graph) -> Result<()> {
        self.enter()?;
        // SAFETY: both handles are valid; memory that the graph uses is kept while it lives (Device::free).
        unsafe { result::graph::launch(graph.0, self.stream) }.map_err(failed("replay"))
    }

    pub(super) fn event(&self) -> Result<Event> {
        self.enter()?;
        let event = result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("event"))?;
        // SAFETY: both handles are valid.
        unsafe { result::event::record(event, self.stream) }.map_err(failed("event"))?;
        Ok(Event(event))
    }
}

impl Drop for Cuda {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: the stream was made in `on` and is used no more; errors of a dead context change nothing.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
        }
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if self.enter().is_err() {
            return;
        }
        // SAFETY: all handles were made in `find`, and streams that used them are gone.
        unsafe {
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// An instantiated CUDA graph.
pub(super) struct Graph(sys::CUgraphExec);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: instantiated in `Cuda::capture`, and used no more.
        let _ = unsafe { result::graph::exec_destroy(self.0) };
    }
}

/// A recorded event.
pub struct Event(sys::CUevent);

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    pub(super) fn elapsed_ms(&self, earlier: &Event) -> Result<f64> {
        // SAFETY: both events are valid.
        unsafe {
            result::event::synchronize(self.0).map_err(failed("event"))?;
            result::event::elapsed(earlier.0, self.0).map(f64::from).map_err(failed("event"))
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created in `Cuda::event`, and used no more.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}
