//! A cluster, reached as kubectl reaches it, and what its refusals mean to a user.

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use sgcl_coordinator::kube::NAMESPACE;
use sgcl_coordinator::kube::resource::SgclRun;

use crate::cli::cluster::ClusterArgs;
use crate::error::Failure;
use crate::exit::Exit;

/// A connection, and the namespace that runs are looked for in.
pub(crate) struct Cluster {
    pub(crate) client: Client,
    pub(crate) namespace: String,
}

impl Cluster {
    /// Opens the kubeconfig; nothing is asked yet.
    ///
    /// # Errors
    /// There is none, or it names no such context.
    pub(crate) async fn open(args: &ClusterArgs) -> Result<Self> {
        // Another provider would be a bug of ours; the first call installs it.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let options = KubeConfigOptions { context: args.context.clone(), ..KubeConfigOptions::default() };
        let missing = || {
            Failure::new(Exit::Unavailable, "no cluster to speak to".to_owned())
                .hint("set KUBECONFIG, or check --context; for runs of this machine add --bucket URL")
        };
        let file = Kubeconfig::read().with_context(missing)?;
        let named = namespace(&file, args.context.as_deref());
        let config = Config::from_custom_kubeconfig(file, &options).await.with_context(missing)?;
        let namespace = args.namespace.clone().or(named).unwrap_or_else(|| NAMESPACE.to_owned());
        let client = Client::try_from(config).with_context(missing)?;
        Ok(Self { client, namespace })
    }

    pub(crate) fn runs(&self) -> Api<SgclRun> {
        self.api()
    }

    pub(crate) fn api<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// One run.
    ///
    /// # Errors
    /// It is not there, or the cluster refuses.
    pub(crate) async fn run(&self, name: &str) -> Result<SgclRun> {
        self.runs().get(name).await.map_err(|error| self.told(error, Some(name)))
    }

    /// What a refusal means, and what to do.
    pub(crate) fn told(&self, error: kube::Error, run: Option<&str>) -> anyhow::Error {
        let namespace = &self.namespace;
        let kube::Error::Api(status) = &error else {
            return Failure::new(Exit::Unavailable, format!("the cluster does not answer: {}", chain(&error)))
                .hint("check KUBECONFIG and --context; `kubectl version` shows whether it is there")
                .into();
        };
        let of_run = status.details.as_ref().is_some_and(|details| !details.name.is_empty());
        let failure = match (status.code, run) {
            (404, Some(run)) if of_run => {
                Failure::new(Exit::Data, format!("there is no run {run} in namespace {namespace}"))
                    .hint("`sgclctl list` names those there are; -n names another namespace")
            }
            (404, _) => Failure::new(Exit::Unavailable, "this cluster knows no SgclRun".to_owned())
                .hint("whoever runs the cluster installs it: kubectl apply -f deploy/"),
            (409, Some(run)) if status.reason == "AlreadyExists" => {
                Failure::new(Exit::CannotCreate, format!("namespace {namespace} has a run named {run} already"))
                    .hint("give another --name, or `sgclctl delete` the old one")
            }
            (403, _) => Failure::new(Exit::Unavailable, status.message.clone())
                .hint(format!("ask for the role `edit` in namespace {namespace}, or name yours with -n")),
            (422, _) => Failure::new(Exit::Usage, reasons(&status.message)),
            _ => Failure::new(Exit::Failed, status.message.clone()),
        };
        failure.into()
    }
}

fn namespace(file: &Kubeconfig, context: Option<&str>) -> Option<String> {
    let name = context.or(file.current_context.as_deref())?;
    let found = file.contexts.iter().find(|known| known.name == name)?;
    found.context.as_ref()?.namespace.clone()
}

/// The API server's list of what is wrong, without its ceremony.
fn reasons(message: &str) -> String {
    let text = message.split_once("is invalid: ").map_or(message, |(_, reasons)| reasons);
    text.replace("Invalid value: ", "").replace("\"object\": ", "")
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let more = next.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = next.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_spec_says_what_is_wrong_and_nothing_else() {
        let said = "SgclRun.sgcl.dev \"a\" is invalid: spec: Invalid value: \"object\": minNodes is the fewest nodes that train";
        assert_eq!(reasons(said), "spec: minNodes is the fewest nodes that train");
    }
}
