# `make` alone lists the targets.
PYTHON ?= python3.11
PROFILE ?= laptop
# Where the book and its sources are published, e.g. SITE=https://me.github.io/REPO REPOSITORY=https://github.com/me/REPO.
SITE ?=
REPOSITORY ?=
export ADAPTIVE_MARGINS_SITE := $(or $(SITE),$(ADAPTIVE_MARGINS_SITE))
export ADAPTIVE_MARGINS_REPOSITORY := $(or $(REPOSITORY),$(ADAPTIVE_MARGINS_REPOSITORY))
# ALL=1: with the chapter on the paper and the released code, which takes longer than all others.
ALL ?=
# Whose runs `make archive` packs, for everybody to read, e.g. BY="Jane Doe, Example University".
BY ?=
# More arguments for pip, e.g. PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu" for torch without CUDA.
PIP_ARGS ?=
# More arguments for pytest, e.g. TESTS="tests/test_losses.py -x", and how many tests run at a time.
TESTS ?=
WORKERS ?= 2

BIN := .venv/bin
STAMP := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help setup book publish archive test lab bench bench-full gpu-check clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s%s\n", $$1, $$2}'
	@echo "Profile of make book: PROFILE=$(PROFILE). Python: PYTHON=$(PYTHON)."

setup: $(STAMP)  ## make .venv with the pinned versions (the targets below do this by themselves)

# The stamp is written last: an interrupted installation is taken up again.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) was not found. Python 3.11 is needed; name another one with: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), but constraints.txt is made for Python 3.11. Name it with: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments (on Debian and Ubuntu: apt install python3.11-venv)." >&2; exit 1; }
	$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt $(PIP_ARGS) -e '.[cpu,lab,dev,onnx]'
	@touch $@

book: $(STAMP)  ## run what is missing, execute the notebooks and build the book
	$(BIN)/adaptive-margins reproduce --profile $(PROFILE) $(if $(ALL),--all)

publish: book  ## build the book, check it, and archive it in _build/
	$(BIN)/python -m adaptive_margins.book.publish

archive: $(STAMP)  ## write one archive of the finished runs and the book, for others to start from
	$(BIN)/python benchmarks/export_runs.py --profile $(PROFILE) --by "$(BY)"

test: $(STAMP)  ## run the tests
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lab: $(STAMP)  ## open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=notebooks

bench: $(STAMP)  ## time training, encoding and the loss against Sentence Transformers (10 minutes)
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/pages.py

bench-full: $(STAMP)  ## time a large encoder, reranking, memory, and how things grow (an hour)
	$(BIN)/python benchmarks/run.py --parts rerank large memory growth index
	$(BIN)/python benchmarks/pages.py

gpu-check: $(STAMP)  ## check that a CUDA GPU computes correctly, how fast, and how long paper would take (8 minutes)
	$(BIN)/adaptive-margins check-gpu

clean:  ## remove the built book and caches of tools; keeps .venv, runs/, collections/ and cache/
	rm -rf _build book/_executed .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
