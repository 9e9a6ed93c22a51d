//! What the machine hears and what it decides.

use std::time::Duration;

/// What the run asks for.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Nodes wanted.
    pub nodes: u32,
    /// Fewest nodes that train.
    pub min_nodes: u32,
    /// Ranks on each.
    pub ranks_per_node: u32,
    /// Failures that are survived.
    pub max_restarts: u32,
    /// Longest wait for nodes, and for ranks to form a ring.
    pub startup_timeout: Duration,
    /// Longest silence of a training rank.
    pub step_timeout: Duration,
}

/// A rank's place: its node and its number there.
pub type Place = (String, u32);

/// What happened. Fields are named as in the gRPC contract.
#[allow(missing_docs)]
#[derive(Clone, Debug)]
pub enum Event {
    /// A supervisor holds its stream; ranks of other nodes reach it at `address`. `ranks` run already, by number and attempt, where
    /// it knew another coordinator before.
    NodeJoined { node: String, slot: u32, address: String, ranks: Vec<(u32, u32)> },
    /// A supervisor's stream broke.
    NodeLost { node: String },
    /// The launcher says that what it had started for a slot has ended.
    LaunchEnded { slot: u32, attempt: u32, code: i32 },
    /// A node was told to leave.
    Preempting { node: String, deadline: Duration },
    /// A rank process ended.
    RankExited { place: Place, attempt: u32, code: i32, last_words: String },
    /// A rank that trains already, as number `rank` among `world`, has found this coordinator.
    RankReturned { place: Place, attempt: u32, generation: u64, rank: u32, world: u32 },
    /// A rank is prepared and in no generation. `broken` is why its last one ended, where nobody had asked.
    RankReady { place: Place, attempt: u32, generation: u64, broken: Option<String> },
    /// Rank 0 serves the rendezvous store.
    StoreListening { generation: u64, port: u32 },
    /// A rank has the state it needs and trains.
    Reunited { generation: u64, place: Place, step: u64, from_commit: Option<u64> },
    /// A sign of life.
    Progress { generation: u64, step: u64 },
    /// A rank's parts of a checkpoint are durable.
    PartsWritten { generation: u64, place: Place, step: u64 },
    /// A commit is durable.
    Committed { generation: u64, seq: u64, step: u64 },
    /// A commit could not be written.
    CommitFailed { reason: String },
    /// A rank has nothing left to do.
    RankFinished { generation: u64, place: Place, stopped: bool },
    /// A rank gave up and says why.
    RankFailed { place: Place, attempt: u32, message: String, code: i32 },
    /// The user wants to stop; the second time at once.
    StopRequested,
    /// The user gives the run up.
    CancelRequested,
    /// Time passed.
    Tick,
}

/// What to do. Fields are named as in the gRPC contract.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq)]
pub enum Effect {
    /// Start a node in a slot.
    Launch { slot: u32, attempt: u32 },
    /// Make sure that a node which is given up is gone.
    Discard { slot: u32, attempt: u32 },
    /// Start a rank process.
    StartRank { place: Place, attempt: u32 },
    /// End a rank process at once.
    KillRank { place: Place, attempt: u32 },
    /// Send a node home.
    Leave { node: String, reason: String, code: i32 },
    /// Tell a rank who it is, and each rank's node.
    Assign { place: Place, generation: u64, rank: u32, nodes: Vec<u32> },
    /// Tell a rank where the store is.
    Rendezvous { place: Place, host: String, port: u32 },
    /// Ask a rank to finish its step, commit and end.
    Stop { place: Place, reason: String },
    /// Ask a rank to finish its step and be ready for another generation without the ranks `leaving`.
    Pause { place: Place, generation: u64, reason: String, leaving: Vec<u32>, commit: bool },
    /// Tell a rank to break off at once.
    Regroup { place: Place, generation: u64, reason: String },
    /// All parts of a checkpoint are there: make the commit.
    WriteCommit { generation: u64, step: u64 },
    /// Tell a rank that its checkpoint is committed.
    TellCommitted { place: Place, seq: u64, step: u64 },
    /// Training begins, or goes on, in this generation.
    Started { generation: u64, world: u32, from_commit: Option<u64> },
    /// A generation that trains already was found.
    Found { generation: u64, world: u32 },
    /// A membership change is over.
    Regrouped(Change),
    /// Something the user should hear of while it lasts.
    Note { message: String },
    /// The run is over here.
    End(Outcome),
}

/// A membership change, from its cause to training again.
#[derive(Clone, Debug, PartialEq)]
pub struct Change {
    /// What made it necessary.
    pub reason: String,
    /// Whether it counts against `max_restarts`.
    pub failure: bool,
    /// Ranks before.
    pub world_before: u32,
    /// Ranks after.
    pub world: u32,
    /// From the cause to training again.
    pub took: Duration,
    /// Steps finished where training goes on.
    pub step: u64,
    /// Steps that are trained again.
    pub steps_lost: u64,
    /// Commit that was gone back to, where memory did not hold everything.
    pub from_commit: Option<u64>,
}

/// How a run ended.
#[allow(missing_docs)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All epochs are trained and exported.
    Finished,
    /// Stopped on request; it can be resumed.
    Suspended { reason: String },
    /// Given up.
    Failed { message: String, code: i32 },
    /// Ended for good on request.
    Cancelled,
}
