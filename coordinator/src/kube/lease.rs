//! One leader of several replicas, by a Lease. Its count of transitions is the leader's term, and fences what the leader writes.

use std::time::Duration;

use anyhow::{Result, bail};
use futures::{StreamExt, TryStreamExt};
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::Api;
use kube::api::PostParams;
use kube::runtime::{WatchStreamExt, watcher};
use tokio::time::Instant;

/// Name of the Lease.
pub const NAME: &str = "sgcl-coordinator";
/// A leader that has not renewed for so long has lost it. Survivors of a power cut that took the leader too wait for this and then for each
/// other.
const DURATION: Duration = Duration::from_secs(7);
/// Time between two renewals.
const RENEW: Duration = Duration::from_millis(1500);
/// A leader that could not renew for so long stops by itself, before another one may begin.
const STEP_DOWN: Duration = Duration::from_secs(5);

/// What a look at the Lease comes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Nobody holds it, or the holder fell silent: write it with this count of transitions.
    Take {
        /// Changes of holder, this one among them.
        transitions: i32,
    },
    /// Another holds it: look again then, or when it changes.
    Wait(Duration),
}

/// Decides whose turn it is. `silent` is how long the Lease has been seen unchanged: another machine's clock is never compared with ours.
#[must_use]
pub fn turn(lease: Option<&LeaseSpec>, me: &str, silent: Duration) -> Turn {
    let Some(lease) = lease else { return Turn::Take { transitions: 1 } };
    let transitions = lease.lease_transitions.unwrap_or(0);
    let holder = lease.holder_identity.as_deref().unwrap_or("");
    let limit = Duration::from_secs(lease.lease_duration_seconds.unwrap_or(0).try_into().unwrap_or(0));
    if holder.is_empty() || holder == me || silent >= limit {
        return Turn::Take { transitions: transitions + 1 };
    }
    Turn::Wait(limit - silent)
}

/// The Lease, held.
pub struct Held {
    api: Api<Lease>,
    lease: Lease,
    renewed: Instant,
}

/// Waits for the Lease and takes it.
///
/// # Errors
/// The API server refuses; what passes by itself is waited out.
pub async fn acquire(api: Api<Lease>, me: &str) -> Result<Held> {
    let mut changes = watcher::watch_object(api.clone(), NAME).default_backoff().boxed();
    let mut seen: (Option<Lease>, Instant) = (None, Instant::now());
    let mut first = true;
    loop {
        let spec = seen.0.as_ref().and_then(|lease| lease.spec.as_ref());
        // The first look is the watch's.
        let turn = if first { Turn::Wait(DURATION) } else { turn(spec, me, seen.1.elapsed()) };
        let wait = match turn {
            Turn::Take { transitions } => {
                if let Some(held) = take(&api, seen.0.clone(), me, transitions).await? {
                    tracing::info!(transitions, "this replica leads");
                    return Ok(held);
                }
                // Somebody was faster: the watch tells who.
                Duration::from_secs(1)
            }
            Turn::Wait(wait) => wait,
        };
        tokio::select! {
            change = changes.try_next() => match change {
                Ok(Some(lease)) => {
                    let version = |lease: &Option<Lease>| lease.as_ref().and_then(|l| l.metadata.resource_version.clone());
                    if first || version(&lease) != version(&seen.0) {
                        seen = (lease, Instant::now());
                    }
                    first = false;
                }
                Ok(None) => bail!("the watch over the Lease ended"),
                Err(error) => tracing::warn!(%error, "the Lease cannot be watched; trying again"),
            },
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Writes our name; none where another was faster or the server is away.
async fn take(api: &Api<Lease>, lease: Option<Lease>, me: &str, transitions: i32) -> Result<Option<Held>> {
    let now = Some(MicroTime(Timestamp::now()));
    let spec = LeaseSpec {
        holder_identity: Some(me.to_owned()),
        lease_duration_seconds: Some(DURATION.as_secs().try_into().unwrap_or(i32::MAX)),
        acquire_time: now.clone(),
        renew_time: now,
        lease_transitions: Some(transitions),
        ..LeaseSpec::default()
    };
    let asked = Instant::now();
    let written = match lease {
        Some(lease) => api.replace(NAME, &PostParams::default(), &Lease { spec: Some(spec), ..lease }).await,
        None => {
            let metadata = ObjectMeta { name: Some(NAME.into()), ..ObjectMeta::default() };
            api.create(&PostParams::default(), &Lease { metadata, spec: Some(spec) }).await
        }
    };
    match written {
        Ok(lease) => Ok(Some(Held { api: api.clone(), lease, renewed: asked })),
        Err(kube::Error::Api(status)) if status.code == 403 => {
            bail!("the Lease {NAME} cannot be written: {}; apply deploy/ again", status.message)
        }
        Err(error) => {
            tracing::info!(%error, "the Lease was not taken");
            Ok(None)
        }
    }
}

impl Held {
    /// The leader's term.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        let transitions = self.lease.spec.as_ref().and_then(|spec| spec.lease_transitions).unwrap_or(0);
        transitions.try_into().unwrap_or(0)
    }

    /// Renews until that is no longer possible; says why. Whoever led must have stopped when this returns.
    pub async fn keep(&mut self) -> String {
        loop {
            tokio::time::sleep(RENEW).await;
            let asked = Instant::now();
            let mut lease = self.lease.clone();
            if let Some(spec) = &mut lease.spec {
                spec.renew_time = Some(MicroTime(Timestamp::now()));
            }
            let left = STEP_DOWN.saturating_sub(self.renewed.elapsed());
            match tokio::time::timeout(left, self.api.replace(NAME, &PostParams::default(), &lease)).await {
                Ok(Ok(lease)) => {
                    self.lease = lease;
                    self.renewed = asked;
                }
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                    // A lost reply of our own looks the same: ask who holds it.
                    match self.api.get(NAME).await {
                        Ok(now) if holder(&now) == holder(&self.lease) => self.lease = now,
                        Ok(now) => return format!("{} leads now", holder(&now).unwrap_or("nobody")),
                        Err(error) => tracing::warn!(%error, "the Lease cannot be read"),
                    }
                }
                Ok(Err(error)) => tracing::warn!(%error, "the Lease was not renewed"),
                Err(_) => {}
            }
            if self.renewed.elapsed() >= STEP_DOWN {
                return format!("the Lease was not renewed for {} s", STEP_DOWN.as_secs());
            }
        }
    }

    /// Gives it back, so that another replica need not wait.
    pub async fn release(mut self) {
        if let Some(spec) = &mut self.lease.spec {
            spec.holder_identity = Some(String::new());
            spec.renew_time = Timestamp::now().checked_sub(SignedDuration::from_secs(60)).ok().map(MicroTime);
        }
        if let Err(error) = self.api.replace(NAME, &PostParams::default(), &self.lease).await {
            tracing::warn!(%error, "the Lease was not given back; it runs out by itself");
        }
    }
}

fn holder(lease: &Lease) -> Option<&str> {
    lease.spec.as_ref()?.holder_identity.as_deref()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(by: &str) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(by.into()),
            lease_duration_seconds: Some(10),
            lease_transitions: Some(4),
            ..LeaseSpec::default()
        }
    }

    #[test]
    fn the_first_term_is_1_and_every_change_is_another() {
        assert_eq!(turn(None, "a", Duration::ZERO), Turn::Take { transitions: 1 });
        assert_eq!(turn(Some(&held("")), "a", Duration::ZERO), Turn::Take { transitions: 5 });
        assert_eq!(turn(Some(&held("a")), "a", Duration::ZERO), Turn::Take { transitions: 5 }, "it died and came back");
    }

    #[test]
    fn a_holder_is_waited_for_until_it_has_been_silent_for_the_whole_duration() {
        let wait = turn(Some(&held("b")), "a", Duration::from_secs(4));
        assert_eq!(wait, Turn::Wait(Duration::from_secs(6)));
        assert_eq!(turn(Some(&held("b")), "a", Duration::from_secs(10)), Turn::Take { transitions: 5 });
    }
}
