//! Real ranks: a test starts its own executable again, once a rank, and waits for all of them.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use sgcl_c10d::{Interface, ProcessGroup, Store};

/// Longer than anything here takes, short enough to fail a hang.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// What a rank process finds in its environment.
pub struct Rank {
    pub rank: usize,
    pub world: usize,
    pub folder: PathBuf,
}

impl Rank {
    /// This process's role, or none in the parent.
    pub fn from_env() -> Option<(String, Self)> {
        let scenario = std::env::var("SGCL_C10D_SCENARIO").ok()?;
        let number = |name: &str| std::env::var(name).unwrap().parse().unwrap();
        let folder = PathBuf::from(std::env::var("SGCL_C10D_FOLDER").unwrap());
        tch::set_num_threads(1);
        Some((scenario, Self { rank: number("SGCL_C10D_RANK"), world: number("SGCL_C10D_WORLD"), folder }))
    }

    /// The store, which rank 0 serves; its port travels in a file.
    pub fn store(&self, timeout: Duration) -> Store {
        let file = self.folder.join("port");
        if self.rank == 0 {
            let (store, port) = Store::listen("127.0.0.1", 0, timeout).unwrap();
            let draft = self.folder.join("port.draft");
            std::fs::write(&draft, port.to_string()).unwrap();
            std::fs::rename(draft, file).unwrap();
            return store;
        }
        let since = Instant::now();
        let port = loop {
            if let Ok(text) = std::fs::read_to_string(&file) {
                break text.parse().unwrap();
            }
            assert!(since.elapsed() < PATIENCE, "rank 0 never served its store");
            std::thread::sleep(Duration::from_millis(5));
        };
        Store::connect("127.0.0.1", port, timeout).unwrap()
    }

    pub fn group(&self, store: &Store, generation: &str) -> ProcessGroup {
        form(store, generation, self.rank, self.world)
    }
}

pub fn form(store: &Store, generation: &str, rank: usize, world: usize) -> ProcessGroup {
    let store = store.prefix(generation).unwrap();
    ProcessGroup::gloo(&store, rank, world, Duration::from_secs(60), &local()).unwrap()
}

pub fn local() -> Interface {
    Interface::Address("127.0.0.1".into())
}

/// Runs `scenario` on `world` processes and returns each one's fate: exit code, or none where a signal killed it.
pub fn run(scenario: &str, world: usize, folder: &Path) -> Vec<Option<i32>> {
    let mut ranks: Vec<Child> = (0..world)
        .map(|rank| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--ignored", "--exact", "a_rank_of_the_other_tests", "--nocapture"])
                .env("SGCL_C10D_SCENARIO", scenario)
                .env("SGCL_C10D_RANK", rank.to_string())
                .env("SGCL_C10D_WORLD", world.to_string())
                .env("SGCL_C10D_FOLDER", folder)
                .stdin(Stdio::null())
                .stdout(Stdio::null()) // libtest's report of one ignored test; panics go to stderr
                .spawn()
                .unwrap()
        })
        .collect();
    let since = Instant::now();
    while since.elapsed() < PATIENCE {
        if ranks.iter_mut().all(|rank| rank.try_wait().unwrap().is_some()) {
            return ranks.iter_mut().map(|rank| rank.wait().unwrap().code()).collect();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for rank in &mut ranks {
        rank.kill().unwrap();
        rank.wait().unwrap();
    }
    panic!("{scenario}: ranks still ran after {PATIENCE:?}");
}
