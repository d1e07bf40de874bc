# `make demo` and `make test` each go from a bare checkout to their result: they make the environment when it is missing.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo

DEVICE  := $(if $(shell nvidia-smi -L 2>/dev/null),gpu,cpu)
SOURCES := pyproject.toml CMakeLists.txt constraints.txt $(shell find kernels engine bench -type f -not -name '*.pyc')
BIN     := $(VENV)/bin
PIP     := $(BIN)/pip --disable-pip-version-check

.PHONY: demo test test-draws test-slow test-clusters crash test-gpu kernels lint browser figures tables bench-gpu sanitize clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.alure  ## the whole chain on a synthetic ads world: writes demo/report.html
	$(BIN)/alure demo --out $(OUT)

test: $(VENV)/.alure-dev lint  ## ruff, mypy and the default test suite
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n $$(nproc) --dist worksteal -q -rs

test-draws: $(VENV)/.alure-dev  ## the default tests on draws that hypothesis has not made before
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/pytest -n $$(nproc) --dist worksteal -q --hypothesis-profile anew

test-slow: $(VENV)/.alure-dev  ## the long tests
	$(BIN)/pytest -m slow -q

test-clusters: $(VENV)/.alure-dev  ## the refresh on real Ray and real Spark, workers killed under way, and the examples of both
	command -v java >/dev/null || (apt-get update -qq && apt-get install -y --no-install-recommends openjdk-17-jre-headless)
	$(PIP) install --quiet -c constraints.txt ray "pyspark[sql]" "pandas<3"
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -q -rs $(FLAGS) tests/engine/test_clusters.py

crash: $(VENV)/.alure-dev  ## for the night: 1,000 kills of a refresh, and every file operation with every fault
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow or not slow" -n $$(nproc) --dist worksteal -q -rs tests/engine/test_crash.py

test-gpu: $(VENV)/.alure-dev  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu -q -rs -n 8 --dist worksteal

kernels: $(VENV)/.alure-dev  ## every Triton kernel compiled for A100, H100 and B200, no GPU needed; against its budget
	$(BIN)/python -m alure.bench.ahead_of_time --budget bench/ahead_of_time/budget.json $(FLAGS)

lint: $(VENV)/.alure-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -p alure

browser:  ## Chromium, which the report's test opens the report in (Debian, Ubuntu)
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y --no-install-recommends chromium)

figures: demo  ## the README's figures: the demo's, and the attention race on this machine
	mkdir -p docs && cp $(OUT)/overview.svg docs/overview.svg
	$(BIN)/alure bench attention --plot docs/attention.svg

tables: $(VENV)/.alure-dev  ## docs/quality.md: runs what has no result yet; DATA is the folder with the data sets
	$(BIN)/python -m alure.bench.quality all $(if $(DATA),--data "$(DATA)")

# 150 s + 75 s + 247.5 s, after which `alure bench` ends itself (MOST_TIMES, SPARE_S in bench/__main__.py)
bench-gpu: $(VENV)/.alure-dev  ## on a CUDA machine, once installed in at most 8 minutes: the gpu tests, tuning, then every race, into bench/results/<device>.jsonl
	@nvidia-smi -L >/dev/null || { echo "bench-gpu: needs a CUDA device, nvidia-smi finds none" >&2; exit 2; }
	timeout -s INT -k 10 140 $(BIN)/pytest -m gpu -q -n 8 --dist worksteal --maxfail 40; tests=$$?; \
	timeout -k 5 70 $(BIN)/alure tune --minutes 0.6; \
	$(BIN)/alure bench all --minutes 2.5 --out bench/results --plot bench/results/attention-gpu.svg && exit $$tests

sanitize: $(VENV)/.alure-dev  ## the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PIP) install --quiet -c constraints.txt --no-deps --force-reinstall --config-settings=cmake.define.ALURE_SANITIZE=ON .
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/pytest -q tests/kernels/test_candidates.py tests/kernels/test_native_attention.py tests/kernels/test_native_encoding.py tests/kernels/test_native_compression.py tests/kernels/test_pagerank.py tests/kernels/test_rowwise.py tests/kernels/test_neighbors.py
	rm $(VENV)/.alure-dev

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.alure: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt ".[$(DEVICE)]"
	touch $@

$(VENV)/.alure-dev: $(SOURCES) | $(BIN)/python
	$(PIP) install --quiet -c constraints.txt ".[$(DEVICE),dev]"
	touch $@ $(VENV)/.alure
