# `make demo` and `make test` each set up what they need in .venv; a second run installs nothing.
SHELL := bash
PYTHON ?= python3
DEVICE ?= cpu
ifeq ($(filter $(DEVICE),cpu cuda),)
$(error DEVICE is "$(DEVICE)"; it is cpu or cuda)
endif

BIN := .venv/bin
PIP := $(BIN)/python -m pip
# One stamp for each device and state of the pins: another device makes .venv anew, other pins update it.
STAMP := .venv/.installed-$(DEVICE)-$(shell cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16
	@echo
	@echo "  DEVICE=cuda     for a GPU (cpu otherwise); PYTHON=python3.11 to choose the Python, 3.10 to 3.12"

.PHONY: demo
demo: $(STAMP) ## train, search, slim and retrain on real flights; write a report (minutes)
	@[ -e data/flights/schema.json ] || $(BIN)/sseds prepare flights --output data/flights
	@$(BIN)/sseds run configs/flights_deepfm.yaml device=$(DEVICE)
	@echo "Report: $(CURDIR)/runs/flights_deepfm/report/index.html"

.PHONY: test
test: $(STAMP) tools ## run the tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: lint
lint: $(STAMP) ## check style and types
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

.PHONY: setup
setup: $(STAMP) ## only install, into .venv

.PHONY: lock
lock: ## pin all packages anew in constraints.txt (needs uv)
	uv pip compile --quiet --universal --upgrade --python-version 3.10 --all-extras --no-annotate \
	  --no-emit-package colorama --no-emit-package pywin32 --custom-compile-command "make lock" \
	  --output-file constraints.txt pyproject.toml

.PHONY: clean
clean: ## remove .venv and caches (data/ and runs/ stay)
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torchrec asks for fbgemm-gpu, the CUDA build. On a CPU it is installed without what it asks for, which `pip check`
# then reports in one line; any other line is a fault.
KNOWN := ^torchrec [0-9.]+ requires fbgemm-gpu, which is not installed\.$$|^No broken requirements found\.$$

$(STAMP):
	@type -P $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: choose a Python with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || { \
	  echo "sseds_rec needs Python 3.10, 3.11 or 3.12, but $(PYTHON) is $$($(PYTHON) -V 2>&1): choose one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) has no venv module: install it (on Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@compgen -G '.venv/.installed-$(DEVICE)-*' >/dev/null || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/.installed-*
	@echo "Installing sseds_rec and what it needs into .venv ..."
	@$(PIP) install -qq --constraint constraints.txt --editable '.[$(DEVICE),test]'
	@$(PIP) install -qq --constraint constraints.txt --no-deps torchrec
	@! $(PIP) check | grep -vE '$(KNOWN)' >&2
	@touch $@

# Program and Debian package: tests open the report in Chromium, compile a model, and submit to a Slurm of their own.
TOOLS := chromium:chromium g++:g++ slurmctld:slurmctld slurmd:slurmd slurmdbd:slurmdbd sbatch:slurm-client \
  munged:munge mariadbd:mariadb-server

.PHONY: tools
tools: # for the tests; services are installed, but not started
	@PATH=$$PATH:/usr/sbin:/sbin; missing=(); \
	for tool in $(TOOLS); do \
	  [ -n "$$(type -P $${tool%:*})" ] || missing+=($${tool#*:}); \
	done; \
	[ -z "$$(type -P chromium-browser google-chrome google-chrome-stable)" ] || missing=($${missing[@]/chromium}); \
	if [ $${#missing[@]} = 0 ]; then :; \
	elif [ "$$(id -u)" = 0 ] && type -P apt-get >/dev/null; then \
	  echo "Installing $${missing[*]} ..."; \
	  policy=/usr/sbin/policy-rc.d; \
	  [ -e $$policy ] || { trap "rm -f $$policy" EXIT; printf '#!/bin/sh\nexit 101\n' >$$policy; chmod +x $$policy; }; \
	  apt-get -qq update && \
	  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends fonts-dejavu-core $${missing[@]} >/dev/null; \
	else echo "Not found: $${missing[*]}; install them (these are Debian's names), tests use them" >&2; fi
