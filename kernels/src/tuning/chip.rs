//! What a cost model has to know of a GPU.

/// Limits and rates of a chip. Rates are what copies and products reach, not what data sheets promise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Chip {
    /// For people.
    pub name: &'static str,
    /// As compilers name it.
    pub arch: &'static str,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Cycles a second.
    pub clock: f64,
    /// Bytes a second of memory that a streaming kernel reaches.
    pub dram: f64,
    /// Bytes a second of the L2 cache.
    pub l2: f64,
    /// Bytes of the L2 cache.
    pub l2_bytes: u64,
    /// Shared memory of a multiprocessor, bytes.
    pub shared: u32,
    /// Registers of a multiprocessor.
    pub registers: u32,
    /// Resident warps and blocks of a multiprocessor.
    pub warps: u32,
    /// Resident blocks.
    pub blocks: u32,
    /// Floating-point operations per cycle of a multiprocessor's `mma.sync` of 16-bit operands with float32 sums.
    pub mma: f64,
    /// Latency of memory, seconds.
    pub latency: f64,
    /// Between two kernels of a stream, seconds.
    pub launch: f64,
}

/// NVIDIA GB10 (DGX Spark). No kernel of this project ran on one: memory rate and clock are published by readers,
/// latency is assumed, a launch taken for that of an H100.
pub const GB10: Chip = Chip {
    name: "GB10",
    arch: "sm_121a",
    multiprocessors: 48,
    clock: 2.4e9,
    dram: 232e9,
    l2: 2.0e12,
    l2_bytes: 24 << 20,
    shared: 100 << 10,
    registers: 64 << 10,
    warps: 48,
    blocks: 24,
    // 119 TFLOP/s.
    mma: 1024.0,
    latency: 0.9e-6,
    launch: 1.5e-6,
};

/// NVIDIA H100 SXM (80 GB): what tables are measured on where there is no GB10.
pub const H100: Chip = Chip {
    name: "H100",
    arch: "sm_90a",
    multiprocessors: 132,
    clock: 1.75e9,
    dram: 3.0e12,
    l2: 5.5e12,
    l2_bytes: 50 << 20,
    shared: 228 << 10,
    registers: 64 << 10,
    warps: 64,
    blocks: 32,
    // `mma.sync` reaches about 62 % of the 989 TFLOP/s that this chip has for `wgmma`.
    mma: 2560.0,
    latency: 0.75e-6,
    launch: 1.5e-6,
};

/// The chip of an architecture, where its numbers are known.
pub fn of(arch: &str) -> Option<Chip> {
    [GB10, H100].into_iter().find(|chip| chip.arch == arch)
}
