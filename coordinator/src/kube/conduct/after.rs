//! What a conductor does once its run is finished: evaluations and embeddings.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use kube::Resource;
use sgcl_runstore::FollowUp;
use sgcl_telemetry::Traceparent;
use tokio::sync::watch;
use tracing::{Instrument as _, info_span};

use super::{Conductor, Next};
use crate::kube::evaluate::{End, Evaluations};
use crate::kube::evaluation::{given_up, outstanding, put_off};
use crate::kube::plan::Plan;
use crate::kube::prepare::Prepared;
use crate::kube::report::Facts;
use crate::kube::resource::{Phase, SgclRun};
use crate::kube::trace::handed_on;

impl Conductor {
    /// Has what follows a finished run made.
    pub(super) async fn evaluate(
        &mut self,
        run: &SgclRun,
        object: &mut watch::Receiver<Arc<SgclRun>>,
        plan: &Plan,
        prepared: &Prepared,
        trace: Option<Traceparent>,
        afresh: bool,
    ) -> Result<Next> {
        let url = Some(prepared.store.url().to_owned());
        let mut facts = Facts { url, ..self.facts(run, Phase::Finished, None) };
        let evaluations = Evaluations {
            runs: self.api.clone(),
            jobs: self.namespaced(),
            pods: self.namespaced(),
            run: &plan.run,
            owner: &run.controller_owner_ref(&()).context("the object has no uid")?,
            bucket: &plan.bucket,
            store: &prepared.store,
            needs: &plan.pods,
            handed: handed_on(trace),
            wanted: &FollowUp::all(&prepared.spec.config),
        };
        let making = evaluations.make(afresh, &mut self.reporter, &mut facts, object);
        Ok(match making.instrument(info_span!("evaluations")).await? {
            End::Over => Next::Rest,
            End::Changed => Next::Look,
            End::Gone => Next::Gone,
        })
    }

    /// Evaluations that nobody can make.
    pub(super) async fn give_up(&mut self, run: &SgclRun, why: &str) -> Next {
        let evaluations = Some(given_up(&self.reporter.last().evaluations, why));
        let facts = Facts { evaluations, ..self.facts(run, Phase::Finished, None) };
        if self.reporter.tell(&facts).await { Next::Rest } else { Next::Retry(why.to_owned()) }
    }

    /// Says why nothing can be done for now. A finished run stays finished.
    pub(super) async fn put_off(&mut self, run: &SgclRun, message: String) {
        let last = self.reporter.last();
        if !outstanding(last) {
            return self.tell(run, Phase::Waiting, Some(message)).await;
        }
        // What has come to be asked for since is not seen to yet.
        let generation = last.observed_generation;
        let evaluations = Some(put_off(&last.evaluations, Some(&message)));
        let facts = Facts { generation, evaluations, ..self.facts(run, Phase::Finished, None) };
        self.reporter.tell(&facts).await;
    }
}
