# Two commands: `make demo` and `make test`. Each installs what is missing first (scripts/setup), and says so.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Absolute, so that scripts find the binaries wherever they run.
export CARGO_TARGET_DIR ?= $(CURDIR)/target
# Read back from what scripts/setup wrote for cargo; a value of the caller's own wins.
python = $${SGCL_PYTHON:-$$(sed -n 's/^SGCL_PYTHON = "\(.*\)"/\1/p' .cargo/config.toml)}

.PHONY: help setup setup-tests setup-cluster build demo test test-chaos soak test-simulation test-goldens test-cluster test-gpu test-observability images lint nccl bench-cluster bench-objective bench-kmeans bench-preemption bench-embed bench-science doc clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## installs libtorch and system packages; a second call does nothing
	@scripts/setup

setup-tests:
	@scripts/setup --tests

build: setup ## builds sgclctl and sgcl-worker (the first time: some ten minutes on two cores)
	cargo build --release --locked --workspace --bins

demo: build ## from nothing to a trained encoder and its report, under demo/
	SGCL_PYTHON="$(python)" scripts/demo

# Programs and tests in one build: apart, they would ask for other features of the same libraries, and compile those twice.
test: setup-tests ## every test; on nextest where it is installed
	cargo build --release --locked --workspace --bins --tests
	@if cargo nextest --version >/dev/null 2>&1; then \
	  cargo nextest run --release --locked --workspace && cargo test --release --locked --workspace --doc; \
	else \
	  echo "test: cargo-nextest is not installed, so plain cargo test runs"; \
	  cargo test --release --locked --workspace; \
	fi

test-chaos: setup-tests ## a run under twenty random faults; SGCL_SEED draws them
	cargo build --release --locked --workspace --bins --tests
	cargo test --release --locked --workspace --test chaos -- --nocapture

soak: setup-tests ## such runs for an hour, seed after seed (SGCL_SOAK_S=3600)
	cargo build --release --locked --workspace --bins --tests
	SGCL_SOAK_S=$${SGCL_SOAK_S:-3600} cargo test --release --locked --workspace --test chaos -- --nocapture

test-simulation: ## the coordinator's decisions in a simulated world; SGCL_SEED is the first seed, SGCL_SEEDS how many
	cargo test --release --locked --workspace --test simulation -- --nocapture

test-goldens: setup-tests ## the method against every case in the folder SGCL_GOLDENS names, listing what it read
	cargo test --release --locked --workspace --test goldens -- --nocapture

images: build ## the images of deploy/Dockerfile, with docker, podman or buildah (ARGS names targets: coordinator worker-cpu worker sgclctl)
	scripts/images $(ARGS)

setup-cluster:
	@scripts/setup --cluster

test-cluster: build setup-cluster ## installs on a real cluster of three nodes on this machine, trains there, and breaks things (root, Linux)
	SGCL_PYTHON="$(python)" tests/cluster/run $(ARGS)

bench-cluster: build setup-cluster ## 200 runs of five nodes on fake machines: memory, requests, time from submit to Job, takeover (root, Linux)
	SGCL_PYTHON="$(python)" tests/cluster/run --only fleet $(ARGS)

test-observability: setup-tests ## traces through the OpenTelemetry collector, rules and metrics through Prometheus (fetches both, the first time)
	cargo build --release --locked --workspace --bins --tests
	tests/observability/run

lint: setup ## format, clippy, and the supply chain where cargo-deny is installed
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	@if cargo deny --version >/dev/null 2>&1; then \
	  cargo deny --locked check; \
	else \
	  echo "lint: skipped advisories and licences, since cargo-deny is not installed (cargo install --locked cargo-deny)"; \
	fi

bench-objective: setup ## the objective's step against a dense one: time and memory (ARGS="--help" lists what can be asked)
	SGCL_PYTHON="$(python)" cargo bench --profile release --locked -p sgcl --bench objective -- $(ARGS)

bench-kmeans: setup ## k-means against faiss (SGCL_PYTHON must have faiss-cpu and safetensors)
	SGCL_PYTHON="$(python)" cargo bench --profile release --locked -p sgcl --bench kmeans -- $(ARGS)

# Built as `make test` builds, so that nothing is compiled twice.
bench-preemption: setup-tests ## lost ranks and nodes beside torchrun elastic under the same kills, and what it costs a step (ARGS="--quick")
	cargo build --release --locked --workspace --bins --tests
	SGCL_PYTHON="$(python)" cargo bench --profile release --locked --workspace --bench preemption -- $(ARGS)

bench-embed: build ## extraction of features beside timm's on the same cores and patches (ARGS="--arch resnet50")
	"$(python)" tests/benches/embed.py $(ARGS)

bench-science: build ## what every method is worth under an equal budget, on phantom slides (ARGS="--help" lists what can be asked; hours)
	"$(python)" tests/benches/science.py $(ARGS)

nccl: ## compiles, links and loads the NCCL half; without a GPU it must say that there is none
	@scripts/setup --nccl
	cargo test --release --locked -p sgcl-c10d --features nccl --test nccl

test-gpu: setup ## what only a GPU shows, on one: NCCL, golden cases, a run, a ring broken and mended, features (ARGS="--only ring")
	@scripts/setup --nccl
	cargo build --release --locked -p sgclctl
	cargo build --release --locked -p sgcl-worker --features nccl
	@rm -rf "$(CARGO_TARGET_DIR)/gpu" && mkdir "$(CARGO_TARGET_DIR)/gpu"
	@cp "$(CARGO_TARGET_DIR)"/release/{sgclctl,sgcl-worker} "$(CARGO_TARGET_DIR)/gpu"
	@for test in "sgcl-c10d --features nccl --test nccl" "sgcl --test goldens"; do \
	  program=$$(cargo test --release --locked -p $$test --no-run --message-format=json | sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1); \
	  cp "$$program" "$(CARGO_TARGET_DIR)/gpu/$${test##* }"; \
	done
	"$(python)" tests/gpu/run $(ARGS)

doc: setup ## the crates' documentation
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps

clean: ## removes build outputs and the demo; the cache folder stays
	cargo clean
	rm -rf demo
