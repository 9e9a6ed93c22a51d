//! One run, from its object to its end: prepare, ask for nodes, coordinate, and obey what the object comes to say meanwhile.

mod after;
mod gather;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client, Resource, ResourceExt};
use serde_json::json;
use sgcl_proto::WAITING_FOR_STORAGE;
use sgcl_runstore::status;
use sgcl_runstore::{Commits, FollowUp, Order, Orders};
use sgcl_telemetry::Traceparent;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument as _, info_span};

use super::defaults::Defaults;
use super::evaluation::{outstanding, put_off, to_come};
use super::gang::{Gangs, Standing};
use super::job::{WorkerLine, has_ended};
use super::launcher::KubeLauncher;
use super::plan::Plan;
use super::pods::{PodFacts, Pods};
use super::prepare::{Prepared, Refusal, find, prepare};
use super::queue::Queues;
use super::report::{Facts, Reporter, regrouped, share, trains};
use super::resource::{Phase, SgclRun};
use super::trace::{handed_on, span, trace};
use super::{EVALUATES_LABEL, MANAGER, RUN_LABEL};
use crate::launcher::Launcher as _;
use crate::machine::{ON_REQUEST, Outcome};
use crate::metrics::Measures;
use crate::server::Coordinator;
use crate::switchboard::Switchboard;
use crate::trust::audience;
use crate::view::RunView;

/// Holds an object until its workers have committed.
pub const FINALIZER: &str = "sgcl.dev/commit";
/// A commit that was asked for is waited for so long.
const COMMIT: Duration = Duration::from_secs(180);
/// Pauses between two tries of what may pass.
const PAUSES: [u64; 5] = [1, 2, 5, 10, 20];
/// Time that nodes have to end once they were sent home, and then to be ended.
const SENT_HOME: Duration = Duration::from_secs(15);

/// What all runs of a leader share.
pub struct Shared {
    /// The API server.
    pub client: Client,
    /// Where runs and pods are.
    pub namespace: String,
    /// Where workers find this coordinator, whichever replica leads.
    pub url: String,
    /// What they trust it by: the authority's certificate, PEM.
    pub certificate: String,
    /// Runs behind that port.
    pub board: Switchboard,
    /// Workers' pods.
    pub pods: Pods,
    /// What admits nodes, where something does.
    pub queues: Queues,
    /// Who holds nodes.
    pub gangs: Gangs,
    /// How the runs are doing.
    pub measures: Measures,
    /// ConfigMap `sgcl-defaults`, as it is now.
    pub defaults: watch::Receiver<Result<Defaults, String>>,
    /// Name of this pod: who events are from.
    pub me: String,
    /// The leader's term: the transitions of its Lease.
    pub lease_epoch: u64,
}

/// What comes next for a run.
enum Next {
    /// Look at the object again.
    Look,
    /// Nothing, until the object changes.
    Rest,
    /// Try again after a pause, or when the object or the defaults change.
    Retry(String),
    /// The object is gone.
    Gone,
}

/// What the object has come to want.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Wish {
    gone: bool,
    cancel: bool,
    suspend: bool,
    nodes: u32,
    min_nodes: u32,
}

impl Wish {
    fn of(run: &SgclRun) -> Self {
        let (spec, gone) = (&run.spec, run.metadata.deletion_timestamp.is_some());
        let min_nodes = spec.min_nodes.unwrap_or(1);
        Self { gone, cancel: spec.cancel, suspend: spec.suspend, nodes: spec.nodes, min_nodes }
    }
}

/// Conducts a run until its object is gone. Its end ends nothing else; the controller begins it anew at the object's next change.
pub async fn conduct(shared: Arc<Shared>, mut object: watch::Receiver<Arc<SgclRun>>) {
    let run = object.borrow().clone();
    let api: Api<SgclRun> = Api::namespaced(shared.client.clone(), &shared.namespace);
    let events = Api::namespaced(shared.client.clone(), &shared.namespace);
    let measure = shared.measures.of(&run.name_any());
    let reporter = Reporter::new(api.clone(), events, shared.me.clone(), &run, measure);
    let mut defaults = shared.defaults.clone();
    let mut conductor = Conductor { name: run.name_any(), api, reporter, shared };
    let mut tries = 0;
    loop {
        let run = object.borrow_and_update().clone();
        let next = match conductor.step(&run, &mut object).await {
            Ok(next) => next,
            Err(error) => Next::Retry(format!("{error:#}")),
        };
        let pause = match next {
            Next::Look => {
                tries = 0;
                continue;
            }
            Next::Gone => return,
            Next::Rest => None,
            Next::Retry(message) => {
                conductor.put_off(&run, message).await;
                let pause = PAUSES[tries.min(PAUSES.len() - 1)];
                tries += 1;
                Some(Duration::from_secs(pause))
            }
        };
        let changed = async {
            tokio::select! {
                changed = object.changed() => changed.is_ok(),
                changed = defaults.changed(), if pause.is_some() => changed.is_ok(),
            }
        };
        let alive = match pause {
            Some(pause) => timeout(pause, changed).await.unwrap_or(true),
            None => changed.await,
        };
        if !alive {
            return;
        }
    }
}

/// Waits until every node has ended; those that do not are ended.
async fn sent_home(launcher: &KubeLauncher, news: &mut mpsc::UnboundedReceiver<PodFacts>) {
    launcher.end_idle();
    for _ in 0..2 {
        let until = Instant::now() + SENT_HOME;
        while launcher.left() > 0 {
            match timeout_at(until, news.recv()).await {
                Ok(Some(pod)) => launcher.pod(&pod),
                Ok(None) => return,
                Err(_) => break,
            }
        }
        launcher.kill_all();
    }
}

fn held(run: &SgclRun) -> bool {
    run.finalizers().iter().any(|name| name == FINALIZER)
}

struct Conductor {
    shared: Arc<Shared>,
    api: Api<SgclRun>,
    name: String,
    reporter: Reporter,
}

impl Conductor {
    async fn step(&mut self, run: &SgclRun, object: &mut watch::Receiver<Arc<SgclRun>>) -> Result<Next> {
        if Wish::of(run).gone {
            self.clear().await?;
            self.hold(run, &[]).await?;
            return Ok(Next::Gone);
        }
        let last = self.reporter.last();
        // What it asks for has come to its end, but perhaps not what comes after that.
        let over = last.phase.is_over() && last.observed_generation == run.metadata.generation.unwrap_or(0);
        if over {
            self.let_go(run).await?;
            if !outstanding(self.reporter.last()) {
                return Ok(Next::Rest);
            }
        } else if run.spec.cancel || run.spec.suspend {
            self.clear().await?;
            self.end(EVALUATES_LABEL).await?;
            let phase = if run.spec.cancel { Phase::Cancelled } else { Phase::Suspended };
            let evaluations = Some(put_off(&self.reporter.last().evaluations, None));
            let facts = Facts { evaluations, ..self.facts(run, phase, None) };
            self.reporter.tell(&facts).await;
            self.let_go(run).await?;
            return Ok(Next::Rest);
        }
        let defaults = match self.shared.defaults.borrow().clone() {
            Ok(defaults) => defaults,
            Err(message) => return Ok(Next::Retry(message)),
        };
        let plan = match Plan::of(&self.name, &run.spec, &defaults) {
            Ok(plan) => plan,
            Err(error) if over => return Ok(Next::Retry(error.to_string())),
            Err(error) => return Ok(self.fail(run, error.to_string()).await),
        };
        let uid = run.uid().context("the object has no uid")?;
        let trace = trace(run, &uid);
        let span = span(&self.name, trace);
        let work = async {
            let prepared = async { if over { find(&plan, &uid).await } else { prepare(&plan, &uid).await } };
            match prepared.instrument(info_span!("prepare")).await {
                Ok(prepared) if over => self.evaluate(run, object, &plan, &prepared, trace, false).await,
                Ok(prepared) => self.train(run, object, &plan, prepared, trace).await,
                Err(Refusal::Mend(message)) if over => Ok(self.give_up(run, &message).await),
                Err(Refusal::Mend(message)) => Ok(self.fail(run, message).await),
                Err(Refusal::Later(message)) => Ok(Next::Retry(message)),
            }
        };
        Box::pin(work.instrument(span)).await
    }

    async fn train(
        &mut self,
        run: &SgclRun,
        object: &mut watch::Receiver<Arc<SgclRun>>,
        plan: &Plan,
        prepared: Prepared,
        trace: Option<Traceparent>,
    ) -> Result<Next> {
        if let Some(ignored) = prepared.ignored.clone() {
            self.reporter.event(true, "ChangeIgnored", ignored).await;
        }
        let before = status::Phase::read(&prepared.store).await?;
        let mut facts = Facts {
            epochs: Some(prepared.spec.config.epochs),
            url: Some(prepared.store.url().to_owned()),
            ..self.facts(run, Phase::Waiting, None)
        };
        match before {
            status::Phase::Finished => {
                self.clear().await?;
                return self.evaluate(run, object, plan, &prepared, trace, true).await;
            }
            status::Phase::Cancelled => {
                self.clear().await?;
                self.reporter.tell(&Facts { phase: Phase::Cancelled, ..facts }).await;
                return Ok(Next::Rest);
            }
            _ => {}
        }
        let evaluations = to_come(&FollowUp::all(&prepared.spec.config));
        let training = before == status::Phase::Running;
        if let Some(queue) = &plan.pods.queue
            && let Some(message) = self.shared.queues.missing(queue).await.filter(|_| !training)
        {
            return Ok(Next::Retry(message));
        }
        if !held(run) {
            self.hold(run, &[FINALIZER]).await?;
        }
        let owner = run.controller_owner_ref(&()).context("the object has no uid")?;
        let (jobs, pods): (Api<Job>, Api<Pod>) = (self.namespaced(), self.namespaced());
        let ranks = plan.ranks_per_node;
        let line = WorkerLine {
            certificate: self.shared.certificate.clone(),
            audience: audience(&self.shared.namespace, &self.name),
            handed: handed_on(trace),
        };
        let launcher = KubeLauncher::open(jobs, pods, &self.name, owner, plan.pods.clone(), line, ranks).await?;
        launcher.trim(plan.nodes);
        let mut news = self.shared.pods.of_run(&self.name);
        let wish = Wish::of(run);
        let gathering = self.gather(wish, object, plan, &launcher, &mut news, &mut facts, training);
        let gathered = gathering.instrument(info_span!("admission", nodes = plan.nodes)).await;
        if let Some(next) = gathered.inspect_err(|_| self.shared.gangs.stand(&self.name, None))? {
            self.shared.gangs.stand(&self.name, None);
            return Ok(next);
        }
        self.shared.gangs.stand(&self.name, Some(Standing::Trains));
        let outcome = self.coordinate(wish, object, &launcher, &mut news, &mut facts, prepared).await;
        self.shared.gangs.stand(&self.name, None);
        let now = object.borrow().clone();
        match &outcome {
            Ok(Outcome::Finished) => {
                let evaluations = Some(evaluations);
                self.reporter.tell(&Facts { phase: Phase::Finished, message: None, evaluations, ..facts }).await;
            }
            Ok(Outcome::Cancelled) => {
                self.reporter.tell(&Facts { phase: Phase::Cancelled, message: None, ..facts }).await;
            }
            Ok(Outcome::Failed { message, .. }) => drop(self.fail(&now, message.clone()).await),
            Ok(Outcome::Suspended { .. }) => {}
            // Nobody was sent home: they train on, and the next try takes them over.
            Err(_) => launcher.begin(),
        }
        if outcome.is_ok() {
            sent_home(&launcher, &mut news).await;
        }
        match outcome {
            Ok(Outcome::Finished) if outstanding(self.reporter.last()) => Ok(Next::Look),
            Ok(Outcome::Finished | Outcome::Cancelled | Outcome::Failed { .. }) => Ok(Next::Rest),
            Ok(Outcome::Suspended { .. }) if Wish::of(&now) != wish => Ok(Next::Look),
            Ok(Outcome::Suspended { reason }) if reason == ON_REQUEST => {
                self.note_suspension(&now).await?;
                Ok(Next::Rest)
            }
            Ok(Outcome::Suspended { reason }) => Ok(Next::Retry(reason)),
            // Another leader's commit, a bucket that is away: the next try finds out which.
            Err(error) => Ok(Next::Retry(format!("{error:#}"))),
        }
    }

    /// Lets the run's coordinator work until it has an outcome.
    async fn coordinate(
        &mut self,
        wish: Wish,
        object: &mut watch::Receiver<Arc<SgclRun>>,
        launcher: &KubeLauncher,
        news: &mut mpsc::UnboundedReceiver<PodFacts>,
        facts: &mut Facts,
        prepared: Prepared,
    ) -> Result<Outcome> {
        launcher.begin();
        let (stop, kill) = (CancellationToken::new(), CancellationToken::new());
        let epochs = prepared.spec.config.epochs;
        let first = RunView { last_commit: self.reporter.last().last_commit, ..RunView::default() };
        let (sender, mut view) = watch::channel(first);
        let coordinator = Coordinator {
            spec: prepared.spec,
            run: prepared.store.clone(),
            launcher: Arc::new(launcher.clone()),
            view: sender,
            stop: stop.clone(),
            kill: kill.clone(),
        };
        let (board, url) = (self.shared.board.clone(), self.shared.url.clone());
        let serving = async move { coordinator.attend(&board, url).await };
        let mut serving = AbortOnDropHandle::new(tokio::spawn(serving.in_current_span()));
        let (mut watching, mut changes, mut began) = (true, 0, None);
        let (mut give_up, mut queues) = (None, self.shared.queues.held());
        // What waited for nodes says so no longer.
        let mut pending = true;
        loop {
            tokio::select! {
                outcome = &mut serving => {
                    let seen = view.borrow().clone();
                    facts.view = Some(RunView {
                        last_commit: Commits::new(&prepared.store).latest().await?.map(|commit| commit.seq),
                        ..seen
                    });
                    return outcome.context("the coordinator of this run broke off")?;
                }
                changed = view.changed(), if watching => {
                    // The sender goes when the coordinator ends, which the branch above tells.
                    watching = changed.is_ok();
                    pending = true;
                }
                () = sleep_until(self.reporter.due()), if pending => {}
                Some(pod) = news.recv() => {
                    launcher.pod(&pod);
                    pending = true;
                }
                // The sender is ours.
                _ = queues.changed() => pending = true,
                changed = object.changed() => {
                    changed.context("the controller is gone")?;
                    let now = Wish::of(&object.borrow());
                    if now != wish && give_up.is_none() {
                        tracing::info!(run = self.name, "asked to commit and stop");
                        if now.cancel && !now.gone {
                            Orders::new(&prepared.store).give(Order::Cancel, jiff::Timestamp::now()).await?;
                        } else {
                            stop.cancel();
                        }
                        give_up = Some(Instant::now() + COMMIT);
                    }
                }
                () = sleep_until(give_up.unwrap_or_else(Instant::now)), if give_up.is_some() => {
                    tracing::warn!(run = self.name, "no commit came in time");
                    kill.cancel();
                    give_up = None;
                }
            }
            let seen = view.borrow_and_update().clone();
            for change in seen.changes.iter().skip(changes) {
                self.reporter.event(change.failure, "Regrouped", regrouped(change)).await;
            }
            changes = seen.changes.len();
            if began.is_none() && seen.step > 0 && trains(&seen) {
                began = Some((Instant::now(), share(&seen, epochs)));
            }
            facts.pace = began.map(|(since, from)| (since.elapsed(), from));
            facts.phase = if seen.ranks > 0 { Phase::Running } else { Phase::Waiting };
            facts.message = match launcher.waiting(&queues.borrow_and_update()) {
                Some((_, message)) => Some(message),
                None if seen.phase == WAITING_FOR_STORAGE => {
                    Some("the bucket does not answer; training waits for it".into())
                }
                None if seen.ranks == 0 => seen.message.clone().or_else(|| Some("nodes are joining".into())),
                None => None,
            };
            facts.view = Some(seen);
            if pending {
                pending = !self.reporter.tell(facts).await;
            }
        }
    }

    fn facts(&self, run: &SgclRun, phase: Phase, message: Option<String>) -> Facts {
        let (generation, nodes) = (run.metadata.generation.unwrap_or(0), run.spec.nodes);
        Facts { generation, phase, message, nodes, lease_epoch: self.shared.lease_epoch, ..Facts::default() }
    }

    async fn tell(&mut self, run: &SgclRun, phase: Phase, message: Option<String>) {
        let facts = self.facts(run, phase, message);
        self.reporter.tell(&facts).await;
    }

    async fn fail(&mut self, run: &SgclRun, message: String) -> Next {
        self.tell(run, Phase::Failed, Some(message)).await;
        Next::Rest
    }

    /// Ends whatever nodes are left; what ended by itself keeps its logs for a while.
    async fn clear(&self) -> Result<()> {
        self.end(RUN_LABEL).await
    }

    /// Ends Jobs that have not ended, of those that `label` says are the run's.
    async fn end(&self, label: &str) -> Result<()> {
        let jobs: Api<Job> = self.namespaced();
        let of_run = ListParams::default().labels(&format!("{label}={}", self.name));
        for job in jobs.list(&of_run).await? {
            if has_ended(&job) {
                continue;
            }
            match jobs.delete(&job.name_any(), &DeleteParams::background()).await {
                Err(kube::Error::Api(status)) if status.code == 404 => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// An order in the bucket suspended the run: its object comes to say so, else it would be trained again at once.
    async fn note_suspension(&self, run: &SgclRun) -> Result<()> {
        let patch = json!({ "metadata": { "uid": run.metadata.uid }, "spec": { "suspend": true } });
        match self.api.patch(&self.name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            result => result.map(drop).map_err(Into::into),
        }
    }

    /// Nothing is left to commit: the object may go at once.
    async fn let_go(&self, run: &SgclRun) -> Result<()> {
        if held(run) { self.hold(run, &[]).await } else { Ok(()) }
    }

    /// Sets our finalizers. With its uid, an object that is gone is not made anew.
    async fn hold(&self, run: &SgclRun, finalizers: &[&str]) -> Result<()> {
        let patch = json!({
            "apiVersion": SgclRun::api_version(&()), "kind": SgclRun::kind(&()),
            "metadata": { "name": self.name, "uid": run.metadata.uid, "finalizers": finalizers },
        });
        match self.api.patch_metadata(&self.name, &PatchParams::apply(MANAGER).force(), &Patch::Apply(&patch)).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
            result => {
                result?;
                Ok(())
            }
        }
    }

    fn namespaced<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.shared.client.clone(), &self.shared.namespace)
    }
}
