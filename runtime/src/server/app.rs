//! What every request sees.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::Semaphore;

use crate::scheduler::Scheduler;

use super::error::{ApiError, Result};
use super::fields::Fields;
use super::{ModelInfo, ServerConfig};

/// Requests that are read and tokenized at once: this is work for processors, and there are few.
const TOKENIZING_MAX: usize = 8;

pub(super) struct App {
    pub config: ServerConfig,
    pub model: Arc<ModelInfo>,
    pub scheduler: Scheduler,
    /// When the server began, in seconds since 1970.
    pub created: u64,
    tokenizing: Arc<Semaphore>,
    answering: Arc<AtomicUsize>,
}

impl App {
    pub fn new(config: ServerConfig, model: Arc<ModelInfo>, scheduler: Scheduler) -> App {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let tokenizing = Arc::new(Semaphore::new(cores.min(TOKENIZING_MAX)));
        App { config, model, scheduler, created: now(), tokenizing, answering: Arc::default() }
    }

    /// Most tokens of prompt and answer.
    pub fn context(&self) -> usize {
        self.scheduler.limits().context
    }

    /// Nothing new is taken.
    pub fn drain(&self) {
        self.scheduler.drain();
    }

    /// Counts a request until the guard is dropped.
    pub fn answer(&self) -> Answering {
        self.answering.fetch_add(1, SeqCst);
        Answering(self.answering.clone())
    }

    /// Requests that are not answered to their end.
    pub fn answering(&self) -> usize {
        self.answering.load(SeqCst)
    }

    /// The work before a job is submitted, if there is a place for one. Errors: there is none; those of the work.
    pub async fn make_ready<T: Send + 'static>(
        self: &Arc<App>,
        work: impl FnOnce(&App) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _place = self.scheduler.place().map_err(|refused| ApiError::refused(refused, "", 0))?;
        self.work(work).await
    }

    /// Work that takes long, on a thread for such.
    pub async fn work<T: Send + 'static>(
        self: &Arc<App>,
        work: impl FnOnce(&App) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        // The permit goes with the work, which goes on when nobody waits for it any more.
        let permit = self.tokenizing.clone().acquire_owned().await.map_err(ApiError::failed)?;
        let app = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&app)
        });
        done.await.unwrap_or_else(|error| Err(ApiError::failed(error)))
    }

    /// Refuses a request for another model; one that names none is for this.
    pub fn check_model(&self, request: &Fields) -> Result<()> {
        match request.string("model")? {
            Some(name) if !self.is_served(name) => Err(ApiError::no_model(name, &self.model.name)),
            _ => Ok(()),
        }
    }

    pub fn is_served(&self, name: &str) -> bool {
        self.model.name == name || self.model.aliases.iter().any(|alias| alias == name)
    }
}

/// A request that is being answered.
pub(super) struct Answering(Arc<AtomicUsize>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// 64 bits that nobody can foretell: a keyed hash, keys by the operating system.
pub(super) fn random() -> u64 {
    use std::hash::{BuildHasher, Hasher, RandomState};
    RandomState::new().build_hasher().finish()
}

/// An id that no other reply has.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}{:016x}", random())
}
