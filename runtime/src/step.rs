//! One step on every rank: rank 0 sends a command, all ranks run the same forward pass.

use dsv4_kernels::gpu::GpuBackend;
use dsv4_kernels::ops::Mat;
use dsv4_kernels::reference::{Reference, ReferenceError};
use dsv4_model::ops::{Backend, Segment, Step};
use dsv4_model::{Model, ModelConfig};

use crate::error::RunError;
use crate::ranks::wire::{Reader, WireError, Writer};
use crate::ranks::{ControlReceiver, ControlSender};

/// Longest list in a command; a step has at most this many rows.
const LIST_MAX: u32 = 1 << 20;

/// Which streams a draft step continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Those of the last trunk step.
    Trunk,
    /// Those of the last draft step.
    Draft,
}

/// What rank 0 asks of every rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start an empty sequence in a slot.
    Open(u32),
    /// Forget the sequence in a slot.
    Close(u32),
    /// Run the trunk.
    Trunk(Step),
    /// Run the draft block.
    Draft(Step, Source),
}

impl Command {
    fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match self {
            Command::Open(slot) => {
                w.u8(1);
                w.u32(*slot);
            }
            Command::Close(slot) => {
                w.u8(2);
                w.u32(*slot);
            }
            Command::Trunk(step) => {
                w.u8(3);
                encode_step(&mut w, step);
            }
            Command::Draft(step, source) => {
                w.u8(if *source == Source::Trunk { 4 } else { 5 });
                encode_step(&mut w, step);
            }
        }
        w.into_bytes()
    }

    fn decode(bytes: &[u8]) -> Result<Command, WireError> {
        let mut r = Reader::new(bytes);
        let command = match r.u8("command")? {
            1 => Command::Open(r.u32("slot")?),
            2 => Command::Close(r.u32("slot")?),
            3 => Command::Trunk(decode_step(&mut r)?),
            4 => Command::Draft(decode_step(&mut r)?, Source::Trunk),
            5 => Command::Draft(decode_step(&mut r)?, Source::Draft),
            found => return Err(WireError::Kind { field: "command", found }),
        };
        r.finish()?;
        Ok(command)
    }
}

fn encode_step(w: &mut Writer, step: &Step) {
    w.u32s(&step.tokens);
    let segments: Vec<u32> = step.segments.iter().flat_map(|s| [s.slot, s.start, s.rows]).collect();
    w.u32s(&segments);
    w.u32s(&step.logits);
    w.u32s(&step.source);
}

fn decode_step(r: &mut Reader<'_>) -> Result<Step, WireError> {
    let tokens = r.u32s("tokens", LIST_MAX)?;
    let segments = r.u32s("segments", 3 * LIST_MAX)?;
    let segments = segments.chunks_exact(3).map(|s| Segment { slot: s[0], start: s[1], rows: s[2] }).collect();
    Ok(Step { tokens, segments, logits: r.u32s("logits", LIST_MAX)?, source: r.u32s("source", LIST_MAX)? })
}

/// What rank 0 tells the others before anything is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    /// Tokens of the longest sequence.
    pub context: u32,
    /// Sequences at once.
    pub sequences: u32,
}

impl Setup {
    /// As bytes.
    pub fn encode(self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u32(self.context);
        w.u32(self.sequences);
        w.into_bytes()
    }

    /// From bytes. Errors: they are none.
    pub fn decode(bytes: &[u8]) -> Result<Setup, WireError> {
        let mut r = Reader::new(bytes);
        let setup = Setup { context: r.u32("context")?, sequences: r.u32("sequences")? };
        r.finish()?;
        Ok(setup)
    }
}

/// A backend that runs steps one after another.
trait Stepping: Backend<Logits = Mat, Error: Into<RunError>> {
    fn config(&self) -> &ModelConfig;
    fn open(&mut self, slot: u32) -> Result<(), Self::Error>;
    fn close(&mut self, slot: u32) -> Result<(), Self::Error>;
    fn begin(&mut self, step: Step, source: Option<&Self::Streams>) -> Result<(), Self::Error>;
    /// Ends a pass whose logits nobody wants.
    fn finish(&mut self) -> Result<(), Self::Error>;
}

impl Stepping for Reference {
    fn config(&self) -> &ModelConfig {
        Reference::config(self)
    }
    fn open(&mut self, slot: u32) -> Result<(), Self::Error> {
        Reference::open(self, slot)
    }
    fn close(&mut self, slot: u32) -> Result<(), Self::Error> {
        Reference::close(self, slot)
    }
    fn begin(&mut self, step: Step, source: Option<&Self::Streams>) -> Result<(), Self::Error> {
        Reference::begin(self, step, source)
    }
    fn finish(&mut self) -> Result<(), Self::Error> {
        Ok(())
    }
}

impl Stepping for GpuBackend {
    fn config(&self) -> &ModelConfig {
        GpuBackend::config(self)
    }
    fn open(&mut self, slot: u32) -> Result<(), Self::Error> {
        GpuBackend::open(self, slot)
    }
    fn close(&mut self, slot: u32) -> Result<(), Self::Error> {
        GpuBackend::close(self, slot)
    }
    fn begin(&mut self, step: Step, source: Option<&Self::Streams>) -> Result<(), Self::Error> {
        GpuBackend::begin(self, step, source)
    }
    fn finish(&mut self) -> Result<(), Self::Error> {
        GpuBackend::finish(self)
    }
}

/// A backend and the streams of its last steps.
struct Lane<B: Backend> {
    model: Model,
    backend: B,
    trunk: Option<B::Streams>,
    draft: Option<B::Streams>,
}

impl<B: Stepping> Lane<B> {
    fn new(backend: B) -> Lane<B> {
        Lane { model: Model::new(backend.config()), backend, trunk: None, draft: None }
    }

    /// Runs one command; rank 0 gets the wanted logits `[wanted, V]`.
    fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        let Lane { model, backend, trunk, draft } = self;
        match command {
            Command::Open(slot) => backend.open(slot).map_err(Into::into)?,
            Command::Close(slot) => backend.close(slot).map_err(Into::into)?,
            Command::Trunk(step) => {
                let wanted = !step.logits.is_empty();
                backend.begin(step, None).map_err(Into::into)?;
                let streams = trunk.insert(model.trunk(backend).map_err(Into::into)?);
                if wanted {
                    return model.logits(backend, streams).map_err(Into::into);
                }
                backend.finish().map_err(Into::into)?;
            }
            Command::Draft(step, source) => {
                let wanted = !step.logits.is_empty();
                let from = if source == Source::Trunk { &*trunk } else { &*draft };
                let from = from.as_ref().filter(|_| model.has_mtp()).ok_or_else(|| ReferenceError::Step {
                    expected: "a draft step of a model that drafts, after the step it continues".into(),
                    found: "none of these".into(),
                })?;
                backend.begin(step, Some(from)).map_err(Into::into)?;
                let streams = model.mtp(backend, from).map_err(Into::into)?;
                let streams = draft.insert(streams);
                if wanted {
                    return model.mtp_logits(backend, streams).map_err(Into::into);
                }
                backend.finish().map_err(Into::into)?;
            }
        }
        Ok(Mat::default())
    }
}

enum Lanes {
    Cpu(Box<Lane<Reference>>),
    Gpu(Box<Lane<GpuBackend>>),
}

/// One rank, whatever computes for it.
pub struct Rank {
    lanes: Lanes,
}

impl From<Reference> for Rank {
    fn from(backend: Reference) -> Rank {
        Rank { lanes: Lanes::Cpu(Box::new(Lane::new(backend))) }
    }
}

impl From<GpuBackend> for Rank {
    fn from(backend: GpuBackend) -> Rank {
        Rank { lanes: Lanes::Gpu(Box::new(Lane::new(backend))) }
    }
}

impl Rank {
    /// The CPU backend, if it is one.
    pub fn cpu_mut(&mut self) -> Option<&mut Reference> {
        match &mut self.lanes {
            Lanes::Cpu(lane) => Some(&mut lane.backend),
            Lanes::Gpu(_) => None,
        }
    }

    /// The GPU backend, if it is one.
    pub fn gpu_mut(&mut self) -> Option<&mut GpuBackend> {
        match &mut self.lanes {
            Lanes::Cpu(_) => None,
            Lanes::Gpu(lane) => Some(&mut lane.backend),
        }
    }

    fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        match &mut self.lanes {
            Lanes::Cpu(lane) => lane.run(command),
            Lanes::Gpu(lane) => lane.run(command),
        }
    }

    /// Serves rank 0 until it closes the control connection. Errors: rank 0 or another rank is lost.
    pub fn work(mut self, mut control: ControlReceiver) -> Result<(), RunError> {
        while let Some(frame) = control.recv_control()? {
            self.run(Command::decode(&frame)?)?;
        }
        Ok(())
    }
}

/// All ranks, seen from rank 0.
pub struct Engine {
    rank: Rank,
    control: Option<ControlSender>,
}

impl Engine {
    /// Rank 0 with its workers; without `control` it is alone.
    pub fn new(rank: Rank, control: Option<ControlSender>) -> Engine {
        Engine { rank, control }
    }

    /// This process's rank.
    pub fn rank_mut(&mut self) -> &mut Rank {
        &mut self.rank
    }

    /// Runs a command on every rank: the wanted logits.
    pub fn run(&mut self, command: Command) -> Result<Mat, RunError> {
        if let Some(control) = &mut self.control {
            control.send_control(&command.encode())?;
        }
        self.rank.run(command)
    }

    /// Looks, without waiting, whether every worker is still there.
    pub fn check(&self) -> Result<(), RunError> {
        Ok(self.control.as_ref().map_or(Ok(()), ControlSender::check)?)
    }

    /// Ends the workers in order.
    pub fn close(self) -> Result<(), RunError> {
        if let Some(control) = self.control {
            control.close()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_the_wire() {
        let step = Step {
            tokens: vec![3, 1, 4],
            segments: vec![Segment { slot: 2, start: 9, rows: 1 }, Segment { slot: 0, start: 0, rows: 2 }],
            logits: vec![2],
            source: vec![7],
        };
        for command in [
            Command::Open(3),
            Command::Close(1),
            Command::Trunk(step.clone()),
            Command::Draft(step.clone(), Source::Trunk),
            Command::Draft(step, Source::Draft),
        ] {
            let bytes = command.encode();
            assert_eq!(Command::decode(&bytes).unwrap(), command);
            for cut in 0..bytes.len() {
                assert!(Command::decode(&bytes[..cut]).is_err());
            }
        }
        assert!(Command::decode(&[9, 0, 0, 0, 0]).is_err());
        let setup = Setup { context: 77_000, sequences: 8 };
        assert_eq!(Setup::decode(&setup.encode()).unwrap(), setup);
        assert!(Setup::decode(&[1, 2, 3]).is_err());
    }
}
