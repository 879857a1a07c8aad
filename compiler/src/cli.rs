//! The verbs and their flags. Usage errors leave with exit code 2, see `CompileError::exit_code`.

use std::io::{ErrorKind, Write};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand, ValueEnum};
use dsv4_format::Artifact;
use dsv4_kernels::memory::Target;
use dsv4c::CompileError;
use dsv4c::checkpoint::Config;
use dsv4c::diff::diff;
use dsv4c::inspect;
use dsv4c::kernels::add::{AddOptions, add};
use dsv4c::kernels::{ARCH_DEFAULT, is_arch};
use dsv4c::pack::{
    JOURNAL_EVERY_DEFAULT, MEMORY_DEFAULT, PackOptions, PackReport, WeightlessOptions, pack_and_tell, pack_weightless,
};
use dsv4c::plan::Plan;
use dsv4c::plan::forecast::{Forecast, ForecastOptions};
use dsv4c::push::{self, PushOptions, Ranks, ReceiveOptions, Receiver, Token};
use dsv4c::sign::{Verifier, keygen, sign};
use dsv4c::synth::{Layers, SynthOptions, synth};
use dsv4c::tune::{TuneArgs, tune};
use serde_json::{Value, json};

use crate::bar::Bar;

/// Compiles DeepSeek-V4 checkpoints into artifacts that dsv4-run serves.
#[derive(Parser)]
#[command(name = "dsv4c", version)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// No progress on stderr.
    #[arg(long, global = true)]
    quiet: bool,
}

#[derive(Subcommand)]
enum Verb {
    /// Packs a checkpoint into an artifact: weights cut for its ranks, and GPU kernels compiled for them.
    ///
    /// After a kill, a power loss or a failed disk the same command goes on where the journal ends; other
    /// threads, memory and marks are the same command.
    Pack(PackArgs),
    /// Compiles GPU kernels for an artifact that is there: for one more architecture, or as this version of the program
    /// and its tuning tables have them. Rank files are neither read nor written.
    ///
    /// The artifact gets another id. Other machines need the same kernels: run this there too, or `dsv4c push` to a
    /// `receive --force`, which sends only what is new.
    Kernels(KernelsArgs),
    /// Says what a pack would write, and whether disk and memory suffice; reads no weights.
    ///
    /// Exit code 0 whatever the answer; programs read `forecast.fits` of --json.
    Plan(PlanArgs),
    /// Makes a random checkpoint of a config, in the true formats.
    Synth(SynthArgs),
    /// Shows what an artifact holds; reads no weights.
    Inspect {
        /// The artifact.
        artifact: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Reads an artifact whole and checks every byte of it.
    Verify {
        /// The artifact.
        artifact: PathBuf,
        /// Require a signature that this public key (a .pub file) confirms.
        #[arg(long)]
        key: Option<PathBuf>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Says why two artifacts differ. Exit code 0: the same; 3: they differ (and stdout says how) or
    /// cannot be read (and stdout is empty).
    ///
    /// The same means: equal artifact ids, which cover everything that can change a token. Weights
    /// are read only in blocks whose hashes differ. Of every kind of difference the first 20 are shown.
    Diff {
        /// One artifact.
        a: PathBuf,
        /// Another.
        b: PathBuf,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Makes a key pair to sign artifacts with, in minisign's formats and without a password.
    ///
    /// Writes NAME.key, which is secret, and NAME.pub, which verifies. Existing files are never overwritten.
    Keygen {
        /// Path of both files without `.key` and `.pub`.
        #[arg(short, long)]
        out: PathBuf,
    },
    /// Signs an artifact: writes its SIGNATURE, which `minisign -V` accepts for its MANIFEST.
    Sign {
        /// The artifact.
        artifact: PathBuf,
        /// The secret key, a .key file.
        #[arg(long)]
        key: PathBuf,
        /// Replace a signature that is there.
        #[arg(long)]
        force: bool,
    },
    /// Sends ranks of an artifact to another machine, where `dsv4c receive` waits.
    ///
    /// Only what is missing there is sent: after an interruption the same command resumes.
    Push(PushArgs),
    /// Waits for one `dsv4c push` and writes what it sends; a rank may join the same artifact later.
    Receive(ReceiveArgs),
    /// Chooses among equal kernels: measures them on this machine's GPU, or estimates for one that is elsewhere.
    ///
    /// Points are compiled, checked against one another, timed with weights that come from memory, and the best become
    /// a table. `--predict` and `--validate` need neither GPU nor compiler.
    Tune(TuneArgs),
}

#[derive(Args)]
struct PlanArgs {
    /// A config.json, or a directory with one.
    config: PathBuf,
    /// Number of ranks, each on a machine of its own.
    #[arg(long, value_parser = tp)]
    tp: u32,
    /// Tokens of a sequence, prompt and answer [default: what the model allows].
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    max_context: Option<u64>,
    /// Sequences at once.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    max_seqs: u32,
    /// Whose memory is planned: the CPU backend's as it is, or the GPU backend's as it is designed.
    #[arg(long, value_enum, default_value_t = Backend::Cpu)]
    backend: Backend,
    /// Memory that each machine shows, with an optional K, M or G [default: 119G, a GB10].
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    memory_of: Option<u64>,
    /// Where the artifact would be: says whether the disk there has room.
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// Gigabytes (10^9 bytes) a second of the disk [default: 5.58, the slowest published of a GB10].
    #[arg(long, value_parser = rate)]
    disk_gb_s: Option<f64>,
    /// For programs.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Backend {
    Cpu,
    Cuda,
}

#[derive(Args)]
struct PushArgs {
    /// The artifact.
    artifact: PathBuf,
    /// HOST:PORT of the receiver.
    peer: String,
    /// Send this rank (may be repeated) [default: all that are here].
    #[arg(long, conflicts_with = "all")]
    rank: Vec<u32>,
    /// Send every rank; an error if one is not here.
    #[arg(long)]
    all: bool,
    /// File with a secret that the receiver has, too.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// The summary for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct ReceiveArgs {
    /// Address to listen at, HOST:PORT.
    #[arg(long)]
    listen: String,
    /// The artifact's directory, NAME.dsv4.
    #[arg(short, long)]
    out: PathBuf,
    /// File with a secret (16 bytes or more) that a sender must have. Without it whoever reaches the
    /// port may send; nothing is encrypted either way.
    #[arg(long)]
    token_file: Option<PathBuf>,
    /// Take only what is signed with this public key (a .pub file).
    #[arg(long)]
    key: Option<PathBuf>,
    /// Replace another artifact of that name, or repair the same.
    #[arg(long)]
    force: bool,
    /// The summary for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct PackArgs {
    /// Directory with config.json and the *.safetensors files.
    #[arg(required_unless_present = "config")]
    checkpoint: Option<PathBuf>,
    /// Pack no weights, only the kernels of this config.json: an artifact for `dsv4-run bench`.
    #[arg(long, requires_all = ["weights_seed", "out"], conflicts_with_all = [
        "checkpoint", "rank", "sha256", "memory", "no_verify", "journal_every",
    ])]
    config: Option<PathBuf>,
    /// What the bench makes the weights from.
    #[arg(long, value_name = "SEED", requires = "config")]
    weights_seed: Option<u64>,
    /// Number of ranks.
    #[arg(long, value_parser = tp)]
    tp: u32,
    /// The artifact's directory [default: the checkpoint's name, with .dsv4, here].
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// GPU architectures to compile kernels for, such as sm_121a,sm_90a; `none` packs for the CPU alone.
    #[arg(long, value_name = "A,B", value_parser = arches, default_value = ARCH_DEFAULT)]
    arch: Arches,
    /// Directory of NVRTC 13.0.88 [default: where scripts/setup cuda puts it, or a CUDA toolkit's].
    #[arg(long, value_name = "DIR")]
    nvrtc: Option<PathBuf>,
    /// Write only this rank's file; the ids are those of all.
    #[arg(long)]
    rank: Option<u32>,
    /// Threads that compile (8 at most), then read and cut [default: one per processor].
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Bytes of memory to use, with an optional K, M or G.
    #[arg(long, value_parser = bytes, default_value_t = MEMORY_DEFAULT)]
    memory: u64,
    /// Replace another artifact of that name.
    #[arg(long)]
    force: bool,
    /// First check the files that this list names, in the format that sha256sum writes.
    #[arg(long, value_name = "LIST")]
    sha256: Option<PathBuf>,
    /// Do not read back what this run wrote before it gets its name. (What an interrupted one wrote is read back.)
    #[arg(long)]
    no_verify: bool,
    /// Discard what an interrupted pack or receive left under this name, whatever it is of.
    #[arg(long)]
    fresh: bool,
    /// Bytes written between two marks of the journal, with an optional K, M or G; an interruption costs
    /// about twice as many.
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value_t = JOURNAL_EVERY_DEFAULT)]
    journal_every: u64,
    /// The summary for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct KernelsArgs {
    /// The artifact.
    artifact: PathBuf,
    /// Architectures, such as sm_121a,sm_90a [default: those it has kernels for, or sm_121a].
    #[arg(long, value_name = "A,B", value_parser = some_arches)]
    arch: Option<Arches>,
    /// Directory of NVRTC 13.0.88 [default: where scripts/setup cuda puts it, or a CUDA toolkit's].
    #[arg(long, value_name = "DIR")]
    nvrtc: Option<PathBuf>,
    /// A tuning table to use in place of this program's, for the architecture that it is of.
    #[arg(long, value_name = "FILE")]
    tuning: Option<PathBuf>,
    /// Threads that compile, 8 at most [default: one per processor].
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Drop the artifact's signature, which is of the kernels as they are.
    #[arg(long)]
    force: bool,
    /// The summary for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct SynthArgs {
    /// A config.json, or a directory with one.
    config: PathBuf,
    /// The new checkpoint's directory.
    #[arg(short, long)]
    out: PathBuf,
    /// Keep the first N layers, or those of a list (`2,3`; a single one: `2,`). The draft block stays.
    #[arg(long, value_parser = layers)]
    layers: Option<Layers>,
    /// Names the random numbers.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Number of files [default: one for every 4 GiB].
    #[arg(long)]
    shards: Option<usize>,
    /// The summary for programs.
    #[arg(long)]
    json: bool,
}

/// Parses the command line and does what it says.
pub fn run() -> Result<(), CompileError> {
    let cli = Cli::parse();
    let bar = Bar::new(cli.quiet);
    match cli.verb {
        Verb::Pack(args) => {
            let json = args.json;
            let report = run_pack(args, &bar, cli.quiet)?;
            note_cache(cli.quiet);
            print(json, || report.to_json(), || report.to_text())?;
        }
        Verb::Kernels(args) => {
            let options = AddOptions {
                artifact: args.artifact,
                arches: args.arch.map_or(Vec::new(), |list| list.0),
                nvrtc: args.nvrtc,
                tuning: args.tuning,
                jobs: args.jobs,
                force: args.force,
            };
            let report = add(&options, &bar)?;
            print(args.json, || report.to_json(), || report.to_text())?;
        }
        Verb::Plan(args) => {
            let options = ForecastOptions {
                target: match args.backend {
                    Backend::Cpu => Target::Cpu,
                    Backend::Cuda => Target::Cuda,
                },
                context: args.max_context,
                sequences: args.max_seqs.into(),
                memory: args.memory_of,
                out: args.out,
                disk_rate: args.disk_gb_s.map(|gigabytes| gigabytes * 1e9),
            };
            let config = Config::read(&args.config)?;
            let plan = Plan::new(&config, args.tp)?;
            let forecast = Forecast::new(&config, &plan, &options)?;
            print(args.json, || plan.to_json(&forecast), || plan.to_text(&forecast))?;
        }
        Verb::Synth(args) => {
            let options = SynthOptions {
                config: args.config,
                out: args.out,
                layers: args.layers.unwrap_or(Layers::All),
                seed: args.seed,
                shards: args.shards,
            };
            let report = synth(&options, &bar)?;
            print(args.json, || report.to_json(), || report.to_text())?;
        }
        Verb::Inspect { artifact, json } => {
            let artifact = Artifact::open(&artifact)?;
            print(json, || inspect::to_json(&artifact), || inspect::to_text(&artifact))?;
        }
        Verb::Verify { artifact, key, json } => {
            let artifact = Artifact::open(&artifact)?;
            // Before the long part: who is not to be believed need not be read.
            let signed = key.map(|key| Verifier::read(&key)?.check(&artifact)).transpose()?;
            let report = artifact.verify(&bar)?;
            note_cache(cli.quiet);
            let signature = match &signed {
                Some(signed) => json!({"key": signed.key.to_string(), "comment": signed.comment}),
                None if report.signed => json!("unchecked"),
                None => Value::Null,
            };
            let id = artifact.manifest().artifact_id;
            let value = || {
                json!({
                    "artifact_id": id.to_string(), "ranks": report.ranks, "absent": report.absent,
                    "bytes": report.bytes, "weights_seed": report.weights_seed, "signed": report.signed, "signature": signature,
                })
            };
            let absent = if report.absent.is_empty() { String::new() } else { format!(", absent {:?}", report.absent) };
            let signature = match &signed {
                Some(signed) => format!("signed with key {}: {}\n", signed.key, signed.comment.replace('\t', ", ")),
                None if report.signed => "signed; the signature is unchecked without --key\n".into(),
                None => String::new(),
            };
            let (bytes, ranks) = (report.bytes, report.ranks.clone());
            let weights = match report.weights_seed {
                Some(seed) => format!("no weights (they are made from seed {seed})"),
                None => format!("ranks {ranks:?}{absent}"),
            };
            print(json, value, || format!("{id}: {bytes} bytes are as packed, {weights}\n{signature}"))?;
        }
        Verb::Diff { a, b, json } => {
            let found = diff(&Artifact::open(&a)?, &Artifact::open(&b)?, &bar)?;
            print(json, || found.to_json(), || found.to_text())?;
            found.require_equal()?;
        }
        Verb::Keygen { out } => {
            let key = keygen(&out)?;
            write_out(&format!(
                "{} is secret, {} verifies; key {}\n",
                key.secret.display(),
                key.public.display(),
                key.id
            ))?;
        }
        Verb::Sign { artifact, key, force } => {
            let artifact = Artifact::open(&artifact)?;
            let signed = sign(&artifact, &key, force)?;
            write_out(&format!("{}: signed with key {}\n", artifact.manifest().artifact_id, signed.key))?;
        }
        Verb::Push(args) => {
            let which = match (args.all, args.rank.is_empty()) {
                (true, _) => Ranks::All,
                (false, true) => Ranks::Present,
                (false, false) => Ranks::These(args.rank),
            };
            let options = PushOptions {
                artifact: args.artifact,
                which,
                token: token(args.token_file.as_deref())?,
                timeout: push::TIMEOUT,
            };
            let sent = push::push(&options, &args.peer, &bar)?;
            print(args.json, || sent.to_json(), || sent.to_text())?;
        }
        Verb::Receive(args) => {
            let options = ReceiveOptions {
                out: args.out,
                token: token(args.token_file.as_deref())?,
                key: args.key.as_deref().map(Verifier::read).transpose()?,
                force: args.force,
                timeout: push::TIMEOUT,
            };
            let receiver = Receiver::bind(&args.listen, options)?;
            // With port 0 only the system knows which one it is.
            tell(&format!("waiting at {}", receiver.address()?));
            let received = receiver.accept(&bar, &tell)?;
            print(args.json, || received.to_json(), || received.to_text())?;
        }
        Verb::Tune(args) => {
            let report = tune(&args, &|line| {
                if !cli.quiet {
                    tell(line)
                }
            })?;
            print(args.json, || report.to_json(), || report.to_text())?;
        }
    }
    Ok(())
}

fn run_pack(args: PackArgs, bar: &Bar, quiet: bool) -> Result<PackReport, CompileError> {
    let checkpoint = match (args.config, args.weights_seed, args.checkpoint) {
        (Some(config), Some(seed), _) => {
            let options = WeightlessOptions {
                config,
                seed,
                out: args.out.unwrap_or_default(),
                tp: args.tp,
                arches: args.arch.0,
                nvrtc: args.nvrtc,
                jobs: args.jobs,
                force: args.force,
                fresh: args.fresh,
            };
            return pack_weightless(&options, bar);
        }
        (_, _, checkpoint) => checkpoint.unwrap_or_default(),
    };
    let options = PackOptions {
        checkpoint,
        out: args.out,
        tp: args.tp,
        rank: args.rank,
        arches: args.arch.0,
        nvrtc: args.nvrtc,
        jobs: args.jobs,
        memory: args.memory,
        force: args.force,
        sha256: args.sha256,
        read_back: !args.no_verify,
        fresh: args.fresh,
        journal_every: args.journal_every,
    };
    pack_and_tell(&options, bar, &|line| {
        if !quiet {
            tell(line)
        }
    })
}

/// Says once that files had to go through the page cache.
fn note_cache(quiet: bool) {
    if let Some(note) = dsv4_format::io::cache_note().filter(|_| !quiet) {
        tell(&format!("note: {note}"));
    }
}

/// A line for people on stderr. Where that leads nowhere there is nobody to tell.
fn tell(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn token(file: Option<&Path>) -> Result<Token, CompileError> {
    file.map_or_else(|| Ok(Token::none()), Token::read)
}

fn print(json: bool, value: impl FnOnce() -> Value, text: impl FnOnce() -> String) -> Result<(), CompileError> {
    write_out(&if json { format!("{}\n", value()) } else { text() })
}

/// Results. A reader that went away has what it wanted: that is no error.
fn write_out(text: &str) -> Result<(), CompileError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(CompileError::Stdout { source }),
        _ => Ok(()),
    }
}

/// Names of GPU architectures, ascending.
#[derive(Clone)]
struct Arches(Vec<String>);

fn arches(text: &str) -> Result<Arches, String> {
    if text == "none" {
        return Ok(Arches(Vec::new()));
    }
    let mut list: Vec<String> = text.split(',').map(|arch| arch.trim().to_owned()).collect();
    if !list.iter().all(|arch| is_arch(arch)) {
        return Err("expected architectures such as sm_121a,sm_90a, or none for the CPU alone".into());
    }
    list.sort();
    list.dedup();
    Ok(Arches(list))
}

fn some_arches(text: &str) -> Result<Arches, String> {
    let list = arches(text)?;
    if list.0.is_empty() { Err("expected architectures such as sm_121a,sm_90a".into()) } else { Ok(list) }
}

fn tp(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(tp @ (1 | 2 | 4 | 8)) => Ok(tp),
        _ => Err("expected 1, 2, 4 or 8".into()),
    }
}

fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| "expected a number of bytes, such as 512M or 2G".into())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| (1e-3..=1e3).contains(rate));
    rate.ok_or_else(|| "expected a number in 0.001..=1000".into())
}

fn layers(text: &str) -> Result<Layers, String> {
    let expected = "expected a number of layers, or a list such as 2,3";
    if !text.contains(',') {
        return text.parse().map(Layers::First).map_err(|_| expected.into());
    }
    let list = text.strip_suffix(',').unwrap_or(text);
    list.split(',').map(|n| n.trim().parse()).collect::<Result<_, _>>().map(Layers::List).map_err(|_| expected.into())
}
