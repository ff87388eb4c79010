# Kumiki: `make repro` and `make test` are all a fresh machine with Python >= 3.11 and git needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
PYTEST := python -m pytest -q -n auto -m "not gpu and not slow and not faults"
# make repro TORCH_INDEX=<index> adds a package index, for example one with CPU-only torch wheels.
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

# Bytecode is made of what is imported, when it is: all of it takes longer than the installation.
# Where it may not be written (as in many containers) every stage would compile torch anew, 1 s.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/python -m pip install --quiet --no-compile $(PIP_INDEX) -c constraints.txt

E = dvc exp run -S profile=

.PHONY: repro test test-interpret test-aot triton check gate dag setup tools faults faults-sample clean-state format

repro: setup  ## the whole pipeline with the default parameters, then the leaderboard
	dvc repro
	kumiki report

test: tools  ## all tests that need no accelerator, one process a core
	$(PYTEST)

test-interpret: triton  ## Triton kernels, interpreted on the CPU (ALL=1: with what takes minutes)
	TRITON_INTERPRET=1 python -m pytest -q -n auto $(if $(ALL),,-m "not slow") \
	  tests/kernels/test_interpret.py tests/kernels/test_broken.py tests/kernels/test_golden.py

test-aot: triton  ## Triton kernels, compiled for GPUs without one (ALL=1: all targets and tiles)
	env -u TRITON_INTERPRET KUMIKI_TEST_AOT=1 \
	  python -m pytest -q -n auto $(if $(ALL),,-m "not slow") tests/kernels/test_aot.py

triton: tools
	@python -c 'from lib.core.kernel_choice import missing; raise SystemExit(bool(missing()))' || \
	  $(PIP) -e '.[triton]'

check: tools gate  ## what every change passes: lint, types, parameters, DAG, tests
	ruff check .
	ruff format --check .
	pyright
	$(PYTEST)

gate: setup  ## dvc.yaml and dvc.lock in step with the code
	python -m lib.core.params --check
	python -m lib.core.dag --check
	@out=$$(dvc repro --dry --allow-missing 2>&1) || { echo "$$out" >&2; exit 1; }; \
	case "$$out" in *"Running stage"*) \
	  echo "error: dvc.lock is not in step; run make repro and commit it" >&2; \
	  echo "$$out" | grep "Running stage" >&2; exit 1;; esac

dag: setup  ## write the code dependencies into dvc.yaml
	python -m lib.core.dag --write

format: tools
	ruff check --fix .
	ruff format .

FAULTS := .kumiki-faults
faults: tools  ## the whole fault catalogue, every crash point; writes docs/reliability.md
	rm -f $(FAULTS).jsonl
	OMP_NUM_THREADS=1 KUMIKI_FAULTS_EVERY=1 KUMIKI_FAULTS_REPORT=$(CURDIR)/$(FAULTS).jsonl \
	  python -m pytest -q -n auto --dist worksteal --durations=40 --junitxml $(FAULTS).xml \
	  $$(python -m tests.faults.catalogue)
	python -m tests.faults.catalogue $(FAULTS).jsonl $(FAULTS).xml

faults-sample: tools  ## a fixed sample of it, minutes
	OMP_NUM_THREADS=1 python -m pytest -q -n auto --dist loadfile --durations=10 -m faults tests

clean-state:  ## forget all working state and scratch; then `dvc repro -f` recomputes everything
	rm -rf data/work checkpoints/*/work scratch

# ---- one line for each command of the published guides; docs/commands.md has the table

.PHONY: setup-disk cvfp-data cvfp-ultrachat cvfp-phase2 check-phase7-env recipe data-lite
.PHONY: train-phase7-1.5b train-phase7-1.5b-test train-phase7-1.5b-resume train-phase7-small
.PHONY: train-phase8 chat-phase7-1.5b bench-phase7-1.5b bench-phase8-vs-phase7 triton-attn
.PHONY: verify-phase7 ramgpt-micro ramgpt-1b ramgpt-0p1b push generate evaluate trm-extract
.PHONY: trm-tokenizer trm-ja nanochat-d20

setup-disk: setup  ## how DVC links its cache: hard links where the file system has no reflinks
	@case "$$(stat -f -c %T .)" in \
	  xfs|btrfs) echo "reflinks: nothing to set";; \
	  *) dvc config --local cache.type hardlink,symlink && echo "cache.type hardlink,symlink";; esac

cvfp-data: setup
	$(E)cvfp_ultrachat precompute_embeddings

cvfp-ultrachat: setup
	$(E)cvfp_ultrachat train_phase1_cvfp

cvfp-phase2: setup
	$(E)cvfp_ultrachat train_phase2_cvfp

check-phase7-env: setup
	kumiki doctor --family phase7

verify-phase7: setup
	kumiki doctor --family phase7 --full

triton-attn: setup
	kumiki doctor --family phase7 --kernels

recipe: setup
	@if [ -t 0 ]; then set -x; kumiki recipe --ask; else set -x; kumiki recipe; fi

data-lite: setup
	dvc repro encode_tokens

train-phase7-1.5b: setup
	$(E)phase7_1p5b train_phase7

train-phase7-1.5b-test: setup
	$(E)micro_test train_phase7

train-phase7-1.5b-resume: setup
	@case "$(CHECKPOINT)" in ""|checkpoints/phase7/work/*/step_*) ;; \
	  *) echo "error: not a checkpoint of this run: $(CHECKPOINT); leave CHECKPOINT out" >&2; exit 2;; esac
	@test -z "$(CHECKPOINT)" || test -f "$(CHECKPOINT)/manifest.json" || \
	  { echo "error: no checkpoint: $(CHECKPOINT); leave CHECKPOINT out" >&2; exit 2; }
	$(E)phase7_1p5b train_phase7

train-phase7-small: setup
	$(E)phase7_small train_phase7

train-phase8: setup
	$(E)phase8_1p5b train_phase8

chat-phase7-1.5b: setup
	kumiki chat $(if $(CHECKPOINT),$(CHECKPOINT),phase7)

bench-phase7-1.5b: setup
	kumiki bench --largest phase7

bench-phase8-vs-phase7: setup
	kumiki bench phase7 phase8

ramgpt-micro: setup
	$(E)micro_test train_ramgpt

ramgpt-1b: setup
	$(E)ramgpt_1b train_ramgpt

ramgpt-0p1b: setup
	$(E)ramgpt_0p1b train_ramgpt

trm-extract: setup
	$(E)trm_ja extract_texts

trm-tokenizer: setup
	$(E)trm_ja train_tokenizer@spm

trm-ja: setup
	$(E)trm_ja train_trm

nanochat-d20: setup
	KUMIKI_LAUNCHER=torchrun KUMIKI_NPROC=8 $(E)nanochat_d20 train_gpt

push: setup
	kumiki push $(RUN)

generate: setup
	kumiki generate $(RUN)

evaluate: setup
	dvc repro evaluate@$(RUN)

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python >= 3.11 is needed; make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "error: no venv module; install it (Debian: python3-venv)" >&2; exit 4; }
	$(PIP) -e .
	@touch $@

tools: $(VENV)/.tools  ## and what tests, lint and types need

$(VENV)/.tools: $(VENV)/.ready
	$(PIP) -e '.[test]'
	@touch $@
