//! The one retry policy: what passes by itself is waited for, and said.
//!
//! Below it the S3 client tries each request a few times within seconds. A [`Store`] without patience reports what is left, so that a
//! wrong endpoint is named soon; a run, which has seen its storage work, has all the patience there is.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::{Store, StoreError};

const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// After an outage, work goes on within this time.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// A wait is told of this often at most, by all requests together.
const SAY_EVERY: Duration = Duration::from_secs(10);

/// How long requests are tried again, and how that goes. Shared by a store, its children and its clones.
#[derive(Debug)]
pub(super) struct Patience {
    /// Time from a request's first failure to giving up.
    limit: Duration,
    in_flight: AtomicUsize,
    trouble: Mutex<Option<Trouble>>,
}

#[derive(Debug)]
struct Trouble {
    since: Instant,
    said: Instant,
}

impl Patience {
    pub(super) fn new(limit: Duration) -> Arc<Self> {
        Arc::new(Self { limit, in_flight: AtomicUsize::new(0), trouble: Mutex::default() })
    }

    fn failed(&self, error: &StoreError, doing: &'static str, pause: Duration) {
        let now = Instant::now();
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = match &mut *trouble {
            Some(trouble) if now.duration_since(trouble.said) < SAY_EVERY => return,
            Some(trouble) => {
                trouble.said = now;
                now.duration_since(trouble.since)
            }
            None => {
                *trouble = Some(Trouble { since: now, said: now });
                Duration::ZERO
            }
        };
        let (waited_s, again_s) = (waited.as_secs(), pause.as_secs_f64());
        tracing::warn!(waited_s, again_s, "waiting for the storage, {doing}: {error}");
    }

    fn worked(&self) {
        let mut trouble = self.trouble.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Trouble { since, .. }) = trouble.take() {
            let waited_s = since.elapsed().as_secs_f64();
            tracing::info!(waited_s, "the storage answers again");
        }
    }
}

/// Counts a request while it lasts, however it ends.
struct InFlight<'a>(&'a AtomicUsize);

impl<'a> InFlight<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Store {
    /// The same place, where every request is tried again until it is answered. Only failures that need somebody
    /// ([`StoreError::is_permanent`]) are reported.
    #[must_use]
    pub fn patient(&self) -> Self {
        self.patient_for(Duration::MAX)
    }

    /// The same place, where a request is tried again for `limit` from its first failure.
    #[must_use]
    pub fn patient_for(&self, limit: Duration) -> Self {
        Self { patience: Some(Patience::new(limit)), ..self.clone() }
    }

    /// The same place, where a failure is reported at once.
    #[must_use]
    pub fn impatient(&self) -> Self {
        Self { patience: None, ..self.clone() }
    }

    /// Whether a request of this patient store, of its children or clones, is under way: then whoever waits, waits for the storage.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.patience.as_ref().is_some_and(|patience| patience.in_flight.load(Ordering::Relaxed) > 0)
    }

    /// Runs a request until it is answered, as long as this store's patience lasts. `doing` says what for, such as `to write`.
    pub(super) async fn retrying<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        doing: &'static str,
        mut request: impl FnMut() -> F,
    ) -> Result<T, StoreError> {
        let Some(patience) = self.patience.as_deref() else { return request().await };
        let _in_flight = InFlight::new(&patience.in_flight);
        let (mut pause, mut first) = (FIRST_PAUSE, None);
        loop {
            let error = match request().await {
                Err(error) if !error.is_permanent() => error,
                // A refusal is an answer too.
                answer => {
                    patience.worked();
                    return answer;
                }
            };
            let since = *first.get_or_insert_with(Instant::now);
            if since.elapsed() >= patience.limit {
                return Err(error);
            }
            patience.failed(&error, doing, pause);
            tokio::time::sleep(pause.min(patience.limit)).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}
