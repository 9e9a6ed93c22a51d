//! Runs from patch set to export, with real workers, gRPC and rings.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use sgcl_coordinator::Outcome;
use sgcl_patchset::PatchSet;
use sgcl_runstore::metrics::read_metrics;
use sgcl_runstore::status::{Phase, RunStatus};
use sgcl_runstore::{Commits, export};
use support::{config, place, small, start, state, train};

#[tokio::test(flavor = "multi_thread")]
async fn a_run_on_two_ranks_uses_every_patch_and_leaves_weights() {
    let place = place(3, 7).await;
    let outcome = train(&place.bucket, &place.data, "two", 1, 2, config(&["data.holdout_fraction=0.3"])).await;
    assert_eq!(outcome, Outcome::Finished);

    let run = place.run("two");
    let commit = Commits::new(&run).newest_intact().await.unwrap().unwrap().commit;
    assert!(commit.progress.done);
    let ledger = Commits::new(&run).ledger(&commit.progress.ledger).await.unwrap();
    assert_eq!(ledger.len(), 98, "two of three slides are trained on");
    let set = PatchSet::open(&place.data).await.unwrap();
    let slides: std::collections::BTreeSet<u32> =
        ledger.bitmap().iter().map(|id| set.index().row(id).unwrap().slide).collect();
    assert_eq!(slides.len(), 2, "the third slide is held out");

    let metrics = read_metrics(&run).await.unwrap();
    assert_eq!(metrics.len() as u64, commit.progress.step);
    assert!(metrics.iter().all(|step| step.values["loss/total"].is_finite()));
    assert_eq!(RunStatus::read(&run).await.unwrap().phase, Phase::Finished);

    let weights = tempfile::tempdir().unwrap();
    let pulled = export::pull(&run, None, &weights.path().join("weights"), |_, _| {}).await.unwrap();
    assert!(pulled.dir.join("backbone.pth").is_file());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_global_batch_gives_the_same_losses_on_one_rank_two_ranks_and_two_nodes() {
    let place = place(2, 9).await;
    let mut curves = Vec::new();
    for (name, nodes, ranks, accumulate) in [("one", 1, 1, 2), ("ranks", 1, 2, 1), ("nodes", 2, 1, 1)] {
        let config = config(&[&format!("batch.accumulate={accumulate}"), "objective.double=true"]);
        assert_eq!(train(&place.bucket, &place.data, name, nodes, ranks, config).await, Outcome::Finished);
        let metrics = read_metrics(&place.run(name)).await.unwrap();
        curves.push(metrics.iter().map(|step| step.values["loss/total"]).collect::<Vec<_>>());
    }
    assert!(curves[0].len() >= 20, "{} steps", curves[0].len());
    for other in &curves[1..] {
        assert_eq!(other.len(), curves[0].len());
        let gaps: Vec<f64> = curves[0].iter().zip(other).map(|(a, b)| (a - b).abs() / a.abs()).take(20).collect();
        assert!(gaps.iter().all(|&gap| gap <= 1e-4), "relative differences by step: {gaps:?}");
    }
}

#[rstest::rstest]
#[case::sgcl(&[])]
#[case::moco_v2(&["bank.momentum=0", "method=moco-v2"])]
#[case::densecl(&["bank.momentum=0", "method=densecl"])]
#[tokio::test(flavor = "multi_thread")]
async fn a_run_stopped_in_mid_epoch_and_resumed_equals_an_undisturbed_one_bit_for_bit(#[case] sets: &[&str]) {
    let place = place(2, 9).await;
    assert_eq!(train(&place.bucket, &place.data, "whole", 1, 2, config(sets)).await, Outcome::Finished);

    let mut running = start(&place.bucket, &place.data, "parted", 1, 2, config(sets)).await;
    running.view.wait_for(|view| view.step >= 3).await.unwrap();
    running.stop.cancel();
    assert!(matches!(running.outcome.await.unwrap(), Outcome::Suspended { .. }));
    let parted = place.run("parted");
    let commit = Commits::new(&parted).latest().await.unwrap().unwrap();
    assert!(!commit.progress.done && commit.progress.cursor > 0);
    assert_eq!(train(&place.bucket, &place.data, "parted", 1, 2, config(sets)).await, Outcome::Finished);

    let (whole, parted) = (state(&place.run("whole")).await, state(&parted).await);
    assert_eq!(whole.len(), parted.len());
    for ((name, a), (other, b)) in whole.iter().zip(&parted) {
        assert_eq!(name, other);
        assert_eq!(a.shape, b.shape, "{name}");
        assert!(a.data == b.data, "{name} differs");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_resumed_on_another_number_of_ranks_uses_the_rest_of_the_epoch_once() {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, "fewer", 1, 2, config(&["epochs=1"])).await;
    running.view.wait_for(|view| view.step >= 2).await.unwrap();
    running.stop.cancel();
    running.outcome.await.unwrap();
    let run = place.run("fewer");
    let stopped = Commits::new(&run).latest().await.unwrap().unwrap();
    assert_eq!(train(&place.bucket, &place.data, "fewer", 1, 1, config(&["epochs=1"])).await, Outcome::Finished);

    let commits = Commits::new(&run);
    let before = commits.ledger(&stopped.progress.ledger).await.unwrap();
    let after = commits.newest_intact().await.unwrap().unwrap().commit.progress;
    assert_eq!(commits.ledger(&after.ledger).await.unwrap().len(), 162);
    let left = 162 - before.len();
    assert_eq!(after.step - stopped.progress.step, left.div_ceil(8), "only unused patches were read");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_shard_fails_the_run_with_its_name() {
    let place = place(2, 7).await;
    let shard = std::fs::read_dir(place.data.clone() + "/shards").unwrap().next().unwrap().unwrap().path();
    let bytes = std::fs::read(&shard).unwrap();
    std::fs::write(&shard, &bytes[..bytes.len() / 2]).unwrap();
    match train(&place.bucket, &place.data, "torn", 1, 2, config(&[])).await {
        Outcome::Failed { message, code } => {
            assert!(message.contains(shard.file_name().unwrap().to_str().unwrap()), "{message}");
            assert_eq!(code, 65, "{message}");
        }
        other => panic!("{other:?}"),
    }
}

#[rstest::rstest]
#[case::npid("npid", &["intra"])]
#[case::npid_mcrop("npid-mcrop", &["intra", "inner"])]
#[case::local_aggregation("local-aggregation", &["inter"])]
#[case::sslp("sslp", &["intra", "semantic", "spatial"])]
#[case::moco_v2("moco-v2", &["intra"])]
#[case::densecl("densecl", &["intra", "inner"])]
#[tokio::test(flavor = "multi_thread")]
async fn the_family_learns_without_what_it_has_no_use_for(#[case] method: &str, #[case] terms: &[&str]) {
    let place = place(3, 9).await;
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{method}.yaml"));
    let hard = method == "sslp";
    let clustered = hard || method == "local-aggregation";
    // What a method has no use for need not fit.
    let sets = [
        format!("kmeans.clusters={}", if clustered { 4 } else { 100_000 }),
        format!("objective.hard={}", if hard { 16 } else { 100_000 }),
        "bank.dtype=bf16".to_owned(),
        "bank.start=features".to_owned(),
        // The run is short.
        "objective.key_momentum=0.9".to_owned(),
        "epochs=6".to_owned(),
        "optimizer.lr=0.06".to_owned(),
    ];
    let config = small(Some(&file), &sets);
    assert_eq!(train(&place.bucket, &place.data, method, 1, 2, config).await, Outcome::Finished);
    let run = place.run(method);
    let metrics = read_metrics(&run).await.unwrap();
    for step in &metrics {
        let named: Vec<&str> = step.values.keys().filter_map(|name| name.strip_prefix("loss/")).collect();
        let mut expected = [terms, &["total"]].concat();
        expected.sort_unstable();
        assert_eq!(named, expected);
        assert!(step.values.contains_key("bank/effective_rank"));
    }
    // The total grows with the weight of some terms.
    let term = format!("loss/{}", terms[0]);
    let mean = |epoch: u32| {
        let losses: Vec<f64> =
            metrics.iter().filter(|step| step.epoch == epoch).map(|step| step.values[&term]).collect();
        losses.iter().sum::<f64>() / losses.len() as f64
    };
    let (first, last) = (mean(0), mean(5));
    println!("{method}: mean {term} {first:.3} in the first epoch, {last:.3} in the last");
    assert!(last < 0.97 * first, "{method}: mean {term} {first} in the first epoch, {last} in the last");
    let names: Vec<String> = state(&run).await.into_iter().map(|(name, _)| name).collect();
    let dense = method == "densecl";
    assert_eq!(names.iter().any(|name| name.ends_with(" tl")), terms.contains(&"inner") && !dense);
    assert_eq!(
        names.iter().any(|name| name.ends_with(" backbone")),
        hard || dense,
        "for hard negatives, or pooled keys"
    );
    let layers = names.iter().filter(|name| name.contains("projector.") && name.starts_with("Model")).count();
    let expected = match method {
        "sslp" => 2,
        // The key encoder has one of its own.
        "moco-v2" | "densecl" => 8,
        _ => 4,
    };
    assert_eq!(layers, expected, "weights and biases of the projector");
}
