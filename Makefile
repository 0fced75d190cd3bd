# Two commands set everything up: `make demo` and `make test`. Needs Python 3.11, make and git.
.DEFAULT_GOAL := help
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3.11
WORKERS ?= 2
BIN := .venv/bin
PINNED := .venv/.pinned
READY := .venv/.ready

# Waiting threads sleep instead of spinning: on few cores that halves the time of everything that runs side by side.
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Real data sets that lie beside the checkout are used; without them the tests that need them are skipped by name.
ifndef ECOMREC_DATA
ifneq ($(wildcard ../shared/data),)
export ECOMREC_DATA := $(abspath ../shared/data)
endif
endif
# One thread per process where several processes run.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMEXPR_NUM_THREADS=1

.PHONY: help demo test docs lab notebooks system soak bench clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Nothing is installed twice: a stamp is older than its files only when one of them changed. The pins are the complete set, so pip
# need not search for one that fits, and it need not compile modules that nobody imports; `pip check` has the last word.
$(PINNED): constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "ecomrec needs Python 3.11 and found no $(PYTHON); name yours with: make $(or $(MAKECMDGOALS),demo) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv (about 3 GB, some minutes; only this once)"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --no-compile --no-deps -r constraints.txt
	@touch $@

$(READY): $(PINNED) settings.ini setup.py
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@touch $@

demo: $(READY) ## Run the whole loop on the bundled shop: logs, cleaning, training, pages, feedback (minutes)
	@run=$$(HF_HUB_OFFLINE=1 $(BIN)/ecomrec run closed_loop -f nbs/experiments/closed_loop.demo.yaml | tail -n 1); \
	echo; echo "The report: $$run/report.html"

test: $(READY) ## Run every notebook, every test and the docs with their browser test
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS)

docs: $(READY) ## Build the docs site into _site/
	HF_HUB_OFFLINE=1 $(BIN)/python nbs/_docs/build.py _site
	@echo "The site: file://$(CURDIR)/_site/index.html"

lab: $(READY) ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/nbs/tutorials/start_here.ipynb

notebooks: $(READY) ## Export, execute every notebook on a fresh kernel, store its outputs, write README.md
	$(BIN)/nbdev_export
	HF_HUB_OFFLINE=1 $(BIN)/python nbs/_tools/notebooks.py $(NB)
	$(BIN)/python nbs/_tools/readme.py

system: ## Install the Debian packages that tests and benchmarks need: chromium, fonts-noto-cjk, postgresql, wrk
	@missing=""; \
	command -v chromium >/dev/null || missing="chromium"; \
	fc-list 2>/dev/null | grep -i "noto.*cjk" >/dev/null || missing="$$missing fonts-noto-cjk"; \
	{ command -v postgres || ls /usr/lib/postgresql/*/bin/postgres; } >/dev/null 2>&1 || missing="$$missing postgresql"; \
	command -v wrk >/dev/null || missing="$$missing wrk"; \
	if [ -z "$$missing" ]; then echo "system: chromium, fonts-noto-cjk, postgresql and wrk are there, nothing to install"; exit 0; fi; \
	if ! command -v apt-get >/dev/null; then echo "system: this is no Debian; install yourself what tests and benchmarks will otherwise skip:" $$missing; exit 0; fi; \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo"; \
	echo "system: installing with $$sudo apt-get:" $$missing; \
	$$sudo apt-get update -qq; \
	$$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends fontconfig $$missing </dev/null

soak: $(READY) ## Run the long tests: the slow ones, and the property tests with many more examples
	$(ONE_THREAD) HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=soak $(BIN)/python -m pytest -n $(WORKERS) -m "slow or not slow"

bench: $(READY) ## Measure how fast this machine trains, keeps and serves; the numbers go to tests/benchmarks/results/ (minutes)
	@for script in tests/benchmarks/*.py; do $(BIN)/python "$$script"; done

clean: ## Remove what can be built again; .venv and runs/ stay
	rm -rf _site build dist .cache .pytest_cache .hypothesis .jupyter_cache
	find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf
