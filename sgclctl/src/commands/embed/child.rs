//! `sgcl-worker embed`, started and listened to.

use std::collections::BTreeMap;
use std::process::Stdio;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{ChildStdout, Command};
use tokio::task::JoinHandle;

use crate::cli::embed::EmbedArgs;
use crate::output::Out;
use crate::worker;

/// A worker that embeds.
pub(super) struct Child {
    process: tokio::process::Child,
    lines: Option<Lines<BufReader<ChildStdout>>>,
    words: Option<JoinHandle<Vec<String>>>,
}

/// What the worker says once its encoder is loaded.
#[derive(Debug, Deserialize)]
pub(super) struct Ready {
    pub(super) encoder: String,
    pub(super) settings: BTreeMap<String, Value>,
}

impl Child {
    /// Starts it over a patch set, or over slides that come on its standard input.
    pub(super) fn start(
        args: &EmbedArgs,
        data: Option<&str>,
        settings: &BTreeMap<String, Value>,
        out: Out,
    ) -> Result<Self> {
        let mut command = Command::new(worker::find()?);
        command.args(["embed", "--to", &args.to, "--weights", &args.weights, "--layout", &args.layout]);
        command.args(["--device", &args.device, "--seed", &args.seed.to_string()]);
        command.args(["--settings", &serde_json::to_string(settings)?]);
        for (option, value) in [
            ("--data", data.map(str::to_owned)),
            ("--bucket", args.bucket.clone()),
            ("--arch", args.arch.clone()),
            ("--name", args.name.clone()),
            ("--px", args.px.map(|px| px.to_string())),
            ("--batch", args.batch.map(|batch| batch.to_string())),
        ] {
            if let Some(value) = value {
                command.args([option, &value]);
            }
        }
        Self::spawn(command, data.is_none(), out)
    }

    /// Starts it by words that say all, over a patch set.
    pub(super) fn named(words: &[String], out: Out) -> Result<Self> {
        let mut command = Command::new(worker::find()?);
        command.args(words);
        Self::spawn(command, false, out)
    }

    fn spawn(mut command: Command, fed: bool, out: Out) -> Result<Self> {
        command.stdin(if fed { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut process = command.spawn().context("cannot start sgcl-worker")?;
        let lines = process.stdout.take().map(|stdout| BufReader::new(stdout).lines());
        let words = process.stderr.take().map(|stderr| tokio::spawn(worker::last_words(out, stderr)));
        Ok(Self { process, lines, words })
    }

    /// Its standard input, for a thread that may block.
    pub(super) fn stdin(&mut self) -> Result<std::fs::File> {
        let stdin = self.process.stdin.take().context("sgcl-worker takes no input")?;
        Ok(std::fs::File::from(stdin.into_owned_fd()?))
    }

    /// Waits until its encoder is loaded.
    pub(super) async fn ready(&mut self) -> Result<Option<Ready>> {
        match self.next().await? {
            None => Ok(None),
            Some(mut message) => {
                Ok(Some(serde_json::from_value(message["ready"].take()).context("sgcl-worker is of another version")?))
            }
        }
    }

    /// What it says next; `None` once it has ended well.
    ///
    /// # Errors
    /// It ended otherwise: the error is its last words.
    pub(super) async fn next(&mut self) -> Result<Option<Value>> {
        if let Some(lines) = &mut self.lines {
            if let Some(line) = lines.next_line().await? {
                let message = serde_json::from_str(&line);
                return message.with_context(|| format!("sgcl-worker printed what is not JSON: {line:?}")).map(Some);
            }
            self.lines = None;
        }
        let ended = self.process.wait().await?;
        if ended.success() {
            return Ok(None);
        }
        // By reference: this future may be dropped and asked for again.
        let words = match self.words.as_mut() {
            Some(words) => words.await.unwrap_or_default(),
            None => Vec::new(),
        };
        Err(worker::failure("sgcl-worker", ended.code(), &words).into())
    }
}
