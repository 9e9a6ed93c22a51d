//! `submit`: a run is an object in the cluster; what it leaves open, `sgcl-defaults` says.

use std::path::Path;

use anyhow::{Context as _, Result};
use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::PostParams;
use serde_json::{Map, Value, json};
use sgcl_coordinator::kube::TRACE_ANNOTATION;
use sgcl_coordinator::kube::resource::{SgclRun, SgclRunSpec};
use sgcl_runstore::{ConfigError, RunConfig, RunName};

use super::access::Cluster;
use super::follow::follow;
use crate::cli::cluster::SubmitArgs;
use crate::error::Failure;
use crate::exit::Exit;
use crate::output::Out;

pub(crate) async fn submit(args: SubmitArgs, out: Out) -> Result<Exit> {
    let mut run = wanted(&args)?;
    let name = run.name_any();
    if let Some(here) = sgcl_telemetry::current() {
        // One that the file brings along is the user's own.
        run.annotations_mut().entry(TRACE_ANNOTATION.to_owned()).or_insert_with(|| here.to_string());
    }
    let cluster = Cluster::open(&args.cluster).await?;
    let params = PostParams { dry_run: args.dry_run, ..PostParams::default() };
    let made = cluster.runs().create(&params, &run).await.map_err(|error| cluster.told(error, Some(&name)))?;
    if args.dry_run {
        let shown = json!({ "apiVersion": "sgcl.dev/v1alpha1", "kind": "SgclRun",
            "metadata": { "name": name, "namespace": cluster.namespace }, "spec": made.spec });
        out.data(if out.json() { shown.to_string() } else { serde_saphyr::to_string(&shown)?.trim_end().to_owned() })?;
        out.note("dry run: the cluster takes it; nothing was made");
        return Ok(Exit::Done);
    }
    if out.json() {
        out.json_line(&json!({ "run": name, "namespace": cluster.namespace }))?;
    } else {
        out.note(format!("run {name} is submitted"));
        out.note(format!("  sgclctl status {name}\n  sgclctl logs {name} -f"));
        out.data(&name)?;
    }
    if args.follow || args.wait { follow(&cluster, &name, args.follow, out).await } else { Ok(Exit::Done) }
}

/// The object that the arguments ask for.
fn wanted(args: &SubmitArgs) -> Result<SgclRun> {
    let mut config = Map::new();
    let mut run = SgclRun::new("", SgclRunSpec { nodes: 1, ..SgclRunSpec::default() });
    if let Some(file) = &args.file {
        match read(file)? {
            Given::Run(given) => run = *given,
            Given::Config(given) => config = given,
        }
    }
    let spec = &mut run.spec;
    merge(&mut config, spec.config.take().unwrap_or_default());
    for word in &args.set {
        set(&mut config, word)?;
    }
    for word in &args.eval {
        named(&mut config, ["--eval", "evaluations"], word)?;
    }
    for word in &args.embed {
        named(&mut config, ["--embed", "embeddings"], word)?;
    }
    // As the coordinator will check it, but here, where it was typed.
    let text = Value::Object(config.clone()).to_string();
    let name = args.file.as_deref().map_or_else(|| "(defaults)".to_owned(), |file| file.display().to_string());
    RunConfig::from_yaml(&text, &name, &[])?;
    spec.config = (!config.is_empty()).then_some(config);
    spec.nodes = args.nodes.unwrap_or(spec.nodes);
    let over = |own: &mut Option<String>, given: &Option<String>| {
        if given.is_some() {
            own.clone_from(given);
        }
    };
    over(&mut spec.dataset, &args.data);
    over(&mut spec.bucket, &args.bucket);
    over(&mut spec.image, &args.image);
    over(&mut spec.queue, &args.queue);
    over(&mut spec.priority, &args.priority);
    spec.gpus_per_node = args.gpus_per_node.or(spec.gpus_per_node);
    spec.min_nodes = args.min_nodes.or(spec.min_nodes);
    spec.max_restarts = args.max_restarts.or(spec.max_restarts);
    let given = args.name.clone().or(run.metadata.name.clone().filter(|name| !name.is_empty()));
    let name = given.unwrap_or_else(|| Timestamp::now().strftime("run-%Y%m%d-%H%M%S").to_string());
    run.metadata.name = Some(RunName::new(name)?.to_string());
    Ok(run)
}

enum Given {
    Run(Box<SgclRun>),
    Config(Map<String, Value>),
}

/// A configuration, or a whole object.
fn read(file: &Path) -> Result<Given> {
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Read { file: file.to_owned(), source })?;
    let odd = |what: String| Failure::new(Exit::Config, format!("{}: {what}", file.display()));
    let tree: Map<String, Value> = serde_saphyr::from_str(&text).map_err(|e| odd(e.to_string()))?;
    if tree.get("kind").is_none() {
        return Ok(Given::Config(tree));
    }
    let run = serde_json::from_value(Value::Object(tree)).map_err(|e| odd(format!("not an SgclRun: {e}")))?;
    Ok(Given::Run(run))
}

/// `a.b=c`, laid over a tree that holds only what was given.
fn set(tree: &mut Map<String, Value>, word: &str) -> Result<()> {
    let fail = |reason: String| ConfigError::Set { word: word.to_owned(), reason };
    let (key, text) = word.split_once('=').ok_or_else(|| fail("write it as key=value".to_owned()))?;
    let value: Value = serde_saphyr::from_str(text).map_err(|e| fail(e.to_string()))?;
    let (path, leaf) = key.rsplit_once('.').map_or((None, key), |(path, leaf)| (Some(path), leaf));
    let mut node = tree;
    for part in path.into_iter().flat_map(|path| path.split('.')) {
        let next = node.entry(part.to_owned()).or_insert_with(|| json!({}));
        node = next.as_object_mut().with_context(|| fail(format!("{part} is no section")))?;
    }
    node.insert(leaf.to_owned(), value);
    Ok(())
}

/// `name=dataset`, one more of a list of the configuration, with its defaults.
fn named(tree: &mut Map<String, Value>, [option, key]: [&str; 2], word: &str) -> Result<()> {
    let odd = |what: &str| Failure::new(Exit::Usage, format!("{option} {word}: {what}"));
    let (name, dataset) = word.split_once('=').ok_or_else(|| odd("write it as name=URL of a patch set"))?;
    let list = tree.entry(key).or_insert_with(|| json!([]));
    let list = list.as_array_mut().ok_or_else(|| odd(&format!("{key} of the configuration is no list")))?;
    list.push(json!({ "name": name, "dataset": dataset }));
    Ok(())
}

fn merge(base: &mut Map<String, Value>, over: Map<String, Value>) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(Value::Object(base)), Value::Object(over)) => merge(base, over),
            (_, value) => drop(base.insert(key, value)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{Cli, Command};

    fn asked(words: &[&str]) -> Result<SgclRun> {
        let cli = Cli::parse_from(["sgclctl", "submit"].iter().chain(words));
        match cli.command {
            Command::Submit(args) => wanted(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn two_numbers_make_a_run_that_leaves_the_rest_open() {
        let run = asked(&["--nodes", "2", "--gpus-per-node", "4"]).unwrap();
        let alone = SgclRunSpec { nodes: 2, gpus_per_node: Some(4), ..SgclRunSpec::default() };
        assert_eq!(run.spec, alone);
        assert!(run.name_any().starts_with("run-"));
    }

    #[test]
    fn overrides_become_a_configuration_of_just_those_keys() {
        let run = asked(&["--set", "batch.per_rank=8", "--set", "epochs=3"]).unwrap();
        assert_eq!(Value::Object(run.spec.config.unwrap()), json!({ "batch": { "per_rank": 8 }, "epochs": 3 }));
    }

    #[test]
    fn evaluations_are_added_to_those_of_the_configuration() {
        let own = r#"evaluations=[{"name": "grain", "dataset": "s3://lab/a", "trials": 3}]"#;
        let words = ["--eval", "tumour=s3://lab/b?x=y", "--set", own];
        let config = asked(&words).unwrap().spec.config.unwrap();
        let grain = json!({ "name": "grain", "dataset": "s3://lab/a", "trials": 3 });
        assert_eq!(config["evaluations"], json!([grain, { "name": "tumour", "dataset": "s3://lab/b?x=y" }]));
        for (word, said) in
            [("s3://lab/b", "name=URL"), ("Big=s3://lab/b", "is not 1 to 30 of"), ("a=", "dataset is missing")]
        {
            let error = asked(&["--eval", word]).unwrap_err();
            assert!(format!("{error:#}").contains(said), "{error:#}");
        }
    }

    #[test]
    fn embeddings_stand_beside_evaluations_under_names_of_their_own() {
        let config = asked(&["--embed", "atlas=s3://lab/atlas"]).unwrap().spec.config.unwrap();
        assert_eq!(config["embeddings"], json!([{ "name": "atlas", "dataset": "s3://lab/atlas" }]));
        let error = asked(&["--eval", "atlas=s3://lab/b", "--embed", "atlas=s3://lab/atlas"]).unwrap_err();
        assert!(format!("{error:#}").contains("embeddings[0].name \"atlas\" is that of another"), "{error:#}");
        let error = asked(&["--embed", "s3://lab/b"]).unwrap_err();
        assert!(format!("{error:#}").contains("--embed s3://lab/b"), "{error:#}");
    }

    #[test]
    fn a_misspelt_key_is_refused_here() {
        let error = asked(&["--set", "epoch=3"]).unwrap_err();
        assert!(format!("{error:#}").contains("epochs"), "{error:#}");
    }

    #[test]
    fn a_file_is_a_configuration_or_a_whole_run() {
        let folder = tempfile::tempdir().unwrap();
        let (config, whole) = (folder.path().join("config.yaml"), folder.path().join("run.yaml"));
        std::fs::write(&config, "epochs: 9\n").unwrap();
        std::fs::write(
            &whole,
            "apiVersion: sgcl.dev/v1alpha1\nkind: SgclRun\nmetadata: {name: big}\nspec: {nodes: 5, config: {epochs: 4}}\n",
        )
        .unwrap();
        let run = asked(&["-f", config.to_str().unwrap()]).unwrap();
        assert_eq!((run.spec.nodes, &run.spec.config.unwrap()["epochs"]), (1, &json!(9)));
        let run = asked(&["-f", whole.to_str().unwrap(), "--nodes", "6"]).unwrap();
        assert_eq!((run.name_any().as_str(), run.spec.nodes), ("big", 6));
        assert_eq!(run.spec.config.unwrap()["epochs"], 4);
    }
}
