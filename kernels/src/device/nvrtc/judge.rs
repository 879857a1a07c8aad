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
    let all = told(log);
    let mut out = Vec::new();
    for (name, dynamic) in &unit.kernels {
        let broken = |expected: String, found: String| Broken { kernel: name.clone(), expected, found };
        let found = all.iter().find(|r| r.kernel == *name).filter(|_| has_code(cubin, name));
        let Some(found) = found else {
            let others: Vec<&str> = all.iter().map(|r| r.kernel.as_str()).collect();
            return Err(broken("its code in the cubin".into(), format!("only that of {}", others.join(", "))));
        };
        let (Some(spilled), Some((registers, shared))) = (found.spilled, found.used) else {
            let lines = [("spills", found.spilled.is_none()), ("registers and shared memory", found.used.is_none())];
            let silent: Vec<&str> = lines.into_iter().filter(|(_, silent)| *silent).map(|(what, _)| what).collect();
            let expected = "the compiler's word on all that it takes".into();
            return Err(broken(expected, format!("none on its {}", silent.join(", "))));
        };
        if spilled > 0 {
            let text = format!("{spilled} bytes of them, with {registers} registers");
            return Err(broken("no spilled registers".into(), text));
        }
        if shared.saturating_add(*dynamic) > SHARED_MAX {
            let text = format!("{shared} static and {dynamic} dynamic");
            return Err(broken(format!("at most {SHARED_MAX} bytes of shared memory"), text));
        }
        out.push(Resources { kernel: name.clone(), registers, spilled, shared });
    }
    Ok(out)
}

/// Every kernel has a section of this name; names of sections stand between zeros.
fn has_code(cubin: &[u8], kernel: &str) -> bool {
    let section = format!("\0.text.{kernel}\0");
    cubin.windows(section.len()).any(|bytes| bytes == section.as_bytes())
}

/// What the log says of a kernel; nothing where it says nothing.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    kernel: String,
    spilled: Option<u32>,
    /// Registers and shared memory.
    used: Option<(u32, u32)>,
}

/// Kernels as `--ptxas-options=-v` tells of them.
fn told(log: &str) -> Vec<Told> {
    let mut out: Vec<Told> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            out.push(Told { kernel, spilled: None, used: None });
        }
        let Some(last) = out.last_mut() else { continue };
        let before = |what: &str| number_before(line, what);
        if let (Some(stored), Some(loaded)) = (before(" bytes spill stores"), before(" bytes spill loads")) {
            last.spilled = Some(last.spilled.unwrap_or(0).saturating_add(stored).saturating_add(loaded));
        }
        // A kernel without shared memory has no word on it in this line.
        let shared = if line.contains(" smem") { before(" bytes smem") } else { Some(0) };
        if let (Some(registers), Some(shared)) = (before(" registers"), shared) {
            let (most, largest) = last.used.unwrap_or_default();
            last.used = Some((most.max(registers), largest.max(shared)));
        }
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
        let told_of = |kernel: &str, spilled, used| Told { kernel: kernel.into(), spilled, used };
        let down = told_of("down", Some(12), Some((255, 132)));
        assert_eq!(told(LOG), [told_of("up", Some(0), Some((24, 0))), down]);
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

    #[test]
    fn silence_is_no_word_of_nothing() {
        let without = |words: &str| {
            let log: Vec<&str> = LOG.lines().filter(|line| !line.contains(words)).collect();
            judge(&unit(&[("up", 0)]), CUBIN, &log.join("\n")).unwrap_err().found
        };
        assert_eq!(without("spill stores"), "none on its spills");
        assert_eq!(without("Used"), "none on its registers and shared memory");
        // Words that are there and say no number are none either.
        let down = |from: &str, to: &str| {
            let log = LOG.replace("8 bytes spill stores, 4 ", "0 bytes spill stores, 0 ").replace(from, to);
            judge(&unit(&[("down", 0)]), CUBIN, &log).map_err(|broken| broken.found)
        };
        assert!(down("", "").is_ok());
        let no_use = Err("none on its registers and shared memory".to_owned());
        assert_eq!(down("132 bytes smem", "4294967296 bytes smem"), no_use);
        assert_eq!(down("132 bytes smem", "132 KB smem"), no_use);
        assert_eq!(down("0 bytes spill loads", "no spill loads"), Err("none on its spills".to_owned()));
        let most = down("0 bytes spill stores, 0 ", "4294967295 bytes spill stores, 4 ").unwrap_err();
        assert!(most.starts_with("4294967295 bytes"), "{most}");
    }
}
