"""One run through all that a cluster does to it: nothing is lost, each is told of with its cost."""

import json
import time

from harness import (
    CLUSTER, NAMESPACE, STATE, Failed, changes, evict, expect, finished, inside, kubectl, objects, pods, report, revive, run, say,
    seconds, status, steps, submit, training, wait_for,
)

RUN = "storm"
EVICTIONS = 10
RANKS = 4
# Two ranks a node: one would take two threads, which spin for one another where cores are few.
WORDS = ("--gpus-per-node", "2", "--set", "epochs=24", "--max-restarts", "20")
COORDINATORS = "app.kubernetes.io/name=sgcl-coordinator"
API_SERVER_AWAY_S = 60


def whole():
    """Both nodes are in the run's world, and it steps."""
    at = steps(RUN)
    return wait_for("both nodes train", lambda: over() or
                    (now := status(RUN)).get("nodes") == "2/2" and now.get("phase") == "Running" and now.get("step", 0) > at and now, 180)


def over():
    expect(status(RUN).get("phase") != "Finished", "the run finished before all was done to it: give it more epochs")
    return False


def two_pods():
    return wait_for("two nodes run", lambda: (found := pods(RUN)) and len(found) == 2 and found, 120)


def disturbed(name, do):
    """Does something, waits until the run has all its ranks again, and prints what it cost."""
    known = len(changes(RUN))
    began = time.time()
    do()
    told = wait_for(f"the run is whole again after: {name}", lambda: over() or
                    (told := changes(RUN)[known:]) and told[-1]["world"] == RANKS and told, 180, 1)
    lost = sum(event["steps_lost"] for event in told)
    first, last = (seconds(told[place]["time"]) - began for place in (0, -1))
    say(f"  {name}: {lost} steps lost, survivors stepping after {first:.1f} s, full size after {last:.1f} s")
    return told


def left(told, name):
    """One notice: a change that is none of the run's failures."""
    expect(any("told to leave" in event["reason"] for event in told), f"{name} is not told of: {told}")
    for event in told:
        expect(not event["failure"], f"{name} counted as a failure: {event}")


def replaced(pod):
    """The seconds between the end of a node's Job and the next one of its slot."""
    slot, name = pod["metadata"]["labels"]["sgcl.dev/slot"], pod["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    jobs = {job["metadata"]["name"]: job for job in objects("jobs", "-l", f"sgcl.dev/run={RUN},sgcl.dev/slot={slot}")}
    number = int(name.rsplit("-", 1)[1])
    ended = [c["lastTransitionTime"] for c in jobs[name]["status"].get("conditions", []) if c["type"] in ("Failed", "Complete")]
    new = jobs[f"{RUN}-{slot}-{number + 1}"]["metadata"]["creationTimestamp"]
    return seconds(new) - seconds(ended[0]) if ended else float("nan")


def evictions():
    gaps = []
    for turn in range(EVICTIONS):
        victim = two_pods()[turn % 2]
        left(disturbed(f"eviction {turn + 1}", lambda: evict(victim["metadata"]["name"])), "an eviction")
        gaps.append(replaced(victim))
    say(f"  from a Job's end to the next Job of its slot, whole seconds: {', '.join(f'{gap:.0f}' for gap in gaps)}")


def drain():
    """`kubectl drain` of a machine, as for its upgrade."""
    machine = spare_machine()
    before = {pod["metadata"]["name"] for pod in two_pods() if pod["spec"]["nodeName"] == machine}

    def do():
        kubectl("drain", machine, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s")
        expect(before, "no node of the run was there")

    left(disturbed(f"drain of {machine}", do), "a drain")
    kubectl("uncordon", machine)


def spare_machine():
    """One with a node of the run, without the only S3 server."""
    storage = {pod["spec"]["nodeName"] for pod in objects("pods", "-l", "app.kubernetes.io/name=sgcl-s3")}
    for pod in two_pods():
        if pod["spec"]["nodeName"] not in storage:
            return pod["spec"]["nodeName"]
    raise Failed("both nodes are beside the S3 server")


def power_cut():
    machine = spare_machine()
    disturbed(f"power cut of {machine}", lambda: run([CLUSTER, "kill-node", machine.rsplit("-", 1)[1]]))
    revive(machine)


def leader():
    return kubectl("-n", NAMESPACE, "get", "lease", "sgcl-coordinator", "-o", "jsonpath={.spec.holderIdentity}").strip()


def coordinators_gone(names):
    """Without its coordinators the run trains on, and the next leader takes it over as it is."""
    known, epoch = {pod["metadata"]["uid"] for pod in two_pods()}, status(RUN)["leaseEpoch"]
    began = time.monotonic()
    told = len(changes(RUN))
    kubectl("-n", NAMESPACE, "delete", "pods", "--wait=false", *names)
    wait_for("another leader tells of the run", lambda: over() or
             (now := status(RUN)).get("leaseEpoch", 0) > epoch and now.get("phase") == "Running", 120)
    took = time.monotonic() - began
    whole()
    after = {pod["metadata"]["uid"] for pod in pods(RUN)}
    # A machine that is too busy for heartbeats loses nodes by itself: that is told, and is not this.
    busy = [event for event in changes(RUN)[told:] if event["reason"].endswith("was lost")]
    expect(busy or after == known and len(changes(RUN)) == told, "the run noticed that its coordinators were gone")
    return took


def leader_deleted():
    say(f"  leader deleted: 0 steps lost, training never stopped, taken over after {coordinators_gone([leader()]):.1f} s")


def both_deleted():
    say(f"  both coordinators deleted: 0 steps lost, training never stopped, taken over after {coordinators_gone(['-l', COORDINATORS]):.1f} s")


def api_server_stopped():
    """Nobody can ask or tell the API server anything; it comes back where it was."""
    pid = (STATE / "apiserver.pid").read_text().strip()
    before, known = steps(RUN), {pod["metadata"]["uid"] for pod in two_pods()}
    inside(["kill", "-STOP", pid])
    try:
        time.sleep(API_SERVER_AWAY_S)
    finally:
        inside(["kill", "-CONT", pid])
    began = time.monotonic()
    wait_for("the API server answers", lambda: kubectl("get", "--raw", "/readyz", check=False) == "ok", 60)
    # What the bucket has of the time in which the cluster could be told nothing.
    whole()
    after = {pod["metadata"]["uid"] for pod in pods(RUN)}
    gained = steps(RUN) - before
    say(f"  API server stopped for {API_SERVER_AWAY_S} s: {gained} steps were trained meanwhile, {len(after - known)} nodes replaced, "
        f"all told again {time.monotonic() - began:.1f} s after its return")


def memory_limit():
    """Something in a worker's container eats what its memory limit leaves."""
    name = two_pods()[0]["metadata"]["labels"]["batch.kubernetes.io/job-name"]
    code = f"""
import os, re, subprocess, time
pid = subprocess.check_output(['pgrep', '-f', 'sgcl-worker node.*--node {name}'], text=True).split()[0]
lines = open(f'/proc/{{pid}}/cgroup').read().splitlines()
path = next((l.split(':')[2] for l in lines if ':memory:' in l), None)
root = '/sys/fs/cgroup/memory' if path else '/sys/fs/cgroup'
path = root + (path or lines[0].split(':')[2])
limit = int(open(path + ('/memory.limit_in_bytes' if root.endswith('memory') else '/memory.max')).read())
open(path + '/cgroup.procs', 'w').write(str(os.getpid()))
eaten = []
while sum(map(len, eaten)) < limit // 2 or os.path.exists(f'/proc/{{pid}}') and sum(map(len, eaten)) < limit:
    eaten.append(bytearray(b'x') * (16 << 20))
"""
    disturbed("memory limit hit", lambda: inside(["python3", "-c", code], check=False))


def storm():
    """One run through ten evictions, a drain, a power cut, lost coordinators, a stopped API server and a worker out of memory."""
    submit(RUN, "--nodes", "2", "-f", str(manifest()), *WORDS)
    training(RUN)
    for part in (evictions, drain, power_cut, leader_deleted, both_deleted, api_server_stopped, memory_limit):
        part()
    finished(RUN, 900)
    costs = report(RUN)
    told = changes(RUN)
    expect(costs["steps_lost"] == 0, f"steps were lost: {costs}")
    expect(sum("told to leave" in event["reason"] for event in told) >= EVICTIONS + 1, "not every eviction is told of")


def manifest():
    """The run with a memory limit that something can hit."""
    file = STATE / "storm.yaml"
    file.write_text(json.dumps({"apiVersion": "sgcl.dev/v1alpha1", "kind": "SgclRun", "metadata": {"name": RUN},
                                "spec": {"nodes": 2, "resources": {"memory": "3Gi"}}}))
    return file
