//! Headless Chromium over its debugging pipe: real viewport widths, real colour schemes, every console message.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use base64::Engine as _;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Seconds after which a browser that hangs is ended, which ends the test.
const LIMIT_S: u32 = 180;

/// A running browser with one open tab; it ends when dropped.
pub struct Browser {
    child: Child,
    orders: File,
    replies: BufReader<File>,
    session: Option<String>,
    calls: u64,
    /// Events heard since they were last taken.
    heard: Vec<Value>,
    _folder: TempDir,
}

impl Browser {
    /// Starts Chromium (`SGCL_CHROMIUM`, else `chromium`).
    pub fn start() -> Self {
        let program = std::env::var("SGCL_CHROMIUM").unwrap_or_else(|_| "chromium".into());
        let there = Command::new(&program).arg("--version").output().is_ok_and(|output| output.status.success());
        assert!(there, "{program} does not start; run `make setup`, which installs it, or let SGCL_CHROMIUM name one");
        let folder = tempfile::tempdir().unwrap();
        let (orders, replies) = (folder.path().join("orders"), folder.path().join("replies"));
        for pipe in [&orders, &replies] {
            nix::unistd::mkfifo(pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }
        // Chromium reads orders from descriptor 3 and answers on 4.
        let script = format!(
            r#"exec timeout {LIMIT_S} "$0" --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars \
               --disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage \
               --user-data-dir="$3" --remote-debugging-pipe about:blank 3<"$1" 4>"$2""#
        );
        let child = Command::new("sh")
            .args(["-c", &script])
            .arg(&program)
            .args([&orders, &replies, &folder.path().join("profile")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let orders = File::options().write(true).open(orders).unwrap();
        let replies = BufReader::new(File::open(replies).unwrap());
        let mut browser = Self { child, orders, replies, session: None, calls: 0, heard: Vec::new(), _folder: folder };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = browser.call("Target.attachToTarget", json!({ "targetId": target, "flatten": true }));
        browser.session = attached["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log"] {
            browser.call(&format!("{domain}.enable"), json!({}));
        }
        browser
    }

    /// Opens a file in a viewport of `width` pixels; returns what the console said, and exceptions.
    pub fn open(&mut self, file: &Path, width: u32, dark: bool) -> Vec<String> {
        self.heard.clear();
        let metrics = json!({ "width": width, "height": 900, "deviceScaleFactor": 1, "mobile": false });
        self.call("Emulation.setDeviceMetricsOverride", metrics);
        let scheme = if dark { "dark" } else { "light" };
        let media = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", media);
        self.call("Page.navigate", json!({ "url": format!("file://{}", file.display()) }));
        while !self.heard.iter().any(|event| event["method"] == "Page.loadEventFired") {
            let message = self.read();
            self.heard.push(message);
        }
        self.evaluate("document.fonts.ready.then(() => 1)");
        let complaint = |event: &Value| match event["method"].as_str()? {
            "Runtime.exceptionThrown" => Some(event["params"]["exceptionDetails"].to_string()),
            "Runtime.consoleAPICalled" => Some(event["params"]["args"].to_string()),
            "Log.entryAdded" => Some(event["params"]["entry"].to_string()),
            _ => None,
        };
        self.heard.iter().filter_map(complaint).collect()
    }

    /// The value of a JavaScript expression.
    pub fn evaluate(&mut self, expression: &str) -> Value {
        let params = json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let reply = self.call("Runtime.evaluate", params);
        assert!(reply.get("exceptionDetails").is_none(), "{expression}: {reply}");
        reply["result"]["value"].clone()
    }

    /// Writes a PNG of the whole page.
    pub fn screenshot(&mut self, file: &Path) {
        let size = self.evaluate("[innerWidth, document.documentElement.scrollHeight]");
        let clip = json!({ "x": 0, "y": 0, "width": size[0], "height": size[1], "scale": 1 });
        let shot = self.call("Page.captureScreenshot", json!({ "clip": clip, "captureBeyondViewport": true }));
        let png = base64::engine::general_purpose::STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        std::fs::write(file, png).unwrap();
    }

    fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let id = self.calls;
        let mut order = json!({ "id": id, "method": method, "params": params });
        if let Some(session) = &self.session {
            order["sessionId"] = json!(session);
        }
        self.orders.write_all(format!("{order}\0").as_bytes()).unwrap();
        loop {
            let mut message = self.read();
            if message["id"] == id {
                assert!(message.get("error").is_none(), "{method}: {message}");
                return message["result"].take();
            }
            self.heard.push(message);
        }
    }

    fn read(&mut self) -> Value {
        let mut bytes = Vec::new();
        self.replies.read_until(0, &mut bytes).unwrap();
        assert_eq!(bytes.pop(), Some(0), "chromium ended, or took longer than {LIMIT_S} s");
        serde_json::from_slice(&bytes).unwrap()
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // `timeout` hands the signal on to the browser.
        let pid = nix::unistd::Pid::from_raw(self.child.id().cast_signed());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.child.wait();
    }
}
