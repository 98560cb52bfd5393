# One command for each thing people do every day. The first one that needs it sets up .venv.
PYTHON ?= python3
BIN := .venv/bin
# A CPU wheel of this version, where there is one at hand, spares gigabytes of CUDA; `make TORCH=torch …` takes any other.
TORCH ?= torch==2.13.0

.PHONY: demo test lint format clean

.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install --quiet '$(TORCH)'
	$(BIN)/pip install --quiet -e '.[demo,dev]'
	touch $@

demo: .venv/installed
	GRPC_VERBOSITY=NONE $(BIN)/python examples/demo.py

test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --durations 15

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-milvus build demo_output *.egg-info
