//! All ranks of an artifact in this process: rank 0 here, the others as threads, over loopback.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread::JoinHandle;

use dsv4_format::LoadOptions;
use dsv4_kernels::collective::{Alone, Collective, CollectiveError};
use dsv4_kernels::device::Gpu;
use dsv4_kernels::gpu::{GpuBackend, GpuOptions};
use dsv4_kernels::numerics::Numerics;
use dsv4_kernels::ops::Mat;
use dsv4_kernels::reference::Reference;
use dsv4_model::ops::{Segment, Step};
use dsv4_run::generate::{Part, prefill};
use dsv4_run::gpu::Ready;
use dsv4_run::load::{Opened, RankOptions, open};
use dsv4_run::ranks::{self, Control, Deadlines, Mesh, Token};
use dsv4_run::step::{Command, Engine, Rank};

use crate::artifacts::Unwatched;
use crate::device;

/// Addresses for a group that no other process or group of this machine uses: a loopback address
/// made from this process's id and a count. No port is probed and lost to somebody else.
pub fn addresses(ranks: u32) -> Vec<String> {
    static GROUPS: AtomicU16 = AtomicU16::new(0);
    let group = GROUPS.fetch_add(1, Ordering::Relaxed);
    let process = std::process::id();
    let host = format!("127.{}.{}.{}", 1 + (process >> 8) % 250, process % 256, 1 + group % 250);
    (0..ranks).map(|rank| format!("{host}:{}", 20_000 + group / 250 * 8 + rank as u16)).collect()
}

/// Another rank whose every summand is 0: as one says that its block-scaled kernels have failed.
pub struct Failed;

impl Collective for Failed {
    fn rank(&self) -> u32 {
        0
    }
    fn size(&self) -> u32 {
        2
    }
    fn all_reduce(&mut self, _data: &mut [f32]) -> Result<(), CollectiveError> {
        Ok(())
    }
    fn gather(&mut self, _mine: &[f32], _out: &mut [f32]) -> Result<(), CollectiveError> {
        Err(CollectiveError("a rank that only sums".into()))
    }
}

/// A group of ranks, ready.
pub struct Group {
    /// All of them, seen from rank 0.
    pub engine: Engine,
    workers: Vec<JoinHandle<()>>,
}

/// Makes a rank of an opened artifact.
type Make = dyn Fn(&Opened, u32, Box<dyn Collective>) -> Rank + Send + Sync;

impl Group {
    /// Loads every rank of `artifact` on the CPU; a step may have `rows_max` rows.
    pub fn start(artifact: &Path, numerics: Numerics, rows_max: usize) -> Group {
        let options = RankOptions { numerics, slots: 1, rows_max };
        Group::of(artifact, move |opened, rank, collective| {
            let arena = opened.artifact.load_rank(rank, 2, &Unwatched).unwrap_or_else(|e| panic!("{e}"));
            opened.backend(arena, collective, options).unwrap_or_else(|e| panic!("{e}")).into()
        })
    }

    /// Loads every rank of `artifact`, which has kernels for it, on the GPU or its emulator.
    pub fn on_gpu(artifact: &Path, numerics: Numerics, options: GpuOptions) -> Group {
        let open = || device::open().expect("a GPU, as before").gpu;
        Group::on(open, artifact, numerics, options)
    }

    /// The same on a GPU of the test's.
    pub fn on(
        open: impl Fn() -> Arc<dyn Gpu> + Send + Sync + 'static,
        artifact: &Path,
        numerics: Numerics,
        options: GpuOptions,
    ) -> Group {
        Group::of(artifact, move |opened, rank, collective| {
            let gpu = open();
            let ready = Ready::new(opened, gpu, rank, numerics, options).unwrap_or_else(|e| panic!("{e}"));
            let loaded = ready.load(opened, &LoadOptions { threads: 1, ..LoadOptions::default() }, &Unwatched);
            loaded.unwrap_or_else(|e| panic!("{e}")).0.backend(collective).into()
        })
    }

    /// One rank on the GPU or its emulator, with portable kernels alone, as if another rank's block-scaled ones had failed.
    pub fn on_gpu_portable(artifact: &Path, numerics: Numerics, options: GpuOptions) -> Group {
        let opened = open(artifact).unwrap_or_else(|e| panic!("{e}"));
        let gpu = device::open().expect("a GPU, as before").gpu;
        let mut ready = Ready::new(&opened, gpu, 0, numerics, options).unwrap_or_else(|e| panic!("{e}"));
        ready.agree(&mut Failed).unwrap_or_else(|e| panic!("{e}"));
        let loaded = ready.load(&opened, &LoadOptions::default(), &Unwatched).unwrap_or_else(|e| panic!("{e}"));
        Group::alone(loaded.0.backend(Box::new(Alone)))
    }

    fn of(artifact: &Path, make: impl Fn(&Opened, u32, Box<dyn Collective>) -> Rank + Send + Sync + 'static) -> Group {
        let opened = open(artifact).unwrap_or_else(|e| panic!("{e}"));
        let tp = opened.artifact.manifest().tp;
        if tp == 1 {
            return Group::alone(make(&opened, 0, Box::new(Alone)));
        }
        let make: Arc<Make> = Arc::new(make);
        let peers = addresses(tp);
        let (rank_0, workers) = (peers.clone(), 1..tp);
        let workers = workers.map(|rank| {
            let (artifact, peers, make) = (artifact.to_owned(), peers.clone(), Arc::clone(&make));
            std::thread::spawn(move || match join(&artifact, rank, &peers, make.as_ref()) {
                (rank, Control::Worker(receiver)) => rank.work(receiver).unwrap_or_else(|e| panic!("{e}")),
                (_, control) => panic!("rank {rank} got {control:?}"),
            })
        });
        let workers = workers.collect();
        match join(artifact, 0, &rank_0, make.as_ref()) {
            (rank, Control::Leader(sender)) => Group { engine: Engine::new(rank, Some(sender)), workers },
            (_, control) => panic!("rank 0 got {control:?}"),
        }
    }

    /// One rank that is there already.
    pub fn alone(rank: impl Into<Rank>) -> Group {
        Group { engine: Engine::new(rank.into(), None), workers: Vec::new() }
    }

    /// Rank 0's backend on the CPU.
    pub fn reference(&mut self) -> &mut Reference {
        self.engine.rank_mut().cpu_mut().expect("a rank on the CPU")
    }

    /// Rank 0's backend on the GPU.
    pub fn gpu(&mut self) -> &mut GpuBackend {
        self.engine.rank_mut().gpu_mut().expect("a rank on a GPU")
    }

    /// Logits of every row of `tokens` in steps of `chunk` rows; with `mtp` also the draft block's.
    pub fn logits(&mut self, tokens: &[u32], chunk: usize, mtp: bool) -> (Mat, Mat) {
        let (mut trunk, mut draft) = (Mat::default(), Mat::default());
        let mut append = |of: Part, first: usize, part: Mat| {
            let out = if of == Part::Trunk { &mut trunk } else { &mut draft };
            assert_eq!(out.rows, first, "rows in order");
            (out.rows, out.cols) = (out.rows + part.rows, part.cols);
            out.data.extend(part.data);
            Ok(())
        };
        prefill(&mut self.engine, tokens, chunk, true, mtp, &mut append).unwrap_or_else(|e| panic!("{e}"));
        self.run(Command::Close(0));
        (trunk, draft)
    }

    /// The trunk's logits of every row, in steps of the given sizes, the last repeated.
    pub fn logits_in_parts(&mut self, tokens: &[u32], parts: &[usize]) -> Mat {
        let mut out = Mat::default();
        self.run(Command::Open(0));
        let mut sizes = parts.iter().chain(std::iter::repeat(parts.last().expect("a size")));
        while out.rows < tokens.len() {
            let (start, rows) = (out.rows, *sizes.next().expect("endless"));
            let rows = rows.min(tokens.len() - start);
            let part = self.run(Command::Trunk(Step {
                tokens: tokens[start..start + rows].to_vec(),
                segments: vec![Segment { slot: 0, start: start as u32, rows: rows as u32 }],
                logits: (0..rows as u32).collect(),
                source: vec![],
            }));
            (out.rows, out.cols) = (start + rows, part.cols);
            out.data.extend(part.data);
        }
        self.run(Command::Close(0));
        out
    }

    /// Runs a command on every rank.
    pub fn run(&mut self, command: Command) -> Mat {
        self.engine.run(command).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Ends all ranks; a rank that failed fails the test.
    pub fn finish(self) {
        self.engine.close().unwrap_or_else(|e| panic!("{e}"));
        for worker in self.workers {
            assert!(worker.join().is_ok(), "a rank failed");
        }
    }
}

fn join(artifact: &Path, rank: u32, peers: &[String], make: &Make) -> (Rank, Control) {
    let opened = open(artifact).unwrap_or_else(|e| panic!("{e}"));
    let connected = ranks::connect(rank, peers, Token::new([7; 32]), Vec::new(), Deadlines::default());
    let Mesh { collective, control } = connected.unwrap_or_else(|e| panic!("{e}"));
    (make(&opened, rank, Box::new(collective)), control)
}
