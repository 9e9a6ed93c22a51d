//! Every metric. Manifests, dashboards and alerts may name these and no others (`tests/tests/observability.rs`), and what the programs
//! expose is this list.

use super::{Kind, Metric};

macro_rules! metrics {
    ($list:ident, $about:literal: $($id:ident = $name:literal $kind:ident $labels:expr, $help:literal;)*) => {
        $(#[doc = $help] pub const $id: Metric = Metric { name: $name, kind: Kind::$kind, labels: &$labels, help: $help };)*
        #[doc = $about]
        pub const $list: &[Metric] = &[$($id),*];
    };
}

metrics! { EVERYWHERE, "Of every program that exposes metrics.":
    PROCESS_MEMORY = "process_resident_memory_bytes" Gauge [], "Resident memory.";
    PROCESS_TIME = "process_cpu_seconds_total" Counter [], "Processor time.";
    PROCESS_FILES = "process_open_fds" Gauge [], "Open files and connections.";
}

metrics! { COORDINATOR, "Of the coordinator. Those of runs are of the replica that leads.":
    LEADER = "sgcl_coordinator_leader" Gauge [], "Whether this replica leads.";
    LEASE_EPOCH = "sgcl_coordinator_lease_epoch" Gauge [], "Term of this leader; 0 while another leads.";
    REFUSED = "sgcl_coordinator_refused_total" Counter ["reason"], "Connections and streams of workers that were refused.";
    STREAMS = "sgcl_coordinator_streams" Gauge ["kind"], "Open streams of workers: node or rank.";
    COMMIT_SECONDS = "sgcl_coordinator_commit_seconds" Histogram [], "Time to write a commit and to retire old ones.";
    COMMIT_FAILURES = "sgcl_coordinator_commit_failures_total" Counter [], "Commits that were not written.";
    RUNS = "sgcl_runs" Gauge ["phase"], "Runs by phase.";
    RUN_PHASE = "sgcl_run_phase" Gauge ["run", "phase"], "1 for the phase that the run is in.";
    RUN_NODES_WANTED = "sgcl_run_nodes_wanted" Gauge ["run"], "Nodes that the run asks for.";
    RUN_NODES = "sgcl_run_nodes" Gauge ["run"], "Nodes that have joined, or run before any has.";
    RUN_RANKS = "sgcl_run_ranks" Gauge ["run"], "Ranks of the generation.";
    RUN_GENERATION = "sgcl_run_generation" Gauge ["run"], "Number of the present membership.";
    RUN_EPOCH = "sgcl_run_epoch" Gauge ["run"], "Epoch under way, from 0.";
    RUN_EPOCHS_WANTED = "sgcl_run_epochs_wanted" Gauge ["run"], "Epochs that the run trains.";
    RUN_STEP = "sgcl_run_step" Gauge ["run"], "Steps finished; falls where steps are lost.";
    RUN_PROGRESS = "sgcl_run_progress_ratio" Gauge ["run"], "Share of the epochs that is trained, 0 to 1.";
    RUN_PACE = "sgcl_run_patches_per_second" Gauge ["run"], "Patches a second, all ranks.";
    RUN_LOSS = "sgcl_run_loss" Gauge ["run", "term"], "Loss of the newest step, by term.";
    RUN_PROBE = "sgcl_run_probe_ratio" Gauge ["run", "figure"], "What the newest online probe found, by figure, 0 to 1.";
    RUN_LR = "sgcl_run_learning_rate" Gauge ["run"], "Learning rate of the newest step.";
    RUN_RESTARTS = "sgcl_run_restarts_total" Counter ["run"], "Failures survived; preemptions do not count.";
    RUN_REGROUPS = "sgcl_run_regroups_total" Counter ["run", "failure"], "Changes of membership, by whether a failure made them necessary.";
    RUN_REGROUP_SECONDS = "sgcl_run_regroup_seconds_total" Counter ["run"], "Time from the causes of such changes to training again.";
    RUN_STEPS_LOST = "sgcl_run_steps_lost_total" Counter ["run"], "Steps that had to be trained again.";
    RUN_COMMIT = "sgcl_run_last_commit" Gauge ["run"], "Number of the newest commit.";
    RUN_COMMIT_TIME = "sgcl_run_last_commit_timestamp_seconds" Gauge ["run"], "When this coordinator saw it made, in seconds since 1970.";
    RUN_GOODPUT = "sgcl_run_goodput_ratio" Gauge ["run"], "Share of the time since training began here that was not spent on changes of membership, 0 to 1.";
    RUN_STORAGE = "sgcl_run_waiting_for_storage" Gauge ["run"], "Whether training waits for the bucket.";
}

metrics! { WORKER, "Of a node, told by its supervisor, each with the labels run and node.":
    NODE_RANKS = "sgcl_node_ranks" Gauge [], "Rank processes that run.";
    NODE_EXITS = "sgcl_node_rank_exits_total" Counter ["code"], "Rank processes that ended, by exit code (128 + signal).";
    NODE_CONNECTED = "sgcl_node_coordinator_connected" Gauge [], "Whether the line to the coordinator stands.";
    NODE_PREEMPTING = "sgcl_node_preempting" Gauge [], "Whether the node was told to leave.";
    RANK_RANK = "sgcl_rank_rank" Gauge ["local_rank"], "Rank in the present generation.";
    RANK_GENERATION = "sgcl_rank_generation" Gauge ["local_rank"], "Generation that the rank is in.";
    RANK_STEPS = "sgcl_rank_steps_total" Counter ["local_rank"], "Steps finished by this process.";
    RANK_PATCHES = "sgcl_rank_patches_total" Counter ["local_rank"], "Patches of this rank's lanes in those steps.";
    RANK_STEP_SECONDS = "sgcl_rank_step_seconds" Histogram ["local_rank"], "Time of a step, loading included.";
    RANK_LOAD_SECONDS = "sgcl_rank_load_wait_seconds_total" Counter ["local_rank"], "Time that steps waited for patches.";
    RANK_RENDEZVOUS = "sgcl_rank_rendezvous_seconds" Histogram ["local_rank"], "Time to take a place in a generation: ring, state, reducer.";
    RANK_SNAPSHOT = "sgcl_rank_snapshot_seconds" Histogram ["local_rank"], "Time that training stood still for a checkpoint to be copied.";
    RANK_UPLOAD = "sgcl_rank_upload_seconds" Histogram ["local_rank"], "Time to upload a checkpoint's parts, beside training.";
    RANK_UPLOADED = "sgcl_rank_uploaded_bytes_total" Counter ["local_rank"], "Bytes of those parts.";
    RANK_MEMORY = "sgcl_rank_resident_memory_bytes" Gauge ["local_rank"], "Resident memory of the rank process.";
}

/// All of them, with who exposes them.
pub const ALL: [(&str, &[Metric]); 3] =
    [("coordinator, worker", EVERYWHERE), ("coordinator", COORDINATOR), ("worker", WORKER)];
