//! What goes wrong how often, as one line of text: `seed=1,error=0.05,slow=0.1:200ms,outage=30s@0.002`.

use std::str::FromStr;
use std::time::Duration;

use super::Fault;

/// Shares of requests that fail, each from 0 to 1 and of those requests that can suffer it.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultPlan {
    /// Seed of all draws.
    pub seed: u64,
    /// Share that fails before anything is done.
    pub error: f64,
    /// Share that is not done and not answered.
    pub timeout: f64,
    /// When an unanswered request ends.
    pub timeout_after: Duration,
    /// Share that is answered late.
    pub slow: f64,
    /// How late.
    pub slow_by: Duration,
    /// Share of writes and deletes that are done and whose answer is lost.
    pub lost: f64,
    /// Share of creates that are answered by a conflict, done or not.
    pub conflict: f64,
    /// Share of reads that end early.
    pub truncate: f64,
    /// Share of writes that find the disk full.
    pub full: f64,
    /// Share at which an outage begins.
    pub outage: f64,
    /// How long an outage is.
    pub outage_for: Duration,
}

impl Default for FaultPlan {
    /// Nothing fails.
    fn default() -> Self {
        Self {
            seed: 0,
            error: 0.0,
            timeout: 0.0,
            timeout_after: Duration::from_secs(1),
            slow: 0.0,
            slow_by: Duration::from_millis(200),
            lost: 0.0,
            conflict: 0.0,
            truncate: 0.0,
            full: 0.0,
            outage: 0.0,
            outage_for: Duration::from_secs(10),
        }
    }
}

/// A plan that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A key that is none of ours.
    #[error("{key:?} is not a storage fault; known are {KEYS}")]
    Key {
        /// What was given.
        key: String,
    },
    /// A value that the key cannot have.
    #[error("{key}={value}: expected {expected}")]
    Value {
        /// The key.
        key: String,
        /// What was given.
        value: String,
        /// What it can be.
        expected: &'static str,
    },
    /// The shares that one request can suffer exceed 1.
    #[error("the shares of all faults together must not exceed 1")]
    Shares,
}

const KEYS: &str = "seed=1, error=0.05, timeout=0.01:3s, slow=0.1:200ms, lost=0.05, conflict=0.05, truncate=0.02, \
                    full=0.01 and outage=30s@0.002";
const SHARE: &str = "a share from 0 to 1";
const SHARE_AND_TIME: &str = "a share from 0 to 1, or one and a time such as 0.1:200ms";
const OUTAGE: &str = "a time and the share of requests at which it begins, such as 30s@0.002";

impl FaultPlan {
    /// Each fault with its share.
    pub(super) fn shares(&self) -> [(Fault, f64); 8] {
        [
            (Fault::Outage, self.outage),
            (Fault::Error, self.error),
            (Fault::Timeout, self.timeout),
            (Fault::Lost, self.lost),
            (Fault::Conflict, self.conflict),
            (Fault::Truncate, self.truncate),
            (Fault::Full, self.full),
            (Fault::Slow, self.slow),
        ]
    }
}

impl FromStr for FaultPlan {
    type Err = PlanError;

    fn from_str(text: &str) -> Result<Self, PlanError> {
        let mut plan = Self::default();
        for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            let wrong = |expected| PlanError::Value { key: key.to_owned(), value: value.to_owned(), expected };
            let just = |share: &mut f64| parse_share(value).map(|s| *share = s).ok_or_else(|| wrong(SHARE));
            let timed = |share: &mut f64, time: &mut Duration| {
                let (before, after) = value.split_once(':').unzip();
                *share = parse_share(before.unwrap_or(value)).ok_or_else(|| wrong(SHARE_AND_TIME))?;
                if let Some(after) = after {
                    *time = parse_time(after).ok_or_else(|| wrong(SHARE_AND_TIME))?;
                }
                Ok(())
            };
            match key {
                "seed" => plan.seed = value.parse().map_err(|_| wrong("a whole number"))?,
                "error" => just(&mut plan.error)?,
                "timeout" => timed(&mut plan.timeout, &mut plan.timeout_after)?,
                "slow" => timed(&mut plan.slow, &mut plan.slow_by)?,
                "lost" => just(&mut plan.lost)?,
                "conflict" => just(&mut plan.conflict)?,
                "truncate" => just(&mut plan.truncate)?,
                "full" => just(&mut plan.full)?,
                "outage" => {
                    let parts =
                        value.split_once('@').and_then(|(time, at)| Some((parse_time(time)?, parse_share(at)?)));
                    (plan.outage_for, plan.outage) = parts.ok_or_else(|| wrong(OUTAGE))?;
                }
                _ => return Err(PlanError::Key { key: key.to_owned() }),
            }
        }
        if plan.shares().iter().map(|(_, share)| share).sum::<f64>() > 1.0 {
            return Err(PlanError::Shares);
        }
        Ok(plan)
    }
}

fn parse_share(text: &str) -> Option<f64> {
    text.trim().parse().ok().filter(|share| (0.0..=1.0).contains(share))
}

/// `200ms`, `30s` or `2m`.
fn parse_time(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let count: u64 = digits.parse().ok()?;
    match &text[digits.len()..] {
        "ms" => Some(Duration::from_millis(count)),
        "s" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_secs(count.checked_mul(60)?)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_is_read_from_a_line() {
        let plan: FaultPlan =
            "seed=7, error=0.05,timeout=0.01:3s,slow=0.1:200ms,lost=0.04,conflict=0.03,truncate=0.02,full=0.01,outage=2m@0.002"
                .parse()
                .unwrap();
        let expected = FaultPlan {
            seed: 7,
            error: 0.05,
            timeout: 0.01,
            timeout_after: Duration::from_secs(3),
            slow: 0.1,
            slow_by: Duration::from_millis(200),
            lost: 0.04,
            conflict: 0.03,
            truncate: 0.02,
            full: 0.01,
            outage: 0.002,
            outage_for: Duration::from_secs(120),
        };
        assert_eq!(plan, expected);
        assert_eq!("".parse(), Ok(FaultPlan::default()));
    }

    #[test]
    fn what_cannot_be_read_is_named_with_what_could() {
        let say = |text: &str| text.parse::<FaultPlan>().unwrap_err().to_string();
        let unknown = say("seed=1,eror=0.1");
        assert!(unknown.starts_with("\"eror\" is not a storage fault"), "{unknown}");
        for key in ["seed", "error", "timeout", "slow", "lost", "conflict", "truncate", "full", "outage"] {
            assert!(unknown.contains(key), "{key} is missing in: {unknown}");
        }
        assert_eq!(say("error=2"), "error=2: expected a share from 0 to 1");
        assert_eq!(say("slow=0.1:soon"), format!("slow=0.1:soon: expected {SHARE_AND_TIME}"));
        assert_eq!(say("outage=0.1"), format!("outage=0.1: expected {OUTAGE}"));
        assert_eq!(say("seed=x"), "seed=x: expected a whole number");
        assert_eq!("error=0.6,slow=0.6".parse::<FaultPlan>(), Err(PlanError::Shares));
    }
}
