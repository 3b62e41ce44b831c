# `make help` lists what there is. Every goal installs and builds what it needs, and is safe to repeat.

SHELL := /bin/bash
.DEFAULT_GOAL := help

# Which Debian the node VM runs: trixie (containerd 1.7) or sid (containerd 2.x).
NODE ?= trixie

BIN := target/x86_64-unknown-linux-gnu/release
STAMPS := target/.stamps

# What a node gets in /usr/local/bin.
SHIPPED := kiln kiln-vmm kiln-agent containerd-shim-kiln-v2
NODE_VM := $(BIN)/kiln-node-vm --suite $(NODE)
PUT_SHIPPED = $(foreach program,$(SHIPPED),$(if $(wildcard $(BIN)/$(program)),--put $(BIN)/$(program):/usr/local/bin/$(program)))

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install what building and testing need (Debian packages), once
	@e2e/node/setup-host

.PHONY: build
build: setup ## Build everything
	@cargo build --release --workspace --bins

.PHONY: node
node: build ## Boot the node VM and run CMD='…' in it, or a shell
	@$(NODE_VM) $(PUT_SHIPPED) -- $(if $(CMD),bash -c $(call quote,$(CMD)))

quote = '$(subst ','\'',$(1))'
