//! The verb `serve`: an artifact behind HTTP. Rank 0's main thread computes, another one speaks with clients.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dsv4_model::Draft;
use serde_json::Value;
use tokio::runtime::Runtime;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::chat::Profile;
use crate::cli::ServeArgs;
use crate::compute::Compute;
use crate::error::RunError;
use crate::load::Opened;
use crate::preflight::command::largest_start;
use crate::scheduler::{self, Limits, Policy, Scheduler};
use crate::server::{Bound, ModelInfo, ServerConfig, bind};
use crate::session::{Session, read_input};
use crate::terminal::tell;
use crate::tokenizer::Tokenizer;
use crate::verbs::{Chosen, Sequences, check_draft, context, tokenizer, with_session};

/// Drafts of a step where nothing is said: on a GPU a row more costs little, on a CPU nearly a step.
const GPU_DRAFT: usize = 3;
/// Longest file of keys.
const KEYS_BYTES_MAX: u64 = 1 << 20;
/// Threads that speak with clients: they wait more than they work.
const SERVER_THREADS: usize = 2;
/// Fewer tokens of context than this are worth no server.
const CONTEXT_MIN: usize = 1024;

/// What is there before weights are loaded.
struct Prepared {
    runtime: Runtime,
    bound: Bound,
    tokenizer: Arc<Tokenizer>,
    limits: Limits,
    policy: Policy,
}

/// Serves until SIGTERM or Ctrl-C, then ends what runs; a second one ends at once.
pub fn serve(artifact: &Path, args: &ServeArgs) -> Result<(), RunError> {
    let prepare = |chosen: &Chosen| {
        let opened = &chosen.opened;
        let tokenizer = tokenizer(opened, "serve")?;
        let draft = draft(opened, &chosen.compute, args)?;
        let count = usize::from(args.max_seqs);
        let tokens = tokens(chosen, args, count)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(SERVER_THREADS)
            .enable_all()
            .build()
            .map_err(|source| RunError::Threads { threads: SERVER_THREADS, reason: source.to_string() })?;
        // An address that is taken is known before gigabytes are read.
        let bound = runtime.block_on(bind(config(args, draft)?))?;
        let sequences = chosen.admit_all(&args.common, Sequences { tokens, count }, false)?;
        let limits = Limits { queue: args.max_queue as usize, running: count, context: tokens };
        let policy = Policy {
            chunk: chosen.chunk,
            decode_bound: Duration::from_millis(args.decode_bound_ms.into()),
            eos: opened.config.eos_token_id as u32,
        };
        Ok((Prepared { runtime, bound, tokenizer, limits, policy }, sequences))
    };
    with_session(artifact, &args.common, prepare, |session, prepared| run(session, prepared, artifact, args))
}

fn run(session: &mut Session, prepared: Prepared, artifact: &Path, args: &ServeArgs) -> Result<(), RunError> {
    let Prepared { runtime, bound, tokenizer, limits, policy } = prepared;
    let model = Arc::new(model(session, tokenizer, artifact, args));
    let (scheduler, intake) = scheduler::new(limits);
    let (ended, computing) = oneshot::channel::<()>();
    let signals = runtime.block_on(async { Signals::new() });
    let mut signals = signals.map_err(|source| RunError::Io {
        action: "listening to",
        file: "signals".into(),
        source,
        help: "start it outside of what forbids that",
    })?;
    if !args.common.quiet {
        tell(&format!(
            "serving {} at http://{}/v1, {} tokens of context, {} sequences at once\n",
            model.name,
            bound.address(),
            limits.context,
            limits.running
        ));
    }
    let quiet = args.common.quiet;
    let server = std::thread::spawn(move || {
        // Whatever ends the server ends the rest.
        let _draining = Drain(scheduler.clone());
        runtime.block_on(async move {
            let shutdown = async move {
                tokio::select! {
                    () = signals.next() => {}
                    _ = computing => return,
                }
                if !quiet {
                    tell("ending: what runs or waits is finished, nothing new is taken; once more ends at once\n");
                }
                tokio::spawn(async move {
                    signals.next().await;
                    std::process::exit(130);
                });
            };
            bound.serve(model, scheduler, shutdown).await
        })
    });
    let worked = scheduler::work(session, &intake, policy);
    drop((intake, ended));
    let served = server.join();
    worked?;
    match served {
        Ok(result) => Ok(result?),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Lets nothing more in when it is dropped, also by a panic.
struct Drain(Scheduler);

impl Drop for Drain {
    fn drop(&mut self) {
        self.0.drain();
    }
}

/// What asks this program to end.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn config(args: &ServeArgs, draft: usize) -> Result<ServerConfig, RunError> {
    let mut api_keys = Vec::new();
    if let Some(file) = &args.api_key_file {
        let bytes = read_input(file, KEYS_BYTES_MAX)?;
        let text = String::from_utf8_lossy(&bytes);
        api_keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
        if api_keys.is_empty() {
            return Err(RunError::Input {
                file: file.clone(),
                expected: "a key a line".into(),
                found: "none".into(),
                help: "write one, for example what `openssl rand -hex 24` prints",
            });
        }
    }
    Ok(ServerConfig {
        api_keys,
        cors_origins: args.cors_origin.clone(),
        draft,
        body_bytes_max: usize::try_from(args.max_body).unwrap_or(usize::MAX),
        answer_within: args.answer_within.map(Duration::from_secs),
        ..ServerConfig::new(SocketAddr::new(args.host, args.port))
    })
}

fn draft(opened: &Opened, compute: &Compute, args: &ServeArgs) -> Result<usize, RunError> {
    match args.draft {
        Some(0) => Ok(0),
        Some(draft) => check_draft(opened, "--draft").map(|()| draft.into()),
        None if matches!(compute, Compute::Gpu(_)) && opened.config.draft == Draft::Mtp => Ok(GPU_DRAFT),
        None => Ok(0),
    }
}

/// Tokens of the longest sequence: what is asked for, else what the model allows and memory holds `count` times.
fn tokens(chosen: &Chosen, args: &ServeArgs, count: usize) -> Result<usize, RunError> {
    let most = context(&chosen.opened, &args.common)?;
    if args.common.max_context.is_some() {
        return Ok(most);
    }
    // Where not even little fits, the plan's refusal says so with all numbers.
    let fits = largest_start(&chosen.opened, &args.common, &chosen.compute, most, count)?;
    // What others take meanwhile must not refuse the start.
    let fits = fits.map(|tokens| if tokens < most { tokens - tokens / 32 } else { tokens });
    Ok(fits.filter(|tokens| *tokens >= CONTEXT_MIN.min(most)).unwrap_or(most))
}

fn model(session: &Session, tokenizer: Arc<Tokenizer>, artifact: &Path, args: &ServeArgs) -> ModelInfo {
    let config = session.opened.config.clone();
    let is_0731 = matches!(config.draft, Draft::DSpark { .. });
    let stem = artifact.canonicalize().ok().and_then(|path| Some(path.file_stem()?.to_string_lossy().into_owned()));
    let name = args.model_name.clone().or(stem).unwrap_or_else(|| "dsv4".into());
    let root = if is_0731 { "deepseek-ai/DeepSeek-V4-Flash-0731" } else { "deepseek-ai/DeepSeek-V4-Flash" };
    ModelInfo {
        tokenizer,
        config,
        profile: if is_0731 { Profile::V0731 } else { Profile::Preview },
        aliases: vec![root.to_owned()],
        root: root.to_owned(),
        name,
        artifact: session.opened.artifact.manifest().artifact_id.to_string(),
        backend: session.backend.clone(),
        numerics: Value::from(dsv4_kernels::numerics::Numerics::from(args.common.numerics).name()),
    }
}
