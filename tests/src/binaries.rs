//! The two programs, run as a user runs them.

use std::ffi::OsStr;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// The packer.
pub const DSV4C: &str = "dsv4c";
/// The runtime.
pub const DSV4_RUN: &str = "dsv4-run";
/// No command of a test may take longer.
const LIMIT: Duration = Duration::from_secs(60);
const TICK: Duration = Duration::from_millis(2);

/// Where `cargo build --bins` of this test's profile puts a program.
pub fn path(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program's path");
    // A test program lies in target/PROFILE/deps.
    let place = test.ancestors().nth(2).expect("a target directory").join(name);
    assert!(place.is_file(), "{} is missing: first run `cargo build --release --bins`", place.display());
    place
}

/// What a finished program left.
#[derive(Clone, Debug)]
pub struct Ran {
    /// Exit code; none when a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
    /// From start to the end of its output.
    pub took: Duration,
}

/// A program that runs. Killed when dropped.
pub struct Running {
    child: Child,
    out: Output,
    err: Output,
    started: Instant,
}

struct Output {
    text: Arc<Mutex<Vec<u8>>>,
    reader: JoinHandle<()>,
}

impl Output {
    fn of(mut pipe: impl Read + Send + 'static) -> Output {
        let text = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&text);
        let reader = std::thread::spawn(move || {
            let mut part = [0; 4096];
            while let Ok(n @ 1..) = pipe.read(&mut part) {
                into.lock().expect("no reader panics").extend_from_slice(&part[..n]);
            }
        });
        Output { text, reader }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("no reader panics")).into_owned()
    }
}

/// Starts a program without input.
pub fn start<A: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = A>) -> Running {
    start_with(name, args, &[])
}

/// The same, with variables in its environment.
pub fn start_with<A: AsRef<OsStr>>(
    name: &str,
    args: impl IntoIterator<Item = A>,
    variables: &[(&str, &str)],
) -> Running {
    let mut command = Command::new(path(name));
    command
        .args(args)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let started = Instant::now();
    let mut child = command.spawn().unwrap_or_else(|e| panic!("{name}: {e}"));
    let out = Output::of(child.stdout.take().expect("piped"));
    let err = Output::of(child.stderr.take().expect("piped"));
    Running { child, out, err, started }
}

/// Runs a program to its end.
pub fn run<A: AsRef<OsStr>>(name: &str, args: impl IntoIterator<Item = A>) -> Ran {
    start(name, args).finish()
}

impl Running {
    /// Waits for the program and everything it started: only then its pipes end.
    pub fn finish(mut self) -> Ran {
        let mut code = None;
        while code.is_none() || !self.out.reader.is_finished() || !self.err.reader.is_finished() {
            assert!(self.started.elapsed() < LIMIT, "still running, {code:?}: {}{}", self.out(), self.err());
            code = code.or_else(|| self.child.try_wait().expect("a child of ours").map(|status| status.code()));
            std::thread::sleep(TICK);
        }
        Ran { code: code.flatten(), out: self.out(), err: self.err(), took: self.started.elapsed() }
    }

    /// Standard output so far.
    pub fn out(&self) -> String {
        self.out.so_far()
    }

    /// Standard error so far.
    pub fn err(&self) -> String {
        self.err.so_far()
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until the program has written `bytes` to standard output.
    pub fn await_output(&mut self, bytes: usize) {
        while self.out().len() < bytes {
            let ended = self.child.try_wait().expect("a child of ours");
            assert!(ended.is_none(), "ended with {ended:?}: {}", self.err());
            assert!(self.started.elapsed() < LIMIT, "no output: {}", self.err());
            std::thread::sleep(TICK);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ended_already = self.child.kill();
        let _reaped_already = self.child.wait();
    }
}

/// Kills a process as the kernel would when memory runs out.
pub fn kill(process: u32) {
    let process = Pid::from_raw(process as i32).expect("a process id");
    kill_process(process, Signal::KILL).expect("a process to kill");
}

/// The processes that `parent` has started and that still run.
pub fn children(parent: u32) -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").expect("/proc");
    let ids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| state(*id).is_some_and(|(_, of)| of == parent)).collect()
}

/// Whether a process runs (a zombie does not).
pub fn is_running(process: u32) -> bool {
    state(process).is_some_and(|(state, _)| state != 'Z')
}

/// State and parent of a process.
fn state(process: u32) -> Option<(char, u32)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name in parentheses may itself hold anything.
    let mut fields = stat[stat.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

impl Ran {
    /// Requires success; gives standard output.
    pub fn ok(&self) -> &str {
        assert_eq!(self.code, Some(0), "{self:?}");
        &self.out
    }

    /// Requires a failure with `code`, nothing on standard output, and an error message that has every
    /// one of `words` and says what to do; unless ranks were lost (5), one message alone.
    pub fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.out, "", "{self:#?}");
        self.says(words);
        let messages = self.err.lines().filter(|line| line.starts_with("error: ")).count();
        assert!(messages == 1 || code == 5, "{messages} messages in {self:#?}");
    }

    /// Requires an error message that has every one of `words` and says what to do.
    pub fn says(&self, words: &[&str]) {
        println!("{}", self.err.trim_end());
        for word in ["error: ", "\n  help: "].iter().chain(words) {
            assert!(self.err.contains(word), "no {word:?} in {self:#?}");
        }
    }
}
