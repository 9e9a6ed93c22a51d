"""The cluster that scenarios run on: what is built for it once, how it is started, and how it is looked at."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = Path(os.environ.get("SGCL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sgcl") / "cluster"
STATE = CACHE / "state"
SERVER = CACHE / "bin/testcluster"
BIN = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
CLUSTER = HERE / "cluster.sh"
ENV = {**os.environ, "STATE": str(STATE), "SERVER": str(SERVER)}
# A cluster of the user's own, by its name in the kubeconfig; it pulls, or has, the images that `make images` makes.
CONTEXT = os.environ.get("SGCL_TEST_CONTEXT")
KUBECTL = ["kubectl"] if CONTEXT else [CLUSTER, "kubectl"]
TOOLS = ["go", "containerd", "runc", "iptables", "ip", "buildah", "debootstrap", "nsenter", "gcc", "openssl", "strip"]
VERSITYGW = "github.com/versity/versitygw/cmd/versitygw@v1.8.0"
NAMESPACE = "sgcl"
BUCKET = "s3://sgcl/lab"
BEGAN = time.monotonic()


def say(text):
    print(f"[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def run(command, check=True, quiet=True, **options):
    command = list(map(str, command))
    done = subprocess.run(command, stdin=subprocess.DEVNULL, text=True, env=ENV,
                          capture_output=quiet, **options)
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(command)}\n{(done.stdout or '')[-3000:]}{(done.stderr or '')[-3000:]}")
    return done


class Failed(Exception):
    pass


def expect(holds, text):
    if not holds:
        raise Failed(text)


def seconds(stamp):
    """A time as Kubernetes and the bucket write it, since 1970."""
    return datetime.fromisoformat(stamp.replace("Z", "+00:00")).timestamp()


def wait_for(what, look, seconds=120, every=0.25):
    """Looks until it is there; the limit is only for what never comes."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = look()
        if found:
            return found
        time.sleep(every)
    raise Failed(f"after {seconds} s: {what}")


# What is made once --------------------------------------------------------------------------------------------------


def why_not(programs=True):
    """Why this cannot run here, or None; `programs` says that ours are needed already."""
    ours = unbuilt() if programs else []
    if CONTEXT:
        missing = [tool for tool in ("kubectl", "python3") if not shutil.which(tool)] + ours
        return f"these are missing: {' '.join(missing)}" if missing else None
    if sys.platform != "linux" or os.geteuid() != 0:
        return "it needs root on Linux"
    missing = [tool for tool in TOOLS if not shutil.which(tool)]
    if missing:
        return f"these are not installed: {' '.join(missing)}"
    if not Path("/usr/lib/cni/bridge").exists():
        return "Debian's containernetworking-plugins is not installed"
    if ours:
        return f"these are missing: {' '.join(ours)}"
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode != 0:
        return "this machine lets nobody make namespaces"
    version_1 = Path("/sys/fs/cgroup/memory")
    if not os.access(version_1 if version_1.exists() else version_1.parent, os.W_OK):
        return "cgroups are read-only here, and nodes make their own"
    return None


def unbuilt():
    return [f"{BIN / name} (make build)" for name in ("sgclctl", "sgcl-worker", "sgcl-coordinator") if not (BIN / name).exists()]


def prepare():
    (CACHE / "bin").mkdir(parents=True, exist_ok=True)
    if not CONTEXT:
        prepare_servers()
    python = CACHE / "python"
    if not (python / "complete").exists():
        say("fetching boto3")
        shutil.rmtree(python, ignore_errors=True)
        run([sys.executable, "-m", "venv", python])
        run([python / "bin/python", "-m", "pip", "--quiet", "install", "boto3==1.40.0"])
        (python / "complete").touch()


def prepare_servers():
    stamp = CACHE / "bin/testcluster.source"
    source = "".join((HERE / name).read_text() for name in ("main.go", "go.mod"))
    if not SERVER.exists() or not stamp.exists() or stamp.read_text() != source:
        say("building Kubernetes' servers (five minutes, once)")
        run([CLUSTER, "build"])
        stamp.write_text(source)
    go_program("versitygw", VERSITYGW)
    base = CACHE / "base"
    if not (base / "complete").exists():
        say("fetching a Debian base")
        shutil.rmtree(base, ignore_errors=True)
        run(["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", base])
        (base / "complete").touch()
    small_base()


def go_program(name, package):
    """A program of a published Go module, built once."""
    program = CACHE / "bin" / name
    if not program.exists():
        say(f"building {name} (once)")
        subprocess.run(["go", "install", "-trimpath", "-ldflags=-s -w", package], check=True,
                       env={**ENV, "GOBIN": str(program.parent), "CGO_ENABLED": "0"})
    return program


SMALL = """etc/passwd etc/group etc/nsswitch.conf etc/ssl/certs/ca-certificates.crt usr/lib64/ld-linux-x86-64.so.2
  usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2""".split()
LIBRARIES = "c m util gcc_s stdc++ pthread dl rt resolv nss_dns nss_files z".split()


def small_base():
    """An image with what distroless/cc has: glibc, libstdc++, certificates."""
    name = "localhost/sgcl-small:1"
    if run(["buildah", "inspect", "--type", "image", name], check=False).returncode == 0:
        return name
    folder = CACHE / "small"
    shutil.rmtree(folder, ignore_errors=True)
    files = list(SMALL)
    for library in LIBRARIES:
        files += [str(path.relative_to(CACHE / "base"))
                  for path in (CACHE / "base/usr/lib/x86_64-linux-gnu").glob(f"lib{library}.so.*")]
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CACHE / "base" / file, folder / file, follow_symlinks=not (CACHE / "base" / file).is_symlink())
    for link, to in (("lib", "usr/lib"), ("lib64", "usr/lib64")):
        (folder / link).symlink_to(to)
    (folder / "tmp").mkdir(mode=0o1777)
    container = run(["buildah", "from", "scratch"]).stdout.strip()
    run(["buildah", "copy", container, folder, "/"])
    run(["buildah", "commit", "--rm", container, name])
    return name


def images():
    """Archives of the images that the cluster needs, built from deploy/Dockerfile where anything is newer."""
    archives = CACHE / "images"
    archives.mkdir(exist_ok=True)
    small = small_base()
    made = []
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    for target, program in (("coordinator", "sgcl-coordinator"), ("worker-cpu", "sgcl-worker")):
        archive = archives / f"{target}.tar"
        newest = max((BIN / program).stat().st_mtime, (ROOT / "deploy/Dockerfile").stat().st_mtime,
                     (ROOT / "scripts/images").stat().st_mtime)
        if not archive.exists() or archive.stat().st_mtime < newest:
            say(f"building the image {target}")
            env = {**ENV, "IMAGES_BUILDER": "buildah", "IMAGES_CONTEXT": str(CACHE / "context"),
                   "IMAGES_ARGS": f"--network host --build-arg SMALL={small} --build-arg DEBIAN={small}", "SGCL_BIN": str(BIN)}
            done = subprocess.run([ROOT / "scripts/images", target], env=env, text=True, capture_output=True)
            expect(done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:])
            archive.unlink(missing_ok=True)
            name = f"ghcr.io/sgcl/sgcl-{target}:{version}"
            run(["buildah", "push", name, f"docker-archive:{archive}:{name}"])
        say(f"image {target}: {archive.stat().st_size / 1e6:.0f} MB")
        made.append(archive)
    return [*made, image_of(CACHE / "bin/versitygw", "/usr/local/bin/versitygw", "ghcr.io/versity/versitygw:v1.8.0")]


def image_of(program, at, name):
    """The archive of an image that has one program of somebody else's, built once."""
    archive = CACHE / "images" / f"{program.name}.tar"
    if not archive.exists():
        container = run(["buildah", "from", small_base()]).stdout.strip()
        run(["buildah", "copy", container, program, at])
        run(["buildah", "config", "--entrypoint", json.dumps([at]), "--cmd", "", "--user", "65532:65532", container])
        run(["buildah", "commit", "--rm", container, name])
        run(["buildah", "push", name, f"docker-archive:{archive}:{name}"])
    return archive


# The cluster --------------------------------------------------------------------------------------------------------


class Cluster:
    process = None

    def start(self):
        (STATE / "ready").unlink(missing_ok=True)
        STATE.mkdir(parents=True, exist_ok=True)
        self.log = (STATE / "up.log").open("w")
        # It ends with this process, however that ends.
        self.process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", CLUSTER, "up", "3"], stdin=subprocess.DEVNULL,
                                        stdout=self.log, stderr=self.log, env=ENV)
        wait_for("three nodes are ready; see " + self.log.name, lambda: (STATE / "ready").exists() or self.dead(), 120)

        self.try_out()

    def try_out(self):
        """Starts a pod that only waits: where it does not run, none will, whatever is in it."""
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "waits", "namespace": "default"},
               "spec": {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 0,
                        "containers": [{"name": "c", "image": "localhost/pause:1", "imagePullPolicy": "Never"}]}}
        file = STATE / "waits.json"
        file.write_text(json.dumps(pod))
        # The namespace's account may still be on its way.
        wait_for("a pod can be made", lambda: run([*KUBECTL, "create", "-f", file], check=False).returncode == 0, 30)
        look = ("get", "pod", "waits", "-n", "default", "-o", "jsonpath={.status.phase}")
        wait_for("a pod that only waits runs", lambda: kubectl(*look) == "Running", 60)
        kubectl("delete", "-n", "default", "pod", "waits")

    def dead(self):
        expect(self.process.poll() is None, "the cluster ended:\n" + (STATE / "up.log").read_text()[-2000:])

    def stop(self):
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Context:
    """The user's own cluster. What is installed there is removed again, so it must not be there before."""

    process = None

    def start(self):
        STATE.mkdir(parents=True, exist_ok=True)
        kubeconfig = STATE / "context.kubeconfig"
        kubeconfig.touch(mode=0o600)
        kubeconfig.write_text(run(["kubectl", "config", "view", "--context", CONTEXT, "--minify", "--flatten", "--raw"]).stdout)
        ENV["KUBECONFIG"] = str(kubeconfig)
        there = kubectl("get", "namespace", NAMESPACE, "-o", "name", check=False)
        expect(not there, f"{CONTEXT} has a namespace {NAMESPACE} already: this test would remove what is in it")

    def forward(self):
        """The S3 server, reachable from here."""
        self.process = subprocess.Popen(["kubectl", "-n", NAMESPACE, "port-forward", "service/sgcl-s3", "7070:7070"],
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=ENV)
        time.sleep(2)
        expect(self.process.poll() is None, "the S3 server cannot be reached: port 7070 must be free")
        return "127.0.0.1"

    def stop(self):
        if self.process:
            self.process.kill()
        (STATE / "context.kubeconfig").unlink(missing_ok=True)


def inside(command, check=True, env=None):
    pairs = [f"{name}={value}" for name, value in (env or {}).items()]
    return run([*([] if CONTEXT else [CLUSTER, "exec"]), "env", *pairs, *command], check=check)


def kubectl(*words, check=True):
    return run([*KUBECTL, *words], check=check).stdout


def objects(kind, *words):
    return json.loads(kubectl("-n", NAMESPACE, "get", kind, "-o", "json", *words))["items"]


def sgclctl(*words, check=True):
    return inside([BIN / "sgclctl", *words], check=check, env=S3)


S3 = {}


def status(run_name):
    found = json.loads(kubectl("-n", NAMESPACE, "get", "sgclrun", run_name, "-o", "json"))
    return found.get("status", {})


def phase_is(run_name, *phases):
    def look():
        now = status(run_name)
        if now.get("phase") == "Failed" and "Failed" not in phases:
            raise Failed(f"{run_name} failed: {now.get('message')}\n{logs(run_name)}")
        return now if now.get("phase") in phases else None
    return look


def logs(run_name):
    text = kubectl("-n", NAMESPACE, "logs", "-l", f"sgcl.dev/run={run_name}", "--tail=15", "--prefix", check=False)
    coordinator = kubectl("-n", NAMESPACE, "logs", "-l", "app.kubernetes.io/name=sgcl-coordinator", "--tail=25", "--prefix", check=False)
    return f"{text}\n{coordinator}"


def pods(run_name, running=True):
    found = objects("pods", "-l", f"sgcl.dev/run={run_name}")
    alive = [pod for pod in found if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]]
    return alive if running else found


def steps(run_name):
    return status(run_name).get("step", 0)


def install(cluster):
    say("kubectl apply -f deploy/")
    kubectl("apply", "-f", ROOT / "deploy")
    kubectl("-n", NAMESPACE, "patch", "configmap", "sgcl-defaults", "--type=merge", "-p", '{"data": {"queue": "kept"}}')
    again = kubectl("apply", "-f", ROOT / "deploy").splitlines()
    # kubectl says "configured" of every PodDisruptionBudget, since its selector is replaced as a whole, by itself here.
    changed = [line for line in again if not line.endswith("unchanged") and not line.startswith("poddisruptionbudget")]
    expect(again and not changed, f"a second apply changed something: {changed}")
    kept = kubectl("-n", NAMESPACE, "get", "configmap", "sgcl-defaults", "-o", "jsonpath={.data.queue}")
    expect(kept == "kept", "a second apply took back what was set in sgcl-defaults")
    kubectl("-n", NAMESPACE, "patch", "configmap", "sgcl-defaults", "--type=merge", "-p", '{"data": {"queue": null}}')
    kubectl("apply", "-k", ROOT / "deploy/overlays/demo")
    # A cluster that is not for trials must have them.
    if not CONTEXT or CONTEXT.startswith("kind-"):
        for node in objects("nodes"):
            give_gpus(node["metadata"]["name"])
    for name in ("sgcl-coordinator", "sgcl-s3"):
        try:
            kubectl("-n", NAMESPACE, "rollout", "status", f"deployment/{name}", "--timeout=90s")
        except Failed as failed:
            raise Failed(f"{failed}\n{kubectl('-n', NAMESPACE, 'get', 'pods', '-o', 'wide')}\n"
                         f"{kubectl('-n', NAMESPACE, 'get', 'events')[-3000:]}\n{logs('none')}") from None
    if CONTEXT:
        address = cluster.forward()
    else:
        address = kubectl("-n", NAMESPACE, "get", "service", "sgcl-s3", "-o", "jsonpath={.spec.clusterIP}")
    S3.update(AWS_ENDPOINT_URL=f"http://{address}:7070", AWS_ACCESS_KEY_ID="demo", AWS_SECRET_ACCESS_KEY="only-for-the-demo",
              AWS_REGION="us-east-1", HOME=os.environ.get("HOME", "/root"))
    say("two coordinators and the S3 server run")


def boto(code):
    """A few lines with an S3 client that nobody here wrote."""
    begin = "import boto3, os, sys\ns3 = boto3.client('s3', endpoint_url=os.environ['AWS_ENDPOINT_URL'])\n"
    return inside([CACHE / "python/bin/python", "-c", begin + code], env=S3).stdout


def ingest():
    slides = CACHE / "slides"
    if not (slides / "complete").exists():
        shutil.rmtree(slides, ignore_errors=True)
        run([BIN / "sgclctl", "phantom", "--out", slides, "--slides", "3", "--size", "1024"])
        (slides / "complete").touch()
    sgclctl("ingest", *sorted(slides.glob("*.tif")), "--to", "s3://sgcl/patches", "--patch-px", "64", "--level", "0", "--tissue-min", "0.1")
    say("slides are ingested into the bucket")


# Runs ----------------------------------------------------------------------------------------------------------------


def verify(run_name):
    sgclctl("verify", run_name, "--bucket", BUCKET)


def submit(run_name, *words):
    sgclctl("submit", "--name", run_name, *words)


def training(run_name, at_least=2):
    return wait_for(f"{run_name} trains", lambda: phase_is(run_name, "Running")() and steps(run_name) >= at_least, 240)


def costs(run_name):
    """What `describe` has of a run: changes of membership with their causes."""
    text = sgclctl("describe", run_name, "--bucket", BUCKET, "--output", "json").stdout
    return json.loads(text.splitlines()[-1])


def changes(run_name):
    return [event for event in costs(run_name)["events"] if event["kind"] == "regrouped"]


def report(run_name):
    told = costs(run_name)
    for event in changes(run_name):
        reason = event["reason"].splitlines()[0]
        say(f"  {run_name}: {event['seconds']:.1f} s, {event['steps_lost']} steps lost, {event['world_before']} → {event['world']} ranks: {reason}")
    say(f"  {run_name}: {json.dumps(told['costs'])}")
    return told["costs"]


def finished(run_name, seconds=480):
    wait_for(f"{run_name} is finished", phase_is(run_name, "Finished"), seconds)
    verify(run_name)


def evict(name):
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": NAMESPACE}}
    file = STATE / "eviction.json"
    file.write_text(json.dumps(body))
    kubectl("create", "--raw", f"/api/v1/namespaces/{NAMESPACE}/pods/{name}/eviction", "-f", file)


def revive(machine):
    run([CLUSTER, "start-node", machine.rsplit("-", 1)[1]])
    wait_for(f"{machine} is back", lambda: "NotReady" not in kubectl("get", "node", machine), 60)
    give_gpus(machine)


def give_gpus(machine):
    """Four that a node advertises; ranks run on the CPU by the demo's defaults."""
    patch = [{"op": "add", "path": "/status/capacity/nvidia.com~1gpu", "value": "4"}]
    kubectl("patch", "node", machine, "--subresource=status", "--type=json", "-p", json.dumps(patch))
