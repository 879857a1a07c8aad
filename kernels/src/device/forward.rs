//! Wrappers of a GPU: what they leave to it.

/// Methods of [`Gpu`](crate::device::Gpu), by name, that a wrapper leaves to the GPU in its field `gpu`.
#[macro_export]
macro_rules! forward_gpu {
    ($($method:ident)*) => { $( $crate::forward_gpu!(@$method); )* };
    (@facts) => {
        fn facts(&self) -> &$crate::device::Facts {
            self.gpu.facts()
        }
    };
    (@alloc) => {
        fn alloc(&self, bytes: u64) -> Result<u64, $crate::device::DeviceError> {
            self.gpu.alloc(bytes)
        }
    };
    (@free) => {
        fn free(&self, at: u64) {
            self.gpu.free(at)
        }
    };
    (@write) => {
        fn write(&self, at: u64, bytes: &[u8]) -> Result<(), $crate::device::DeviceError> {
            self.gpu.write(at, bytes)
        }
    };
    (@read) => {
        fn read(&self, at: u64, out: &mut [u8]) -> Result<(), $crate::device::DeviceError> {
            self.gpu.read(at, out)
        }
    };
    (@fill) => {
        fn fill(&self, at: u64, byte: u8, bytes: u64) -> Result<(), $crate::device::DeviceError> {
            self.gpu.fill(at, byte, bytes)
        }
    };
    (@copy) => {
        fn copy(&self, to: u64, from: u64, bytes: u64) -> Result<(), $crate::device::DeviceError> {
            self.gpu.copy(to, from, bytes)
        }
    };
    (@load) => {
        fn load(&self, image: &$crate::device::unit::Image, kernels: &[(&str, u32)]) -> Result<Vec<$crate::device::Kernel>, $crate::device::DeviceError> {
            self.gpu.load(image, kernels)
        }
    };
    (@allow_overlap) => {
        fn allow_overlap(&self, kernels: &[$crate::device::Kernel]) {
            self.gpu.allow_overlap(kernels)
        }
    };
    (@set_overlap) => {
        fn set_overlap(&self, on: bool) {
            self.gpu.set_overlap(on)
        }
    };
    (@overlaps) => {
        fn overlaps(&self) -> bool {
            self.gpu.overlaps()
        }
    };
    (@launch) => {
        fn launch(&self, kernel: $crate::device::Kernel, shape: $crate::device::Launch, args: &[u8]) -> Result<(), $crate::device::DeviceError> {
            self.gpu.launch(kernel, shape, args)
        }
    };
    (@sync) => {
        fn sync(&self) -> Result<(), $crate::device::DeviceError> {
            self.gpu.sync()
        }
    };
    (@begin_capture) => {
        fn begin_capture(&self) -> Result<bool, $crate::device::DeviceError> {
            self.gpu.begin_capture()
        }
    };
    (@end_capture) => {
        fn end_capture(&self) -> Result<$crate::device::Graph, $crate::device::DeviceError> {
            self.gpu.end_capture()
        }
    };
    (@abort_capture) => {
        fn abort_capture(&self) -> Result<(), $crate::device::DeviceError> {
            self.gpu.abort_capture()
        }
    };
    (@replay) => {
        fn replay(&self, graph: $crate::device::Graph) -> Result<(), $crate::device::DeviceError> {
            self.gpu.replay(graph)
        }
    };
    (@forget_graph) => {
        fn forget_graph(&self, graph: $crate::device::Graph) -> Result<(), $crate::device::DeviceError> {
            self.gpu.forget_graph(graph)
        }
    };
    (@mark) => {
        fn mark(&self) -> Result<$crate::device::Mark, $crate::device::DeviceError> {
            self.gpu.mark()
        }
    };
    (@seconds_between) => {
        fn seconds_between(&self, from: $crate::device::Mark, to: $crate::device::Mark) -> Result<f64, $crate::device::DeviceError> {
            self.gpu.seconds_between(from, to)
        }
    };
    (@forget_marks) => {
        fn forget_marks(&self) {
            self.gpu.forget_marks()
        }
    };
    (@memory) => {
        fn memory(&self) -> Result<$crate::device::DeviceMemory, $crate::device::DeviceError> {
            self.gpu.memory()
        }
    };
    (@host) => {
        fn host(&self, bytes: usize) -> Result<$crate::device::HostMemory, $crate::device::DeviceError> {
            self.gpu.host(bytes)
        }
    };
    (@send) => {
        fn send(&self, from: &$crate::device::HostMemory, len: usize, to: u64) -> Result<(), $crate::device::DeviceError> {
            self.gpu.send(from, len, to)
        }
    };
    (@is_sent) => {
        fn is_sent(&self, from: &$crate::device::HostMemory, wait: bool) -> Result<bool, $crate::device::DeviceError> {
            self.gpu.is_sent(from, wait)
        }
    };
}
