# Everything starts from a bare python3 >= 3.11; nothing needs to be installed before.
#   make test    set up .venv, then the whole test suite
#   make quick   set up .venv, then what shows most in under 3 minutes: golden outputs, ops on the CPU, a training step,
#                a conversion
#   make slow    the tests too long for every day: all truncations and bit flips of a shard, 200 killed conversions
#   make bench   set up .venv, then the block-count benchmark (table, results/blocks.json, results/blocks.png)
#   make track   is this tree slower than a commit? make track BASE=main (docs/tracking.md; results/track.md)
#   make fuzz    100,000 damaged sources for every reader (hours; nightly)
#   make attack  1,100,000 calls of the ops with what they must not be called with, hostile files, and 300 trainings that
#                are ended, damaged or left without a disk at any moment (an hour; nightly)
#   make sanitize the tests of ops and graphs and 1,000,000 such calls with AddressSanitizer and UndefinedBehaviorSanitizer
#   make demo    set up .venv, then the paper's Table 1 on small data: pruning, distillation, controls (runs/demo)
#   make gpu     with a GPU and only torch, triton, numpy and pytest: build, test, measure; benchmarks/results/<gpu>/
#                (its steps apart: make gpu-build gpu-test gpu-ops ...; BUDGET=SECONDS for longer, RESULTS=FOLDER for elsewhere;
#                golden tests want a copy of ../shared/golden in shared/, which git ignores)
#   make gpu-dry the same without a GPU, tiny and interpreted: proves the command (build/gpu-dry/)
#   make gpu-like without a GPU but with nvcc 13 (CUDA_HOME): a venv with torch 2.11 for CUDA 13 and Triton 3.6 (4 GB from
#                PyPI, once), in which the extension is built with its CUDA half, Triton's kernels are compiled for sm_90,
#                and gpu-dry runs (build/gpu-like/)
#   make lint    ruff, pyright, clang-format
# The torch to install can be named: make test TORCH="torch==2.13.0 --index-url URL" (see README, Install);
# `make clean` first, to change it later.

PYTHON ?= python3
BASE ?= HEAD
TORCH ?= torch==2.13.0
BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CSRC := $(foreach kind,h cpp cu cuh,$(wildcard csrc/*.$(kind) csrc/*/*.$(kind)))

# The GPU's targets take the python3 that has torch for it, not .venv, and install nothing.
GPU := PYTHONPATH=.:kernels:benchmarks $(PYTHON) benchmarks/gpu_campaign.py
GPU_STEPS := $(addprefix gpu-,build test sanitize ceilings ops chain blocks compare compiled train tune profile report)
GPU_OPTIONS = $(if $(RESULTS),--out $(RESULTS)) $(if $(BUDGET),--seconds $(BUDGET))

QUICK := -k "not triton" tests/model/test_golden.py tests/kernels/test_ops.py tests/train/test_engine.py tests/data/test_convert.py

.PHONY: test quick slow fuzz attack sanitize bench track demo gpu gpu-dry gpu-like $(GPU_STEPS) lint format clean
# A file of tests per process, as many at a time as there are cores, with one thread each.
test: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder

quick: .venv/built
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --dist loadfile --no-loadscope-reorder $(QUICK)

slow: .venv/built
	$(BIN)/python -m pytest -m slow --timeout 0

bench: .venv/built
	$(BIN)/ejmp bench --precision fp32 --seconds 90 --output results/blocks.json

track: .venv/built
	$(BIN)/ejmp bench compare $(BASE) . --markdown results/track.md --output results/track.json $(TRACK)

fuzz: .venv/built
	PYTHONPATH=tests $(BIN)/python -m support.fuzz_readers 100000

attack: .venv/built
	PYTHONPATH=tests $(BIN)/python -m support.attack_ops
	PYTHONPATH=tests $(BIN)/python -m support.attack_sources
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m support.attack_runs

# g++'s libraries must be there before Python's. Leaks are not looked for: Python and torch keep what they have until the
# process ends, and every report would be of them.
SANITIZED = LD_PRELOAD="$(foreach x,libasan.so libubsan.so libstdc++.so.6,$(shell g++ -print-file-name=$x))" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096:exitcode=99 \
	UBSAN_OPTIONS=print_stacktrace=1:exitcode=99 PYTHONPATH=build/sanitize:.:tests

sanitize: .venv/installed
	PYTHONPATH=.:kernels:tests $(BIN)/python -m support.build_native sanitized
	$(SANITIZED) $(BIN)/python -m pytest -q -k "native and not instruction_sets or graph" tests/kernels/test_ops.py tests/graph
	$(SANITIZED) $(BIN)/python -m support.attack_ops --backend native
	$(SANITIZED) $(BIN)/python -m support.attack_ops --backend emulated --library build/sanitize/emulated.so

demo: .venv/built
	$(BIN)/ejmp reproduce table1 --run runs/demo --processes 2 --seeds 1

gpu:
	$(GPU) all $(GPU_OPTIONS)

$(GPU_STEPS): gpu-%:
	$(GPU) $* $(GPU_OPTIONS)

gpu-dry:
	TRITON_INTERPRET=1 $(GPU) all --dry $(GPU_OPTIONS)

# What a machine with a GPU has, but for the GPU. Triton 3.6's interpreter does not know what NumPy 2.4 refuses.
LIKE := $(CURDIR)/build/gpu-like
LIKE_PACKAGES := torch==2.11.0 triton==3.6.0 "numpy<2.4" "setuptools>=77,<82" ninja pytest pytest-benchmark

$(LIKE)/installed:
	$(PYTHON) -m venv --clear $(LIKE)
	$(LIKE)/bin/python -m pip --quiet --disable-pip-version-check install $(LIKE_PACKAGES)
	touch $@

gpu-like: $(LIKE)/installed
	rm -rf $(LIKE)/tree && mkdir $(LIKE)/tree
	git ls-files -z | xargs -0 cp --parents --target-directory=$(LIKE)/tree
	cd $(LIKE)/tree && PATH=$(LIKE)/bin:$$PATH MAX_JOBS=$${MAX_JOBS:-2} ../bin/python setup.py --quiet build_ext --inplace
	cd $(LIKE)/tree && PYTHONPATH=kernels ../bin/python -c \
		"import sys; from ejmp_kernels.availability import why_unavailable; sys.exit(why_unavailable('cuda'))"
	cd $(LIKE)/tree && TRITON_INTERPRET=1 PYTHONPATH=.:kernels:tests:benchmarks ../bin/python -m pytest -q -p no:cacheprovider \
		-k "90 or memory" tests/kernels/test_triton_compile.py
	cd $(LIKE)/tree && $(subst $(PYTHON),../bin/python,$(GPU)) all --dry

lint: .venv/built
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	$(BIN)/clang-format --dry-run --Werror $(CSRC)

format: .venv/built
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format . ; $(BIN)/clang-format -i $(CSRC)

# Third-party packages: needs the network once, and again only when pyproject.toml changes. The package itself goes in
# without its extension (CXX=false), which is built below.
.venv/installed: pyproject.toml
	$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('ejmp needs Python 3.11 or newer: PYTHON=...')"
	$(PIP) --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP) install $(TORCH) "setuptools>=77"
	CXX=false $(PIP) install --no-build-isolation --editable .[dev]
	touch $@

# The C++ extension: no network. Without a compiler the package stays in plain torch, says so, and tries again next time.
.venv/built: .venv/installed setup.py $(CSRC)
	$(BIN)/python setup.py --quiet build_ext --inplace --force
	test ! -e kernels/ejmp_kernels/_C.so || touch $@

clean:
	rm -rf .venv build results runs *.egg-info kernels/ejmp_kernels/_C*.so
