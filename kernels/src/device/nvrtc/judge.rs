//! What a compiled unit must keep to on every architecture, judged by the compiler's own words and the cubin.

use crate::device::unit::Unit;

/// Shared memory that a block can have on the smallest GPU that is served, static and dynamic together, bytes.
pub const SHARED_MAX: u32 = 101_376;

/// What the compiler says that a kernel takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Registers that are kept in memory instead, bytes stored and loaded.
    pub spilled: u32,
    /// Static shared memory of a block, bytes.
    pub shared: u32,
}

/// What is wrong with a compiled unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("kernel {kernel}: expected {expected}, found {found}")]
pub struct Broken {
    /// Which kernel of it.
    pub kernel: String,
    /// What it must be.
    pub expected: String,
    /// What it is.
    pub found: String,
}

/// Holds a compiled unit against the rules: all its kernels are in the cubin, nothing is spilled, and a block has room
/// for the shared memory that its launches may ask for. `log` is what [`super::Nvrtc::compile`] gave.
/// Gives what each kernel takes, in the unit's order.
pub fn judge(unit: &Unit, cubin: &[u8], log: &str) -> Result<Vec<Resources>, Broken> {
    let all = resources(log);
    let mut out = Vec::new();
    for (name, dynamic) in &unit.kernels {
        let broken = |expected: String, found: String| Broken { kernel: name.clone(), expected, found };
        let found = all.iter().find(|r| r.kernel == *name).filter(|_| has_code(cubin, name));
        let Some(found) = found else {
            let others: Vec<&str> = all.iter().map(|r| r.kernel.as_str()).collect();
            return Err(broken("its code in the cubin".into(), format!("only that of {}", others.join(", "))));
        };
        if found.spilled > 0 {
            let text = format!("{} bytes of them, with {} registers", found.spilled, found.registers);
            return Err(broken("no spilled registers".into(), text));
        }
        if found.shared.saturating_add(*dynamic) > SHARED_MAX {
            let text = format!("{} static and {dynamic} dynamic", found.shared);
            return Err(broken(format!("at most {SHARED_MAX} bytes of shared memory"), text));
        }
        out.push(found.clone());
    }
    Ok(out)
}

/// Every kernel has a section of this name; names of sections stand between zeros.
fn has_code(cubin: &[u8], kernel: &str) -> bool {
    let section = format!("\0.text.{kernel}\0");
    cubin.windows(section.len()).any(|bytes| bytes == section.as_bytes())
}

/// Kernels as `--ptxas-options=-v` tells of them.
fn resources(log: &str) -> Vec<Resources> {
    let mut out: Vec<Resources> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            out.push(Resources { kernel, registers: 0, spilled: 0, shared: 0 });
        }
        let Some(last) = out.last_mut() else { continue };
        let before = |what: &str| number_before(line, what).unwrap_or(0);
        last.spilled += before(" bytes spill stores") + before(" bytes spill loads");
        last.registers = last.registers.max(before(" registers"));
        last.shared = last.shared.max(before(" bytes smem"));
    }
    out
}

/// The number that stands before a word.
fn number_before(line: &str, what: &str) -> Option<u32> {
    let before = &line[..line.find(what)?];
    before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'up' for 'sm_121a'
ptxas info    : Function properties for up
ptxas         .     800 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 800 bytes cumulative stack size
ptxas info    : Compile time = 32.502 ms
ptxas info    : Compiling entry function 'down' for 'sm_121a'
ptxas info    : Function properties for down
ptxas         .     8 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 132 bytes smem
";
    const CUBIN: &[u8] = b"\x7fELF\0.symtab\0.text.up\0.text.down\0.text.upper\0";

    fn unit(kernels: &[(&str, u32)]) -> Unit {
        let kernels = kernels.iter().map(|(name, shared)| ((*name).to_owned(), *shared)).collect();
        Unit { family: "moe", source: "", args: String::new(), defines: Vec::new(), kernels }
    }

    #[test]
    fn the_log_is_read_kernel_by_kernel() {
        let up = Resources { kernel: "up".into(), registers: 24, spilled: 0, shared: 0 };
        let down = Resources { kernel: "down".into(), registers: 255, spilled: 12, shared: 132 };
        assert_eq!(resources(LOG), [up.clone(), down]);
        assert_eq!(judge(&unit(&[("up", SHARED_MAX)]), CUBIN, LOG), Ok(vec![up]));
    }

    #[test]
    fn what_breaks_a_rule_is_named() {
        let wrong = |kernels, log: &str| judge(&unit(kernels), CUBIN, log).unwrap_err().to_string();
        assert!(wrong(&[("up", 0), ("down", 0)], LOG).starts_with("kernel down: expected no spilled registers"));
        let clean = LOG.replace("8 bytes spill stores, 4 ", "0 bytes spill stores, 0 ");
        assert!(wrong(&[("down", SHARED_MAX - 131)], &clean).contains("found 132 static and 101245 dynamic"));
        assert!(judge(&unit(&[("down", SHARED_MAX - 132)]), CUBIN, &clean).is_ok());
        // Neither a longer name nor the compiler's word alone will do.
        assert!(wrong(&[("upp", 0)], LOG).contains("only that of up, down"));
        let other = LOG.replace("'up'", "'upper'");
        assert!(wrong(&[("up", 0)], &other).contains("only that of upper, down"));
    }
}
