# maskwire: `make demo` and `make test` need nothing but Python 3.11.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 3
# What is imported is compiled once, and not in every process: importing torch takes half as long then.
unexport PYTHONDONTWRITEBYTECODE
SOURCES := client server demo deploy proto tests

.PHONY: help venv demo test lint proto docs image bench model robustness
help: ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

venv: ## Set up .venv with everything (TORCH_INDEX=URL takes torch from another index)
	@$(PYTHON) deploy/venv.py

demo: venv ## Train on real text through a real server, kill it, resume; about 3 minutes
	@$(BIN)/python -m demo

# A test that exceeds its time limit fails and the run continues. One that cannot even be interrupted ends its
# worker after ten minutes, and another takes its place. Three workers are 8% faster than two on two cores, because
# they often wait for other processes. None may spin on a core, and each computes in one thread unless a test says
# otherwise. tests/conftest.py says which files come first.
test: venv ## The whole test suite, in three processes (WORKERS=N)
	@OMP_WAIT_POLICY=passive OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	  --no-loadscope-reorder -o faulthandler_exit_on_timeout=true

lint: venv ## Check style, types, and that generated files are current
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --num-workers $(WORKERS)
	$(BIN)/python proto/generate.py --check
	$(BIN)/python docs/generate.py --check
	@if command -v buf >/dev/null; then cd proto && buf lint && buf format --diff --exit-code; \
	else echo "buf is not installed: the proto was not linted (npm install -g @bufbuild/buf)"; fi

bench: venv ## The tables of docs/benchmarks.md; about half an hour (QUICK=1: 5 minutes, writes no file)
	@$(BIN)/python -m bench $(if $(QUICK),--quick)

model: venv ## Compare engine and journal with a small model: 10,000 random runs of 50 operations
	@MASKWIRE_MODEL_RUNS=10000 MASKWIRE_MODEL_STEPS=50 $(BIN)/python -m pytest tests/robustness --timeout 0 -o faulthandler_timeout=0

robustness: venv ## Inject faults, write docs/robustness.md (FULL=1, ONLY="R1 R4"); resumes where it stopped
	@PYTHONPATH=tests:. $(BIN)/python -m robustness $(ONLY) $(if $(FULL),--full)

docs: venv ## Generate the reference pages, run all tutorials, and build the site into docs/_site
	$(BIN)/python docs/generate.py
	@MASKWIRE_TUTORIALS=1 $(BIN)/python -m pytest -q tests/rpc/test_tutorials.py -o faulthandler_timeout=0
	@$(PYTHON) deploy/venv.py docs
	@$(BIN)/python docs/website/build.py

proto: venv ## Generate the stubs from the proto files
	$(BIN)/python proto/generate.py

image: venv ## Build the image and test it: read-only, TLS, a token, a kill, compose (needs Docker)
	@deploy/image.sh
