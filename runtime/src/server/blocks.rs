//! One answer as a list of blocks, in the order in which the model writes them: reasoning, text, calls.
//!
//! For the forms of replies that have no choices. A block ends where the next begins, or with the answer; what ended
//! before its time, at a limit of tokens, is not whole.

use crate::chat::Event as Part;

use super::app::random;
use super::choice::Step;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum BlockKind {
    Reasoning,
    Text,
    /// Of a tool.
    Call {
        name: String,
    },
}

#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Hexadecimal; what ids begin with is put before it.
    pub id: String,
    pub kind: BlockKind,
    /// Reasoning, text, or arguments as JSON.
    pub text: String,
    pub whole: bool,
}

impl Block {
    /// Half a call is of no use to anybody: only a stream, which had begun it, shows it.
    pub fn is_shown(&self) -> bool {
        self.whole || !matches!(self.kind, BlockKind::Call { .. })
    }
}

/// What happens to the last block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change<'a> {
    Begins,
    Adds(&'a str),
    Ends,
}

/// An answer so far.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pub list: Vec<Block>,
    /// The last block has not ended.
    open: bool,
    /// Why the answer ended: `stop`, `length` or `tool_calls`.
    pub end: &'static str,
    /// The stop string that ended it.
    pub stop: Option<String>,
}

impl Blocks {
    /// Takes a step, and tells what changes: place, block and change.
    pub fn take(&mut self, step: Step, mut tell: impl FnMut(usize, &Block, Change)) {
        for part in step.parts {
            match part {
                Part::Reasoning(text) => self.add(BlockKind::Reasoning, &text, &mut tell),
                Part::Content(text) => self.add(BlockKind::Text, &text, &mut tell),
                Part::ToolCallStart { name, .. } => self.begin(BlockKind::Call { name }, &mut tell),
                Part::ToolCallArguments { delta, .. } => self.append(&delta, &mut tell),
                Part::ToolCallEnd { .. } => self.close(true, &mut tell),
            }
        }
        if let Some(Ok(end)) = step.end {
            let call = self.list.last().is_some_and(|block| matches!(block.kind, BlockKind::Call { .. }));
            self.close(end != "length" && !call, &mut tell);
            (self.end, self.stop) = (end, step.stop);
        }
    }

    fn add(&mut self, kind: BlockKind, text: &str, tell: &mut impl FnMut(usize, &Block, Change)) {
        if !self.open || self.list.last().is_none_or(|last| last.kind != kind) {
            self.begin(kind, tell);
        }
        self.append(text, tell);
    }

    fn begin(&mut self, kind: BlockKind, tell: &mut impl FnMut(usize, &Block, Change)) {
        self.close(true, tell);
        let block = Block { id: format!("{:016x}", random()), kind, text: String::new(), whole: false };
        tell(self.list.len(), &block, Change::Begins);
        self.list.push(block);
        self.open = true;
    }

    fn append(&mut self, text: &str, tell: &mut impl FnMut(usize, &Block, Change)) {
        let place = self.list.len().saturating_sub(1);
        if let Some(last) = self.list.last_mut() {
            last.text.push_str(text);
            tell(place, last, Change::Adds(text));
        }
    }

    fn close(&mut self, whole: bool, tell: &mut impl FnMut(usize, &Block, Change)) {
        let place = self.list.len().saturating_sub(1);
        if let Some(last) = self.list.last_mut()
            && std::mem::take(&mut self.open)
        {
            last.whole = whole;
            tell(place, last, Change::Ends);
        }
    }
}
