# Everything from a bare checkout: `make demo`. The first call makes .venv and installs into it; later calls only check.
PYTHON ?= python3
PYTEST_ARGS ?=
TEST_WORKERS ?= 2
FUZZ_SECONDS ?= 600

BIN := .venv/bin
STAMP := .venv/.pgolf-installed
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test test-slow docs fuzz lint bench install clean

demo: install
	$(BIN)/pgolf demo

# One file of tests stays in one process (--dist loadfile), so that each module fixture is made once.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

test: install
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

# What is long by nature, and the documentation site.
test-slow: install docs
	$(PYTEST) -m slow $(PYTEST_ARGS)

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --site-dir build/site

# Damaged input for the C++ codecs, FUZZ_SECONDS in all, with libFuzzer where clang++ has it. A driver that fails says
# how to run the input again that made it fail.
fuzz:
	$(MAKE) -C tests/csrc run SECONDS=$$(($(FUZZ_SECONDS) / $(words $(filter-out %main.cpp %libfuzzer.cpp,$(wildcard tests/csrc/fuzz_*.cpp)))))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest benchmarks/bench_ops.py benchmarks/bench_codec.py --benchmark-only $(PYTEST_ARGS)

install: $(STAMP)

# torch comes first and alone, so that a torch that is already there (a CPU build, say) is kept.
# The build tools are installed too: without build isolation an unchanged extension is not compiled again.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv || { \
		echo "cannot make .venv with $(PYTHON): install its venv module (on Debian: python3-venv), or set PYTHON" >&2; exit 1; }
	@echo "installing pgolf-fast into .venv (torch may be a download of gigabytes)"
	@$(PIP) torch
	@$(PIP) setuptools pybind11 ninja
	@$(PIP) --no-build-isolation -e ".[all]"
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f pgolf_fast/_C.*.so
