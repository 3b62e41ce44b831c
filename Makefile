# `make help` lists what there is. Every goal installs and builds what it needs, and is safe to repeat.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# What the node VM runs: trixie (Debian's containerd 1.7), sid (Debian's containerd 2.x), or k8s (sid with upstream's newest
# containerd, Kubernetes, etcd and critest).
NODE ?= trixie
# Parts that the node gets beside those of its suite (docs/node.md): PARTS=gvisor.
PARTS ?=
# Which runtimes are tested and measured.
RUNTIMES ?= runc kiln
# Only the end-to-end tests whose name contains this.
T ?=
# Only these benches.
BENCH ?=
# Only the tests on a cluster that `make test` runs, too.
SHORT ?=
# How often tests that try their luck do so.
ROUNDS ?= 1
# A folder with programs of an earlier build (kiln, kiln-vmm, kiln-agent, the shim), for benches to measure by turns with
# this one: RUNTIMES='kiln-old kiln'.
OLD ?=
# How long each fuzz target runs.
SECONDS ?= 60
# What else is built. With the unit tests, whose dependencies set features of what programs depend on, too, nothing that
# was compiled for them is compiled again.
BESIDE ?=

BIN := target/x86_64-unknown-linux-gnu/release
# The agent has a profile of its own (Cargo.toml says why).
AGENT := target/x86_64-unknown-linux-gnu/guest/kiln-agent
# What a node gets in /usr/local/bin, and what the tests bring along.
SHIPPED := kiln kiln-vmm containerd-shim-kiln-v2
TESTERS := kiln-e2e kiln-testprog kiln-bench kiln-floor kiln-demo kiln-vmm-hostile
put = $(foreach program,$(1),$(if $(wildcard $(BIN)/$(program)),--put $(BIN)/$(program):$(2)/$(program)))

NODE_VM = $(BIN)/kiln-node-vm --suite $(NODE) $(addprefix --part ,$(PARTS)) $(call put,$(SHIPPED),/usr/local/bin) --put $(AGENT):/usr/local/bin/kiln-agent \
    $(if $(filter k8s,$(NODE)),$(call put,kiln-k8s kiln-testprog,/usr/local/bin))
NODE_TEST = $(NODE_VM) $(call put,$(TESTERS),/opt/kiln-e2e)
RESULTS = target/e2e
# Tests that passed before their node died.
PASSED := target/e2e-passed
comma := ,
space := $() $()
quote = '$(subst ','\'',$(1))'

.PHONY: help setup build node demo test test-unit test-fuzz test-e2e test-k8s conformance bench doctor fuzz lint fmt clean-node

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what building and testing need (Debian packages, cargo-deny), once
	@e2e/node/setup-host $(if $(PARTS)$(filter k8s,$(NODE)),go)
	@e2e/setup-tools

build: setup ## Build everything
	@cargo build --release --workspace --bins $(BESIDE)
	@cargo build --profile guest --package kiln-agent

node: build ## Boot the node VM and run CMD='…' in it, or a shell
	@$(NODE_VM) $(if $(CMD),-- bash -c $(call quote,$(CMD)))

demo: build ## Start a pod in the node VM and show its timeline (NODE=k8s: by kubectl)
	@$(NODE_TEST) --timeout 1200 -- /opt/kiln-e2e/kiln-demo $(RUNTIMES)

test: setup ## Run every test: lints, unit tests and fuzz targets here, end-to-end tests in the node VM
	@mkdir -p target
	@set -o pipefail; { $(MAKE) --no-print-directory lint && \
	    $(MAKE) --no-print-directory test-unit && \
	    $(MAKE) --no-print-directory test-fuzz && \
	    $(MAKE) --no-print-directory test-e2e BESIDE=--tests && \
	    $(MAKE) --no-print-directory test-k8s BESIDE=--tests SHORT=1; } 2>&1 | tee target/test.log; \
	    status=$$?; e2e/count-tests target/test.log; exit $$status

test-unit: setup ## Run the unit tests
	@cargo test --release --workspace --no-fail-fast

test-fuzz: setup ## Fuzz what reads a guest's words or saved memory, each target for five seconds
	@vmm/fuzz/run 5
	@images/store/packs/fuzz/run 5

test-e2e: build ## Run the end-to-end tests (T=… selects)
	@rm -rf $(RESULTS); mkdir -p target; : > $(PASSED)
	@set -o pipefail; \
	run() { $(NODE_TEST) --timeout 4200 --get /var/log/kiln-e2e:$(RESULTS) --env KILN_E2E_OUT=/var/log/kiln-e2e \
	    --put $(PASSED):/opt/kiln-e2e/passed --env KILN_E2E_PASSED=/opt/kiln-e2e/passed --env KILN_E2E_ROUNDS=$(ROUNDS) \
	    --env KILN_E2E_RUNTIMES=$(subst $(space),$(comma),$(RUNTIMES)) -- /opt/kiln-e2e/kiln-e2e $(T) \
	    | tee target/e2e.log; }; \
	status=0; run || status=$$?; \
	if [ $$status -eq 126 ]; then \
	    echo "the node itself died, which an emulated one does now and then (docs/node.md): the tests that it had left, in a new one"; \
	    awk '/^test .* ok$$/ { print $$2 }' target/e2e.log > $(PASSED); \
	    status=0; run || status=$$?; \
	fi; \
	[ $$status -eq 0 ] || echo "logs of failed tests: $(RESULTS)"; exit $$status

test-k8s: override NODE := k8s
# What is older, for the tests of upgrades.
test-k8s: override PARTS += $(if $(SHORT),,containerd-1.7 containerd-2.1 kubelet-1.35)
test-k8s: build ## Run the tests on a Kubernetes cluster in the node VM (T=… selects)
	@run() { rm -rf target/k8s; $(NODE_VM) --timeout 5000 \
	    --get /var/log/kiln-e2e:target/k8s --get /var/log/k8s:target/k8s/cluster --env KILN_E2E_OUT=/var/log/kiln-e2e \
	    --env KILN_E2E_RUNTIMES=$(subst $(space),$(comma),$(RUNTIMES)) --env KILN_E2E_SHORT=$(SHORT) -- kiln-k8s test $(T); }; \
	status=0; run || status=$$?; \
	if [ $$status -eq 126 ]; then \
	    echo "the node itself died, which an emulated one does now and then (docs/node.md): all of it again, in a new one"; \
	    status=0; run || status=$$?; \
	fi; \
	[ $$status -eq 0 ] || echo "logs of failed tests, and of the cluster: target/k8s"; exit $$status

conformance: override NODE := k8s
conformance: override PARTS += suite-images
conformance: build ## Run critest with kiln and runc (T=… selects an area); goes on where it stopped, writes target/conformance
	@results=target/conformance/$$(git describe --always --dirty); mkdir -p $$results; \
	$(NODE_VM) --timeout 10000 --put $$results:/var/lib/kiln-conformance --get /var/lib/kiln-conformance:$$results \
	    -- kiln-k8s conformance --results /var/lib/kiln-conformance $(if $(T),--area $(call quote,$(T))) $(if $(filter command,$(origin RUNTIMES)),$(addprefix --runtime ,$(RUNTIMES))); \
	$(BIN)/kiln-k8s judge $$results e2e/k8s/exceptions.toml

bench: build ## Run the benches on the counted clock (BENCH=… selects); writes target/bench
	@mkdir -p target/bench
	@e2e/bench/pack-qemu target/qemu
	@$(NODE_TEST) --clock counted --timeout 7200 --put target/qemu:/opt/kiln-e2e/qemu --get /var/log/kiln-bench:target/bench \
	    --env KILN_E2E_RUNTIMES=$(subst $(space),$(comma),$(RUNTIMES)) \
	    $(if $(OLD),--put $(OLD):/opt/kiln-old) --env KILN_COMMIT=$$(git describe --always --dirty) \
	    --env KILN_MACHINE="$$(nproc) cores, $$(uname -m), node VM on the counted clock" \
	    -- /opt/kiln-e2e/kiln-bench --out /var/log/kiln-bench $(BENCH)

doctor: build ## Say what this machine can do
	@$(BIN)/kiln doctor

fuzz: setup ## Fuzz what reads a guest's words or saved memory, each target for SECONDS (60)
	@vmm/fuzz/run $(SECONDS)
	@images/store/packs/fuzz/run $(SECONDS)

lint: setup ## Formatting, lints and dependencies, as strict as they are meant
	@cargo fmt --all --check
	@cargo clippy --release --workspace --all-targets -- -D warnings
	@cargo deny --log-level error check licenses bans sources

fmt: ## Format the code
	@cargo fmt --all

clean-node: ## Remove the cached node images and parts
	@cache="$${KILN_CACHE:-$${XDG_CACHE_HOME:-$$HOME/.cache}/kiln}"; rm -rf "$$cache/node" "$$cache/parts"
