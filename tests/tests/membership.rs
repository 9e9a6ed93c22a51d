//! Runs that lose ranks and nodes while they train, with real processes: what is left goes on, and the bucket proves that nothing was
//! lost or repeated.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::time::Duration;

use nix::sys::signal::Signal;
use sgcl_coordinator::launcher::Ended;
use sgcl_coordinator::{Change, Launcher, Outcome, ProcessLauncher};
use sgcl_patchset::PatchSet;
use sgcl_runstore::checkpoint::read_tensors;
use sgcl_runstore::verify::{Proof, verify};
use sgcl_runstore::{Commits, Spec, Tensor};
use support::{Place, Process, Running, config, place, processes, start, start_at, start_with, worker};
use tokio::sync::mpsc;

fn elastic(overrides: &[&str]) -> sgcl_runstore::RunConfig {
    let mut all = vec!["epochs=6", "max_restarts=1000", "step_timeout_s=20", "checkpoint.keep_last=3"];
    all.extend(overrides);
    config(&all)
}

fn ranks(run: &str) -> Vec<Process> {
    processes(run).into_iter().filter(|process| process.local_rank.is_some()).collect()
}

fn supervisors(run: &str) -> Vec<Process> {
    processes(run).into_iter().filter(|process| process.local_rank.is_none()).collect()
}

async fn step(running: &mut Running, step: u64) {
    running.view.wait_for(|view| view.step >= step && view.phase == "training").await.unwrap();
}

async fn changes(running: &mut Running, count: usize) -> Vec<Change> {
    let wait = running.view.wait_for(|view| view.changes.len() >= count);
    tokio::time::timeout(Duration::from_secs(120), wait)
        .await
        .expect("no change for two minutes")
        .unwrap()
        .changes
        .clone()
}

async fn proof(place: &Place, name: &str) -> Proof {
    let run = place.run(name);
    let spec = Spec::find(&run).await.unwrap().unwrap();
    let set = PatchSet::open(&place.data).await.unwrap();
    verify(&Commits::new(&run), &spec, &set, |_, _| {}).await.unwrap()
}

async fn finish(running: Running) {
    let outcome = tokio::time::timeout(Duration::from_secs(300), running.outcome).await.expect("never ends").unwrap();
    assert_eq!(outcome, Outcome::Finished);
}

#[rstest::rstest]
#[case::sgcl("rank", &[])]
// Its key encoder and queue are state too: checkpoints compare the weights of all ranks.
#[case::moco_v2("rank-with-keys", &["bank.momentum=0", "method=moco-v2"])]
#[case::densecl("rank-with-positions", &["bank.momentum=0", "method=densecl"])]
// Ranks wait for each other in every layer, forward and backward.
#[case::sync_norm("rank-normalised", &["backbone.sync_norm=true"])]
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_rank_costs_no_step_and_its_replacement_is_fed_by_its_peers(
    #[case] name: &str,
    #[case] sets: &[&str],
) {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, name, 2, 2, elastic(sets)).await;
    step(&mut running, 8).await;
    assert!(ranks(name)[1].signal(Signal::SIGKILL));
    let changes = changes(&mut running, 2).await;
    let (loss, growth) = (&changes[0], &changes[1]);
    assert!(loss.failure && loss.reason.contains("137"), "{loss:?}");
    assert_eq!((loss.world_before, loss.world, loss.steps_lost, loss.from_commit), (4, 3, 0, None), "{loss:?}");
    assert!(!growth.failure, "{growth:?}");
    assert_eq!((growth.world_before, growth.world, growth.steps_lost, growth.from_commit), (3, 4, 0, None));
    finish(running).await;
    let proof = proof(&place, name).await;
    assert!(proof.holds(), "{:#?}", proof.problems);
    assert_eq!(proof.epochs.iter().map(|epoch| epoch.patches).collect::<Vec<_>>(), [162; 6]);
    assert!(proof.epochs.iter().any(|epoch| epoch.plans > 1), "the plan was made anew in mid-epoch");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_node_and_a_drained_one_cost_no_step() {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, "node", 2, 1, elastic(&[])).await;
    step(&mut running, 8).await;
    assert!(supervisors("node")[0].signal(Signal::SIGKILL));
    let seen = changes(&mut running, 2).await;
    assert!(seen[0].failure && seen[0].reason.contains("lost"), "{seen:?}");
    assert_eq!((seen[0].steps_lost, seen[0].from_commit, seen[0].world, seen[1].world), (0, None, 1, 2), "{seen:?}");

    let second = supervisors("node").into_iter().find(|process| process.node == "node-1-0").unwrap();
    assert!(second.signal(Signal::SIGTERM));
    let seen = changes(&mut running, 4).await;
    assert!(!seen[2].failure && seen[2].reason.contains("told to leave"), "{seen:?}");
    assert_eq!((seen[2].steps_lost, seen[2].from_commit, seen[2].world, seen[3].world), (0, None, 1, 2), "{seen:?}");
    finish(running).await;
    let proof = proof(&place, "node").await;
    assert!(proof.holds(), "{:#?}", proof.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_copies_a_drained_node_hands_its_shards_over() {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, "alone", 2, 1, elastic(&["bank.replicas=0"])).await;
    step(&mut running, 8).await;
    assert!(supervisors("alone")[1].signal(Signal::SIGTERM));
    let seen = changes(&mut running, 1).await;
    assert_eq!((seen[0].failure, seen[0].steps_lost, seen[0].from_commit), (false, 0, None), "{seen:?}");
    finish(running).await;
    let proof = proof(&place, "alone").await;
    assert!(proof.holds(), "{:#?}", proof.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hanging_rank_is_replaced() {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, "hang", 2, 1, elastic(&["step_timeout_s=6"])).await;
    step(&mut running, 8).await;
    assert!(ranks("hang")[1].signal(Signal::SIGSTOP));
    let seen = changes(&mut running, 2).await;
    assert!(seen[0].failure && seen[0].reason.contains("no step for 6 s"), "{seen:?}");
    assert_eq!((seen[0].steps_lost, seen[0].from_commit), (0, None));
    finish(running).await;
    assert!(proof(&place, "hang").await.holds());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_every_copy_gone_the_run_goes_back_to_the_newest_commit() {
    let place = place(2, 9).await;
    let mut running = start(&place.bucket, &place.data, "all", 2, 1, elastic(&["checkpoint.every_steps=5"])).await;
    running.view.wait_for(|view| view.step >= 14 && view.last_commit.is_some()).await.unwrap();
    assert!(ranks("all").iter().all(|rank| rank.signal(Signal::SIGKILL)));
    let seen = changes(&mut running, 1).await;
    assert!(seen[0].from_commit.is_some(), "{seen:?}");
    assert!(seen[0].steps_lost <= 10, "{seen:?}");
    finish(running).await;
    let proof = proof(&place, "all").await;
    assert!(proof.holds(), "{:#?}", proof.problems);
}

#[tokio::test(flavor = "multi_thread")]
async fn training_goes_on_without_its_coordinator_and_the_next_one_takes_it_over() {
    let place = place(2, 9).await;
    let sets = ["epochs=30", "checkpoint.every_steps=20"];
    let mut running = start(&place.bucket, &place.data, "headless", 2, 1, elastic(&sets)).await;
    step(&mut running, 8).await;
    let before = processes("headless");
    let (address, at) = (running.address, running.view.borrow().step);
    running.outcome.abort();
    let _ = running.outcome.await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let listener = tokio::net::TcpListener::bind(address).await.unwrap();
    let launcher = ProcessLauncher::new(worker(), "headless".into(), 2, 1).with_threads(1);
    let config = elastic(&sets);
    let mut next = start_at(listener, launcher, &place.bucket, &place.data, "headless", 2, 1, config).await;
    step(&mut next, at + 5).await;
    assert_eq!(processes("headless"), before, "the same processes train");
    assert_eq!(next.view.borrow().ranks, 2);
    assert!(ranks("headless")[1].signal(Signal::SIGKILL));
    let seen = changes(&mut next, 2).await;
    assert_eq!((seen[0].steps_lost, seen[0].from_commit, seen[1].world), (0, None, 2), "{seen:?}");
    next.stop.cancel();
    let outcome = tokio::time::timeout(Duration::from_secs(90), next.outcome).await.unwrap().unwrap();
    assert!(matches!(outcome, Outcome::Suspended { .. }), "{outcome:?}");
    let proof = proof(&place, "headless").await;
    assert!(proof.holds(), "{:#?}", proof.problems);
}

#[rstest::rstest]
#[case("a flipped bit", "crc32c")]
#[case("a missing part", "not found")]
#[case("a truncated commit", "damaged")]
#[case("a commit of a future version", "version 99")]
#[tokio::test(flavor = "multi_thread")]
async fn damage_is_named_and_the_run_goes_on_from_the_commit_before(#[case] damage: &str, #[case] word: &str) {
    let place = place(2, 9).await;
    let sets = ["epochs=2", "checkpoint.every_steps=4"];
    let mut running = start(&place.bucket, &place.data, "torn", 1, 2, elastic(&sets)).await;
    running.view.wait_for(|view| view.step >= 9 && view.last_commit >= Some(2)).await.unwrap();
    running.stop.cancel();
    running.outcome.await.unwrap();
    let run = place.run("torn");
    let commits = Commits::new(&run);
    let newest = commits.latest().await.unwrap().unwrap();
    let part = run.local_path(&newest.progress.parts[0].path).unwrap();
    let file = run.local_path(&format!("commits/{:08}.json", newest.seq)).unwrap();
    match damage {
        "a flipped bit" => {
            let mut bytes = std::fs::read(&part).unwrap();
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&part, bytes).unwrap();
        }
        "a missing part" => std::fs::remove_file(&part).unwrap(),
        "a truncated commit" => {
            let bytes = std::fs::read(&file).unwrap();
            std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
        }
        _ => {
            let text = std::fs::read_to_string(&file).unwrap();
            let ours = format!("\"version\": {}", sgcl_runstore::FORMAT_VERSION);
            assert!(text.contains(&ours), "{text}");
            std::fs::write(&file, text.replacen(&ours, "\"version\": 99", 1)).unwrap();
        }
    }
    let found = proof(&place, "torn").await;
    let named = |problem: &String| problem.contains(&format!("commit {}", newest.seq)) && problem.contains(word);
    assert!(found.problems.iter().any(named), "{damage}: {:#?}", found.problems);

    let again = start(&place.bucket, &place.data, "torn", 1, 2, elastic(&sets)).await;
    finish(again).await;
    let events = sgcl_runstore::Events::new(&run).read().await.unwrap();
    let aside = events.iter().find_map(|event| match &event.kind {
        sgcl_runstore::EventKind::SetAside { seq, reason } => Some((*seq, reason.clone())),
        _ => None,
    });
    let (seq, reason) = aside.expect("an event says which commit was put away");
    assert!(seq == newest.seq && reason.contains(word), "{seq}: {reason}");
    let proof = proof(&place, "torn").await;
    assert!(proof.holds(), "{damage}: {:#?}", proof.problems);
}

/// Never replaces a node: what a loss leaves behind is what the run ends with.
struct Once(ProcessLauncher);

impl Launcher for Once {
    fn launch(&self, slot: u32, attempt: u32, at: &str, ended: mpsc::UnboundedSender<Ended>) -> std::io::Result<()> {
        if attempt == 0 { self.0.launch(slot, attempt, at, ended) } else { Ok(()) }
    }

    fn adopt(&self, ended: mpsc::UnboundedSender<Ended>) -> Vec<(u32, u32)> {
        self.0.adopt(ended)
    }

    fn discard(&self, slot: u32, attempt: u32) {
        self.0.discard(slot, attempt);
    }

    fn kill_all(&self) {
        self.0.kill_all();
    }
}

/// Every tensor of the newest commit, by part and name.
async fn state(place: &Place, name: &str) -> Vec<(String, Tensor)> {
    let run = place.run(name);
    let commit = Commits::new(&run).newest_intact().await.unwrap().unwrap().commit;
    let mut state = Vec::new();
    for part in &commit.progress.parts {
        for tensor in read_tensors(&run, part).await.unwrap() {
            state.push((format!("{} {}", part.path.rsplit('/').next().unwrap(), tensor.name), tensor));
        }
    }
    state
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_lost_in_mid_step_leaves_the_weights_that_one_drained_before_it_leaves() {
    let place = place(2, 9).await;
    let config = || elastic(&["epochs=4"]);
    let begin = async |name: &str| {
        let launcher = Once(ProcessLauncher::new(worker(), name.to_owned(), 2, 1).with_threads(1));
        start_with(launcher, &place.bucket, &place.data, name, 2, 1, config()).await
    };
    let mut running = begin("drained").await;
    step(&mut running, 8).await;
    assert!(supervisors("drained")[1].signal(Signal::SIGTERM));
    let boundary = changes(&mut running, 1).await[0].step;
    finish(running).await;

    for attempt in 0..8 {
        let name = format!("killed-{attempt}");
        let mut running = begin(&name).await;
        let victim = {
            step(&mut running, 1).await;
            ranks(&name)[1].clone()
        };
        running.view.wait_for(|view| view.step >= boundary).await.unwrap();
        assert!(victim.signal(Signal::SIGKILL));
        supervisors(&name)[1].signal(Signal::SIGKILL);
        let seen = changes(&mut running, 1).await[0].clone();
        if seen.step != boundary {
            // It finished one step more before it was hit: another try.
            running.stop.cancel();
            let _ = running.outcome.await;
            continue;
        }
        finish(running).await;
        let (drained, killed) = (state(&place, "drained").await, state(&place, &name).await);
        assert_eq!(drained.len(), killed.len());
        for ((name, a), (other, b)) in drained.iter().zip(&killed) {
            assert_eq!(name, other);
            assert!(a.data == b.data, "{name} differs");
        }
        return;
    }
    panic!("no kill in eight hit the step after {boundary}");
}
