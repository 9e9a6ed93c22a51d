//! Storage that fails on purpose: which request is hit by what, drawn from a seed or said by a test.
//!
//! [`FaultyStore`] injects into any other store. A server that speaks S3 can draw from the same [`Faults`]. With the feature `faults`
//! every store that is opened is a faulty one where the environment asks for it.

mod plan;
mod wrapper;

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rand::RngCore;
use sgcl_draw::{Purpose, rng};
use tokio::time::Instant;

pub use plan::{FaultPlan, PlanError};
pub use wrapper::FaultyStore;

/// A kind of request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Reads an object or a range of it.
    Get,
    /// Asks for an object's size.
    Head,
    /// Writes an object over what was there.
    Put,
    /// Writes an object that must not exist.
    Create,
    /// Begins an upload in parts.
    Start,
    /// Uploads a part.
    Part,
    /// Makes an upload in parts an object.
    Complete,
    /// Deletes an object, or an upload in parts.
    Delete,
    /// Lists objects.
    List,
}

/// What happens to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fault {
    /// It fails before anything is done.
    Error,
    /// Nothing is done, and no answer comes until [`FaultPlan::timeout_after`].
    Timeout,
    /// The answer comes [`FaultPlan::slow_by`] later.
    Slow,
    /// It is done, and the answer is lost.
    Lost,
    /// The answer to a create is a conflict, or that the object exists: whether the create was done or not.
    Conflict,
    /// The answer's body ends early.
    Truncate,
    /// There is no space left.
    Full,
    /// Everything fails for a while.
    Outage,
}

impl Fault {
    /// Whether requests of this kind can suffer it.
    #[must_use]
    pub fn applies_to(self, op: Op) -> bool {
        match self {
            Self::Error | Self::Timeout | Self::Slow | Self::Outage => true,
            Self::Lost => matches!(op, Op::Put | Op::Create | Op::Part | Op::Complete | Op::Delete),
            Self::Conflict => op == Op::Create,
            Self::Truncate => op == Op::Get,
            Self::Full => matches!(op, Op::Put | Op::Create | Op::Start | Op::Part | Op::Complete),
        }
    }
}

/// A fault that hit, with the draw that decides its details.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// What happens.
    pub fault: Fault,
    draw: u64,
}

impl Hit {
    /// One of two details, each as likely; `which` from 0 to 7 tells independent ones apart.
    #[must_use]
    pub fn coin(self, which: u32) -> bool {
        self.draw >> (which % 8) & 1 == 1
    }

    /// How much of `whole` a truncated body has: less than all of it.
    #[must_use]
    pub fn part_of(self, whole: u64) -> u64 {
        if whole == 0 { 0 } else { (self.draw >> 8) % whole }
    }
}

/// A store that fails as the environment asks.
#[cfg(feature = "faults")]
pub(super) fn as_asked(
    store: super::Store,
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<super::Store, super::StoreError> {
    let variable = "SGCL_STORE_FAULTS";
    let Some(asked) = env(variable) else { return Ok(store) };
    let plan = asked.parse().map_err(|source| super::StoreError::Faults { variable, source })?;
    tracing::warn!(?plan, "storage fails on purpose");
    let faults = Faults::new(plan);
    Ok(store.wrapped(|inner| Arc::new(FaultyStore::new(inner, faults))))
}

/// Draws the fault of every request. Clones share one state.
#[derive(Clone, Debug, Default)]
pub struct Faults(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    plan: FaultPlan,
    requests: u64,
    forced: BTreeMap<Op, VecDeque<Option<Fault>>>,
    /// Everything fails until then.
    out_until: Option<Instant>,
    out: bool,
    full: bool,
    injected: BTreeMap<Fault, u64>,
}

impl Faults {
    /// Draws by `plan`.
    #[must_use]
    pub fn new(plan: FaultPlan) -> Self {
        Self(Arc::new(Mutex::new(State { plan, ..State::default() })))
    }

    /// Draws by another plan from now on; an outage under way goes on.
    pub fn set(&self, plan: FaultPlan) {
        self.state().plan = plan;
    }

    /// The plan.
    #[must_use]
    pub fn plan(&self) -> FaultPlan {
        self.state().plan.clone()
    }

    /// The next request of kind `op` that nothing else was said about suffers `fault`, or surely none.
    ///
    /// # Panics
    /// Requests of that kind cannot suffer it: the test is wrong.
    pub fn next(&self, op: Op, fault: impl Into<Option<Fault>>) {
        let fault = fault.into();
        assert!(fault.is_none_or(|fault| fault.applies_to(op)), "{op:?} cannot suffer {fault:?}");
        self.state().forced.entry(op).or_default().push_back(fault);
    }

    /// Everything fails from now on, or no longer.
    pub fn outage(&self, on: bool) {
        let mut state = self.state();
        state.out = on;
        if !on {
            state.out_until = None;
        }
    }

    /// Everything fails for that long.
    pub fn outage_for(&self, time: Duration) {
        self.state().out_until = Some(Instant::now() + time);
    }

    /// The disk is full from now on, or no longer.
    pub fn full(&self, on: bool) {
        self.state().full = on;
    }

    /// How often each fault hit so far.
    #[must_use]
    pub fn injected(&self) -> BTreeMap<Fault, u64> {
        self.state().injected.clone()
    }

    /// Requests so far.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.state().requests
    }

    /// Decides about the next request.
    #[must_use]
    pub fn draw(&self, op: Op) -> Option<Hit> {
        let mut state = self.state();
        let mut draws = rng(state.plan.seed, Purpose::Faults, 0, state.requests);
        state.requests += 1;
        let fault = state.decide(op, Instant::now(), draws.next_u64())?;
        *state.injected.entry(fault).or_default() += 1;
        Some(Hit { fault, draw: draws.next_u64() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn decide(&mut self, op: Op, now: Instant, draw: u64) -> Option<Fault> {
        if self.out || self.out_until.is_some_and(|until| now < until) {
            return Some(Fault::Outage);
        }
        if let Some(said) = self.forced.get_mut(&op).and_then(VecDeque::pop_front) {
            return said;
        }
        if self.full && Fault::Full.applies_to(op) {
            return Some(Fault::Full);
        }
        #[allow(clippy::cast_precision_loss)]
        let mut left = (draw >> 11) as f64 / (1_u64 << 53) as f64;
        for (fault, share) in self.plan.shares() {
            if !fault.applies_to(op) {
                continue;
            }
            if left < share {
                if fault == Fault::Outage {
                    self.out_until = Some(now + self.plan.outage_for);
                }
                return Some(fault);
            }
            left -= share;
        }
        None
    }
}
