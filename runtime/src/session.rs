//! Ranks brought to life: found or started, compared, loaded, ready for commands.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dsv4_format::{LoadOptions, LoadReport, Progress};
use dsv4_kernels::collective::{Alone, Collective};
use dsv4_kernels::gpu::GpuOptions;
use dsv4_kernels::numerics::Numerics;
use serde_json::Value;

use crate::cli::IoArg;
use crate::compute::{Compute, Device};
use crate::error::RunError;
use crate::generate::DRAFT_MAX;
use crate::gpu::Ready;
use crate::load::{Opened, RankOptions, floor, load_watched, summary};
use crate::preflight::admit;
use crate::preflight::host::Host;
use crate::preflight::memory::Asked;
use crate::ranks::wire::WireError;
use crate::ranks::{self, Control, ControlReceiver, Deadlines, Facts, LocalRanks, Mesh, TcpCollective, Token};
use crate::step::{Engine, Rank, Setup};
use crate::terminal::tell;

/// How long ranks wait for each other's weights.
const LOAD_WITHIN: Duration = Duration::from_secs(3600);
/// How long a local rank may take to end after the last command.
const END_WITHIN: Duration = Duration::from_secs(5);
/// Most sequences at once.
pub const SEQUENCES_MAX: u32 = 256;

/// Where the ranks are.
#[derive(Clone, Debug)]
pub enum Places {
    /// All of them processes on this machine, started by this one.
    Local,
    /// This process was started by rank 0 on this machine.
    Child { rank: u32, leader: SocketAddr },
    /// One process each, at these addresses.
    Peers { rank: u32, peers: Vec<String>, within: Duration },
}

/// What every rank must be told alike.
#[derive(Clone)]
pub struct Settings {
    /// The artifact directory.
    pub artifact: PathBuf,
    /// What computes.
    pub compute: Compute,
    /// Tokens of the longest sequence. A GPU reserves its caches for it; rank 0's holds for all ranks.
    pub context: usize,
    /// Sequences at once; rank 0's number holds for all ranks.
    pub sequences: usize,
    /// Activation arithmetic.
    pub numerics: Numerics,
    /// Rows of a prefill step.
    pub chunk: usize,
    /// Compute threads of this process.
    pub threads: usize,
    /// How the disk is read.
    pub io: IoArg,
    /// Bytes of memory below which loading waits.
    pub floor: Option<u64>,
    /// Bytes of memory to leave to others.
    pub reserve: Option<u64>,
    /// Nothing is told.
    pub quiet: bool,
    /// Where the ranks are.
    pub places: Places,
}

/// Rank 0, ready.
pub struct Session {
    /// The artifact and its model.
    pub opened: Opened,
    /// All ranks.
    pub engine: Engine,
    /// What computes, for programs.
    pub backend: Value,
    locals: Option<LocalRanks>,
}

/// What [`start`] made of this process.
pub enum Started {
    /// Rank 0.
    Leader(Box<Session>),
    /// Another rank, that now serves rank 0 until the end.
    Worker(Box<Rank>, ControlReceiver),
}

/// Connects the ranks of an opened artifact and loads this one's weights.
///
/// The ranks compare artifact and settings before a weight byte is read. Errors: a rank file, a peer that
/// differs or does not come, memory.
pub fn start(opened: Opened, settings: &Settings, progress: &dyn Progress) -> Result<Started, RunError> {
    let tp = opened.artifact.manifest().tp;
    let facts = facts(&opened, settings);
    let mut locals = None;
    let (mesh, local_ranks) = match &settings.places {
        Places::Local if tp == 1 => (None, 1),
        Places::Local => {
            // A file that is missing or cut is known now, and told as what it is.
            for rank in 0..tp {
                opened.require_rank(rank)?;
            }
            let exe = std::env::current_exe().map_err(|source| RunError::Io {
                action: "finding",
                file: PathBuf::from("dsv4-run"),
                source,
                help: "start the ranks by hand with --rank and --peers",
            })?;
            let mut ranks = LocalRanks::spawn(&exe, &child_arguments(settings, tp), tp)?;
            let mesh = ranks.connect(facts, Deadlines::default())?;
            locals = Some(ranks);
            (Some(mesh), tp)
        }
        Places::Child { rank, leader } => {
            // Standard input ends when rank 0 does, also while this rank computes.
            let seat = ranks::join_local(*rank, *leader, std::io::stdin(), || std::process::exit(5))?;
            (Some(seat.connect(facts, Deadlines::default())?), tp)
        }
        Places::Peers { rank, peers, within } => {
            check_peers(*rank, peers, tp)?;
            // This rank's own file, before others wait for it.
            opened.require_rank(*rank)?;
            // The same for everybody: the link between machines is private, and what must be equal is a fact,
            // so that a difference is told with both values.
            let token = Token::new([0; 32]);
            let deadlines = Deadlines { connect: *within, ..Deadlines::default() };
            (Some(ranks::connect(*rank, peers, token, facts, deadlines)?), 1)
        }
    };
    start_threads(settings, local_ranks)?;
    let (mut collective, mut control) = match mesh {
        None => (None, None),
        Some(Mesh { collective, control }) => (Some(collective), Some(control)),
    };
    let rank = match &settings.compute {
        Compute::Cpu => load_cpu(&opened, settings, &mut collective, &mut control, progress),
        Compute::Gpu(device) => load_gpu(&opened, settings, device, &mut collective, &mut control, progress),
    };
    let rank = rank.map_err(|error| explain(&mut locals, error))?;
    let sender = match control {
        Some(Control::Worker(receiver)) => return Ok(Started::Worker(Box::new(rank), receiver)),
        Some(Control::Leader(sender)) => Some(sender),
        None => None,
    };
    let backend = settings.compute.to_json(&opened.artifact);
    Ok(Started::Leader(Box::new(Session { opened, engine: Engine::new(rank, sender), backend, locals })))
}

/// This rank of a group, or the only one.
fn rank_of(collective: &Option<TcpCollective>) -> u32 {
    collective.as_ref().map_or(0, Collective::rank)
}

fn boxed(collective: Option<TcpCollective>) -> Box<dyn Collective> {
    collective.map_or(Box::new(Alone), |collective| Box::new(collective))
}

/// Waits for the other ranks to come as far as this one.
fn meet(collective: &mut Option<TcpCollective>) -> Result<(), RunError> {
    Ok(collective.as_mut().map_or(Ok(()), |collective| collective.barrier(LOAD_WITHIN))?)
}

fn load_cpu(
    opened: &Opened,
    settings: &Settings,
    collective: &mut Option<TcpCollective>,
    control: &mut Option<Control>,
    progress: &dyn Progress,
) -> Result<Rank, RunError> {
    let rank = rank_of(collective);
    let setup = agree(opened, settings, rank, control)?;
    let (arena, report) = load_watched(&opened.artifact, rank, &load_options(settings), progress)?;
    tell_loaded(settings, rank, &report);
    meet(collective)?;
    let options =
        RankOptions { numerics: settings.numerics, slots: setup.sequences as usize, rows_max: rows_max(settings) };
    Ok(opened.backend(arena, boxed(collective.take()), options)?.into())
}

fn load_gpu(
    opened: &Opened,
    settings: &Settings,
    device: &Device,
    collective: &mut Option<TcpCollective>,
    control: &mut Option<Control>,
    progress: &dyn Progress,
) -> Result<Rank, RunError> {
    let rank = rank_of(collective);
    let setup = agree(opened, settings, rank, control)?;
    if !settings.quiet {
        tell(&settings.compute.line(rank, &opened.artifact));
    }
    let Setup { context, sequences } = setup;
    let rows_max = rows_max(settings) as u32;
    let options = GpuOptions { slots: sequences, context, rows_max, solo: false, graphs: true };
    let mut ready = Ready::new(opened, device.gpu.clone(), rank, settings.numerics, options)?;
    if !settings.quiet {
        tell(&ready.verdicts());
    }
    // Whoever has too little memory says so before anybody reads gigabytes.
    meet(collective)?;
    if let Some(collective) = collective {
        ready.agree(collective)?;
    }
    if !settings.quiet {
        tell(ready.outcome());
    }
    let (loaded, report) = ready.load(opened, &load_options(settings), progress)?;
    tell_loaded(settings, rank, &report);
    meet(collective)?;
    Ok(loaded.backend(boxed(collective.take())).into())
}

/// For what all ranks reserve caches: rank 0 knows what it will ask for. On a machine of its own a rank sees
/// only now whether that fits.
fn agree(opened: &Opened, settings: &Settings, rank: u32, control: &mut Option<Control>) -> Result<Setup, RunError> {
    let to_u32 = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let own = Setup { context: to_u32(settings.context), sequences: to_u32(settings.sequences) };
    let setup = match control {
        None => own,
        Some(Control::Leader(sender)) => {
            sender.send_control(&own.encode())?;
            own
        }
        Some(Control::Worker(receiver)) => {
            let ended = WireError::Short { field: "context", offset: 0, left: 0, needed: 8 };
            let Setup { context, sequences } = Setup::decode(&receiver.recv_control()?.ok_or(ended)?)?;
            let model = u32::try_from(opened.config.max_position_embeddings).unwrap_or(u32::MAX);
            Setup { context: context.min(model), sequences: sequences.clamp(1, SEQUENCES_MAX) }
        }
    };
    if matches!(settings.places, Places::Peers { .. }) && rank > 0 {
        let asked = Asked {
            target: settings.compute.target(),
            context: setup.context.into(),
            sequences: setup.sequences.into(),
            chunk: settings.chunk as u64,
            threads: settings.threads as u64,
            numerics: settings.numerics,
            all_logits: false,
            reserve: settings.reserve,
        };
        admit(opened, &[rank], &asked, &settings.compute.host(Path::new("/")))?;
    }
    Ok(setup)
}

fn load_options(settings: &Settings) -> LoadOptions<'static> {
    let floor = floor(settings.floor, settings.reserve, &Host::for_memory(Path::new("/")), settings.compute.target());
    LoadOptions { io: settings.io.into(), threads: settings.threads, floor, ..LoadOptions::default() }
}

fn tell_loaded(settings: &Settings, rank: u32, report: &LoadReport) {
    if !settings.quiet {
        tell(&summary(rank, report));
    }
}

fn check_peers(rank: u32, peers: &[String], tp: u32) -> Result<(), RunError> {
    let usage = |what: String, help: String| Err(RunError::Usage(format!("{what}\n  help: {help}")));
    if peers.len() != tp as usize {
        let what = format!("--peers lists {} ranks, the artifact was packed for {tp}", peers.len());
        return usage(what, format!("give --peers {tp} addresses, rank 0 first"));
    }
    if rank >= tp {
        return usage(format!("--rank {rank}: expected a rank below {tp}"), "ranks are counted from 0".into());
    }
    let port = |peer: &&String| peer.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match peers.iter().find(|p| !port(p)) {
        Some(peer) => {
            usage(format!("--peers: {peer}: expected HOST:PORT"), "name the port that rank listens on".into())
        }
        None => Ok(()),
    }
}

/// Most rows of a step: one verifies up to DRAFT_MAX drafts behind a decided token, however small the chunks are.
fn rows_max(settings: &Settings) -> usize {
    settings.chunk.max(1 + DRAFT_MAX)
}

/// What must be equal on all ranks.
fn facts(opened: &Opened, settings: &Settings) -> Facts {
    let m = opened.artifact.manifest();
    let mut facts = vec![
        ("artifact_id", m.artifact_id.to_string()),
        ("weight_set_id", m.weight_set_id.to_string()),
        ("weight_contract", m.weight_contract.to_string()),
        ("op_contract", m.op_contract.to_string()),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("numerics", settings.numerics.name().to_owned()),
        ("chunk", settings.chunk.to_string()),
    ];
    facts.extend(settings.compute.facts(&Host::for_memory(Path::new("/"))));
    facts.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn child_arguments(settings: &Settings, tp: u32) -> Vec<OsString> {
    let mut arguments = vec![settings.artifact.clone().into_os_string()];
    let threads = (settings.threads / tp as usize).max(1).to_string();
    let chunk = settings.chunk.to_string();
    let flags = ["worker", "--quiet", "--numerics", settings.numerics.name(), "--chunk", &chunk, "--threads", &threads];
    arguments.extend(flags.iter().map(OsString::from));
    arguments.extend(["--backend", settings.compute.name()].map(OsString::from));
    arguments.extend(["--io", settings.io.name()].map(OsString::from));
    let numbers = [("--floor", settings.floor), ("--reserve", settings.reserve)];
    for (flag, bytes) in numbers.into_iter().filter_map(|(flag, bytes)| Some((flag, bytes?))) {
        arguments.extend([flag.into(), bytes.to_string().into()]);
    }
    arguments
}

/// Threads are shared out among the ranks of a machine.
fn start_threads(settings: &Settings, local_ranks: u32) -> Result<(), RunError> {
    let threads = match settings.places {
        Places::Child { .. } => settings.threads,
        _ => (settings.threads / local_ranks as usize).max(1),
    };
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build_global()
        .map_err(|e| RunError::Threads { threads, reason: e.to_string() })
}

/// A better error than a lost connection, where a local rank has just ended.
fn explain(locals: &mut Option<LocalRanks>, error: RunError) -> RunError {
    let ended = locals.as_mut().filter(|_| error.loses_ranks()).and_then(|l| l.find_ended(Duration::from_secs(1)));
    ended.map_or(error, RunError::Peer)
}

impl Session {
    /// A better error than a lost connection, where a local rank has just ended.
    pub fn explain(&mut self, error: RunError) -> RunError {
        explain(&mut self.locals, error)
    }

    /// Looks, without waiting, whether all ranks are still there; for while nothing is computed.
    pub fn check(&mut self) -> Result<(), RunError> {
        self.locals.as_mut().map_or(Ok(()), LocalRanks::check)?;
        self.engine.check()
    }

    /// Ends all ranks in order.
    pub fn close(self) -> Result<(), RunError> {
        self.engine.close()?;
        match self.locals {
            Some(locals) => Ok(locals.finish(END_WITHIN)?),
            None => Ok(()),
        }
    }
}

/// Reads a file of the user's, at most `limit` bytes.
pub fn read_input(file: &Path, limit: u64) -> Result<Vec<u8>, RunError> {
    use std::io::Read;
    let failed = |source| RunError::Io { action: "reading", file: file.to_owned(), source, help: "check the path" };
    let opened = std::fs::File::open(file).map_err(failed)?;
    let mut bytes = Vec::new();
    opened.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(RunError::Input {
            file: file.to_owned(),
            expected: format!("at most {limit} bytes"),
            found: "more".into(),
            help: "give a smaller file",
        });
    }
    Ok(bytes)
}
