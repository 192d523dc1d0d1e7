# One way to do each task. Every target sets up what it needs; `make help` lists them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_VMS ?= 4
PYTEST_ARGS ?=

.PHONY: help setup system image demo test test-kubernetes lint format bench docs models guest clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

system: build/.system ## install the system packages (apt, with sudo where needed)
build/.system: scripts/system-packages.sh
	@mkdir -p build
	@bash scripts/system-packages.sh
	@touch $@

$(VENV)/.ready: requirements/dev.txt pyproject.toml scripts/venv.sh | build/.system
	@PYTHON=$(PYTHON) bash scripts/venv.sh $(VENV)
	@touch $@

setup: build/.system $(VENV)/.ready ## system packages and the virtual environment

models: setup ## build the catalogue's models from packages
	@$(BIN)/remora models build --all

guest: setup ## build the guest OS image
	@$(BIN)/remora image guest

image: setup ## build the agent's container image, without a registry: build/remora-agent.tar
	@$(BIN)/python scripts/agent_image.py

demo: setup ## microVMs classify real photographs on the host's accelerator
	@$(BIN)/python examples/classify/demo.py --vms $(DEMO_VMS)

lint: setup ## formatting, lint, types, import layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: setup ## put the sources in order
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

test: lint models guest ## every check: lint, unit, contract, integration, end to end with real microVMs
	@$(BIN)/pytest $(PYTEST_ARGS)

test-kubernetes: $(if $(KUBECONFIG),setup,models guest image) ## the same on a real Kubernetes: KUBECONFIG's, or one built once from its modules (long)
	@REMORA_TEST_KUBERNETES=1 $(BIN)/pytest $(PYTEST_ARGS) tests/kubernetes

bench: setup models ## measure against named yardsticks, JSON out
	@$(BIN)/remora bench --output build/bench.json

docs: setup ## check the documentation: links, command help, glossary
	@$(BIN)/python scripts/check_docs.py

clean: ## remove what the build made in this folder (models and images elsewhere stay)
	rm -rf build .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
