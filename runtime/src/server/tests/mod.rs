//! The server over a real socket, with an engine that plays a script in place of a model.

mod access_tests;
mod chat_tests;
mod client;
mod completion_tests;
mod engine;
mod messages_tests;
mod page_tests;
mod protocol_tests;
mod responses_tests;
mod stream_tests;

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use dsv4_model::ModelConfig;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use crate::chat::Profile;
use crate::scheduler::{self, Limits, Scheduler};
use crate::tokenizer::Tokenizer;
use crate::tokenizer::test_files::load;

use super::{ModelInfo, ServerConfig, ServerError, bind};
use client::{Reply, call};
use engine::{Act, Engine, Seen, play};

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/nano/config.json");
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const MESSAGES: &str = "/v1/messages";
const RESPONSES: &str = "/v1/responses";
/// Longest that anything in these tests may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// A server of the nano model's tokenizer.
struct Server {
    address: SocketAddr,
    scheduler: Scheduler,
    tokenizer: Arc<Tokenizer>,
    engine: Engine,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

/// What most tests serve with.
fn config() -> ServerConfig {
    ServerConfig { keep_alive: Duration::from_secs(2), ..ServerConfig::new("127.0.0.1:0".parse().expect("address")) }
}

const LIMITS: Limits = Limits { queue: 4, running: 2, context: 512 };

impl Server {
    /// Answers every request with `acts`.
    fn start(acts: impl Fn(&Tokenizer, &Seen) -> Vec<Act> + Send + Sync + 'static) -> Server {
        Server::start_with(config(), LIMITS, acts)
    }

    fn start_with(
        config: ServerConfig,
        limits: Limits,
        acts: impl Fn(&Tokenizer, &Seen) -> Vec<Act> + Send + Sync + 'static,
    ) -> Server {
        let tokenizer = load("nano");
        let (scheduler, intake) = scheduler::new(limits);
        let script = tokenizer.clone();
        let engine = play(intake, Arc::new(move |seen| acts(&script, seen)));
        let model = Arc::new(ModelInfo {
            tokenizer: tokenizer.clone(),
            config: ModelConfig::parse(&std::fs::read_to_string(CONFIG).expect("config.json")).expect("valid"),
            profile: Profile::V0731,
            name: "org/nano".into(),
            aliases: vec!["nano".into()],
            root: "org/Nano-Base".into(),
            artifact: "a1b2".into(),
            backend: json!({"kind": "cpu"}),
            numerics: json!("float"),
        });
        let (shutdown, shut) = oneshot::channel();
        let (tell, told) = std::sync::mpsc::channel();
        let queue = scheduler.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
            runtime.expect("a runtime").block_on(async move {
                let bound = bind(config).await?;
                tell.send(bound.address()).expect("a listener");
                let shutdown = async {
                    let _ = shut.await;
                };
                bound.serve(model, queue, shutdown).await
            })
        });
        let address = told.recv_timeout(PATIENCE).expect("an address");
        Server { address, scheduler, tokenizer, engine, shutdown: Some(shutdown), thread: Some(thread) }
    }

    /// Answers every request with a text.
    fn saying(text: &'static str) -> Server {
        Server::start(move |tokenizer, _| says(tokenizer, text))
    }

    fn post(&self, path: &str, body: Value) -> Reply {
        call(self.address, "POST", path, &[], body.to_string().as_bytes())
    }

    fn get(&self, path: &str) -> Reply {
        call(self.address, "GET", path, &[], b"")
    }

    fn begin_shutdown(&mut self) {
        let _ = self.shutdown.take().expect("only once").send(());
    }

    /// The server's end.
    fn join(&mut self) -> Result<(), ServerError> {
        self.thread.take().expect("only once").join().expect("no panic")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Whoever waits within a script may go on, else the server would wait for them.
        self.engine.open_gates();
        self.shutdown.take().map(|shutdown| shutdown.send(()));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The text as tokens, control tokens among them, then the end.
fn says(tokenizer: &Tokenizer, text: &str) -> Vec<Act> {
    let mut acts = tokens(tokenizer, text);
    acts.extend([Act::Token(1), Act::Stop]);
    acts
}

fn tokens(tokenizer: &Tokenizer, text: &str) -> Vec<Act> {
    tokenizer.encode_plain(text, true).expect("encodes").into_iter().map(Act::Token).collect()
}

/// An answer with reasoning, a text and two calls.
const CALL: &str = "Hm.</think>I look.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name=\"look\">\n\
    <｜DSML｜parameter name=\"at\" string=\"true\">a \"b\"</｜DSML｜parameter>\n\
    <｜DSML｜parameter name=\"n\" string=\"false\">[1, 2]</｜DSML｜parameter>\n</｜DSML｜invoke>\n\
    <｜DSML｜invoke name=\"wait\">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>";

/// A chat without reasoning.
fn user(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "thinking": {"type": "disabled"}})
}

/// `request` with more fields.
fn with(mut request: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().expect("an object") {
        request[name] = value.clone();
    }
    request
}

/// Waits until it is so.
fn eventually(what: &str, mut so: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !so() {
        assert!(std::time::Instant::now() < until, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
