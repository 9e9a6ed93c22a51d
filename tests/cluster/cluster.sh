#!/bin/bash
# A real Kubernetes of several nodes on one machine, without images, downloads or systemd: the servers are
# one Go binary, each node its own containerd and kubelet. Everything lives in network, mount and process
# namespaces of its own: when `up` ends, however it ends, all of it is gone.
#
#   cluster.sh build               compile the servers (5 minutes on two cores, once)
#   cluster.sh up [nodes]          run until interrupted; ready when $STATE/ready exists
#   cluster.sh exec COMMAND...     run a command inside, KUBECONFIG set
#   cluster.sh load ARCHIVE...     give every node an image (docker-archive or OCI tar)
#   cluster.sh kill-node I         cut a node's power: kubelet, containerd and its containers die at once
#   cluster.sh start-node I        bring it back
#
# Needs root, Go and Debian's containerd, runc, containernetworking-plugins, iptables, iproute2.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
CACHE=${SGCL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/sgcl}/cluster
STATE=${STATE:-$CACHE/state}
SERVER=${SERVER:-$CACHE/bin/testcluster}
VERSION=1.34.4
HOST=10.200.0.1                      # API server, DNS and whatever the tests start beside the cluster

build() {
  mkdir -p "$(dirname "$SERVER")"
  local v=k8s.io/component-base/version
  (cd "$HERE" && CGO_ENABLED=0 go build -trimpath -o "$SERVER" -ldflags \
    "-s -w -X $v.gitVersion=v$VERSION -X $v.gitMajor=1 -X $v.gitMinor=${VERSION:2:2}" .)
}

# ---- certificates -------------------------------------------------------------------------------------------
certificate() {                      # name subject alternative-names
  openssl req -newkey rsa:2048 -nodes -keyout "$1.key" -out "$1.csr" -subj "$2" 2>/dev/null
  openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 30 -out "$1.crt" \
    -extfile <(echo "subjectAltName=$3") 2>/dev/null
  cat >"$1.kubeconfig" <<YAML
apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: "https://$HOST:6443", certificate-authority: $PWD/ca.crt}}]
users: [{name: $1, user: {client-certificate: $PWD/$1.crt, client-key: $PWD/$1.key}}]
contexts: [{name: test, context: {cluster: test, user: $1}}]
current-context: test
YAML
}

certificates() {
  mkdir -p "$STATE/pki" && cd "$STATE/pki"
  openssl req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.crt -days 30 -subj /CN=testcluster 2>/dev/null
  openssl genrsa -out sa.key 2048 2>/dev/null
  openssl rsa -in sa.key -pubout -out sa.pub 2>/dev/null
  certificate apiserver /CN=kube-apiserver "DNS:kubernetes.default.svc,IP:$HOST,IP:10.96.0.1"
  certificate admin /O=system:masters/CN=admin DNS:admin
  certificate controllers /CN=system:kube-controller-manager DNS:controllers
  certificate scheduler /CN=system:kube-scheduler DNS:scheduler
  certificate proxy /CN=system:kube-proxy DNS:proxy
  for i in $(seq 0 $((NODES - 1))); do
    certificate "node-$i" "/O=system:nodes/CN=system:node:node-$i" "DNS:node-$i,IP:10.200.0.$((10 + i))"
  done
  cd "$STATE"
}

# ---- servers ------------------------------------------------------------------------------------------------
start() {                            # name command...: the log and the pid are the name's
  local name=$1; shift
  setsid "$@" >"$STATE/log/$name.log" 2>&1 &
  echo $! >"$STATE/$name.pid"
}

control_plane() {
  local pki=$STATE/pki
  # Who asked for what when: the coordinator's requests, and runs.
  cat >"$STATE/audit.yaml" <<YAML
apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, ResponseStarted]
rules:
  - {level: Metadata, users: ["system:serviceaccount:sgcl:sgcl-coordinator"]}
  - {level: Metadata, resources: [{group: sgcl.dev, resources: [sgclruns]}]}
  - {level: None}
YAML
  start etcd "$SERVER" etcd --data-dir "$STATE/etcd" --unsafe-no-fsync
  start apiserver "$SERVER" kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=$HOST \
    --tls-cert-file="$pki/apiserver.crt" --tls-private-key-file="$pki/apiserver.key" --client-ca-file="$pki/ca.crt" \
    --service-account-key-file="$pki/sa.pub" --service-account-signing-key-file="$pki/sa.key" \
    --service-account-issuer=https://kubernetes.default.svc --service-cluster-ip-range=10.96.0.0/16 \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --kubelet-client-certificate="$pki/admin.crt" --kubelet-client-key="$pki/admin.key" \
    --kubelet-preferred-address-types=InternalIP --audit-policy-file="$STATE/audit.yaml" --audit-log-path="$STATE/log/audit.log"
  start controllers "$SERVER" kube-controller-manager --kubeconfig="$pki/controllers.kubeconfig" \
    --service-account-private-key-file="$pki/sa.key" --root-ca-file="$pki/ca.crt" --use-service-account-credentials \
    --allocate-node-cidrs=false --leader-elect=false --node-monitor-period=1s --node-monitor-grace-period=8s \
    --kube-api-qps=200 --kube-api-burst=400 # else a thousand Jobs wait for the Job controller's own limit
  start scheduler "$SERVER" kube-scheduler --kubeconfig="$pki/scheduler.kubeconfig" --leader-elect=false
  start proxy "$SERVER" kube-proxy --kubeconfig="$pki/proxy.kubeconfig" --cluster-cidr=10.244.0.0/16 \
    --hostname-override=node-0 --proxy-mode=iptables --conntrack-max-per-core=0 \
    --conntrack-tcp-timeout-established=0 --conntrack-tcp-timeout-close-wait=0
  echo ".:53 {
    bind $HOST
    errors
    kubernetes cluster.local in-addr.arpa {
      kubeconfig $pki/admin.kubeconfig test
    }
  }" >"$STATE/Corefile"
  echo "nameserver $HOST" >"$STATE/resolv.conf"
  start coredns "$SERVER" coredns -conf "$STATE/Corefile"
}

node_files() {                       # containerd, network and kubelet configuration of node $1
  local i=$1 d=$STATE/node-$1 pki=$STATE/pki
  mkdir -p "$d/cni"
  cat >"$d/cni/10-pods.conflist" <<JSON
{"cniVersion": "1.0.0", "name": "node-$i", "plugins": [
  {"type": "bridge", "bridge": "cni$i", "isGateway": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$d/ipam", "ranges": [[{"subnet": "10.244.$i.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
JSON
  # restrict_oom_score_adj: where root lacks CAP_SYS_RESOURCE, as in some virtual machines, runc dies without it.
  cat >"$d/containerd.toml" <<TOML
version = 2
root = "$d/containerd"
state = "$d/containerd-state"
[grpc]
  address = "$d/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:1"
  restrict_oom_score_adj = true
  stream_server_address = "10.200.0.$((10 + i))"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$d/cni"
TOML
  cat >"$d/kubelet.yaml" <<YAML
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 10.200.0.$((10 + i))
healthzPort: $((11248 + i))
authentication: {anonymous: {enabled: false}, x509: {clientCAFile: $pki/ca.crt}}
tlsCertFile: $pki/node-$i.crt
tlsPrivateKeyFile: $pki/node-$i.key
clusterDomain: cluster.local
clusterDNS: [$HOST]
resolvConf: $STATE/resolv.conf
podLogsDir: $d/logs
cgroupDriver: cgroupfs
cgroupRoot: /testcluster/node-$i
containerRuntimeEndpoint: unix://$d/containerd.sock
failSwapOn: false
nodeStatusUpdateFrequency: 2s
nodeLeaseDurationSeconds: 8
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 100Mi}
YAML
}

cgroups() {                          # the parents that a kubelet expects, on cgroup v1 and v2
  local c
  if [ -e /sys/fs/cgroup/cgroup.controllers ]; then
    mkdir -p "/sys/fs/cgroup/testcluster/node-$1"
    return
  fi
  for c in /sys/fs/cgroup/*/; do
    [ -e "$c/cgroup.controllers" ] && continue
    mkdir -p "$c/testcluster/node-$1"
    if [ -e "$c/cpuset.cpus" ]; then
      for dir in "$c/testcluster" "$c/testcluster/node-$1"; do
        cat "$c/cpuset.cpus" >"$dir/cpuset.cpus"
        cat "$c/cpuset.mems" >"$dir/cpuset.mems"
      done
    fi
  done
}

start_node() {
  local i=$1 d=$STATE/node-$1
  node_files "$i"
  cgroups "$i"
  ip addr replace "10.200.0.$((10 + i))/32" dev lo
  rm -f "$STATE/log/containerd-$i.log" # of the node's life before
  start "containerd-$i" containerd -c "$d/containerd.toml"
  until ctr -a "$d/containerd.sock" version >/dev/null 2>&1; do sleep 0.2; done
  # A kubelet that comes before the part which it speaks with is ready ends at once.
  until grep -q "Start streaming server" "$STATE/log/containerd-$i.log"; do sleep 0.1; done
  ctr -a "$d/containerd.sock" -n k8s.io images import "$STATE/pause.tar" >/dev/null
  start "kubelet-$i" "$SERVER" kubelet --kubeconfig="$STATE/pki/node-$i.kubeconfig" --config="$d/kubelet.yaml" \
    --hostname-override="node-$i" --node-ip="10.200.0.$((10 + i))" --root-dir="$d/kubelet" \
    --node-labels="${NODE_LABELS:-sgcl.dev/test=yes}"
}

kill_node() {                        # first what restarts things, then every process of the node's containers
  local i=$1 c p
  kill -9 "$(cat "$STATE/kubelet-$i.pid")" "$(cat "$STATE/containerd-$i.pid")" 2>/dev/null || true
  for c in $(find /sys/fs/cgroup -path "*/testcluster/node-$i/*" -name cgroup.procs); do
    # 0 is a process of another cluster's namespace, and to kill it would be to kill this script's own group.
    for p in $(grep -vx 0 "$c"); do kill -9 "$p" 2>/dev/null || true; done
  done
}

pause_image() {                      # the container that holds a pod's namespaces: nothing but a sleeping process
  local w; w=$(mktemp -d)
  mkdir "$w/root"
  printf '#include <signal.h>\n#include <unistd.h>\nstatic void stop(int s) { _exit(0); }\nint main(void) { signal(SIGTERM, stop); for (;;) pause(); }\n' >"$w/pause.c"
  gcc -static -Os -o "$w/root/pause" "$w/pause.c"
  tar -C "$w/root" --owner=0 --group=0 -cf "$w/layer.tar" .
  printf '{"architecture":"amd64","os":"linux","config":{"Entrypoint":["/pause"]},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
    "$(sha256sum "$w/layer.tar" | cut -d' ' -f1)" >"$w/config.json"
  printf '[{"Config":"config.json","RepoTags":["localhost/pause:1"],"Layers":["layer.tar"]}]' >"$w/manifest.json"
  tar -C "$w" -cf "$STATE/pause.tar" manifest.json config.json layer.tar
  rm -r "$w"
}

# ---- commands -----------------------------------------------------------------------------------------------
inside() {                           # process 1 of the new namespaces
  mount --make-rprivate / && mount --make-rshared /
  mount -t proc proc /proc
  ip link set lo up
  ip addr add $HOST/32 dev lo
  ip route add default dev lo 2>/dev/null || true
  sysctl -qw net.ipv4.ip_forward=1
  certificates
  pause_image
  control_plane
  until kubectl get --raw /readyz >/dev/null 2>&1; do sleep 0.3; done
  for i in $(seq 0 $((NODES - 1))); do start_node "$i"; done
  until [ "$(kubectl get nodes --no-headers 2>/dev/null | grep -cw Ready)" = "$NODES" ]; do sleep 0.3; done
  touch "$STATE/ready"
  echo "ready: $NODES nodes, Kubernetes $VERSION"
  trap 'exit 0' TERM INT
  while :; do sleep 1 & wait $!; done
}

kubectl() { KUBECONFIG=$STATE/pki/admin.kubeconfig "$SERVER" kubectl "$@"; }
enter() { nsenter --net --mount --pid --target "$(cat "$STATE/init.pid")" -- "$@"; }

case "${1:-}" in
build) build ;;
up)
  export NODES=${2:-2} STATE SERVER
  [ -x "$SERVER" ] || build
  rm -rf "${STATE:?}"/{etcd,log,pki,ready,node-*,*.pid}
  mkdir -p "$STATE/log"
  setpriv --pdeathsig KILL unshare --net --mount --pid --fork --kill-child -- "$HERE/cluster.sh" inside &
  outer=$!
  trap 'kill -9 "$(cat "$STATE/init.pid")" 2>/dev/null; wait $outer 2>/dev/null; exit 0' INT TERM
  until init=$(pgrep -P $outer); do sleep 0.05; done
  echo "$init" >"$STATE/init.pid"
  wait $outer
  ;;
inside) inside ;;
exec) shift; enter env KUBECONFIG="$STATE/pki/admin.kubeconfig" "$@" ;;
kubectl) shift; enter env KUBECONFIG="$STATE/pki/admin.kubeconfig" "$SERVER" kubectl "$@" ;;
load)
  shift
  for archive in "$@"; do
    for socket in "$STATE"/node-*/containerd.sock; do ctr -a "$socket" -n k8s.io images import "$archive"; done
  done
  ;;
kill-node | start-node) enter env STATE="$STATE" SERVER="$SERVER" "$HERE/cluster.sh" "inside-$1" "$2" ;;
inside-kill-node) kill_node "$2" ;;
inside-start-node) start_node "$2" ;;
*) sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0"; exit 2 ;;
esac
