#![allow(clippy::unwrap_used)]

use super::*;

struct Run {
    machine: Machine,
    now: Instant,
    log: Vec<Effect>,
    ranks: u32,
}

impl Run {
    fn new(nodes: u32, ranks: u32, min_nodes: u32, max_restarts: u32) -> Self {
        let now = Instant::now();
        let settings = Settings {
            nodes,
            min_nodes,
            ranks_per_node: ranks,
            max_restarts,
            startup_timeout: Duration::from_secs(60),
            step_timeout: Duration::from_secs(30),
        };
        let (machine, log) = Machine::start(settings, 0, now);
        Run { machine, now, log, ranks }
    }

    fn on(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.machine.handle(self.now, event);
        self.log.extend(effects.iter().cloned());
        effects
    }

    /// Time passes as it does where ticks come: a leap would be this coordinator's own sleep.
    fn wait(&mut self, seconds: u64) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..seconds * 10 {
            self.now += Duration::from_millis(100);
            effects.extend(self.on(Event::Tick));
        }
        effects
    }

    /// A node's line breaks and is not mended.
    fn lose(&mut self, node: &str) -> Vec<Effect> {
        let mut effects = self.on(Event::NodeLost { node: node.into() });
        effects.extend(self.wait(1));
        effects
    }

    fn ready(&mut self, node: &str, local: u32, attempt: u32) -> Vec<Effect> {
        let generation = self.machine.generation();
        self.on(Event::RankReady { place: (node.into(), local), attempt, generation, broken: None })
    }

    /// A node joins and its ranks become ready.
    fn join(&mut self, node: &str, slot: u32) -> Vec<Effect> {
        self.on(joined(node, slot, &[]));
        (0..self.ranks).flat_map(|local| self.ready(node, local, 0)).collect()
    }

    /// The ranks that were just assigned find each other at `step`.
    fn reunite(&mut self, assigned: &[Effect], step: u64) -> Vec<Effect> {
        let generation = self.machine.generation();
        let mut effects = self.on(Event::StoreListening { generation, port: 7 });
        for place in places(assigned) {
            effects.extend(self.on(Event::Reunited { generation, place, step, from_commit: None }));
        }
        effects
    }

    fn step(&mut self, step: u64) {
        let generation = self.machine.generation();
        self.on(Event::Progress { generation, step });
    }

    fn exit(&mut self, node: &str, local: u32, attempt: u32, code: i32) -> Vec<Effect> {
        self.on(Event::RankExited { place: (node.into(), local), attempt, code, last_words: "words".into() })
    }

    /// Two nodes of `ranks` ranks that train.
    fn training(ranks: u32, min_nodes: u32, max_restarts: u32) -> Self {
        let mut run = Run::new(2, ranks, min_nodes, max_restarts);
        run.join("a", 0);
        let assigned = run.join("b", 1);
        run.reunite(&assigned, 0);
        run.step(5);
        run
    }
}

fn joined(node: &str, slot: u32, ranks: &[(u32, u32)]) -> Event {
    Event::NodeJoined { node: node.into(), slot, address: format!("at-{node}"), ranks: ranks.to_vec() }
}

fn places(effects: &[Effect]) -> Vec<Place> {
    let place = |e: &Effect| if let Effect::Assign { place, .. } = e { Some(place.clone()) } else { None };
    effects.iter().filter_map(place).collect()
}

fn place(node: &str, local: u32) -> Place {
    (node.to_owned(), local)
}

fn outcome(effects: &[Effect]) -> Option<&Outcome> {
    effects.iter().find_map(|effect| if let Effect::End(outcome) = effect { Some(outcome) } else { None })
}

fn change(effects: &[Effect]) -> &Change {
    effects.iter().find_map(|effect| if let Effect::Regrouped(change) = effect { Some(change) } else { None }).unwrap()
}

#[test]
fn ranks_are_dealt_node_by_node_and_meet_at_rank_0s_store() {
    let mut run = Run::new(2, 2, 2, 0);
    assert!(places(&run.join("a", 0)).is_empty(), "one node of two");
    let assigned = run.join("b", 1);
    assert_eq!(places(&assigned), [place("a", 0), place("a", 1), place("b", 0), place("b", 1)]);
    assert!(assigned.iter().any(|e| matches!(e, Effect::Assign { rank: 2, nodes, .. } if nodes[..] == [0, 0, 1, 1])));
    let effects = run.reunite(&assigned, 0);
    let hosts: Vec<_> = effects
        .iter()
        .filter_map(|e| if let Effect::Rendezvous { host, port, .. } = e { Some((host.as_str(), *port)) } else { None })
        .collect();
    assert_eq!(hosts, [("at-a", 7); 4]);
    assert!(effects.contains(&Effect::Started { generation: 1, world: 4, from_commit: None }));
}

#[test]
fn a_run_begins_with_enough_nodes_and_the_others_join_it() {
    let mut run = Run::new(3, 1, 1, 0);
    assert!(places(&run.join("a", 0)).is_empty());
    assert!(places(&run.wait(19)).is_empty(), "others may be on their way");
    run.on(joined("b", 1, &[]));
    assert!(places(&run.wait(30)).is_empty(), "who has come is waited for");
    let assigned = run.ready("b", 0, 0);
    assert_eq!(places(&assigned), [place("a", 0), place("b", 0)]);
    run.reunite(&assigned, 0);
    run.step(5);
    let pause = run.join("c", 2);
    assert!(pause.iter().any(|effect| matches!(effect, Effect::Pause { .. })), "{pause:?}");
}

#[test]
fn enough_nodes_must_be_there_together() {
    let mut run = Run::new(3, 1, 2, 9);
    run.join("a", 0);
    run.join("b", 1);
    run.wait(15);
    run.lose("b");
    run.wait(15);
    assert!(places(&run.join("d", 1)).is_empty(), "the twenty seconds begin anew");
    assert_eq!(places(&run.wait(21)), [place("a", 0), place("d", 0)]);
}

#[test]
fn a_commit_is_made_once_all_ranks_have_written_and_told_to_all() {
    let mut run = Run::training(1, 2, 0);
    let parts = |node: &str| Event::PartsWritten { generation: 1, place: place(node, 0), step: 5 };
    assert_eq!(run.on(parts("a")), []);
    assert_eq!(run.on(parts("a")), [], "a repeated report counts once");
    assert_eq!(run.on(parts("b")), [Effect::WriteCommit { generation: 1, step: 5 }]);
    let told = run.on(Event::Committed { generation: 1, seq: 9, step: 5 });
    assert_eq!(told.iter().filter(|e| matches!(e, Effect::TellCommitted { seq: 9, .. })).count(), 2);
}

#[test]
fn the_survivors_of_a_killed_rank_go_on_at_once_and_grow_when_it_is_replaced() {
    let mut run = Run::training(2, 1, 3);
    let effects = run.exit("b", 0, 0, 137);
    assert!(effects.contains(&Effect::StartRank { place: place("b", 0), attempt: 1 }));
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Regroup { generation: 1, .. })).count(), 3);
    run.ready("a", 0, 0);
    run.ready("a", 1, 0);
    let assigned = run.ready("b", 1, 0);
    assert_eq!(places(&assigned), [place("a", 0), place("a", 1), place("b", 1)]);
    let effects = run.reunite(&assigned, 5);
    let change = change(&effects);
    assert!(change.failure && change.reason.contains("137"), "{change:?}");
    assert_eq!((change.world_before, change.world, change.steps_lost), (4, 3, 0));

    let effects = run.on(Event::RankReady { place: place("b", 0), attempt: 1, generation: 0, broken: None });
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Pause { leaving, .. } if leaving.is_empty())).count(), 3);
    run.ready("a", 0, 0);
    run.ready("a", 1, 0);
    let assigned = run.ready("b", 1, 0);
    assert_eq!(places(&assigned).len(), 4, "the replacement is in");
    let effects = run.reunite(&assigned, 6);
    assert!(!self::change(&effects).failure, "growing costs nothing");
}

#[test]
fn a_ring_that_breaks_without_a_loss_counts_and_one_that_breaks_because_of_a_loss_counts_once() {
    let mut run = Run::training(1, 1, 1);
    let broken = |node: &str| Event::RankReady {
        place: place(node, 0),
        attempt: 0,
        generation: 1,
        broken: Some("reset".into()),
    };
    run.on(broken("a"));
    let assigned = run.on(broken("b"));
    assert_eq!(places(&assigned).len(), 2);
    let effects = run.reunite(&assigned, 5);
    assert!(change(&effects).failure && change(&effects).reason.contains("reset"));

    let mut run = Run::training(1, 1, 1);
    run.on(broken("a"));
    let assigned = run.exit("b", 0, 0, 139);
    assert_eq!(places(&assigned), [place("a", 0)]);
    let effects = run.reunite(&assigned, 5);
    assert!(change(&effects).reason.contains("139"), "the cause, not the symptom: {effects:?}");
    assert_eq!(outcome(&run.log), None, "one failure, not two");
}

#[test]
fn a_node_told_to_leave_finishes_its_step_goes_and_is_replaced_without_counting() {
    let mut run = Run::training(2, 1, 0);
    let effects = run.on(Event::Preempting { node: "a".into(), deadline: Duration::from_secs(10) });
    let pauses: Vec<_> = effects
        .iter()
        .filter(|e| matches!(e, Effect::Pause { leaving, commit: false, .. } if leaving[..] == [0, 1]))
        .collect();
    assert_eq!(pauses.len(), 4, "{effects:?}");
    for (node, local) in [("a", 0), ("a", 1), ("b", 0)] {
        run.ready(node, local, 0);
    }
    let effects = run.ready("b", 1, 0);
    assert!(effects.iter().any(|e| matches!(e, Effect::Leave { node, code: 75, .. } if node == "a")));
    assert_eq!(places(&effects), [place("b", 0), place("b", 1)]);
    run.reunite(&effects, 6);
    run.exit("a", 0, 0, 143);
    let effects = run.on(Event::NodeLost { node: "a".into() });
    assert!(effects.contains(&Effect::Launch { slot: 0, attempt: 1 }), "{effects:?}");
    let effects = run.join("c", 0);
    assert!(effects.iter().any(|e| matches!(e, Effect::Pause { .. })), "the replacement is let in");
    assert_eq!(outcome(&run.log), None);
}

#[test]
fn below_the_minimum_the_state_is_committed_kept_in_memory_and_given_up_only_after_a_wait() {
    let mut run = Run::training(1, 2, 0);
    let effects = run.on(Event::Preempting { node: "b".into(), deadline: Duration::from_secs(10) });
    assert!(effects.iter().any(|e| matches!(e, Effect::Pause { commit: true, .. })));
    run.ready("a", 0, 0);
    let effects = run.ready("b", 0, 0);
    assert!(places(&effects).is_empty() && effects.iter().any(|e| matches!(e, Effect::Note { .. })), "{effects:?}");
    run.on(Event::NodeLost { node: "b".into() });
    assert_eq!(run.wait(59), []);
    let assigned = run.wait(2);
    assert_eq!(places(&assigned), [place("a", 0)]);
    let effects = run.reunite(&assigned, 6);
    assert!(effects.iter().any(|e| matches!(e, Effect::Stop { .. })), "what it holds is committed: {effects:?}");
    run.on(Event::RankFinished { generation: 2, place: place("a", 0), stopped: true });
    let effects = run.exit("a", 0, 0, 0);
    assert!(matches!(outcome(&effects), Some(Outcome::Suspended { reason }) if reason.contains("1 of at least 2")));
}

#[test]
fn a_hang_is_cleared_by_ending_the_rank_that_does_not_come_back() {
    let mut run = Run::training(1, 1, 3);
    assert_eq!(run.wait(29), []);
    run.step(6);
    assert_eq!(run.wait(29), [], "a sign of life");
    let effects = run.wait(1);
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Regroup { .. })).count(), 2);
    run.ready("a", 0, 0);
    let effects = run.wait(1);
    assert_eq!(effects, [Effect::KillRank { place: place("b", 0), attempt: 0 }]);
    let effects = run.exit("b", 0, 0, 137);
    assert_eq!(places(&effects), [place("a", 0)], "the other goes on: {effects:?}");
}

#[test]
fn a_node_that_cannot_even_end_its_rank_is_given_up() {
    let mut run = Run::training(1, 1, 3);
    run.wait(30);
    run.ready("a", 0, 0);
    run.wait(1);
    let effects = run.wait(3);
    assert!(effects.contains(&Effect::Discard { slot: 1, attempt: 0 }), "{effects:?}");
    assert!(effects.contains(&Effect::Launch { slot: 1, attempt: 1 }));
    assert_eq!(places(&effects), [place("a", 0)]);
}

#[test]
fn the_restart_budget_ends_and_the_users_mistakes_are_not_tried_again() {
    let mut run = Run::training(1, 1, 0);
    run.exit("a", 0, 0, 1);
    let effects = run.exit("b", 0, 0, 143);
    assert!(matches!(outcome(&effects), Some(Outcome::Failed { code: 1, .. })), "{effects:?}");

    let mut run = Run::training(1, 1, 9);
    run.on(Event::RankFailed { place: place("a", 0), attempt: 0, message: "no such key".into(), code: 78 });
    run.exit("a", 0, 0, 78);
    let effects = run.exit("b", 0, 0, 143);
    assert!(
        matches!(outcome(&effects), Some(Outcome::Failed { code: 78, message }) if message.contains("no such key"))
    );
}

#[test]
fn a_stop_asks_every_rank_and_the_run_is_suspended_when_they_have_committed_and_gone() {
    let mut run = Run::training(1, 1, 0);
    let effects = run.on(Event::StopRequested);
    assert_eq!(effects.iter().filter(|e| matches!(e, Effect::Stop { .. })).count(), 2);
    run.on(Event::RankFinished { generation: 1, place: place("a", 0), stopped: true });
    run.on(Event::RankFinished { generation: 1, place: place("b", 0), stopped: true });
    run.exit("a", 0, 0, 0);
    let effects = run.exit("b", 0, 0, 0);
    assert!(matches!(outcome(&effects), Some(Outcome::Suspended { .. })), "{effects:?}");
    assert!(effects.iter().any(|e| matches!(e, Effect::Leave { .. })));
}

#[test]
fn nodes_that_do_not_come_fail_the_run_with_the_count() {
    let mut run = Run::new(2, 1, 2, 0);
    run.join("a", 0);
    run.wait(61);
    let effects = run.exit("a", 0, 0, 137);
    assert!(
        matches!(outcome(&effects), Some(Outcome::Failed { message, .. }) if message.contains("1 of at least 2")),
        "{effects:?}"
    );
}

#[test]
fn what_an_earlier_process_or_generation_says_changes_nothing() {
    let mut run = Run::training(1, 1, 9);
    run.exit("b", 0, 0, 137);
    let assigned = run.ready("a", 0, 0);
    run.reunite(&assigned, 5);
    assert_eq!(run.exit("b", 0, 0, 137), [], "told twice");
    assert_eq!(run.on(Event::PartsWritten { generation: 1, place: place("b", 0), step: 5 }), []);
    assert_eq!(run.on(Event::Progress { generation: 1, step: 99 }), []);
    let effects = run.on(joined("b2", 1, &[]));
    assert!(matches!(&effects[..], [Effect::Leave { node, .. }] if node == "b2"), "its slot is filled: {effects:?}");
}

#[test]
fn a_new_coordinator_takes_over_what_trains_and_starts_nothing_twice() {
    let settings = Run::new(2, 1, 1, 3).machine.settings;
    let now = Instant::now();
    let mut run = Run { machine: Machine::take_over(settings, 4, now), now, log: Vec::new(), ranks: 1 };
    assert_eq!(run.on(joined("x-0-2", 0, &[(0, 3)])), []);
    assert_eq!(run.on(joined("x-1-0", 1, &[(0, 0)])), []);
    let back = |node: &str, attempt, rank| Event::RankReturned {
        place: place(node, 0),
        attempt,
        generation: 7,
        rank,
        world: 2,
    };
    run.on(back("x-0-2", 3, 1));
    let effects = run.on(back("x-1-0", 0, 0));
    assert_eq!(effects, [Effect::Found { generation: 7, world: 2 }], "training goes on untouched");
    assert_eq!((run.machine.generation(), run.machine.first_place()), (7, Some(&place("x-1-0", 0))));
    let parts = |node: &str| Event::PartsWritten { generation: 7, place: place(node, 0), step: 5 };
    run.on(parts("x-0-2"));
    assert_eq!(run.on(parts("x-1-0")), [Effect::WriteCommit { generation: 7, step: 5 }]);
    let effects = run.lose("x-0-2");
    assert!(effects.contains(&Effect::Launch { slot: 0, attempt: 3 }), "a name nobody had: {effects:?}");
}

#[test]
fn a_new_coordinator_that_finds_nobody_or_not_all_starts_what_is_missing() {
    let settings = Run::new(2, 1, 1, 3).machine.settings;
    let now = Instant::now();
    let mut run = Run { machine: Machine::take_over(settings.clone(), 4, now), now, log: Vec::new(), ranks: 1 };
    assert_eq!(run.wait(4), []);
    assert_eq!(run.wait(1), [Effect::Launch { slot: 0, attempt: 0 }, Effect::Launch { slot: 1, attempt: 0 }]);

    let mut run = Run { machine: Machine::take_over(settings, 4, now), now, log: Vec::new(), ranks: 1 };
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(Event::RankReturned { place: place("x-0-0", 0), attempt: 0, generation: 7, rank: 0, world: 2 });
    let effects = run.wait(5);
    assert!(effects.iter().any(|e| matches!(e, Effect::Regroup { generation: 7, .. })), "{effects:?}");
    assert!(effects.contains(&Effect::Launch { slot: 1, attempt: 0 }));
    let assigned = run.on(Event::RankReady { place: place("x-0-0", 0), attempt: 0, generation: 7, broken: None });
    assert!(assigned.iter().any(|e| matches!(e, Effect::Assign { generation: 8, .. })), "{assigned:?}");
}

/// Two nodes whose one rank each trains in generation 7, found by another coordinator.
fn taken_over() -> Run {
    let settings = Run::new(2, 1, 1, 0).machine.settings;
    let now = Instant::now();
    Run { machine: Machine::take_over(settings, 4, now), now, log: Vec::new(), ranks: 1 }
}

fn returned(node: &str, generation: u64, rank: u32, world: u32) -> Event {
    Event::RankReturned { place: place(node, 0), attempt: 0, generation, rank, world }
}

fn ready(node: &str, attempt: u32, generation: u64) -> Event {
    Event::RankReady { place: place(node, 0), attempt, generation, broken: None }
}

#[test]
fn a_line_that_is_mended_in_time_costs_nothing() {
    let mut run = Run::training(1, 1, 0);
    assert_eq!(run.on(Event::NodeLost { node: "b".into() }), []);
    assert_eq!(run.on(joined("b", 1, &[(0, 0)])), []);
    assert_eq!(run.wait(3), [], "nobody is given up");
    let effects = run.lose("b");
    assert!(matches!(outcome(&effects).or(outcome(&run.wait(11))), Some(Outcome::Failed { .. })), "gone for good");
}

#[test]
fn a_node_that_the_launcher_knows_to_have_ended_is_not_waited_for() {
    let mut run = Run::training(1, 1, 1);
    run.on(Event::NodeLost { node: "b".into() });
    let effects = run.on(Event::LaunchEnded { slot: 1, attempt: 0, code: 137 });
    assert!(effects.contains(&Effect::Launch { slot: 1, attempt: 1 }), "{effects:?}");

    let mut run = Run::training(1, 1, 0);
    run.on(Event::LaunchEnded { slot: 1, attempt: 0, code: 75 });
    let effects = run.on(Event::NodeLost { node: "b".into() });
    assert!(effects.contains(&Effect::Launch { slot: 1, attempt: 1 }), "{effects:?}");
    assert_eq!(outcome(&run.log), None, "it was told to leave: that is no failure");
}

#[test]
fn orders_and_reports_that_went_with_a_broken_line_are_made_good() {
    let mut run = Run::training(2, 1, 3);
    run.on(Event::NodeLost { node: "b".into() });
    let effects = run.on(joined("b", 1, &[(1, 0)]));
    assert!(
        effects.contains(&Effect::StartRank { place: place("b", 0), attempt: 1 }),
        "its end was not heard: {effects:?}"
    );
    assert!(effects.iter().any(|e| matches!(e, Effect::Regroup { .. })));
    let effects = run.on(joined("b", 1, &[(1, 0)]));
    assert_eq!(effects, [Effect::StartRank { place: place("b", 0), attempt: 2 }], "nor was the order to start it");
}

#[test]
fn an_assignment_that_went_with_a_broken_line_is_given_again() {
    let mut run = Run::new(2, 1, 2, 0);
    run.join("a", 0);
    run.join("b", 1);
    run.on(Event::StoreListening { generation: 1, port: 7 });
    let effects = run.on(ready("b", 0, 0));
    assert!(matches!(
        &effects[..],
        [Effect::Assign { generation: 1, rank: 1, .. }, Effect::Rendezvous { port: 7, .. }]
    ));
    let effects = run.on(returned("b", 1, 1, 2));
    assert!(matches!(&effects[..], [Effect::Rendezvous { port: 7, .. }]), "it has the assignment: {effects:?}");
}

#[test]
fn a_member_on_a_new_line_hears_again_what_it_may_have_missed() {
    let mut run = Run::training(1, 1, 0);
    run.on(Event::Committed { generation: 1, seq: 9, step: 5 });
    let effects = run.on(returned("b", 1, 1, 2));
    let told = Effect::TellCommitted { place: place("b", 0), seq: 9, step: 5 };
    assert!(effects.contains(&told), "{effects:?}");
    let parts = Event::PartsWritten { generation: 1, place: place("b", 0), step: 5 };
    assert_eq!(run.on(parts), [told], "what is committed is not waited for");
    run.on(Event::Preempting { node: "a".into(), deadline: Duration::from_secs(10) });
    let effects = run.on(returned("b", 1, 1, 2));
    assert!(effects.iter().any(|e| matches!(e, Effect::Pause { leaving, .. } if leaving[..] == [0])), "{effects:?}");
}

#[test]
fn time_in_which_the_coordinator_did_not_run_is_nobodys_silence() {
    let mut run = Run::training(1, 1, 0);
    run.now += Duration::from_secs(3600);
    assert_eq!(run.on(Event::Tick), []);
    run.step(6);
    assert_eq!(run.wait(29), []);
    assert!(outcome(&run.wait(30)).is_some(), "a real silence is one");
}

#[test]
fn a_hung_node_counts_as_one_failure() {
    let mut run = Run::training(1, 1, 1);
    run.wait(30);
    run.ready("a", 0, 0);
    run.wait(5);
    assert_eq!(outcome(&run.log), None, "{:?}", run.log);
    assert!(run.log.contains(&Effect::Discard { slot: 1, attempt: 0 }));
}

#[test]
fn a_rank_that_ends_well_without_being_heard_is_no_failure() {
    let mut run = Run::training(1, 1, 0);
    run.on(Event::RankFinished { generation: 1, place: place("a", 0), stopped: false });
    run.exit("b", 0, 0, 0);
    let effects = run.exit("a", 0, 0, 0);
    assert_eq!(outcome(&effects), Some(&Outcome::Finished));
}

#[test]
fn a_node_told_to_leave_while_ranks_regroup_hands_over_first() {
    let mut run = Run::training(1, 1, 3);
    run.on(Event::RankReady { place: place("a", 0), attempt: 0, generation: 1, broken: Some("reset".into()) });
    assert_eq!(run.on(Event::Preempting { node: "a".into(), deadline: Duration::from_secs(10) }), [], "not yet");
    let assigned = run.ready("b", 0, 0);
    assert_eq!(places(&assigned), [place("a", 0), place("b", 0)], "what it holds may be needed");
    let effects = run.reunite(&assigned, 5);
    assert!(effects.iter().any(|e| matches!(e, Effect::Pause { leaving, .. } if leaving[..] == [0])), "{effects:?}");
    run.ready("b", 0, 0);
    let effects = run.ready("a", 0, 0);
    assert!(effects.iter().any(|e| matches!(e, Effect::Leave { node, code: 75, .. } if node == "a")), "{effects:?}");
}

#[test]
fn a_node_stays_when_whoever_took_over_from_it_is_lost() {
    let mut run = Run::training(1, 1, 3);
    run.on(Event::Preempting { node: "a".into(), deadline: Duration::from_secs(10) });
    run.ready("b", 0, 0);
    run.exit("b", 0, 0, 137);
    let effects = run.ready("a", 0, 0);
    assert!(!effects.iter().any(|e| matches!(e, Effect::Leave { .. })), "{effects:?}");
    assert_eq!(places(&effects), [place("a", 0)]);
}

#[test]
fn what_the_last_members_leave_with_is_committed_whoever_else_is_there() {
    let mut run = Run::training(1, 1, 3);
    run.exit("b", 0, 0, 137);
    let assigned = run.ready("a", 0, 0);
    run.reunite(&assigned, 5);
    let effects = run.on(Event::Preempting { node: "a".into(), deadline: Duration::from_secs(10) });
    assert!(effects.iter().any(|e| matches!(e, Effect::Pause { commit: true, .. })), "b holds nothing: {effects:?}");
}

#[test]
fn a_rank_that_missed_a_generation_begins_anew() {
    let mut run = taken_over();
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(returned("x-0-0", 7, 0, 1));
    let effects = run.on(joined("x-1-0", 1, &[(0, 0)]));
    assert_eq!(effects, []);
    let effects = run.on(ready("x-1-0", 0, 6));
    assert_eq!(
        effects,
        [Effect::KillRank { place: place("x-1-0", 0), attempt: 0 }],
        "what it holds is of another past"
    );
    let effects = run.exit("x-1-0", 0, 0, 137);
    assert_eq!(effects, [Effect::StartRank { place: place("x-1-0", 0), attempt: 1 }]);
}

#[test]
fn ranks_that_come_before_their_nodes_are_taken_over_with_all_they_said() {
    let mut run = taken_over();
    let parts = |node: &str| Event::PartsWritten { generation: 7, place: place(node, 0), step: 5 };
    run.on(returned("x-0-0", 7, 0, 2));
    run.on(parts("x-0-0"));
    run.on(returned("x-1-0", 7, 1, 2));
    run.on(parts("x-1-0"));
    run.on(joined("x-1-0", 1, &[(0, 0)]));
    let effects = run.on(joined("x-0-0", 0, &[(0, 0)]));
    assert_eq!(effects, [Effect::Found { generation: 7, world: 2 }, Effect::WriteCommit { generation: 7, step: 5 }]);
}

#[test]
fn ranks_found_between_two_generations_go_on_at_once_in_a_newer_one() {
    let mut run = taken_over();
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(joined("x-1-0", 1, &[(0, 0)]));
    run.on(ready("x-0-0", 0, 7));
    run.on(ready("x-1-0", 0, 7));
    let assigned = run.wait(6);
    assert!(assigned.iter().any(|e| matches!(e, Effect::Assign { generation: 8, .. })), "{assigned:?}");
    assert_eq!(places(&assigned).len(), 2);
}

#[test]
fn a_rank_of_which_a_new_coordinator_knows_nothing_is_waited_for_then_ended() {
    let mut run = taken_over();
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(joined("x-1-0", 1, &[(0, 0)]));
    run.on(ready("x-0-0", 0, 7));
    assert_eq!(places(&run.wait(14)), [], "it may hold what is needed");
    assert!(run.wait(2).contains(&Effect::KillRank { place: place("x-1-0", 0), attempt: 0 }));
    let assigned = run.exit("x-1-0", 0, 0, 137);
    assert_eq!(places(&assigned), [place("x-0-0", 0)]);
    assert_eq!(outcome(&run.log), None, "no failure of the run");
}

#[test]
fn a_member_lost_while_a_generation_is_being_found_is_not_found() {
    let mut run = taken_over();
    run.machine.settings.max_restarts = 1;
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(returned("x-0-0", 7, 0, 2));
    run.lose("x-0-0");
    run.on(joined("x-1-0", 1, &[(0, 0)]));
    let effects = run.on(returned("x-1-0", 7, 1, 2));
    assert!(!effects.iter().any(|e| matches!(e, Effect::Found { .. })), "{effects:?}");
}

#[test]
fn a_part_of_a_generation_makes_no_commit() {
    let mut run = taken_over();
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(returned("x-0-0", 7, 0, 2));
    run.wait(6);
    assert_eq!(run.on(Event::PartsWritten { generation: 7, place: place("x-0-0", 0), step: 5 }), []);
}

#[test]
fn what_the_launcher_has_from_an_earlier_coordinator_is_not_started_again_but_given_up_in_time() {
    let mut run = taken_over();
    run.on(Event::Launched { slot: 0, attempt: 2 });
    run.on(Event::Launched { slot: 1, attempt: 4 });
    run.on(Event::LaunchEnded { slot: 1, attempt: 4, code: 1 });
    assert_eq!(run.wait(6), [Effect::Launch { slot: 1, attempt: 5 }], "one lives, one has ended");
    let effects = run.wait(60);
    assert!(effects.contains(&Effect::Discard { slot: 0, attempt: 2 }), "{effects:?}");
    assert!(effects.contains(&Effect::Launch { slot: 0, attempt: 3 }));
    let effects = run.on(joined("x-0-2", 0, &[(0, 0)]));
    assert!(matches!(&effects[..], [Effect::Leave { .. }]), "too late: {effects:?}");
}

#[test]
fn a_rank_found_with_older_state_begins_anew_once_others_are_known_to_have_trained() {
    let mut run = taken_over();
    run.on(joined("x-0-0", 0, &[(0, 0)]));
    run.on(joined("x-1-0", 1, &[(0, 0)]));
    assert_eq!(run.on(ready("x-1-0", 0, 6)), []);
    run.on(returned("x-0-0", 7, 0, 2));
    run.on(Event::PartsWritten { generation: 7, place: place("x-0-0", 0), step: 5 });
    run.wait(6);
    let effects = run.on(ready("x-0-0", 0, 7));
    assert!(effects.contains(&Effect::KillRank { place: place("x-1-0", 0), attempt: 0 }), "{effects:?}");
    assert_eq!(places(&effects), [place("x-0-0", 0)]);
}

#[test]
fn a_rank_that_comes_late_from_an_earlier_generation_is_waited_for() {
    let mut run = Run::training(2, 2, 9);
    run.lose("b");
    run.ready("a", 0, 0);
    run.ready("a", 1, 0);
    run.on(joined("c", 1, &[(0, 0), (1, 0)]));
    let late = Event::RankReturned { place: place("c", 1), attempt: 0, generation: 1, rank: 3, world: 4 };
    let effects = run.on(late);
    assert!(matches!(&effects[..], [Effect::Regroup { generation: 1, .. }]), "{effects:?}");
    assert_eq!(places(&run.on(ready("c", 0, 1))), [], "the other may hold what is needed");
    assert_eq!(places(&run.ready("c", 1, 0)).len(), 4);
}
