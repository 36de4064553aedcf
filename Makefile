# Every target makes .venv and installs into it what the target needs. The machine has Python, a C++ compiler and a
# package index; nothing else is assumed.
#   make demo           trains a small BERT on a real corpus and fills masks with it; 5 minutes with the installation
#   make install        installs everything that the other targets need
#   make test           runs the default test suite
#   make test-slow      runs the tests that take longer
#   make test-transformers4  runs accelerate()'s tests with transformers 4.48 and 4.57, each in an environment below build/
#   make test-gpu-static  compiles the Triton kernels in every configuration, and the CUDA kernels, for GPUs that are not
#                       here, and inspects the machine code
#   make fuzz           reads 5,000 damaged files of every format
#   make test-ptx       runs every sample of every op, forward and backward, with the GPU backends on the PTX machine
#   make bench          runs the benchmarks that need no other environment
#   make bench-peers    runs the end-to-end benchmark against all peers, each in an environment of its own
#   make bench-step     lists where a training step's time goes, alone and beside a busy process; 5 minutes
#   make bench-scaling  measures the cost against the number of tokens and the sequence length; about 10 minutes
#   make bench-scripts  times users' scripts (Trainer, sentence-transformers) as they are and accelerated; two hours
#   make bench-families times newer encoders of transformers as they are and accelerated; 15 minutes
#   make bench-decoding times texts, prompts and training steps of a GPT-2 beside transformers'; 5 minutes
#   make bench-lstm     times fastbert.nn.LSTM beside torch's on packed and padded batches; 3 minutes
#   make bench-contrasts  compares BERT, GPT and a bidirectional LSTM: costs, tasks of distance, pretraining and
#                       fine-tuning in equal time; two and a half hours, and a rerun goes on
#   make bench-pretraining  compares recipes of pretraining for equal time; 13 hours of one core, and a rerun goes on
#   make bench-int8-accuracy  measures what quantize costs in accuracy, also of two models that it trains; an hour.
#                       BENCH_ARGS="--sentences FILE --reactions FILE" adds rows of your files
#   make bench-compress measures size, metric and speed of pruned, distilled and int8 models, which it makes once; about
#                       two hours, then minutes. BENCH_ARGS="--works movies" takes one of the two works
#   make bench-tradeoff  prunes the model of movie sentences to a list of speed-ups, and draws its accuracy over its speed
#   make bench-students  distils students of 3 layers, and trains them without a teacher; goes on where it ended
#   make bench-explaining  times integrated gradients beside captum's, and measures the memory of attention maps
#   make bench-faithfulness  judges attributions of tokens on the models of make bench-int8-accuracy
#   make bench-languages  measures a multilingual model on Tatoeba: BENCH_ARGS="--tatoeba FILE"; 20 minutes
#   make bench-emoji    trains two towers on emoji, twice half an hour, and measures the memory of a step; a rerun goes on
#   make gpu            on a machine with a GPU: parity, memory and race checks and timings, into docs/gpu.md
#   make gpu-report     writes docs/gpu_report.md: figures of the kernels that need no GPU
#   make sanitize       runs the native tests under AddressSanitizer and UBSan: every op on every instruction set (on one
#                       core of an AMD EPYC, 2026-11-25: 7 minutes to build, 4 to run; later runs build what has changed)
#   make lint           runs ruff, clang-format and mypy
# PYTHON is the interpreter that makes .venv. PIP_ARGS are arguments of pip; on a machine where pip would choose a torch
# for CUDA, this takes the one for the CPU:
#   make test PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
# FASTBERT_CUDA=1 makes `make demo` build the CUDA module where no GPU is visible.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
# pip before 25.3 takes the versions of an isolated build's tools from the first, later ones from the second
PINNED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt
ENVIRONMENT = $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
# pip would compile the packages' Python files one after the other; the demo imports few of them and compiles none. Where
# PYTHONDONTWRITEBYTECODE is set, each of the tests' many processes would compile our own files again. Nothing imports the
# packages' tests
COMPILE = $(PY) -m compileall -q -j 0 -x /tests/ $(VENV)/lib fastbert kernels benchmarks >/dev/null
PIP_INSTALL = $(PINNED) $(PY) -m pip install --no-compile $(PIP_ARGS)
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
NATIVE := $(filter csrc/%,$(SOURCES))
# "GPU" where one is visible
GPU = $(findstring GPU,$(shell nvidia-smi -L 2>/dev/null))

.DELETE_ON_ERROR:
.PHONY: install demo test test-slow test-transformers4 test-gpu-static test-ptx fuzz gpu gpu-report sanitize bench bench-peers bench-step bench-scaling bench-scripts bench-families bench-lstm bench-decoding bench-contrasts bench-pretraining bench-int8-accuracy bench-compress bench-tradeoff bench-students bench-explaining bench-faithfulness bench-languages bench-emoji lint

install: $(INSTALLED)

# what pyproject.toml requires with the extras train, test and dev, a line each
REQUIRED = $(PY) -c "from setuptools.config.pyprojecttoml import read_configuration as read; \
	p = read('pyproject.toml', expand=False)['project']; e = p['optional-dependencies']; \
	print(*p['dependencies'], *e['train'], *e['test'], *e['dev'], sep='\n')"

# the compiler works while pip downloads and unpacks; the last line finds every object made, and reports what failed.
# Each stamp is touched last: an interrupted installation is done again
$(INSTALLED): $(SOURCES)
	$(ENVIRONMENT)
	$(PIP_INSTALL) -q setuptools pybind11 ninja
	$(FOR_TESTS) $(PY) setup.py -q build_ext --inplace & \
		$(REQUIRED) | $(PIP_INSTALL) -r /dev/stdin || { kill $$!; exit 1; }; wait $$! || true
	$(FOR_TESTS) $(PIP_INSTALL) --no-deps -e .
	$(COMPILE) || true
	touch $@

# without a GPU only the tests read the CUDA module, and those of `make test` read its PTX
$(INSTALLED): FOR_TESTS = FASTBERT_CPU_EMULATE=1 $(if $(FASTBERT_CUDA_ARCHS)$(GPU),,FASTBERT_CUDA_ARCHS=ptx)

# what the demo needs: no test tools, no CPU kernels for other processors, and no CUDA module where no GPU is visible. The
# stamp's name holds FASTBERT_CUDA
DEMO_CUDA = $(or $(FASTBERT_CUDA),$(if $(GPU),auto,0))
DEMO_INSTALLED = $(VENV)/.installed-demo-cuda-$(DEMO_CUDA)
$(VENV)/.installed-demo-cuda-%: $(SOURCES)
	$(ENVIRONMENT)
	FASTBERT_CPU_NATIVE=1 FASTBERT_CUDA=$* $(PIP_INSTALL) -e .
	touch $@

# what `make install` has installed serves the demo too
demo: $(or $(wildcard $(INSTALLED)),$(DEMO_INSTALLED))
	$(PY) -m fastbert.cli.demo --out runs/demo

# the second process has Triton run its kernels on the CPU, which it decides when it is imported. In bf16 it runs them in
# `make test-slow`: the tests of the PTX machine run bf16 as the compiler made it
test: $(INSTALLED)
	$(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -n auto -k 'triton and not bf16' $(PYTEST_ARGS) tests/ops tests/gpu/test_triton.py tests/gpu/test_triton_tune.py

test-slow: $(INSTALLED)
	$(PY) -m pytest -m slow $(PYTEST_ARGS)
	TRITON_INTERPRET=1 $(PY) -m pytest -m 'slow or not slow' -n auto -k triton $(PYTEST_ARGS) tests/ops tests/gpu/test_triton.py

test-transformers4: $(INSTALLED)
	$(PY) tests/accelerate/transformers4.py --pip-args="$(PIP_ARGS)" -n auto $(PYTEST_ARGS)

test-gpu-static: $(INSTALLED)
	FASTBERT_CUDA=1 FASTBERT_CPU_EMULATE=1 $(PIP_INSTALL) --no-deps -e .
	$(PY) -m pytest -m 'gpu_static or not slow' $(PYTEST_ARGS) tests/gpu/test_cuda_build.py
	$(PY) -m pytest -m gpu_static -n auto $(PYTEST_ARGS) tests/gpu/test_triton_static.py

test-ptx: $(INSTALLED)
	$(PY) -m pytest -m ptx_full -n auto $(PYTEST_ARGS) tests/ptx

fuzz: $(INSTALLED)
	$(PY) -m pytest -n auto --hypothesis-profile=fuzz tests/test_fuzz.py $(PYTEST_ARGS)

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
	tests/cpu/test_cpu_properties.py tests/models/test_freeze.py tests/train/test_lamb.py \
	tests/train/test_muon.py
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

bench-step: $(INSTALLED)
	for fill in real full; do $(PY) -m benchmarks.models.account --fill $$fill || exit 1; done
	$(PY) -m benchmarks.models.account --busy

bench-scaling: $(INSTALLED)
	$(PY) -m benchmarks.models.scaling $(BENCH_ARGS)
	$(PY) -m benchmarks.models.relations $(BENCH_ARGS)
	$(PY) -m benchmarks.models.distil_step $(if $(filter --quick,$(BENCH_ARGS)),--quick)

bench-scripts: $(INSTALLED)
	$(PY) -m benchmarks.models.scripts $(BENCH_ARGS)

bench-families: $(INSTALLED)
	$(PY) -m benchmarks.models.families $(BENCH_ARGS)

bench-decoding: $(INSTALLED)
	$(PY) -m benchmarks.models.decoding $(BENCH_ARGS)

bench-lstm: $(INSTALLED)
	$(PY) -m benchmarks.models.lstm $(BENCH_ARGS)

bench-contrasts: $(INSTALLED)
	$(PY) -m benchmarks.models.contrasts $(BENCH_ARGS)

bench-pretraining: $(INSTALLED)
	$(PY) -m benchmarks.models.pretraining $(BENCH_ARGS)

bench-int8-accuracy: $(INSTALLED)
	$(PY) -m benchmarks.models.int8_accuracy $(BENCH_ARGS)

bench-languages: $(INSTALLED)
	$(PY) -m benchmarks.models.languages $(BENCH_ARGS)

bench-emoji: $(INSTALLED)
	$(PY) -m benchmarks.models.emoji $(BENCH_ARGS)

bench-compress: $(INSTALLED)
	$(PY) benchmarks/peers/install.py onnxruntime ctranslate2 --pip-args="$(PIP_ARGS)"
	$(PY) -m benchmarks.models.compression $(BENCH_ARGS)

bench-tradeoff: $(INSTALLED)
	$(PY) -m benchmarks.models.tradeoff $(BENCH_ARGS)

bench-students: $(INSTALLED)
	$(PY) -m benchmarks.models.students $(BENCH_ARGS)

bench-explaining: $(INSTALLED)
	$(PIP_INSTALL) -q --no-deps captum
	$(PY) -m benchmarks.models.explaining $(BENCH_ARGS)

bench-faithfulness: $(INSTALLED)
	$(PY) -m benchmarks.models.faithfulness $(BENCH_ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE) tests/*/*.cpp tests/*/*.h
	$(PY) -m mypy
