# make serve   installs what is needed and serves the demo model on port 8000 (PORT=, HOST=, MODEL=)
# make test    installs the test extras and runs the tests
# make check   format, lint, types, tests: what CI runs
# make image-test   builds the container image without an engine and tries it; needs root, buildah
# make story   trains in three stages, as CPM-2: Chinese, bilingual, mixture of experts (minutes)
# make bench   speed of the demo model against a baseline and the memory bandwidth
#
# torch is installed first and pinned, so that nothing else chooses another build. On Linux the default
# build carries CUDA; for a machine without a GPU, TORCH_INDEX= names PyTorch's index of CPU builds.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= models/demo
TORCH_INDEX ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: serve test check lint bench test-ray image-test story clean

serve: $(VENV)/.serve
	$(BIN)/infmoe serve $(MODEL) --host $(HOST) --port $(PORT)

test: $(VENV)/.test $(VENV)/.clients $(VENV)/.deploy
	NODE_PATH=$(abspath $(VENV))/node/node_modules $(BIN)/python -m pytest

lint: $(VENV)/.test $(VENV)/.clients
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test

bench: $(VENV)/.serve
	$(BIN)/infmoe bench $(MODEL)

# On a Ray of its own; minutes, so not a part of `test`.
test-ray: $(VENV)/.ray
	$(BIN)/python -m pytest tests/test_server_ray.py tests/test_server_ray_calls.py

image-test:
	docker/test-image.sh || test $$? -eq 77

story: $(VENV)/.serve
	test -f data/demo/vocab.txt || $(BIN)/infmoe corpus data/demo
	$(BIN)/infmoe story training/recipes/story --out runs/story

clean:
	rm -rf $(VENV)

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed; PYTHON= names one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	$(PIP) -c constraints.txt -e .
	touch $@

$(VENV)/.test: $(VENV)/.serve
	$(PIP) -c constraints.txt -e ".[test]"
	touch $@

# Clients that people use, for tests/test_clients.py; the one in JavaScript only where npm is there.
$(VENV)/.clients: $(VENV)/.test
	$(PIP) -c constraints.txt -e ".[clients]"
	! command -v npm >/dev/null || npm install --silent --no-save --prefix $(VENV)/node openai@6
	touch $@

$(VENV)/.ray: $(VENV)/.test
	$(PIP) -c constraints.txt -e ".[ray]"
	touch $@

# What checks the files of docker/; Debian's prometheus has two more, without which tests are skipped.
$(VENV)/.deploy: $(VENV)/.test
	$(PIP) -c constraints.txt -e ".[deploy]"
	touch $@
