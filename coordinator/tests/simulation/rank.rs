//! A rank process: its session with the coordinator, and its way through generations.

use std::collections::VecDeque;
use std::rc::Rc;

use crate::line::{Down, End, LineId, Parts, Say, Up};
use crate::ring::Operation;
use crate::state::{ALL, Held, Position, deal};
use crate::world::{MS, NodeId, RankId, Time, What, World};

/// What a rank waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Doing {
    /// To be welcomed.
    Opening,
    Preparing,
    /// To be assigned.
    Idle,
    /// To hear where the store is.
    Meeting,
    /// For the others to come to the store.
    AtStore,
    /// To have computed what the next collective takes.
    Computing(Operation),
    /// For the others.
    Together(Operation),
    /// Rank 0: which commit to go back to.
    Asking,
    /// The bucket.
    Restoring(Option<u64>),
    /// The order to pause, which another rank has seen.
    Pausing,
    /// A checkpoint's commit.
    Committing(Why),
    Exporting,
    /// The last message to leave.
    Ending,
}

/// What a checkpoint is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    Periodic,
    EpochEnd,
    Stop,
    Pause,
    Final,
}

struct Writing {
    number: u64,
    generation: u64,
    position: Rc<Position>,
    shards: u32,
    done: bool,
    uploaded: bool,
}

/// The order to pause.
#[derive(Clone, Debug)]
struct Pause {
    leaving: Rc<Vec<u32>>,
    commit: bool,
}

pub(crate) struct Rank {
    pub(crate) node: NodeId,
    pub(crate) place: (String, u32),
    pub(crate) attempt: u32,
    pub(crate) alive: bool,
    pub(crate) hung: Option<Time>,
    /// When it was last let go on.
    pub(crate) woke: Option<Time>,
    pub(crate) backlog: Vec<What>,
    pub(crate) doing: Doing,
    /// Counts what it does: timers of something earlier are outdated.
    pub(crate) token: u64,
    // The session.
    pub(crate) line: Option<LineId>,
    pub(crate) generation: u64,
    member: Option<(u64, u32, u32)>,
    broken: Option<u64>,
    stop: bool,
    pause: Option<Pause>,
    told_committed: Option<u64>,
    /// Said while no line stood, and what a new one is told again.
    outbox: Vec<(u64, Say)>,
    kept: Vec<(u64, Say)>,
    inbox: VecDeque<Down>,
    // The generation.
    pub(crate) number: u32,
    pub(crate) nodes: Rc<Vec<u32>>,
    pub(crate) ring: Option<usize>,
    /// Whether the ring is one that orders can break.
    pub(crate) in_ring: bool,
    writing: Option<Writing>,
    writings: u64,
    pub(crate) held: Held,
    /// The commit that was gone back to in this generation.
    from_commit: Option<u64>,
}

impl Rank {
    pub(crate) fn new(node: NodeId, place: (String, u32), attempt: u32) -> Self {
        Self {
            node,
            place,
            attempt,
            alive: true,
            hung: None,
            woke: None,
            backlog: Vec::new(),
            doing: Doing::Opening,
            token: 0,
            line: None,
            generation: 0,
            member: None,
            broken: None,
            stop: false,
            pause: None,
            told_committed: None,
            outbox: Vec::new(),
            kept: Vec::new(),
            inbox: VecDeque::new(),
            number: 0,
            nodes: Rc::default(),
            ring: None,
            in_ring: false,
            writing: None,
            writings: 0,
            held: Held::nothing(),
            from_commit: None,
        }
    }

    pub(crate) fn world(&self) -> u32 {
        self.nodes.len() as u32
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken == Some(self.generation)
    }

    pub(crate) fn asked(&self) -> (bool, bool) {
        (self.stop, self.pause.is_some())
    }

    fn keep(&mut self, said: &(u64, Say)) {
        self.kept.retain(|(generation, _)| *generation == said.0);
        match said.1 {
            Say::Ready { .. } => self.kept = vec![said.clone()],
            Say::Progress { .. } => {}
            _ => self.kept.push(said.clone()),
        }
    }
}

// The session.
impl World {
    pub(crate) fn rank_connected(&mut self, id: RankId, line: LineId) {
        self.ranks[id].line = Some(line);
        let member = self.ranks[id].member;
        self.send_up(line, Up::RankHello { member });
        for (generation, what) in self.ranks[id].kept.clone() {
            self.send_up(line, Up::Said { generation, what });
        }
        for said in std::mem::take(&mut self.ranks[id].outbox) {
            self.ranks[id].keep(&said);
            self.send_up(line, Up::Said { generation: said.0, what: said.1 });
        }
    }

    pub(crate) fn rank_cut_off(&mut self, id: RankId, line: LineId) {
        if self.ranks[id].line == Some(line) && self.ranks[id].alive {
            self.ranks[id].line = None;
            self.after(250 * MS, What::Connect(End::Rank(id)));
        }
    }

    fn say(&mut self, id: RankId, what: Say) {
        let said = (self.ranks[id].generation, what);
        match self.ranks[id].line {
            Some(line) => {
                self.ranks[id].keep(&said);
                self.send_up(line, Up::Said { generation: said.0, what: said.1 });
            }
            None => self.ranks[id].outbox.push(said),
        }
    }

    pub(crate) fn rank_ordered(&mut self, id: RankId, line: LineId, order: Down) {
        let rank = &mut self.ranks[id];
        if !rank.alive || rank.line != Some(line) {
            return;
        }
        match order {
            Down::Stop => rank.stop = true,
            Down::Pause { generation, leaving, commit } => {
                if generation == rank.generation {
                    rank.pause = Some(Pause { leaving, commit });
                    if rank.doing == Doing::Pausing {
                        self.make_room(id);
                    }
                }
            }
            Down::Regroup { generation } => {
                rank.broken = Some(generation);
                if rank.is_broken() {
                    self.broken_off(id);
                }
            }
            Down::Committed { step } => {
                rank.told_committed = Some(step);
                rank.kept.retain(|(_, said)| !matches!(said, Say::Parts(parts) if parts.step <= step));
                if let Doing::Committing(why) = rank.doing {
                    self.await_commit(id, why);
                }
            }
            order => {
                rank.inbox.push_back(order);
                self.take_orders(id);
            }
        }
    }

    /// Orders that are waited for.
    fn take_orders(&mut self, id: RankId) {
        loop {
            let rank = &mut self.ranks[id];
            if !matches!(rank.doing, Doing::Opening | Doing::Idle | Doing::Meeting | Doing::Asking) {
                return;
            }
            let Some(order) = rank.inbox.pop_front() else { return };
            match (rank.doing, order) {
                (Doing::Opening, Down::Welcome) => {
                    let wait = self.dice.between(50, 1500) * MS;
                    self.go(id, Doing::Preparing, wait);
                }
                (Doing::Idle, Down::Assignment { generation, rank: number, nodes }) => {
                    self.assigned(id, generation, number, nodes);
                }
                (Doing::Meeting, Down::Rendezvous { host, port }) => self.meet(id, &host, port as usize),
                (Doing::Asking, Down::Newest(seq)) => self.arrive(id, Operation::Begin, seq),
                _ => {}
            }
        }
    }

    fn assigned(&mut self, id: RankId, generation: u64, number: u32, nodes: Rc<Vec<u32>>) {
        let rank = &mut self.ranks[id];
        if generation <= rank.generation {
            // Told again on a new line, though it was heard on the old one.
            return;
        }
        rank.generation = generation;
        rank.member = Some((generation, number, nodes.len() as u32));
        rank.pause = None;
        rank.told_committed = None;
        (rank.number, rank.nodes) = (number, nodes);
        rank.from_commit = None;
        self.go_wait(id, Doing::Meeting);
        if number == 0 {
            let ring = self.listen(id);
            self.say(id, Say::Store { port: ring as u32 });
        }
        if self.ranks[id].is_broken() {
            self.break_generation(id);
        } else {
            self.take_orders(id);
        }
    }
}

// The way.
impl World {
    pub(crate) fn go(&mut self, id: RankId, doing: Doing, wait: Time) {
        let rank = &mut self.ranks[id];
        rank.doing = doing;
        rank.token += 1;
        let token = rank.token;
        self.after(wait, What::Timer { rank: id, token });
    }

    pub(crate) fn go_wait(&mut self, id: RankId, doing: Doing) {
        self.ranks[id].doing = doing;
        self.ranks[id].token += 1;
    }

    /// What a rank had to do alone is done.
    pub(crate) fn rank_goes_on(&mut self, id: RankId) {
        match self.ranks[id].doing {
            Doing::Preparing => self.ready(id, false),
            Doing::Computing(operation) => self.arrive(id, operation, None),
            Doing::Together(operation) => self.together(id, operation),
            Doing::Restoring(seq) => self.restored(id, seq),
            Doing::Exporting => self.arrive(id, Operation::Last, None),
            Doing::Ending => self.rank_ended(id, 0),
            _ => {}
        }
    }

    fn ready(&mut self, id: RankId, broken: bool) {
        self.ranks[id].member = None;
        self.ranks[id].in_ring = false;
        self.go_wait(id, Doing::Idle);
        self.say(id, Say::Ready { broken });
        self.take_orders(id);
    }

    /// The coordinator breaks the generation off: whoever waits gets an error.
    fn broken_off(&mut self, id: RankId) {
        match self.ranks[id].doing {
            Doing::Meeting | Doing::AtStore | Doing::Asking | Doing::Pausing | Doing::Committing(_) => {
                self.break_generation(id);
            }
            Doing::Together(_) | Doing::Computing(_) if self.ranks[id].in_ring => {
                // Aborted: peers notice as well.
                let ring = self.ranks[id].ring;
                if let Some(ring) = ring {
                    self.break_ring(ring, false);
                }
            }
            _ => {}
        }
    }

    /// This generation comes to nothing for this rank; what it holds it keeps.
    pub(crate) fn break_generation(&mut self, id: RankId) {
        if let Some(ring) = self.ranks[id].ring.take() {
            self.break_ring(ring, false);
        }
        self.ready(id, true);
    }

    pub(crate) fn ring_broke(&mut self, id: RankId) {
        self.break_generation(id);
    }

    /// The others are here.
    pub(crate) fn ring_stands(&mut self, id: RankId) {
        if self.ranks[id].is_broken() {
            self.break_generation(id);
            return;
        }
        self.ranks[id].in_ring = true;
        let wait = self.dice.between(1, 20) * MS;
        self.go(id, Doing::Computing(Operation::Headers), wait);
    }

    /// A collective is through for this rank.
    fn together(&mut self, id: RankId, operation: Operation) {
        let Some(ring) = self.ranks[id].ring else { return };
        let number = self.ranks[id].number;
        match operation {
            Operation::Headers => {
                let decision = &self.rings[ring].decision;
                self.ranks[id].held.standing &= decision.current[number as usize];
                if !self.rings[ring].decision.begin {
                    self.go(id, Doing::Computing(Operation::Share), 2 * MS);
                } else if number == 0 {
                    self.go_wait(id, Doing::Asking);
                    self.say(id, Say::AskCommit);
                    self.take_orders(id);
                } else {
                    self.arrive(id, Operation::Begin, None);
                }
            }
            Operation::Share => {
                let front = Rc::clone(&self.rings[ring].decision.front);
                let held = &mut self.ranks[id].held;
                held.position = front;
                if !held.standing {
                    held.labelled = None;
                }
                let wait = self.dice.between(5, 300) * MS;
                self.go(id, Doing::Computing(Operation::Move), wait);
            }
            Operation::Move | Operation::HandOver => {
                let plan = self.rings[ring].plan[number as usize];
                let held = &mut self.ranks[id].held;
                let old = std::mem::replace(&mut held.shards, plan);
                if held.before_move.is_none() && held.standing {
                    held.before_move = Some(old);
                }
                held.standing = true;
                let next = if operation == Operation::Move { Operation::Moved } else { Operation::HandedOver };
                self.arrive(id, next, None);
            }
            Operation::Moved => {
                let labels = self.rings[ring].decision.labels;
                let held = &mut self.ranks[id].held;
                held.before_move = None;
                held.labelled = labels.then_some(held.position.epoch);
                // Newcomers do not know of it: all decide alike whether a checkpoint is due.
                held.committed = None;
                self.reunited(id);
            }
            Operation::HandedOver => {
                self.ranks[id].held.before_move = None;
                self.paused(id);
            }
            Operation::Begin => {
                let seq = self.rings[ring].seq;
                let rank = &mut self.ranks[id];
                rank.held.standing = false;
                rank.held.before_move = None;
                rank.held.labelled = None;
                let nodes: Vec<Option<u32>> = rank.nodes.iter().copied().map(Some).collect();
                let nothing = vec![0; nodes.len()];
                rank.held.shards = deal(&nothing, &nodes, self.scenario.replicas)[number as usize];
                let wait = self.storage() + self.dice.between(10, 500) * MS;
                self.go(id, Doing::Restoring(seq), wait);
            }
            Operation::Cluster => {
                self.ranks[id].held.labelled = Some(self.ranks[id].held.position.epoch);
                self.next_step(id);
            }
            Operation::Step => {
                let (stop, pause) = self.rings[ring].asked;
                self.ranks[id].held.position = Rc::clone(&self.rings[ring].position);
                self.tell_progress(id);
                let position = &self.ranks[id].held.position;
                let over = position.is_over(self.scenario.patches);
                let due = position.step.is_multiple_of(self.scenario.every);
                if pause && (!stop || over) {
                    self.pausing(id);
                } else if stop && !over {
                    self.await_commit(id, Why::Stop);
                } else if !over && due {
                    self.await_commit(id, Why::Periodic);
                } else if over && position.epoch + 1 < self.scenario.epochs {
                    self.await_commit(id, Why::EpochEnd);
                } else {
                    self.turn(id);
                }
            }
            Operation::Last => {
                self.ranks[id].ring = None;
                self.finished_rank(id, false);
            }
        }
    }

    fn finished_rank(&mut self, id: RankId, stopped: bool) {
        self.say(id, Say::Finished { stopped });
        // The line is given a moment for the last message.
        let wait = if self.ranks[id].line.is_some() { self.dice.between(20, 500) * MS } else { 500 * MS };
        self.go(id, Doing::Ending, wait);
    }

    fn tell_progress(&mut self, id: RankId) {
        let step = self.ranks[id].held.position.step;
        self.say(id, Say::Progress { step });
    }

    fn restored(&mut self, id: RankId, seq: Option<u64>) {
        let commit = seq.and_then(|seq| self.bucket.commits.iter().find(|commit| commit.seq == seq).cloned());
        if seq.is_some() && commit.is_none() {
            self.violate(format!("ranks are told of commit {seq:?}, which is not there"));
            return;
        }
        let patches = self.scenario.patches;
        let held = &mut self.ranks[id].held;
        held.standing = true;
        match commit {
            Some(commit) => {
                held.position = Rc::clone(&commit.position);
                held.labelled = (!held.position.is_over(patches)).then_some(held.position.epoch);
                held.committed = Some((commit.position.step, commit.done));
            }
            None => {
                held.position = Rc::default();
                held.labelled = None;
            }
        }
        self.ranks[id].from_commit = seq;
        self.reunited(id);
    }

    fn reunited(&mut self, id: RankId) {
        let (step, from_commit) = (self.ranks[id].held.position.step, self.ranks[id].from_commit);
        self.say(id, Say::Reunited { step, from_commit });
        self.ranks[id].writing = None;
        self.turn(id);
    }

    /// The next epoch, its clusters, or the run's end.
    fn turn(&mut self, id: RankId) {
        let patches = self.scenario.patches;
        let epochs = self.scenario.epochs;
        let held = &mut self.ranks[id].held;
        if held.position.is_over(patches) {
            if held.position.epoch + 1 >= epochs {
                self.await_commit(id, Why::Final);
                return;
            }
            held.position = held.position.next_epoch();
        }
        if held.labelled == Some(held.position.epoch) {
            self.next_step(id);
        } else {
            let wait = self.dice.between(50, 1500) * MS;
            self.tell_progress(id);
            self.go(id, Doing::Computing(Operation::Cluster), wait);
        }
    }

    fn next_step(&mut self, id: RankId) {
        if self.ranks[id].is_broken() {
            self.break_generation(id);
            return;
        }
        let step = self.scenario.step;
        let wait = step + self.dice.between(0, step / 10);
        self.go(id, Doing::Computing(Operation::Step), wait);
    }

    fn pausing(&mut self, id: RankId) {
        self.go_wait(id, Doing::Pausing);
        if self.ranks[id].is_broken() {
            self.break_generation(id);
        } else if self.ranks[id].pause.is_some() {
            self.make_room(id);
        }
    }

    fn make_room(&mut self, id: RankId) {
        let Some(pause) = self.ranks[id].pause.clone() else { return };
        if pause.commit { self.await_commit(id, Why::Pause) } else { self.hand_over(id) }
    }

    fn hand_over(&mut self, id: RankId) {
        let rank = &self.ranks[id];
        let leaving = rank.pause.as_ref().map_or(0, |pause| pause.leaving.len() as u32);
        let sole = leaving > 0 && leaving < rank.world() && self.only_leaving(id);
        if sole { self.arrive(id, Operation::HandOver, None) } else { self.paused(id) }
    }

    /// Whether shards are held by ranks that leave alone.
    fn only_leaving(&self, id: RankId) -> bool {
        let rank = &self.ranks[id];
        let (Some(pause), Some(ring)) = (&rank.pause, rank.ring) else { return false };
        let stay = |number: &u32| !pause.leaving.contains(number);
        let kept = self.rings[ring].here.iter().filter(|(number, _)| stay(number));
        kept.fold(0, |all, (_, &rank)| all | self.ranks[rank].held.sources()) != ALL
    }

    pub(crate) fn leaving(&self, id: RankId) -> Rc<Vec<u32>> {
        self.ranks[id].pause.as_ref().map(|pause| Rc::clone(&pause.leaving)).unwrap_or_default()
    }

    fn paused(&mut self, id: RankId) {
        // Whoever is behind has all it needs of the ring already.
        self.ranks[id].ring = None;
        self.ready(id, false);
    }

    /// Waits for the checkpoint under way, then does what it was for.
    fn await_commit(&mut self, id: RankId, why: Why) {
        self.go_wait(id, Doing::Committing(why));
        let rank = &mut self.ranks[id];
        if let Some(writing) = &rank.writing {
            if writing.uploaded && rank.told_committed == Some(writing.position.step) {
                rank.held.committed = Some((writing.position.step, writing.done));
                rank.writing = None;
            } else {
                if rank.is_broken() {
                    self.break_generation(id);
                }
                return;
            }
        }
        let step = rank.held.position.step;
        let known = rank.held.committed.filter(|(of, _)| *of == step);
        match why {
            Why::Periodic | Why::EpochEnd => {
                self.checkpoint(id, false);
                if why == Why::Periodic { self.next_step(id) } else { self.turn(id) }
            }
            Why::Stop | Why::Pause if known.is_none() => self.checkpoint(id, false),
            Why::Final if known.is_none_or(|(_, done)| !done) => self.checkpoint(id, true),
            Why::Stop => {
                self.ranks[id].ring = None;
                self.finished_rank(id, true);
            }
            Why::Pause => self.hand_over(id),
            Why::Final if self.ranks[id].number == 0 => {
                let wait = self.storage() + self.dice.between(10, 800) * MS;
                self.go(id, Doing::Exporting, wait);
            }
            Why::Final => self.arrive(id, Operation::Last, None),
        }
    }

    fn checkpoint(&mut self, id: RankId, done: bool) {
        self.tell_progress(id);
        let wait = self.storage() + self.dice.between(5, 400) * MS;
        let rank = &mut self.ranks[id];
        rank.writings += 1;
        let number = rank.writings;
        let (generation, position, shards) = (rank.generation, Rc::clone(&rank.held.position), rank.held.shards);
        rank.writing = Some(Writing { number, generation, position, shards, done, uploaded: false });
        self.after(wait, What::Uploaded { rank: id, upload: number });
    }

    pub(crate) fn uploaded(&mut self, id: RankId, upload: u64) {
        let rank = &mut self.ranks[id];
        let Some(writing) = rank.writing.as_mut().filter(|writing| writing.number == upload && rank.alive) else {
            return;
        };
        writing.uploaded = true;
        let Writing { generation, done, shards, .. } = *writing;
        let step = writing.position.step;
        let position = (rank.number == 0).then(|| Rc::clone(&writing.position));
        let parts = Say::Parts(Parts { step, position, done, shards });
        // Whichever generation it is of.
        let now = std::mem::replace(&mut self.ranks[id].generation, generation);
        self.say(id, parts);
        self.ranks[id].generation = now;
        if let Doing::Committing(why) = self.ranks[id].doing {
            self.await_commit(id, why);
        }
    }

    /// kill -9.
    pub(crate) fn kill_rank(&mut self, id: RankId, code: i32) {
        self.rank_ended(id, code);
    }

    pub(crate) fn rank_ended(&mut self, id: RankId, code: i32) {
        if !self.ranks[id].alive {
            return;
        }
        let gone = self.nodes[self.ranks[id].node].gone;
        if code == 137 {
            self.checks.last_death = Some(self.now);
        }
        let rank = &mut self.ranks[id];
        rank.alive = false;
        rank.token += 1;
        rank.backlog.clear();
        let (line, ring) = (rank.line.take(), rank.ring.take());
        if let Some(line) = line {
            self.close_client(line);
        }
        if let Some(ring) = ring {
            // Without power it says nothing: its peers wait.
            if !gone {
                self.break_ring(ring, true);
            }
        }
        let wait = self.dice.between(1, 20) * MS;
        if self.nodes[self.ranks[id].node].alive {
            self.after(wait, What::RankReaped { rank: id, code });
        }
    }
}
