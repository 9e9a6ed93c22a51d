//! What comes after a run: the evaluations and embeddings that its configuration names, one Job each. What they find lies in the bucket, and
//! a line of it in the run's status. Watches alone, no polling; what a leader leaves behind, the next one goes on with.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use futures::{StreamExt, stream};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, ListParams, PostParams, Preconditions};
use kube::runtime::reflector::Store as Known;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, ResourceExt};
use sgcl_patchset::Store;
use sgcl_runstore::{FollowUp, RunName, export, follow_up};
use tokio::sync::watch;
use tokio::time::sleep_until;

use super::EVALUATES_LABEL;
use super::conduct::FINALIZER;
use super::evaluation::{EvaluationJob, given_up, name, put_off, said, same, stands, to_come};
use super::job::HandedOn;
use super::plan::PodNeeds;
use super::report::{Facts, Reporter};
use super::resource::{EvaluationPhase, EvaluationStatus, SgclRun};

/// How making them ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All are over.
    Over,
    /// The run's object has changed.
    Changed,
    /// The run's object is gone.
    Gone,
}

/// A finished run, and what its evaluations' Jobs are made from.
pub struct Evaluations<'a> {
    /// Runs' objects.
    pub runs: Api<SgclRun>,
    /// Jobs.
    pub jobs: Api<Job>,
    /// Pods.
    pub pods: Api<Pod>,
    /// Name of the run.
    pub run: &'a RunName,
    /// The object that everything goes with.
    pub owner: &'a OwnerReference,
    /// The bucket's URL.
    pub bucket: &'a str,
    /// The run's part of it.
    pub store: &'a Store,
    /// What a pod needs.
    pub needs: &'a PodNeeds,
    /// What it traces and logs with.
    pub handed: HandedOn,
    /// What is to be made.
    pub wanted: &'a [FollowUp],
}

/// What is known while they are made.
struct Book {
    /// Number of the commit whose weights are evaluated.
    commit: u64,
    list: Vec<EvaluationStatus>,
    /// Those that were over before: a Job of theirs that has ended is not of this time.
    again: BTreeSet<usize>,
    /// Uids of such Jobs.
    stale: BTreeSet<String>,
    /// Jobs that are asked for, and whether they have been seen.
    asked: BTreeMap<usize, bool>,
}

/// What a watch has told.
enum News {
    Jobs { listed: bool },
    Pods { listed: bool },
}

impl Evaluations<'_> {
    /// Has those made that are not over, and keeps the run's status true to them. `afresh`, since the run's spec has changed, looks after
    /// all of them: those that have failed are tried again.
    ///
    /// # Errors
    /// The API server and the bucket; the next try goes on.
    pub async fn make(
        &self,
        afresh: bool,
        reporter: &mut Reporter,
        facts: &mut Facts,
        object: &mut watch::Receiver<Arc<SgclRun>>,
    ) -> Result<End> {
        let mut book = self.begin(afresh, &reporter.last().evaluations).await?;
        let ours = watcher::Config::default().labels(&self.selector());
        let (jobs, writer) = reflector::store();
        let of_jobs = reflector(writer, watcher(self.jobs.clone(), ours.clone())).default_backoff();
        let (pods, writer) = reflector::store();
        let of_pods = reflector(writer, watcher(self.pods.clone(), ours)).default_backoff();
        let mut news = stream::select(
            of_jobs.map(|event| event.map(|event| News::Jobs { listed: matches!(event, Event::InitDone) })).boxed(),
            of_pods.map(|event| event.map(|event| News::Pods { listed: matches!(event, Event::InitDone) })).boxed(),
        );
        let (mut jobs_listed, mut pods_listed) = (false, false);
        loop {
            if jobs_listed && pods_listed && !self.look(&mut book, &jobs, &pods).await? {
                return Ok(End::Gone);
            }
            facts.evaluations = Some(book.list.clone());
            let told = reporter.tell(facts).await;
            if told && book.list.iter().all(|one| one.phase.is_over()) {
                return Ok(End::Over);
            }
            tokio::select! {
                news = news.next() => match news {
                    Some(Ok(News::Jobs { listed: true })) => {
                        jobs_listed = true;
                        // What came and went while the watch was broken will not be seen any more.
                        book.asked.values_mut().for_each(|seen| *seen = true);
                    }
                    Some(Ok(News::Pods { listed: true })) => pods_listed = true,
                    Some(Ok(News::Jobs { .. } | News::Pods { .. })) => {}
                    Some(Err(error)) => {
                        tracing::warn!(%error, "a watch over evaluations broke, it is made anew");
                        if !(jobs_listed && pods_listed) {
                            book.list = put_off(&book.list, Some(&format!("its Job cannot be watched: {error}")));
                        }
                    }
                    None => bail!("the watches over evaluations ended"),
                },
                changed = object.changed() => {
                    changed.context("the controller is gone")?;
                    let now = object.borrow().clone();
                    let held = now.finalizers().iter().any(|name| name == FINALIZER);
                    let other = now.metadata.generation != Some(facts.generation);
                    if now.metadata.deletion_timestamp.is_some() || held || other {
                        return Ok(End::Changed);
                    }
                }
                () = sleep_until(reporter.due()), if !told => {}
            }
        }
    }

    /// What the bucket and the status so far say.
    async fn begin(&self, afresh: bool, before: &[EvaluationStatus]) -> Result<Book> {
        let mut list = to_come(self.wanted);
        let mut again = BTreeSet::new();
        let Some(&commit) = export::list_exports(self.store).await?.last() else {
            list = given_up(&list, "the run has no export");
            return Ok(Book { commit: 0, list, again, stale: BTreeSet::new(), asked: BTreeMap::new() });
        };
        let mut made = follow_up::made(self.wanted, self.run, self.store, commit).await?;
        for (index, one) in list.iter_mut().enumerate() {
            let known = before.iter().find(|known| known.name == one.name && known.phase.is_over());
            match (made.remove(&one.name), known) {
                (Some(figures), _) => one.done(figures),
                (None, Some(known)) if !afresh => one.clone_from(known),
                (None, Some(_)) => drop(again.insert(index)),
                (None, None) => {}
            }
        }
        Ok(Book { commit, list, again, stale: BTreeSet::new(), asked: BTreeMap::new() })
    }

    /// Asks for Jobs that are missing, and takes down how the others stand. False where the run's object is gone.
    async fn look(&self, book: &mut Book, jobs: &Known<Job>, pods: &Known<Pod>) -> Result<bool> {
        let (jobs, pods) = (jobs.state(), pods.state());
        let again = std::mem::take(&mut book.again);
        for (index, wanted) in self.wanted.iter().enumerate() {
            let one = &mut book.list[index];
            if one.phase.is_over() {
                continue;
            }
            let name = name(self.run.as_str(), index, wanted.into());
            let ours = EvaluationJob {
                run: self.run.as_str(),
                index,
                wanted,
                bucket: self.bucket,
                owner: self.owner,
                needs: self.needs,
                handed: &self.handed,
            };
            let ours = ours.build()?;
            let Some(job) = jobs.iter().find(|job| job.name_any() == name) else {
                match book.asked.get(&index) {
                    // Made, and on its way to us.
                    Some(false) => continue,
                    // Deleted: with the run's object, or to be made again.
                    Some(true) if !self.is_there().await? => return Ok(false),
                    Some(true) | None => {}
                }
                match self.jobs.create(&PostParams::default(), &ours).await {
                    // A lost reply, or another coordinator's.
                    Err(kube::Error::Api(status)) if status.code == 409 => {}
                    result => drop(result.with_context(|| format!("Job {name} cannot be made"))?),
                }
                book.asked.insert(index, false);
                continue;
            };
            book.asked.insert(index, true);
            if job.metadata.deletion_timestamp.is_some() {
                continue;
            }
            let of_it: Vec<&Pod> = pods.iter().map(AsRef::as_ref).filter(|pod| is_of(pod, job)).collect();
            let (phase, message) = stands(job, &of_it);
            let uid = job.uid().unwrap_or_default();
            if phase.is_over() && again.contains(&index) {
                book.stale.insert(uid.clone());
            }
            if book.stale.contains(&uid) || !same(job, &ours) {
                self.end(&name, uid).await?;
                continue;
            }
            match phase {
                EvaluationPhase::Waiting | EvaluationPhase::Running => (one.phase, one.message) = (phase, message),
                EvaluationPhase::Done => {
                    let just = std::slice::from_ref(wanted);
                    match follow_up::made(just, self.run, self.store, book.commit).await?.remove(wanted.name()) {
                        Some(figures) => one.done(figures),
                        None => {
                            one.failed(
                                self.remedy("it ended well, but the bucket has no results of it", wanted.name()),
                            );
                        }
                    }
                }
                EvaluationPhase::Failed => {
                    let why = match said(&of_it) {
                        Some(said) => said,
                        // The watch over pods may be behind.
                        None => self.said(job).await?.or(message).unwrap_or_else(|| "no reason was given".to_owned()),
                    };
                    one.failed(self.remedy(&why, wanted.name()));
                }
            }
        }
        Ok(true)
    }

    /// What to do about one that failed.
    fn remedy(&self, why: &str, name: &str) -> String {
        let run = self.run;
        format!(
            "{why}; `sgclctl logs {run} --of {name}` says more; once that is mended, `sgclctl suspend {run}` and \
             `sgclctl resume {run}` have it made again"
        )
    }

    async fn said(&self, job: &Job) -> Result<Option<String>> {
        let listed = self.pods.list(&ListParams::default().labels(&self.selector())).await?;
        let of_it: Vec<&Pod> = listed.iter().filter(|pod| is_of(pod, job)).collect();
        Ok(said(&of_it))
    }

    /// Deletes a Job, but no later one of its name.
    async fn end(&self, name: &str, uid: String) -> Result<()> {
        let this = Preconditions { uid: Some(uid), resource_version: None };
        match self.jobs.delete(name, &DeleteParams::background().preconditions(this)).await {
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            result => drop(result.with_context(|| format!("Job {name} cannot be deleted"))?),
        }
        Ok(())
    }

    /// Whether the run's object, and no other of its name, is there.
    async fn is_there(&self) -> Result<bool> {
        let found = self.runs.get_opt(self.run.as_str()).await?;
        Ok(found.and_then(|run| run.uid()).as_ref() == Some(&self.owner.uid))
    }

    fn selector(&self) -> String {
        format!("{EVALUATES_LABEL}={}", self.run)
    }
}

fn is_of(pod: &Pod, job: &Job) -> bool {
    pod.owner_references().iter().any(|owner| Some(&owner.uid) == job.metadata.uid.as_ref())
}
