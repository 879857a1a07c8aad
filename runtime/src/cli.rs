//! Arguments of `dsv4-run`.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dsv4_format::Io;
use dsv4_kernels::numerics::Numerics;

/// Runs a packed DeepSeek-V4 artifact.
#[derive(Parser, Debug)]
#[command(name = "dsv4-run", version, about)]
pub struct Cli {
    /// The artifact directory (NAME.dsv4); every command but doctor needs it
    pub artifact: Option<PathBuf>,
    /// Without one the artifact is served
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Serves the artifact over HTTP: OpenAI's and Anthropic's APIs, and a page
    Serve(ServeArgs),
    /// Answers one prompt or conversation
    Generate(GenerateArgs),
    /// Talks in the terminal
    Chat(ChatArgs),
    /// Writes the logits of given tokens
    Logits(LogitsArgs),
    /// Says whether the artifact would run here: memory, files, disk, machine; loads nothing
    Check(CheckArgs),
    /// Loads one rank's weights, says how fast, and frees them
    Load(LoadArgs),
    /// Measures steps on a GPU: decode and prefill, by context
    Bench(BenchArgs),
    /// Says what is wrong with this machine; needs no artifact
    Doctor(DoctorArgs),
    /// Serves rank 0 as another rank, with --rank and --peers
    Worker(WorkerArgs),
}

#[derive(Args, Debug)]
pub struct Common {
    /// What computes; auto: a GPU if there is one and the artifact has kernels, else the CPU
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,
    /// Activation arithmetic: exact float32, or as published (FP8/FP4 activations)
    #[arg(long, value_enum, default_value_t = NumericsArg::Published)]
    pub numerics: NumericsArg,
    /// Compute threads of this process and the ranks it starts [default: all cores]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Prompt tokens per prefill step [default: 256, on a GPU 2048]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=8192))]
    pub chunk: Option<u32>,
    /// Most tokens of prompt and answer [default: what the model allows]
    #[arg(long)]
    pub max_context: Option<usize>,
    /// Bytes of memory to leave to others, with an optional K, M or G; 0 starts without looking at memory
    /// [default: 6G on a GB10, nothing of a GPU's own memory, else 5 % of the machine, at least 256M, at most 6G]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub reserve: Option<u64>,
    /// How the disk is read: io_uring, threads, or io_uring where it is allowed
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Bytes of memory below which loading waits, and after 5 s gives up, with an optional K, M or G; 0 for none
    /// [default: 512M, on small machines less; 4G where a GPU has the machine's memory]
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub floor: Option<u64>,
    /// This process's rank, with --peers
    #[arg(long, requires = "peers")]
    pub rank: Option<u32>,
    /// HOST:PORT of every rank in order, this one included, with --rank
    #[arg(long, value_delimiter = ',', requires = "rank")]
    pub peers: Vec<String>,
    /// Seconds to wait for the other ranks
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    pub peer_timeout: u64,
    /// No progress, no summary
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Backend {
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NumericsArg {
    Float,
    Published,
}

impl From<NumericsArg> for Numerics {
    fn from(arg: NumericsArg) -> Numerics {
        match arg {
            NumericsArg::Float => Numerics::Float,
            NumericsArg::Published => Numerics::Published,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoArg {
    Auto,
    Uring,
    Threads,
}

impl IoArg {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            IoArg::Auto => "auto",
            IoArg::Uring => "uring",
            IoArg::Threads => "threads",
        }
    }
}

impl From<IoArg> for Io {
    fn from(arg: IoArg) -> Io {
        match arg {
            IoArg::Auto => Io::Auto,
            IoArg::Uring => Io::Uring,
            IoArg::Threads => Io::Threads,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EffortArg {
    Low,
    High,
    Max,
}

#[derive(Args, Debug)]
pub struct AnswerArgs {
    /// Let the model reason before it answers; the reasoning goes to standard error
    #[arg(long)]
    pub thinking: bool,
    /// How hard to think, with --thinking
    #[arg(long, value_enum, requires = "thinking")]
    pub reasoning_effort: Option<EffortArg>,
    /// Most tokens of the answer [default: the rest of the context]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: Option<u32>,
    /// 0 always takes the likeliest token
    #[arg(long, default_value_t = 0.0, value_parser = temperature, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Choose among the likeliest tokens with this much probability
    #[arg(long, default_value_t = 1.0, value_parser = probability, allow_negative_numbers = true)]
    pub top_p: f32,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Most tokens to draft per step; never changes the answer
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=15))]
    pub draft: u16,
}

#[derive(Args, Debug)]
pub struct ServeArgs {
    /// Address to listen at; one that other machines reach needs --api-key-file
    #[arg(long, default_value = "127.0.0.1")]
    pub host: IpAddr,
    /// Port to listen at; 0 takes a free one, and says which
    #[arg(long, default_value_t = 8000)]
    pub port: u16,
    /// File with the keys that clients may use, one a line
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Web pages of this origin may ask, e.g. https://chat.example; several times
    #[arg(long, value_name = "ORIGIN")]
    pub cors_origin: Vec<String>,
    /// Name of the model for clients [default: the artifact's]
    #[arg(long)]
    pub model_name: Option<String>,
    /// Sequences that are computed at once; caches are reserved for all of them
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub max_seqs: u16,
    /// Requests that may wait; more are refused (429)
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub max_queue: u32,
    /// Bytes of a request's body, with an optional K, M or G
    #[arg(long, value_name = "BYTES", value_parser = bytes, default_value = "64M")]
    pub max_body: u64,
    /// Longest that an answer may take, waiting included, seconds [default: as long as it takes]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub answer_within: Option<u64>,
    /// How long a running stream may wait for somebody's prompt, milliseconds
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub decode_bound_ms: u32,
    /// Most tokens to draft per step; fewer are where they do not pay. Never changes an answer
    /// [default: 3 on a GPU with a model that drafts, else 0]
    #[arg(long, value_parser = clap::value_parser!(u16).range(0..=15))]
    pub draft: Option<u16>,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args, Debug)]
#[command(group = clap::ArgGroup::new("input").args(["prompt", "messages"]).required(true))]
pub struct GenerateArgs {
    /// One user message
    #[arg(long)]
    pub prompt: Option<String>,
    /// JSON file: a list of messages in OpenAI form, or an object with "messages" and "tools"
    #[arg(long)]
    pub messages: Option<PathBuf>,
    /// JSON file: a list of tools in OpenAI form
    #[arg(long)]
    pub tools: Option<PathBuf>,
    /// Print one JSON object with everything
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args, Debug)]
pub struct ChatArgs {
    /// System message
    #[arg(long)]
    pub system: Option<String>,
    #[command(flatten)]
    pub answer: AnswerArgs,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args, Debug)]
pub struct LogitsArgs {
    /// JSON file: a list of token ids
    #[arg(long)]
    pub tokens: PathBuf,
    /// safetensors file to write: "logits" [n, vocab] F32
    #[arg(short, long)]
    pub output: PathBuf,
    /// Also "mtp" [n-1, vocab]: row p predicts token p+2
    #[arg(long)]
    pub mtp: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Sequences at once
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub max_seqs: u32,
    /// Print one JSON object with everything
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub common: Common,
}

#[derive(Args, Debug)]
pub struct LoadArgs {
    /// Which rank
    #[arg(long, default_value_t = 0)]
    pub rank: u32,
    /// Into whose memory; auto: a GPU's if there is one and the artifact has kernels, else the CPU's
    #[arg(long, value_enum, default_value_t = Backend::Auto)]
    pub backend: Backend,
    /// How the disk is read: io_uring, threads, or io_uring where it is allowed
    #[arg(long, value_enum, default_value_t = IoArg::Auto)]
    pub io: IoArg,
    /// Reads of 4 MiB under way at once [default: 16 with io_uring, else 8]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub queue_depth: Option<u16>,
    /// Through a ring of slots and a copy, as into memory that the disk cannot write
    #[arg(long)]
    pub staged: bool,
    /// Threads that hash [default: all cores, at most 8]
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Bytes of memory to leave to others, with an optional K, M or G; 0 loads without looking at memory first
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub reserve: Option<u64>,
    /// Bytes of memory below which loading waits, and after 5 s gives up, with an optional K, M or G; 0 for none
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub floor: Option<u64>,
    /// Print one JSON object with everything
    #[arg(long)]
    pub json: bool,
    /// No progress
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct BenchArgs {
    /// One rank without the others: sums over ranks are left out. An artifact of one rank needs no such leave
    #[arg(long)]
    pub solo: bool,
    /// Which rank, with --solo
    #[arg(long, default_value_t = 0)]
    pub rank: u32,
    /// Positions before a decode step
    #[arg(long, value_delimiter = ',', default_values_t = [0, 8 << 10, 64 << 10, 200 << 10], value_name = "TOKENS")]
    pub context: Vec<u32>,
    /// Rows of a decode step; 0 for none
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8], value_parser = clap::value_parser!(u32).range(0..=16))]
    pub rows: Vec<u32>,
    /// Rows of a prefill step; 0 for none
    #[arg(long, value_delimiter = ',', default_values_t = [2 << 10, 8 << 10], value_parser = clap::value_parser!(u32).range(0..=8192))]
    pub chunk: Vec<u32>,
    /// Positions before a prefill step
    #[arg(long, value_delimiter = ',', default_values_t = [0, 32 << 10, 128 << 10], value_name = "TOKENS")]
    pub depth: Vec<u32>,
    /// Steps that are timed in each place; the median counts
    #[arg(long, default_value_t = 21, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub steps: u32,
    /// Time of every kernel, by name
    #[arg(long)]
    pub profile: bool,
    /// Make weights from this seed instead of loading them
    #[arg(long)]
    pub weights_seed: Option<u64>,
    /// Activation arithmetic
    #[arg(long, value_enum, default_value_t = NumericsArg::Published)]
    pub numerics: NumericsArg,
    /// Bytes of memory to leave to others, with an optional K, M or G; 0 starts without looking at memory
    #[arg(long, value_name = "BYTES", value_parser = bytes)]
    pub reserve: Option<u64>,
    /// No progress
    #[arg(long)]
    pub quiet: bool,
}

#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print one JSON object with everything
    #[arg(long)]
    pub json: bool,
}

#[derive(Args, Debug)]
pub struct WorkerArgs {
    #[command(flatten)]
    pub common: Common,
    /// Given by rank 0 to the ranks it starts itself
    #[arg(long, hide = true, requires = "local_leader")]
    pub local_rank: Option<u32>,
    #[arg(long, hide = true, requires = "local_rank")]
    pub local_leader: Option<SocketAddr>,
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

fn temperature(text: &str) -> Result<f32, String> {
    in_range(text, 0.0, 100.0)
}

fn probability(text: &str) -> Result<f32, String> {
    in_range(text, 1e-6, 1.0)
}

fn in_range(text: &str, low: f32, high: f32) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("expected a number in {low}..={high}"))?;
    if (low..=high).contains(&value) { Ok(value) } else { Err(format!("expected a number in {low}..={high}")) }
}
