# Everything starts from a bare python3 >= 3.11; nothing needs to be installed before.
#   make test    set up .venv, then the whole test suite
#   make bench   set up .venv, then the block-count benchmark (table, results/blocks.json, results/blocks.png)
#   make lint    ruff, pyright, clang-format
# The torch that is installed can be named: make test TORCH="torch==2.13.0 --index-url URL" (see README, Install).

PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin
CSRC := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.cpp)

.PHONY: test bench lint format clean
test: .venv/built
	$(BIN)/python -m pytest

bench: .venv/built
	$(BIN)/ejmp bench --precision fp32 --seconds 90 --output results/blocks.json

lint: .venv/built
	$(BIN)/pip install --quiet --editable .[dev] --no-build-isolation
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/built
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/clang-format -i $(CSRC)

# Third-party packages: needs the network once, and again only when pyproject.toml changes.
.venv/installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -c "import sys; assert sys.version_info >= (3, 11), 'ejmp needs Python 3.11 or newer'"
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH) "setuptools>=77"
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --editable .[test]
	touch $@

# The C++ extension: no network; without a compiler the package stays in plain torch and says so.
.venv/built: .venv/installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

clean:
	rm -rf .venv build results *.egg-info kernels/ejmp_kernels/_C*.so
