//! What each verb does.

use std::collections::BTreeMap;
use std::io::{BufRead, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use dsv4_kernels::ops::Mat;
use dsv4_model::Draft;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::answer::{Answer, AnswerOptions, answer, prompt, stats_json, tokens_per_second};
use crate::chat::{Effort, Event, Message, Role, merge_tools, parse_messages};
use crate::cli::{AnswerArgs, Backend, ChatArgs, Cli, Common, EffortArg, GenerateArgs, LogitsArgs, Verb};
use crate::error::RunError;
use crate::generate::prefill;
use crate::progress::Bar;
use crate::sample::Sampling;
use crate::session::{Places, Session, Settings, Started, print_now, read_input, start};
use crate::step::Command;
use crate::tokenizer::Tokenizer;

/// Longest JSON file that is read: messages, tools, token ids.
const INPUT_BYTES_MAX: u64 = 256 << 20;

/// Runs the command line.
pub fn run(cli: Cli) -> Result<(), RunError> {
    match cli.verb {
        Verb::Generate(args) => generate(&cli.artifact, &args),
        Verb::Chat(args) => chat(&cli.artifact, &args),
        Verb::Logits(args) => logits(&cli.artifact, &args),
        Verb::Rank(args) => {
            let places = Places::Child { rank: args.local_rank, leader: args.local_leader };
            match begin(&cli.artifact, &args.common, Some(places))? {
                Some(session) => session.close(),
                None => Ok(()),
            }
        }
    }
}

/// Starts the ranks. `None` after this process has served as a rank other than 0.
fn begin(artifact: &Path, common: &Common, places: Option<Places>) -> Result<Option<Box<Session>>, RunError> {
    if common.backend == Backend::Cuda {
        return Err(RunError::NoCuda);
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let places = places.unwrap_or_else(|| match common.rank {
        None => Places::Local,
        Some(rank) => {
            Places::Peers { rank, peers: common.peers.clone(), within: Duration::from_secs(common.peer_timeout) }
        }
    });
    let settings = Settings {
        artifact: artifact.to_owned(),
        numerics: common.numerics.into(),
        chunk: common.chunk as usize,
        threads: common.threads.map_or(cores, usize::from),
        places,
    };
    match start(&settings, &Bar::new(common.quiet))? {
        Started::Leader(session) => Ok(Some(session)),
        Started::Worker(rank, control) => rank.work(control).map(|()| None),
    }
}

/// Runs `f` on rank 0, then ends all ranks; an error of a rank that ended says more than a lost connection.
fn with_session(
    artifact: &Path,
    common: &Common,
    f: impl FnOnce(&mut Session) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let Some(mut session) = begin(artifact, common, None)? else { return Ok(()) };
    match f(&mut session) {
        Ok(()) => session.close(),
        Err(error) if error.loses_ranks() => Err(session.explain(error)),
        Err(error) => {
            // The ranks are well and end in order; what was wrong says more than how that went.
            let _ = session.close();
            Err(error)
        }
    }
}

fn tokenizer(session: &Session, verb: &'static str) -> Result<Arc<Tokenizer>, RunError> {
    let artifact = session.opened.artifact.path().to_owned();
    let json = session.opened.artifact.meta("tokenizer.json")?;
    let json = json.ok_or(RunError::NoTokenizer { artifact, verb })?;
    Ok(Arc::new(Tokenizer::from_bytes(&json)?))
}

fn context(session: &Session, common: &Common) -> usize {
    let model = session.opened.config.max_position_embeddings as usize;
    common.max_context.unwrap_or(model).min(model)
}

fn answer_options(session: &Session, args: &AnswerArgs, common: &Common) -> Result<AnswerOptions, RunError> {
    check_draft(session, usize::from(args.draft))?;
    Ok(AnswerOptions {
        thinking: args.thinking,
        effort: args.reasoning_effort.map(|e| match e {
            EffortArg::Low => Effort::Low,
            EffortArg::High => Effort::High,
            EffortArg::Max => Effort::Max,
        }),
        tokens_max: args.max_tokens.map(|n| n as usize),
        context: context(session, common),
        sampling: Sampling { temperature: args.temperature, top_p: args.top_p, seed: args.seed },
        draft: usize::from(args.draft),
        chunk: common.chunk as usize,
    })
}

fn check_draft(session: &Session, asked: usize) -> Result<(), RunError> {
    let reason = match session.opened.config.draft {
        _ if asked == 0 => return Ok(()),
        Draft::Mtp => return Ok(()),
        Draft::None => "the artifact has no draft block",
        Draft::DSpark { .. } => "the artifact's block drafter (DSpark) is not supported yet",
    };
    Err(RunError::NoDraft { asked, reason: reason.into() })
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
            parse_messages(&value)?
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
    with_session(artifact, &args.common, |session| {
        let tokenizer = tokenizer(session, "generate")?;
        let options = answer_options(session, &args.answer, &args.common)?;
        let prompt = prompt(&session.opened.config, &tokenizer, &messages, &options)?;
        let mut printer = Printer::new(!args.json);
        let answer = answer(session, &tokenizer, &prompt, &options, &mut |event| printer.show(event))?;
        let generated = &answer.generated;
        if args.json {
            let out = json!({
                "prompt": prompt.text,
                "prompt_tokens": prompt.tokens,
                "completion_tokens": generated.tokens,
                "text": answer.text,
                "message": answer.message_json(),
                "finish_reason": answer.finish_reason(),
                "stats": stats_json(&generated.stats, prompt.tokens.len(), generated.tokens.len()),
            });
            let _ = print_now(&format!("{out}\n"));
        } else {
            let _ = print_now("\n");
            summary(&args.common, prompt.tokens.len(), &answer);
        }
        Ok(())
    })
}

fn summary(common: &Common, prompt_tokens: usize, answer: &Answer) {
    if common.quiet {
        return;
    }
    let (stats, tokens) = (&answer.generated.stats, answer.generated.tokens.len());
    let mut line = format!(
        "{prompt_tokens} prompt tokens in {:.0} ms; {tokens} tokens at {:.1} tokens/s",
        stats.prefill_ms,
        tokens_per_second(stats, tokens)
    );
    if stats.draft_tokens > 0 {
        line += &format!("; {} of {} drafts accepted", stats.accepted_tokens, stats.draft_tokens);
    }
    eprintln!("{line} ({})", answer.finish_reason());
}

/// Writes an answer's parts as they come: content and calls to standard output, reasoning to standard error.
struct Printer {
    on: bool,
    reasoning: bool,
    dim: bool,
}

impl Printer {
    fn new(on: bool) -> Printer {
        Printer { on, reasoning: false, dim: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, event: Event) -> ControlFlow<()> {
        if !self.on {
            return ControlFlow::Continue(());
        }
        let is_reasoning = matches!(event, Event::Reasoning(_));
        if self.reasoning && !is_reasoning {
            eprintln!("{}", if self.dim { "\x1b[0m" } else { "" });
        }
        let started = is_reasoning && !self.reasoning && self.dim;
        self.reasoning = is_reasoning;
        let text = match event {
            Event::Reasoning(text) => {
                eprint!("{}{text}", if started { "\x1b[2m" } else { "" });
                return ControlFlow::Continue(());
            }
            Event::Content(text) => text,
            Event::ToolCallStart { name, .. } => format!("\n{name}("),
            Event::ToolCallArguments { delta, .. } => delta,
            Event::ToolCallEnd { .. } => ")".into(),
        };
        // A closed pipe: nobody reads any more.
        if print_now(&text).is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }
}

fn chat(artifact: &Path, args: &ChatArgs) -> Result<(), RunError> {
    with_session(artifact, &args.common, |session| {
        let tokenizer = tokenizer(session, "chat")?;
        let options = answer_options(session, &args.answer, &args.common)?;
        let mut messages: Vec<Message> = args.system.iter().map(|s| Message::new(Role::System, s.clone())).collect();
        let interactive = std::io::stdin().is_terminal();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            if interactive {
                eprint!("> ");
                let _ = std::io::stderr().flush();
            }
            let line = match lines.next() {
                Some(Ok(line)) if line.trim() != "/quit" => line,
                _ => return Ok(()),
            };
            if line.trim().is_empty() {
                continue;
            }
            messages.push(Message::new(Role::User, line));
            let prompt = prompt(&session.opened.config, &tokenizer, &messages, &options)?;
            let mut printer = Printer::new(true);
            let answer = answer(session, &tokenizer, &prompt, &options, &mut |event| printer.show(event))?;
            let _ = print_now("\n");
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
    with_session(artifact, &args.common, |session| {
        let config = session.opened.config.clone();
        if let Some(id) = tokens.iter().find(|t| u64::from(**t) >= config.vocab_size) {
            return Err(input(format!("ids below {}", config.vocab_size), id.to_string()));
        }
        let least = if args.mtp { 2 } else { 1 };
        if tokens.len() < least {
            return Err(input(format!("at least {least} ids"), tokens.len().to_string()));
        }
        let context = context(session, &args.common);
        if tokens.len() > context {
            let model = config.max_position_embeddings;
            return Err(RunError::Context { tokens: tokens.len(), context, model });
        }
        if args.mtp {
            check_draft(session, 1)?;
        }
        let vocab = config.vocab_size as usize;
        let mut trunk = Mat::zeros(tokens.len(), vocab);
        let mut draft = Mat::zeros(if args.mtp { tokens.len() - 1 } else { 0 }, vocab);
        let place = |out: &mut Mat, first: usize, part: &Mat| {
            out.data[first * vocab..first * vocab + part.data.len()].copy_from_slice(&part.data);
        };
        let chunk = args.common.chunk as usize;
        prefill(
            &mut session.engine,
            &tokens,
            chunk,
            true,
            args.mtp,
            &mut |first, part| place(&mut trunk, first, &part),
            &mut |first, part| place(&mut draft, first, &part),
        )?;
        session.engine.run(Command::Close(0))?;
        let mut tensors = BTreeMap::from([("logits", trunk)]);
        if args.mtp {
            tensors.insert("mtp", draft);
        }
        write_tensors(&args.output, &tensors)
    })
}

/// Writes float32 matrices as a safetensors file, whole or not at all.
fn write_tensors(file: &Path, tensors: &BTreeMap<&str, Mat>) -> Result<(), RunError> {
    let failed = |source| RunError::Io {
        action: "writing",
        file: file.to_owned(),
        source,
        help: "check the path and the free space",
    };
    let views: Result<Vec<_>, _> = tensors
        .iter()
        .map(|(name, m)| {
            TensorView::new(Dtype::F32, vec![m.rows, m.cols], bytemuck::cast_slice(&m.data)).map(|v| (*name, v))
        })
        .collect();
    let bytes = views.and_then(|v| safetensors::serialize(v, None)).map_err(|e| failed(std::io::Error::other(e)))?;
    let mut partial = file.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, bytes).and_then(|()| std::fs::rename(&partial, file)).map_err(|source| {
        let _ = std::fs::remove_file(&partial);
        failed(source)
    })
}
