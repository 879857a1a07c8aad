//! The verbs and their flags. Usage errors leave with exit code 2, see `CompileError::exit_code`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use dsv4_format::Artifact;
use dsv4c::CompileError;
use dsv4c::checkpoint::Config;
use dsv4c::inspect;
use dsv4c::pack::{MEMORY_DEFAULT, PackOptions, pack};
use dsv4c::plan::Plan;
use dsv4c::synth::{Layers, SynthOptions, synth};
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
    /// Packs a checkpoint into an artifact.
    Pack(PackArgs),
    /// Says what a pack would write; reads no weights.
    Plan {
        /// A config.json, or a directory with one.
        config: PathBuf,
        /// Number of ranks.
        #[arg(long, value_parser = tp)]
        tp: u32,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
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
        /// For programs.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct PackArgs {
    /// Directory with config.json and the *.safetensors files.
    checkpoint: PathBuf,
    /// Number of ranks.
    #[arg(long, value_parser = tp)]
    tp: u32,
    /// The artifact's directory [default: the checkpoint's name, with .dsv4, here].
    #[arg(short, long)]
    out: Option<PathBuf>,
    /// GPU architectures to compile kernels for; `none` packs weights only.
    #[arg(long, default_value = "none")]
    arch: String,
    /// Write only this rank's file; the ids are those of all.
    #[arg(long)]
    rank: Option<u32>,
    /// Threads that read and cut [default: one per processor].
    #[arg(long)]
    jobs: Option<NonZeroUsize>,
    /// Bytes of memory to use, with an optional K, M or G.
    #[arg(long, value_parser = bytes, default_value_t = MEMORY_DEFAULT)]
    memory: u64,
    /// Replace another artifact of that name.
    #[arg(long)]
    force: bool,
    /// Discard what an interrupted pack left (every pack does: none is resumed).
    #[arg(long)]
    fresh: bool,
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
            refuse_arch(&args.arch)?;
            let options = PackOptions {
                checkpoint: args.checkpoint,
                out: args.out,
                tp: args.tp,
                rank: args.rank,
                jobs: args.jobs,
                memory: args.memory,
                force: args.force,
            };
            let report = pack(&options, &bar)?;
            print(args.json, || report.to_json(), || report.to_text());
        }
        Verb::Plan { config, tp, json } => {
            let plan = Plan::new(&Config::read(&config)?, tp)?;
            print(json, || plan.to_json(), || plan.to_text());
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
            print(args.json, || report.to_json(), || report.to_text());
        }
        Verb::Inspect { artifact, json } => {
            let artifact = Artifact::open(&artifact)?;
            print(json, || inspect::to_json(&artifact), || inspect::to_text(&artifact));
        }
        Verb::Verify { artifact, json } => {
            let artifact = Artifact::open(&artifact)?;
            let report = artifact.verify(&bar)?;
            let id = artifact.manifest().artifact_id;
            let value = || {
                json!({
                    "artifact_id": id.to_string(), "ranks": report.ranks, "absent": report.absent,
                    "bytes": report.bytes, "signed": report.signed,
                })
            };
            let absent = if report.absent.is_empty() { String::new() } else { format!(", absent {:?}", report.absent) };
            let text = || format!("{id}: {} bytes are as packed, ranks {:?}{absent}\n", report.bytes, report.ranks);
            print(json, value, text);
        }
    }
    Ok(())
}

fn print(json: bool, value: impl FnOnce() -> Value, text: impl FnOnce() -> String) {
    if json {
        println!("{}", value());
    } else {
        print!("{}", text());
    }
}

fn refuse_arch(arch: &str) -> Result<(), CompileError> {
    if arch == "none" {
        return Ok(());
    }
    Err(CompileError::Usage {
        what: "--arch",
        expected: "none".into(),
        found: arch.to_owned(),
        help: "this build compiles no kernels; pack with --arch none for the CPU backend",
    })
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

fn layers(text: &str) -> Result<Layers, String> {
    let expected = "expected a number of layers, or a list such as 2,3";
    if !text.contains(',') {
        return text.parse().map(Layers::First).map_err(|_| expected.into());
    }
    let list = text.strip_suffix(',').unwrap_or(text);
    list.split(',').map(|n| n.trim().parse()).collect::<Result<_, _>>().map(Layers::List).map_err(|_| expected.into())
}
