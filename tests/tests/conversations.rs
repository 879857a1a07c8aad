//! The conversations of the trained checkpoint, token for token.
//!
//! The matrix is 30 conversations x 1 and 2 ranks x both numerics x 0 to 3 drafts, all of it through
//! the program.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use dsv4_kernels::numerics::Numerics;
use dsv4_model::ModelConfig;
use dsv4_run::answer::{AnswerOptions, prompt};
use dsv4_run::chat::{merge_tools, parse_messages};
use dsv4_run::generate::{Generated, Request, generate};
use dsv4_run::sample::Sampling;
use dsv4_run::tokenizer::Tokenizer;
use dsv4_tests::artifacts::Packed;
use dsv4_tests::binaries::{DSV4_RUN, run};
use dsv4_tests::group::Group;
use dsv4_tests::nano::{Case, cases};
use serde_json::Value;

/// Least part of all drafts that the trunk must agree with, for at most 1, 2 and 3 drafts a step.
const ACCEPTED: [f64; 3] = [0.99, 0.97, 0.95];
const DRAFTS: [usize; 4] = [0, 1, 2, 3];
const CHUNK: usize = 256;
const EOS: u32 = 1;
/// More than any expected answer has, and an end for those that do not end.
const TOKENS_MAX: usize = 70;

/// Drafts of several answers together.
#[derive(Default)]
struct Acceptance {
    drafted: AtomicUsize,
    accepted: AtomicUsize,
}

impl Acceptance {
    fn add(&self, drafted: usize, accepted: usize) {
        self.drafted.fetch_add(drafted, Ordering::Relaxed);
        self.accepted.fetch_add(accepted, Ordering::Relaxed);
    }

    fn check(&self, cell: &str, draft: usize) {
        let (drafted, accepted) = (self.drafted.load(Ordering::Relaxed), self.accepted.load(Ordering::Relaxed));
        if draft == 0 {
            assert_eq!((drafted, accepted), (0, 0), "{cell}");
            return;
        }
        let part = accepted as f64 / drafted as f64;
        println!("{cell}: {accepted} of {drafted} drafts accepted, {part:.4}");
        assert!(part >= ACCEPTED[draft - 1], "{cell}: {part} is less than {}", ACCEPTED[draft - 1]);
    }
}

/// One conversation through the program: everything it prints.
fn through_the_program(artifact: &Path, scratch: &Path, case: &Case, numerics: Numerics, draft: usize) -> Value {
    static FILES: AtomicUsize = AtomicUsize::new(0);
    let file = scratch.join(format!("messages{}.json", FILES.fetch_add(1, Ordering::Relaxed)));
    std::fs::write(&file, case.input.to_string()).unwrap();
    let (artifact, file, draft) = (artifact.to_str().unwrap(), file.to_str().unwrap(), draft.to_string());
    let mut args = vec![artifact, "generate", "--messages", file, "--json", "--quiet"];
    args.extend(["--numerics", numerics.name(), "--draft", &draft]);
    if case.thinking {
        args.push("--thinking");
    }
    let ran = run(DSV4_RUN, &args);
    let lines: Vec<&str> = ran.ok().lines().collect();
    assert_eq!(lines.len(), 1, "one line of JSON: {ran:?}");
    serde_json::from_str(lines[0]).unwrap()
}

fn check_answer(case: &Case, answer: &Value) {
    let kind = &case.kind;
    assert_eq!(answer["prompt"], case.prompt, "{kind}");
    assert_eq!(answer["prompt_tokens"], Value::from(case.prompt_tokens.clone()), "{kind}");
    assert_eq!(answer["completion_tokens"], Value::from(case.completion_tokens.clone()), "{kind}");
    assert_eq!(answer["text"], case.text(), "{kind}");
    let (message, (reasoning, content)) = (&answer["message"], case.parts());
    assert_eq!(message["role"], "assistant", "{kind}");
    assert_eq!(message["content"], content, "{kind}");
    // Without thinking there is none: absent, null or empty.
    assert_eq!(message["reasoning_content"].as_str().unwrap_or_default(), reasoning, "{kind}");
    let expected = case.calls();
    let none = Vec::new();
    let calls = message["tool_calls"].as_array().unwrap_or(&none);
    assert_eq!(calls.len(), expected.len(), "{kind}: {message}");
    for (call, (name, arguments)) in calls.iter().zip(&expected) {
        assert_eq!((&call["type"], &call["function"]["name"]), (&"function".into(), &name.as_str().into()), "{kind}");
        let text = call["function"]["arguments"].as_str().expect("arguments are text");
        let found: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{kind}: {text}: {e}"));
        assert_eq!(found, *arguments, "{kind}");
    }
    assert_eq!(answer["finish_reason"], if expected.is_empty() { "stop" } else { "tool_calls" }, "{kind}");
    let stats = &answer["stats"];
    assert_eq!(stats["prompt_tokens"], case.prompt_tokens.len(), "{kind}");
    assert_eq!(stats["completion_tokens"], case.completion_tokens.len(), "{kind}");
}

/// Runs `f` over all of `list` on as many threads as there are cores.
fn in_parallel<T: Sync>(list: &[T], f: impl Fn(&T) + Sync) {
    let next = Mutex::new(list.iter());
    let workers = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let item = next.lock().unwrap().next();
                    let Some(item) = item else { break };
                    f(item);
                }
            });
        }
    });
}

/// All thirty through the program, for every number of drafts.
fn all_through_the_program(tp: u32, numerics: Numerics) {
    let (packed, cases) = (Packed::nano(tp), cases());
    assert_eq!(cases.len(), 30);
    assert_eq!(cases.iter().filter(|c| !c.calls().is_empty()).count(), 10, "conversations with calls");
    for draft in DRAFTS {
        let acceptance = Acceptance::default();
        in_parallel(&cases, |case| {
            let answer = through_the_program(packed.path(), packed.scratch(), case, numerics, draft);
            check_answer(case, &answer);
            let count = |key: &str| answer["stats"][key].as_u64().unwrap() as usize;
            acceptance.add(count("draft_tokens"), count("accepted_tokens"));
            // Every step decides one token more than it accepts; the last may be cut by the end token.
            let decided = 1 + count("decode_steps") + count("accepted_tokens");
            assert!([0, 1].contains(&(decided - count("completion_tokens"))), "{}", answer["stats"]);
        });
        acceptance.check(&format!("{tp} ranks, {}, --draft {draft}", numerics.name()), draft);
    }
}

#[test]
fn one_rank_float() {
    all_through_the_program(1, Numerics::Float);
}

#[test]
fn one_rank_published() {
    all_through_the_program(1, Numerics::Published);
}

#[test]
fn two_ranks_float() {
    all_through_the_program(2, Numerics::Float);
}

#[test]
fn two_ranks_published() {
    all_through_the_program(2, Numerics::Published);
}

fn answer(group: &mut Group, tokens: &[u32], sampling: Sampling, draft: usize, chunk: usize) -> Generated {
    let request = Request { prompt: tokens, tokens_max: TOKENS_MAX, sampling, draft, chunk, eos: EOS };
    let mut seen = Vec::new();
    let generated = generate(&mut group.engine, &request, &mut |token| {
        seen.push(token);
        ControlFlow::Continue(())
    });
    let generated = generated.unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(seen, generated.tokens, "what was told and what was returned");
    generated
}

/// Prompts as text and as ids, from messages and tools.
#[test]
fn prompts() {
    let data = Path::new(dsv4_tests::DATA).join("nano");
    let config = ModelConfig::parse(&std::fs::read_to_string(data.join("config.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_bytes(&std::fs::read(data.join("tokenizer.json")).unwrap()).unwrap();
    for case in cases() {
        let mut messages = parse_messages(&case.input["messages"]).unwrap();
        if !case.input["tools"].is_null() {
            merge_tools(&mut messages, &case.input["tools"]).unwrap();
        }
        let options = AnswerOptions {
            thinking: case.thinking,
            effort: None,
            tokens_max: None,
            context: 8192,
            sampling: Sampling::GREEDY,
            draft: 0,
            chunk: CHUNK,
        };
        let found = prompt(&config, &tokenizer, &messages, &options).unwrap();
        assert_eq!((found.text, found.tokens), (case.prompt, case.prompt_tokens), "{}", case.kind);
    }
}

/// At temperature 1 an answer depends on its seed, and on nothing else: not on drafts, not on chunks.
#[test]
fn seeded_answers_do_not_depend_on_drafts_or_chunks() {
    let cases = cases();
    // One of each: a long prompt with tools, a short one, one of many turns, a free one.
    let prompts: Vec<&Case> = ["tool", "add", "multi", "as_json"]
        .iter()
        .map(|kind| cases.iter().find(|c| c.kind == **kind).expect("a case of each kind"))
        .collect();
    for (tp, numerics) in [(1, Numerics::Published), (2, Numerics::Float)] {
        let packed = Packed::nano(tp);
        let mut group = Group::start(packed.path(), numerics, CHUNK);
        let mut different = 0;
        for case in &prompts {
            let mut answers = Vec::new();
            for seed in [1, 77] {
                let hot = Sampling { temperature: 1.0, top_p: 1.0, seed, ..Sampling::GREEDY };
                // Hotter than any user: the drafter is often wrong, and rows are taken back.
                let wild = Sampling { temperature: 3.0, top_p: 0.95, seed, ..Sampling::GREEDY };
                for sampling in [hot, wild] {
                    let plain = answer(&mut group, &case.prompt_tokens, sampling, 0, CHUNK);
                    for (draft, chunk) in [(1, CHUNK), (2, 61), (3, 31), (0, 100)] {
                        let other = answer(&mut group, &case.prompt_tokens, sampling, draft, chunk);
                        let what =
                            format!("{}, {tp} ranks, {sampling:?}: {draft} drafts, chunks of {chunk}", case.kind);
                        assert_eq!((&other.tokens, other.finish), (&plain.tokens, plain.finish), "{what}");
                        if draft > 0 && sampling == wild {
                            different += other.stats.draft_tokens - other.stats.accepted_tokens;
                        }
                    }
                    answers.push(plain.tokens);
                }
            }
            answers.sort();
            answers.dedup();
            assert!(answers.len() >= 3, "{}: seeds change nothing: {answers:?}", case.kind);
        }
        println!("{tp} ranks, {}: {different} drafts rejected", numerics.name());
        assert!(different > 100, "too few rejected drafts to show anything: {different}");
        group.finish();
    }
}
