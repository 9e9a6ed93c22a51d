//! Nodes as Jobs. [`Book`] decides which Job a launch means; [`KubeLauncher`] does it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, ResourceExt};
use tokio::sync::{Semaphore, mpsc, watch};

use super::book::{Book, LOST, Launch};
use super::job::{NodeJob, WorkerLine, name};
use super::plan::PodNeeds;
use super::pods::PodFacts;
use super::queue::Held;
use super::{ATTEMPT_LABEL, RUN_LABEL, SLOT_LABEL};
use crate::launcher::{Ended, Launcher};

/// Time that a node which is given up has to end by itself.
const END_BY_ITSELF: Duration = Duration::from_secs(3);
/// Longest pause between two tries to make a Job.
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// Jobs that are being made at once, of all runs: an API server turns away what comes in a flood (429).
static MAKING: Semaphore = Semaphore::const_new(8);

/// Starts and ends a run's nodes.
#[derive(Clone)]
pub struct KubeLauncher {
    inner: Arc<Inner>,
}

struct Inner {
    jobs: Api<Job>,
    pods: Api<Pod>,
    run: String,
    owner: OwnerReference,
    needs: PodNeeds,
    line: WorkerLine,
    ranks: u32,
    book: Mutex<Book>,
    ended: Mutex<Option<mpsc::UnboundedSender<Ended>>>,
    /// What keeps a Job from being made.
    trouble: watch::Sender<Option<String>>,
}

impl KubeLauncher {
    /// For one run; reads which Jobs it has.
    ///
    /// # Errors
    /// The API server.
    pub async fn open(
        jobs: Api<Job>,
        pods: Api<Pod>,
        run: &str,
        owner: OwnerReference,
        needs: PodNeeds,
        line: WorkerLine,
        ranks: u32,
    ) -> kube::Result<Self> {
        let mut book = Book::default();
        book.known(existing(&jobs, run).await?);
        let (run, book, ended) = (run.to_owned(), Mutex::new(book), Mutex::new(None));
        let trouble = watch::Sender::new(None);
        Ok(Self { inner: Arc::new(Inner { jobs, pods, run, owner, needs, line, ranks, book, ended, trouble }) })
    }

    /// Another state machine begins, which counts from 0.
    pub fn begin(&self) {
        self.book().begin();
    }

    /// A pod's news.
    pub fn pod(&self, facts: &PodFacts) {
        let (told, goes) = {
            let mut book = self.book();
            let before = book.is_going(facts.slot, facts.number);
            (book.pod(facts, Instant::now()), !before && book.is_going(facts.slot, facts.number))
        };
        match (facts.lost, told.is_empty()) {
            // Nobody else would.
            (true, false) => drop(tokio::spawn(self.clone().remove(facts.slot, facts.number))),
            (true, true) => {
                drop(tokio::spawn(Self::look_again(Arc::downgrade(&self.inner), facts.slot, facts.number)));
            }
            (false, _) => {}
        }
        if self.inner.needs.queue.is_some() && goes {
            tokio::spawn(self.clone().end_suspended(facts.slot, facts.number));
        }
        let ended = self.inner.ended.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for end in told {
            tracing::info!(
                run = self.inner.run,
                slot = end.slot,
                attempt = end.attempt,
                code = end.code,
                "a node ended"
            );
            // Nobody waits between two coordinators.
            let _ = ended.as_ref().map(|ended| ended.send(end));
        }
    }

    /// Nodes whose process runs.
    #[must_use]
    pub fn running(&self) -> u32 {
        self.book().pods().filter(|pod| pod.running).count() as u32
    }

    /// The last that a slot's newest pod wrote.
    #[must_use]
    pub fn said(&self, slot: u32) -> Option<String> {
        self.book().said(slot)
    }

    /// Priority of its pods, once there are any.
    #[must_use]
    pub fn priority(&self) -> i32 {
        self.book().pods().map(|pod| pod.priority).max().unwrap_or(0)
    }

    /// What keeps nodes from running, in one word and in full; `held` is what queues say of Jobs.
    #[must_use]
    pub fn waiting(&self, held: &Held) -> Option<(String, String)> {
        if let Some(trouble) = self.inner.trouble.borrow().clone() {
            return Some(("Job".into(), trouble));
        }
        let book = self.book();
        if let Some(waiting) = book.pods().find_map(|pod| pod.waiting.clone()) {
            return Some((waiting.reason, waiting.message));
        }
        // A queue holds a Job back by suspending it: then there is no pod that could say so.
        let queue = self.inner.needs.queue.as_ref()?;
        let jobs: Vec<String> = book.without_pod().map(|(slot, number)| name(&self.inner.run, slot, number)).collect();
        let said = jobs
            .iter()
            .find_map(|job| held.get(job))
            .map_or("`kubectl get workloads` says what it lacks", String::as_str);
        let message =
            format!("{} node(s) wait for queue {queue} to admit them: {said}; spec.queue names another", jobs.len());
        (!jobs.is_empty()).then(|| ("Queue".into(), message))
    }

    /// Ends nodes of slots that the run no longer has.
    pub fn trim(&self, nodes: u32) {
        let beyond = self.book().discard_beyond(nodes);
        for (slot, number) in beyond {
            tokio::spawn(self.clone().end(slot, number, Duration::ZERO));
        }
    }

    /// Ends nodes whose process does not run, which nobody can send home.
    pub fn end_idle(&self) {
        let idle = self.book().discard_idle();
        for (slot, number) in idle {
            tokio::spawn(self.clone().end(slot, number, Duration::ZERO));
        }
    }

    /// Nodes that have not ended.
    #[must_use]
    pub fn left(&self) -> usize {
        self.book().pods().filter(|pod| pod.code().is_none()).count()
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.inner.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn create(self, job: Job) {
        let mut pause = Duration::from_millis(250);
        loop {
            let turn = MAKING.acquire().await;
            let made = self.inner.jobs.create(&PostParams::default(), &job).await;
            drop(turn);
            match made {
                Ok(_) => break,
                // A lost reply, or another coordinator's.
                Err(kube::Error::Api(status)) if status.code == 409 => break,
                // It has much to do: nothing that anybody need be told.
                Err(kube::Error::Api(status)) if status.code == 429 => {}
                Err(error) => {
                    tracing::warn!(%error, job = job.name_any(), "the Job was not made, trying again");
                    self.inner.trouble.send_replace(Some(format!("Job {} cannot be made: {error}", job.name_any())));
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        self.inner.trouble.send_replace(None);
    }

    /// Ends a node that does not end by itself; on a machine that is gone nobody else would. Commits are fenced, so one that lives on does
    /// no harm.
    async fn end(self, slot: u32, number: u32, wait: Duration) {
        tokio::time::sleep(wait).await;
        if self.book().has_ended(slot, number) {
            return;
        }
        self.remove(slot, number).await;
    }

    /// A machine that is gone sends no more news of its pods. Looks again and again: what is waited for depends on the other nodes. What a
    /// launcher knew that nobody has any more is old: the pod may have come back since.
    async fn look_again(inner: Weak<Inner>, slot: u32, number: u32) {
        tokio::time::sleep(LOST).await;
        let Some(inner) = inner.upgrade() else { return };
        let launcher = Self { inner };
        let lost = launcher.book().still_lost(slot, number);
        if let Some(facts) = lost {
            launcher.pod(&facts);
        }
    }

    /// Deletes a Job that its queue has suspended, which is how a queue takes a node back; its pod ends by itself. Left alone it would be
    /// started again one day, as a node that nobody waits for, beside the Job that is asked for in its place.
    async fn end_suspended(self, slot: u32, number: u32) {
        let labels = format!("{RUN_LABEL}={},{SLOT_LABEL}={slot},{ATTEMPT_LABEL}={number}", self.inner.run);
        let listed = self.inner.jobs.list(&ListParams::default().labels(&labels)).await;
        let suspended = |job: &Job| job.spec.as_ref().and_then(|spec| spec.suspend) == Some(true);
        match listed {
            Ok(jobs) if jobs.iter().any(suspended) => self.remove_job(slot, number).await,
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, run = self.inner.run, slot, "whether its queue took a node back is not known")
            }
        }
    }

    /// Deletes a Job, and its pod at once.
    async fn remove(self, slot: u32, number: u32) {
        self.remove_job(slot, number).await;
        let pod = self.book().pod_of(slot, number).filter(|pod| !pod.gone).map(|pod| pod.name.clone());
        if let Some(pod) = pod {
            let deleted = self.inner.pods.delete(&pod, &DeleteParams::default().grace_period(0)).await;
            deleted_or_gone(&pod, deleted.map(drop));
        }
    }

    async fn remove_job(&self, slot: u32, number: u32) {
        let job = name(&self.inner.run, slot, number);
        tracing::info!(run = self.inner.run, job, "ending a node that was given up");
        let deleted = self.inner.jobs.delete(&job, &DeleteParams::background()).await;
        deleted_or_gone(&job, deleted.map(drop));
    }
}

fn deleted_or_gone(what: &str, deleted: kube::Result<()>) {
    match deleted {
        Err(kube::Error::Api(status)) if status.code == 404 => {}
        Err(error) => tracing::warn!(%error, "{what} was not deleted"),
        Ok(()) => {}
    }
}

/// Slot, number and whether over, of a run's Jobs.
async fn existing(jobs: &Api<Job>, run: &str) -> kube::Result<Vec<(u32, u32, bool)>> {
    let listed = jobs.list(&ListParams::default().labels(&format!("{RUN_LABEL}={run}"))).await?;
    let number = |job: &Job, label: &str| job.labels().get(label).and_then(|value| value.parse().ok());
    let found = listed.iter().filter_map(|job| {
        let conditions = job.status.as_ref().and_then(|status| status.conditions.clone()).unwrap_or_default();
        let done = conditions.iter().any(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True");
        let over = done || job.metadata.deletion_timestamp.is_some();
        Some((number(job, SLOT_LABEL)?, number(job, ATTEMPT_LABEL)?, over))
    });
    Ok(found.collect())
}

impl Launcher for KubeLauncher {
    fn launch(
        &self,
        slot: u32,
        attempt: u32,
        coordinator: &str,
        ended: mpsc::UnboundedSender<Ended>,
    ) -> io::Result<()> {
        *self.inner.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        let (number, never, rather_not) = match self.book().launch(slot, attempt) {
            Launch::Adopt(number) => {
                tracing::info!(run = self.inner.run, slot, number, "a node is there already");
                return Ok(());
            }
            Launch::Create { number, never, rather_not } => (number, never, rather_not),
        };
        let job = NodeJob {
            run: &self.inner.run,
            owner: &self.inner.owner,
            needs: &self.inner.needs,
            line: &self.inner.line,
            ranks: self.inner.ranks,
            slot,
            number,
            coordinator,
            never: &never,
            rather_not: &rather_not,
        };
        tokio::spawn(self.clone().create(job.build().map_err(io::Error::other)?));
        Ok(())
    }

    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        *self.inner.ended.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        self.book().adopt()
    }

    fn discard(&self, slot: u32, attempt: u32) {
        let number = self.book().discard(slot, attempt);
        if let Some(number) = number {
            tokio::spawn(self.clone().end(slot, number, END_BY_ITSELF));
        }
    }

    fn kill_all(&self) {
        let alive = self.book().discard_beyond(0);
        for (slot, number) in alive {
            tokio::spawn(self.clone().end(slot, number, Duration::ZERO));
        }
    }
}
