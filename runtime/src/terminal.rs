//! What is written to standard output and standard error.
//!
//! A reader that goes away ends the output quietly; a full disk behind standard output is an error;
//! standard error is only told about things, so losing it changes nothing.

use std::io::{ErrorKind, IsTerminal, Write};
use std::ops::ControlFlow;
use std::path::PathBuf;

use crate::chat::Event;
use crate::error::RunError;

/// Writes text to standard output at once: whether somebody still reads. Errors: anything but a closed pipe.
pub fn print_now(text: &str) -> Result<bool, RunError> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(source) => Err(RunError::Io {
            action: "writing",
            file: PathBuf::from("standard output"),
            source,
            help: "the answer is incomplete; check the space where the output goes",
        }),
    }
}

/// Writes text to standard error, if it can be.
pub fn tell(text: &str) {
    let mut out = std::io::stderr().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Writes an answer's parts as they come: content and calls to standard output, reasoning to standard error.
pub struct Printer {
    on: bool,
    reasoning: bool,
    dim: bool,
    failed: Option<RunError>,
}

impl Printer {
    /// A printer that does nothing unless `on`.
    pub fn new(on: bool) -> Printer {
        Printer { on, reasoning: false, dim: std::io::stderr().is_terminal(), failed: None }
    }

    /// Shows one part; breaks when nobody reads any more.
    pub fn show(&mut self, event: Event) -> ControlFlow<()> {
        if !self.on {
            return ControlFlow::Continue(());
        }
        let is_reasoning = matches!(event, Event::Reasoning(_));
        if self.reasoning != is_reasoning {
            let (start, end) = if self.dim { ("\x1b[2m", "\x1b[0m\n") } else { ("", "\n") };
            tell(if is_reasoning { start } else { end });
        }
        self.reasoning = is_reasoning;
        let text = match event {
            Event::Reasoning(text) => {
                tell(&text);
                return ControlFlow::Continue(());
            }
            Event::Content(text) => text,
            Event::ToolCallStart { name, .. } => format!("\n{name}("),
            Event::ToolCallArguments { delta, .. } => delta,
            Event::ToolCallEnd { .. } => ")".into(),
        };
        match print_now(&text) {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// Ends the answer. Errors: output was lost.
    pub fn finish(self) -> Result<(), RunError> {
        if self.reasoning {
            tell(if self.dim { "\x1b[0m\n" } else { "\n" });
        }
        match self.failed {
            Some(error) => Err(error),
            None if self.on => print_now("\n").map(|_| ()),
            None => Ok(()),
        }
    }
}
