//! Registers and shared memory of compiled kernels, out of what the compiler says.

/// What a kernel takes of a multiprocessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread.
    pub registers: u32,
    /// Shared memory that is not asked for at the launch, bytes.
    pub shared: u32,
    /// Bytes of registers that are kept in memory.
    pub spilled: u32,
}

/// Of one kernel of a unit, by the log of `--ptxas-options=-v`; none if the log does not tell.
pub fn of(log: &str, kernel: &str) -> Option<Resources> {
    let start = log.find(&format!("Compiling entry function '{kernel}'"))?;
    let part = &log[start..];
    // The next kernel's part starts with the same words.
    let part = part[1..].find("Compiling entry function").map_or(part, |end| &part[..end]);
    let before = |unit: &str| -> Option<u32> {
        let at = part.find(unit)?;
        part[..at].rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    Some(Resources {
        registers: before(" registers")?,
        shared: before(" bytes smem").unwrap_or(0),
        spilled: before(" bytes spill stores").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_read_by_kernel() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'a' for 'sm_90a'\nptxas info    : Function properties for a\n    \
            0 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
            ptxas info    : Used 96 registers, used 1 barriers, 48 bytes smem\nptxas info    : Compile time = 1 ms\n\
            ptxas info    : Compiling entry function 'ab' for 'sm_90a'\n    \
            0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
            ptxas info    : Used 40 registers, used 0 barriers\n";
        assert_eq!(of(log, "a"), Some(Resources { registers: 96, shared: 48, spilled: 8 }));
        assert_eq!(of(log, "ab"), Some(Resources { registers: 40, shared: 0, spilled: 0 }));
        assert_eq!(of(log, "b"), None);
    }
}
