# Everything a newcomer or a CI needs. The first target that needs it makes .venv from the lock file.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest
SETUP := $(VENV)/.installed

.PHONY: quickstart test test-all check format lock clean

quickstart: $(SETUP)  ## the whole pipeline on the text that this machine's Python brings along
	$(BIN)/tdro run quickstart

check: $(SETUP)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: $(SETUP)  ## unit and short integration tests, no network
	$(PYTEST) -m "not long and not gpu"

test-all: $(SETUP)  ## the long integration tests, and those that need a GPU where there is one
	$(PYTEST) -m "long or gpu" --timeout 1800

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamp is written last: an installation that was cut short is done again.
$(SETUP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing what requirements.lock names into $(VENV): about two minutes …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps -e .
	@touch $@

# torch is pinned without its local version (+cpu, +cu13), so that the lock installs from any index. pip stays what it is.
lock: $(SETUP)
	echo 'torch==2.13.0' > $(VENV)/constraints.txt
	$(BIN)/pip-compile --quiet --strip-extras --allow-unsafe --no-annotate --no-header \
	  --no-emit-index-url --no-emit-find-links --no-emit-options \
	  --extra cpu,train,serve,onnx,dev --constraint $(VENV)/constraints.txt --output-file $(VENV)/lock.txt pyproject.toml
	{ echo '# Everything for Python 3.11 on a CPU, extras cpu, train, serve, onnx, dev. Made by `make lock`.'; \
	  sed -E -e '/^(#|pip==|$$)/d' -e 's/^(torch==[0-9.]+)\+.*/\1/' $(VENV)/lock.txt; } > requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
