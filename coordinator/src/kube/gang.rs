//! Gangs without a scheduler: where several runs hold nodes and none has enough of them, one gives its nodes back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use jiff::Timestamp;
use tokio::sync::watch;

/// How a run stands towards the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has enough nodes.
    Trains,
    /// It has some, and too few.
    Holds {
        /// Priority of its pods.
        priority: i32,
        /// When its object was made.
        made: Timestamp,
    },
}

/// Whether `run` is the one that gives way: the youngest of the lowest priority, where at least two hold nodes and nobody trains.
#[must_use]
pub fn gives_way(run: &str, standings: &BTreeMap<String, Standing>) -> bool {
    let holders = standings.iter().filter_map(|(name, standing)| match standing {
        Standing::Holds { priority, made } => Some((name, priority, made)),
        Standing::Trains => None,
    });
    let mut holders: Vec<_> = holders.collect();
    if holders.len() < 2 || holders.len() < standings.len() {
        return false;
    }
    holders.sort_by_key(|&(name, priority, made)| (*priority, std::cmp::Reverse(*made), name));
    holders.first().is_some_and(|(name, ..)| *name == run)
}

/// The runs of a leader, as they stand.
#[derive(Clone, Default)]
pub struct Gangs {
    standings: Arc<Mutex<BTreeMap<String, Standing>>>,
    changes: Arc<watch::Sender<()>>,
}

impl Gangs {
    /// Notes how a run stands; none where it holds nothing.
    pub fn stand(&self, run: &str, standing: Option<Standing>) {
        let mut standings = self.standings.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match standing {
            Some(standing) => standings.insert(run.to_owned(), standing),
            None => standings.remove(run),
        };
        if before != standing {
            self.changes.send_replace(());
        }
    }

    /// Whether `run` is the one that gives way now.
    #[must_use]
    pub fn gives_way(&self, run: &str) -> bool {
        gives_way(run, &self.standings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tells when any run's standing changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<()> {
        self.changes.subscribe()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn holds(priority: i32, made: i64) -> Standing {
        Standing::Holds { priority, made: Timestamp::from_second(made).unwrap() }
    }

    fn who(standings: &[(&str, Standing)]) -> Vec<String> {
        let all: BTreeMap<String, Standing> = standings.iter().map(|(run, s)| ((*run).to_owned(), *s)).collect();
        all.keys().filter(|run| gives_way(run, &all)).cloned().collect()
    }

    #[test]
    fn of_several_that_hold_too_few_the_youngest_of_the_lowest_priority_gives_way() {
        assert_eq!(who(&[("old", holds(0, 1)), ("young", holds(0, 9))]), ["young"]);
        assert_eq!(who(&[("low", holds(0, 1)), ("high", holds(5, 9))]), ["low"]);
        assert_eq!(who(&[("a", holds(0, 1)), ("b", holds(0, 1))]).len(), 1, "exactly one, whatever the clock says");
    }

    #[test]
    fn who_waits_alone_or_behind_one_that_trains_keeps_what_it_has() {
        assert!(who(&[("only", holds(0, 1))]).is_empty());
        let trains = ("third", Standing::Trains);
        assert!(who(&[("old", holds(0, 1)), ("young", holds(0, 9)), trains]).is_empty());
    }
}
