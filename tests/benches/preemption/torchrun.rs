//! torchrun elastic, hit at the same steps in the same way: two agents as two nodes, a script that checkpoints as often.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::Args;
use crate::faults::{Effects, Fault, Kind, NODES};
use crate::figures::Figure;

/// Longest wait for a step, or for full size, after a kill.
const GIVE_UP: Duration = Duration::from_secs(120);
/// Longest wait for the first step, or for a scheduled one.
const GET_ON: Duration = Duration::from_secs(900);
const LOOK: Duration = Duration::from_millis(20);

/// A step's end, as rank 0 told of it.
#[derive(Clone, Copy, Debug, Deserialize)]
struct Line {
    step: u64,
    /// Seconds since 1970.
    time: f64,
    world: u32,
    /// When the process began.
    began: f64,
}

/// What torchrun showed.
pub struct Found {
    pub effects: Vec<(Fault, Effects)>,
    pub step: Figure,
    pub seconds: f64,
}

impl Found {
    pub fn json(&self) -> Value {
        json!({
            "faults": crate::table::faults_json(&self.effects), "step_seconds": self.step.json(), "seconds": self.seconds,
        })
    }
}

/// The agents and what they are told; all of it is killed when dropped.
struct Job<'a> {
    args: &'a Args,
    folder: tempfile::TempDir,
    script: PathBuf,
    port: u16,
    agents: Vec<Child>,
    started: usize,
    reader: BufReader<File>,
    lines: Vec<Line>,
}

/// Trains until the last fault is over.
pub fn measure(args: &Args) -> Found {
    let began = Instant::now();
    let mut job = Job::start(args);
    let mut effects = Vec::new();
    println!("\ntorchrun elastic: each fault (seconds)");
    for fault in args.schedule() {
        let there =
            job.wait(GET_ON, |lines| lines.last().is_some_and(|l| l.step >= fault.step && l.world == args.world()));
        assert!(there, "torchrun does not get to step {}; its agents say:\n{}", fault.step, job.said());
        std::thread::sleep(fault.after);
        job.look();
        let effect = job.hit(&fault);
        crate::table::one(&fault, &effect);
        effects.push((fault, effect));
    }
    let same = |pair: &&[Line]| pair[0].began.total_cmp(&pair[1].began).is_eq() && pair[1].world == args.world();
    let step = job.lines.windows(2).filter(same).map(|pair| pair[1].time - pair[0].time).collect();
    Found { effects, step, seconds: began.elapsed().as_secs_f64() }
}

fn now() -> f64 {
    Timestamp::now().duration_since(Timestamp::UNIX_EPOCH).as_secs_f64()
}

fn send(process: Pid, signal: Signal) {
    // One that has ended is as good as killed.
    let _ = kill(process, signal);
}

impl<'a> Job<'a> {
    fn start(args: &'a Args) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let steps = folder.path().join("steps.jsonl");
        File::create(&steps).unwrap();
        let reader = BufReader::new(File::open(&steps).unwrap());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/torchrun_elastic.py");
        let mut job = Self { args, folder, script, port, agents: Vec::new(), started: 0, reader, lines: Vec::new() };
        job.start_agents();
        job
    }

    fn start_agents(&mut self) {
        for node in 0..NODES as usize {
            let agent = self.agent(node);
            self.agents.push(agent);
        }
    }

    /// Node 0 serves the rendezvous store, and is never killed whole: torchrun has no way to go on without it.
    fn agent(&mut self, node: usize) -> Child {
        let python = std::env::var("SGCL_PYTHON").expect("SGCL_PYTHON names a Python with torch; `make setup` sets it");
        let Args { ranks, every, px, batch, .. } = self.args;
        self.started += 1;
        let said = File::create(self.folder.path().join(format!("agent-{}.log", self.started))).unwrap();
        // Whatever ends this program ends the agents too, and the script its ranks with their agent.
        Command::new("setpriv")
            .args(["--pdeathsig", "KILL", &python, "-m", "torch.distributed.run"])
            .args(["--nnodes=1:2", &format!("--nproc-per-node={ranks}")])
            .args(["--max-restarts=1000", "--rdzv-backend=c10d", "--rdzv-id=bench", "--local-addr=127.0.0.1"])
            .arg(format!("--rdzv-endpoint=127.0.0.1:{}", self.port))
            .arg(format!("--rdzv-conf=is_host={}", u8::from(node == 0)))
            .arg(&self.script)
            .arg(self.folder.path())
            .args([format!("--every={every}"), format!("--px={px}"), format!("--batch={batch}")])
            .arg(format!("--views={}", self.args.views()))
            .env("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
            .env("OMP_NUM_THREADS", "1")
            .env("GLOO_SOCKET_IFNAME", "lo")
            .env_remove("LD_LIBRARY_PATH")
            .stdin(Stdio::null())
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .process_group(0)
            .spawn()
            .unwrap()
    }

    /// Reads what was written since the last look.
    fn look(&mut self) {
        let mut text = String::new();
        // A line is written whole: it is shorter than a pipe's buffer.
        while self.reader.read_line(&mut text).unwrap() > 0 {
            self.lines.push(serde_json::from_str(&text).unwrap());
            text.clear();
        }
    }

    /// Whether it became true in time.
    fn wait(&mut self, longest: Duration, mut ready: impl FnMut(&[Line]) -> bool) -> bool {
        let began = Instant::now();
        loop {
            self.look();
            if ready(&self.lines) {
                return true;
            }
            if began.elapsed() > longest {
                return false;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Rank processes, of one agent or of all.
    fn ranks(&self, agent: Option<usize>) -> Vec<Pid> {
        let parents: Vec<u32> = match agent {
            Some(agent) => vec![self.agents[agent].id()],
            None => self.agents.iter().map(Child::id).collect(),
        };
        let script = self.script.to_str().unwrap().as_bytes();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let Ok(line) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1)?.parse().ok());
            if line.split(|b| *b == 0).any(|word| word == script) && parent.is_some_and(|pid| parents.contains(&pid)) {
                found.push(Pid::from_raw(pid));
            }
        }
        found.sort();
        found
    }

    fn signal_agent(&self, agent: usize, signal: Signal) {
        send(Pid::from_raw(i32::try_from(self.agents[agent].id()).unwrap()), signal);
    }

    /// An agent and its ranks, the ranks of the others untouched.
    fn signal_node(&self, agent: usize, signal: Signal) {
        let ranks = self.ranks(Some(agent));
        self.signal_agent(agent, signal);
        ranks.iter().for_each(|&rank| send(rank, signal));
    }

    fn replace(&mut self, agent: usize) {
        let _ = self.agents[agent].wait();
        self.agents[agent] = self.agent(agent);
    }

    /// Applies a fault and waits until all is well again, with help where torchrun needs it.
    fn hit(&mut self, fault: &Fault) -> Effects {
        let before = *self.lines.last().unwrap();
        let ranks = self.ranks(None);
        let rank = ranks[fault.draw % ranks.len()];
        let at = now();
        let mut note = String::new();
        let mut longest = GIVE_UP;
        match fault.kind {
            Kind::Notice => {
                self.signal_agent(1, Signal::SIGTERM);
                self.replace(1);
            }
            Kind::Rank => send(rank, Signal::SIGKILL),
            Kind::Node => {
                self.signal_node(1, Signal::SIGKILL);
                self.replace(1);
            }
            Kind::Away => {
                self.signal_node(1, Signal::SIGKILL);
                let _ = self.agents[1].wait();
                std::thread::sleep(self.args.away);
                self.look();
            }
            Kind::All => ranks.iter().for_each(|&rank| send(rank, Signal::SIGKILL)),
            Kind::Hang => {
                send(rank, Signal::SIGSTOP);
                longest = self.args.hang_wait;
            }
            Kind::Silent => {
                self.signal_node(1, Signal::SIGSTOP);
                longest = self.args.hang_wait;
            }
        }
        let new = |line: &Line| line.began > at;
        let while_away = (fault.kind == Kind::Away).then(|| self.lines.iter().filter(|line| new(line)).count() as u64);
        if fault.kind == Kind::Away {
            self.replace(1);
        }
        let came = self.wait(longest, |lines| lines.iter().any(new));
        if !came {
            note = format!("not within {} s", longest.as_secs());
            match fault.kind {
                Kind::Hang => send(rank, Signal::SIGCONT),
                Kind::Silent => {}
                _ => {
                    note += "; the whole job was started anew";
                    self.end();
                    self.start_agents();
                }
            }
        }
        if fault.kind == Kind::Silent {
            self.signal_node(1, Signal::SIGKILL);
            self.replace(1);
        }
        let world = self.args.world();
        let resumed = self.lines.len();
        let whole = self.wait(GIVE_UP, |lines| match fault.kind {
            // It goes on as if nothing had been, where nothing was noticed.
            Kind::Hang if !came => lines.len() > resumed,
            _ => lines.iter().any(|line| new(line) && line.world == world),
        });
        if !whole {
            note += "; not at full size in time, started anew";
            self.end();
            self.start_agents();
        }
        let last = self.lines.iter().rfind(|line| !new(line)).copied().unwrap_or(before);
        let next = self.lines.iter().find(|line| new(line)).copied();
        let full = self.lines.iter().find(|line| new(line) && line.world == world);
        let next = next.filter(|_| came);
        Effects {
            step: last.step,
            lost: next.map_or(0, |next| (last.step + 1).saturating_sub(next.step)),
            stepping: next.map(|line| line.time - at),
            full: full.filter(|_| came).map(|line| line.time - at),
            still: next.map(|line| line.time - last.time),
            while_away,
            note,
            ..Effects::default()
        }
    }

    /// Kills all of it.
    fn end(&mut self) {
        for agent in 0..self.agents.len() {
            self.signal_node(agent, Signal::SIGKILL);
        }
        self.agents.drain(..).for_each(|mut agent| drop(agent.wait()));
    }

    fn said(&self) -> String {
        (1..=self.started)
            .filter_map(|agent| std::fs::read_to_string(self.folder.path().join(format!("agent-{agent}.log"))).ok())
            .collect()
    }
}

impl Drop for Job<'_> {
    fn drop(&mut self) {
        self.end();
    }
}
