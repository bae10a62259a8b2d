# Every target sets up what it needs first (scripts/setup: quick when nothing is missing).
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: run test build check soak fmt clean help

# Where rustup puts cargo when the shell's profile was not read again.
export PATH := $(PATH):$(HOME)/.cargo/bin
CARGO ?= cargo
export CARGO

run: ## a hub and a node on this machine, a first task, then serve until Ctrl-C (ONCE=1: end after the task)
	@scripts/setup run
	@exec scripts/run $(ARGS)

test: ## everything: check, then all tests, the end-to-end ones with real binaries
	@scripts/setup test
	@exec scripts/verify test

check: ## quick: format, lints, architecture, unit tests
	@scripts/setup build
	@exec scripts/verify check

build: ## release binaries in target/release
	@scripts/setup build
	$(CARGO) build --release --locked -p cortex-hub -p cortex-node -p cortex

soak: ## not yet: hours of load with drift of memory and descriptors
	@echo "soak: planned and not yet there" >&2; exit 2

fmt: ## format the code
	@scripts/setup build
	$(CARGO) fmt --all

clean: ## remove what was built; data folders stay
	$(CARGO) clean

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | while IFS=$$'\t' read -r target what; do printf 'make %-6s %s\n' "$$target" "$$what"; done
