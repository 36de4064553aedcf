# Every target makes .venv and installs what it needs; only Python, a C++ compiler and a package index are assumed.
#   make demo        pretrain a small BERT on a real corpus and fill masks with it (about two minutes of training)
#   make test        the default test suite        make test-slow   what takes longer than that
#   make test-transformers4  accelerate() with transformers 4.48 and 4.57, each in an environment below build/
#   make bench       the benchmarks that need no environment but this one
#   make bench-peers the end-to-end benchmark against all peers, each in its own environment
#   make bench-scaling  cost against the number of tokens and the length of a sequence, with a plot; 4 to 6 minutes
#   make bench-scripts  users' scripts (Trainer, sentence-transformers) as they are and accelerated, step by step; two hours
#   make test-gpu-static  the Triton kernels in every configuration compiled for GPUs that are not here, and inspected
#   make test-ptx    every sample of every op, forward and backward, with the GPU backends on the PTX machine
#   make gpu         on a machine with a GPU: parity, memory and race checks, timings, into docs/gpu.md
#   make gpu-report  what those compilations and counted bytes say, as docs/gpu_report.md
#   make sanitize    the native tests under AddressSanitizer and UBSan: every op on every instruction set (it took 7 min
#                    to build and 4 to run on one core of an AMD EPYC, 2026-11-25; what was built before is kept)
#   make lint        ruff, clang-format, mypy
# PYTHON chooses the interpreter, PIP_ARGS goes to pip: for torch without CUDA on a machine that would get it with,
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# pip before 25.3 takes the versions of an isolated build's tools from the first, later ones from the second
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
NATIVE := $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)

.DELETE_ON_ERROR:
.PHONY: install demo test test-slow test-transformers4 test-gpu-static test-ptx gpu gpu-report sanitize bench bench-peers bench-scaling bench-scripts lint

install: $(INSTALLED)

# the stamp is touched last: an interrupted install is done again
$(INSTALLED): pyproject.toml setup.py constraints.txt $(NATIVE)
	$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	FASTBERT_CPU_EMULATE=1 $(PINNED) $(PY) -m pip install $(PIP_ARGS) -e '.[train,test,dev]'
	touch $@

demo: $(INSTALLED)
	$(PY) -m fastbert.cli.demo --out runs/demo

# the second process has Triton run its kernels on the CPU, which it decides when it is imported
test: $(INSTALLED)
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -n auto -k triton $(PYTEST_ARGS) tests/ops tests/gpu/test_triton.py tests/gpu/test_triton_tune.py

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow $(PYTEST_ARGS)

test-transformers4: $(INSTALLED)
	$(PY) tests/accelerate/transformers4.py --pip-args="$(PIP_ARGS)" -n auto $(PYTEST_ARGS)

test-gpu-static: $(INSTALLED)
	$(PY) -m pytest -m gpu_static -n auto $(PYTEST_ARGS) tests/gpu/test_triton_static.py

test-ptx: $(INSTALLED)
	$(PY) -m pytest -m ptx_full -n auto $(PYTEST_ARGS) tests/ptx

gpu: $(INSTALLED)
	$(PY) -m benchmarks.gpu.gpu $(BENCH_ARGS)
	$(PY) -m benchmarks.gpu.gpu_page

gpu-report: $(INSTALLED)
	$(PY) -m benchmarks.gpu.gpu_report

# a whole second package in a folder of its own, whose module is built with these flags. Python itself leaks, and torch
# is not instrumented: its tensors' memory is watched because it comes from malloc
SANITIZED := build/sanitize
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1
SANITIZED_TESTS := tests/cpu/test_cpu_native.py tests/cpu/test_cpu_math.py tests/cpu/test_cpu_losses.py tests/cpu/test_cpu_threads.py \
	tests/cpu/test_cpu_properties.py tests/models/test_freeze.py
# pytest, not python -m pytest: the latter would import the checkout's own package
sanitize: RUN = PYTHONPATH=$(SANITIZED)/lib ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"
sanitize: $(INSTALLED)
	$(PINNED) $(PY) -m pip install -q $(PIP_ARGS) pybind11 ninja setuptools
	CXX="$(CXX)" FASTBERT_BUILD=$(SANITIZED) FASTBERT_CUDA=0 FASTBERT_CPU_EMULATE=1 FASTBERT_CPU_FLAGS="$(SANITIZERS)" \
		$(PY) setup.py -q build --build-base $(SANITIZED)/base --build-lib $(SANITIZED)/lib
	$(RUN) $(PY) -P -c "from fastbert.backend import cpu; assert 'fsanitize' in cpu.native.build_info()['flags'], cpu.unavailable"
	$(RUN) $(VENV)/bin/pytest --capture=sys -x tests/ops -k cpu $(PYTEST_ARGS)
	$(RUN) $(VENV)/bin/pytest --capture=sys -x $(SANITIZED_TESTS) $(PYTEST_ARGS)

bench: $(INSTALLED)
	$(PY) -m pytest benchmarks/ops --benchmark-only $(PYTEST_ARGS)
	$(PY) -m benchmarks.report.tables
	$(PY) -m benchmarks.models.bench_bert --peers fastbert sdpa compiled --rows 'infer-*-fp32' '*-real-fp32' \
		--rounds 3 --limit 20 --out runs/bench/bert.json

bench-peers: $(INSTALLED)
	$(PY) benchmarks/peers/install.py --pip-args="$(PIP_ARGS)"
	$(PY) -m benchmarks.models.bench_bert $(BENCH_ARGS)
	$(PY) -m benchmarks.report.readme

bench-scaling: $(INSTALLED)
	$(PY) -m benchmarks.models.scaling $(BENCH_ARGS)

bench-scripts: $(INSTALLED)
	$(PY) -m benchmarks.models.scripts $(BENCH_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE) tests/*.cpp tests/*/*.cpp
	$(PY) -m mypy
