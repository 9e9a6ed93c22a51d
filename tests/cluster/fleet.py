"""Many runs on fake machines (kwok): what they cost the coordinator and the API server."""

import json
import statistics
import subprocess
import time

from harness import CLUSTER, ENV, NAMESPACE, STATE, expect, go_program, inside, kubectl, objects, say, seconds, wait_for

KWOK = "sigs.k8s.io/kwok/cmd/kwok@v0.7.0"
RUNS, NODES, MACHINES = 200, 5, 100
QUIET_S = 60
ACCOUNT = f"system:serviceaccount:{NAMESPACE}:sgcl-coordinator"
# A fake pod starts at once and runs until it is deleted: none of kwok's own stages, which end a Job's pod.
STAGES = """
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-ready}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: DoesNotExist}
    - {key: .status.podIP, operator: DoesNotExist}
  next:
    statusTemplate: |
      {{ $now := Now }}
      phase: Running
      startTime: {{ $now | Quote }}
      hostIP: {{ NodeIPWith .spec.nodeName | Quote }}
      podIP: {{ PodIPWith .spec.nodeName false (or .metadata.uid "") (or .metadata.name "") (or .metadata.namespace "") | Quote }}
      conditions:
      {{ range $kind := list "Initialized" "ContainersReady" "Ready" }}
      - {type: {{ $kind }}, status: "True", lastTransitionTime: {{ $now | Quote }}}
      {{ end }}
      containerStatuses:
      {{ range .spec.containers }}
      - name: {{ .name | Quote }}
        image: {{ .image | Quote }}
        ready: true
        restartCount: 0
        state: {running: {startedAt: {{ $now | Quote }}}}
      {{ end }}
---
apiVersion: kwok.x-k8s.io/v1alpha1
kind: Stage
metadata: {name: pod-delete}
spec:
  resourceRef: {apiGroup: v1, kind: Pod}
  selector:
    matchExpressions:
    - {key: .metadata.deletionTimestamp, operator: Exists}
  next:
    finalizers: {empty: true}
    delete: true
"""


def machine(number):
    return {"apiVersion": "v1", "kind": "Node",
            "metadata": {"name": f"fake-{number}", "annotations": {"kwok.x-k8s.io/node": "fake"}, "labels": {"type": "kwok"}},
            "spec": {"taints": [{"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}]},
            "status": {name: {"cpu": "256", "memory": "2Ti", "pods": "200", "nvidia.com/gpu": "64"} for name in ("capacity", "allocatable")}}


def wanted(number):
    return {"apiVersion": "sgcl.dev/v1alpha1", "kind": "SgclRun", "metadata": {"name": f"fleet-{number}", "namespace": NAMESPACE},
            "spec": {"nodes": NODES, "minNodes": NODES, "gpusPerNode": 4, "nodeSelector": {"type": "kwok"},
                     "tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}], "config": {"batch": {"per_rank": 2}}}}


def create(things):
    file = STATE / "fleet.json"
    file.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": things}))
    kubectl("create", "-f", file)


def requests():
    """What the API server was asked, as its audit log has it."""
    for line in (STATE / "log/audit.log").read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            # The line that is being written.
            continue


def of_coordinator(since, until=float("inf")):
    return [asked for asked in requests() if asked["user"]["username"] == ACCOUNT and since <= seconds(asked["requestReceivedTimestamp"]) < until]


def tally(found):
    counts = {}
    for asked in found:
        ref = asked.get("objectRef", {})
        key = " ".join(filter(None, [asked["verb"], ref.get("resource"), ref.get("subresource")]))
        counts[key] = counts.get(key, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def memory_mib():
    """Resident memory of each coordinator, MiB: the greater one is the leader's."""
    code = ("import subprocess\nfor pid in subprocess.check_output(['pgrep', '-x', 'sgcl-coordinato'], text=True).split():\n"
            "    print(next(line.split()[1] for line in open(f'/proc/{pid}/status') if line.startswith('VmRSS')))")
    return sorted(int(kib) / 1024 for kib in inside(["python3", "-c", code]).stdout.split())


def runs_with(predicate):
    return sum(predicate(thing.get("status", {})) for thing in objects("sgclruns"))


def fleet():
    """200 runs of five nodes on fake machines: memory, requests, time from submit to Job, restart of the coordinator."""
    stages = STATE / "stages.yaml"
    stages.write_text(STAGES)
    log = (STATE / "log/kwok.log").open("w")
    kwok = subprocess.Popen([CLUSTER, "exec", go_program("kwok", KWOK), "--kubeconfig", STATE / "pki/admin.kubeconfig", "--config", stages,
                             "--manage-nodes-with-annotation-selector", "kwok.x-k8s.io/node=fake",
                             # This cluster takes a machine for lost after 8 s.
                             "--node-lease-duration-seconds", "8"],
                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=ENV)
    try:
        create([machine(number) for number in range(MACHINES)])
        wait_for("the fake machines are ready", lambda: sum(
            any(c["type"] == "Ready" and c["status"] == "True" for c in node["status"].get("conditions", []))
            for node in objects("nodes", "-l", "type=kwok")) == MACHINES, 120, 1)
        idle = memory_mib()
        began = time.time()
        create([wanted(number) for number in range(RUNS)])
        wait_for(f"{RUNS * NODES} Jobs are made", lambda: len(objects("jobs", "-l", "sgcl.dev/run")) >= RUNS * NODES, 300, 2)
        wait_for("all nodes run", lambda: runs_with(lambda now: now.get("nodesReady") == NODES or "joining" in (now.get("message") or "")) == RUNS, 300, 2)
        figures = {"runs": RUNS, "nodes": NODES, "started_s": round(time.time() - began, 1), **submit_to_job(began)}
        busy = of_coordinator(began)
        figures["requests_a_run_to_start"] = round(len(busy) / RUNS, 1)
        say(f"  to start: {tally(busy)}")
        quiet = time.time()
        time.sleep(QUIET_S)
        asked = of_coordinator(quiet, quiet + QUIET_S)
        figures["requests_a_run_a_minute"] = round(len(asked) / RUNS * 60 / QUIET_S, 2)
        say(f"  in {QUIET_S} s of waiting: {tally(asked)}")
        figures["memory_mib"] = {"idle": round(idle[-1], 1), "leader": round(memory_mib()[-1], 1)}
        figures["taken_over_s"] = taken_over()
        print(json.dumps({"fleet": figures}))
    finally:
        kwok.kill()


def submit_to_job(began):
    """Seconds from a run's creation to its first and to its last Job's, by the API server's clock."""
    submitted, made = {}, {}
    for asked in requests():
        ref = asked.get("objectRef", {})
        name, when = ref.get("name", ""), seconds(asked["requestReceivedTimestamp"])
        if asked["verb"] != "create" or not name.startswith("fleet-") or when < began or asked["responseStatus"]["code"] != 201:
            continue
        if ref["resource"] == "sgclruns":
            submitted[name] = when
        elif ref["resource"] == "jobs":
            made.setdefault(name.rsplit("-", 2)[0], []).append(when)
    expect(len(submitted) == RUNS and all(len(made.get(run, [])) == NODES for run in submitted),
           f"the audit log has {len(submitted)} runs and {sum(map(len, made.values()))} Jobs")
    figures = {}
    for which, pick in (("first", min), ("last", max)):
        waited = sorted(pick(made[run]) - when for run, when in submitted.items())
        figures[f"submit_to_{which}_job_s"] = {"median": round(statistics.median(waited), 3), "p99": round(waited[int(0.99 * len(waited))], 3)}
    return figures


def taken_over():
    """Seconds from the end of both coordinators until the next leader has told of every run."""
    epoch = max(thing["status"].get("leaseEpoch", 0) for thing in objects("sgclruns"))
    began = time.time()
    kubectl("-n", NAMESPACE, "delete", "pods", "--wait=false", "-l", "app.kubernetes.io/name=sgcl-coordinator")
    wait_for("the next leader has told of every run", lambda: runs_with(lambda now: now.get("leaseEpoch", 0) > epoch) == RUNS, 180, 0.5)
    done = time.time()
    lease = json.loads(kubectl("-n", NAMESPACE, "get", "lease", "sgcl-coordinator", "-o", "json"))
    led = seconds(lease["spec"]["acquireTime"])
    return {"from_deletion": round(done - began, 1), "from_leading": round(done - led, 1)}
