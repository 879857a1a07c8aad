//! What each verb does.

use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use clap::Parser;
use dsv4_format::NoProgress;
use dsv4_kernels::ops::Mat;
use dsv4_model::{Draft, Tp};
use serde_json::{Value, json};

use crate::answer::{Answer, AnswerOptions, answer, prompt, room, stats_json, tokens_per_second};
use crate::bench::run_bench;
use crate::chat::{Effort, Message, Role, merge_tools, parse_messages};
use crate::cli::{AnswerArgs, ChatArgs, Cli, Common, EffortArg, GenerateArgs, LogitsArgs, Verb, WorkerArgs};
use crate::compute::{Compute, choose, cuda};
use crate::error::RunError;
use crate::generate::{Part, prefill};
use crate::gpu::require_kernels;
use crate::load::{Opened, open, run_load};
use crate::preflight::command::{admit_start, run_check, run_doctor};
use crate::progress::Bar;
use crate::sample::Sampling;
use crate::serve::serve;
use crate::session::{Places, Session, Settings, Started, read_input, start};
use crate::stall;
use crate::step::Command;
use crate::tensor_file::TensorFile;
use crate::terminal::{Printer, print_now, tell};
use crate::tokenizer::Tokenizer;

/// Longest JSON file that is read: messages, tools, token ids.
const INPUT_BYTES_MAX: u64 = 256 << 20;

/// Runs the command line.
pub fn run(cli: Cli) -> Result<(), RunError> {
    let artifact = || {
        cli.artifact.as_deref().ok_or_else(|| {
            let help = "name it before the command: dsv4-run NAME.dsv4 generate --prompt TEXT";
            RunError::Usage(format!("ARTIFACT is missing\n  help: {help}"))
        })
    };
    let Some(verb) = &cli.verb else {
        // As all options of `serve` are when nothing is said.
        let Some(Verb::Serve(args)) = Cli::parse_from(["dsv4-run", "serve"]).verb else { return Ok(()) };
        return serve(artifact()?, &args);
    };
    match verb {
        Verb::Serve(args) => serve(artifact()?, args),
        Verb::Generate(args) => generate(artifact()?, args),
        Verb::Chat(args) => chat(artifact()?, args),
        Verb::Logits(args) => logits(artifact()?, args),
        Verb::Check(args) => run_check(artifact()?, args),
        Verb::Load(args) => run_load(artifact()?, args),
        Verb::Bench(args) => run_bench(artifact()?, args),
        Verb::Doctor(args) => run_doctor(args),
        Verb::Worker(args) => worker(artifact()?, args),
    }
}

/// An artifact, and what computes.
pub(crate) struct Chosen {
    pub opened: Opened,
    pub compute: Compute,
    /// Rows of a prefill step.
    pub chunk: usize,
}

impl Chosen {
    /// Opens an artifact and decides what computes for the `local_rank`th rank of this machine.
    fn new(artifact: &Path, common: &Common, local_rank: u32) -> Result<Chosen, RunError> {
        let opened = open(artifact)?;
        if common.rank.is_none() {
            // Without weights nothing else is worth a word. (A rank with peers is judged with their addresses.)
            opened.require_rank(local_rank)?;
        }
        let (compute, note) = choose(common.backend, &opened.artifact, &|| cuda(local_rank))?;
        if let (Some(note), false) = (note, common.quiet) {
            tell(&note);
        }
        if let Compute::Gpu(device) = &compute {
            // Before other ranks are started, who would all say the same.
            let tp = Tp::new(0, opened.artifact.manifest().tp)?;
            require_kernels(&opened, device.gpu.as_ref(), tp, common.numerics.into())?;
        }
        let chunk = compute.chunk(common.chunk) as usize;
        Ok(Chosen { opened, compute, chunk })
    }

    /// Refuses a sequence of `tokens` tokens that does not fit into memory; else it is what the session is for.
    fn admit(&self, common: &Common, tokens: usize, all_logits: bool) -> Result<Sequences, RunError> {
        let sequences = Sequences { tokens, count: 1 };
        self.admit_all(common, sequences, all_logits)
    }

    /// The same of several at once.
    pub fn admit_all(&self, common: &Common, sequences: Sequences, all_logits: bool) -> Result<Sequences, RunError> {
        let Sequences { tokens, count } = sequences;
        admit_start(&self.opened, common, &self.compute, tokens, count, all_logits).map(|()| sequences)
    }
}

/// What caches are reserved for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sequences {
    /// Of the longest.
    pub tokens: usize,
    /// At once.
    pub count: usize,
}

/// Starts the ranks for `sequences`. `None` after this process has served as a rank other than 0.
fn begin(
    chosen: Chosen,
    artifact: &Path,
    common: &Common,
    places: Places,
    sequences: Sequences,
) -> Result<Option<Box<Session>>, RunError> {
    let Chosen { opened, compute, chunk } = chosen;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = Settings {
        artifact: artifact.to_owned(),
        compute,
        context: sequences.tokens,
        sequences: sequences.count,
        numerics: common.numerics.into(),
        chunk,
        threads: common.threads.map_or(cores, usize::from),
        io: common.io,
        floor: common.floor,
        reserve: common.reserve,
        quiet: common.quiet,
        places,
    };
    if let (Places::Peers { rank, peers, .. }, false) = (&settings.places, common.quiet) {
        tell(&format!("rank {rank} of {}: waiting for the others, up to {} s\n", peers.len(), common.peer_timeout));
    }
    match start(opened, &settings, &Bar::new(common.quiet))? {
        Started::Leader(session) => Ok(Some(session)),
        Started::Worker(rank, control) => {
            if !common.quiet {
                tell("loaded; serving rank 0\n");
            }
            rank.work(control).map(|()| None)
        }
    }
}

/// Where `common`'s options say that the ranks are.
fn places(common: &Common) -> Places {
    match common.rank {
        None => Places::Local,
        Some(rank) => {
            Places::Peers { rank, peers: common.peers.clone(), within: Duration::from_secs(common.peer_timeout) }
        }
    }
}

fn worker(artifact: &Path, args: &WorkerArgs) -> Result<(), RunError> {
    let places = match (args.local_rank, args.local_leader, args.common.rank) {
        (Some(rank), Some(leader), _) => Places::Child { rank, leader },
        (_, _, Some(1..)) => places(&args.common),
        _ => {
            let what = "worker: expected --rank R (1 or more) and --peers with every rank's address";
            return Err(RunError::Usage(format!("{what}\n  help: rank 0 runs serve, generate, chat or logits")));
        }
    };
    let local_rank = args.local_rank.unwrap_or(0);
    begin(
        Chosen::new(artifact, &args.common, local_rank)?,
        artifact,
        &args.common,
        places,
        Sequences { tokens: 1, count: 1 },
    )
    .map(|_| ())
}

/// Opens the artifact, lets `prepare` refuse what cannot be done, and only then loads weights: runs `f` on
/// rank 0 and ends all ranks. An error of a rank that ended says more than a lost connection.
pub(crate) fn with_session<T>(
    artifact: &Path,
    common: &Common,
    prepare: impl FnOnce(&Chosen) -> Result<(T, Sequences), RunError>,
    f: impl FnOnce(&mut Session, T) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let chosen = Chosen::new(artifact, common, 0)?;
    let places = places(common);
    // The other ranks only serve rank 0; what it will ask of them is its business.
    let (prepared, tokens) = if common.rank.unwrap_or(0) == 0 {
        let (prepared, tokens) = prepare(&chosen)?;
        (Some(prepared), tokens)
    } else {
        // How long the sequences will be is not known here: the weights must fit at least.
        let tokens = if common.max_context.is_some() { context(&chosen.opened, common)? } else { 1 };
        (None, chosen.admit(common, tokens, false)?)
    };
    let (Some(mut session), Some(prepared)) = (begin(chosen, artifact, common, places, tokens)?, prepared) else {
        return Ok(());
    };
    match f(&mut session, prepared) {
        Ok(()) => session.close(),
        Err(error) if error.loses_ranks() => Err(session.explain(error)),
        Err(error) => {
            // The ranks are well and end in order; what was wrong says more than how that went.
            let _ = session.close();
            Err(error)
        }
    }
}

pub(crate) fn tokenizer(opened: &Opened, verb: &'static str) -> Result<Arc<Tokenizer>, RunError> {
    let artifact = opened.artifact.path().to_owned();
    let json = stall::guard(&artifact, &NoProgress, |_| opened.artifact.meta("tokenizer.json"))?;
    let json = json.ok_or(RunError::NoTokenizer { artifact, verb })?;
    let tokenizer = Tokenizer::from_bytes(&json)?;
    let config = &opened.config;
    tokenizer.check(config.vocab_size, config.bos_token_id, config.eos_token_id)?;
    Ok(Arc::new(tokenizer))
}

pub(crate) fn context(opened: &Opened, common: &Common) -> Result<usize, RunError> {
    let model = opened.config.max_position_embeddings as usize;
    match common.max_context {
        Some(asked) if asked > model => Err(RunError::Usage(format!(
            "--max-context {asked}: expected at most the model's {model}\n  help: give a smaller number, or leave it out"
        ))),
        asked => Ok(asked.unwrap_or(model)),
    }
}

fn answer_options(chosen: &Chosen, args: &AnswerArgs, common: &Common) -> Result<AnswerOptions, RunError> {
    let opened = &chosen.opened;
    if args.draft > 0 {
        check_draft(opened, "--draft")?;
    }
    Ok(AnswerOptions {
        thinking: args.thinking,
        effort: args.reasoning_effort.map(|e| match e {
            EffortArg::Low => Effort::Low,
            EffortArg::High => Effort::High,
            EffortArg::Max => Effort::Max,
        }),
        tokens_max: args.max_tokens.map(|n| n as usize),
        context: context(opened, common)?,
        sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed, ..Sampling::GREEDY },
        draft: usize::from(args.draft),
        chunk: chosen.chunk,
    })
}

pub(crate) fn check_draft(opened: &Opened, flag: &'static str) -> Result<(), RunError> {
    let reason = match opened.config.draft {
        Draft::Mtp => return Ok(()),
        Draft::None => "the artifact has no draft block",
        Draft::DSpark { .. } => "the artifact's block drafter (DSpark) is not supported yet",
    };
    Err(RunError::NoDraft { flag, reason })
}

fn json_file(file: &Path, expected: &str) -> Result<Value, RunError> {
    serde_json::from_slice(&read_input(file, INPUT_BYTES_MAX)?).map_err(|e| RunError::Input {
        file: file.to_owned(),
        expected: expected.to_owned(),
        found: e.to_string(),
        help: "write it as JSON",
    })
}

/// The conversation of `generate`'s arguments.
fn conversation(args: &GenerateArgs) -> Result<Vec<Message>, RunError> {
    let mut tools = Value::Null;
    let mut messages = match &args.messages {
        None => vec![Message::new(Role::User, args.prompt.clone().unwrap_or_default())],
        Some(file) => {
            let mut value = json_file(file, "a list of messages")?;
            if let Some(object) = value.as_object_mut() {
                tools = object.remove("tools").unwrap_or(Value::Null);
                value = object.remove("messages").unwrap_or(Value::Null);
            }
            parse_messages(&value).map_err(|source| RunError::Conversation { file: file.clone(), source })?
        }
    };
    if let Some(file) = &args.tools {
        tools = json_file(file, "a list of tools")?;
    }
    if !tools.is_null() {
        merge_tools(&mut messages, &tools)?;
    }
    Ok(messages)
}

fn generate(artifact: &Path, args: &GenerateArgs) -> Result<(), RunError> {
    let messages = conversation(args)?;
    let prepare = |chosen: &Chosen| {
        let opened = &chosen.opened;
        let tokenizer = tokenizer(opened, "generate")?;
        let options = answer_options(chosen, &args.answer, &args.common)?;
        let prompt = prompt(&opened.config, &tokenizer, &messages, &options)?;
        let room = room(&opened.config, &prompt, &options)?;
        let tokens = prompt.tokens.len() + options.tokens_max.map_or(room, |most| most.min(room));
        Ok(((tokenizer, options, prompt), chosen.admit(&args.common, tokens, false)?))
    };
    with_session(artifact, &args.common, prepare, |session, (tokenizer, options, prompt)| {
        let mut printer = Printer::new(!args.json);
        let answer = answer(session, &tokenizer, &prompt, &options, &mut |event| printer.show(event))?;
        printer.finish()?;
        if !args.json {
            summary(&args.common, prompt.tokens.len(), &answer);
            return Ok(());
        }
        let generated = &answer.generated;
        let out = json!({
            "prompt": prompt.text,
            "prompt_tokens": prompt.tokens,
            "completion_tokens": generated.tokens,
            "text": answer.text,
            "message": answer.message_json(),
            "finish_reason": answer.finish_reason(),
            "backend": session.backend,
            "stats": stats_json(&generated.stats, prompt.tokens.len(), generated.tokens.len()),
        });
        print_now(&format!("{out}\n")).map(|_| ())
    })
}

fn summary(common: &Common, prompt_tokens: usize, answer: &Answer) {
    if common.quiet {
        return;
    }
    let (stats, tokens) = (&answer.generated.stats, answer.generated.tokens.len());
    let mut line = format!("{prompt_tokens} prompt tokens in {:.0} ms; {tokens} tokens", stats.prefill_ms);
    if tokens > 1 {
        line += &format!(" at {:.1} tokens/s", tokens_per_second(stats, tokens));
    }
    if stats.draft_tokens > 0 {
        line += &format!("; {} of {} drafts accepted", stats.accepted_tokens, stats.draft_tokens);
    }
    tell(&format!("{line} ({})\n", answer.finish_reason()));
}

/// Lines of standard input, from a thread of its own, so that whoever waits for one can look around.
fn input_lines() -> Receiver<std::io::Result<String>> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// The next line; `None` at the end. A rank that ends while nobody types is noticed within a second.
fn next_line(lines: &Receiver<std::io::Result<String>>, session: &mut Session) -> Result<Option<String>, RunError> {
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(Ok(line)) => return Ok(Some(line)),
            Ok(Err(source)) => {
                let (action, file) = ("reading", PathBuf::from("standard input"));
                return Err(RunError::Io { action, file, source, help: "write lines of UTF-8 text" });
            }
            Err(RecvTimeoutError::Timeout) => session.check()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}

fn chat(artifact: &Path, args: &ChatArgs) -> Result<(), RunError> {
    let prepare = |chosen: &Chosen| {
        let tokenizer = tokenizer(&chosen.opened, "chat")?;
        let options = answer_options(chosen, &args.answer, &args.common)?;
        Ok(((tokenizer, options), chosen.admit(&args.common, options.context, false)?))
    };
    with_session(artifact, &args.common, prepare, |session, (tokenizer, options)| {
        let mut messages: Vec<Message> = args.system.iter().map(|s| Message::new(Role::System, s.clone())).collect();
        let interactive = std::io::stdin().is_terminal();
        let lines = input_lines();
        if interactive && !args.common.quiet {
            tell("Ctrl-D or /quit ends\n");
        }
        loop {
            if interactive {
                tell("> ");
            }
            let Some(line) = next_line(&lines, session)?.filter(|line| line.trim() != "/quit") else { return Ok(()) };
            if line.trim().is_empty() {
                continue;
            }
            messages.push(Message::new(Role::User, line));
            let prompt = prompt(&session.opened.config, &tokenizer, &messages, &options)?;
            let mut printer = Printer::new(true);
            let answer = answer(session, &tokenizer, &prompt, &options, &mut |event| printer.show(event))?;
            printer.finish()?;
            summary(&args.common, prompt.tokens.len(), &answer);
            let mut reply = Message::new(Role::Assistant, answer.message.content.clone());
            reply.reasoning_content = answer.message.reasoning_content;
            messages.push(reply);
        }
    })
}

fn logits(artifact: &Path, args: &LogitsArgs) -> Result<(), RunError> {
    let found = json_file(&args.tokens, "a list of token ids")?;
    let ids = found.as_array().and_then(|l| l.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect());
    let input = |expected: String, found: String| RunError::Input {
        file: args.tokens.clone(),
        expected,
        found,
        help: "write a JSON list such as [0, 17, 4]",
    };
    let tokens: Vec<u32> = ids.ok_or_else(|| input("a list of token ids".into(), "something else".into()))?;
    let prepare = |chosen: &Chosen| {
        let opened = &chosen.opened;
        let config = &opened.config;
        if let Some(id) = tokens.iter().find(|t| u64::from(**t) >= config.vocab_size) {
            return Err(input(format!("ids below {}", config.vocab_size), id.to_string()));
        }
        let least = if args.mtp { 2 } else { 1 };
        if tokens.len() < least {
            return Err(input(format!("at least {least} ids"), tokens.len().to_string()));
        }
        let context = context(opened, &args.common)?;
        if tokens.len() > context {
            let model = config.max_position_embeddings;
            return Err(RunError::Context { tokens: tokens.len(), context, model });
        }
        if args.mtp {
            check_draft(opened, "--mtp")?;
        }
        let context = chosen.admit(&args.common, tokens.len(), true)?;
        let mut tensors = vec![("logits", tokens.len())];
        if args.mtp {
            tensors.push(("mtp", tokens.len() - 1));
        }
        Ok(((TensorFile::create(&args.output, &tensors, config.vocab_size as usize)?, chosen.chunk), context))
    };
    with_session(artifact, &args.common, prepare, |session, (mut file, chunk)| {
        let mut write = |part: Part, first: usize, rows: Mat| file.write_rows(part as usize, first, &rows.data);
        prefill(&mut session.engine, &tokens, chunk, true, args.mtp, &mut write)?;
        session.engine.run(Command::Close(0))?;
        file.finish()?;
        if !args.common.quiet {
            let mtp = if args.mtp { " and mtp" } else { "" };
            tell(&format!("{}: logits{mtp} of {} tokens\n", args.output.display(), tokens.len()));
        }
        Ok(())
    })
}
