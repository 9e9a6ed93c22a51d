//! What a conductor does before its run is trained: ask for nodes, and keep the gang together.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use kube::ResourceExt as _;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use super::{Conductor, Next, PAUSES, Wish};
use crate::kube::gang::Standing;
use crate::kube::job::HOPELESS;
use crate::kube::launcher::KubeLauncher;
use crate::kube::plan::Plan;
use crate::kube::pods::PodFacts;
use crate::kube::report::Facts;
use crate::kube::resource::SgclRun;
use crate::launcher::{Ended, Launcher as _};
use crate::machine::YIELDED;

/// A run that is to give way does so after so long: the scheduler may be at work.
const GIVE_WAY: Duration = Duration::from_secs(15);
/// A node that has lived so long before training began did not fail.
const PATIENT: Duration = Duration::from_secs(300);

impl Conductor {
    /// Asks for nodes and waits until enough of them run. A gang is kept together here, before anything is trained.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn gather(
        &mut self,
        wish: Wish,
        object: &mut watch::Receiver<Arc<SgclRun>>,
        plan: &Plan,
        launcher: &KubeLauncher,
        news: &mut mpsc::UnboundedReceiver<PodFacts>,
        facts: &mut Facts,
        training: bool,
    ) -> Result<Option<Next>> {
        while let Ok(pod) = news.try_recv() {
            launcher.pod(&pod);
        }
        if training && launcher.running() > 0 {
            // Somebody trains: that must not wait for whoever is missing.
            return Ok(None);
        }
        let (ended, mut ends) = mpsc::unbounded_channel();
        // Attempt and time of each slot's launch, and those that are to come.
        let (mut attempts, mut later) = (BTreeMap::new(), BTreeMap::<u32, Instant>::new());
        for slot in 0..plan.nodes {
            launcher.launch(slot, 0, &self.shared.url, ended.clone())?;
            attempts.insert(slot, (0, Instant::now()));
        }
        let (mut failures, mut yielding) = (0, None);
        let made = object.borrow().creation_timestamp().map_or(jiff::Timestamp::UNIX_EPOCH, |made| made.0);
        let (mut gangs, mut queues) = (self.shared.gangs.changes(), self.shared.queues.held());
        loop {
            for (slot, _) in later.extract_if(.., |_, due| *due <= Instant::now()) {
                let attempt = attempts.get(&slot).map_or(0, |(attempt, _)| *attempt);
                launcher.launch(slot, attempt, &self.shared.url, ended.clone())?;
            }
            let running = launcher.running();
            let holds = Standing::Holds { priority: launcher.priority(), made };
            self.shared.gangs.stand(&self.name, (running > 0).then_some(holds));
            if running < plan.min_nodes && self.shared.gangs.gives_way(&self.name) {
                if yielding.get_or_insert_with(Instant::now).elapsed() >= GIVE_WAY {
                    launcher.kill_all();
                    let message = format!(
                        "{running} of at least {} nodes ran; gave them back so that another run can begin",
                        plan.min_nodes
                    );
                    return Ok(Some(Next::Retry(message)));
                }
            } else {
                yielding = None;
            }
            if running >= plan.min_nodes {
                return Ok(None);
            }
            let missing = format!("{running} of at least {} nodes run", plan.min_nodes);
            facts.message = Some(match launcher.waiting(&queues.borrow_and_update()) {
                Some((_, message)) => format!("{missing}: {message}"),
                None => missing,
            });
            facts.started = running;
            self.reporter.tell(facts).await;
            let look = later.values().copied().chain(yielding.map(|since: Instant| since + GIVE_WAY)).min();
            tokio::select! {
                Some(pod) = news.recv() => launcher.pod(&pod),
                Some(Ended { slot, attempt, code }) = ends.recv() => {
                    let Some((current, since)) = attempts.get_mut(&slot).filter(|(current, _)| *current == attempt) else { continue };
                    let words = launcher.said(slot).unwrap_or_else(|| format!("see `sgclctl logs {}`", self.name));
                    let message = format!("a node ended with code {code} before training began: {words}");
                    let now = object.borrow().clone();
                    if HOPELESS.contains(&code) {
                        return Ok(Some(self.fail(&now, message).await));
                    }
                    // A worker that has waited for long gives up: no failure.
                    let failure = code != YIELDED && code != 0 && since.elapsed() < PATIENT;
                    failures += u32::from(failure);
                    if failures > plan.config.max_restarts {
                        launcher.kill_all();
                        let message = format!("{message}; {failures} did, maxRestarts allows {}", plan.config.max_restarts);
                        return Ok(Some(self.fail(&now, message).await));
                    }
                    let pause = Duration::from_secs(PAUSES[(failures as usize).min(PAUSES.len() - 1)]);
                    (*current, *since) = (*current + 1, Instant::now() + pause);
                    later.insert(slot, *since);
                }
                changed = object.changed() => {
                    changed.context("the controller is gone")?;
                    if Wish::of(&object.borrow()) != wish {
                        return Ok(Some(Next::Look));
                    }
                }
                // The senders are ours.
                _ = gangs.changed() => {}
                _ = queues.changed() => {}
                () = sleep_until(look.unwrap_or_else(Instant::now)), if look.is_some() => {}
            }
        }
    }
}
