"""Runs under a real Kueue: quotas, priorities and a queue that is held, with the ClusterQueue of deploy/overlays/kueue."""

import json
import os
import time

from harness import (
    CLUSTER, NAMESPACE, ROOT, STATE, costs, expect, finished, go_program, image_of, kubectl, objects, phase_is, pods, report, run, say, sgclctl,
    status, steps, submit, training, wait_for,
)

VERSION = "v0.14.8"  # for Kubernetes 1.34
MODULE = "sigs.k8s.io/kueue"
IMAGE = f"registry.k8s.io/kueue/kueue:{VERSION}"
SYSTEM = "kueue-system"
ONE_NODE = ("--gpus-per-node", "2", "--max-restarts", "0")


def queued():
    """A queue admits node by node, says what it waits for, takes a node for a run that matters more, and gives it back; held, it empties a run."""
    try:
        install_kueue()
        admitted_within_quota()
        priority_takes_one_node()
        held_and_let_go()
        finished("queued")
        told = report("queued")
        expect((told["steps_lost"], told["failures"]) == (0, 0), f"what Kueue took back cost steps, or counted as failures: {told}")
        sgclctl("delete", "queued")
    finally:
        remove_kueue()


# The run -------------------------------------------------------------------------------------------------------------


def trains_on(name, nodes):
    """Whether it trains on so many nodes of two ranks each, and has made a step since this was asked."""
    before = steps(name)

    def look():
        now = phase_is(name, "Running")()
        return now and now.get("step", 0) > before and world(name) == 2 * nodes
    return look


def world(name):
    """Ranks of the newest group, as the bucket tells."""
    groups = [event["world"] for event in costs(name)["events"] if event["kind"] in ("started", "regrouped")]
    return groups[-1] if groups else 0


def admitted_within_quota():
    quota(4)
    submit("nobodys", "--nodes", "1", *ONE_NODE, "--queue", "nobodys")
    said = wait_for("a queue that is not there is said", lambda: (
        text := status("nobodys").get("message") or "") and "has no LocalQueue of that name" in text and text, 30)
    say(f"  {said[:120]}")
    sgclctl("delete", "nobodys")
    submit("queued", "--nodes", "3", "--min-nodes", "1", *ONE_NODE, "--set", "epochs=8")
    wait_for("two of three nodes train within a quota of four GPUs", trains_on("queued", 2), 180)
    text = wait_for("what the third waits for is said", lambda: (
        text := status("queued").get("message") or "") and "queue sgcl" in text and text, 30)
    say(f"  {text[:200]}")
    expect("nvidia.com/gpu" in text, f"it does not say what the queue lacks: {text}")
    quota(6)
    wait_for("the third is admitted as the quota grows", trains_on("queued", 3), 120)


def priority_takes_one_node():
    kubectl("create", "priorityclass", "sgcl-test-urgent", "--value=1000")
    began = time.monotonic()
    submit("urgent", "--nodes", "1", *ONE_NODE, "--priority", "sgcl-test-urgent", "--set", "epochs=1")
    wait_for("the other trains on with one node fewer", trains_on("queued", 2), 120)
    say(f"  {time.monotonic() - began:.1f} s after an urgent run was submitted, the other trains on with one node fewer")
    finished("urgent")
    began = time.monotonic()
    wait_for("the node is given back", trains_on("queued", 3), 180)
    say(f"  {time.monotonic() - began:.1f} s after the urgent run, it trains on three again")
    # The Job that was taken back goes: nobody waits for it any more, and Kueue would start it again.
    wait_for("three nodes are three Jobs", lambda: len(objects("jobs", "-l", "sgcl.dev/run=queued")) == 3, 10)
    kubectl("delete", "priorityclass", "sgcl-test-urgent")


def held_and_let_go():
    began = time.monotonic()
    stop_policy("HoldAndDrain")
    wait_for("a held queue has taken all nodes", lambda: not pods("queued"), 90)
    text = wait_for("it says that it waits", lambda: (
        text := status("queued").get("message") or "") and "queue sgcl" in text and text, 30)
    at = steps("queued")
    say(f"  held at step {at}, nodes gone after {time.monotonic() - began:.1f} s: {text[:200]}")
    began = time.monotonic()
    stop_policy("None")
    training("queued", at + 1)
    say(f"  let go: training again after {time.monotonic() - began:.1f} s")


# Kueue ---------------------------------------------------------------------------------------------------------------


def install_kueue():
    """As its own release is installed: its kustomization, with an image of its program at that version."""
    run([CLUSTER, "load", image_of(go_program("kueue", f"{MODULE}/cmd/kueue@{VERSION}"), "/manager", IMAGE)])
    source = json.loads(run(["go", "mod", "download", "-json", f"{MODULE}@{VERSION}"]).stdout)["Dir"]
    folder = STATE / "kueue"
    folder.mkdir(exist_ok=True)
    container = {"name": "manager", "imagePullPolicy": "IfNotPresent", "resources": {"requests": {"cpu": "50m"}}}
    deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "kueue-controller-manager", "namespace": SYSTEM},
                  "spec": {"template": {"spec": {"containers": [container]}}}}
    # This cluster's API server aggregates no others.
    aggregated = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": "v1beta1.visibility.kueue.x-k8s.io"}, "$patch": "delete"}
    (folder / "kustomization.yaml").write_text(json.dumps({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [os.path.relpath(f"{source}/config/default", folder)],
        "images": [{"name": "us-central1-docker.pkg.dev/k8s-staging-images/kueue/kueue", "newName": IMAGE.split(":")[0], "newTag": VERSION}],
        "patches": [{"patch": json.dumps(patch)} for patch in (deployment, aggregated)]}))
    kubectl("apply", "--server-side", "-k", folder)
    kubectl("-n", SYSTEM, "rollout", "status", "deployment/kueue-controller-manager", "--timeout=120s")
    queues = ROOT / "deploy/overlays/kueue/queues.yaml"
    # Its webhooks answer a little later than its probes.
    wait_for("Kueue takes queues", lambda: kubectl("apply", "-f", queues, check=False).count("\n") >= 3, 60)
    # As GPU feature discovery labels machines.
    for node in objects("nodes"):
        kubectl("label", "node", node["metadata"]["name"], "nvidia.com/gpu.present=true", "--overwrite")
    default_queue("sgcl")
    say(f"Kueue {VERSION} runs")


def remove_kueue():
    default_queue(None)
    kubectl("delete", "--ignore-not-found", "-f", ROOT / "deploy/overlays/kueue/queues.yaml", "--timeout=60s", check=False)
    kubectl("delete", "--ignore-not-found", "-k", STATE / "kueue", "--timeout=60s", check=False)


def default_queue(name):
    kubectl("-n", NAMESPACE, "patch", "configmap", "sgcl-defaults", "--type=merge", "-p", json.dumps({"data": {"queue": name}}))


def stop_policy(policy):
    kubectl("patch", "clusterqueue", "sgcl", "--type=merge", "-p", json.dumps({"spec": {"stopPolicy": policy}}))


def quota(gpus):
    resources = json.loads(kubectl("get", "clusterqueue", "sgcl", "-o", "json"))["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    index = [one["name"] for one in resources].index("nvidia.com/gpu")
    path = f"/spec/resourceGroups/0/flavors/0/resources/{index}/nominalQuota"
    patch = [{"op": "replace", "path": path, "value": str(gpus)}]
    kubectl("patch", "clusterqueue", "sgcl", "--type=json", "-p", json.dumps(patch))
